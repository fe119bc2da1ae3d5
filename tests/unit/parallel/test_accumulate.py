"""A loss over all rows, made one of micro-batches, beside the same loss taken whole."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from visionfm_jax.parallel.accumulate import (
    GradCache,
    accumulate_gradients,
    from_micro_batches,
    to_micro_batches,
    with_grad_cache,
)
from visionfm_jax.parallel.context import Context

ROWS, WEIGHT = 8, 0.5


def embed(params: dict, rows: dict, context: Context) -> dict:
    return {"image": rows["x"] @ params["w"] - context.state["centre"], "text": rows["y"] @ context.teacher["v"]}


def forward(params: dict, rows: dict, context: Context) -> tuple[dict, dict, dict]:
    features = rows["x"] @ params["w"]
    return embed(params, rows, context), {"loss": features.sum(1) ** 2}, {"centre": features.mean(0)}


def contrast(embedded: dict, context: Context) -> jax.Array:
    """Also against a queue of earlier texts."""
    others = jnp.concatenate([embedded["text"], context.state["queue"]])
    logits = embedded["image"] @ others.T
    return jax.nn.logsumexp(logits, 1) - jnp.diagonal(logits)


def join(per_sample: dict, losses: jax.Array) -> dict:
    return {"loss": per_sample["loss"] + WEIGHT * losses, "contrastive": losses}


def whole(params: dict, rows: dict, context: Context) -> tuple[jax.Array, tuple[dict, dict]]:
    embedded, per_sample, means = forward(params, rows, context)
    per_sample = join(per_sample, contrast(embedded, context))
    return per_sample["loss"].mean(), (per_sample, means)


@pytest.mark.parametrize("accumulate", [1, 2, 8])
def test_losses_and_gradients_are_those_of_the_whole_batch(accumulate):
    rng = np.random.default_rng(0)
    params, teacher = (
        {name: jnp.asarray(rng.normal(size=(3, 4)), jnp.float32) for name in ("w", "v")} for _ in range(2)
    )
    state = {"centre": jnp.asarray(rng.normal(size=4), jnp.float32), "queue": jnp.ones((5, 4))}
    context = Context(jnp.int32(0), teacher, state)
    batch = {name: jnp.asarray(rng.normal(size=(ROWS, 3)), jnp.float32) for name in ("x", "y")}
    loss = GradCache(embed, forward, contrast, WEIGHT, join)
    rows, micro_loss, finish = with_grad_cache(loss, params, batch, accumulate, context)

    def scalar(params: dict, rows: dict) -> tuple[jax.Array, tuple[dict, dict]]:
        mean, *rest = micro_loss(params, rows, context)
        return mean, tuple(rest)

    def micro(rows: dict) -> tuple[dict, tuple[dict, dict]]:
        grads, (per_sample, means) = jax.grad(scalar, has_aux=True)(params, rows)
        return per_sample, (grads, means)

    per_sample, total = accumulate_gradients(micro, rows, accumulate)
    grads, (expected, means) = jax.grad(whole, has_aux=True)(params, batch, context)
    chex.assert_trees_all_close(finish(per_sample), expected, rtol=1e-5, atol=1e-5)
    chex.assert_trees_all_close(jax.tree.map(lambda x: x / accumulate, total), (grads, means), rtol=1e-5, atol=1e-5)


def test_rows_are_split_in_order_and_joined_again():
    batch = {"x": jnp.arange(24).reshape(12, 2)}
    parts = to_micro_batches(batch, 3)
    np.testing.assert_array_equal(parts["x"][1], batch["x"][4:8])
    chex.assert_trees_all_equal(from_micro_batches(parts), batch)
