"""Sources in remote stores: the same records as on a disk, whatever goes wrong on the way, and the cache on disk."""

import functools
import http.server
import os
import random
import shutil
import subprocess
import threading
from pathlib import Path

import annotated_sets
import fsspec
import numpy as np
import pytest
from caption_sets import write_coco, write_visual_genome
from object_store import object_store, upload
from parquet_sets import written_parquet
from tar_sets import picture, write_tars

from visionfm_jax import storage
from visionfm_jax.data.sources import disk_cache, open_source, places, read_record, store, tar_index
from visionfm_jax.data.sources.kinds import KINDS, BenchmarkConfig, FolderConfig, NumpyConfig, TableConfig, TarsConfig
from visionfm_jax.errors import ConfigError, DataError, StorageError


@pytest.fixture(scope="module")
def bucket():
    with pytest.MonkeyPatch.context() as patch, object_store(patch) as proxy:
        yield proxy


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(storage, "WAITS", (0.01,) * 6)
    disk_cache._written.clear()
    disk_cache._say.cache_clear()
    return tmp_path / "cache/visionfm_jax/store"


@pytest.fixture
def proxy(bucket):
    yield bucket
    bucket.fault = lambda number, path: ""
    bucket.faults.clear()


def class_folders(folder: Path, count: int = 9, classes: int = 3) -> Path:
    for i in range(count):
        path = folder / f"train/class{i % classes}/{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(i))
    return folder


def same(local, remote) -> None:
    assert len(local) == len(remote) > 0
    for i in range(len(local)):
        a, b = read_record(local, i), read_record(remote, i)
        assert a.keys() == b.keys()
        assert all(str(a[name]) == str(b[name]) for name in a)
        assert local.key(i) == remote.key(i)
    assert local.fingerprint() == remote.fingerprint()
    assert (local.num_classes, local.class_names) == (remote.num_classes, remote.class_names)


def test_every_record_is_the_same_over_5xx_cut_and_stalled_answers(tmp_path, proxy, monkeypatch, capsys):
    monkeypatch.setattr(store, "ANSWER", 0.3)
    tars, folder = write_tars(tmp_path / "tars", 2, 8), class_folders(tmp_path / "images")
    urls = upload(tars, "tars"), upload(folder, "images")
    chance = random.Random(0)
    proxy.fault = lambda number, path: chance.choice(["5xx", "cut", "slow"]) if number % 4 == 0 else ""
    local = open_source(TarsConfig(path=str(tars))), open_source(FolderConfig(path=str(folder)))
    remote = open_source(TarsConfig(path=urls[0])), open_source(FolderConfig(path=urls[1]))
    for a, b in zip(local, remote, strict=True):
        assert [read_record(a, i) for i in range(len(a))] == [read_record(b, i) for i in range(len(b))]
    proxy.fault = lambda number, path: ""
    for a, b in zip(local, remote, strict=True):
        same(a, b)
    assert set(proxy.faults) == {"5xx", "cut", "slow"}
    said = capsys.readouterr().err
    assert said.count("trying again") == len(proxy.faults)
    assert "record 00000/00000000" in said
    assert "on purpose" in said  # what the store said
    assert "no answer in time" in said
    assert "payload is not completed" in said


def test_a_store_that_fails_for_good_is_an_error_by_its_kind(tmp_path, proxy):
    url = upload(write_tars(tmp_path / "tars", 1, 2), "lasting")
    source = open_source(TarsConfig(path=url))
    proxy.fault = lambda number, path: "403"
    with pytest.raises(DataError, match=r"record 00000/\[0\] cannot be read: .*give this user access"):
        read_record(source, 0)
    assert len(proxy.faults) == 2  # for the record and its key: no second try
    proxy.fault = lambda number, path: "5xx"
    with pytest.raises(StorageError, match="7 times in"):
        read_record(source, 1)
    proxy.fault = lambda number, path: ""
    with pytest.raises(DataError, match="s3://bucket/none: the path does not exist"):
        open_source(TarsConfig(path="s3://bucket/none"))
    with pytest.raises(DataError, match=r"s3://bucket/none \[train\]: the path does not exist"):
        open_source(FolderConfig(path="s3://bucket/none"))


class Answer(Exception):
    def __init__(self, status):
        super().__init__("what the server said")
        self.status = status


@pytest.mark.parametrize(
    ("status", "kind"),
    [(404, FileNotFoundError), (410, FileNotFoundError), (401, PermissionError), (403, PermissionError)]
    + [(status, OSError) for status in (408, 429, 500, 502, 503, 504)],
)
def test_which_answers_of_a_server_may_pass(status, kind):
    error = store._as_os_error(Answer(status))
    assert type(error) is kind
    assert storage._is_lasting(error) == (kind is not OSError)
    assert "what the server said" in str(error)


def test_what_was_read_once_comes_from_the_disk_and_connections_are_kept(tmp_path, proxy, cache, monkeypatch):
    source = open_source(TarsConfig(path=upload(write_tars(tmp_path / "tars", 1, 20), "kept")))
    monkeypatch.setenv(disk_cache.LIMIT, "0")
    opened, asked = proxy.connections, proxy.requests
    first = [source[i] for i in range(20)]
    assert (proxy.connections - opened, proxy.requests - asked) == (0, 20)
    assert not cache.exists()
    monkeypatch.delenv(disk_cache.LIMIT)
    assert [source[i] for i in range(20)] == first
    asked = proxy.requests
    assert [source[i] for i in range(20)] == first
    assert proxy.requests == asked
    for path in cache.rglob("*"):  # damaged on the disk
        if path.is_file():
            path.write_bytes(path.read_bytes()[:-9])
    assert [source[i] for i in range(20)] == first
    assert proxy.requests == asked + 20


def test_the_cache_is_bounded_and_loses_what_was_not_used_for_longest(cache, monkeypatch):
    monkeypatch.setenv(disk_cache.LIMIT, str(64 * 4000 / 1e9))  # 4,000 bytes a bucket
    monkeypatch.setattr(disk_cache, "BUCKETS", 1)
    monkeypatch.setenv(disk_cache.LIMIT, "4e-6")
    for i in range(20):
        disk_cache.put(f"k{i}", bytes([i]) * 500)
        os.utime(disk_cache._path(f"k{i}"), ns=(i, i))
        if i > 3:
            assert disk_cache.get("k3") == bytes([3]) * 500  # used again and again
    kept = [i for i in range(20) if disk_cache.get(f"k{i}")]
    assert kept == [3, *range(20 - len(kept) + 1, 20)]
    assert sum(path.stat().st_size for path in cache.rglob("*") if path.is_file()) <= 4000
    disk_cache.put("large", bytes(2000))
    assert disk_cache.get("large") is None


def test_a_full_disk_means_no_cache(cache, monkeypatch, caplog):
    monkeypatch.setattr(Path, "write_bytes", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    disk_cache.put("k", b"x")
    assert disk_cache.get("k") is None
    assert "No space left on device" in caplog.text
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache.parent / "other"))
    usage = shutil.disk_usage(cache.parent)._replace(free=1)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    disk_cache.put("k", b"x")
    assert disk_cache.get("k") is None
    assert "less than 10% of the disk is free" in caplog.text


def test_a_limit_that_is_no_number_is_refused(monkeypatch):
    monkeypatch.setenv(disk_cache.LIMIT, "lots")
    with pytest.raises(ConfigError, match="VISIONFM_CACHE_GB=lots: must be a number of GB"):
        disk_cache.get("k")


def made(kind: str, folder: Path):
    """A configuration of each kind that is files."""
    if kind == "coco_captions":
        return KINDS[kind](path=str(write_coco(folder, [["a"], ["b", "c"]])), split="train2017")
    if kind == "visual_genome":
        return KINDS[kind](path=str(write_visual_genome(folder, [["a"], ["b", "c"]])))
    if kind == "parquet":
        return KINDS[kind](path=str(written_parquet(folder)))
    if kind == "folder":
        return FolderConfig(path=str(class_folders(folder)))
    if kind == "table":
        (class_folders(folder) / "t.csv").write_text("image,caption\ntrain/class0/0.png,one\ntrain/class1/1.png,two\n")
        return TableConfig(path=str(folder / "t.csv"))
    if kind == "numpy":
        folder.mkdir()
        np.savez(folder / "train.npz", image=np.arange(48, dtype=np.uint8).reshape(4, 2, 2, 3), label=np.arange(4))
        return NumpyConfig(path=str(folder))
    if kind == "benchmark":
        return BenchmarkConfig(path=str(write_tars(folder / "test").parent))
    return annotated_sets.write(kind, folder)


@pytest.mark.parametrize(
    "kind",
    [
        "folder", "numpy", "coco_captions", "visual_genome", "coco", "coco_panoptic", "voc", "yolo", "class_maps",
        "ade20k", "parquet", "table", "benchmark",
    ],
)  # fmt: skip
def test_every_kind_that_is_files_is_read_from_a_store(kind, tmp_path):
    config = made(kind, tmp_path / "data")
    memory = fsspec.filesystem("memory")
    memory.put(str(tmp_path / "data"), "/stored", recursive=True)
    try:
        url = "memory://stored" + config.path.removeprefix(str(tmp_path / "data"))
        same(open_source(config), open_source(type(config)(**{**vars(config), "path": url})))
    finally:
        memory.rm("/stored", recursive=True)


@pytest.fixture
def site(tmp_path):
    """An http server without listings, which knows parts of files."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def list_directory(self, path):
            self.send_error(403)

        def send_head(self):
            path = Path(self.translate_path(self.path))
            if not path.is_file():
                self.send_error(404)
                return None
            content, span = path.read_bytes(), self.headers.get("Range")
            if span:
                first, last = map(int, span.removeprefix("bytes=").split("-"))
                content = content[first : last + 1]
            self.send_response(206 if span else 200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Handler, directory=str(tmp_path / "site"))
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_an_http_server_is_listed_by_a_file_or_a_pattern(tmp_path, site):
    folder = class_folders(tmp_path / "site/images")
    local = open_source(FolderConfig(path=str(folder)))
    with pytest.raises(DataError, match=r"there is no files.txt that does; make it there: find \. -type f"):
        open_source(FolderConfig(path=f"{site}/images"))
    subprocess.run(store.MAKE_LISTING, shell=True, cwd=folder, check=True)
    same(local, open_source(FolderConfig(path=f"{site}/images")))
    with open(folder / "files.txt", "a") as file:
        file.write("train/class0/0.png\t1\t2\n")
    with pytest.raises(DataError, match=r"files.txt: line \d+ names 'train/class0/0.png' again"):
        open_source(FolderConfig(path=f"{site}/images"))
    tars = write_tars(tmp_path / "site/tars", 3, 2)
    same(open_source(TarsConfig(path=str(tars))), open_source(TarsConfig(path=f"{site}/tars/{{00000..00002}}.tar")))
    with pytest.raises(DataError, match="the path does not exist"):
        open_source(TarsConfig(path=f"{site}/tars/{{00000..00005}}.tar"))


def test_a_page_in_place_of_a_tar_is_no_tar(tmp_path, site, monkeypatch):
    """A server that asks for a login answers so, and says the size of the file all the same."""
    write_tars(tmp_path / "site/tars", 2, 2)
    asked = store.Store._range

    def short(self, path, start, stop):
        return b"<html>" if "00001" in path else asked(self, path, start, stop)

    with monkeypatch.context() as patch:
        patch.setattr(store.Store, "_range", short)
        with pytest.raises(StorageError, match=r"00001.tar.* 6 bytes came of the "):
            open_source(TarsConfig(path=f"{site}/tars/{{00000..00001}}.tar"))
    assert len(open_source(TarsConfig(path=f"{site}/tars/{{00000..00001}}.tar"))) == 4


def test_of_many_requests_those_that_fail_are_asked_again(tmp_path, site, monkeypatch):
    write_tars(tmp_path / "site/tars", 1, 12)
    source = open_source(TarsConfig(path=f"{site}/tars/{{00000..00000}}.tar"))
    asked, seen = store.Store._range, set()

    def each_fails_once(self, path, start, stop):
        if start not in seen:
            seen.add(start)
            raise OSError("503")
        return asked(self, path, start, stop)

    monkeypatch.setattr(store.Store, "_range", each_fails_once)
    assert len(set(tar_index.keys(source.store, "00000.tar", source.index.records))) == 12


def test_a_pattern_names_some_of_the_tars_of_a_folder(tmp_path):
    folder = write_tars(tmp_path / "tars", 5, 2)
    source = open_source(TarsConfig(path=f"{folder}/0000{{1..2,}}.tar".replace("{1..2,}", "{1..2}")))
    assert [source.key(i).partition("/")[0] for i in range(4)] == ["00001", "00001", "00002", "00002"]
    assert not list(folder.glob("*.index"))  # that of the whole folder has its place there
    with pytest.raises(DataError, match=r"names 00001.tar twice"):
        open_source(TarsConfig(path=f"{folder}/0000{{1,2,1}}.tar"))
    with pytest.raises(DataError, match=r"2 of 7 files are missing, the first is 00005.tar"):
        open_source(TarsConfig(path=f"{folder}/0000{{0..6}}.tar"))


def test_paths_in_stores_are_as_those_on_a_disk():
    memory = fsspec.filesystem("memory")
    memory.pipe({"/walk/a/b/c.txt": b"one\r\ntwo", "/walk/a/.hidden": b"", "/walk/d.txt": b""})
    try:
        root = places.place_of("memory://walk")
        assert places.below(root) == ["a/b/c.txt", "d.txt"]
        assert [str(path) for path in root.glob("*/b/*.txt")] == ["memory://walk/a/b/c.txt"]
        file = root / "a" / "b/c.txt"
        assert (file.stem, file.suffix, str(file.parent)) == ("c", ".txt", "memory://walk/a/b")
        assert file.read_text() == "one\ntwo"
        assert str(file.relative_to(root / "a")) == "b/c.txt"
        assert not (root / "x").exists()
        with pytest.raises(FileNotFoundError):
            (root / "x").stat()
        with pytest.raises(FileNotFoundError):
            (root / "x").read_bytes()
    finally:
        memory.rm("/walk", recursive=True)
