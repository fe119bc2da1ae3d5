"""Losses of detectors that predict a set of boxes (Carion et al. 2020, "DETR"; Lin et al. 2023, "Plain-DETR").

Each object of an image is matched with one query, by the matching of least total cost, or with several (Jia et al.
2023, "hybrid matching"). Matched queries learn class and box, the others that there is nothing. In fp32, for one image;
`jax.vmap` gives batches and layers. Boxes are in pixels (`models.boxes`).

Shapes: Q queries, M objects that an image may have, C classes.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from visionfm_jax.models.boxes import Predicted, encode, giou, to_centres, to_corners

ALPHA, GAMMA = 0.25, 2  # of the focal loss (Lin et al. 2017, "RetinaNet")
FEW = 32  # objects, of which any number is matched by one program: it takes less time than others take to compile
UNLIKELY, NEVER = 1e6, 1e8  # costs: beyond all that are finite, and of what must not be


class Weights(NamedTuple):
    """The weights of the parts of a loss, and of the costs of matching."""

    classes: float
    boxes: float
    giou: float


class Truth(NamedTuple):
    """The objects of an image."""

    boxes: jax.Array  # (…, M, 4), by corners
    labels: jax.Array  # (…, M)
    present: jax.Array  # (…, M) bool


def focal_loss(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Focal loss (Lin et al. 2017, "RetinaNet") of each logit; `targets`, of the same shape, are 0 or 1."""
    chex.assert_equal_shape([logits, targets])
    present = ALPHA * jax.nn.sigmoid(-logits) ** GAMMA * jax.nn.softplus(-logits)
    absent = (1 - ALPHA) * jax.nn.sigmoid(logits) ** GAMMA * jax.nn.softplus(logits)
    return targets * present + (1 - targets) * absent


def matching_costs(predicted: Predicted, truth: Truth, weights: Weights) -> jax.Array:
    """What it costs to match each object with each query, (M, Q): the loss of the class, of the box, and -GIoU."""
    logits = predicted.logits[:, truth.labels].T
    classes = focal_loss(logits, jnp.ones_like(logits)) - focal_loss(logits, jnp.zeros_like(logits))
    wanted = encode(to_centres(truth.boxes)[:, None], predicted.reference)
    boxes = jnp.abs(predicted.deltas - wanted).sum(-1)
    overlap = giou(truth.boxes[:, None], to_corners(predicted.boxes))
    return weights.classes * classes + weights.boxes * boxes - weights.giou * overlap


def match(costs: jax.Array, present: jax.Array, count: jax.Array | None = None) -> jax.Array:
    """The query (M,) of each object, by which the sum of costs is least and no query has two objects.

    By optax's Hungarian algorithm, which takes M steps and more one after another.

    Args:
      costs: (M, Q), M <= Q; what is not finite counts as larger than all that is.
      present: (M,) bool; the result of the others is any.
      count: scalar, the same for all of a batch under `jax.vmap`: those that are present are among the first so many.
        Few take fewer steps.
    """
    M = len(costs)
    if count is None or M <= FEW:
        return _match(M, costs, present)
    sizes = sorted({max(1, M // 8), max(1, M // 2), M})
    branches = [functools.partial(_match, size) for size in sizes]
    return jax.lax.switch(sum(count > size for size in sizes[:-1]), branches, costs, present)


def _match(first: int, costs: jax.Array, present: jax.Array) -> jax.Array:
    """`match` of the first objects."""
    (M, Q), absent = costs.shape, ~present[:first, None]
    costs = jnp.nan_to_num(costs[:first], nan=UNLIKELY, posinf=UNLIKELY, neginf=UNLIKELY)
    costs = jnp.where(absent, NEVER, jnp.clip(costs, -UNLIKELY, UNLIKELY))
    # Each that is absent has a column of its own, which takes it one step to find.
    own = jnp.where(absent & jnp.eye(first, dtype=bool), 0, NEVER)
    objects, columns = optax.assignment.hungarian_algorithm(jnp.concatenate([costs, own], 1))
    return jnp.zeros(M, jnp.int32).at[objects].set(jnp.minimum(columns, Q - 1).astype(jnp.int32))


def set_losses(
    predicted: Predicted,
    truth: Truth,
    weights: Weights,
    copies: int = 1,
    valid: jax.Array | None = None,
    count: jax.Array | None = None,
) -> dict[str, jax.Array]:
    """The parts of an image's loss, summed over queries and objects, before they are weighted.

    Args:
      predicted: of the image.
      truth: of the image.
      weights: of the costs by which they are matched.
      copies: how many queries each object is matched with; Q >= M * copies.
      valid: (Q,) bool, queries that count; None: all.
      count: of `match`, before objects are copied.

    Returns:
      `class`, `box` and `giou`.
    """
    costs = jax.lax.stop_gradient(matching_costs(predicted, truth, weights))
    if valid is not None:
        costs = jnp.where(valid, costs, UNLIKELY)
    costs, truth = jax.tree.map(lambda a: jnp.repeat(a, copies, 0), (costs, truth))
    query = match(costs, truth.present, None if count is None else count * copies)
    targets = jnp.zeros_like(predicted.logits).at[query, truth.labels].max(truth.present.astype(jnp.float32))
    classes = focal_loss(predicted.logits, targets)
    if valid is not None:
        classes = jnp.where(valid[:, None], classes, 0)
    matched = jax.tree.map(lambda a: a[query], predicted)
    boxes = jnp.abs(matched.deltas - encode(to_centres(truth.boxes), matched.reference)).sum(-1)
    apart = 1 - giou(truth.boxes, to_corners(matched.boxes))
    return {
        "class": classes.sum(),
        "box": jnp.where(truth.present, boxes, 0).sum(),
        "giou": jnp.where(truth.present, apart, 0).sum(),
    }
