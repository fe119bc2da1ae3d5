"""Pascal VOC's objects (Everingham et al. 2010): PATH/Annotations/NAME.xml beside PATH/JPEGImages/FILE.

PATH is VOCdevkit/VOC2012, say. A split is a list of names, PATH/ImageSets/Main/SPLIT.txt; "" takes every file of
Annotations. Classes are the names that any annotation has, sorted, so that splits of one folder have the same. Edges
count pixels from 1 and include the last; here they are as elsewhere, so 1 is taken from left and top. Objects that are
marked as difficult are treated as COCO's areas of many: not trained on, and neither right nor wrong when found.

The XML is read without document types and entities: a file cannot make the reader open others or fill the memory.
"""

from __future__ import annotations

import os
from xml.etree.ElementTree import Element, TreeBuilder
from xml.parsers import expat

from visionfm_jax.data.sources.annotated import AnnotatedFiles, Objects
from visionfm_jax.data.sources.kinds import VocConfig
from visionfm_jax.data.sources.layout import check_path, describe, misfit, no_split
from visionfm_jax.data.sources.places import Place
from visionfm_jax.data.sources.store import side_by_side
from visionfm_jax.errors import DataError

MAX_BYTES = 2**24  # of an annotation
MAX_DEPTH = 100  # of elements within elements


def open_voc(config: VocConfig) -> AnnotatedFiles:
    """The images of a split with their objects.

    Raises:
      DataError: another layout, no such split, images or annotations that are missing, or one that is not as it should.
    """
    path = check_path(config)
    notes, images = path / "Annotations", path / "JPEGImages"
    if not notes.is_dir() or not images.is_dir():
        raise misfit(config, "PATH/Annotations and PATH/JPEGImages")
    there = sorted(e.stem for e in notes.iterdir() if e.suffix == ".xml" and not e.name.startswith("."))
    trees = dict(zip(there, side_by_side(lambda name: parse(config, notes / f"{name}.xml"), there), strict=True))
    wanted = there
    if config.split:
        lists = path / "ImageSets" / "Main"
        file = lists / f"{config.split}.txt"
        if not file.is_file():
            splits = sorted(p.stem for p in lists.glob("*.txt"))
            raise no_split(config, splits) if splits else misfit(config, f"PATH/ImageSets/Main/{config.split}.txt")
        wanted = [line.split()[0] for line in file.read_text("utf-8", "replace").splitlines() if line.strip()]
    if missing := sorted(set(wanted) - trees.keys()):
        raise DataError(
            f"{describe(config)}: {len(missing)} of {len(wanted)} annotations are missing, the first is "
            f"{notes / missing[0]}.xml; unpack the annotations there"
        )
    names = sorted({_text(o, "name") for tree in trees.values() for o in tree.iter("object")} - {""})
    if not names:
        raise DataError(f"{describe(config)}: no annotation has an object; set another path")
    labels = {name: label for label, name in enumerate(names)}
    files = {os.path.splitext(f)[0]: f for f in sorted(e.name for e in images.iterdir())}
    objects, sizes = Objects(), []
    for i, name in enumerate(wanted):
        sizes.append((_number(trees[name], "size/height"), _number(trees[name], "size/width")))
        for k, one in enumerate(trees[name].iter("object")):
            where = f"{name}.xml object {k}"
            if (label := labels.get(_text(one, "name"))) is None:
                objects.leave("objects without a class", where)
                continue
            box = [_text(one, f"bndbox/{edge}") for edge in ("xmin", "ymin", "xmax", "ymax")]
            difficult = _text(one, "difficult") == "1"
            size = tuple(side or float("inf") for side in sizes[i])
            objects.add(i, label, _from_zero(box), where, size, difficult)
    others = {files[name] for name in there if name in files}  # all splits are in one folder
    wanted = [files.get(name, f"{name}.jpg") for name in wanted]
    return AnnotatedFiles(config, images, wanted, objects, names, sizes=sizes, others=others)


def parse(config: VocConfig, path: Place) -> Element:
    """The elements of an XML file.

    Raises:
      DataError: it is no XML, declares a document type, or is too large or too deep.
      OSError: it cannot be read.
    """
    builder, depth = TreeBuilder(), 0

    def start(tag: str, attributes: dict[str, str]) -> None:
        nonlocal depth
        if (depth := depth + 1) > MAX_DEPTH:
            raise ValueError(f"elements within more than {MAX_DEPTH} others")
        builder.start(tag, attributes)

    def end(tag: str) -> None:
        nonlocal depth
        depth -= 1
        builder.end(tag)

    def refuse(*_: object) -> None:
        raise ValueError("it declares a document type or entities, which are not read")

    parser = expat.ParserCreate()
    parser.StartElementHandler, parser.EndElementHandler, parser.CharacterDataHandler = start, end, builder.data
    parser.StartDoctypeDeclHandler = parser.EntityDeclHandler = parser.ExternalEntityRefHandler = refuse
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"more than {MAX_BYTES:,} bytes")
        parser.Parse(path.read_bytes(), True)
        return builder.close()
    except (expat.ExpatError, ValueError, AssertionError, LookupError) as error:
        raise DataError(f"{describe(config)}: {path} is no annotation ({error}); copy it again") from error


def _text(element: Element, path: str) -> str:
    return (element.findtext(path) or "").strip()


def _number(element: Element, path: str) -> int:
    text = _text(element, path)
    return int(text) if text.isascii() and text.isdigit() and len(text) < 10 else 0


def _from_zero(box: list[str]) -> list:
    try:
        left, top, right, bottom = map(float, box)
    except ValueError:
        return box
    return [left - 1, top - 1, right, bottom]
