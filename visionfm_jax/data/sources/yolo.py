"""YOLO's objects: a text file for each image, images/…/NAME.jpg beside labels/…/NAME.txt, and data.yaml at PATH.

A line is `class x y width height`, centre and size, or `class x1 y1 x2 y2 x3 y3 …`, a polygon, of which the box that
encloses it is taken; all relative to the width and height of the upright image, as Ultralytics reads them. data.yaml
has `names` and, for each split, a folder, a text file of images or a list of these, below PATH; its `path` does not
count. An image without a text file has no object.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import yaml

from visionfm_jax.data.sources.annotated import AnnotatedFiles, Objects
from visionfm_jax.data.sources.kinds import YoloConfig
from visionfm_jax.data.sources.layout import IMAGE_SUFFIXES, check_path, describe, misfit, no_split
from visionfm_jax.data.sources.places import Place, below
from visionfm_jax.data.sources.store import side_by_side
from visionfm_jax.errors import DataError, one_line, printable

MAX_BYTES = 2**24  # of data.yaml
TAGS = (AttributeError, LookupError, TypeError)  # what PyYAML raises where a tag does not suit a value, as `!!int ""`


class _Loader(yaml.SafeLoader):
    """Without aliases, by which a few lines stand for endless tables."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.composer.ComposerError(None, None, "it has aliases", self.peek_event().start_mark)
        return super().compose_node(parent, index)


def open_yolo(config: YoloConfig) -> AnnotatedFiles:
    """The images of a split with their objects.

    Raises:
      DataError: another layout, no such split, or images that are missing.
    """
    path = check_path(config)
    if not (path / config.file).is_file():
        raise misfit(config, f"PATH/{config.file}")
    content = _yaml(config, path / config.file)
    splits = [k for k in ("train", "val", "test") if content.get(k)]
    if not content.get(config.split):
        raise no_split(config, splits)
    names, found = content.get("names"), content[config.split]
    if isinstance(names, dict) and sorted(names, key=str) == sorted(range(len(names)), key=str):
        names = [names[i] for i in range(len(names))]
    if not isinstance(names, list) or not names or not all(isinstance(n, str | int) for n in names):
        raise DataError(f"{describe(config)}: {config.file} lacks names, of the classes from 0 on; add them")
    if content.get("nc", len(names)) != len(names):
        raise DataError(f"{describe(config)}: {config.file} has {len(names)} names and nc: {content['nc']}; mend one")
    files = [file for entry in (found if isinstance(found, list) else [found]) for file in _files(config, path, entry)]
    if not files:
        raise DataError(f"{describe(config)}: {printable(str(found))} holds no image; set another split")
    objects = Objects()
    texts = side_by_side(lambda file: _text(path / _labels(file)), files)
    for i, (file, text) in enumerate(zip(files, texts, strict=True)):
        _read(text, file, i, len(names), objects)
    return AnnotatedFiles(config, path, files, objects, [str(n) for n in names], relative=True)


def _yaml(config: YoloConfig, path: Place) -> dict[str, Any]:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"more than {MAX_BYTES:,} bytes")
        content = yaml.load(path.read_text(encoding="utf-8-sig"), _Loader)  # a SafeLoader
    except (yaml.YAMLError, ValueError, RecursionError, *TAGS) as error:
        raise DataError(f"{describe(config)}: {path} is no YAML ({one_line(error)}); copy it again") from error
    if not isinstance(content, dict):
        raise DataError(f"{describe(config)}: {path} is no table of names and splits; copy it again")
    return content


def _files(config: YoloConfig, root: Place, entry: Any) -> list[str]:
    """Images of an entry of a split, below `root`, sorted; or as a text file lists them.

    Raises:
      DataError: it is no folder or text file below `root`.
    """
    text = str(entry)
    # Exports of Roboflow write ../train/images for what lies beside the file.
    tried = [text, text.removeprefix("../")]
    for candidate in tried:
        folder = os.path.normpath(candidate)
        if not os.path.isabs(folder) and folder.split("/")[0] != ".." and "\0" not in folder:
            place = root / folder
            if place.exists():
                break
    else:
        raise DataError(
            f"{describe(config)}: {config.file} names {printable(text)!r} for {config.split}, which is no folder or "
            "file below the path; mend it"
        )
    if place.is_dir():
        found = (os.path.normpath(os.path.join(folder, file)) for file in below(place))
        return sorted(file for file in found if os.path.splitext(file)[1].lower() in IMAGE_SUFFIXES)
    lines = place.read_text(encoding="utf-8-sig", errors="replace").splitlines()
    if any("\0" in line for line in lines):
        raise DataError(f"{describe(config)}: {printable(str(place))} is no list of images; set another split")
    base = os.path.dirname(folder)
    listed = (line.strip() for line in lines if line.strip())
    return [os.path.normpath(os.path.join(base, f) if f.startswith("./") else f) for f in listed]


def _labels(file: str) -> str:
    """images/…/NAME.jpg -> labels/…/NAME.txt, by the last folder of that name."""
    parts = file.split("/")
    for i in range(len(parts) - 2, -1, -1):
        if parts[i] == "images":
            parts[i] = "labels"
            break
    return os.path.splitext("/".join(parts))[0] + ".txt"


def _text(path: Place) -> str:
    """Of a file of objects; empty: there is none."""
    try:
        return path.read_text(encoding="utf-8-sig", errors="replace")
    except (FileNotFoundError, NotADirectoryError):
        return ""


def _read(text: str, file: str, image: int, classes: int, objects: Objects) -> None:
    for k, line in enumerate(text.splitlines()):
        if not (words := line.split()):
            continue
        where = f"{file} line {k + 1}"
        try:
            label, *numbers = float(words[0]), *map(float, words[1:])
        except ValueError:
            objects.leave("lines that are not numbers", where)
            continue
        if not label.is_integer() or not 0 <= label < classes:
            objects.leave("objects of unknown classes", f"{where} (class {words[0]})")
        elif len(numbers) == 4:
            x, y, w, h = numbers
            objects.add(image, int(label), (x - w / 2, y - h / 2, x + w / 2, y + h / 2), where, (1.0, 1.0))
        elif len(numbers) >= 6 and len(numbers) % 2 == 0:
            points = np.reshape(numbers, (-1, 2))
            objects.add(image, int(label), (*points.min(0), *points.max(0)), where, (1.0, 1.0))  # NaN stays NaN
        else:
            objects.leave("lines that are neither a box nor a polygon", where)
