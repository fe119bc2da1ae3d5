"""Micro-batches: gradients one after another, and a loss over the whole batch in spite of them.

Shapes: B rows of this device, b = B / n of them in one of n micro-batches.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange

from visionfm_jax.parallel.context import Context

Tree = Any
# (params, local batch, context) -> mean loss, per-sample arrays, and arrays whose mean over all is wanted
LossFn = Callable[[Tree, dict, Context], tuple[jax.Array, dict, dict]]
COTANGENT = "cotangent"  # key in a batch beside the rows


class GradCache(NamedTuple):
    """A loss of which a part compares all rows of the batch; `tasks.task.ContrastTask` has the same, explained."""

    embed: Callable[[Tree, dict, Context], dict]  # (params, rows, context) -> what is compared, arrays with rows first
    forward: Callable[[Tree, dict, Context], tuple[dict, dict, dict]]  # the same, and the last two results of a LossFn
    contrast: Callable[[dict, Context], jax.Array]  # what is compared -> a loss for each of its rows
    weight: float  # of the mean of these
    join: Callable[[dict, jax.Array], dict]  # per-sample arrays, losses of `contrast` -> per-sample arrays


def to_micro_batches(batch: Tree, accumulate: int) -> Tree:
    """Rows (B, …) to (n, b, …), in order."""
    return jax.tree.map(lambda a: rearrange(a, "(n b) ... -> n b ...", n=accumulate), batch)


def from_micro_batches(batches: Tree) -> Tree:
    """The reverse of `to_micro_batches`."""
    return jax.tree.map(lambda a: rearrange(a, "n b ... -> (n b) ..."), batches)


def accumulate_gradients(micro: Callable[[dict], tuple[dict, Tree]], batch: dict, accumulate: int) -> tuple[dict, Tree]:
    """Per-sample outputs in batch order and the fp32 sum of all else over `accumulate` micro-batches.

    Args:
      micro: from rows (b, …) to per-sample outputs, and what is summed: gradients and the like.
      batch: rows (B, …).
      accumulate: n, divides B.
    """
    if accumulate == 1:
        return micro(batch)
    batches = to_micro_batches(batch, accumulate)
    shapes = jax.eval_shape(lambda b: micro(jax.tree.map(lambda a: a[0], b))[1], batches)

    def body(total: Tree, rows: dict) -> tuple[Tree, dict]:
        per_sample, grads = micro(rows)
        return jax.tree.map(lambda t, g: t + g.astype(jnp.float32), total, grads), per_sample

    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, jnp.float32), shapes)
    total, per_sample = jax.lax.scan(body, zeros, batches)
    return from_micro_batches(per_sample), total


def with_grad_cache(
    loss: GradCache, params: Tree, batch: dict, accumulate: int, context: Context
) -> tuple[dict, LossFn, Callable[[dict], dict]]:
    """Make a loss over the whole batch one of micro-batches (Gao et al. 2021, "GradCache").

    First all rows are embedded, a micro-batch at a time and without gradient. Then the embeddings are compared, and
    the gradient of that with respect to each of them found: all that a micro-batch needs to know of the others. Its
    product with the embedding, made again with the same random draws, has the gradient of the whole loss. Memory
    grows with the micro-batch; of the whole batch only embeddings are held.

    Args:
      loss: of the rows.
      params: usable parameters.
      batch: rows (B, …).
      accumulate: n.
      context: of the step.

    Returns:
      The batch with its cotangents; the loss of a micro-batch of it, whose per-sample arrays are those of `forward`;
      and what makes those of all micro-batches, (B, …), the ones of `join`.
    """
    batches = to_micro_batches(batch, accumulate)
    embedded = from_micro_batches(jax.lax.map(lambda rows: loss.embed(params, rows, context), batches))

    def mean(embedded: dict) -> tuple[jax.Array, jax.Array]:
        losses = loss.contrast(embedded, context)
        return loss.weight * losses.mean(), losses

    cotangents, losses = jax.grad(mean, has_aux=True)(embedded)

    def micro(params: Tree, rows: dict, context: Context) -> tuple[jax.Array, dict, dict]:
        rows, cotangents = {k: v for k, v in rows.items() if k != COTANGENT}, rows[COTANGENT]
        again, per_sample, means = loss.forward(params, rows, context)
        products = jax.tree.map(lambda e, c: jnp.vdot(e, c), again, cotangents)
        # The mean over the device's rows is `accumulate` times as much in the mean over a micro-batch's.
        return per_sample["loss"].mean() + accumulate * sum(jax.tree.leaves(products)), per_sample, means

    return {**batch, COTANGENT: cotangents}, micro, lambda per_sample: loss.join(per_sample, losses)
