"""Scenes to try detection and segmentation on: bundled emoji on varied backgrounds, scaled, rotated, one over another.

`ScenesConfig(path="noto", split="train")`. The class of an object is its emoji's group. The split `test` shows pictures
of the set's own split `test`, whose concepts are in no scene of `train` of either set (`tools/curate.py`): numbers on
it mean that groups are recognised, not pictures. A recipe that also trains on one set's split `test` is evaluated on
the other set's, which draws the same concepts in another style. All is known to the pixel: a mask is what of an object
is seen, a box encloses it.

A scene is made when it is read, from (seed, split, number) alone and by integers alone, so that it is the same on every
machine: random bits of PCG64, of which NumPy promises that they do not change, and coordinates in parts of 2**-16.
Objects are drawn from the back to the front. One of which too little would be seen is not drawn at all.

Shapes: S side of the scene, h w of a drawn object, N objects.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, NamedTuple

import cv2
import numpy as np

from visionfm_jax.data.images import decode
from visionfm_jax.data.sources.bundled import read_set
from visionfm_jax.data.sources.fingerprint import digest
from visionfm_jax.data.sources.kinds import ScenesConfig
from visionfm_jax.errors import DataError

SETS = ("noto", "twemoji")
SPLITS = ("train", "test")
VERSION = 2  # of what is drawn
PAPER = 236  # what an emoji stands on: all channels this bright, and connected with the edge of the picture
LEAST_SHARE = 8  # one part in so many of its picture an emoji fills, or it is not used
SEEN = 3  # one part in so many of an object is seen, or it is left out
LEAST_PIXELS = 30  # that are seen of an object
ANGLES = 64  # of a full turn, between which a rotation is drawn
TILT = 5  # of these, to either side, by which an object is turned at most
SMALLEST, LARGEST = 30, 60  # hundredths of the scene's side, between which lies what an object's picture takes
UNIT = 16  # bits of a fraction
KEPT = 2**28  # bytes of scenes that are kept in memory


class ScenesSource:
    """Scenes with their objects, or with a class for each pixel."""

    has_captions = False
    most_captions = 0

    def __init__(self, config: ScenesConfig):
        self.name = f"scenes {config.path}/{config.split}"
        if config.path not in SETS:
            raise DataError(f"{self.name}: path must be a set of emoji, {' or '.join(SETS)}; set one, or another kind")
        if config.split not in SPLITS:
            raise DataError(f"{self.name}: no such split; the splits are {', '.join(SPLITS)}")
        arrays, meta = read_set(config.path)
        rows = np.flatnonzero(arrays["split"] == meta["splits"].index(config.split))
        self._config, self._groups = config, len(meta["class_names"])
        self._rows = [rows[arrays["label"][rows] == label].tolist() for label in range(self._groups)]
        maps = config.truth == "class_map"
        self.class_names: tuple[str, ...] | None = (*meta["class_names"], *(["background"] if maps else []))
        self.num_classes = len(self.class_names)
        kinds = {"boxes": ("box_labels",), "masks": ("box_labels", "masks"), "class_map": ("class_map",)}
        self.classes_of = kinds[config.truth]
        self._made: dict[int, dict[str, Any]] = {}  # kept, up to `KEPT`: drawing one takes milliseconds

    def __len__(self) -> int:
        return self._config.scenes

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The scene, uint8 (S, S, 3), and what is known of it (`data.sources.Source`)."""
        if not 0 <= index < len(self):
            raise IndexError(f"{self.name}: scene {index} of {len(self)}")
        if index not in self._made:
            made = self._draw(index)
            if KEPT // sum(array.nbytes for array in made.values()) <= len(self._made):
                return made
            self._made[index] = made
        return {name: array.copy() for name, array in self._made[index].items()}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_made": {}}

    def _draw(self, index: int) -> dict[str, Any]:
        config, side = self._config, self._config.size
        draws = Draws(config.seed, SPLITS.index(config.split), index)
        scene = background(draws, side)
        objects = []
        for _ in range(1 + draws.below(config.most)):
            label = draws.below(self._groups)
            row = self._rows[label][draws.below(len(self._rows[label]))]
            objects.append((label, drawn(config.path, row, draws, side)))
        seen = []
        covered = np.zeros((side, side), bool)
        for label, (pixels, window, whole) in reversed(objects):  # from the front
            if pixels.size == 0:
                continue
            mask = (pixels[..., 3] >= 128) & ~covered[window]
            if (count := int(mask.sum())) * SEEN >= whole and count >= LEAST_PIXELS:
                covered[window] |= mask
                seen.append((label, pixels, window, mask))
        for _, pixels, window, _ in reversed(seen):
            rest = 255 - pixels[..., 3:]
            scene[window] = pixels[..., :3] + (scene[window] * rest + 127) // 255
        return {"image": np.clip(scene, 0, 255).astype(np.uint8), **self._truth(seen)}

    def key(self, index: int) -> str:
        """Its number."""
        return f"scene {index}"

    def fingerprint(self) -> dict[str, str]:
        """Of the pictures, and of what a scene depends on."""
        arrays, _ = read_set(self._config.path)
        about = [getattr(self._config, k) for k in ("split", "truth", "scenes", "size", "most", "seed")]
        return {
            "pictures": digest(*(arrays[k] for k in ("blob", "offsets", "label", "split"))),
            "scenes": f"version {VERSION}, {', '.join(map(str, about))}",
        }

    def _truth(self, seen: list[tuple]) -> dict[str, Any]:
        side = self._config.size
        if self._config.truth == "class_map":
            classes = np.full((side, side), self._groups, np.uint8)
            for label, _, window, mask in seen:
                classes[window][mask] = label
            return {"class_map": classes}
        boxes = [box_of(mask, window) for _, _, window, mask in seen]
        out = {
            "boxes": np.array(boxes, np.float64).reshape(-1, 4),
            "box_labels": np.array([label for label, *_ in seen], np.int32),
            "box_crowd": np.zeros(len(seen), bool),
            "box_areas": np.array([mask.sum() for *_, mask in seen], np.float64),
        }
        if self._config.truth == "masks":
            out["masks"] = np.zeros((len(seen), side, side), bool)
            for whole, (_, _, window, mask) in zip(out["masks"], seen, strict=True):
                whole[window] = mask
        return out


class Draws:
    """Random integers of a scene."""

    def __init__(self, *key: int):
        self._bits = np.random.PCG64(np.random.SeedSequence(key))

    def below(self, n: int) -> int:
        """From 0 to n - 1; n is below 2**31."""
        return (int(self._bits.random_raw()) >> 32) * n >> 32

    def bytes(self, *shape: int) -> np.ndarray:
        """uint8 of a shape."""
        count = math.prod(shape)
        return self._bits.random_raw(-(-count // 8)).astype("<u8").view(np.uint8)[:count].reshape(shape)


class Picture(NamedTuple):
    """An emoji at its own size, at half and at a quarter: colours times opacity, and opacity, uint8 (side, side, 4)."""

    levels: tuple[np.ndarray, ...]


@lru_cache(maxsize=8192)
def picture(name: str, row: int) -> Picture | None:
    """An emoji, cut from the paper it stands on; None: too little of it is left."""
    arrays, _ = read_set(name)
    pixels = decode(arrays["blob"][arrays["offsets"][row] : arrays["offsets"][row + 1]].tobytes())
    paper = np.pad((pixels.min(-1) >= PAPER).astype(np.uint8), 1, constant_values=1)
    cv2.floodFill(paper, None, (0, 0), 2, flags=4)
    own = paper[1:-1, 1:-1] != 2
    if own.sum() * LEAST_SHARE < own.size:
        return None
    opacity = np.where(own, 255, 0).astype(np.uint8)
    level = np.concatenate([pixels * own[..., None], opacity[..., None]], -1)
    levels = [level]
    while len(levels) < 3:
        side = len(level) // 2
        level = ((level.reshape(side, 2, side, 2, 4).sum((1, 3), np.int32) + 2) // 4).astype(np.uint8)
        levels.append(level)
    return Picture(tuple(levels))


def drawn(name: str, row: int, draws: Draws, side: int) -> tuple[np.ndarray, tuple[slice, slice], int]:
    """An emoji at a random size, angle and place.

    Returns:
      Its pixels within the scene, int32 (h, w, 4) with the channels of a `Picture`; where they lie; how many the whole
      of it has.
    """
    # A product of two uniform numbers, so that small objects are more frequent than large ones.
    share = SMALLEST + draws.below(LARGEST - SMALLEST + 1) * (SMALLEST + draws.below(LARGEST)) // (SMALLEST + LARGEST)
    length = max(8, share * side // 100)
    turn = draws.below(2 * TILT + 1) - TILT if draws.below(2) else 0  # half of them stand upright
    mirrored = draws.below(2)
    centre = tuple(side // 8 + draws.below(side * 3 // 4) for _ in range(2))  # row, column
    emoji = picture(name, row)
    if emoji is None:
        return np.zeros((0, 0, 4), np.int32), (slice(0, 0), slice(0, 0)), 0
    level = next((k for k, texels in enumerate(emoji.levels) if len(texels) < 2 * length), len(emoji.levels) - 1)
    texels = emoji.levels[level]
    cos, sin = (round(f(2 * math.pi * turn / ANGLES) * 2**UNIT) for f in (math.cos, math.sin))
    reach = (length * (abs(cos) + abs(sin)) >> (UNIT + 1)) + 2
    offsets = 2 * np.arange(-reach, reach, dtype=np.int64) + 1  # half pixels
    # Place on the picture of each pixel's centre, in texels of 2**-UNIT, less half a texel.
    scale = len(texels)
    across = (cos * offsets[None, :] + sin * offsets[:, None]) * scale // (2 * length)
    down = (cos * offsets[:, None] - sin * offsets[None, :]) * scale // (2 * length)
    across = -across if mirrored else across
    half = (scale - 1) << (UNIT - 1)
    made = sampled(texels, down + half, across + half)
    top, left = centre[0] - reach, centre[1] - reach
    rows, columns = (slice(max(0, a), min(side, a + 2 * reach)) for a in (top, left))
    whole = int((made[..., 3] >= 128).sum())
    return made[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left], (rows, columns), whole


def sampled(texels: np.ndarray, down: np.ndarray, across: np.ndarray) -> np.ndarray:
    """Bilinear, int32 (h, w, 4), at places (h, w) in texels of 2**-UNIT; nothing lies beyond the edges."""
    padded = np.pad(texels, ((2, 2), (2, 2), (0, 0))).reshape(-1, 4)
    width = len(texels) + 4
    down, across = (np.clip(at + (2 << UNIT), 0, ((width - 1) << UNIT) - 1) for at in (down, across))
    first = (down >> UNIT) * width + (across >> UNIT)
    y, x = (((at >> (UNIT - 8)) & 255).astype(np.int32)[..., None] for at in (down, across))
    upper = padded[first] * (256 - x) + padded[first + 1] * x
    lower = padded[first + width] * (256 - x) + padded[first + width + 1] * x
    return (upper * (256 - y) + lower * y + (1 << 15)) >> 16


def background(draws: Draws, side: int) -> np.ndarray:
    """int32 (S, S, 3): a light field of colours, with stripes, checks or blotches, and noise."""
    cells = 1 + draws.below(5)
    base = 160 + draws.bytes(3).astype(np.int32) // 4
    field = base + smooth(draws.bytes(cells + 1, cells + 1, 3).astype(np.int32) // 4, side)
    kind = draws.below(4)
    period, tilt = 4 + draws.below(side // 4), draws.below(5) - 2
    strength = draws.bytes(3).astype(np.int32) // 8 - 16
    y, x = np.arange(side)[:, None], np.arange(side)[None, :]
    if kind == 1:
        field = field + strength * ((((2 * x + tilt * y) // period) % 2)[..., None])
    elif kind == 2:
        field = field + strength * ((x // period + y // period) % 2)[..., None]
    elif kind == 3:
        fine = smooth(draws.bytes(side // 4 + 1, side // 4 + 1, 3).astype(np.int32), side)
        field = field + (fine - 128) // 8
    noise = draws.bytes(side, side).astype(np.int32) - 128
    return np.clip(field + noise[..., None] * draws.below(12) // 128, 0, 255)


def smooth(grid: np.ndarray, side: int) -> np.ndarray:
    """Bilinear, int32 (S, S, 3), between the points of a grid (n, n, 3) whose corners are those of the scene."""
    cells = len(grid) - 1
    at = (2 * np.arange(side) + 1) * cells * 128 // side  # 2**-8 of a cell
    first, part = at >> 8, (at & 255).astype(np.int32)
    rows = grid[first] * (256 - part)[:, None, None] + grid[first + 1] * part[:, None, None]
    part = part[None, :, None]
    return (rows[:, first] * (256 - part) + rows[:, first + 1] * part + (1 << 15)) >> 16


def box_of(mask: np.ndarray, window: tuple[slice, slice]) -> tuple[int, int, int, int]:
    """Left, top, right and bottom edge of a mask that lies at `window`."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    top, left = window[0].start, window[1].start
    return left + int(columns[0]), top + int(rows[0]), left + int(columns[-1]) + 1, top + int(rows[-1]) + 1
