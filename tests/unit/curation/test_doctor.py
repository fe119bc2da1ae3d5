"""The data doctor: each finding on tiny data that have the defect, and none on data that have none."""

import dataclasses
import io
import json
import pickle
import shutil
import tarfile
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
from PIL import Image

from visionfm_jax import __main__ as console
from visionfm_jax.config import Config, DataConfig, SourceConfig, TrainConfig
from visionfm_jax.curation import checks, doctor, doctor_page, survey
from visionfm_jax.curation.checks import Study, findings
from visionfm_jax.data.chain import Chain
from visionfm_jax.data.near import Among
from visionfm_jax.data.shards import Here
from visionfm_jax.data.sources.bundled import BundledSource
from visionfm_jax.data.sources.kinds import (
    Ade20kConfig,
    BundledConfig,
    CocoConfig,
    FolderConfig,
    NumpyConfig,
    TarsConfig,
)
from visionfm_jax.evals.kinds import AccuracyConfig
from visionfm_jax.models.backbones.vit import ViTConfig
from visionfm_jax.models.clip import ClipConfig
from visionfm_jax.models.text import TextConfig
from visionfm_jax.parallel.targets import find_cluster
from visionfm_jax.tasks.classification import ClassificationConfig
from visionfm_jax.tasks.contrastive import ContrastiveConfig
from visionfm_jax.tasks.detection import DetectionConfig
from visionfm_jax.tasks.segmentation import SegmentationConfig

MODEL = ViTConfig(size="P", patch_size=8, image_size=32, pool="gap")
CLIP = ClipConfig(image=MODEL, text=TextConfig(size="P", context=16), embed_dim=32)


MEASURED = {name: getattr(doctor, name) for name in ("_model", "_rate")}


@pytest.fixture(autouse=True)
def quick(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(doctor, "_model", lambda config: (0.0, 0))  # the two take a second
    monkeypatch.setattr(doctor, "_rate", lambda study: None)


class Records:
    """Records that a test gives, as a dataset."""

    class_names = None

    def __init__(self, config):
        self.records, self.name, self.num_classes = config.records, f"{config.kind} {config.path}", config.num_classes
        self.has_captions = "caption" in self.records[0]
        self.most_captions = int(self.has_captions)
        kinds = [k for k in ("label", "box_labels", "masks", "class_map") if k in self.records[0]]
        self.classes_of = tuple(kinds)

    def __len__(self):
        return len(self.records)

    def __getitem__(self, index):
        return self.records[index]

    def fingerprint(self):
        return {}

    def key(self, index):
        return f"record {index}"


@dataclass(kw_only=True)
class RecordsConfig(SourceConfig):
    kind: ClassVar[str] = "records"
    path: str = "here"
    split: str = "train"
    records: tuple = ()
    num_classes: int = 0

    def make(self):
        return Records(self)


def pixels(seed: int, height: int = 32, width: int = 32) -> np.ndarray:
    """Coarse random patches, so that an image looks alike at other qualities, and unlike all others."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def encoded(image: np.ndarray | Image.Image, form: str = "PNG", **how) -> bytes:
    file = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, form, **how)
    return file.getvalue()


def png(seed: int) -> bytes:
    return encoded(pixels(seed))


@pytest.fixture(scope="session")
def clean(tmp_path_factory):
    """Two classes of six images, and two of each held out."""
    folder = tmp_path_factory.mktemp("clean")
    for s, (split, number) in enumerate((("train", 6), ("val", 2))):
        for c, name in enumerate(("cat", "dog")):
            (folder / split / name).mkdir(parents=True)
            for i in range(number):
                (folder / split / name / f"{i}.png").write_bytes(png(100 * s + 10 * c + i))
    return folder


@pytest.fixture
def folder(clean, tmp_path):
    shutil.copytree(clean, tmp_path / "set")
    return tmp_path / "set"


def config_of(*train: SourceConfig, task=None, model=MODEL, evals=(), **data) -> Config:
    task = task or ClassificationConfig(num_classes=2)
    return Config(
        name="run", model=model, task=task, data=DataConfig(train=train, threads=1, **data), evals=evals,
        train=TrainConfig(batch_size=4, steps=10),
    )  # fmt: skip


def of_folder(folder, **data) -> Config:
    held_out = AccuracyConfig(name="val", source=FolderConfig(path=str(folder), split="val"))
    return config_of(FolderConfig(path=str(folder), split="train"), evals=(held_out,), **data)


def pairs(*captions, **more) -> SourceConfig:
    records = tuple({"image": png(i), "caption": caption} for i, caption in enumerate(captions))
    return RecordsConfig(records=records, **more)


def detected(*objects: dict, **more) -> Config:
    """A detector on an image of each of `objects`."""
    records = tuple({"image": png(i)} | o for i, o in enumerate(objects))
    task = DetectionConfig(num_classes=2, most_objects=2)
    return config_of(RecordsConfig(records=records, num_classes=2), task=task, **more)


def boxed(*boxes, crowd: bool = False, masks: bool | None = None) -> dict:
    out = {"boxes": np.array(boxes, np.float64).reshape(-1, 4), "box_labels": np.arange(len(boxes), dtype=np.int32) % 2}
    out |= {"box_crowd": np.full(len(boxes), crowd)}
    return out if masks is None else out | {"masks": np.full((len(boxes), 32, 32), masks)}


def segmented(*values: np.ndarray) -> Config:
    records = tuple({"image": png(i), "class_map": value} for i, value in enumerate(values))
    return config_of(RecordsConfig(records=records, num_classes=2), task=SegmentationConfig(num_classes=2))


def found_in(config: Config, **more) -> list[checks.Finding]:
    return findings(doctor.examine(config, engine=Here(), **more))


def the(found, name: str) -> checks.Finding:
    [one] = [f for f in found if f.name == name]
    return one


def names(found) -> set[str]:
    return {f.name for f in found if f.severity != "note"}


def test_clean_data_give_no_finding(clean):
    assert {f.name for f in found_in(of_folder(clean))} == {"no_checksums"}
    assert not found_in(config_of(pairs(*"abcdefgh"), task=ContrastiveConfig(), model=CLIP))
    box = (0, 0, 16, 16)
    assert not found_in(detected(*(boxed(box, box) for _ in range(4))))
    assert not found_in(segmented(*(np.eye(32, dtype=np.uint8) for _ in range(4))))


def test_a_shipped_configuration_is_clean_and_written_down(tmp_path, capsys, monkeypatch):
    for name, function in MEASURED.items():
        monkeypatch.setattr(doctor, name, function)
    monkeypatch.setattr(doctor, "SECONDS", 0.0)
    assert console.main(["data", "doctor", "--config=quickstart", "--samples=40", f"--out={tmp_path}"]) == 0
    shown = capsys.readouterr().out
    assert "Nothing was found." in shown
    assert "bundled digits/train" in shown
    assert "Not all records were read" in shown
    about = json.loads((tmp_path / "doctor.json").read_text())
    assert about["findings"] == []
    assert about["images_per_s"] > 0
    assert [d["read"] for d in about["datasets"]] == [40, 40]
    page = (tmp_path / "doctor.html").read_text()
    assert page.count("data:image/jpeg") == 12 * 3  # stored and as training sees them; the held-out ones once
    assert "shorter side, pixels" in page
    assert "images or objects of each class" in page


def test_all_missing_paths_are_named_at_once(tmp_path, clean, capsys):
    assert console.main(["data", "doctor", "--config=swinv2_g_clip", "--config.task.tokenizer=no.json"]) == 2
    shown = " ".join(capsys.readouterr().out.split())
    for path in ("/data/laion5b", "/data/laion5b.selection", "/data/imagenet2012", "no.json"):
        assert f"{path} does not exist" in shown
    config = of_folder(clean)
    config.checkpoint.weights = "runs/nowhere"
    assert the(found_in(config), "missing").where == "config.checkpoint.weights"


def test_what_cannot_be_opened_does_not_keep_others_from_being_looked_at(folder, tmp_path):
    np.savez(tmp_path / "test.npz", image=np.zeros((2, 8, 8), np.uint8), label=np.array([-1, -1]))
    (folder / "train/cat/0.png").write_bytes(b"no image")
    config = of_folder(folder)
    config.evals += (AccuracyConfig(name="test", source=NumpyConfig(path=str(tmp_path), split="test")),)
    found = found_in(config)
    assert the(found, "unlabelled").where == "config.evals[1].source"
    assert the(found, "unlabelled").remedy == "set a split that has labels"
    assert the(found, "unreadable").examples[0].startswith("cat/0.png: is none of ")


def test_what_a_task_refuses_is_found(folder):
    config = of_folder(folder)
    config.task = ClassificationConfig(num_classes=1)
    one = next(f for f in found_in(config) if f.name == "refused")
    assert "labels up to 1, but config.task.num_classes = 1" in one.what
    assert one.remedy == "set it to 2"
    model = dataclasses.replace(CLIP, text=TextConfig(size="P", context=16, vocab_size=99))
    config = config_of(pairs("a"), task=ContrastiveConfig(), model=model)
    one = the(found_in(config), "refused")
    assert (one.where, one.severity) == ("config.task", "error")
    assert "config.model.text.vocab_size = 99" in one.what


def damage_reasons() -> dict[str, SourceConfig]:
    image = pixels(0)
    truth = {"class_map": np.zeros((32, 32), np.uint8)}
    return {
        "unlabelled": config_of(RecordsConfig(records=({"image": image, "label": -1},), num_classes=2)),
        "label_outside": config_of(RecordsConfig(records=({"image": image, "label": 7},), num_classes=2)),
        "map_values": segmented(truth["class_map"] + 9),
        "size_differs": segmented(truth["class_map"][:16]),
        "not_utf8": config_of(pairs(b"\xff\xfe", "b"), task=ContrastiveConfig(), model=CLIP),
        "empty_caption": config_of(pairs(" \n", "b"), task=ContrastiveConfig(), model=CLIP),
        "too_large": config_of(
            RecordsConfig(records=({"image": pixels(0, 90, 90), "label": 0},), num_classes=2), max_pixels=5000
        ),
    }


@pytest.mark.parametrize("name", damage_reasons())
def test_damaged_records_are_told_apart(name):
    one = the(found_in(damage_reasons()[name]), name)
    assert one.severity == "error"
    assert one.number == 1
    assert one.examples[0].startswith("record 0: ")
    assert "training stops at this share" in one.what


def test_few_damaged_records_are_a_warning(folder):
    (folder / "train/cat/0.png").write_bytes(png(0)[:60])
    one = the(found_in(of_folder(folder, max_damaged=0.5)), "unreadable")
    assert one.severity == "warning"
    assert one.what.startswith("1 of 12 (8.33 %) cannot be read")


def test_ade20k_with_instances_and_parts_is_told_from_the_150_classes(tmp_path):
    (tmp_path / "full/images/ADE/training").mkdir(parents=True)
    task = SegmentationConfig(num_classes=150)
    one = the(found_in(config_of(Ade20kConfig(path=str(tmp_path / "full")), task=task)), "map_colours")
    assert "ADEChallengeData2016" in one.remedy
    for kind in ("images", "annotations"):
        (tmp_path / f"rgb/{kind}/training").mkdir(parents=True)
        (tmp_path / f"rgb/{kind}/training/a.png").write_bytes(png(0))
    one = the(found_in(config_of(Ade20kConfig(path=str(tmp_path / "rgb")), task=task)), "map_colours")
    assert "has the channels RGB" in one.what
    (tmp_path / "rgb/annotations/training/a.png").write_bytes(encoded(np.ones((32, 32), np.uint8)))
    assert the(found_in(config_of(Ade20kConfig(path=str(tmp_path / "rgb")), task=task)), "incomplete").number == 20_209


def test_members_that_a_tar_lacks_are_told(tmp_path):
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name, content in {"a.png": png(0), "a.txt": b"a", "b.png": png(1), "c.png": png(2), "c.txt": b"c"}.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    whole = (tmp_path / "0.tar").read_bytes()
    (tmp_path / "1.tar").write_bytes(whole[: whole.rfind(b"c.txt") + 512])
    found = found_in(config_of(TarsConfig(path=str(tmp_path)), task=ContrastiveConfig(), model=CLIP))
    said = [f.what for f in found if f.name == "left_out" and f.severity == "warning"]
    assert any(what.startswith("1 of 2 tars are truncated") for what in said)
    assert any("left out: 2 " in what and "0/b" in what for what in said)
    (tmp_path / "old.pairs").write_bytes(b"of another crawl")
    source = TarsConfig(path=str(tmp_path), selection=str(tmp_path / "old.pairs"))
    one = the(found_in(config_of(source, task=ContrastiveConfig(), model=CLIP)), "unusable")
    assert one.remedy == "run visionfm data select again"


def test_numbers_of_records(folder):
    config = of_folder(folder, num_examples=13)
    assert the(found_in(config), "num_examples").severity == "warning"
    config.train = TrainConfig(batch_size=64, epochs=3)
    found = found_in(config)
    assert the(found, "num_examples").severity == "error"
    assert the(found, "num_examples").remedy == "set it to 12"
    assert the(found, "few_records").where == "config.train.batch_size"


def test_a_small_source_of_large_weight_is_read_again_and_again(folder):
    large = RecordsConfig(records=({"image": png(0), "label": 0},) * 1000, num_classes=2)
    config = config_of(FolderConfig(path=str(folder), split="train", weight=3.0), large)
    config.train.steps = 10_000
    assert the(found_in(config, samples=10), "repeats").what.startswith("its 12 records are read 2,500 times: 75.0%")
    large.weight = 3.0
    assert "repeats" not in names(found_in(config, samples=10))


def test_messages_of_readers_have_a_meaning():
    """Those that the tests of records do not make."""
    for message, name in {
        "its label is -1, but there are 1000 classes": "unlabelled",
        "its objects have labels beyond the 80 classes": "label_outside",
        "its annotations are for 48 x 64 pixels, and the file has 64 x 48": "size_differs",
        "it differs from its checksum in x.checksums: the file is damaged": "changed",
        "premature end of JPEG (99 bytes)": "unreadable",
    }.items():
        assert checks.meaning_of(message).name == name


def test_label_spaces(folder, tmp_path):
    config = of_folder(folder)
    config.task = ClassificationConfig(num_classes=21_841)
    one = the(found_in(config), "label_space")
    assert "21,841 (ImageNet-21K, all of 2011), and the training data have 2 classes" in one.what
    (folder / "val/dog").rename(tmp_path / "bird")
    (folder / "val/cat").rename(tmp_path / "cow")
    for name in ("bird", "cow"):
        shutil.copytree(tmp_path / name, tmp_path / "other/val" / name)
    config = of_folder(folder)
    config.evals[0].source = FolderConfig(path=str(tmp_path / "other"), split="val")
    one = the(found_in(config), "classes_differ")
    assert one.examples == ("0: bird | cat", "1: cow | dog")
    (tmp_path / "other/val/crow").mkdir()
    (tmp_path / "other/val/crow/0.png").write_bytes(png(400))
    config.evals[0].source.path = str(tmp_path / "other")
    assert "has 3 classes" in " ".join(f.what for f in found_in(config) if f.name == "label_space")


def test_frequencies_of_classes(folder):
    for i in range(110):
        (folder / f"train/cat/more{i}.png").write_bytes(png(1000 + i))
    for i in range(1, 6):
        (folder / f"train/dog/{i}.png").unlink()
    (folder / "train/emu").mkdir()
    config = of_folder(folder)
    config.task = ClassificationConfig(num_classes=3)
    found = found_in(config)
    assert {f.where for f in found if f.name == "no_image"} == {"config.data.train[0]", "config.evals[0].source"}
    one = the(found, "imbalance")
    assert one.severity == "warning"
    assert "1 to 116" in one.what
    assert "99% are of cat" in one.what


def test_equal_images_within_the_training_data(folder):
    for path in ("train/cat/copy.png", "train/dog/copy.png"):
        shutil.copy(folder / "train/cat/0.png", folder / path)
    found = found_in(of_folder(folder))
    assert the(found, "duplicates").number == 2
    assert the(found, "contradiction").examples == ("dog/copy.png",)
    config = of_folder(folder)
    config.data.train *= 2
    config.data.train = (config.data.train[0], dataclasses.replace(config.data.train[1], weight=2.0))
    assert {f.where for f in found_in(config) if f.name == "named_twice"} == {"config.data.train[1]"}
    config.data.train = (config.data.train[0], FolderConfig(path=f"{folder}/../set", split="train"))
    assert the(found_in(config), "named_twice").where == "config.data.train[1]"


def test_order(folder):
    assert the(found_in(of_folder(folder, shuffle=False)), "order").severity == "error"
    mixed = tuple({"image": png(i), "label": i % 2} for i in range(4))
    config = config_of(RecordsConfig(records=mixed, num_classes=2), shuffle=False)
    assert the(found_in(config), "order").severity == "note"


def kinds_of_images() -> dict[str, bytes]:
    image = Image.fromarray(pixels(7))
    return {
        "grey": encoded(image.convert("L")),
        "palette": encoded(image.quantize(16)),
        "transparent": encoded(image.convert("RGBA")),
        "cmyk": encoded(image.convert("CMYK"), "JPEG"),
        "deep": encoded(Image.fromarray(pixels(7)[..., 0].astype(np.uint16) * 257)),
        "animated": encoded(image, "GIF", save_all=True, append_images=[Image.fromarray(pixels(8))]),
        "blank": encoded(np.full((32, 32, 3), 200, np.uint8)),
        "tiny": encoded(pixels(7, 15, 12)),
        "huge": encoded(pixels(7, 100, 120)),
        "long": encoded(pixels(7, 20, 90)),
    }


@pytest.mark.parametrize("name", kinds_of_images())
def test_unusual_images(name, folder, monkeypatch):
    monkeypatch.setattr(checks, "HUGE", 10_000)
    monkeypatch.setattr(checks, "height_width", lambda size: (4, 4) if name == "huge" else (32, 32))
    (folder / "train/cat/odd.png").write_bytes(kinds_of_images()[name])
    one = the(found_in(of_folder(folder)), name)
    assert one.number == 1
    assert one.examples[0].startswith("cat/odd.png")


def test_maps_without_classes():
    none = np.full((32, 32), 255, np.uint8)
    most = none.copy()
    most[0] = 1
    found = found_in(segmented(none, most, most))
    assert the(found, "unclassed_maps").number == 1
    assert the(found, "unclassed_pixels").what.startswith("98% of the pixels")
    assert the(found_in(segmented(none, none)), "unclassed_maps").severity == "error"


def test_objects():
    box = (0, 0, 20, 20)
    found = found_in(
        detected(
            boxed(masks=True), boxed(box, (5, 5, 5, 9), masks=True), boxed(box, masks=False), boxed(box, crowd=True)
        )
    )
    assert the(found, "box_outside").examples == ("record 1",)
    assert the(found, "empty_mask").examples == ("record 2",)
    assert the(found, "no_objects").number == 2
    assert the(found, "crowd").what.startswith("1 of 4 (25 %)")
    found = found_in(detected(boxed(box, box, box), boxed((0, 0, 2, 2))))
    assert the(found, "too_many").number == 1
    assert the(found, "small").what.startswith("1 of 4 (25 %) objects are below 4 x 4")


def test_coco(tmp_path):
    """91 categories, of which the task expects 80; a file that is listed twice; boxes that are left out."""
    (tmp_path / "train").mkdir()
    (tmp_path / "train/a.png").write_bytes(png(0))
    (tmp_path / "annotations").mkdir()
    content = {
        "images": [{"id": i, "file_name": "a.png"} for i in range(2)],
        "categories": [{"id": i, "name": f"c{i}"} for i in range(1, 92)],
        "annotations": [{"id": i, "image_id": 0, "category_id": 1, "bbox": [0, 0, w, 9]} for i, w in enumerate((9, 0))],
    }
    path = tmp_path / "annotations/instances_train.json"
    path.write_text(json.dumps(content))
    source = CocoConfig(path=str(tmp_path), split="train")
    found = found_in(config_of(source, task=DetectionConfig(num_classes=91)))
    assert the(found, "coco_ids").number == 91
    assert the(found, "duplicate_files").examples == ("a.png",)
    assert the(found, "no_object").number == 90
    assert "whose box is empty" in the(found, "left_out").what
    content["categories"] = content["categories"][:80]
    path.write_text(json.dumps(content))
    one = the(found_in(config_of(source, task=DetectionConfig(num_classes=91))), "label_space")
    assert "labels count the categories from 0 on" in one.what


def test_captions():
    captions = ["a b c d e f g h i j k l m n o p q", "12.5", "IMG_2034.JPG", "<b>a</b> cat", *("same text",) * 4]
    found = found_in(config_of(pairs(*captions), task=ContrastiveConfig(), model=CLIP))
    for name, text in (
        ("cut", captions[0]),
        ("wordless", "12.5"),
        ("file_names", captions[2]),
        ("markup", captions[3]),
    ):
        assert the(found, name).severity == "warning"
        assert the(found, name).examples == (text,)
    assert the(found, "frequent_captions").examples == ("4 times: same text",)
    found = found_in(config_of(pairs(*("dsc_0001", "a.jpg") * 3), task=ContrastiveConfig(), model=CLIP))
    assert the(found, "file_names").severity == the(found, "frequent_captions").severity == "error"


def test_evaluation_images_in_the_training_data(folder, monkeypatch):
    shutil.copy(folder / "train/cat/0.png", folder / "val/cat/0.png")
    near = Image.open(folder / "train/dog/1.png").resize((48, 48), Image.Resampling.BICUBIC)
    (folder / "val/dog/1.png").write_bytes(encoded(near, "JPEG", quality=60))
    found = found_in(of_folder(folder))
    assert the(found, "trained_on").examples == ("cat/0.png",)
    assert the(found, "trained_on").severity == "error"
    assert the(found, "near_trained_on").examples == ("dog/1.png | dog/1.png",)
    config = of_folder(folder)
    config.evals[0].source.split = "train"
    assert the(found_in(config), "trained_on").what == "evaluates on the training data"
    records = tuple({"image": png(i), "label": i % 2} for i in range(4))
    monkeypatch.setattr(RecordsConfig, "kind", "tfds")
    config = config_of(RecordsConfig(records=records, num_classes=2, split="train[:80%]"))
    config.evals = (AccuracyConfig(source=dataclasses.replace(config.data.train[0], split="train[60%:]")),)
    assert the(found_in(config), "trained_on").number == 4


def test_a_machine_that_is_too_slow_or_too_full(tmp_path):
    config = of_folder(tmp_path)
    config.workdir = str(tmp_path / "run")
    cluster = find_cluster("h100:2x8")
    study = Study(config, [], rate=(100.0, 4), cluster=cluster, flops=16 * 989.5e12 * 4 / 400, parameters=10**15)
    found = findings(study)
    assert "takes 200 a host" in the(found, "throughput").what  # 400 images/s on two hosts
    assert the(found, "throughput").severity == "note"
    assert the(found, "disk").severity == "error"
    study.rate, study.parameters = (50.0, 4), 10
    found = findings(study)
    assert the(found, "throughput").severity == "warning"
    assert "8 such cores" in the(found, "throughput").what
    assert "disk" not in names(found)


def test_a_sample_is_one_record_of_each_part_and_always_the_same():
    chosen = survey.choose(1_000, 100)
    np.testing.assert_array_equal(chosen // 10, np.arange(100))
    np.testing.assert_array_equal(chosen, survey.choose(1_000, 100))
    assert len(set(chosen % 10)) > 3  # no rhythm of the records can hide a class
    np.testing.assert_array_equal(survey.choose(7, 0), np.arange(7))
    np.testing.assert_array_equal(survey.choose(7, 9), np.arange(7))


def test_a_reader_travels_and_its_chunks_add_up():
    config = config_of(BundledConfig(path="digits", split="test"), task=ClassificationConfig(num_classes=10))
    study = Study(config, doctor._parts(config))
    part = study.parts[0]
    doctor._open(part)
    doctor._agree(study)
    reader = survey.Reader(part.source, doctor.Chain((), 32), study.fields, None)
    one = survey.survey(reader, 300, Here(), "digits")
    two = pickle.loads(pickle.dumps(reader))(survey.choose(1000, 300))
    np.testing.assert_array_equal(one.rows, two.rows)
    assert one.classes == two.classes
    assert sum(one.classes.values()) == 300


def test_a_page_shows_objects_masks_and_captions_and_stands_for_data_that_cannot_be_read(tmp_path):
    box = (0, 0, 16, 16)
    objects = {"image": png(0), "caption": ("a <cat>", "b")} | boxed(box, masks=True)
    objects |= {"class_map": np.eye(32, dtype=np.int64)}
    config = config_of(
        RecordsConfig(records=(objects,), num_classes=2),
        RecordsConfig(path="damaged", records=({"image": b"none"} | boxed(box),), num_classes=2),
        task=DetectionConfig(num_classes=2),
    )
    study = doctor.examine(config, engine=Here())
    doctor.write(study, findings(study), tmp_path)
    page = (tmp_path / "doctor.html").read_text()
    assert page.count("data:image/jpeg") == 2
    assert "a &lt;cat&gt; | b" in page
    assert "1 objects: 0" in page
    assert "records damaged" in page
    found = json.loads((tmp_path / "doctor.json").read_text())["findings"]
    assert found[0]["severity"] == "error"
    drawn = doctor_page.drawn(np.zeros((32, 32, 3), np.uint8), boxed(box, masks=False), Records(config.data.train[0]))
    assert drawn[0, : 16 * 7].any(1).all()  # 224 / 32 times as large
    assert not drawn[2:-2, 16 * 7 + 2 :].any()


def test_digits_are_no_copies_of_others_though_their_hashes_are_near():
    rows = []
    for split, count in (("test", 300), ("train", 600)):
        source = BundledSource(BundledConfig(path="digits", split=split))
        read = survey.survey(survey.Reader(source, Chain((), 28, 2**20), None, None), count, Here(), "test")
        rows.append(read.rows)
    assert (Among(rows[1]).nearest(rows[0]) >= 0).sum() > 10  # by signatures alone
    assert len(survey.near_copies(*rows)) <= 1


def test_a_page_stands_for_a_dataset_that_cannot_be_opened(tmp_path):
    config = config_of(FolderConfig(path=str(tmp_path / "nowhere")), task=ClassificationConfig(num_classes=2))
    study = doctor.examine(config, engine=Here())
    doctor.write(study, findings(study), tmp_path)
    assert "cannot be opened" in (tmp_path / "doctor.html").read_text()
