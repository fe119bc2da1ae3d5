"""Weights for another patch size, or for images of another size.

Shapes: P side of a patch in pixels, h w patches of an image, T rows of a table, D width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from visionfm_jax.config.limits import HeightWidth
from visionfm_jax.models.backbones.vit import table_first, table_grid
from visionfm_jax.models.positions import resize_table

LARGEST = 64  # pixels, side of patches that are resampled: time grows by its sixth power, memory by its fourth


class Way(NamedTuple):
    """A way from an array to one of another shape."""

    apply: Callable[[np.ndarray], np.ndarray]
    what: str  # for people


def way(
    name: str, there: tuple[int, ...], here: tuple[int, ...], network: Any, grid: HeightWidth | None = None
) -> Way | None:
    """How an array of a network becomes what it is here; None: it is that, or there is no way.

    Args:
      name: its path in the network's parameters.
      there, here: its shapes.
      network: its configuration here.
      grid: patches (h, w) of the images that a position table there is for; None, or another number of them: it is
        for squares, if that may be.
    """
    if len(there) != 2 or len(here) != 2 or there[1] != here[1]:
        return None
    if name == "embed/kernel" and hasattr(network, "patch_size"):
        old, new = (math.isqrt(shape[0] // 3) for shape in (there, here))
        fits = (3 * old**2, 3 * new**2) == (there[0], here[0]) and 0 < old != new
        if fits and max(old, new) <= LARGEST:
            return Way(lambda kernel: resize_patches(kernel, new), f"patches of {old} to {new} pixels (pseudo-inverse)")
    if name == "pos_embed" and hasattr(network, "pos_resize"):
        first, how = table_first(network), network.pos_resize
        known = grid is not None and math.prod(grid) == there[0] - first
        old, new = grid if known else square_grid(there[0] - first), table_grid(network)
        fits = old and (math.prod(old) + first, math.prod(new) + first) == (there[0], here[0])
        if fits and old != new:
            what = f"{old[0]} x {old[1]} to {new[0]} x {new[1]} positions ({how})"
            return Way(lambda table: resize_positions(table, old, new, how), what)
    if name == "pos_embed" and hasattr(network, "context") and here[0] < there[0]:
        return Way(lambda table: table[: here[0]], f"the first {here[0]} of {there[0]} positions of a text")
    return None


def square_grid(patches: int) -> HeightWidth | None:
    """That of a square image of so many patches; None: there is none."""
    side = math.isqrt(max(patches, 0))
    return (side, side) if patches > 0 and side**2 == patches else None


def resize_positions(table: np.ndarray, old: HeightWidth, new: HeightWidth, how: str) -> np.ndarray:
    """A position table (T, D) of h x w = `old` patches for `new`; the first rows, which are not of patches, stay."""
    first = len(table) - math.prod(old)
    grid = resize_table(table[first:].reshape(*old, -1), new, how)
    return np.concatenate([table[:first], np.asarray(grid).reshape(math.prod(new), -1)])


def resize_patches(kernel: np.ndarray, side: int) -> np.ndarray:
    """A patch embedding (P P 3, D), rows h, w, c, for patches of `side` pixels: (side side 3, D), fp32.

    The one whose products with resized patches are, in the mean over white noise, nearest to those of the old with the
    patches before: of larger patches they are equal (Beyer et al. 2023, "FlexiViT", section 3.4). Patches are
    resized as timm does, bicubic with antialiasing.
    """
    old = math.isqrt(kernel.shape[0] // 3)
    pixels = np.eye(old**2, dtype=np.float32).reshape(old, old, -1)
    resize = np.asarray(resize_table(pixels, (side, side), "bicubic_antialias"), np.float64).reshape(side**2, old**2)
    weights = kernel.astype(np.float64).reshape(old**2, -1)
    return (np.linalg.pinv(resize.T) @ weights).reshape(side**2 * 3, -1).astype(np.float32)
