"""Pairs in tars: order, damage, stores, processes, and the index that is kept."""

import errno
import hashlib
import io
import json
import multiprocessing
import os
import pickle
import shutil
import subprocess
import tarfile
import threading
import tracemalloc
import zlib
from concurrent.futures import ThreadPoolExecutor

import fsspec
import numpy as np
import pytest
from absl import logging
from tar_sets import cannot_write, caption, members, picture, tar_bytes, write_tars

from visionfm_jax import storage
from visionfm_jax.data import images
from visionfm_jax.data.sources import claim, read_record, tar_index
from visionfm_jax.data.sources import store as store_module
from visionfm_jax.data.sources.record import DamagedRecord
from visionfm_jax.data.sources.selection import write_selection
from visionfm_jax.data.sources.store import Store
from visionfm_jax.data.sources.tars import TarPairs
from visionfm_jax.errors import DataError, StorageError

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

    def spy(store, suffix, tar, **more):
        names.append(tar[0])
        return scan(store, suffix, tar, **more)

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
    assert images.decode(source[0]["image"]).ndim == 3
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
        "b" * 110 + ".jpg": picture(4),
        "b" * 110 + ".txt": b"another",
        "\N{GREEK SMALL LETTER MU}.jpg": picture(5),
        "\N{GREEK SMALL LETTER MU}.txt": b"Greek",
    }
    (tmp_path / "x.tar").write_bytes(tar_bytes(files))
    source = TarPairs(str(tmp_path))
    assert [source[i]["caption"] for i in range(5)] == ["first", "second", "a long name", "another", "Greek"]
    assert source[1]["image"] == picture(2)
    assert keys(source) == [
        "x/dir/a", "x/dir/b", "x/" + "a" * 150, "x/" + "b" * 110, "x/\N{GREEK SMALL LETTER MU}"
    ]  # fmt: skip
    assert source.report()["skipped"] == {
        tar_index.NO_PICTURE: {"count": 1, "first": ["x/dir/lonely"]},
        ".md files, which are not read as images": {"count": 1, "first": ["x/readme"]},
    }


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
    files = members(300, 10, k301=None, k303=b"", k304=b" \n", k306=b"caf\xe9", k308=None, k309=bytes(5))
    (folder / "00003.tar").write_bytes(tar_bytes(files))
    logging.get_absl_logger().propagate = True
    source = TarPairs(str(folder))
    assert keys(source)[12:] == [f"00003/000000{n}" for n in (300, 302, 305, 307)]
    assert source.report()["skipped"] == {
        tar_index.NO_CAPTION: {"count": 2, "first": ["00003/000000301", "00003/000000308"]},
        tar_index.EMPTY: {"count": 3, "first": ["00003/000000303", "00003/000000304", "00003/000000309"]},
        tar_index.NOT_UTF8: {"count": 1, "first": ["00003/000000306"]},
    }
    assert "left out: 1 images with a caption that is not UTF-8: 00003/000000306" in caplog.text


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
    assert f"1 of 4 tars are truncated, at 00003/{key}" in caplog.text


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


def test_a_tar_that_changes_under_a_run_is_named(folder):
    source = TarPairs(str(folder))
    path = folder / "00001.tar"
    path.write_bytes(path.read_bytes()[:600])
    with pytest.raises(DataError, match=r"00001\.tar: has only 0 of the .* it was cut or changed meanwhile"):
        source[5]
    assert source.key(5) == "00001/[1]"  # names the record all the same
    path.unlink()
    with pytest.raises(OSError, match="No such file"):
        source[5]


def test_a_tar_that_became_a_pipe_is_an_error_and_nobody_waits_for_its_writer(folder):
    source = TarPairs(str(folder))
    (folder / "00001.tar").unlink()
    os.mkfifo(folder / "00001.tar")
    with pytest.raises(DataError, match=r"00001/.* cannot be read: .*seek"):
        read_record(source, 5)
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
        with pytest.raises(DataError, match="has only"):
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


def table(meta: object, records: bytes = b"") -> bytes:
    """An index or a selection whose checksums are right, whatever it says."""
    text = meta if isinstance(meta, bytes) else json.dumps(meta).encode()
    return records + text + store_module._TAIL.pack(zlib.crc32(records), zlib.crc32(text), len(text), b"visionf2")


ENTRY = {"name": "00000.tar", "size": 10, "stamp": "", "pairs": 1, "crc": 7}
MALFORMED = {
    "empty": lambda whole: b"",
    "cut within the tail": lambda whole: whole[:-5],
    "cut within the JSON": lambda whole: whole[:-40],
    "cut within the records": lambda whole: whole[:30],
    "an earlier version": lambda whole: whole[:240] + b"{}" + (2).to_bytes(8, "little") + b"visionfm",
    "a length beyond the file": lambda whole: whole[:-16] + (2**63).to_bytes(8, "little") + b"visionf2",
    "a bit of the JSON": lambda whole: whole[:-60] + bytes([whole[-60] ^ 1]) + whole[-59:],
    "no JSON": lambda whole: table(b"{"),
    "no UTF-8": lambda whole: table(b'"\xff"'),
    "deep JSON": lambda whole: table(b"[" * 100_000),
    "a list": lambda whole: table([]),
    "no keys": lambda whole: table({}),
    "another version": lambda whole: table({"version": 1, "kind": "selection 1", "tars": []}),
    "no tars": lambda whole: table({"version": 2, "kind": "selection 2", "tars": 3}),
    "tars of another kind": lambda whole: table({"version": 2, "kind": "selection 2", "tars": [1]}),
}
OF_INDEX = {
    "records without a tar": [],
    "no name": [ENTRY | {"name": None}],
    "a name twice": [ENTRY, ENTRY | {"pairs": 0}],
    "tars out of order": [ENTRY | {"name": "b.tar"}, ENTRY | {"name": "a.tar", "pairs": 0}],
    "fewer pairs than none": [ENTRY | {"pairs": -1}],
    "more pairs than there are": [ENTRY | {"pairs": 2**40}],
    "a number as text": [ENTRY | {"size": "10"}],
    "no list of what is left out": [ENTRY | {"skipped": {"why": 3}}],
    "no key where it is cut": [ENTRY | {"cut": 1}],
}
MALFORMED |= {
    name: lambda whole, tars=tars: table({"version": 2, "tars": tars}, bytes(tar_index.RECORD.itemsize))
    for name, tars in OF_INDEX.items()
}


@pytest.mark.parametrize("damage", MALFORMED)
def test_a_malformed_index_is_made_again_and_the_log_says_so(folder, damage, caplog):
    logging.get_absl_logger().propagate = True
    first = keys(TarPairs(str(folder)))
    assert "cannot be used" not in caplog.text
    (folder / INDEX).write_bytes(MALFORMED[damage]((folder / INDEX).read_bytes()))
    assert keys(TarPairs(str(folder))) == first
    (line,) = [record.message for record in caplog.records if "cannot be used" in record.message]
    assert line.startswith(f"{folder / INDEX}: cannot be used (")
    assert line.endswith("; the tars are indexed again")
    assert "\n" not in line


OF_SELECTION = {
    "five fields wanted": [["00000.tar", 1, 2, 3]],
    "fewer pairs than none": [["00000.tar", 1, 2, -8, 0]],
    "more pairs than there are": [["00000.tar", 1, 2, 2**62, 0]],
    "another count": [["00000.tar", 1, 2, 8, 8]],
    "a tar twice": [["00000.tar", 1, 2, 8, 2], ["00000.tar", 1, 2, 0, 0]],
    "tars out of order": [["00001.tar", 1, 2, 8, 2], ["00000.tar", 1, 2, 0, 0]],
}
SELECTIONS = {name: MALFORMED[name] for name in MALFORMED if name not in OF_INDEX}
SELECTIONS |= {"a bit of the choice": lambda whole: bytes([whole[0] ^ 1]) + whole[1:]}
SELECTIONS |= {
    name: lambda whole, tars=tars: table({"kind": "selection 2", "tars": tars}, b"\x81")
    for name, tars in OF_SELECTION.items()
}


@pytest.mark.parametrize("damage", SELECTIONS)
def test_a_malformed_selection_is_refused_in_one_line(folder, damage):
    index = TarPairs(str(folder)).index
    path = folder / "good.pairs"
    write_selection(path, index, "", [np.array([True, False, True, True])] * 3)
    assert len(TarPairs(str(folder), selection=str(path))) == 9
    path.write_bytes(SELECTIONS[damage](path.read_bytes()))
    with pytest.raises(DataError) as caught:
        TarPairs(str(folder), selection=str(path))
    message = str(caught.value)
    assert message.startswith(f"selection {path}: cannot be read (")
    assert message.endswith("; run visionfm data select again")
    assert "\n" not in message


def test_a_flipped_bit_of_a_picture_caption_or_record_is_noticed(folder):
    """Every flip either leaves the record as it was, or is refused: never another picture or caption."""
    source = TarPairs(str(folder))
    whole = [source[i] for i in range(len(source))]
    rng = np.random.default_rng(0)

    def refused(path, length: int) -> list[int]:
        """How many records are, for each of 60 flips within the first `length` bytes."""
        content = path.read_bytes()
        counts = []
        for _ in range(60):
            place, bit = int(rng.integers(length)), int(rng.integers(8))
            path.write_bytes(content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :])
            damaged = TarPairs.__new__(TarPairs)
            damaged.__dict__.update(source.__dict__, index=tar_index.read_index(source.index.path))
            counts.append(0)
            for i in range(len(source)):
                try:
                    assert damaged[i] == whole[i]
                except DamagedRecord:
                    counts[-1] += 1
        path.write_bytes(content)
        return counts

    tar = folder / "00001.tar"
    assert set(refused(tar, tar.stat().st_size)) == {0, 1}  # 0: in a header, another member or padding
    assert set(refused(source.index.path, source.index.records.nbytes)) == {1}


@pytest.mark.parametrize(
    ("member", "key"),
    [
        ("0001.jpg", ("0001", "jpg")),
        ("a/0001.JPG", ("a/0001", "jpg")),
        ("./a/0001.jpg", ("a/0001", "jpg")),
        ("a.b/c.d/0001.txt", ("a.b/c.d/0001", "txt")),
        ("photo.v2.jpg", ("photo", "v2.jpg")),
        (".hidden.jpg", ("", "")),
        ("a/._0001.jpg", ("", "")),
        ("README", ("", "")),
        ("name.", ("name", "")),
    ],
)
def test_keys_follow_the_rule_of_webdataset(member, key):
    assert tar_index.key_of(member) == key


def test_pictures_and_captions_of_different_folders_are_different_pairs(tmp_path):
    files = {
        "cats/0.jpg": picture(1), "dogs/0.jpg": picture(2), "dogs/0.txt": b"a dog", "cats/0.txt": b"a cat",
        "a/0001.jpg": picture(3), "b/0001.txt": b"of another picture",
    }  # fmt: skip
    (tmp_path / "x.tar").write_bytes(tar_bytes(files))
    source = TarPairs(str(tmp_path))
    assert [(source.key(i), source[i]["caption"], source[i]["image"]) for i in range(len(source))] == [
        ("x/cats/0", "a cat", picture(1)),
        ("x/dogs/0", "a dog", picture(2)),
    ]
    assert source.report()["skipped"] == {
        tar_index.NO_CAPTION: {"count": 1, "first": ["x/a/0001"]},
        tar_index.NO_PICTURE: {"count": 1, "first": ["x/b/0001"]},
    }


def test_what_leaves_a_pair_open_is_left_out_and_named(tmp_path, caplog):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:

        def add(name: str, content: bytes, kind: bytes = tarfile.REGTYPE) -> None:
            info = tarfile.TarInfo(name)
            info.type, info.size, info.linkname = kind, len(content), "0.jpg"
            tar.addfile(info, io.BytesIO(content))

        for i, key in enumerate(("0", "twice", "text twice", "two kinds")):
            add(f"{key}.jpg", picture(i))
            add(f"{key}.txt", b"a caption")
        add("twice.jpg", picture(9))
        add("text twice.txt", b"another caption")
        add("two kinds.png", picture(9))
        add("photo.v2.jpg", picture(9))
        add("photo.txt", b"whose picture is photo.v2")
        add("0.mask.png", picture(9))
        add("0.json", b"{}")
        add("phone.heic", b"not read")
        add("._0.jpg", b"left by a file manager")
        add("folder", b"", tarfile.DIRTYPE)
        add("link.jpg", b"", tarfile.LNKTYPE)
        for i in range(12):
            add(f"{i:02}.kind{i}", b"")
    logging.get_absl_logger().propagate = True
    source = TarPairs(str(tmp_path))
    assert keys(source) == ["x/0"]
    other = {f".{kind} files, which are not read as images": 1 for kind in ("v2.jpg", "mask.png", "heic")}
    other |= {f".kind{i} files, which are not read as images": 1 for i in range(5)}
    expected = {
        tar_index.SEVERAL: 3, tar_index.NO_PICTURE: 1, tar_index.NO_KEY: 1, tar_index.NO_FILE: 1, tar_index.OTHER: 7,
    }  # fmt: skip
    skipped = source.report()["skipped"]
    assert {reason: found["count"] for reason, found in skipped.items()} == expected | other
    assert skipped[tar_index.SEVERAL]["first"] == ["x/twice", "x/text twice", "x/two kinds"]
    assert "left out: 1 .heic files, which are not read as images: x/phone" in caplog.text


def test_names_with_control_characters_stay_in_one_line(tmp_path, caplog):
    name = "a\nb\0c\x1b[31m\u00e9"  # the last letter makes it a name in an extended header, which may hold NUL
    (tmp_path / "x.tar").write_bytes(tar_bytes({f"{name}.jpg": picture(1), "d.jpg": picture(2), "d.txt": b"d"}))
    logging.get_absl_logger().propagate = True
    TarPairs(str(tmp_path))
    assert "left out: 1 images without a caption: x/a\\nb\\x00c\\x1b[31m\u00e9" in caplog.text


def test_a_tar_that_leads_nowhere_is_refused(folder):
    (folder / "00007.tar").symlink_to(folder / "gone")
    with pytest.raises(DataError, match=r"00007\.tar: is a broken link .*; fix or remove it"):
        TarPairs(str(folder))
    (folder / "00007.tar").unlink()
    (folder / "notes").symlink_to("notes")
    assert len(TarPairs(str(folder))) == 12


def test_the_index_goes_to_the_cache_where_the_data_cannot_be_written(folder, cache, scanned, monkeypatch):
    cannot_write(monkeypatch, folder)
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
    def fail(*_, **__):
        raise DataError("stopped")

    monkeypatch.setattr(tar_index, "scan", fail)
    with pytest.raises(DataError, match="stopped"):
        TarPairs(str(folder))
    assert sorted(p.name for p in folder.iterdir()) == ["00000.tar", "00001.tar", "00002.tar"]


def test_an_index_is_written_again_where_storage_fails_for_a_moment(folder, scanned, monkeypatch):
    sync, times = os.fsync, [2]

    def fails(file):
        times[0] -= 1
        if times[0] >= 0:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        sync(file)

    monkeypatch.setattr(os, "fsync", fails)
    monkeypatch.setattr(storage, "WAITS", (0, 0))
    assert len(TarPairs(str(folder))) == 12
    assert len(scanned) == 3
    (folder / INDEX).unlink()
    times[0] = 3
    with pytest.raises(StorageError, match=r"part-\w+ cannot be written: .*Input/output error, 3 times in 0 s; check"):
        TarPairs(str(folder))


def test_what_was_read_before_an_interruption_is_kept(folder, scanned, monkeypatch):
    spy = tar_index.scan

    def fail(store, suffix, tar, **more):
        if tar[0] == "00002.tar":
            raise DataError("interrupted")
        return spy(store, suffix, tar, **more)

    monkeypatch.setattr(tar_index, "_KEPT", 0.0)
    monkeypatch.setattr(tar_index, "scan", fail)
    with pytest.raises(DataError, match="interrupted"):
        TarPairs(str(folder))
    part, damaged = (p for p in folder.iterdir() if p.suffix != ".tar")
    assert part.name.startswith(f"{INDEX}.part-")
    damaged.write_bytes(bytes([damaged.read_bytes()[0] ^ 1]) + damaged.read_bytes()[1:])
    (folder / f".{INDEX}.{16 * 'a'}").write_bytes(b"of a table that was being written")
    monkeypatch.setattr(tar_index, "scan", spy)
    scanned.clear()
    source = TarPairs(str(folder))
    assert len(scanned) == 2  # one of them for the damage
    assert "00002.tar" in scanned
    assert sorted(p.name for p in folder.iterdir() if p.suffix != ".tar") == [INDEX]
    (folder / INDEX).unlink()
    assert pickle.dumps(source) == pickle.dumps(TarPairs(str(folder)))


def index_slowly(path: str, there, go_on, names) -> None:
    """To be run by a process: it opens the tars, and says what it does; at the last one it waits."""
    scan, finished = tar_index.scan, claim._finished

    def slow(store, suffix, tar, **more):
        names.put(tar[0])
        if tar[0] == "00002.tar":
            there.set()
            go_on.wait(60)
        return scan(store, suffix, tar, **more)

    def spy(path):
        there.set()
        return finished(path)

    tar_index.scan, claim._finished, tar_index._KEPT, claim.LOOK = slow, spy, 0.0, 0.01
    names.put(f"{len(TarPairs(path))} pairs")


@pytest.mark.parametrize("end", ["finished", "killed"])
def test_one_process_indexes_and_another_waits_and_takes_over(folder, end):
    context = multiprocessing.get_context("spawn")
    there, go_on = [context.Event(), context.Event()], [context.Event(), context.Event()]
    names = [context.SimpleQueue(), context.SimpleQueue()]
    first, second = (
        context.Process(target=index_slowly, args=(str(folder), there[i], go_on[i], names[i])) for i in range(2)
    )
    first.start()
    assert there[0].wait(60)  # at the last tar
    go_on[1].set()
    second.start()
    assert there[1].wait(60)  # at the other's claim
    first.kill() if end == "killed" else go_on[0].set()
    for process in (first, second):
        process.join(60)
    read = []
    for queue in names:
        read.append([])
        while not queue.empty():
            read[-1].append(queue.get())
    tars = ["00000.tar", "00001.tar", "00002.tar"]
    assert read == ([tars, [tars[2], "12 pairs"]] if end == "killed" else [[*tars, "12 pairs"], ["12 pairs"]])
    assert sorted(p.name for p in folder.iterdir()) == [*tars, INDEX]


def test_a_silent_claim_of_another_machine_is_taken_over(folder, monkeypatch, caplog):
    logging.get_absl_logger().propagate = True
    monkeypatch.setattr(claim, "SILENCE", 0.05)
    monkeypatch.setattr(claim, "LOOK", 0.01)
    (folder / f".{INDEX}.claim-0").write_text('{"host": "elsewhere", "process": 1}')
    assert len(TarPairs(str(folder))) == 12
    assert "waiting until it has finished" in caplog.text
    assert "another one takes over" in caplog.text
    assert not list(folder.glob(".*"))


def test_a_takeover_leaves_what_a_stopped_process_writes(folder, monkeypatch):
    """It goes on later, and then finds its unfinished file; that of a dead process is removed."""
    monkeypatch.setattr(claim, "SILENCE", 0.05)
    monkeypatch.setattr(claim, "LOOK", 0.01)
    dead = folder / f".{INDEX}.{16 * 'd'}"
    dead.touch()
    (folder / f".{INDEX}.claim-0").write_text('{"host": "elsewhere", "process": 1}')
    with storage.replacing(folder / INDEX) as stopped:
        assert len(TarPairs(str(folder))) == 12
        assert stopped.exists()
        assert not dead.exists()
        shutil.copyfile(folder / INDEX, stopped)
    assert len(TarPairs(str(folder))) == 12
    assert not list(folder.glob(".*"))


@pytest.mark.parametrize("other", [{"namespace": 0}, {"boot": "another"}])
def test_a_process_number_of_another_container_says_nothing(other):
    gone = subprocess.Popen(["true"])
    gone.wait()
    here = {**claim._whereabouts(), "process": gone.pid}
    assert claim._is_dead(json.dumps(here))
    assert not claim._is_dead(json.dumps({**here, **other}))
    assert not claim._is_dead(json.dumps({**here, "process": os.getpid()}))
    assert not claim._is_dead('{"host": "of an older release", "process": 1}')


def test_a_claim_that_cannot_be_written_is_not_left_for_others_to_wait_for(folder, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(claim.json, "dump", full)
    with pytest.raises(DataError, match=r"no place for the index .*: No space left on device; .*; make one writable"):
        TarPairs(str(folder))
    assert not list(folder.glob(".*"))


def test_a_claim_that_is_no_text_is_silent_too(folder, monkeypatch):
    monkeypatch.setattr(claim, "SILENCE", 0.05)
    monkeypatch.setattr(claim, "LOOK", 0.01)
    (folder / f".{INDEX}.claim-0").write_bytes(b"\xff" * 9)
    assert len(TarPairs(str(folder))) == 12


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
    """An index as of 5 million pairs, 100 MB, and a selection of a third of them."""
    tars, pairs = 500, 10_000
    entry = {"stamp": "", "size": 1, "pairs": pairs, "crc": 7}
    store = Store(str(folder))
    path = folder / "large.index"
    piece = np.zeros(pairs, tar_index.RECORD)
    piece["image"] = np.arange(pairs)
    entries = [entry | {"name": f"{t:05d}.tar"} for t in range(tars)]
    store_module.write_table(path, (piece for _ in range(tars)), lambda: {"version": 2, "tars": entries})
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


def test_a_tar_whose_name_is_no_text_is_named(tmp_path):
    folder = write_tars(tmp_path / "tars", 1, 2)
    shutil.copy(folder / "00000.tar", os.fsencode(folder) + b"/\xff.tar")
    with pytest.raises(DataError, match=r"the name of '.*udcff.tar' is not UTF-8; rename the file"):
        TarPairs(str(folder))
