"""Boxes, in pixels: by corners (left, top, right, bottom), as data and detections have them, or by centres.

By centres (x, y, width, height) they are predicted from one another ("reparametrised", Lin et al. 2023, "Plain-DETR"):
`deltas` are the change of a reference, relative to its size. Where this differs from the published code: sizes below a
pixel count as one, both ways; there 0.1 pixel is added one way.

Shapes: Q queries, C classes.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

MOST_SCALING = math.log(1000 / 16)  # of a side in one step, in logarithms


class Predicted(NamedTuple):
    """What queries say of an image."""

    logits: jax.Array  # (…, Q, C)
    deltas: jax.Array  # (…, Q, 4), by which `reference` becomes `boxes`
    reference: jax.Array  # (…, Q, 4), by centres
    boxes: jax.Array  # (…, Q, 4), by centres


def to_corners(boxes: jax.Array) -> jax.Array:
    """Boxes (…, 4) by centres to boxes by corners."""
    centre, size = boxes[..., :2], boxes[..., 2:]
    return jnp.concatenate([centre - size / 2, centre + size / 2], -1)


def to_centres(boxes: jax.Array) -> jax.Array:
    """Boxes (…, 4) by corners to boxes by centres."""
    first, last = boxes[..., :2], boxes[..., 2:]
    return jnp.concatenate([(first + last) / 2, last - first], -1)


def encode(boxes: jax.Array, reference: jax.Array) -> jax.Array:
    """What makes `boxes` of `reference`, both (…, 4) by centres: the reverse of `decode`."""
    size, own = (jnp.maximum(b[..., 2:], 1) for b in (boxes, reference))
    return jnp.concatenate([(boxes[..., :2] - reference[..., :2]) / own, jnp.log(size / own)], -1)


def decode(deltas: jax.Array, reference: jax.Array, size: jax.Array) -> jax.Array:
    """Boxes (…, 4) by centres, clipped to an image.

    Args:
      deltas: (…, 4), of the centre, in sides of the reference, and of the logarithm of the sides.
      reference: (…, 4), by centres.
      size: (…, 2), height and width of the image.
    """
    own = jnp.maximum(reference[..., 2:], 1)
    scaling = jnp.exp(jnp.clip(deltas[..., 2:], -MOST_SCALING, MOST_SCALING))
    boxes = jnp.concatenate([reference[..., :2] + own * deltas[..., :2], own * scaling], -1)
    limit = jnp.concatenate([size[..., ::-1]] * 2, -1).astype(boxes.dtype)
    return to_centres(jnp.clip(to_corners(boxes), 0, limit))


def giou(a: jax.Array, b: jax.Array) -> jax.Array:
    """Generalised intersection over union (Rezatofighi et al. 2019) of boxes (…, 4) by corners, (…)."""

    def area(first: jax.Array, last: jax.Array) -> jax.Array:
        sides = jnp.maximum(last - first, 0)
        return sides[..., 0] * sides[..., 1]

    both = area(jnp.maximum(a[..., :2], b[..., :2]), jnp.minimum(a[..., 2:], b[..., 2:]))
    around = area(jnp.minimum(a[..., :2], b[..., :2]), jnp.maximum(a[..., 2:], b[..., 2:]))
    union = area(a[..., :2], a[..., 2:]) + area(b[..., :2], b[..., 2:]) - both
    tiny = 1e-9  # two points in one place
    return both / jnp.maximum(union, tiny) - (around - union) / jnp.maximum(around, tiny)
