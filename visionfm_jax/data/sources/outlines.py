"""Masks of COCO's "segmentation": polygons, or runs of pixels, packed (as a string) or not.

Polygons are drawn by hotcoco, whose masks equal those of pycocotools to the pixel. Shapes: H W image.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from visionfm_jax.data.sources.record import DamagedRecord

MAX_BYTES = 2**30  # of the masks of an image
MAX_LENGTH = 2**20  # pixels, of a polygon's outline: drawing it takes memory in proportion


def check_number(masks: int, height: int, width: int) -> None:
    """That so many masks fit in memory.

    Raises:
      DamagedRecord: they do not.
    """
    if masks * height * width > MAX_BYTES:
        raise DamagedRecord(f"{masks} masks of {height} x {width} pixels take more than {MAX_BYTES:,} bytes")


def mask_of(outline: bytes, height: int, width: int) -> np.ndarray:
    """The mask, bool (H, W), of a "segmentation" as JSON.

    Raises:
      DamagedRecord: it is none, or of an image of another size.
    """
    content = json.loads(outline)
    if isinstance(content, dict):
        return _of_runs(content, height, width)
    if isinstance(content, list):
        mask = np.zeros((height, width), bool)
        for polygon in content:
            mask |= _of_polygon(polygon, height, width)
        return mask
    raise DamagedRecord(f"a segmentation is {_short(content)}, and must be polygons or runs of pixels")


def _of_polygon(polygon: Any, height: int, width: int) -> np.ndarray:
    from hotcoco import mask

    try:
        points = np.asarray(polygon, np.float64)
    except (TypeError, ValueError, OverflowError):
        points = np.zeros(0)
    if points.ndim != 1 or len(points) < 6 or len(points) % 2 or not np.isfinite(points).all():
        raise DamagedRecord(f"a polygon is {_short(polygon)}, and must be x, y of three points or more")
    corners = points.reshape(-1, 2)
    if np.abs(corners).max() > MAX_LENGTH or np.abs(corners - np.roll(corners, 1, 0)).sum() > MAX_LENGTH:
        raise DamagedRecord(f"a polygon of {_short(polygon)} reaches far beyond its image")
    return mask.decode(mask.fr_poly(points.tolist(), height, width)).astype(bool)


def _of_runs(content: dict[str, Any], height: int, width: int) -> np.ndarray:
    size, runs = content.get("size"), content.get("counts")
    if size != [height, width]:
        raise DamagedRecord(f"a mask has the size {_short(size)}, and its image {height} x {width} pixels")
    runs = unpack(runs) if isinstance(runs, str) else runs
    if not isinstance(runs, list) or not all(type(n) is int and 0 <= n <= height * width for n in runs):
        raise DamagedRecord(f"a mask has the runs {_short(runs)}, and must have numbers of pixels")
    if sum(runs) != height * width:
        raise DamagedRecord(f"a mask has runs of {sum(runs)} pixels together, and its image {height} x {width}")
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(width, height).T  # column by column


def unpack(text: str) -> list[int]:
    """The runs of COCO's packed form: 5 bits a character, low ones first; from the third on, less the one before last.

    Raises:
      DamagedRecord: it is none.
    """
    runs: list[int] = []
    value = shift = 0
    for character in text:
        bits = ord(character) - 48
        if not 0 <= bits < 64 or shift > 60:
            raise DamagedRecord(f"a mask has the packed runs {_short(text)}, which are none")
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        value = shift = 0
    if shift:
        raise DamagedRecord(f"a mask has the packed runs {_short(text)}, which end within a number")
    return runs


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:60] + " …"
