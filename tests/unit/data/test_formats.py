"""Parquet with images in it, tables of images, and the sorts of members that tars have."""

import csv
import json
from pathlib import Path

import fsspec
import pyarrow as pa
import pytest
from parquet_sets import written_parquet
from tar_sets import picture, tar_bytes

from visionfm_jax.data.sources import open_source, parquet
from visionfm_jax.data.sources.kinds import KINDS
from visionfm_jax.data.sources.record import DamagedRecord
from visionfm_jax.errors import DataError


def opened(kind: str, path: Path | str, **more):
    return open_source(KINDS[kind](path=str(path), **more))


def error_of(kind: str, path: Path | str, **more) -> str:
    with pytest.raises(DataError) as error:
        opened(kind, path, **more)
    assert "\n" not in str(error.value)
    return str(error.value)


# --- Parquet ---


def test_parquet_gives_the_bytes_the_names_of_classes_and_all_captions(tmp_path):
    source = opened("parquet", written_parquet(tmp_path))
    assert (len(source), source.num_classes, source.class_names) == (12, 3, ("a", "b", "c"))
    assert (source.has_captions, source.most_captions) == (True, 2)
    expected = [*range(6), *range(100, 106)]
    for i in (11, 0, 5, 6, 3, 4, 10):
        n = expected[i]
        captions = (f"caption {n}", f"other {n}")[: 1 + n % 2]
        assert source[i] == {"image": picture(n), "label": n % 3, "caption": captions}
    assert [source.key(i) for i in (5, 6)] == [f"data/train-0000{f}-of-00002.parquet[{r}]" for f, r in ((0, 5), (1, 0))]
    with pytest.raises(IndexError):
        source[12]
    assert set(opened("parquet", tmp_path, caption_key="", label_key="")[0]) == {"image"}


def test_parquet_keeps_few_row_groups_in_memory(tmp_path, monkeypatch):
    source = opened("parquet", written_parquet(tmp_path))
    reads = []
    monkeypatch.setattr(source, "_read", lambda *a, read=source._read: reads.append(a[0]) or read(*a))
    first = [source[i]["image"] for i in range(12)]
    assert reads == [0, 1, 2, 3]  # four row groups, each once
    assert [source[i]["image"] for i in range(12)] == first
    assert len(reads) == 4
    monkeypatch.setattr(parquet, "KEPT", 1)
    source._reset()
    assert [source[i]["image"] for i in (0, 11, 0)] == [first[0], first[11], first[0]]
    assert len(source._cache) == 1


def test_parquet_of_img2dataset_has_bare_bytes(tmp_path):
    jpg = pa.array([picture(i) for i in range(6)], pa.binary())
    text = pa.array(["one", None, "", "four", "five", "six"])
    path = written_parquet(tmp_path, files=1, image=None, label=None, jpg=jpg, caption=text)
    source = opened("parquet", path / "data/train-00000-of-00001.parquet", split="", image_key="jpg")
    assert source[0] == {"image": picture(0), "caption": "one"}
    assert (source.num_classes, source.most_captions) == (0, 1)
    with pytest.raises(DamagedRecord, match="its 'caption' is empty"):
        source[1]


def test_parquet_labels_without_names_count_to_the_largest(tmp_path):
    labels = pa.array([0, 1, 4, 1, 0, 2], pa.int32())
    path = written_parquet(tmp_path, number=labels, label=None, caption=None)
    assert opened("parquet", path, label_key="number").num_classes == 5
    path = written_parquet(tmp_path, label=pa.array([0, -1, 0, 0, 0, 0]))
    assert "column 'label' runs from -1 to 0, and there are 3 classes; -1 stands for no label" in error_of(
        "parquet", path
    )


def test_parquet_errors_name_the_file_and_the_column(tmp_path):
    path = written_parquet(tmp_path / "it")
    file = path / "data/train-00001-of-00002.parquet"
    whole = file.read_bytes()
    assert "no split 'test'; the splits are train" in error_of("parquet", path, split="test")
    assert "no column 'img'; set image_key to one of image, label, caption" in error_of(
        "parquet", path, image_key="img"
    )
    assert "column 'label' is int64, and no image" in error_of("parquet", path, image_key="label")
    assert "no column 'text' that is a caption; set" in error_of("parquet", path, caption_key="text")
    written_parquet(tmp_path / "other", label=pa.array([0] * 6, pa.int8()))
    file.write_bytes((tmp_path / "other/data/train-00001-of-00002.parquet").read_bytes())
    assert f"{file}: column 'label' is int8, and int64 in data/train-00000-of-00002.parquet" in error_of(
        "parquet", path, split="train"
    )
    file.write_bytes(whole[: len(whole) // 2])
    assert f"{file} is no Parquet file, or was cut short" in error_of("parquet", path)
    file.write_bytes(whole[:4] + bytes(60) + whole[64:])
    with pytest.raises(DamagedRecord, match="its row group cannot be read"):
        opened("parquet", path)[6]


def test_parquet_fingerprint_follows_content_and_not_the_place(tmp_path):
    first = opened("parquet", written_parquet(tmp_path / "a")).fingerprint()
    assert first == opened("parquet", written_parquet(tmp_path / "b")).fingerprint()
    other = opened("parquet", written_parquet(tmp_path / "b", rows=5)).fingerprint()
    assert all(first[file] != other[file] for file in first)


# --- tables ---


def table_of(path: Path, rows: list[dict]) -> Path:
    for row in rows:
        file = path.parent / row["image"]
        if "://" not in row["image"] and not file.exists() and "missing" not in row["image"]:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(picture(len(row["image"])))
    with open(path, "w", newline="") as file:
        if path.suffix == ".jsonl":
            file.write("".join(json.dumps(row) + "\n" for row in rows))
        else:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    return path


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl"])
def test_tables_of_captions_and_labels(tmp_path, suffix):
    rows = [
        {"image": "i/a.png", "caption": 'one, "two"\n three', "class": "dog"},
        {"image": "i/bb.png", "caption": "b", "class": "cat"},
        {"image": "i/a.png", "caption": "another", "class": "dog"},
        {"image": "i/ccc.png", "caption": " ", "class": "dog"},
    ]
    source = opened("table", table_of(tmp_path / f"t{suffix}", rows), label_key="class")
    assert (len(source), source.most_captions, source.class_names, source.num_classes) == (2, 2, ("cat", "dog"), 2)
    assert source[0] == {"image": picture(7), "caption": ('one, "two" three', "another"), "label": 1}
    assert source[1]["label"] == 0
    assert source.key(1) == "i/bb.png"
    bare = opened("table", tmp_path / f"t{suffix}", caption_key="")
    assert (len(bare), set(bare[2])) == (3, {"image"})
    assert source.fingerprint() != bare.fingerprint()


def test_tables_name_files_below_a_root_absolute_paths_and_urls(tmp_path):
    memory = fsspec.filesystem("memory")
    memory.pipe("/tabled/x.png", picture(3))
    rows = [
        {"image": "i/a.png", "text": ["one", "two"]},
        {"image": str(tmp_path / "i/b.png"), "text": "three"},
        {"image": "memory://tabled/x.png", "text": "four"},
        {"image": "memory://tabled/none.png", "text": "five"},
    ]
    try:
        path = table_of(tmp_path / "t.jsonl", rows)
        path = path.rename(tmp_path / "i/t.jsonl")
        assert "is not below" in error_of("table", path, caption_key="text", root=str(tmp_path / "i/none"))
        source = opened("table", path, caption_key="text", root=str(tmp_path))
        assert [source[i]["caption"] for i in range(3)] == [("one", "two"), ("three",), ("four",)]
        assert source[2]["image"] == picture(3)
        assert len(source.fingerprint()) == 2
        with pytest.raises(DamagedRecord, match="the URL cannot be read"):
            source[3]
    finally:
        memory.rm("/tabled", recursive=True)


@pytest.mark.parametrize(
    ("text", "more", "message"),
    [
        ("image,caption\na.png\n", {}, "line 2 has 1 values, and there are 2 columns; correct it"),
        ("path,caption\na.png,x\n", {}, "line 2 has no 'image' but path, caption; correct it, or set image_key"),
        ("image,text\na.png,x\n", {}, "line 2 has no 'caption' but image, text"),
        ("image,caption\nmissing.png,x\n", {}, "1 of 1 images are missing, the first is .*missing.png"),
        ("image,caption\n../a.png,x\n", {}, "names ../a.png, which is not below .*set root"),
        ("image,caption\nfile:///etc/passwd,x\n", {}, "write a path, or an http, s3, gs or hf URL"),
        ("image,caption\n", {}, "has no row"),
        ('image,caption\na.png,"x\n', {}, "line 2 is no row"),
    ],
)
def test_table_errors_name_the_line(tmp_path, text, more, message):
    (tmp_path / "t.csv").write_text(text)
    (tmp_path / "a.png").write_bytes(picture(0))
    with pytest.raises(DataError, match=message):
        opened("table", tmp_path / "t.csv", **more)
    (tmp_path / "t.jsonl").write_text('{"image": "a.png", "caption": "x"}\n{"image"\n')
    assert "line 2 is no JSON" in error_of("table", tmp_path / "t.jsonl")


# --- members of tars ---


@pytest.fixture
def nested(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "tars").mkdir()
    files = {
        "a/b.jpg": picture(0), "a/b.seg.png": picture(1), "a/b.txt": b"one\n\n two  words \n",
        "a/b.json": json.dumps({"Title": "titled", "all": ["first", " ", "second"], "n": 3}).encode(),
        "a/c.jpg": picture(2), "a/c.txt": b"three", "a/c.json": b'{"Title": "", "all": 3}',
        "a/d.json": b'{"Title": "no image"}',
        "a/e.seg.png": picture(3), "a/e.txt": b"seg only", "a/e.json": b"[]",
    }  # fmt: skip
    (tmp_path / "tars/00000.tar").write_bytes(tar_bytes(files))
    return tmp_path / "tars"


def test_tars_of_nested_keys_and_images_of_another_suffix(nested):
    source = opened("tars", nested)
    assert [(source.key(i), source[i]["image"]) for i in range(2)] == [
        ("00000/a/b", picture(0)), ("00000/a/c", picture(2)),
    ]  # fmt: skip
    found = source.report()["skipped"]
    assert found[".seg.png files, which are not read as images"]["first"] == ["00000/a/b", "00000/a/e"]
    assert found[".json files, which are not read as images"]["first"] == ["00000/a/d", "00000/a/e"]
    source = opened("tars", nested, image_key=".seg.png")
    assert [source[i]["image"] for i in range(len(source))] == [picture(1), picture(3)]
    assert source.key(1) == "00000/a/e"


def test_tars_with_captions_in_json(nested):
    source = opened("tars", nested, caption_key="json:Title")
    assert (len(source), source.most_captions) == (1, 1)
    assert source[0] == {"image": picture(0), "caption": ("titled",)}
    skipped = source.report()["skipped"]
    assert skipped["captions without an image"]["first"] == ["00000/a/d", "00000/a/e"]
    assert skipped["images with an empty caption"]["first"] == ["00000/a/c"]
    source = opened("tars", nested, caption_key="json:all")
    assert (source[0]["caption"], source.most_captions) == (("first", "second"), 2)
    assert source.report()["skipped"]["images whose JSON has no such text"]["first"] == ["00000/a/c"]
    assert "contains no image with a caption" in error_of("tars", nested, caption_key="json:none")


def test_tars_with_a_caption_on_each_line(nested):
    source = opened("tars", nested, caption_key="txt:lines")
    assert [source[i]["caption"] for i in range(2)] == [("one", "two words"), ("three",)]
    assert source.most_captions == 2
    assert "caption_key = 'txt:all': write json:FIELD" in error_of("tars", nested, caption_key="txt:all")
