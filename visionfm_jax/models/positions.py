"""Positions of the patches of an image: tables at another resolution than their own, and rotary positions.

Shapes: h w patches of an image, T tokens, D width, K head dim.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from visionfm_jax.models.layers import Rotation

ANTIALIASED = {"bicubic_antialias": "cubic", "bilinear_antialias": "linear"}


def resize_table(table: jax.Array, grid: tuple[int, int], how: str) -> jax.Array:
    """A position table (h, w, D), fp32, for another grid.

    Args:
      table: (h, w, D).
      grid: its new height and width.
      how: `bicubic_antialias`, as timm and DINOv2 with registers, `bilinear_antialias`, as SigLIP 2 at native aspect
        ratios, `bicubic`, without antialiasing, as transformers' other models, or `bicubic_offset`, the same as
        DINOv2's own code has it, whose steps between samples are those of a grid larger by 0.1.
    """
    table = table.astype(jnp.float32)
    if how in ANTIALIASED:
        return jax.image.resize(table, (*grid, table.shape[-1]), ANTIALIASED[how], antialias=True)
    offset = 0.1 if how == "bicubic_offset" else 0.0
    rows, columns = (cubic_matrix(old, new, offset) for old, new in zip(table.shape, grid, strict=False))
    return jnp.einsum("Hh,Ww,hwd->HWd", rows, columns, table, precision=jax.lax.Precision.HIGHEST)


def cubic_matrix(old: int, new: int, offset: float = 0.0) -> np.ndarray:
    """The matrix (new, old) of bicubic interpolation along one side, fp32, as torch has it without antialiasing.

    Keys' kernel (1981) with a = -0.75, whose samples beyond the ends are the ends.
    """
    at = (np.arange(new) + 0.5) * old / (new + offset) - 0.5
    matrix, a = np.zeros((new, old)), -0.75
    for tap in range(-1, 3):
        index = np.floor(at).astype(int) + tap
        x = np.abs(at - index)
        near, far = ((a + 2) * x - (a + 3)) * x * x + 1, a * (((x - 5) * x + 8) * x - 4)
        np.add.at(matrix, (np.arange(new), index.clip(0, old - 1)), np.where(x <= 1, near, far))
    return matrix.astype(np.float32)


def rotation(grid: tuple[int, int], first: int, head_dim: int, theta: float) -> Rotation:
    """Rotary positions in two dimensions (Simeoni et al. 2025, "DINOv3"), with `first` tokens that are not turned.

    A patch's centre lies in [-1, 1] along each side, whatever their lengths. A quarter of the channels, K / 4, turns
    with its height, a quarter with its width, by 2 pi times the coordinate over periods from 1 to `theta`.

    Returns:
      (T, 1, K) each.
    """
    periods = theta ** (np.arange(head_dim // 4) / (head_dim // 4))
    sides = [2 * (np.arange(side) + 0.5) / side - 1 for side in grid]
    centres = np.stack(np.meshgrid(*sides, indexing="ij"), -1).reshape(-1, 2)
    angles = np.tile((2 * np.pi * centres[:, :, None] / periods).reshape(len(centres), -1), 2)
    angles = np.concatenate([np.zeros((first, head_dim)), angles])[:, None]
    return Rotation(np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32))
