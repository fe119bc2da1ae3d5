"""Datasets of each kind: what records hold, and the one line that bad input gets."""

import collections
import errno
import io
import json
import multiprocessing
import os
import pickle
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import annotated_sets
import numpy as np
import pytest
import tensorflow_datasets as tfds
from absl import logging
from caption_sets import write_coco, write_visual_genome
from parquet_sets import written_parquet
from PIL import Image
from tar_sets import write_tars

from visionfm_jax import storage
from visionfm_jax.config.limits import types_of
from visionfm_jax.data import images
from visionfm_jax.data.sources import open_source, read_record
from visionfm_jax.data.sources.kinds import KINDS, BenchmarkConfig, BundledConfig, ScenesConfig, TableConfig
from visionfm_jax.data.sources.record import DamagedRecord
from visionfm_jax.errors import DataError


def jpeg(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (value, 0, 0)).save(buffer, "JPEG")
    return buffer.getvalue()


class Tiny(tfds.core.GeneratorBasedBuilder):
    """Ten and four JPEG pictures; written without TensorFlow, because they are handed over encoded."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, **kwargs):
        super().__init__(file_format="array_record", **kwargs)

    def _info(self):
        features = {
            "image": tfds.features.Image(encoding_format="jpeg"),
            "mask": tfds.features.Image(encoding_format="jpeg"),
            "label": tfds.features.ClassLabel(names=["cat", "dog"]),
            "number": np.int64,
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(10), "test": self._generate_examples(4)}

    def _generate_examples(self, count):
        for i in range(count):
            files = {"image": io.BytesIO(jpeg(20 * i)), "mask": io.BytesIO(jpeg(0))}
            yield i, files | {"label": i % 2, "number": i}


@pytest.fixture(scope="session")
def written(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tfds")
    Tiny(data_dir=folder).download_and_prepare()
    return folder


@pytest.fixture
def tiny(written, tmp_path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "tfds"))


@pytest.fixture
def folder(tmp_path) -> Path:
    """PATH/SPLIT/CLASS/FILE; val lacks a class, and another folder lies beside the splits."""
    files = {
        "train/ant/b.JPEG": 1, "train/ant/a.jpg": 2, "train/bee/c.png": 3, "train/cow/d.webp": 4,
        "val/bee/x.jpg": 5, "val/cow/y.jpg": 6, "notes/drafts/z.jpg": 7,
    }  # fmt: skip
    root = tmp_path / "pictures"
    for name, value in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(jpeg(value))
    (root / "train/ant/readme.txt").write_text("no image")
    (root / "train/ant/._a.jpg").write_text("left by a file manager")
    (root / "train/.cache").mkdir()
    return root


@pytest.fixture
def archives(tmp_path) -> Path:
    root = tmp_path / "arrays"
    root.mkdir()
    images = np.arange(6 * 4 * 5 * 3, dtype=np.uint8).reshape(6, 4, 5, 3)
    np.savez(root / "train.npz", image=images, label=np.array([0, 1, 2, 2, 1, 0]), class_names=["x", "y", "z"])
    np.savez_compressed(root / "test.npz", image=images[:2, ..., 0], label=np.array([1, 0], np.uint8))
    return root


FOUND = {"tfds": "a TFDS directory", "numpy": "a folder of .npz files", "folder": "class folders of images"}


def opened(kind: str, path: Path, split: str = "train", **more):
    cls = KINDS[kind]
    parts = {"split": split} if "split" in types_of(cls) else {}
    return open_source(cls(path=str(path), **parts, **more))


def error_of(kind: str, path: Path, split: str = "train", **more) -> str:
    with pytest.raises(DataError) as error:
        opened(kind, path, split, **more)
    message = str(error.value)
    assert "\n" not in message
    return message


# --- TFDS ---


@pytest.mark.parametrize("below", ["", "tiny", "tiny/1.0.0"])
def test_tfds_path_is_the_version_or_above_it(written, below):
    source = opened("tfds", written / below)
    assert len(source) == 10
    assert source.num_classes == 2
    assert source.class_names == ("cat", "dog")


def test_tfds_gives_the_bytes_that_were_written(written):
    source = opened("tfds", written)
    reds = []
    for i in range(10):
        record = source[i]
        reds.append(round(np.asarray(Image.open(io.BytesIO(record["image"])))[..., 0].mean() / 20))
        assert record["image"] == jpeg(20 * reds[-1])
        assert record["label"] == reds[-1] % 2
    assert sorted(reds) == list(range(10))


@pytest.mark.parametrize(
    ("split", "rows"), [("train[:90%]", 9), ("train[8:]", 2), ("train[20%:]+test", 12), ("test", 4)]
)
def test_tfds_slices(written, split, rows):
    whole, part = opened("tfds", written), opened("tfds", written, split)
    assert len(part) == rows
    by_key = {whole.key(i): whole[i] for i in range(10)}
    for i in range(rows):
        if "train" in part.key(i):
            assert part[i] == by_key[part.key(i)]
    assert len({part.key(i) for i in range(rows)}) == rows


def test_tfds_never_imports_tensorflow(written, tmp_path):
    (tmp_path / "tensorflow").mkdir()
    (tmp_path / "tensorflow/__init__.py").write_text("raise SystemExit('TensorFlow was imported')")
    code = (
        "import sys, pickle; from visionfm_jax.data.sources import open_source\n"
        "from visionfm_jax.data.sources.kinds import TfdsConfig\n"
        f"s = open_source(TfdsConfig(path={str(written)!r}))\n"
        "print(len(pickle.loads(pickle.dumps(s))[0]['image']) > 0, 'tensorflow' in sys.modules)"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert run.stdout.split() == ["True", "False"], run.stderr


def test_other_kinds_do_not_import_tfds():
    code = (
        "import sys; from visionfm_jax.data.sources import open_source\n"
        "from visionfm_jax.data.sources.kinds import BundledConfig\n"
        "open_source(BundledConfig(path='digits')); print('tensorflow_datasets' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"


def test_tfds_errors(tiny):
    version = tiny / "tiny/1.0.0"
    assert "no split 'val'; the splits are train, test" in error_of("tfds", tiny, "val")
    assert "the splits are train, test" in error_of("tfds", tiny, "train+dev")
    assert "cannot parse the split; write TFDS's slices" in error_of("tfds", tiny, "train[:x]")
    assert "the split holds no record" in error_of("tfds", tiny, "train[:0%]")
    message = error_of("tfds", tiny, image_key="picture")
    assert message.endswith("no feature 'picture' of type Image; set image_key to one of image, mask")
    assert "'number' of type ClassLabel; set label_key to one of label" in error_of("tfds", tiny, label_key="number")
    shutil.copytree(version, tiny / "tiny/2.0.0")
    assert "holds 2 datasets; set path to one of" in error_of("tfds", tiny)
    (record_file,) = version.glob("*train*")
    record_file.unlink()
    assert f"{record_file} is missing; copy the whole directory again" in error_of("tfds", version)
    (version / "features.json").write_text("{")
    assert "features.json is damaged (" in error_of("tfds", version)


def test_tfds_in_tfrecord_format_gets_the_command_that_converts_it(tiny):
    info = tiny / "tiny/1.0.0/dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    message = error_of("tfds", tiny)
    assert "the files are in tfrecord format, which has no random access" in message
    assert "tfds convert_format" in message
    assert "--out_file_format=array_record" in message


def flipped(content: bytes) -> bytes:
    return content[:300] + bytes([content[300] ^ 1]) + content[301:]


@pytest.mark.parametrize(
    "damage",
    [lambda c: b"", lambda c: c[: len(c) // 2], flipped, lambda c: bytes(len(c))],
    ids=["emptied", "cut", "flipped", "zeros"],
)
def test_tfds_file_cut_short_or_overwritten_gives_damaged_records(tiny, damage):
    (path,) = tiny.glob("tiny/1.0.0/*train*")
    path.write_bytes(damage(path.read_bytes()))
    source = opened("tfds", tiny)
    with pytest.raises(DamagedRecord):
        source[0]
    assert source.key(3) == "tiny-train.array_record-00000-of-00001[3]"


def test_tfds_file_that_is_gone_is_no_damaged_record(tiny):
    source = opened("tfds", tiny)
    (path,) = tiny.glob("tiny/1.0.0/*train*")
    path.unlink()
    with pytest.raises(DataError, match=r"record tiny-train\S+\[3\] cannot be read: .*No such file"):
        read_record(source, 3)


def test_tfds_label_that_is_no_class_is_damaged(tmp_path):
    class Unlabelled(Tiny):
        def _generate_examples(self, count):
            for i, example in super()._generate_examples(count):
                yield i, example | {"label": -1 if i == 0 else example["label"]}

    Unlabelled(data_dir=tmp_path).download_and_prepare()
    source = opened("tfds", tmp_path)

    def label_of(i: int) -> int | str:
        try:
            return source[i]["label"]
        except DamagedRecord as error:
            return str(error)

    found = collections.Counter(map(label_of, range(10)))
    assert found == {0: 4, 1: 5, "its label is -1, but there are 2 classes": 1}


EVIL = {"pythonClassName": "evil.Feature", "text": {}}
SEQUENCE = "tensorflow_datasets.core.features.sequence_feature.Sequence"
OLD = {"type": SEQUENCE, "content": {"feature": {"type": "evil.Feature", "content": {}}, "length": None}}
HOSTILE = {
    "in the proto": EVIL,
    "by the other name of the field": {"python_class_name": "evil.Feature", "text": {}},
    "within another": {"pythonClassName": SEQUENCE, "sequence": {"feature": EVIL, "length": "-1"}},
    "in JSON within JSON": {"pythonClassName": SEQUENCE, "jsonFeature": {"json": json.dumps(OLD["content"])}},
    "a class that runs programs": {
        "pythonClassName": "tensorflow_datasets.core.features.video_feature.Video", "video": {},
    },
}  # fmt: skip


@pytest.mark.parametrize("where", [*HOSTILE, "as older files have it", "in dataset_info.json"])
def test_tfds_imports_no_module_that_a_dataset_names(tiny, monkeypatch, where):
    version = tiny / "tiny/1.0.0"
    (tiny / "evil.py").write_text(f"open({str(tiny / 'written')!r}, 'w').close()")
    monkeypatch.chdir(tiny)
    monkeypatch.syspath_prepend("")  # as under `python -m`
    path = version / ("dataset_info.json" if where == "in dataset_info.json" else "features.json")
    content = json.loads(path.read_text())
    if where == "in dataset_info.json":
        content["features"] = EVIL
    elif where == "as older files have it":
        content = {"type": "tensorflow_datasets.core.features.features_dict.FeaturesDict", "content": {"old": OLD}}
    else:
        content["featuresDict"]["features"]["other"] = HOSTILE[where]
    path.write_text(json.dumps(content))
    message = error_of("tfds", tiny)
    assert f"{path} names the Python class " in message
    assert message.endswith("use another dataset, or write this one again without it")
    assert not (tiny / "written").exists()


@pytest.mark.parametrize("content", ["{", '{"a": "\ud800', "[" * 100_000])
@pytest.mark.parametrize("name", ["features.json", "dataset_info.json"])
def test_tfds_damaged_description_is_one_line(tiny, name, content):
    (tiny / "tiny/1.0.0" / name).write_text(content, errors="surrogatepass")
    assert f"{name} is damaged (" in error_of("tfds", tiny)


# --- class folders ---


def test_folder_is_sorted_by_class_and_name(folder):
    source = opened("folder", folder)
    keys = [source.key(i) for i in range(len(source))]
    assert keys == ["ant/a.jpg", "ant/b.JPEG", "bee/c.png", "cow/d.webp"]
    assert [source[i]["label"] for i in range(4)] == [0, 0, 1, 2]
    assert source[1]["image"] == jpeg(1)
    assert source.class_names == ("ant", "bee", "cow")


def test_folder_split_that_lacks_a_class_keeps_the_labels(folder):
    source = opened("folder", folder, "val")
    assert source.class_names == ("ant", "bee", "cow")
    assert [source[i]["label"] for i in range(2)] == [1, 2]


def test_folder_without_splits(folder):
    source = opened("folder", folder / "val", "")
    assert source.class_names == ("bee", "cow")
    assert source.key(1) == "cow/y.jpg"


def test_folder_keeps_names_that_are_no_utf8(folder):
    name = os.path.join(os.fsencode(folder / "val/cow"), b"\xff.jpg")
    try:
        Path(os.fsdecode(name)).write_bytes(jpeg(9))
    except OSError:  # a file system that only takes UTF-8
        return
    assert opened("folder", folder, "val")[2]["image"] == jpeg(9)


def test_folder_file_that_vanished_is_an_os_error(folder):
    source = opened("folder", folder)
    (folder / "train/ant/a.jpg").unlink()
    with pytest.raises(OSError, match=r"a\.jpg"):
        source[0]


def test_folder_counts_and_names_what_it_does_not_read(folder, caplog):
    ant = folder / "train/ant"
    for name in ("a.heic", "b.HEIC", "LICENSE", *(f"x.kind{i}" for i in range(6))):
        (ant / name).touch()
    (ant / "gone.jpg").symlink_to("nowhere")
    (ant / "loop.jpg").symlink_to("loop.jpg")
    (ant / "more").mkdir()
    (ant / "new\nline.txt").touch()
    os.mkfifo(ant / "pipe.jpg")
    (ant / "link.jpg").symlink_to(ant / "a.jpg")
    logging.get_absl_logger().propagate = True
    source = opened("folder", folder)
    assert [source.key(i) for i in range(3)] == ["ant/a.jpg", "ant/b.JPEG", "ant/link.jpg"]
    lines = {r.message.partition("left out: ")[2] for r in caplog.records if "left out" in r.message}
    found = "\n".join(sorted(line.partition(":")[0] for line in lines))
    assert "2 broken links" in found
    assert sum(int(line.split()[0]) for line in lines) == 9 + 2 + 1 + 1 + 1 + 2  # also readme.txt and ._a.jpg
    assert len(lines) == 11
    assert all("\n" not in line for line in lines)


@pytest.mark.parametrize(
    ("suffix", "form"), [(".avif", "AVIF"), (".jp2", "JPEG2000"), (".webp", "WEBP"), (".gif", "GIF"), (".tiff", "TIFF")]
)
def test_folder_reads_the_formats_whose_suffixes_it_knows(folder, suffix, form):
    Image.new("RGB", (40, 30), (200, 0, 0)).save(folder / f"train/bee/d{suffix}", form)
    source = opened("folder", folder)
    assert source.key(3) == f"bee/d{suffix}"
    pixels = images.decode(source[3]["image"])
    assert pixels.shape == (30, 40, 3)
    assert abs(pixels.reshape(-1, 3).mean(0) - [200, 0, 0]).max() < 4


@pytest.mark.parametrize("target", ["nowhere", "dog"])
def test_folder_refuses_a_class_that_leads_nowhere(folder, target):
    (folder / "train/dog").symlink_to(target)
    message = error_of("folder", folder)
    assert message.endswith("/train/dog: is a broken link; fix or remove it")


def test_folder_refuses_a_class_that_it_may_not_read(folder, monkeypatch, caplog):
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith(locked):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    locked = "train/bee"
    message = error_of("folder", folder)
    assert "cannot be read: [Errno 13] Permission denied: " in message
    assert message.endswith("train/bee'; restore the file or give this user access, then start again")
    locked = "/lost+found"
    (folder / "lost+found").mkdir()
    logging.get_absl_logger().propagate = True
    assert len(opened("folder", folder)) == 4
    assert "lost+found cannot be read ([Errno 13] Permission denied" in caplog.text


def test_storage_that_fails_while_a_source_is_opened_is_asked_again(folder, monkeypatch):
    monkeypatch.setattr(storage, "WAITS", (0, 0))
    scandir, left = os.scandir, [2]

    def fail(path):
        left[0] -= 1
        if left[0] >= 0:
            raise OSError(errno.EIO, "Input/output error")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", fail)
    assert len(opened("folder", folder)) == 4


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_nul_in_a_name_is_one_line(kind, tmp_path):
    assert error_of(kind, "a\0b").endswith("path = 'a\\x00b': no file has NUL in its name; set another")
    if "split" in types_of(KINDS[kind]):
        assert error_of(kind, tmp_path, "a\0b").startswith("split = 'a\\x00b'")


def test_folder_errors(folder, tmp_path):
    assert "no split 'dev'; the splits are notes, train, val" in error_of("folder", folder, "dev")
    remedy = "found class folders of images; use FolderConfig (by a flag: kind=folder) with split"
    assert f"{remedy} one of notes, train, val" in error_of("folder", folder, "")
    assert f"expected PATH/SPLIT/CLASS/FILE, {remedy}=''" in error_of("folder", folder / "train")
    flat = tmp_path / "flat"
    shutil.copytree(folder / "train/bee", flat)
    assert "found images without class folders; sort them into PATH/SPLIT/CLASS/" in error_of("folder", flat, "")


# --- NumPy archives ---


def test_archive_of_colour_and_grey(archives):
    train, test = opened("numpy", archives), opened("numpy", archives, "test")
    assert (len(train), train.num_classes, train.class_names) == (6, 3, ("x", "y", "z"))
    assert (len(test), test.num_classes, test.class_names) == (2, 2, None)
    assert train[5]["image"].shape == (4, 5, 3)
    assert (test[1]["image"].shape, test[1]["image"].dtype) == ((4, 5, 1), np.uint8)
    np.testing.assert_array_equal(test[1]["image"][..., 0], train[1]["image"][..., 0])
    assert [train[i]["label"] for i in range(6)] == [0, 1, 2, 2, 1, 0]
    assert train.key(2) == "train.npz[2]"


def test_archive_file_is_a_source_without_splits(archives):
    assert len(opened("numpy", archives / "train.npz", "")) == 6
    assert "a single .npz file has no splits; set split=''" in error_of("numpy", archives / "train.npz", "train")


def test_archive_is_read_by_one_thread_and_not_pickled(archives):
    source = opened("numpy", archives)
    with ThreadPoolExecutor(4) as pool:
        bases = {id(image["image"].base) for image in pool.map(source.__getitem__, [0, 1, 2, 3] * 4)}
    assert len(bases) == 1
    assert source._images is not None
    assert pickle.loads(pickle.dumps(source))._images is None


@pytest.mark.parametrize(("arrays", "message"), [
    ({"image": np.zeros((3, 4, 4), np.float32), "label": np.zeros(3, int)}, "'image' is float32 (3, 4, 4); give uint8"),
    ({"image": np.zeros((3, 3, 4, 5), np.uint8), "label": np.zeros(3, int)}, "'image' is uint8 (3, 3, 4, 5); give"),
    ({"image": np.zeros((3, 4, 4), np.uint8), "label": np.zeros(2, int)}, "'label' is int64 (2,); give 3 integers"),
    ({"image": np.zeros((3, 4, 4), np.uint8), "label": np.zeros(3)}, "'label' is float64 (3,); give 3 integers"),
    ({"image": np.zeros((3, 4, 4), np.uint8)}, "holds no array 'label' but image; set label_key"),
    ({"x": np.zeros((3, 4, 4), np.uint8), "y": np.zeros(3)}, "holds no array 'image' but x, y; set image_key"),
    ({"image": np.zeros((2, 4, 4), np.uint8), "label": np.array([0, -1])}, "'label' runs from -1 to 0; give labels"),
    (
        {"image": np.zeros((2, 4, 4), np.uint8), "label": np.array([0, 2]), "class_names": ["a", "b"]},
        "'label' runs from 0 to 2; give labels from 0 to 1",
    ),
    ({"image": np.zeros((0, 4, 4), np.uint8), "label": np.zeros(0, int)}, "holds no record"),
])  # fmt: skip
def test_archive_errors(tmp_path, arrays, message):
    np.savez(tmp_path / "train.npz", **arrays)
    assert message in error_of("numpy", tmp_path)


def test_archive_that_is_damaged(tmp_path):
    path = tmp_path / "train.npz"
    images = np.random.default_rng(0).integers(0, 256, (100, 64, 64), dtype=np.uint8)
    np.savez(path, image=images, label=np.zeros(100, int))
    content = path.read_bytes()
    path.write_bytes(content.replace(images[90].tobytes(), images[91].tobytes()))
    source = opened("numpy", path, "")  # which does not read so far
    with pytest.raises(DataError, match=r"train\.npz is damaged \(Bad CRC-32 .*\); write it again with np\.savez"):
        source[0]
    path.write_bytes(content[:1000])
    assert "train.npz is not a readable .npz file" in error_of("numpy", path, "")


# --- all kinds ---


@pytest.mark.parametrize("kind", ["tfds", "folder", "numpy", "tars"])
def test_path_missing_or_empty(kind, tmp_path):
    assert f"the path does not exist (but {tmp_path} does)" in error_of(kind, tmp_path / "no/where")
    assert "the path is empty" in error_of(kind, tmp_path)
    (tmp_path / "train.npz").touch()
    assert "the path is empty" in error_of(kind, tmp_path / "train.npz")


def test_another_format_is_recognised_and_its_kind_named(written, folder, archives, tmp_path):
    assert "found a TFDS directory; use TfdsConfig (by a flag: kind=tfds)" in error_of("folder", written)
    assert "found a TFDS directory; use TfdsConfig (by a flag: kind=tfds)" in error_of("numpy", written)
    assert "use FolderConfig (by a flag: kind=folder) with split one of notes, train, val" in error_of("tfds", folder)
    assert "use FolderConfig (by a flag: kind=folder) with split one of notes, train, val" in error_of("numpy", folder)
    assert "found a folder of .npz files; use NumpyConfig (by a flag: kind=numpy)" in error_of("tfds", archives)
    assert "found an .npz file; use NumpyConfig (by a flag: kind=numpy) with split=''" in error_of(
        "folder", archives / "test.npz"
    )
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards/00000.tar").write_bytes(b"x")
    message = error_of("folder", tmp_path / "shards")
    assert (
        "found tar files; for pairs with captions use TarsConfig (by a flag: kind=tars), for classes unpack them"
        in message
    )
    assert "found a .tar file; use TarsConfig (by a flag: kind=tars) with its folder as path" in error_of(
        "tfds", tmp_path / "shards/00000.tar"
    )
    for kind, path in {"tfds": written, "numpy": archives, "folder": folder}.items():
        assert (
            f"expected a folder of .tar files, found {FOUND[kind]}; use {KINDS[kind].__name__} (by a flag: kind={kind})"
            in error_of("tars", path)
        )
    (tmp_path / "loose").mkdir()
    (tmp_path / "loose/tiny-train.array_record-00000-of-00001").write_bytes(b"x")
    assert "record files without dataset_info.json; copy the whole" in error_of("tfds", tmp_path / "loose")
    (tmp_path / "song.mp3").write_bytes(b"x")
    assert "found a .mp3 file" in error_of("numpy", tmp_path / "song.mp3")


def _first(source) -> tuple[int, str, int | None]:
    return len(source), source.key(1), source[1].get("label")


def test_every_kind_travels_to_worker_processes(written, folder, archives, tmp_path):
    sources = [opened("tfds", written), opened("folder", folder), opened("numpy", archives)]
    sources.append(open_source(BundledConfig(path="digits")))
    sources.append(opened("tars", write_tars(tmp_path / "tars")))
    sources.append(open_source(BenchmarkConfig(path=str(write_tars(tmp_path / "flickr8k/test").parent))))
    sources.append(opened("coco_captions", write_coco(tmp_path / "coco", [["a"], ["b", "c"]], "train")))
    sources.append(opened("visual_genome", write_visual_genome(tmp_path / "genome", [["a"], ["b", "c"]])))
    for kind in ("coco", "coco_panoptic", "voc", "yolo", "class_maps", "ade20k"):
        sources.append(open_source(annotated_sets.write(kind, tmp_path / kind)))
    sources.append(open_source(ScenesConfig(path="noto")))
    sources.append(opened("parquet", written_parquet(tmp_path / "parquet")))
    (tmp_path / "coco/table.csv").write_text("image,caption\ntrain/000000000000.jpg,one\ntrain/000000000001.jpg,two\n")
    sources.append(open_source(TableConfig(path=str(tmp_path / "coco/table.csv"))))
    assert len(sources) == len(KINDS)
    expected = [_first(source) for source in sources]  # also reads, so that open files would have to travel
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.map(_first, sources) == expected


def test_every_kind_says_whether_records_have_labels_and_captions(written, folder, archives, tmp_path):
    sources = [opened("tfds", written), opened("folder", folder), opened("numpy", archives)]
    sources += [open_source(BundledConfig(path=name)) for name in ("digits", "noto", "twemoji")]
    sources.append(opened("tars", write_tars(tmp_path / "tars")))
    said = [(source.num_classes > 0, source.most_captions) for source in sources]
    assert said == [(True, 0)] * 4 + [(True, 1)] * 2 + [(False, 1)]
    assert [source.has_captions for source in sources] == [captions > 0 for _, captions in said]
    for source, (label, caption) in zip(sources, said, strict=True):
        assert set(source[0]) == {"image"} | ({"label"} if label else set()) | ({"caption"} if caption else set())


def test_index_outside_is_an_index_error(written, folder, archives):
    for source in (opened("tfds", written), opened("folder", folder), opened("numpy", archives)):
        for index in (-1, len(source)):
            with pytest.raises(IndexError, match=f"record {index} of {len(source)}"):
                source[index]
            with pytest.raises(IndexError):
                list(source)[index + 2 * len(source)]


def _swap(a: Path, b: Path) -> None:
    first, second = a.read_bytes(), b.read_bytes()
    a.write_bytes(second)
    b.write_bytes(first)


def test_the_fingerprint_follows_the_data_not_the_path_and_notices_changes(written, folder, archives, tmp_path):
    made = {
        "tfds": (written, "train"), "folder": (folder, "train"), "numpy": (archives, "train"),
        "tars": (write_tars(tmp_path / "tars"), ""),
        "coco_captions": (write_coco(tmp_path / "coco", [["a"], ["b", "c"], ["d"]], "train"), "train"),
        "visual_genome": (write_visual_genome(tmp_path / "genome", [["a"], ["b", "c"]]), ""),
    }  # fmt: skip

    def cut(path):
        path.write_bytes(path.read_bytes()[:-1])

    def retold(path):
        path.write_text(path.read_text().replace('"a"', '"e"'))

    changes = {
        "tfds": lambda path: cut(next(path.rglob("*train.array_record*"))),
        "folder": lambda path: _swap(path / "train/ant/b.JPEG", path / "train/bee/c.png"),
        "numpy": lambda path: np.savez(
            path / "train.npz", **{**np.load(path / "train.npz"), "label": np.array([0, 1, 2, 2, 0, 1])}
        ),
        "tars": lambda path: _swap(path / "00000.tar", path / "00001.tar"),
        "coco_captions": lambda path: retold(path / "annotations/captions_train.json"),
        "visual_genome": lambda path: cut(path / "VG_100K/1.jpg"),
    }
    (folder / "train/bee/c.png").write_bytes(jpeg(3) + b"\0")
    for kind, (path, split) in made.items():
        source, moved = opened(kind, path, split), tmp_path / "moved" / kind
        shutil.copytree(path, moved)
        first = source.fingerprint()
        assert first == opened(kind, moved, split).fingerprint()
        assert all(isinstance(k, str) and isinstance(v, str) for k, v in first.items())
        changes[kind](moved)
        assert opened(kind, moved, split).fingerprint() != first, kind
    pictures = [open_source(BundledConfig(path="digits", split=s)) for s in ("train", "train", "test")]
    first, again, other = (source.fingerprint() for source in pictures)
    assert first == again
    assert first["set"] == other["set"]
    assert first["split"] != other["split"]


def test_the_fingerprint_of_a_folder_names_the_class(folder):
    before = opened("folder", folder).fingerprint()
    assert list(before) == ["ant", "bee", "cow"]
    assert before["ant"].startswith("2 files, ")
    (folder / "train/bee/new.jpg").write_bytes(jpeg(9))
    after = opened("folder", folder).fingerprint()
    assert [name for name in before if before[name] != after[name]] == ["bee"]
    source = opened("folder", folder)
    (folder / "train/bee/new.jpg").unlink()
    with pytest.raises(DataError, match=r"bee/new\.jpg: cannot be read \(No such file or directory\)"):
        source.fingerprint()
