"""Layers shared by every network, and the scanned stack of equal blocks.

Shapes: B batch, T tokens, D width, N heads, K head dim, L layers, M width of the MLP.

Parameters may arrive *unprepared*: under ZeRO-3 a block gets shards and makes them whole just before it uses
them. Networks do not know how; they are given a `Prepare` function and call it on each block's parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from visionfm_jax.models.attention import attention

Params = Any  # a pytree of arrays
Prepare = Callable[[Params], Params]

LAYER_NORM_EPS = 1e-6

# Values a block names for rematerialisation; all are outputs of matrix products.
SAVED_NAMES = ("qkv", "attention", "projection", "mlp_hidden")


def as_is(params: Params) -> Params:
    """The `Prepare` of parameters that are whole already."""
    return params


def layer_norm(dtype: jnp.dtype, name: str) -> nn.LayerNorm:
    """LayerNorm whose statistics are fp32 and two-pass; input (…, D), output (…, D) in `dtype`."""
    return nn.LayerNorm(epsilon=LAYER_NORM_EPS, dtype=dtype, use_fast_variance=False, name=name)


def dense(x: jax.Array, features: int, dtype: jnp.dtype, name: str) -> jax.Array:
    """A linear layer of the module being built; (…, D) to (…, features).

    The product is one of matrices: for operands of rank 3 XLA's CPU compiler transposes the whole batch in the
    backward pass, which takes longer than the product.
    """
    y = nn.Dense(features, dtype=dtype, name=name)(x.reshape(-1, x.shape[-1]))
    return y.reshape(*x.shape[:-1], features)


@jax.custom_vjp
def logits(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x (B, D) times kernel (D, C), in fp32 (B, C): operands, also those of the backward pass, in their own dtype.

    JAX's own derivative would multiply fp32 gradients of logits with an fp32 copy of the kernel: the largest matrix
    of many a network, at twice the bytes and half the speed.
    """
    return jax.lax.dot(x, kernel, preferred_element_type=jnp.float32)


def _logits_fwd(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return logits(x, kernel), (x, kernel)


def _logits_bwd(saved: tuple[jax.Array, jax.Array], cotangent: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = saved
    cotangent = cotangent.astype(x.dtype)
    return cotangent @ kernel.T, x.T @ cotangent


logits.defvjp(_logits_fwd, _logits_bwd)


class Qkv(nn.Module):
    """Queries, keys and values, each (B, T, D), of x (B, T, D); one kernel (D, 3 D), three products.

    One product would be followed by a copy that takes its result apart, and in the backward pass by one that puts it
    together, each as many bytes as all else that attention reads and writes.
    """

    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> list[jax.Array]:
        D = x.shape[-1]
        kernel = self.param("kernel", nn.linear.default_kernel_init, (D, 3 * D))
        bias = self.param("bias", nn.initializers.zeros, (3 * D,))
        rows, kernel, bias = nn.dtypes.promote_dtype(x.reshape(-1, D), kernel, bias, dtype=self.dtype)
        parts = zip(jnp.split(kernel, 3, axis=1), jnp.split(bias, 3), strict=True)
        return [checkpoint_name((rows @ k + b).reshape(x.shape), "qkv") for k, b in parts]


class Attention(nn.Module):
    """Multi-head self-attention (Vaswani et al. 2017); (B, T, D) to (B, T, D)."""

    heads: int
    dtype: jnp.dtype
    implementation: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        B, T, D = x.shape
        q, k, v = (a.reshape(B, T, self.heads, D // self.heads) for a in Qkv(self.dtype, name="qkv")(x))

        y = checkpoint_name(attention(q, k, v, self.implementation).reshape(B, T, D), "attention")
        return checkpoint_name(dense(y, D, self.dtype, "out"), "projection")


class Mlp(nn.Module):
    """Two layers with exact GELU between; (…, D) to (…, D) through (…, M)."""

    hidden: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        h = checkpoint_name(dense(x, self.hidden, self.dtype, "fc1"), "mlp_hidden")
        return dense(nn.gelu(h, approximate=False), x.shape[-1], self.dtype, "fc2")


def _save_all(prim, *_, **__) -> bool:
    # Gathered weights, and parts of them, are never worth keeping: under ZeRO-3 that would undo the sharding.
    return prim.name not in ("all_gather", "split")


def _save_all_but_attention(prim, *inputs, **params) -> bool:
    # Inside a block only attention works on arrays of rank 4: its (B, N, T, T) logits and weights.
    return _save_all(prim) and all(a.ndim < 4 for a in inputs)


def _save_named(prim, *inputs, **params) -> bool:
    # The attention primitive (cuDNN) is saved by its kind: its softmax statistics carry no name, and without
    # them the backward pass would run the forward kernel again.
    named = jax.checkpoint_policies.save_only_these_names(*SAVED_NAMES)
    return "dot_product_attention" in prim.name or named(prim, *inputs, **params)


POLICIES = {
    "none": _save_all,
    "attention": _save_all_but_attention,
    "dots": _save_named,
    "full": jax.checkpoint_policies.nothing_saveable,
}


def scan_blocks(
    module: nn.Module, block: nn.Module, depth: int, x: jax.Array, *, prepare: Prepare, remat: str
) -> jax.Array:
    """Apply `depth` copies of `block` in turn, as one loop, with parameters stacked under "blocks".

    The loop is compiled once whatever the depth, and its body is what the backward pass recomputes.

    Args:
      module: the network that owns the parameters, inside its compact method.
      block: an unbound block (`parent=None`) that maps x to the same shape and dtype.
      depth: L.
      x: (B, T, D).
      prepare: applied to one block's parameters inside the loop, so that a weight is whole for one layer only.
      remat: a key of `POLICIES`.
    """
    if module.is_initializing():

        def init_one(key: jax.Array) -> Params:
            return block.init(key, x[:1])["params"]

        params = module.param("blocks", lambda key: jax.vmap(init_one)(jax.random.split(key, depth)))
    else:  # not `module.param`: that would compare the shapes of shards with those of whole weights
        params = module.get_variable("params", "blocks")

    def body(x: jax.Array, p: Params) -> tuple[jax.Array, None]:
        return block.apply({"params": prepare(p)}, x), None

    # prevent_cse is for code outside loops; a scan's body is its own computation already.
    return jax.lax.scan(jax.checkpoint(body, policy=POLICIES[remat], prevent_cse=False), x, params)[0]
