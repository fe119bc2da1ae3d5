"""Attack the readers of objects and class maps: COCO, panoptic, Pascal VOC, YOLO, folders of maps.

    python tools/attack/dense.py --count=3000 --steps=1

Small datasets are changed, first by a list of what hostile and unlucky people do, then at random: values of JSON, text,
bytes of any file, pictures of other kinds. Every changed set is opened and read through transforms to rows, as in
training. It must be refused in one line, or hold damaged records, or be read; whatever it lists is then either among
its records or counted in the log. Never: another exception, a warning of NumPy, a number that is not finite, an object
beyond its image, a label that is no class, a program that a file names, more than `SECONDS` or `MEMORY`. `--steps`
then trains a tiny detector and a tiny segmenter on what could be read. Exit codes: 0 all well · 1 not.
"""

from __future__ import annotations

import argparse
import collections
import io
import json
import logging as standard_logging
import pickle
import random
import re
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import numpy as np
from absl import logging
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from visionfm_jax.config import SourceConfig  # noqa: E402
from visionfm_jax.data.chain import Chain  # noqa: E402
from visionfm_jax.data.fields import ClassMap, Objects  # noqa: E402
from visionfm_jax.data.loader import DAMAGED  # noqa: E402
from visionfm_jax.data.sources import kinds, open_source, read_record  # noqa: E402
from visionfm_jax.data.transforms import Flip, RandomCrop, Resize  # noqa: E402
from visionfm_jax.errors import UserError  # noqa: E402

SIDE, SECONDS, MEMORY = 64, 20, 3 << 30
MOST = 5  # objects of a row
CHAIN = Chain((Resize(to="longer", scale=(0.1, 2.0)), RandomCrop(), Flip()), 32)
HUGE = 10**400

Files = dict[str, bytes]  # of a dataset, by path below its folder
Change = Callable[[Files], None]


class Format(NamedTuple):
    """A dataset of one format.

    Attributes:
      files: of the unchanged set.
      config: of a folder.
      listed: of (folder, source), how many objects its annotations list.
      notes: the file of annotations that is attacked most.
      attacks: name -> what it must come to, a change.
    """

    files: Files
    config: Callable[[str], SourceConfig]
    listed: Callable[[Path, Any], int]
    notes: str
    attacks: dict[str, tuple[str, Change]]


# Pictures.


def encoded(values: np.ndarray, kind: str = "PNG", **more: Any) -> bytes:
    """A picture of that format."""
    file = io.BytesIO()
    Image.fromarray(values).save(file, kind, **more)
    return file.getvalue()


def picture(seed: int, kind: str = "JPEG", side: int = SIDE) -> bytes:
    """Noise."""
    return encoded(np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8), kind)


def palette(values: np.ndarray, colours: list[int]) -> bytes:
    """A PNG with a palette."""
    image, file = Image.fromarray(values), io.BytesIO()
    image.putpalette(colours)
    image.save(file, "PNG")
    return file.getvalue()


def grey_png(values: np.ndarray, bits: int) -> bytes:
    """A grey PNG of 1, 2 or 4 bits, whose samples are `values`."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    each = np.unpackbits(values[..., None], axis=-1)[..., 8 - bits :]
    rows = np.packbits(each.reshape(len(values), -1), axis=1)
    data = b"".join(b"\0" + row.tobytes() for row in rows)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", values.shape[1], values.shape[0], bits, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


# Changes.


def put(name: str, content: bytes | str) -> Change:
    """A file in place of what there was, or beside it."""

    def change(files: Files) -> None:
        files[name] = content.encode() if isinstance(content, str) else content

    return change


def drop(name: str) -> Change:
    """A file is gone."""
    return lambda files: files.pop(name) and None


def both(*changes: Change) -> Change:
    """One after the other."""

    def change(files: Files) -> None:
        for each in changes:
            each(files)

    return change


def cut(name: str) -> Change:
    """Half a file."""

    def change(files: Files) -> None:
        files[name] = files[name][: len(files[name]) // 2]

    return change


def swapped(name: str, old: str, new: str) -> Change:
    """Text in place of other text, which is there."""

    def change(files: Files) -> None:
        assert old.encode() in files[name], old
        files[name] = files[name].replace(old.encode(), new.encode())

    return change


def edit(name: str, how: Callable[[Any], Any]) -> Change:
    """`how` changes the content of a JSON file, or returns another."""

    def change(files: Files) -> None:
        content = json.loads(files[name])
        other = how(content)
        files[name] = json.dumps(content if other is None else other).encode()

    return change


# COCO.

COCO = "annotations/instances_train.json"
POLYGON = [[4, 4, 30, 5, 20, 40]]
RUNS = {"size": [SIDE, SIDE], "counts": [100, 16, SIDE * SIDE - 116]}
CATEGORIES = [{"id": 7, "name": "dog"}, {"id": 3, "name": "cat"}, {"id": 90, "name": "bird"}]


def coco_files() -> Files:
    """Three images of which the last has no object."""
    notes = [
        {"id": i, "image_id": i % 2, "category_id": (7, 3, 90)[i % 3], "bbox": [4, 4, 26, 36], "segmentation": POLYGON}
        for i in range(6)
    ]
    notes.append({"id": 9, "image_id": 1, "category_id": 3, "bbox": [0, 0, 60, 60], "iscrowd": 1, "segmentation": RUNS})
    names = ("0.jpg", "1.png", "2.jpg")
    images = [{"id": i, "file_name": name, "height": SIDE, "width": SIDE} for i, name in enumerate(names)]
    content = {"info": {}, "images": images, "annotations": notes, "categories": CATEGORIES}
    pictures = {f"train/{name}": picture(i, "PNG" if "png" in name else "JPEG") for i, name in enumerate(names)}
    return {COCO: json.dumps(content).encode(), **pictures}


def note(**values: Any) -> Change:
    """The first annotation with other values."""
    return edit(COCO, lambda content: content["annotations"][0].update(values))


def image(**values: Any) -> Change:
    """The first image with other values."""
    return edit(COCO, lambda content: content["images"][0].update(values))


def category(**values: Any) -> Change:
    """The first category with other values."""
    return edit(COCO, lambda content: content["categories"][0].update(values))


def top(**values: Any) -> Change:
    """Other parts of the file."""
    return edit(COCO, lambda content: content.update(values))


def many(count: int) -> Change:
    """One image has so many objects."""
    return edit(COCO, lambda content: content["annotations"].extend([content["annotations"][0]] * count))


def without(part: str, key: str) -> Change:
    """The first of a part lacks a key."""
    return edit(COCO, lambda content: content[part][0].pop(key) and None)


def coco_attacks() -> dict[str, tuple[str, Change]]:
    """Of any COCO file."""
    boxes = {
        "outside": [64, 0, 5, 5], "beyond the left": [-9, 0, 5, 5], "empty": [4, 4, 0, 9], "inverted": [9, 9, -5, 3],
        "NaN": [0, 0, float("nan"), 5], "infinite": [0, 0, float("inf"), 5], "minus infinity": [float("-inf"), 0, 9, 9],
        "of text that are numbers": ["1", "2", "3", "4"], "of one text number": [1, 2, "3", 4], "text": "box",
        "text of four characters": "1234", "of lists": [[1], [2], [3], [4]], "null": None, "of nulls": [None] * 4,
        "of three": [1, 2, 3], "of five": [1, 2, 3, 4, 5], "an object": {"1": 1, "2": 2, "3": 3, "4": 4}, "a number": 5,
        "a huge integer": [0, 0, HUGE, 5], "a huge integer and a fraction": [HUGE, 0.5, 0.5, 5],
        "as large as doubles": [0, 0, 1e308, 1e308], "far beyond": [-1e200, -1e200, 2e200, 2e200],
        "below the resolution": [5, 5, 1e-300, 5],
    }  # fmt: skip
    sizes = {"huge": 10**30, "beyond 64 bits": 2**63, "of another image": 60}
    unknown = {"null": None, "text": "64", "zero": 0, "negative": -64, "NaN": float("nan"), "infinite": float("inf")}
    names = {
        "absolute": "/etc/passwd", "above": "../train/0.jpg", "with NUL": "0\0.jpg", "a surrogate": "\ud800.jpg",
        "empty": "", "a folder": ".", "of 10^5 characters": "a" * 10**5, "of two lines": "a\nb.jpg", "a number": 5,
        "null": None, "that a terminal obeys": "\x1b[2J.jpg",
    }  # fmt: skip
    areas = {"NaN": float("nan"), "infinite": float("inf"), "huge": HUGE, "text": "9", "negative": -3, "null": None}
    return {
        "unchanged": ("read", lambda files: None),
        **{f"box {name}": ("left out", note(bbox=box)) for name, box in boxes.items()},
        "box partly outside": ("read", note(bbox=[-5, 50, 500, 500])),
        "box of fractions": ("read", note(bbox=[0.25, 0.5, 1e-3, 1e-3])),
        **{f"area {name}": ("read", note(area=area)) for name, area in areas.items()},
        "category unknown": ("left out", note(category_id=8)),
        "category null": ("left out", note(category_id=None)),
        "category a text": ("left out", note(category_id="7")),
        "category NaN": ("left out", note(category_id=float("nan"))),
        "category a list": ("refused", note(category_id=[7])),
        "image unknown": ("left out", note(image_id=55)),
        "image null": ("left out", note(image_id=None)),
        "image an object": ("refused", note(image_id={})),
        "crowd as text": ("read", note(iscrowd="1")),
        "crowd null": ("read", note(iscrowd=None)),
        "ids of annotations twice": ("read", note(id=1)),
        "id of an annotation a list": ("read", note(id=[1])),
        "ids of categories twice": ("refused", category(id=3)),
        "ids of images twice": ("refused", image(id=1)),
        "id of a category infinite": ("refused", category(id=float("inf"))),
        "id of a category NaN": ("refused", category(id=float("nan"))),
        "id of a category text": ("refused", category(id="x")),
        "id of a category huge": ("left out", category(id=10**30)),
        "id of an image a list": ("refused", image(id=[0])),
        "id of an image NaN": ("left out", image(id=float("nan"))),
        "names of categories twice": ("read", category(name="cat")),
        "name of a category in another script": ("read", category(name="κύων 🐕 \u202e")),
        "name of a category a surrogate": ("read", category(name="\ud800")),
        "name of a category of 10^5 characters": ("read", category(name="x" * 10**5)),
        "name of a category null": ("read", category(name=None)),
        **{f"height {name}": ("read" if size > 2**31 else "damaged", image(height=size))
        for name, size in sizes.items()},
        **{f"height {name}": ("read", image(height=size)) for name, size in unknown.items()},
        **{f"file name {name}": ("refused", image(file_name=file)) for name, file in names.items()},
        "file name of another image": ("left out", image(file_name="2.jpg")),
        "an image is missing": ("refused", drop("train/0.jpg")),
        "an image that is not listed": ("left out", put("train/9.jpg", b"")),
        **{f"a {part[:-1]} without {key}": ("refused", without(part, key))
           for part, keys in (("annotations", ("image_id", "category_id", "bbox")), ("images", ("id", "file_name")))
           for key in keys},
        "no annotations": ("read", top(annotations=[])),
        "no images": ("refused", top(images=[])),
        "no categories": ("refused", top(categories=[])),
        **{f"{part} are {what!r}": ("refused", top(**{part: what}))
           for part in ("images", "annotations", "categories")
           for what in (None, {}, "", 5, {"a": 1}, "ab", [5], [[]])},
        "one image with 2,000 objects": ("read", many(2000)),
        "a list": ("refused", edit(COCO, lambda content: [content])),
        "null": ("refused", put(COCO, "null")),
        "empty": ("refused", put(COCO, "")),
        "cut": ("refused", cut(COCO)),
        "NUL": ("refused", put(COCO, bytes(1000))),
        "in UTF-16": ("refused", lambda files: put(COCO, files[COCO].decode().encode("utf-16"))(files)),
        "with a byte order mark": ("refused", lambda files: put(COCO, b"\xef\xbb\xbf" + files[COCO])(files)),
        "10^5 lists within each other": ("refused", put(COCO, "[" * 10**5)),
        "10^5 objects within each other": ("refused", put(COCO, '{"a":' * 10**5)),
        "a number of 10^4 digits": ("refused", swapped(COCO, '"id": 7', '"id": ' + "7" * 10**4)),
        "an image cut": ("damaged", cut("train/0.jpg")),
        "an image of nothing": ("damaged", put("train/1.png", b"")),
        "an image of text": ("damaged", put("train/1.png", b"hello")),
        "an image of another size": ("damaged", put("train/1.png", picture(1, "PNG", 65))),
        "an image of 16 bits": ("read", put("train/1.png", encoded(np.zeros((SIDE, SIDE), np.uint16)))),
    }  # fmt: skip


def mask_attacks() -> dict[str, tuple[str, Change]]:
    """Of COCO files whose masks are read."""
    lost = {"null": None, "[]": [], "of 4 numbers": [[1, 2, 3, 4]], "of 7 numbers": [[1, 2, 3, 4, 5, 6, 7]]}
    damaged = {
        "a number": 3, "text": "abc", "an empty object": {"a": 1}, "NaN": [[0, 0, 5, 0, float("nan"), 5]],
        "infinite": [[0, 0, 5, 0, float("inf"), 5]], "of text": [[0, 0, 5, 0, "a", 5]],
        "of lists": [[[0], [0], [5], [0], [5], [5]]], "huge": [[0, 0, HUGE, 0, 5, 5]],
        "as large as doubles": [[0, 0, 1e308, 0, -1e308, 5]], "far beyond": [[0, 0, 1e12, 0, 5, 5]],
        "of nulls": [[None] * 6], "of objects": [[{}] * 6],
        "runs of another size": {"size": [32, 64], "counts": [2048]},
        "runs of a size of text": {"size": ["64", "64"], "counts": [4096]},
        "runs of one number": {"size": [64], "counts": [4096]}, "runs too short": {"size": [64, 64], "counts": [5]},
        "runs too long": {"size": [64, 64], "counts": [5000]}, "runs negative": {"size": [64, 64],
        "counts": [-5, 4101]},
        "runs of fractions": {"size": [64, 64], "counts": [4096.0]}, "runs huge": {"size": [64, 64], "counts": [HUGE]},
        "runs packed, none": {"size": [64, 64], "counts": "~~~"}, "packed, cut": {"size": [64, 64], "counts": "o"},
        "packed, long": {"size": [64, 64], "counts": "o" * 10**5}, "packed, empty": {"size": [64, 64], "counts": ""},
        "packed, not ASCII": {"size": [64, 64], "counts": "é🐕"}, "runs null": {"size": [64, 64], "counts": None},
    }  # fmt: skip
    return {
        **{f"polygon {name}": ("left out", note(segmentation=what)) for name, what in lost.items()},
        "no segmentation": ("left out", without("annotations", "segmentation")),
        **{f"polygon {name}": ("damaged", note(segmentation=what)) for name, what in damaged.items()},
        "polygon outside": ("read", note(segmentation=[[900, 900, 990, 900, 950, 990]])),
        "polygon of one point": ("read", note(segmentation=[[5, 5, 5, 5, 5, 5]])),
        "polygon of 10^4 points": ("read", note(segmentation=[[i % 60 for i in range(2 * 10**4)]])),
        "10^4 polygons": ("read", note(segmentation=POLYGON * 10**4)),
        "more masks than memory": (
            "damaged",
            both(
                many(2000), image(height=4000, width=4000),
                put("train/0.jpg", encoded(np.zeros((4000, 4000), np.uint8), "JPEG")),
            ),
        ),
    }  # fmt: skip


def coco_listed(folder: Path, source: Any) -> int:
    """Annotations of the file."""
    content = json.loads((folder / COCO).read_bytes())
    assert len(source) == len(content["images"]), "images were dropped in silence"
    return len(content["annotations"])


# COCO's panoptic maps.

PANOPTIC, MAPS = "annotations/panoptic_train.json", "annotations/panoptic_train"
SEGMENTS = (1, 300, 70_000)


def panoptic_map() -> np.ndarray:
    """The number of each pixel's segment; a stripe has none."""
    out = np.zeros((SIDE, SIDE), np.int64)
    for i, number in enumerate(SEGMENTS):
        out[16 * i : 16 * i + 16] = number
    return out


def coloured(numbers: np.ndarray) -> np.ndarray:
    """As colours."""
    return np.stack([numbers % 256, numbers // 256 % 256, numbers // 65_536], -1).astype(np.uint8)


def panoptic_files() -> Files:
    """Three images, three segments each."""
    names = ("0.jpg", "1.png", "2.jpg")
    images = [{"id": i, "file_name": name, "height": SIDE, "width": SIDE} for i, name in enumerate(names)]
    segments = [
        {"id": number, "category_id": (7, 3, 90)[k], "bbox": [0, 16 * k, SIDE, 16], "area": 16 * SIDE}
        for k, number in enumerate(SEGMENTS)
    ]
    notes = [{"image_id": i, "file_name": f"{i}.png", "segments_info": segments} for i in range(len(names))]
    content = {"images": images, "annotations": notes, "categories": CATEGORIES}
    pictures = {f"train/{name}": picture(i, "PNG" if "png" in name else "JPEG") for i, name in enumerate(names)}
    maps = {f"{MAPS}/{i}.png": encoded(coloured(panoptic_map())) for i in range(len(names))}
    return {PANOPTIC: json.dumps(content).encode(), **pictures, **maps}


def segment(**values: Any) -> Change:
    """The first segment with other values."""
    return edit(PANOPTIC, lambda content: content["annotations"][0]["segments_info"][0].update(values))


def map_note(**values: Any) -> Change:
    """The first map with other values."""
    return edit(PANOPTIC, lambda content: content["annotations"][0].update(values))


def panoptic_attacks() -> dict[str, tuple[str, Change]]:
    """Of maps and their file."""
    first, numbers = f"{MAPS}/0.png", panoptic_map()
    small = (numbers % 256).astype(np.uint8)
    alpha = np.concatenate([coloured(numbers), np.full((SIDE, SIDE, 1), 9, np.uint8)], -1)
    indices = np.searchsorted((0, *SEGMENTS), numbers).astype(np.uint8)
    colours = coloured(np.array((0, *SEGMENTS))).ravel().tolist()
    return {
        "unchanged": ("read", lambda files: None),
        **{f"number {name}": ("left out", segment(id=what))
           for name, what in {"0": 0, "negative": -1, "beyond colours": 2**24, "beyond 32 bits": 2**40,
           "huge": HUGE}.items()},
        **{f"number {name}": ("refused", segment(id=what))
           for name, what in {"text": "x", "infinite": float("inf"), "NaN": float("nan"), "null": None}.items()},
        "number that no pixel has": ("read", segment(id=5)),
        "number of another segment": ("left out", segment(id=300)),
        "pixels of no segment": ("read", put(first, encoded(coloured(np.where(numbers == 1, 4, numbers))))),
        "no pixel of any segment": ("damaged", put(first, encoded(coloured(numbers + 7)))),
        "category unknown": ("left out", segment(category_id=8)),
        "category a list": ("refused", segment(category_id=[7])),
        "box NaN": ("left out", segment(bbox=[0, 0, float("nan"), 1])),
        "box of text": ("left out", segment(bbox=["0", "0", "5", "5"])),
        "crowd": ("read", segment(iscrowd=1)),
        "map of another size": ("damaged", put(first, encoded(coloured(numbers)[:60]))),
        "map grey": ("damaged", put(first, encoded(small))),
        "map grey with alpha": ("damaged", put(first, encoded(np.stack([small, small], -1)))),
        "map of 16 bits": ("damaged", put(first, encoded(numbers.clip(0, 65_535).astype(np.uint16)))),
        "map with alpha": ("damaged", put(first, encoded(alpha))),
        "map with a palette": ("same", put(first, palette(indices, colours))),
        "map a JPEG": ("damaged", put(first, encoded(coloured(numbers), "JPEG"))),
        "map cut": ("damaged", cut(first)),
        "map of nothing": ("damaged", put(first, b"")),
        "map missing": ("refused", drop(first)),
        "map not listed": ("refused", edit(PANOPTIC, lambda content: content["annotations"].pop() and None)),
        "map of an unknown image": ("refused", map_note(image_id=77)),
        "two maps of an image": ("refused", edit(PANOPTIC, lambda c: c["annotations"].append(c["annotations"][0]))),
        **{f"map's name {name!r:.20}": ("refused", map_note(file_name=name))
           for name in ("/etc/passwd", "../0.png", "0\0.png", "\ud800.png", "", "a" * 10**4, None, "a\nb")},
        "segments are null": ("refused", map_note(segments_info=None)),
        "segments are an object": ("refused", map_note(segments_info={})),
        "no segments": ("read", map_note(segments_info=[])),
        "2,000 segments": ("read", map_note(segments_info=[
            {"id": i + 1, "category_id": 7, "bbox": [0, 0, 5, 5]} for i in range(2000)
        ])),
        "a list": ("refused", edit(PANOPTIC, lambda content: [content])),
        "cut": ("refused", cut(PANOPTIC)),
    }  # fmt: skip


def panoptic_listed(folder: Path, source: Any) -> int:
    """Segments of the images that are listed."""
    content = json.loads((folder / PANOPTIC).read_bytes())
    assert len(source) == len(content["images"]), "images were dropped in silence"
    images = {image["id"] for image in content["images"]}
    return sum(len(note["segments_info"]) for note in content["annotations"] if note["image_id"] in images)


# Pascal VOC.

XML = """<annotation><filename>{0}.jpg</filename><size><width>64</width><height>64</height><depth>3</depth></size>
<object><name>dog</name><difficult>0</difficult><bndbox><xmin>5</xmin><ymin>6</ymin><xmax>40</xmax><ymax>50</ymax>
</bndbox></object><object><name>cat</name><difficult>1</difficult><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>64</xmax>
<ymax>64</ymax></bndbox></object></annotation>"""
NOTE, LIST = "Annotations/0.xml", "ImageSets/Main/train.txt"


def voc_files() -> Files:
    """Three images of two objects."""
    notes = {f"Annotations/{i}.xml": XML.format(i).encode() for i in range(3)}
    pictures = {f"JPEGImages/{i}.jpg": picture(i) for i in range(3)}
    return {**notes, **pictures, LIST: b"0\n1\n2\n"}


def voc_attacks() -> dict[str, tuple[str, Change]]:
    """Of XML files and lists."""

    def xml(old: str, new: str) -> Change:
        return swapped(NOTE, old, new)

    def doctype(declared: str, used: str) -> Change:
        return put(NOTE, f'<?xml version="1.0"?><!DOCTYPE a [{declared}]>' + XML.format(0).replace("dog", used))

    bomb = '<!ENTITY a0 "ha">' + "".join(f'<!ENTITY a{i} "{f"&a{i - 1};" * 10}">' for i in range(1, 12))
    box = "<xmin>5</xmin>"
    numbers = {"NaN": "nan", "infinite": "inf", "1e400": "1e400", "text": "x", "nothing": "",
    "of 10^4 digits": "9" * 10**4,
               "1e300": "-1e300", "beyond the image": "900", "after its end": "60"}  # fmt: skip
    return {
        "unchanged": ("read", lambda files: None),
        "entities that expand": ("refused", doctype(bomb, "&a11;")),
        "entity of a file": ("refused", doctype('<!ENTITY a SYSTEM "file:///etc/passwd">', "&a;")),
        "entity of an address": ("refused", doctype('<!ENTITY a SYSTEM "http://127.0.0.1:9/a">', "&a;")),
        "parameter entity": ("refused", doctype('<!ENTITY % a SYSTEM "file:///etc/passwd"> %a;', "x")),
        "attribute of a doctype": ("refused", doctype('<!ATTLIST object a CDATA "x">', "x")),
        "undeclared entity": ("refused", xml("dog", "&b;")),
        "inclusion": ("read", xml(
            "<depth>3</depth>", '<include xmlns="http://www.w3.org/2001/XInclude" href="/etc/passwd"/>'
        )),
        "deep": ("refused", put(NOTE, "<a>" * 10**5)),
        **{f"edge {name}": ("left out", xml(box, f"<xmin>{what}</xmin>")) for name, what in numbers.items()},
        "edge missing": ("left out", xml(box, "")),
        "edge negative": ("read", xml(box, "<xmin>-5</xmin>")),
        "box missing": ("left out", put(NOTE, re.sub(r"(?s)<bndbox>.*?</bndbox>", "", XML.format(0)))),
        "name missing": ("left out", xml("<name>dog</name>", "")),
        "name empty": ("left out", xml("<name>dog</name>", "<name> </name>")),
        "name in another script": ("read", xml("dog", "κύων 🐕")),
        "name of 10^6 characters": ("read", xml("dog", "x" * 10**6)),
        "difficult missing": ("read", xml("<difficult>0</difficult>", "")),
        "difficult text": ("read", xml("<difficult>0</difficult>", "<difficult>yes</difficult>")),
        "size missing": ("read", put(NOTE, re.sub("(?s)<size>.*</size>", "", XML.format(0)))),
        **{f"width {name}": ("read", xml("<width>64<", f"<width>{what}<"))
           for name, what in {"zero": "0", "negative": "-64", "text": "x", "empty": "", "NaN": "nan",
           "of 20 digits": "9" * 20,
                              "of 10^4 digits": "9" * 10**4}.items()},
        **{f"width {name}": ("damaged", xml("<width>64<", f"<width>{what}<"))
           for name, what in {"of another": "90"}.items()},
        "no object": ("read", put(NOTE, "<annotation/>")),
        "2,000 objects": ("read", put(NOTE, XML.format(0).replace("</annotation>", "") + 2000 * (
            "<object><name>cat</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax></bndbox></object>"
        ) + "</annotation>")),
        "cut": ("refused", cut(NOTE)),
        "empty": ("refused", put(NOTE, "")),
        "NUL": ("refused", put(NOTE, bytes(100))),
        "no XML": ("refused", put(NOTE, "0 0.5 0.5 1 1")),
        "an unknown encoding": ("refused", put(NOTE, '<?xml version="1.0" encoding="klingon"?>' + XML.format(0))),
        "an encoding of several bytes": (
            "refused", put(NOTE, '<?xml version="1.0" encoding="utf-7"?>' + XML.format(0))
        ),
        "in UTF-16": ("read", put(NOTE, XML.format(0).encode("utf-16"))),
        "larger than the limit": ("refused", put(NOTE, XML.format(0) + " " * 2**24)),
        "an image missing": ("refused", drop("JPEGImages/0.jpg")),
        "an annotation missing": ("refused", drop(NOTE)),
        "a folder in place of an annotation": ("refused", both(drop(NOTE), put(f"{NOTE}/a", ""))),
        "list missing": ("refused", drop(LIST)),
        "list empty": ("refused", put(LIST, "")),
        "list of unknown names": ("refused", put(LIST, "0\n../1\n")),
        "list not in UTF-8": ("refused", put(LIST, b"0\n\xff\xfe\n")),
        "list with NUL": ("refused", put(LIST, b"0\n\0\n")),
        "list names an image twice": ("left out", put(LIST, "0\n0\n")),
        "list with marks": ("read", put(LIST, "0  1\n1 -1\n2  0\n")),
        "an image cut": ("damaged", cut("JPEGImages/0.jpg")),
        "an image of another size": ("damaged", put("JPEGImages/0.jpg", picture(0, side=50))),
    }  # fmt: skip


def voc_listed(folder: Path, source: Any) -> int:
    """Objects of the split."""
    names = [Path(source.file(i)).stem for i in range(len(source))]
    trees = [ElementTree.parse(folder / f"Annotations/{name}.xml") for name in names]
    return sum(len(list(tree.iter("object"))) for tree in trees)


# YOLO.

YAML, LINES = "data.yaml", "labels/train/0.txt"


def yolo_files() -> Files:
    """Three images of which the last has no object."""
    labels = {f"labels/train/{i}.txt": b"0 0.5 0.5 0.5 0.25\n1 .25 .5 .75 .5 .5 1\n" for i in range(2)}
    pictures = {f"images/train/{i}.jpg": picture(i) for i in range(3)}
    return {YAML: b"train: images/train\nnames: {0: cat, 1: dog}\n", **labels, **pictures}


def yolo_attacks() -> dict[str, tuple[str, Change]]:
    """Of lines and of data.yaml."""

    def line(text: str) -> Change:
        return put(LINES, f"0 .5 .5 .5 .5\n{text}\n")

    def table(text: str) -> Change:
        return put(YAML, text)

    def split(of: str) -> Change:
        return table(f"train: {of}\nnames: [cat, dog]\n")

    run = "touch {ran}"  # which is filled in when the file is written
    bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 10)
    )
    merges = "a0: &a0 {x: 1, y: 2}\n" + "".join(
        f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}\n" for i in range(1, 9)
    )
    bad = {
        "class beyond": "2 .5 .5 .1 .1", "class negative": "-1 .5 .5 .1 .1", "class a fraction": "0.5 .5 .5 .1 .1",
        "class NaN": "nan .5 .5 .1 .1", "class infinite": "1e400 .5 .5 .1 .1",
        "class huge": "9" * 5000 + " .5 .5 .1 .1",
        "class alone": "0", "columns too few": "0 .5 .5 .1", "columns too many": "0 .5 .5 .1 .1 .9",
        "text": "a b c d e",
        "commas": "0,.5,.5,.1,.1", "NaN": "0 .5 .5 nan .1", "infinite": "0 .5 .5 inf .1", "huge": "0 .5 .5 1e308 1e308",
        "far beyond": "0 .5 .5 1e200 1e200", "outside": "0 2 2 .1 .1", "empty": "0 .5 .5 0 .1",
        "in pixels": "0 300 200 50 40",
        "inverted": "0 .5 .5 -.1 .1", "polygon of an odd count": "0 .1 .1 .2 .2 .3 .3 .4",
        "polygon NaN": "0 .1 .1 .2 .2 nan .3",
        "polygon of one point": "0 .1 .1 .1 .1 .1 .1", "hexadecimal": "0x1 .5 .5 .1 .1",
    }  # fmt: skip
    return {
        "unchanged": ("read", lambda files: None),
        **{f"line: {name}": ("left out", line(text)) for name, text in bad.items()},
        "line partly outside": ("read", line("0 0 0 .5 .5")),
        "lines not in UTF-8": ("left out", put(LINES, b"\xff\xfe0 .5 .5 .1 .1\n")),
        "lines of NUL": ("left out", put(LINES, bytes(100))),
        "no line": ("read", put(LINES, "")),
        "no file of lines": ("read", drop(LINES)),
        "a folder in place of lines": ("refused", both(drop(LINES), put(f"{LINES}/a", ""))),
        "2,000 lines": ("read", put(LINES, "0 .5 .5 .1 .1\n" * 2000)),
        "one line of 10^6 numbers": ("read", put(LINES, "0 " + ".5 .6 " * 10**6 + ".1 .1")),
        **{f"tag {text[:40]}": ("refused", table(f"train: images/train\nnames: [a]\nx: {text}\n")) for text in (
            f"!!python/object/apply:os.system ['{run}']", f"!!python/object/new:os.system ['{run}']",
            f"!!python/object/apply:subprocess.check_output [[sh, -c, '{run}']]", "!!python/name:os.system",
            "!!python/module:os", f"!!python/object/apply:eval [\"__import__('os').system('{run}')\"]", "!unknown 1",
            "!!timestamp x", '!!int ""', '!!float ""', "!!bool x", "!!binary é", "2001-99-99", "9" * 10**4, "? [a] : b",
        )},
        "names of aliases that expand": ("refused", table(bomb + "train: images/train\nnames: *a9\n")),
        "split of aliases that expand": ("refused", table(bomb + "train: *a9\nnames: [a, b]\n")),
        "merges that expand": ("refused", table(merges + "train: images/train\nnames: [a, b]\n")),
        "an alias of itself": ("refused", table("train: &a [*a]\nnames: [a, b]\n")),
        "deep": ("refused", table("[" * 10**4)),
        "larger than the limit": ("refused", table("x" * (2**24 + 1))),
        "of 100,000 lines": ("read", table("train: images/train\nnames:\n" + "".join(f"- class {i}\n"
        for i in range(10**5)))),
        "no YAML": ("refused", table("a: [")), "empty": ("refused", table("")), "a list": ("refused", table("- 3")),
        "NUL": ("refused", put(YAML, bytes(10))), "not in UTF-8": ("refused", put(YAML, b"\xff\xfe")),
        **{f"names: {text}": ("refused", table(f"train: images/train\nnames: {text}\n"))
           for text in ("", "5", "{}", "[]", "{0: a, 2: b}", "{1: a, 2: b}", "[[a]]", "[null]", "{a: 0}")},
        "names that are numbers": ("read", table("train: images/train\nnames: [1, 2]\n")),
        **{f"split {text[:30]}": ("refused", split(text)) for text in (
            "5", "{}", "{a: b}", "[[a]]", "../..", "/etc", "images/none", "data.yaml", "images/train/0.jpg", '"\\0"',
            '"\\uD800"', "a" * 10**4, "[images/train, /etc]", "[5]",
        )},
        "split a list of files": ("left out", both(split("a.txt"), put("a.txt", "./images/train/0.jpg\n"))),
        **{f"list of files {name}": ("refused", both(split("a.txt"), put("a.txt", text)))
           for name, text in {"with NUL": b"images/train/0\0.jpg\n", "above": b"../../etc/passwd\n",
           "absolute": b"/etc/passwd\n",
                              "that are missing": b"images/train/7.jpg\n", "too long": b"a/" * 5000, "empty": b"",
                              "not in UTF-8": b"\xff.jpg\n", "a pipe": b"images/train/\x1b[2J.jpg"}.items()},
        "an image cut": ("damaged", cut("images/train/0.jpg")),
        "an image of nothing": ("damaged", put("images/train/0.jpg", b"")),
    }  # fmt: skip


def yolo_listed(folder: Path, source: Any) -> int:
    """Lines of the files."""
    files = [re.sub("images(?=/[^/]*/[^/]*$)", "labels", source.file(i)) for i in range(len(source))]
    places = [folder / f"{file.rpartition('.')[0]}.txt" for file in files]
    texts = [place.read_text(errors="replace") for place in places if place.is_file()]
    return sum(bool(line.split()) for text in texts for line in text.splitlines())


# Class maps.

FIRST = "annotations/training/0.png"


def values() -> np.ndarray:
    """0, no class, and classes 1 to 15."""
    return (np.arange(SIDE * SIDE).reshape(SIDE, SIDE) % 16).astype(np.uint8)


def map_files() -> Files:
    """Three images with maps."""
    pictures = {f"images/training/{i}.jpg": picture(i) for i in range(3)}
    return {**pictures, **{f"annotations/training/{i}.png": encoded(values()) for i in range(3)}}


def map_attacks() -> dict[str, tuple[str, Change]]:
    """Of maps."""
    second = "annotations/training/1.png"
    few, beyond = values() % 4, values().astype(np.uint16)
    beyond[0, 0] = 151
    inverted = io.BytesIO()
    Image.fromarray(values()).save(inverted, "TIFF", tiffinfo={262: 0})
    return {
        "unchanged": ("same", lambda files: None),
        "of 16 bits": ("same", put(second, encoded(values().astype(np.uint16)))),
        "of 32 bits": ("same", put(second, encoded(values().astype(np.int32), "TIFF"))),
        "with a palette": ("same", put(second, palette(values(), [0] * 768))),
        "a BMP": ("same", put(second, encoded(values(), "BMP"))),
        "of 4 bits": ("read", put(second, grey_png(values(), 4))),
        "a TIFF of inverted grey": ("same", put(second, inverted.getvalue())),
        "of 2 bits": ("read", put(second, grey_png(few, 2))),
        "of 1 bit": ("read", put(second, grey_png(values() % 2, 1))),
        "beyond the classes": ("damaged", put(second, encoded(np.full((SIDE, SIDE), 200, np.uint8)))),
        "of 16 bits, beyond the classes": ("damaged", put(second, encoded(beyond))),
        "of 16 bits, all ones": ("damaged", put(second, encoded(np.full((SIDE, SIDE), 65_535, np.uint16)))),
        "of 32 bits, negative": ("damaged", put(second, encoded(np.full((SIDE, SIDE), -1, np.int32), "TIFF"))),
        "of fractions": ("damaged", put(second, encoded(np.full((SIDE, SIDE), 1.5, np.float32), "TIFF"))),
        "coloured": ("damaged", put(second, encoded(np.zeros((SIDE, SIDE, 3), np.uint8)))),
        "coloured, the first": ("refused", put(FIRST, encoded(np.zeros((SIDE, SIDE, 3), np.uint8)))),
        "with alpha": ("damaged", put(second, encoded(np.zeros((SIDE, SIDE, 2), np.uint8)))),
        "a JPEG": ("damaged", put(second, encoded(values(), "JPEG"))),
        "of another size": ("damaged", put(second, encoded(values()[:60]))),
        "turned": ("damaged", put(second, encoded(values()[:, :60]))),
        "of no class": ("read", put(second, encoded(np.zeros((SIDE, SIDE), np.uint8)))),
        "cut": ("damaged", cut(second)),
        "cut, the first": ("refused", cut(FIRST)),
        "of nothing": ("damaged", put(second, b"")),
        "of text": ("damaged", put(second, b"hello")),
        "missing": ("left out", drop(second)),
        "without an image": ("left out", drop("images/training/1.jpg")),
        "none": ("refused", both(*(drop(f"annotations/training/{i}.png") for i in range(3)))),
        "a folder": ("left out", both(drop(second), put(f"{second}/a", ""))),
        "names not in UTF-8": ("refused", put("objectInfo150.txt", b"\xff\xfe")),
        "names too few": ("refused", put("objectInfo150.txt", "a\nb\n")),
        "names empty": ("read", put("objectInfo150.txt", "")),
        "an image cut": ("damaged", cut("images/training/0.jpg")),
        "an image of another size": ("damaged", put("images/training/0.jpg", picture(0, side=50))),
    }


def map_listed(folder: Path, source: Any) -> int:
    """Images."""
    return len([p for p in (folder / "images/training").iterdir() if p.suffix == ".jpg"])


FORMATS: dict[str, Format] = {
    "coco": Format(
        coco_files(), lambda path: kinds.CocoConfig(path=path, split="train"), coco_listed, COCO, coco_attacks()
    ),
    "coco, masks": Format(
        coco_files(), lambda path: kinds.CocoConfig(path=path, split="train", masks=True), coco_listed, COCO,
        coco_attacks() | mask_attacks(),
    ),
    "panoptic": Format(
        panoptic_files(), lambda path: kinds.CocoPanopticConfig(path=path, split="train"), panoptic_listed, PANOPTIC,
        panoptic_attacks(),
    ),
    "panoptic, masks": Format(
        panoptic_files(), lambda path: kinds.CocoPanopticConfig(path=path, split="train", truth="masks"),
        panoptic_listed, PANOPTIC, panoptic_attacks(),
    ),
    "voc": Format(voc_files(), lambda path: kinds.VocConfig(path=path), voc_listed, NOTE, voc_attacks()),
    "yolo": Format(yolo_files(), lambda path: kinds.YoloConfig(path=path), yolo_listed, LINES, yolo_attacks()),
    "class maps": Format(map_files(), lambda path: kinds.Ade20kConfig(path=path), map_listed, FIRST, map_attacks()),
}  # fmt: skip


# Reading.


class Said(standard_logging.Handler):
    """The log of one set."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: standard_logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


class Late(BaseException):
    """No OSError, which is tried again."""


@contextmanager
def bounded() -> Iterator[None]:
    """An error after `SECONDS`."""

    def late(*_: object) -> None:
        raise Late(f"more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def fields_of(source: Any) -> Objects | ClassMap:
    """What a task asks for."""
    return (
        ClassMap(source.num_classes, (32, 32))
        if "class_map" in source.classes_of
        else Objects(source.num_classes, MOST)
    )


def check_record(record: dict[str, Any]) -> None:
    """All numbers are finite, and there is one of everything for each object."""
    for name in ("boxes", "box_areas"):
        assert np.isfinite(record.get(name, 0)).all(), f"{name} are not finite: {record[name]}"
    assert (record.get("box_areas", np.zeros(0)) >= 0).all(), "areas are negative"
    counts = {len(record[name]) for name in ("boxes", "box_labels", "box_areas", "masks") if name in record}
    assert len(counts) < 2, "the objects are not as many in each array"


def check_row(row: dict[str, Any], classes: int) -> None:
    """What a model is given."""
    if "class_map" in row:
        found = row["class_map"]
        assert ((found == 255) | (found < classes)).all(), "a pixel of no class"
        return
    assert row["objects"] >= 0, "objects"
    boxes, labels = row["boxes"], row["box_labels"]
    assert ((boxes >= 0) & (boxes <= 32)).all(), f"boxes {boxes}"
    assert ((labels >= 0) & (labels < classes)).all(), "labels"
    sides = (boxes[:, 2:] - boxes[:, :2])[: row["objects"]]
    assert (sides > 0).all(), "an empty box"


def one_line(error: Exception) -> None:
    """Whether an error is."""
    assert "\n" not in str(error), f"an error of several lines: {error}"


def outcome(of: Format, folder: Path, same: list[Any]) -> str:
    """read, same (as `same`, all records of the unchanged set), left out, damaged, refused."""
    said = Said()
    logger = logging.get_absl_logger()
    logger.addHandler(said)
    try:
        try:
            source = open_source(of.config(str(folder)))
            fields = fields_of(source)
            fields.check(source)
        except UserError as error:
            one_line(error)
            return "refused"
        damaged, records = 0, []
        json.dumps([source.key(i) for i in range(len(source))]).encode()
        json.dumps([source.class_names, source.fingerprint()]).encode()
        source = pickle.loads(pickle.dumps(source))
        for i in range(len(source)):
            try:
                record = read_record(source, i)
                check_record(record)
                records.append(record)
                for seed in range(3):
                    check_row(fields(CHAIN(record, np.random.default_rng(seed))), source.num_classes)
            except DAMAGED as error:
                one_line(error)
                damaged += 1
        left = [
            int(n.replace(",", ""))
            for n in re.findall(r"left out: ([\d,]+) (?:object|line|segment|images without)", "\n".join(said.lines))
        ]
        per_record = getattr(source, "objects", None)
        there = (
            len(source) if per_record is None else sum(s.stop - s.start for s in map(per_record, range(len(source))))
        )
        listed = of.listed(folder, source)
        assert there + sum(left) == listed, f"{there} there, {sum(left)} left out, {listed} listed"
        if damaged:
            return "damaged"
        if any("left out" in line for line in said.lines):
            return "left out"
        return "same" if same_records(records, same) else "read"
    finally:
        logger.removeHandler(said)


def same_records(records: list[Any], others: list[Any]) -> bool:
    """Whether what is known of the images is the same."""
    return len(records) == len(others) and all(
        a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a if k != "image")
        for a, b in zip(records, others, strict=True)
    )


def write(files: Files, folder: Path) -> None:
    """All files anew."""
    shutil.rmtree(folder, ignore_errors=True)
    ran = str(folder.parent / "ran").encode()
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.replace(b"{ran}", ran))


def attempt(of: Format, change: Change, folder: Path, same: list[Any]) -> tuple[str, str]:
    """What a change comes to; "neither" and the reason where it must not."""
    files = dict(of.files)
    change(files)
    write(files, folder)
    try:
        with bounded(), warnings.catch_warnings():
            warnings.simplefilter("error")
            found, why = outcome(of, folder, same), ""
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        found, why = "neither", "".join(traceback.format_exception(error)[-3:])
    if (folder.parent / "ran").exists():
        (folder.parent / "ran").unlink()
        found, why = "neither", "a program ran"
    return found, why


# Random changes.

WILD = (
    None, 0, -1, 1, 1.5, 2**31, 2**63, 2**70, HUGE, 1e308, -1e308, 1e-320, float("nan"), float("inf"), "", "x", "1",
    "\0", "\ud800", "\x1b[2J", "a\nb", "../x", True, [], [[]], {}, {"a": 1}, [1, "a"], [float("nan")] * 4, "9" * 5000,
)  # fmt: skip
WORDS = (
    b"nan",
    b"inf",
    b"-1",
    b"1e308",
    b"1e400",
    b"0",
    b"",
    b"\0",
    b"\xff",
    b"9" * 5000,
    b"x",
    b"<",
    b"&a;",
    b"- ",
    b"*a",
    b"&a",
    b"!!int",
    b"[",
    b"{",
    b"\n",
    b"\r",
    b"0.5",
    b"1_0",
    b"\xef\xbb\xbf",
    b"\xe2\x80\xa8",
    b"64.0",
    b"-0",
)


def random_json(content: Any, rng: random.Random) -> Any:
    """One value, at any depth, is another, is gone or is there twice."""
    if isinstance(content, dict) and content and rng.random() < 0.9:
        key, out = rng.choice(list(content)), dict(content)
        if rng.random() < 0.1:
            del out[key]
        elif rng.random() < 0.05:
            out[rng.choice(("", "id", "bbox", "x"))] = out[key]
        else:
            out[key] = random_json(content[key], rng)
        return out
    if isinstance(content, list) and content and rng.random() < 0.9:
        at, out = rng.randrange(len(content)), list(content)
        if rng.random() < 0.1:
            del out[at]
        elif rng.random() < 0.1:
            out.append(out[at])
        else:
            out[at] = random_json(content[at], rng)
        return out
    return rng.choice(WILD)


def random_bytes(content: bytes, rng: random.Random) -> bytes:
    """Bits, cuts, splices, words."""
    data, kind = bytearray(content), rng.choice(("bit", "cut", "splice", "word", "number", "zeros", "twice"))
    at = rng.randrange(len(data)) if data else 0
    if kind == "bit" and data:
        data[at] ^= 1 << rng.randrange(8)
    if kind == "cut":
        del data[at : at + rng.choice((1, 10, 10**9))]
    if kind == "splice":
        data[at:at] = rng.randbytes(rng.randrange(1, 64))
    if kind == "word":
        data[at:at] = rng.choice(WORDS)
    if kind == "number" and (found := list(re.finditer(rb"[\d.]+|\w+", content))):
        one = rng.choice(found)
        data[one.start() : one.end()] = rng.choice(WORDS)
    if kind == "zeros":
        data[at : at + 64] = bytes(len(data[at : at + 64]))
    if kind == "twice":
        data += data[at:]
    return bytes(data)


def random_picture(rng: random.Random) -> bytes:
    """Of another form."""
    side, seed = rng.choice((1, 60, 64, 64, 64)), rng.randrange(2**32)
    shape = (side, rng.choice((64, 64, 3)), *rng.choice(((), (2,), (3,), (4,))))
    dtype = rng.choice((np.uint8, np.uint16)) if len(shape) == 2 else np.uint8
    values = np.random.default_rng(seed).integers(0, rng.choice((2, 16, 200)), shape).astype(dtype)
    return encoded(values, "PNG")


def random_change(of: Format, rng: random.Random) -> Change:
    """One, or two."""

    def change(files: Files) -> None:
        for _ in range(rng.choice((1, 1, 2))):
            name = of.notes if rng.random() < 0.6 and of.notes in files else rng.choice(sorted(files))
            if name.endswith(".json") and rng.random() < 0.8:
                try:
                    files[name] = json.dumps(random_json(json.loads(files[name]), rng)).encode()
                    continue
                except ValueError:
                    pass
            if name.endswith(".png") and rng.random() < 0.5:
                files[name] = random_picture(rng)
            elif rng.random() < 0.05:
                del files[name]
            else:
                files[name] = random_bytes(files[name], rng)

    return change


# Training.


def train(of: Format, change: Change, folder: Path, steps: int) -> list[float]:
    """Losses of a tiny model on a changed set, by the loader."""
    import jax

    from visionfm_jax.config import Config, DataConfig, OptimConfig, TrainConfig
    from visionfm_jax.data.loader import train_loader
    from visionfm_jax.models.backbones.vit import ViTConfig
    from visionfm_jax.parallel.mesh import make_mesh, to_global
    from visionfm_jax.tasks.detection import DetectionConfig
    from visionfm_jax.tasks.segmentation import SegmentationConfig
    from visionfm_jax.train.step import Trainer

    files = dict(of.files)
    change(files)
    write(files, folder)
    config = of.config(str(folder))
    source = open_source(config)
    if "class_map" in source.classes_of:
        task = SegmentationConfig(num_classes=150, channels=8, auxiliary_channels=4)
    else:
        task = DetectionConfig(
            num_classes=3, most_objects=MOST, width=16, heads=2, mlp=32, encoder_depth=1, decoder_depth=2, queries=6,
            many_queries=10, copies=2, detections=5,
        )  # fmt: skip
    run = Config(
        name="dense", model=ViTConfig(width=16, depth=1, heads=2, mlp=32, image_size=32, patch_size=8), task=task,
        data=DataConfig(train=(config,), transforms=CHAIN.transforms, threads=2),
        optim=OptimConfig(warmup_steps=1), train=TrainConfig(batch_size=4, steps=100, precision="fp32"),
    )  # fmt: skip
    run.validate()
    trainer = Trainer(run, make_mesh(1, jax.devices()[:1]))
    state, losses = trainer.init(), []
    loader = train_loader(
        run.data, image_size=32, batch_size=4, seed=0, start_step=0, host=0, hosts=1, sources=[source],
        fields=task.fields(run),
    )  # fmt: skip
    with loader:
        for _, batch in zip(range(steps), loader, strict=False):
            rows = {k: v for k, v in batch.items() if k in trainer.task.batch_spec(4)}
            state, metrics = trainer.step(state, to_global(trainer.mesh, rows))
            losses.append(float(metrics["loss"]))
            assert np.isfinite([float(metrics["loss"]), float(metrics["grad_norm"])]).all(), f"a loss of {losses[-1]}"
    return losses


TRAINED = {
    "coco": ("one image with 2,000 objects", "box partly outside", "box of fractions", "no annotations", "box NaN",
             "height zero", "an image cut"),
    "panoptic": ("no pixel of any segment", "map of another size", "no segments"),
    "yolo": ("2,000 lines", "line: far beyond"),
    "voc": ("edge NaN", "no object"),
    "class maps": ("of no class", "beyond the classes", "of 16 bits"),
}  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Attack, and count."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=3000, help="random changes of each format (%(default)s)")
    parser.add_argument(
        "--steps", type=int, default=1, help="steps of training on some of the changed sets (%(default)s)"
    )
    parser.add_argument("--kind", action="append", choices=FORMATS, help="only this format, may be repeated (all)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    logging.set_verbosity(logging.WARNING)
    logging.use_python_logging(quiet=True)
    logging.get_absl_logger().propagate = False
    began, table, bad = time.monotonic(), collections.Counter(), []

    def tell(finding: str) -> None:
        bad.append(finding)
        print(finding, flush=True)

    used = int(re.search(r"VmSize:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024
    limits = resource.getrlimit(resource.RLIMIT_AS)
    chosen = {name: FORMATS[name] for name in arguments.kind or FORMATS}
    with tempfile.TemporaryDirectory(prefix="dense-") as name:
        folder = Path(name) / "set"
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, limits[1]))
        for kind, of in chosen.items():
            write(of.files, folder)
            source = open_source(of.config(str(folder)))
            same = [read_record(source, i) for i in range(len(source))]
            for attack, (wanted, change) in of.attacks.items():
                found, why = attempt(of, change, folder, same)
                table[kind, "listed", found] += 1
                if found != wanted and (wanted, found) != ("read", "same"):
                    tell(f"{kind}: {attack}: {found}, not {wanted}\n{why}")
            for number in range(arguments.count):
                change = random_change(of, random.Random(f"{arguments.seed} {kind} {number}"))
                found, why = attempt(of, change, folder, same)
                table[kind, "random", found] += 1
                if found == "neither":
                    tell(f"{kind}: random change {number}: {why}")
        resource.setrlimit(resource.RLIMIT_AS, limits)
        for kind, attacks in TRAINED.items():
            for attack in attacks if arguments.steps and kind in chosen else ():
                of = chosen[kind]
                try:
                    train(of, of.attacks[attack][1], folder, arguments.steps)
                    table[kind, "trained", "read"] += 1
                except Exception as error:
                    table[kind, "trained", "neither"] += 1
                    tell(f"{kind}: {attack}: trained: {''.join(traceback.format_exception(error)[-3:])}")
    columns = ("read", "same", "left out", "damaged", "refused", "neither")
    print(f"| format | changes | {' | '.join(columns)} |\n|---|---{'|--:' * len(columns)}|")
    for kind, how in sorted({(kind, how) for kind, how, _ in table}):
        print(f"| {kind} | {how} | " + " | ".join(str(table[kind, how, found]) for found in columns) + " |")
    print(f"{table.total()} sets, {time.monotonic() - began:.0f} s; {len(bad)} wrong")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
