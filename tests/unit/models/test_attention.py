"""Attention by cuDNN, as far as shapes tell without a GPU."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from visionfm_jax.models.attention import attention


@pytest.mark.parametrize("tokens", [8, 9])
def test_layers_share_lengths(tokens):
    """As when stacked parameters are made: the queries of several layers, and one array of lengths."""
    q = jax.ShapeDtypeStruct((6, 2, tokens, 3, 16), jnp.bfloat16)
    lengths = jnp.array([5, 8])
    out = jax.eval_shape(jax.vmap(lambda q: attention(q, q, q, "cudnn", lengths=lengths)), q)
    assert out.shape == q.shape
