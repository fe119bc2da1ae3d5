"""Pairs in tars: order, damage, stores, processes, and the index that is kept."""

import hashlib
import io
import multiprocessing
import os
import pickle
import tarfile
import threading
import tracemalloc
import zlib
from concurrent.futures import ThreadPoolExecutor

import fsspec
import numpy as np
import pytest
from absl import logging
from tar_sets import caption, members, picture, tar_bytes, write_tars

from visionfm_jax.data import transforms
from visionfm_jax.data.sources import store as store_module
from visionfm_jax.data.sources import tar_index
from visionfm_jax.data.sources.selection import write_selection
from visionfm_jax.data.sources.store import Store
from visionfm_jax.data.sources.tars import TarPairs
from visionfm_jax.errors import DataError

INDEX = "visionfm_pairs_txt.index"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path):
    return write_tars(tmp_path / "tars")


@pytest.fixture
def scanned(monkeypatch):
    """Names of the tars that are read for their index."""
    names = []
    scan = tar_index.scan

    def spy(store, suffix, tar):
        names.append(tar[0])
        return scan(store, suffix, tar)

    monkeypatch.setattr(tar_index, "scan", spy)
    return names


def keys(source) -> list[str]:
    return [source.key(i) for i in range(len(source))]


def test_records_lie_in_order_of_tar_and_position(folder):
    source = TarPairs(str(folder))
    assert len(source) == 12
    assert source.key(5) == "00001/000000101"
    assert source[5] == {"image": picture(101), "caption": caption(101)}
    assert source[11]["caption"] == caption(203)
    assert transforms.decode(source[0]["image"]).ndim == 3
    assert source.name == f"tars {folder}"
    assert source.report() == {"tars": 3, "pairs": 12, "records": 12, "cut": [], "skipped": {}}
    for index in (12, -1):
        with pytest.raises(IndexError, match="of 12"):
            source[index]


def test_members_may_come_in_any_order_and_kind(tmp_path):
    files = {
        "dir/b.txt": b"second",
        "dir/a.PNG": picture(1),
        "readme.md": b"no pair",
        "dir/a.txt": b"first",
        "dir/lonely.txt": b"no picture",
        "dir/b.webp": picture(2),
        "a" * 150 + ".txt": b"a long name",
        "a" * 150 + ".jpg": picture(3),
    }
    (tmp_path / "x.tar").write_bytes(tar_bytes(files))
    source = TarPairs(str(tmp_path))
    assert [source[i]["caption"] for i in range(3)] == ["first", "second", "a long name"]
    assert source[1]["image"] == picture(2)
    assert keys(source)[:2] == ["x/a", "x/b"]


def test_picture_and_caption_far_apart_are_read_apart(tmp_path, monkeypatch):
    files = {"1.jpg": picture(1), "1.npy": bytes(2**17), "1.txt": b"far"}
    (tmp_path / "x.tar").write_bytes(tar_bytes(files))
    source = TarPairs(str(tmp_path))
    lengths = []
    read = Store.read
    monkeypatch.setattr(Store, "read", lambda s, n, a, b: lengths.append(b - a) or read(s, n, a, b))
    assert source[0] == {"image": picture(1), "caption": "far"}
    assert lengths == [len(picture(1)), 3]


def test_another_member_can_be_the_caption(tmp_path):
    (tmp_path / "x.tar").write_bytes(tar_bytes({"1.jpg": picture(1), "1.txt": b"alt", "1.long.txt": b"a long text"}))
    assert TarPairs(str(tmp_path))[0]["caption"] == "alt"
    assert TarPairs(str(tmp_path), caption_key="long.txt")[0]["caption"] == "a long text"


def test_pictures_without_a_caption_are_left_out_and_named(folder, caplog):
    files = members(300, 9, k301=None, k303=b"", k304=b" \n", k306=b"caf\xe9", k308=None)
    (folder / "00003.tar").write_bytes(tar_bytes(files))
    logging.get_absl_logger().propagate = True
    source = TarPairs(str(folder))
    assert keys(source)[12:] == [f"00003/000000{n}" for n in (300, 302, 305, 307)]
    assert source.report()["skipped"] == {
        "no caption": {"count": 2, "first": ["00003/000000301", "00003/000000308"]},
        "an empty caption": {"count": 2, "first": ["00003/000000303", "00003/000000304"]},
        "a caption that is not UTF-8": {"count": 1, "first": ["00003/000000306"]},
    }
    assert "1 pictures have a caption that is not UTF-8 and are left out: 00003/000000306" in caplog.text


def ends(files: dict[str, bytes]) -> dict[str, tuple[int, int]]:
    """Where the content of each member begins and ends in its tar."""
    with tarfile.open(fileobj=io.BytesIO(tar_bytes(files))) as tar:
        return {m.name: (m.offset_data, m.offset_data + m.size) for m in tar}


@pytest.mark.parametrize(
    ("member", "where", "left", "key"),
    [
        ("000000302.jpg", 10, 2, "000000302"),  # within a picture
        ("000000302.jpg", -600, 2, "000000301"),  # within its header
        ("000000302.txt", -512, 2, "000000302"),  # the caption is gone, the picture is whole
        ("000000302.txt", 5, 2, "000000302"),  # within a caption
        ("000000302.json", 5, 2, "000000302"),  # before the caption
        ("000000303.txt", 512, 4, "000000303"),  # after the last member: only the end's mark is missing
        ("000000300.jpg", 5, 0, "000000300"),  # nothing whole
    ],
)
def test_a_cut_tar_gives_the_whole_pairs_before(folder, member, where, left, key, caplog):
    files = members(300, 4)
    start, end = ends(files)[member]
    cut = start + where if where < 512 else -(-end // 512) * 512
    (folder / "00003.tar").write_bytes(tar_bytes(files)[:cut])
    logging.get_absl_logger().propagate = True
    source = TarPairs(str(folder))
    assert keys(source)[12:] == [f"00003/{300 + i:09d}" for i in range(left)]
    assert [source[12 + i]["image"] for i in range(left)] == [picture(300 + i) for i in range(left)]
    assert source.report()["cut"] == [f"00003/{key}"]
    assert source.report()["skipped"] == {}
    assert f"1 of 4 tars are cut short, at 00003/{key}" in caplog.text


def test_damage_within_and_files_that_are_no_tars_are_told(folder):
    data = bytearray(tar_bytes(members(300, 4)))
    start, _ = ends(members(300, 4))["000000302.jpg"]
    data[start - 512 : start] = os.urandom(512)
    (folder / "00003.tar").write_bytes(data)
    (folder / "00004.tar").write_bytes(b"<html>404</html>")
    (folder / "00005.tar").write_bytes(b"")
    source = TarPairs(str(folder))
    assert len(source) == 14
    assert source.report()["cut"] == ["00003/000000301", "00004/", "00005/"]


def test_a_tar_that_changes_under_a_run_is_an_os_error(folder):
    source = TarPairs(str(folder))
    path = folder / "00001.tar"
    path.write_bytes(path.read_bytes()[:600])
    with pytest.raises(OSError, match=r"00001\.tar: has only 0 of the .* the file has been cut"):
        source[5]
    assert source.key(5) == "00001/[1]"  # names the record all the same
    path.unlink()
    with pytest.raises(OSError, match="No such file"):
        source[5]
    assert source[0]["caption"] == caption(0)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/no/such/folder", "the path does not exist"),
        ("{folder}/00000.tar", "is a file; set the path of the folder"),
        ("{empty}", "holds no .tar file"),
        ("nosuch://x", "cannot be opened"),
        ("memory://nothing", "the path does not exist"),
    ],
)
def test_a_wrong_path_is_one_line(folder, tmp_path, path, message):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=message) as caught:
        TarPairs(path.format(folder=folder, empty=tmp_path / "empty"))
    assert "\n" not in str(caught.value)


def test_a_store_is_read_in_ranges(folder, cache):
    memory = fsspec.filesystem("memory")
    for path in folder.glob("*.tar"):
        memory.pipe(f"/pairs/{path.name}", path.read_bytes())
    try:
        source = TarPairs("memory://pairs")
        local = TarPairs(str(folder))
        assert keys(source) == keys(local)
        assert [source[i] for i in range(12)] == [local[i] for i in range(12)]
        assert memory.exists(f"/pairs/{INDEX}")  # for the other hosts
        memory.pipe("/pairs/00001.tar", tar_bytes(members(100, 2)))
        assert len(source) == 12  # as it was opened
        with pytest.raises(OSError, match="has only"):
            source[7]
        assert len(TarPairs("memory://pairs")) == 10
    finally:
        memory.rm("/pairs", recursive=True)


def test_another_host_takes_the_index_from_the_store(folder, cache, scanned, monkeypatch):
    memory = fsspec.filesystem("memory")
    for path in folder.glob("*.tar"):
        memory.pipe(f"/pairs/{path.name}", path.read_bytes())
    try:
        TarPairs("memory://pairs")
        monkeypatch.setenv("XDG_CACHE_HOME", str(cache) + "2")
        scanned.clear()
        assert len(TarPairs("memory://pairs")) == 12
        assert scanned == []
    finally:
        memory.rm("/pairs", recursive=True)


def test_the_index_is_kept_and_only_changed_tars_are_read_again(folder, scanned):
    first = keys(TarPairs(str(folder)))
    assert scanned == ["00000.tar", "00001.tar", "00002.tar"]
    assert (folder / INDEX).exists()
    scanned.clear()
    assert keys(TarPairs(str(folder))) == first
    assert scanned == []
    (folder / "00001.tar").write_bytes(tar_bytes(members(110, 4)))
    os.utime(folder / "00001.tar", ns=(1, 1))
    second = keys(TarPairs(str(folder)))
    assert scanned == ["00001.tar"]
    assert second[:4] + second[8:] == first[:4] + first[8:]
    assert second[4] == "00001/000000110"
    (folder / "00000.tar").unlink()
    (folder / "00004.tar").write_bytes(tar_bytes(members(400, 1)))
    scanned.clear()
    assert keys(TarPairs(str(folder))) == [*second[4:], "00004/000000400"]
    assert scanned == ["00004.tar"]


@pytest.mark.parametrize("content", [b"", b"damaged", bytes(100), b"x" * 90 + (5).to_bytes(8, "little") + b"visionfm"])
def test_a_damaged_index_is_made_again(folder, content):
    TarPairs(str(folder))
    (folder / INDEX).write_bytes(content)
    assert len(TarPairs(str(folder))) == 12


def test_the_index_goes_to_the_cache_where_the_data_cannot_be_written(folder, cache, scanned, monkeypatch):
    write = tar_index.write_table

    def refuse(path, *rest):
        if path.parent == folder:
            raise PermissionError(13, "Permission denied")
        write(path, *rest)

    monkeypatch.setattr(tar_index, "write_table", refuse)
    assert len(TarPairs(str(folder))) == 12
    assert not (folder / INDEX).exists()
    assert len(list(cache.rglob(INDEX))) == 1
    scanned.clear()
    assert len(TarPairs(str(folder))) == 12
    assert scanned == []
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/none")
    with pytest.raises(DataError, match="no place for the index"):
        TarPairs(str(folder))


def test_nobody_sees_half_an_index(folder, monkeypatch):
    def fail(*_):
        raise DataError("stopped")

    monkeypatch.setattr(tar_index, "scan", fail)
    with pytest.raises(DataError, match="stopped"):
        TarPairs(str(folder))
    assert sorted(p.name for p in folder.iterdir()) == ["00000.tar", "00001.tar", "00002.tar"]


def test_pictures_are_not_read_for_the_index(tmp_path, monkeypatch):
    files = {"1.jpg": bytes(2**22), "1.txt": b"large", "2.jpg": bytes(2**22), "2.txt": b"too"}
    (tmp_path / "x.tar").write_bytes(tar_bytes(files))
    read = []

    class Counting(io.FileIO):
        def read(self, n=-1):
            read.append(data := super().read(n))
            return data

    monkeypatch.setattr(Store, "open", lambda self, name: Counting(self.path(name)))
    assert len(TarPairs(str(tmp_path))) == 2
    assert sum(map(len, read)) < 16_384


def test_threads_read_the_same(folder):
    source = TarPairs(str(folder))
    barrier = threading.Barrier(4)

    def all_of(_):
        barrier.wait()
        return [source[i] for i in range(12)]

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(all_of, range(4)))
    assert results == [results[0]] * 4
    assert results[0][7] == {"image": picture(103), "caption": caption(103)}


def digest(source: TarPairs) -> str:
    found = hashlib.sha256()
    for i in np.random.default_rng(0).permutation(len(source)).tolist():
        found.update(source.key(i).encode() + source[i]["image"] + source[i]["caption"].encode())
    return found.hexdigest()


def digest_of(path: str) -> str:
    return digest(TarPairs(path))


def test_processes_read_the_same_order(folder):
    source = TarPairs(str(folder))
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        opened = pool.map(digest_of, [str(folder)] * 2)
        handed = pool.map(digest, [source] * 2)
    assert {*opened, *handed} == {digest(source)}


def test_a_pickled_source_is_small_and_knows_when_it_is_another(folder):
    source = TarPairs(str(folder))
    text = pickle.dumps(source)
    assert len(text) < 1000
    assert keys(pickle.loads(text)) == keys(source)
    (folder / "00001.tar").write_bytes(tar_bytes(members(110, 3)))
    TarPairs(str(folder))  # another process indexes again
    with pytest.raises(DataError, match="changed after they were opened"):
        pickle.loads(text)


def test_many_tars_are_indexed_by_processes(tmp_path, monkeypatch):
    write_tars(tmp_path / "many", tars=17, pairs=1)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    source = TarPairs(str(tmp_path / "many"))
    assert keys(source) == [f"{t:05d}/{100 * t:09d}" for t in range(17)]


def test_millions_of_pairs_take_no_memory_of_the_process(folder):
    """An index as of 5 million pairs, 80 MB, and a selection of a third of them."""
    tars, pairs = 500, 10_000
    entry = {"stamp": "", "size": 1, "pairs": pairs, "crc": 7}
    store = Store(str(folder))
    path = folder / "large.index"
    piece = np.zeros(pairs, tar_index.RECORD)
    piece["image"] = np.arange(pairs)
    entries = [entry | {"name": f"{t:05d}.tar"} for t in range(tars)]
    store_module.write_table(path, (piece for _ in range(tars)), lambda: {"version": 1, "tars": entries})
    index = tar_index.read_index(path)
    chosen = np.arange(pairs) % 3 == 1
    write_selection(folder / "large.pairs", index, "", (chosen for _ in range(tars)))
    assert (folder / "large.pairs").stat().st_size < tars * pairs / 8 + 60 * tars
    starts = np.arange(0, tars * 3333 + 1, 3333, dtype=np.int64)
    source = TarPairs.__new__(TarPairs)
    tracemalloc.start()
    source.__setstate__(
        {
            "store": store,
            "name": "large",
            "_selected": str(folder / "large.pairs"),
            "_mapped": (path, index.crc, zlib.crc32(starts.tobytes())),
        }
    )
    assert tracemalloc.get_traced_memory()[0] < 1e6
    tracemalloc.stop()
    assert len(source) == tars * 3333
    assert source._locate(len(source) - 1) == (tars - 1, tars * pairs - 3)
