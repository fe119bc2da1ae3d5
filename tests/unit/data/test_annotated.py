"""Objects of COCO, Pascal VOC, YOLO and TFDS: what records hold, what is left out and counted, what is refused."""

import io
import json
import math
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from absl import logging
from caption_sets import write_json, write_pictures
from PIL import ExifTags, Image
from pycocotools import mask as oracle
from tar_sets import picture

from visionfm_jax.data.chain import Chain
from visionfm_jax.data.fields import Labels, Objects
from visionfm_jax.data.images import UPRIGHT, DamagedImage
from visionfm_jax.data.sources import open_source, outlines
from visionfm_jax.data.sources.kinds import (
    BundledConfig,
    CocoConfig,
    TfdsConfig,
    VocConfig,
    YoloConfig,
)
from visionfm_jax.data.sources.record import DamagedRecord
from visionfm_jax.data.transforms import Resize
from visionfm_jax.errors import DataError

COCO = "annotations/instances_val.json"
TRIANGLE = [[10.3, 5.1, 40.5, 20.7, 12.9, 50.2]]
SQUARE = {"size": [64, 64], "counts": [64 * 8 + 8, 16, 48, 16, 64 * 54 + 8 - 16 + 8]}


def note(number: int, image: int, category: int = 7, box=(4, 6, 20, 10), **more) -> dict:
    return {"id": number, "image_id": image, "category_id": category, "bbox": list(box), **more}


def coco(folder: Path, notes: list, pictures: int = 3, **change) -> Path:
    """Picture i has id 10 i; categories are 7 (dog), 3 (cat) and 90 (bird)."""
    images = [{"id": 10 * i, "file_name": f"{i}.jpg", "height": 64, "width": 64} for i in range(pictures)]
    categories = [{"id": i, "name": n} for i, n in ((7, "dog"), (3, "cat"), (90, "bird"))]
    write_json(folder / COCO, {"images": images, "annotations": notes, "categories": categories} | change)
    write_pictures(folder / "val", {image["file_name"]: i for i, image in enumerate(images)})
    return folder


def opened(path: Path, **more):
    return open_source(CocoConfig(path=str(path), split="val", **more))


def error_of(config) -> str:
    with pytest.raises(DataError) as error:
        open_source(config)
    assert "\n" not in str(error.value)
    return str(error.value)


def left_out(caplog) -> list[str]:
    return [r.message.partition("left out: ")[2] for r in caplog.records if "left out" in r.message]


def test_coco_objects(tmp_path):
    crowd = note(3, 0, 90, (0, 0, 64, 64), iscrowd=1, area=99.5)
    source = opened(coco(tmp_path, [note(1, 20, 3), note(2, 0, 7, area=50), crowd]))
    assert (source.class_names, source.num_classes, source.category_ids) == (("cat", "dog", "bird"), 3, (3, 7, 90))
    first, none, last = (source[i] for i in range(3))
    assert first["image"] == picture(0)
    assert first["boxes"].tolist() == [[4, 6, 24, 16], [0, 0, 64, 64]]
    assert [first[f"box_{k}"].tolist() for k in ("labels", "crowd", "areas")] == [[1, 2], [False, True], [50, 99.5]]
    assert none["boxes"].shape == (0, 4)
    assert (last["box_labels"].tolist(), last["box_areas"].tolist()) == ([0], [200])
    row = Objects(3, 2)(Chain((), 32)(first, np.random.default_rng(0)))
    assert (row["objects"], row["boxes"].tolist()) == (1, [[2, 3, 12, 8], [0, 0, 0, 0]])
    assert Objects(3, 2)(Chain((), 32)(none, np.random.default_rng(0)))["objects"] == 0
    copy = pickle.loads(pickle.dumps(source))
    assert copy.fingerprint() == source.fingerprint()
    assert copy[0]["box_areas"].tolist() == [50, 99.5]
    assert source.key(2) == "2.jpg"


def test_coco_left_out_and_counted(tmp_path, caplog):
    logging.use_python_logging(quiet=True)
    bad = [(4, 6, -20, 10), (4, 6, 0, 10), (float("nan"), 0, 5, 5), (64, 0, 5, 5), (1, 2, 3), "box", None]
    notes = [note(i, 0, box=box) if box else note(i, 0) | {"bbox": None} for i, box in enumerate(bad)]
    folder = coco(tmp_path, [*notes, note(7, 5), note(8, 0, 8), note(9, 10, box=(60, 60, 100, 100))])
    write_pictures(folder / "val", {"extra.jpg": 9})
    source = opened(folder)
    assert len(source[0]["boxes"]) == 0
    assert left_out(caplog) == [
        "2 objects whose box is empty or inverted: annotation 0, annotation 1",
        "1 objects whose box is not finite: annotation 2",
        "1 objects whose box lies outside the image: annotation 3",
        "3 objects whose box is not four numbers: annotation 4, annotation 5, annotation 6",
        "1 objects of images that are not listed: annotation 7",
        "1 objects of unknown categories: annotation 8 (category 8)",
        "1 images that the annotations do not list: extra.jpg",
    ]
    cut = Chain((), 64)(source[1], np.random.default_rng(0))
    assert cut["boxes"].tolist() == [[60, 60, 64, 64]]


def test_coco_masks_equal_pycocotools(tmp_path):
    draw, shapes = np.random.default_rng(0), []
    for _ in range(40):
        points = draw.integers(3, 12)
        polygons = [np.round(draw.uniform(-8, 72, 2 * points), 2).tolist() for _ in range(draw.integers(1, 3))]
        shapes.append((polygons, oracle.merge(oracle.frPyObjects(polygons, 64, 64))))
    for _ in range(20):
        packed = oracle.encode(
            np.asfortranarray(draw.random((64, 64)) < draw.choice([0, 0.01, 0.5, 1])).astype(np.uint8)
        )
        shapes.append((packed | {"counts": packed["counts"].decode()}, packed))
        runs = outlines.unpack(packed["counts"].decode())
        shapes.append(
            ({"size": [64, 64], "counts": runs}, oracle.frPyObjects({"size": [64, 64], "counts": runs}, 64, 64))
        )
    notes = [note(i, 0, segmentation=outline) for i, (outline, _) in enumerate(shapes)]
    record = opened(coco(tmp_path, [*notes, note(999, 10)]), masks=True)[0]
    assert record["masks"].shape == (80, 64, 64)
    np.testing.assert_array_equal(record["masks"], [oracle.decode(mask) for _, mask in shapes])
    assert "masks" not in opened(tmp_path)[0]


@pytest.mark.parametrize(
    ("outline", "words"),
    [
        ({"size": [32, 64], "counts": [2048]}, r"size \[32, 64\], and its image 64 x 64"),
        ({"size": [64, 64], "counts": [5]}, "runs of 5 pixels together, and its image 64 x 64"),
        ({"size": [64, 64], "counts": [-5, 4101]}, "must have numbers of pixels"),
        ({"size": [64, 64], "counts": "~~~"}, "packed runs .* which are none"),
        ({"size": [64, 64], "counts": "o"}, "end within a number"),
        ([[0, 0, 5, 0, float("nan"), 5]], "must be x, y of three points"),
        ([[0, 0, 5, 0, "a", 5]], "must be x, y of three points"),
        ([[0, 0, 1e12, 0, 5, 5]], "reaches far beyond its image"),
        ([[0, 0, 10**400, 0, 5, 5]], "must be x, y of three points"),
        ([[0, 0, 1e308, 0, -1e308, 5]], "reaches far beyond its image"),
        (3, "must be polygons or runs"),
    ],
)
def test_coco_masks_that_are_none(tmp_path, outline, words):
    source = opened(coco(tmp_path, [note(0, 0, segmentation=outline)]), masks=True)
    with pytest.raises(DamagedRecord, match=words):
        source[0]


def test_more_masks_than_memory(tmp_path, monkeypatch):
    source = opened(coco(tmp_path, [note(i, 0, segmentation=TRIANGLE) for i in range(3)]), masks=True)
    monkeypatch.setattr(outlines, "MAX_BYTES", 2 * 64 * 64)
    with pytest.raises(DamagedRecord, match="3 masks of 64 x 64 pixels take more than 8,192 bytes"):
        source[0]


def test_coco_objects_without_a_mask_are_left_out_where_masks_are_asked_for(tmp_path, caplog):
    logging.use_python_logging(quiet=True)
    notes = [note(0, 0), note(1, 0, segmentation=[]), note(2, 0, segmentation=[[1, 2, 3, 4]]),
             note(3, 0, segmentation=[[1, 2, 3, 4], *TRIANGLE])]  # fmt: skip
    source = opened(coco(tmp_path, notes), masks=True)
    assert len(source[0]["masks"]) == len(source[0]["boxes"]) == 1
    assert source[1]["masks"].shape == (0, 64, 64)
    assert left_out(caplog) == [
        "3 objects without a mask: annotation 0, annotation 1, annotation 2",
        "1 objects of which polygons of fewer than three points are left out: annotation 3",
    ]


@pytest.mark.parametrize("crowd", [1, 2, True, "1", 0, False, None])
def test_a_crowd_is_what_is_true(tmp_path, crowd):
    """As pycocotools has it."""
    assert opened(coco(tmp_path, [note(0, 0, iscrowd=crowd)]))[0]["box_crowd"].tolist() == [bool(crowd)]


def test_objects_of_none_but_unknown_classes_are_refused(tmp_path):
    path = coco(tmp_path / "coco", [note(0, 0, 99), note(1, 10, 98)])
    assert "no object can be used, and 2 are objects of unknown categories, such as annotation 0" in error_of(
        CocoConfig(path=str(path), split="val")
    )
    assert "1 are objects of unknown classes" in error_of(
        YoloConfig(path=str(yolo(tmp_path / "yolo", {"a": "7 .5 .5 1 1"})))
    )


def test_stated_sizes_are_part_of_the_fingerprint(tmp_path):
    path = coco(tmp_path, [note(0, 0)])
    before = opened(path).fingerprint()
    file = path / COCO
    content = json.loads(file.read_text())
    content["images"][0]["height"] = 60
    file.write_text(json.dumps(content))
    assert opened(path).fingerprint() != before


@pytest.mark.parametrize(
    ("box", "reason"),
    [
        ("1234", "is not four numbers"),  # read as the text that 1 and 3 are together
        (["1", "2", "3", "4"], "is not four numbers"),
        ({"1": 1, "2": 2, "3": 3, "4": 4}, "is not four numbers"),
        ([10**400, 0.5, 0.5, 5], "is not four numbers"),
        ([0, 0, 1e308, 1e308], "reaches far beyond the image"),
        ([-1e200, -1e200, 2e200, 2e200], "reaches far beyond the image"),
    ],
)
def test_coco_boxes_that_are_none(tmp_path, caplog, box, reason):
    logging.use_python_logging(quiet=True)
    source = opened(coco(tmp_path, [note(0, 0) | {"bbox": box}]))
    assert len(source[0]["boxes"]) == 0
    assert left_out(caplog) == [f"1 objects whose box {reason}: annotation 0"]


def test_coco_numbers_without_end(tmp_path):
    image = {"id": 0, "file_name": "0.jpg", "height": 10**30, "width": 2**63}  # are not known
    source = opened(coco(tmp_path, [note(0, 0, area=10**400)], 1, images=[image]))
    assert source[0]["box_areas"].tolist() == [200]


def test_coco_of_another_size_than_its_images(tmp_path):
    image = {"id": 0, "file_name": "0.jpg", "height": 60, "width": 64}
    source = opened(coco(tmp_path, [note(0, 0)], 1, images=[image]))
    with pytest.raises(DamagedRecord, match="annotations are for 60 x 64 pixels, and the file has 64 x 64"):
        source[0]
    (tmp_path / "val/0.jpg").write_bytes(b"none")
    with pytest.raises(DamagedImage):
        source[0]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"images": None}, "another layout"),
        ({"categories": []}, "no category, or ids .* not unique"),
        ({"categories": [{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]}, "not unique"),
        ({"categories": [{"id": math.inf, "name": "a"}]}, "another layout"),
        ({"categories": [{"id": 7.9, "name": "a"}]}, "the id 7.9 of a category, which must be a whole number"),
        ({"annotations": {}}, "annotations that are no list"),
        ({"images": [{"id": 0, "file_name": "a\nb.jpg"}]}, r"the first is .*a\\nb.jpg"),
        ({"annotations": [{"id": 1, "bbox": [0, 0, 1, 1]}]}, "lacks 'image_id'; it needs images with id"),
        ({"annotations": [note(1, 0, [3])]}, "another layout"),
        ({"images": [{"id": 0, "file_name": "../0.jpg"}]}, "no file of this folder"),
        (
            {"images": [{"id": 0, "file_name": "lost.jpg"}]},
            "1 of 1 images are missing, the first is .*lost.jpg; unpack",
        ),
    ],
)
def test_coco_files_that_cannot_serve(tmp_path, change, words):
    coco(tmp_path, [], 1, **change)
    assert re.search(words, error_of(CocoConfig(path=str(tmp_path), split="val")))


def test_files_with_a_byte_order_mark(tmp_path):
    """As Windows' editors write them."""
    mark = b"\xef\xbb\xbf"
    coco(tmp_path, [note(0, 0)])
    folder = yolo(tmp_path / "yolo", {"a": "1 .5 .5 1 1"})
    for path in (tmp_path / COCO, folder / "data.yaml", folder / "labels/train/a.txt"):
        path.write_bytes(mark + path.read_bytes())
    assert opened(tmp_path)[0]["boxes"].tolist() == [[4, 6, 24, 16]]
    assert open_source(YoloConfig(path=str(folder)))[0]["box_labels"].tolist() == [1]


def test_a_stated_size_that_is_no_number_counts_as_unknown(tmp_path):
    coco(tmp_path, [note(0, 0)], 1, images=[{"id": 0, "file_name": "0.jpg", "height": True, "width": True}])
    assert opened(tmp_path)[0]["boxes"].tolist() == [[4, 6, 24, 16]]


def test_coco_elsewhere_and_other_splits(tmp_path):
    coco(tmp_path, [note(0, 0)])
    assert "no split 'train'; the splits are val" in error_of(CocoConfig(path=str(tmp_path), split="train"))
    assert "found COCO's objects; use CocoConfig" in error_of(VocConfig(path=str(tmp_path)))
    (tmp_path / COCO).rename(tmp_path / "val/_annotations.coco.json")
    config = CocoConfig(path=str(tmp_path), split="val", annotations="{split}/_annotations.coco.json")
    assert len(open_source(config)) == 3
    error = error_of(CocoConfig(path=str(tmp_path), split="val"))
    assert "expected PATH/annotations/instances_val.json, found JSON files of annotations; use CocoConfig (by" in error
    assert error.endswith("such as annotations='val/_annotations.coco.json'")


def test_folders_that_another_kind_reads(tmp_path):
    write_pictures(tmp_path / "images/val", {"0.jpg": 0})
    (tmp_path / "annotations/val").mkdir(parents=True)
    assert "found images and annotations; use ClassMapsConfig" in error_of(CocoConfig(path=str(tmp_path), split="val"))
    write_json(tmp_path / "annotations/panoptic_val.json", {})
    assert "found COCO's segments; use CocoPanopticConfig" in error_of(CocoConfig(path=str(tmp_path), split="val"))


@pytest.mark.parametrize(
    ("config", "fields"),
    [
        (CocoConfig(path="coco", split="val", annotations="notes.json"), "annotations, images"),
        (YoloConfig(path="yolo", file="dataset.yaml"), "file"),
    ],
)
def test_files_of_other_names_than_the_configured(tmp_path, monkeypatch, config, fields):
    monkeypatch.chdir(tmp_path)
    coco(tmp_path / "coco", [note(0, 0)])
    yolo(tmp_path / "yolo", {"a": ""})
    assert error_of(config).endswith(f"; set the names of files and folders to those that are there ({fields})")


def test_objects_and_labels_are_told_apart(tmp_path):
    source = opened(coco(tmp_path, [note(0, 0)]))
    Objects(3, 9).check(source)
    with pytest.raises(DataError, match=r"labels up to 2, but config.task.num_classes = 2; set it to 3"):
        Objects(2, 9).check(source)
    with pytest.raises(
        DataError,
        match=r"no labels of images \(label\), .* but box_labels; set another source",
    ):
        Labels(3).check(source)


VOC = """<annotation><filename>{name}.jpg</filename><size><width>64</width><height>64</height><depth>3</depth></size>
{objects}</annotation>"""
ONE = """<object><name>{name}</name><difficult>{difficult}</difficult><bndbox><xmin>{0}</xmin><ymin>{1}</ymin>
<xmax>{2}</xmax><ymax>{3}</ymax></bndbox><part><name>head</name><bndbox><xmin>1</xmin></bndbox></part></object>"""


def voc(folder: Path, objects: dict[str, str]) -> Path:
    for name, content in objects.items():
        path = folder / f"Annotations/{name}.xml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if content.startswith("<?") else VOC.format(name=name, objects=content))
    write_pictures(folder / "JPEGImages", {f"{name}.jpg": i for i, name in enumerate(objects)})
    (folder / "ImageSets/Main").mkdir(parents=True)
    (folder / "ImageSets/Main/train.txt").write_text("".join(f"{n}\n" for n in list(objects)[:2]))
    return folder


def test_voc_objects(tmp_path, caplog):
    logging.use_python_logging(quiet=True)
    a = ONE.format(1, 1, 64, 64, name="dog", difficult=0) + ONE.format(5, 6, 9, 10, name="cat", difficult=1)
    bad = "".join(ONE.format(*box, name="dog", difficult=0) for box in ((9, 9, 3, 3), ("x", 1, 2, 3), (1, 1, "inf", 2)))
    folder = voc(tmp_path, {"a": a, "b": bad, "c": ONE.format(1, 1, 2, 2, name="zebra", difficult=0)})
    source = open_source(VocConfig(path=str(folder)))
    assert source.class_names == ("cat", "dog", "zebra")  # of all splits
    assert source[0]["boxes"].tolist() == [[0, 0, 64, 64], [4, 5, 9, 10]]
    assert (source[0]["box_labels"].tolist(), source[0]["box_crowd"].tolist()) == ([1, 0], [False, True])
    assert len(source[1]["boxes"]) == 0
    assert left_out(caplog) == [  # c.jpg is of another split
        "1 objects whose box is empty or inverted: b.xml object 0",
        "1 objects whose box is not four numbers: b.xml object 1",
        "1 objects whose box is not finite: b.xml object 2",
    ]
    assert len(open_source(VocConfig(path=str(folder), split=""))) == 3
    assert "no split 'val'; the splits are train" in error_of(VocConfig(path=str(folder), split="val"))
    (folder / "ImageSets/Main/train.txt").write_bytes(b"\xff\n")
    assert "1 of 1 annotations are missing" in error_of(VocConfig(path=str(folder)))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('<?xml version="1.0"?><!DOCTYPE a [<!ENTITY b SYSTEM "file:///etc/passwd">]><a>&b;</a>', "document type"),
        ('<?xml version="1.0"?><!DOCTYPE a [<!ENTITY b "x"><!ENTITY c "&b;&b;">]><a>&c;</a>', "document type"),
        ('<?xml version="1.0"?>' + "<a>" * 200 + "</a>" * 200, "within more than 100 others"),
        ('<?xml version="1.0"?><a>', "no annotation"),
        ('<?xml version="1.0"?>', "no annotation"),
    ],
)
def test_voc_files_that_attack(tmp_path, content, words):
    message = error_of(VocConfig(path=str(voc(tmp_path, {"a": content}))))
    assert "a.xml is no annotation" in message
    assert words in message


def test_numbers_without_end(tmp_path, caplog):
    logging.use_python_logging(quiet=True)
    size = f"<size><width>{'9' * 5000}</width><height>{'9' * 20}</height></size>"
    far = ONE.format("-1e300", 1, 9, 9, name="dog", difficult=0)
    source = open_source(VocConfig(path=str(voc(tmp_path / "voc", {"a": size + far}))))
    assert len(source[0]["boxes"]) == 0
    folder = yolo(tmp_path / "yolo", {"a": "0 .5 .5 1e308 1e308\n1 .5 .5 1e200 1e200"})
    source = open_source(YoloConfig(path=str(folder)))
    assert len(source[0]["boxes"]) == 0
    assert [line.partition(":")[0] for line in left_out(caplog)] == [
        "1 objects whose box reaches far beyond the image",
        "2 objects whose box reaches far beyond the image",
    ]


def yolo(folder: Path, labels: dict[str, str], yaml: str = "train: images/train\nnames: {0: cat, 1: dog}\n") -> Path:
    write_pictures(folder / "images/train", {f"{name}.jpg": i for i, name in enumerate(labels)})
    (folder / "labels/train").mkdir(parents=True)
    for name, text in labels.items():
        if text:
            (folder / f"labels/train/{name}.txt").write_text(text)
    (folder / "data.yaml").write_text(yaml)
    return folder


def test_yolo_objects(tmp_path, caplog):
    logging.use_python_logging(quiet=True)
    bad = "2 .5 .5 .1 .1\n0 .5 .5 nan .1\n0 .5 .5 0 .1\n0 2 2 .1 .1\n0 .5 .5 .1\na b\n0.5 .5 .5 .1 .1\n\n"
    bad += "0 .1 .1 nan .9 .9 .5"
    folder = yolo(tmp_path, {"a": "1 0.5 0.5 0.5 0.25\n0 .25 .5 .75 .5 .5 1\n", "b": "", "c": bad})
    source = open_source(YoloConfig(path=str(folder)))
    assert (len(source), source.class_names) == (3, ("cat", "dog"))
    assert source[0]["boxes"].tolist() == [[16, 24, 48, 40], [16, 32, 48, 64]]
    assert (source[0]["box_labels"].tolist(), source[0]["box_areas"].tolist()) == ([1, 0], [512, 1024])
    assert len(source[1]["boxes"]) == len(source[2]["boxes"]) == 0
    file = "images/train/c.jpg line"
    assert left_out(caplog) == [
        f"2 objects of unknown classes: {file} 1 (class 2), {file} 7 (class 0.5)",
        f"2 objects whose box is not finite: {file} 2, {file} 9",
        f"1 objects whose box is empty or inverted: {file} 3",
        f"1 objects whose box lies outside the image: {file} 4",
        f"1 lines that are neither a box nor a polygon: {file} 5",
        f"1 lines that are not numbers: {file} 6",
    ]
    assert "no split 'val'; the splits are train" in error_of(YoloConfig(path=str(folder), split="val"))


@pytest.mark.parametrize("orientation", [1, *UPRIGHT])
def test_yolo_boxes_are_of_the_upright_image(tmp_path, orientation):
    """Of a photo that is stored turned or mirrored, as cameras do: its bright corner is where the box is."""
    seen = np.zeros((32, 64, 3), np.uint8)
    seen[:8, 48:] = 255
    swap, flip_rows, flip_columns = UPRIGHT.get(orientation, (False, False, False))
    stored = seen[:: -1 if flip_rows else 1, :: -1 if flip_columns else 1]
    stored = stored.transpose(1, 0, 2) if swap else stored
    folder = yolo(tmp_path, {"a": "0 .875 .125 .25 .25"})
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    Image.fromarray(np.ascontiguousarray(stored)).save(
        folder / "images/train/a.jpg", exif=exif, quality=100, subsampling=0
    )
    found = Chain((Resize(),), (32, 64))(open_source(YoloConfig(path=str(folder)))[0], np.random.default_rng(0))
    np.testing.assert_allclose(found["boxes"], [[48, 0, 64, 8]], atol=1e-4)
    assert found["image"][:8, 48:].min() > 200
    assert found["image"][9:].max() < 50


@pytest.mark.parametrize(
    ("yaml", "words"),
    [
        ("train: ../../etc\nnames: [a]", "names '../../etc' for train, which is no folder or file below the path"),
        ("train: /etc\nnames: [a]", "names '/etc' for train, which is no folder"),
        ("train: images/train\n", "lacks names"),
        ("train: images/train\nnc: 2\nnames: [a]", "data.yaml has 1 names and nc: 2; mend one"),
        ("train: images/train\nnames: {1: a, 5: b}", "lacks names"),
        ("- 3", "no table of names and splits"),
        ("a: [", "is no YAML"),
        ("train: !!python/object/apply:os.system ['true']\nnames: [a]", "is no YAML"),
        ("train: &a [images/train]\nval: *a\nnames: [a]", "it has aliases"),
        ('train: images/train\nnames: [a]\nx: !!int ""', "is no YAML"),
        ("train: images/train\nnames: [a]\nx: !!bool x", "is no YAML"),
        ("train: images/train\nnames: [a]\nx: !!timestamp x", "is no YAML"),
        ("train: images/train/a.jpg\nnames: [a]", "a.jpg is no list of images"),
    ],
)
def test_yolo_files_that_cannot_serve(tmp_path, yaml, words):
    assert words in error_of(YoloConfig(path=str(yolo(tmp_path, {"a": ""}, yaml))))


def test_yolo_lists_of_files(tmp_path):
    folder = yolo(tmp_path, {"a": "0 .5 .5 1 1", "b": ""}, "train: train.txt\nval: ../images\nnames: [cat]\n")
    (folder / "train.txt").write_text("./images/train/b.jpg\nimages/train/a.jpg\n")
    source = open_source(YoloConfig(path=str(folder)))
    assert [source.key(i) for i in range(2)] == ["images/train/b.jpg", "images/train/a.jpg"]
    assert source[1]["boxes"].tolist() == [[0, 0, 64, 64]]
    assert len(open_source(YoloConfig(path=str(folder), split="val"))) == 2


class Boxed(tfds.core.GeneratorBasedBuilder):
    """Two pictures, of which the first has two objects."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        one = {
            "bbox": tfds.features.BBoxFeature(), "label": tfds.features.ClassLabel(names=["cat", "dog"]),
            "is_crowd": np.bool_, "area": np.int64,
        }  # fmt: skip
        features = {"image": tfds.features.Image(), "objects": tfds.features.Sequence(one)}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        box, none = tfds.features.BBox(0.25, 0.5, 0.75, 1.0), []
        first = {"bbox": box, "label": 1, "is_crowd": False, "area": 70}
        for i, objects in enumerate(([first, first | {"is_crowd": True, "label": 0}], none)):
            file = io.BytesIO()
            Image.new("RGB", (64, 32)).save(file, "PNG")
            file.seek(0)
            yield i, {"image": file, "objects": objects}


def test_tfds_objects(tmp_path):
    Boxed(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    source = open_source(TfdsConfig(path=str(tmp_path)))
    first, none = sorted((source[i] for i in range(2)), key=lambda r: -len(r["boxes"]))
    assert first["boxes"].tolist() == [[32, 8, 64, 24]] * 2
    assert [first[f"box_{k}"].tolist() for k in ("labels", "crowd", "areas")] == [[1, 0], [False, True], [70, 70]]
    assert none["boxes"].shape == (0, 4)
    assert (source.class_names, source.num_classes, source.has_captions) == (("cat", "dog"), 2, False)
    Objects(2, 9).check(source)
    with pytest.raises(DataError, match="no feature 'label'"):
        open_source(TfdsConfig(path=str(tmp_path), objects_key=""))


def test_labels_of_images_are_no_objects():
    with pytest.raises(DataError, match=r"no boxes of objects \(box_labels\), which this task learns from, but label"):
        Objects(10, 9).check(open_source(BundledConfig(path="digits")))
