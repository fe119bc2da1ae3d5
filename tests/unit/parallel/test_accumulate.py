"""A loss over all rows, made one of micro-batches, beside the same loss taken whole."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from visionfm_jax.parallel.accumulate import GradCache, accumulate_gradients, split, unsplit, with_grad_cache

ROWS, WEIGHT = 8, 0.5


def embed(params: dict, rows: dict) -> dict:
    return {"image": rows["x"] @ params["w"], "text": rows["y"] @ params["v"]}


def forward(params: dict, rows: dict) -> tuple[dict, dict]:
    return embed(params, rows), {"loss": (rows["x"] @ params["w"]).sum(1) ** 2}


def contrast(embedded: dict) -> jax.Array:
    logits = embedded["image"] @ embedded["text"].T
    return jax.nn.logsumexp(logits, 1) - jnp.diagonal(logits)


def join(per_sample: dict, losses: jax.Array) -> dict:
    return {"loss": per_sample["loss"] + WEIGHT * losses, "contrastive": losses}


def whole(params: dict, rows: dict) -> tuple[jax.Array, dict]:
    embedded, per_sample = forward(params, rows)
    per_sample = join(per_sample, contrast(embedded))
    return per_sample["loss"].mean(), per_sample


@pytest.mark.parametrize("accumulate", [1, 2, 8])
def test_losses_and_gradients_are_those_of_the_whole_batch(accumulate):
    rng = np.random.default_rng(0)
    params = {name: jnp.asarray(rng.normal(size=(3, 4)), jnp.float32) for name in ("w", "v")}
    batch = {name: jnp.asarray(rng.normal(size=(ROWS, 3)), jnp.float32) for name in ("x", "y")}
    loss = GradCache(embed, forward, contrast, WEIGHT, join)
    rows, micro_loss, finish = with_grad_cache(loss, params, batch, accumulate)

    def micro(rows: dict) -> tuple[dict, dict]:
        grads, per_sample = jax.grad(lambda p: micro_loss(p, rows, None)[:2], has_aux=True)(params)
        return per_sample, grads

    per_sample, total = accumulate_gradients(micro, rows, accumulate)
    (_, expected), grads = jax.value_and_grad(whole, has_aux=True)(params, batch)
    chex.assert_trees_all_close(finish(per_sample), expected, rtol=1e-5)
    chex.assert_trees_all_close(jax.tree.map(lambda g: g / accumulate, total), grads, rtol=1e-5, atol=1e-5)


def test_rows_are_split_in_order_and_joined_again():
    batch = {"x": jnp.arange(24).reshape(12, 2)}
    parts = split(batch, 3)
    np.testing.assert_array_equal(parts["x"][1], batch["x"][4:8])
    chex.assert_trees_all_equal(unsplit(parts), batch)
