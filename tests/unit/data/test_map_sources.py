"""Images with a class for each pixel: ADE20K's folders and others, and maps that cannot serve."""

import io
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from absl import logging
from caption_sets import write_json, write_pictures
from PIL import Image

from visionfm_jax.data.chain import Chain
from visionfm_jax.data.images import DamagedImage
from visionfm_jax.data.sources import open_source
from visionfm_jax.data.sources.kinds import Ade20kConfig, ClassMapsConfig, CocoPanopticConfig, VocConfig
from visionfm_jax.data.sources.record import DamagedRecord
from visionfm_jax.data.transforms import Flip, RandomCrop, Resize
from visionfm_jax.errors import DataError


def png(values: np.ndarray, kind: str = "PNG", **more) -> bytes:
    file = io.BytesIO()
    image = Image.fromarray(values)
    if more.get("palette"):
        image.putpalette(list(range(256)) * 3)
    image.save(file, kind)
    return file.getvalue()


def ade(folder: Path, maps: list[bytes], split: str = "training") -> Path:
    write_pictures(folder / "images" / split, {f"ADE_{i}.jpg": i for i in range(len(maps))})
    (folder / "annotations" / split).mkdir(parents=True)
    for i, content in enumerate(maps):
        (folder / f"annotations/{split}/ADE_{i}.png").write_bytes(content)
    return folder


def counted() -> np.ndarray:
    return (np.arange(64 * 64).reshape(64, 64) % 151).astype(np.uint8)


def test_ade20k(tmp_path, caplog):
    logging.use_python_logging(quiet=True)
    values = counted()
    folder = ade(tmp_path, [png(values), png(values, palette=True)])
    (folder / "images/training/alone.jpg").write_bytes(b"")
    (folder / "annotations/training/alone_too.png").write_bytes(b"")
    source = open_source(Ade20kConfig(path=str(folder)))
    assert (len(source), source.num_classes, source.class_names) == (2, 150, None)
    for i in range(2):
        found = source[i]["class_map"]
        assert found.dtype == np.uint8
        np.testing.assert_array_equal(found, np.where(values == 0, 255, values.astype(int) - 1))
    assert [r.message.partition("left out: ")[2] for r in caplog.records if "left out" in r.message] == [
        "1 images without a map: alone.jpg", "1 maps without an image: alone_too.png",
    ]  # fmt: skip
    (folder / "objectInfo150.txt").write_text(
        "Idx\tRatio\tTrain\tVal\tStuff\tName\n" + "".join(f"{i}\t0\t1\t1\t1\tname {i}, other\n" for i in range(1, 151))
    )
    assert open_source(Ade20kConfig(path=str(folder))).class_names[:2] == ("name 1, other", "name 2, other")
    with pytest.raises(DataError, match=r"found ADE20K; use Ade20kConfig"):
        open_source(VocConfig(path=str(folder)))


def test_a_map_follows_its_image(tmp_path):
    values = np.zeros((64, 64), np.uint8)
    values[:, :16] = 3
    source = open_source(Ade20kConfig(path=str(ade(tmp_path, [png(values)]))))
    chain = Chain((Resize(to="longer", scale=(0.5, 0.5)), Flip(chance=1.0), RandomCrop()), 64)
    out = chain(source[0], np.random.default_rng(0))["class_map"]
    assert (out[:32, 24:32] == 2).all()
    assert (np.delete(out, range(24, 32), 1) == 255).all()


def test_other_folders_of_maps(tmp_path):
    """As Cityscapes has them, with 300 classes in 16 bits."""
    write_pictures(tmp_path / "left/val/ulm", {"a_left.png": 0})
    values = np.full((64, 64), 299, np.uint16)
    values[0], values[1] = 65_535, 0
    (tmp_path / "fine/val/ulm").mkdir(parents=True)
    (tmp_path / "fine/val/ulm/a_fine.png").write_bytes(png(values))
    (tmp_path / "names.txt").write_text("".join(f"class {i}\n" for i in range(300)))
    config = ClassMapsConfig(
        path=str(tmp_path), split="val", images="left/{split}", maps="fine/{split}", image_suffix="_left.png",
        map_suffix="_fine.png", names="names.txt", ignore=(65_535,),
    )  # fmt: skip
    source = open_source(config)
    assert (source.num_classes, source.class_names[299], source.key(0)) == (300, "class 299", "ulm/a_left.png")
    found = source[0]["class_map"]
    assert (found.dtype, found[0, 0], found[1, 0], found[2, 0]) == (np.uint16, 65_535, 0, 299)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (png(np.zeros((64, 64, 3), np.uint8)), "channels RGB, and must have one.*instances"),
        (png(np.full((64, 64), 200, np.uint8)), "value 200, which is neither one of 150 classes nor of ignore"),
        (png(np.zeros((64, 64), np.uint8), "JPEG"), "none of PNG, BMP, TIFF"),
        (b"", "none of PNG"),
        (png(counted())[:150], "."),
    ],
)
def test_maps_that_cannot_serve(tmp_path, content, words):
    folder = ade(tmp_path, [png(counted()), content])
    with pytest.raises((DamagedImage, DamagedRecord), match=words):
        open_source(Ade20kConfig(path=str(folder)))[1]
    (folder / "images/training/ADE_0.jpg").unlink()
    with pytest.raises(DataError, match=words) as error:  # a few are looked at when the set is opened
        open_source(Ade20kConfig(path=str(folder)))
    assert "ADE_1.png" in str(error.value)


def test_one_damaged_map_does_not_refuse_the_others(tmp_path):
    source = open_source(Ade20kConfig(path=str(ade(tmp_path, [b"", png(counted())]))))
    with pytest.raises(DamagedImage):
        source[0]
    assert source[1]["class_map"].shape == (64, 64)


def test_a_map_of_another_size_is_damaged(tmp_path):
    source = open_source(Ade20kConfig(path=str(ade(tmp_path, [png(np.ones((60, 64), np.uint8))]))))
    with pytest.raises(DamagedRecord, match="class_map have 60 x 64 pixels, its image 64 x 64"):
        Chain((), 64)(source[0], np.random.default_rng(0))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_classes": 0, "names": ""}, "set num_classes, or names"),
        ({"names": "lost.txt"}, "lost.txt is missing; set names"),
        ({"ignore": (5,)}, r"ignore = \(5,\) has values of classes"),
        ({"first": 65_530}, r"num_classes = 150 from first = 65530 on, .* values to 65,535; set"),
        ({"split": "test"}, "no split 'test'; the splits are training"),
        ({"maps": "masks/{split}"}, "expected PATH/images/training and PATH/masks/training, found ADE20K"),
    ],
)
def test_settings_that_do_not_fit(tmp_path, change, words):
    folder = ade(tmp_path, [png(counted())])
    with pytest.raises(DataError, match=words):
        open_source(Ade20kConfig(path=str(folder), **change))


def test_coco_panoptic(tmp_path, caplog):
    logging.use_python_logging(quiet=True)
    numbers = np.zeros((64, 64), np.int64)
    numbers[:8], numbers[8:16], numbers[16:24, :4] = 70_000, 300, 5
    png_of = np.stack([numbers % 256, numbers // 256 % 256, numbers // 65_536], -1).astype(np.uint8)
    (tmp_path / "annotations/panoptic_val").mkdir(parents=True)
    (tmp_path / "annotations/panoptic_val/0.png").write_bytes(png(png_of))
    segments = [(300, 9, [0, 8, 64, 8], 0), (70_000, 2, [0, 0, 64, 8], 1), (5, 77, [0, 16, 4, 8], 0)]
    segments += [(0, 9, [0, 0, 64, 64], 0), (2**24, 9, [0, 0, 64, 64], 0), (2**40, 9, [0, 0, 64, 64], 0)]
    info = [{"id": i, "category_id": c, "bbox": box, "iscrowd": crowd} for i, c, box, crowd in segments]
    content = {
        "images": [{"id": 4, "file_name": "0.jpg", "height": 64, "width": 64}],
        "annotations": [{"image_id": 4, "file_name": "0.png", "segments_info": info}],
        "categories": [{"id": 9, "name": "sky", "isthing": "0"}, {"id": 2, "name": "car", "isthing": True}],
    }
    write_json(tmp_path / "annotations/panoptic_val.json", content)
    write_pictures(tmp_path / "val", {"0.jpg": 0})
    source = open_source(CocoPanopticConfig(path=str(tmp_path), split="val"))
    assert "left out: 3 segments whose id is no colour" in caplog.text
    classes = source[0]["class_map"]
    assert (source.class_names, source.category_ids, source.things) == (("car", "sky"), (2, 9), (True, False))
    np.testing.assert_array_equal(classes, np.where(numbers == 300, 1, np.where(numbers == 70_000, 0, 255)))
    record = open_source(CocoPanopticConfig(path=str(tmp_path), split="val", truth="masks"))[0]
    np.testing.assert_array_equal(record["masks"], [numbers == 300, numbers == 70_000])
    assert record["boxes"].tolist() == [[0, 8, 64, 16], [0, 0, 64, 8]]
    assert (record["box_labels"].tolist(), record["box_crowd"].tolist()) == ([1, 0], [False, True])
    assert "maps from 0 on" in source.fingerprint()
    content["annotations"] = []
    write_json(tmp_path / "annotations/panoptic_val.json", content)
    with pytest.raises(DataError, match=r"1 images have no map, the first is 0.jpg"):
        open_source(CocoPanopticConfig(path=str(tmp_path), split="val"))


PANOPTIC = np.repeat(np.array([1, 300], np.int64), 32)[:, None].repeat(64, 1)  # the upper half is segment 1


def panoptic(
    folder: Path, change: Callable[[dict], object] = lambda content: None, pixels: np.ndarray = PANOPTIC
) -> Path:
    colours = np.stack([pixels % 256, pixels // 256 % 256, pixels // 65_536], -1).astype(np.uint8)
    (folder / "annotations/panoptic_val").mkdir(parents=True)
    (folder / "annotations/panoptic_val/0.png").write_bytes(png(colours))
    segments = [{"id": i, "category_id": 9, "bbox": [0, 0, 64, 64]} for i in (1, 300)]
    content = {
        "images": [{"id": 4, "file_name": "0.jpg", "height": 64, "width": 64}],
        "annotations": [{"image_id": 4, "file_name": "0.png", "segments_info": segments}],
        "categories": [{"id": 9, "name": "sky"}],
    }
    change(content)
    write_json(folder / "annotations/panoptic_val.json", content)
    write_pictures(folder / "val", {"0.jpg": 0})
    return folder


def named(name: object) -> Callable[[dict], object]:
    return lambda content: content["annotations"][0].update(file_name=name)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (named("1.png"), "1 of 1 maps are missing, the first is .*1.png; unpack the maps there"),
        (named("a\nb"), r"1 of 1 maps are missing, .*a\\nb"),
        (named("\ud800.png"), "1 of 1 maps are missing"),
        (named(""), "1 of 1 maps are missing"),
        (lambda c: c["annotations"].append(c["annotations"][0]), "'0.png' is a second map of an image"),
        (lambda c: c["annotations"][0].update(segments_info={}), "segments of '0.png' that are no list"),
        (lambda c: c["annotations"][0]["segments_info"][0].update(id=math.inf), "another layout"),
    ],
)
def test_panoptic_files_that_cannot_serve(tmp_path, change, words):
    with pytest.raises(DataError, match=words) as error:
        open_source(CocoPanopticConfig(path=str(panoptic(tmp_path, change)), split="val"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("truth", ["class_map", "masks"])
def test_a_panoptic_map_of_other_segments_is_damaged(tmp_path, truth):
    source = open_source(
        CocoPanopticConfig(path=str(panoptic(tmp_path, pixels=PANOPTIC + 7)), split="val", truth=truth)
    )
    with pytest.raises(DamagedRecord, match="no pixel of its map has the colour of a segment"):
        source[0]


def test_a_panoptic_map_that_may_have_lost_colours_is_damaged(tmp_path):
    folder = panoptic(tmp_path)
    (folder / "annotations/panoptic_val/0.png").write_bytes(png(np.zeros((64, 64, 3), np.uint8), "WEBP"))
    with pytest.raises(DamagedRecord, match="its map is no PNG"):
        open_source(CocoPanopticConfig(path=str(folder), split="val"))[0]


def test_panoptic_segments_of_one_number(tmp_path, caplog):
    logging.use_python_logging(quiet=True)
    folder = panoptic(tmp_path, lambda c: c["annotations"][0]["segments_info"][0].update(id=300))
    assert len(open_source(CocoPanopticConfig(path=str(folder), split="val", truth="masks"))[0]["masks"]) == 1
    assert any("1 segments whose id another of the map has: segment 300 of 0.png" in r.message for r in caplog.records)
