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


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("more", [(), ("bias", "scale"), ("causal", "lengths"), ("mask",)], ids="-".join)
def test_plain_attention_is_that_of_jax(dtype, more):
    """Values, and gradients of queries, keys, values and bias."""
    keys = jax.random.split(jax.random.key(0), 6)
    q, *kv = (jax.random.normal(k, (2, n, 3, 16), dtype) for k, n in zip(keys, (6, 7, 7), strict=False))
    given = {
        "bias": jax.random.normal(keys[3], (1, 3, 6, 7)), "scale": 0.7, "causal": True, "lengths": jnp.array([5, 7]),
        "mask": jax.random.bernoulli(keys[4], 0.7, (2, 1, 6, 7)).at[..., 0].set(True),
    }  # fmt: skip
    given = {name: given[name] for name in more}
    inputs = (q, *kv, given.pop("bias", jnp.zeros((1, 3, 6, 7))))
    weights = jax.random.normal(keys[5], q.shape)

    def ours(q, k, v, bias):
        return attention(q, k, v, "xla", bias=bias, **given)

    def theirs(q, k, v, bias):
        names = {"causal": "is_causal", "lengths": "key_value_seq_lengths"}
        y = jax.nn.dot_product_attention(
            *(a.astype(jnp.float32) for a in (q, k, v)), bias, **{names.get(n, n): a for n, a in given.items()}
        )
        return y.astype(dtype)

    def all_of(f):
        return jax.value_and_grad(lambda *a: (f(*a).astype(jnp.float32) * weights).sum(), argnums=(0, 1, 2, 3))(*inputs)

    tolerance = 1e-5 if dtype == jnp.float32 else 2e-2
    for mine, other in zip(jax.tree.leaves(all_of(ours)), jax.tree.leaves(all_of(theirs)), strict=True):
        mine, other = mine.astype(jnp.float32), other.astype(jnp.float32)
        assert jnp.abs(mine - other).max() <= tolerance * jnp.abs(other).max()
