"""Masks of images and texts, and the loss of reconstructed pixels.

Shapes: B batch, H W image, h w its units or patches, T tokens, V vocabulary.
"""

from __future__ import annotations

import math

import chex
import jax
import jax.numpy as jnp
from einops import rearrange

BLOCKS, BLOCK_RATIO = 40, 1 / 0.3  # of `hide_blocks`: rectangles that are tried, and the largest ratio of their sides


def hide_units(keys: jax.Array, grid: tuple[int, int], ratio: float) -> jax.Array:
    """Which of the units of an image, `grid` = (h, w), are hidden, (B, h, w) bool: as many of each, rounded up.

    By keys (B,), as Xie et al. 2022 ("SimMIM") draw them.
    """
    units = math.prod(grid)
    draws = jax.vmap(lambda key: jax.random.uniform(key, (units,)))(keys)
    return rearrange(_places(draws) < math.ceil(ratio * units), "b (h w) -> b h w", h=grid[0])


def hide_blocks(keys: jax.Array, grid: tuple[int, int], share: tuple[float, float]) -> jax.Array:
    """Which patches of an image are hidden, (B, h, w) bool, most of them in rectangles (Bao et al. 2022, "BEiT").

    The number is a share of all, uniform in `share`. Rectangles of 4 patches or more, the logarithm of whose ratio of
    sides is uniform, are laid down where they do not hide too much; what is missing in the end is hidden at random.

    Args:
      keys: (B,).
      grid: h, w.
      share: the least and the largest.
    """
    (h, w), (low, high) = grid, share
    rows, columns = jnp.arange(h)[:, None], jnp.arange(w)

    def one(key: jax.Array) -> jax.Array:
        first, last, key = jax.random.split(key, 3)
        number = jnp.floor(jax.random.uniform(first, minval=low, maxval=high) * h * w)
        number = jnp.minimum(number, math.floor(high * math.prod(grid)))  # fp32 may round up

        def add(i: int, hidden: jax.Array) -> jax.Array:
            area, ratio, top, left = jax.random.uniform(jax.random.fold_in(key, i), (4,))
            missing = number - hidden.sum()
            area = 4 + area * jnp.maximum(missing - 4, 0)
            ratio = jnp.exp((2 * ratio - 1) * math.log(BLOCK_RATIO))
            height, width = jnp.round(jnp.sqrt(area * ratio)), jnp.round(jnp.sqrt(area / ratio))
            top, left = jnp.floor(top * (h - height + 1)), jnp.floor(left * (w - width + 1))
            inside = (rows >= top) & (rows < top + height) & (columns >= left) & (columns < left + width)
            more = hidden | inside
            fits = (height <= h) & (width <= w) & (more.sum() <= number)
            return jnp.where(fits, more, hidden)

        hidden = jax.lax.fori_loop(0, BLOCKS, add, jnp.zeros((h, w), bool))
        draws = jax.random.uniform(last, (1, h * w)) - hidden.reshape(1, -1)
        return (_places(draws) < number).reshape(h, w)

    return jax.vmap(one)(keys)


def hide_words(keys: jax.Array, lengths: jax.Array, width: int, ratio: float) -> jax.Array:
    """Which tokens of texts are hidden, (B, T) bool: of each text the share `ratio`, but one at least.

    Tokens of begin (the first) and end (the last of `lengths` (B,)) never are; T = `width`.
    """
    words = jnp.arange(width)[None] < lengths[:, None] - 1
    words = words & (jnp.arange(width) > 0)
    draws = jax.vmap(lambda key: jax.random.uniform(key, (width,)))(keys)
    count = jnp.maximum(jnp.round(ratio * words.sum(1)), 1)
    return words & (_places(jnp.where(words, draws, 2)) < count[:, None])


def _places(draws: jax.Array) -> jax.Array:
    """The place of each draw among those of its row, from 0."""
    return jnp.argsort(jnp.argsort(draws, 1), 1)


def enlarge(units: jax.Array, times: int) -> jax.Array:
    """(B, h, w) to (B, times h, times w)."""
    return jnp.repeat(jnp.repeat(units, times, 1), times, 2)


def pixel_loss(reconstructed: jax.Array, images: jax.Array, hidden: jax.Array) -> jax.Array:
    """Mean absolute difference over the hidden pixels (Xie et al. 2022, equation 1).

    Args:
      reconstructed, images: (B, H, W, 3), fp32.
      hidden: (B, H, W) bool.

    Returns:
      (B,), fp32.
    """
    chex.assert_rank(images, 4)
    chex.assert_equal_shape([reconstructed, images])
    chex.assert_shape(hidden, images.shape[:3])
    difference = jnp.abs(reconstructed - images).mean(-1) * hidden
    return difference.sum((1, 2)) / jnp.maximum(hidden.sum((1, 2)), 1)
