"""Layers shared by every network, and the scanned stack of equal blocks.

Shapes: B batch, T tokens, D width, N heads, K head dim, L layers, M width of the MLP.

Parameters may arrive sharded: under ZeRO-3 a block gets shards and makes them whole just before it uses
them. Networks do not know how; they are given a `GatherParams` function and call it on each block's parameters.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from visionfm_jax.config.limits import HeightWidth
from visionfm_jax.models import fp8
from visionfm_jax.models.attention import attention, windowed_attention

Params = Any  # a pytree of arrays
GatherParams = Callable[[Params], Params]

# Values a block names for rematerialisation; all are outputs of matrix products.
SAVED_NAMES = ("qkv", "attention", "projection", "mlp_hidden", "fp8_scale")


def no_gather(params: Params) -> Params:
    """The `GatherParams` of parameters that are whole already."""
    return params


def layer_norm(dtype: jnp.dtype, name: str, epsilon: float, **more: Any) -> nn.LayerNorm:
    """LayerNorm whose statistics are fp32 and two-pass; input (…, D), output (…, D) in `dtype`."""
    return nn.LayerNorm(epsilon=epsilon, dtype=dtype, use_fast_variance=False, name=name, **more)


def dense(x: jax.Array, features: int, dtype: jnp.dtype, name: str, **more: Any) -> jax.Array:
    """A linear layer of the module being built; (…, D) to (…, features).

    The product is one of matrices: for operands of rank 3 XLA's CPU compiler transposes the whole batch in the
    backward pass, which takes longer than the product.
    """
    y = nn.Dense(features, dtype=dtype, name=name, **more)(x.reshape(-1, x.shape[-1]))
    return y.reshape(*x.shape[:-1], features)


def l2_normalize(x: jax.Array, dim: int = -1) -> jax.Array:
    """x over its length along a dim, fp32; 0 stays 0 and has no gradient.

    Keys of a window's padding are 0. A gradient of their direction, however large a number, would overflow in fp16, and
    come out of products with the padding's zeros as NaN.
    """
    x = x.astype(jnp.float32)
    square = (x * x).sum(dim, keepdims=True)
    some = square > 1e-24
    return x * jnp.where(some, jax.lax.rsqrt(jnp.where(some, square, 1)), 0)


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
    """Queries, keys and values, each (…, D), of x (…, D); one kernel (D, 3 D), three products.

    One product would be followed by a copy that takes its result apart, and in the backward pass by one that puts it
    together, each as many bytes as all else that attention reads and writes.
    """

    dtype: jnp.dtype
    biases: str = "all"  # all | no_key: the bias is (2 D,), of queries and values | none
    kernel_init: nn.initializers.Initializer = nn.linear.default_kernel_init

    @nn.compact
    def __call__(self, x: jax.Array) -> list[jax.Array]:
        D, biased = x.shape[-1], {"all": (0, 1, 2), "no_key": (0, 2), "none": ()}[self.biases]
        kernel = self.param("kernel", self.kernel_init, (D, 3 * D), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (len(biased) * D,), jnp.float32) if biased else None
        rows, kernel, bias = nn.dtypes.promote_dtype(x.reshape(-1, D), kernel, bias, dtype=self.dtype)
        parts = [rows @ k for k in jnp.split(kernel, 3, axis=1)]
        for i, b in zip(biased, jnp.split(bias, len(biased)) if biased else (), strict=True):
            parts[i] += b
        return [checkpoint_name(part.reshape(x.shape), "qkv") for part in parts]


class KVCache(NamedTuple):
    """Keys and values of the tokens so far, in arrays long enough for all that may follow."""

    keys: jax.Array  # (B, S, N, K)
    values: jax.Array  # (B, S, N, K)

    def put(self, key: jax.Array, value: jax.Array, position: jax.Array) -> KVCache:
        """With those of the token at `position`, (B, 1, N, K)."""
        put = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=position, axis=1)
        return KVCache(put(self.keys, key), put(self.values, value))


class Rotation(NamedTuple):
    """Cosines and sines by which each token's queries and keys are turned, (T, 1, K), fp32 (`rotate`)."""

    cos: np.ndarray
    sin: np.ndarray


def rotate(x: jax.Array, by: Rotation) -> jax.Array:
    """x (B, T, N, K) with its channels k and k + K / 2 turned as pairs (Su et al. 2021, "RoFormer"); in x's dtype."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([-second, first], -1)
    return (x * by.cos + turned * by.sin).astype(x.dtype)


class Attention(nn.Module):
    """Multi-head self-attention (Vaswani et al. 2017); (B, T, D) to (B, T, D).

    Attributes:
      causal: a token sees itself and those before it. Several: x holds so many sequences of equal length one behind
        another, of which each sees itself alone, causally or not.
      biases: of queries, keys and values, as `Qkv` has them.
      qk_norm: the epsilon of LayerNorms over a head's channels of queries and keys (Dehghani et al. 2023); 0: none.
      rotation: rotary positions of the T tokens; None: none.
      window: patches attend inside windows of so many to a side, as `windowed_attention` has it; 0: to all tokens.
      grid: with windows, the last of the tokens as a map of patches (h, w).
    """

    heads: int
    dtype: jnp.dtype
    implementation: str
    causal: bool | tuple[bool, ...] = False
    biases: str = "all"
    qk_norm: float = 0.0
    rotation: Rotation | None = None
    window: int = 0
    grid: HeightWidth = (0, 0)

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        lengths: jax.Array | None = None,
        cache: KVCache | None = None,
        position: jax.Array | None = None,
        mask: jax.Array | None = None,
    ) -> Any:
        """With `cache`, x (B, 1, D) is the token at `position`, and the second result the cache with it.

        `lengths` (B,): only the first tokens of a sequence are seen; None: all. `mask` as `attention` takes it.
        """
        B, D = x.shape[0], x.shape[-1]
        heads = functools.partial(rearrange, pattern="b t (n k) -> b t n k", n=self.heads)
        qkv = [heads(a) for a in Qkv(self.dtype, self.biases, name="qkv")(x)]
        if self.qk_norm:
            qkv[:2] = (layer_norm(self.dtype, f"{n}_norm", self.qk_norm)(a) for n, a in zip("qk", qkv, strict=False))
        if self.rotation is not None:
            qkv[:2] = (rotate(a, self.rotation) for a in qkv[:2])
        if cache is not None:
            cache = cache.put(*qkv[1:], position)
            y = attention(qkv[0], *cache, self.implementation, lengths=jnp.full(B, position + 1))
        elif self.window:
            y = windowed_attention(*qkv, self.implementation, grid=self.grid, window=self.window)
        else:
            causal = self.causal if isinstance(self.causal, tuple) else (self.causal,)
            parts = zip(*(jnp.split(a, len(causal), axis=1) for a in qkv), causal, strict=True)
            implementation = self.implementation if mask is None else "xla"
            each = [attention(*part, implementation, causal=c, lengths=lengths, mask=mask) for *part, c in parts]
            y = jnp.concatenate(each, axis=1)
        y = checkpoint_name(rearrange(y, "b t n k -> b t (n k)"), "attention")
        y = checkpoint_name(dense(y, D, self.dtype, "out"), "projection")
        return y if cache is None else (y, cache)


def activate(x: jax.Array, activation: str) -> jax.Array:
    """GELU (Hendrycks & Gimpel 2016), exact, by their approximation with tanh, or by theirs with a sigmoid."""
    if activation == "quick_gelu":
        return x * nn.sigmoid(1.702 * x)
    return nn.gelu(x, approximate=activation == "gelu_tanh")


class Mlp(nn.Module):
    """Two layers with an activation between; (…, D) to (…, D) through (…, M).

    Activation "swiglu" (Shazeer 2020): a third layer, the gate, whose SiLU multiplies the first's result.
    """

    hidden: int
    dtype: jnp.dtype
    kernel_init: nn.initializers.Initializer = nn.linear.default_kernel_init
    activation: str = "gelu"  # of `activate`, or swiglu
    matmuls: str = "compute"  # of operands in `dtype`, or fp8

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        def layer(x: jax.Array, features: int, name: str) -> jax.Array:
            dot_general = fp8.dot_general if self.matmuls == "fp8" else None
            return dense(x, features, self.dtype, name, kernel_init=self.kernel_init, dot_general=dot_general)

        h = checkpoint_name(layer(x, self.hidden, "fc1"), "mlp_hidden")
        if self.activation == "swiglu":
            h = nn.silu(checkpoint_name(layer(x, self.hidden, "gate"), "mlp_hidden")) * h
        else:
            h = activate(h, self.activation)
        return layer(h, x.shape[-1], "fc2")


class Block(nn.Module):
    """Pre-norm transformer layer: x + attention(norm(x)), then x + mlp(norm(x)); (B, T, D) to (B, T, D).

    Attributes:
      biases, qk_norm, rotation, window, grid: of `Attention`.
      layer_scale: where the factors of each branch's channels start (Touvron et al. 2021, "CaiT"); 0: no factors.
      keys: (B,), draw which branches a sample leaves out; None: nothing is left out.
      mask: (B, 1, T, T) bool, which tokens see which; None: all see all.
      matmuls: of `Mlp`.
    """

    heads: int
    mlp: int
    dtype: jnp.dtype
    attention: str
    epsilon: float  # of norms
    causal: bool = False
    activation: str = "gelu"
    biases: str = "all"
    qk_norm: float = 0.0
    rotation: Rotation | None = None
    layer_scale: float = 0.0
    keys: jax.Array | None = None
    mask: jax.Array | None = None
    window: int = 0
    grid: HeightWidth = (0, 0)
    matmuls: str = "compute"

    @nn.compact
    def __call__(self, x: jax.Array, own: dict[str, jax.Array] | None = None) -> jax.Array:
        """`own`: the layer's number and the rate of its `drop_path`, where there are keys."""

        def branch(y: jax.Array, number: int) -> jax.Array:
            if self.layer_scale:
                scale = self.param(f"ls{number}", nn.initializers.constant(self.layer_scale), y.shape[-1:], jnp.float32)
                y = (y * scale).astype(y.dtype)
            return y if own is None else drop_path(y, self.keys, 2 * own["layer"] + number - 1, own["rate"])

        attend = Attention(
            self.heads, self.dtype, self.attention, self.causal, self.biases, self.qk_norm, self.rotation, self.window,
            self.grid, name="attn",
        )  # fmt: skip
        x = x + branch(attend(layer_norm(self.dtype, "ln1", self.epsilon)(x), mask=self.mask), 1)
        y = layer_norm(self.dtype, "ln2", self.epsilon)(x)
        mlp = Mlp(self.mlp, self.dtype, activation=self.activation, matmuls=self.matmuls, name="mlp")
        return x + branch(mlp(y), 2)


def _save_all(prim, *_, **__) -> bool:
    # Gathered weights, and parts of them, are never worth keeping: under ZeRO-3 that would undo the sharding.
    return prim.name not in ("all_gather", "split")


def _save_all_but_attention(prim, *inputs, **params) -> bool:
    # Inside a block only attention works on arrays of rank 4, its (B, N, T, T) logits and weights, and more (windows).
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
    module: nn.Module,
    group: Sequence[nn.Module],
    repeats: int,
    x: jax.Array,
    *,
    gather_params: GatherParams,
    remat: str,
    each: Any = None,
    outputs: bool = False,
    part: slice = slice(None),
    alike: bool = False,
) -> Any:
    """Apply the blocks of `group` in turn, `repeats` times, as one loop, with parameters stacked under "blocks".

    The loop is compiled once whatever the depth. Each block is made whole and recomputed on its own.

    Args:
      module: the network that owns the parameters, inside its compact method.
      group: unbound blocks (`parent=None`) that map x to the same shape and dtype. A group of several stores the
        parameters of each under its number, or, if they are `alike`, those of all blocks in one stack.
      repeats: L, the loop's length.
      x: (B, …).
      gather_params: applied to one block's parameters inside the loop, so that a weight is whole for one block only.
      remat: a key of `POLICIES`.
      each: arrays (L * len(group), …) of which each block gets its own as a second argument; None: no such argument.
      outputs: the one block of `group` returns a pair: x, and what is to be kept of it.
      part: of the L passes, those that are made; calls one after another may make them all.
      alike: the blocks of `group` have parameters of the same names and shapes.

    Returns:
      x, or with `outputs` a pair: x, and all that was kept, (L, …).
    """

    different = group[:1] if alike else group  # in their parameters

    def init_one(key: jax.Array) -> Params:
        keys = jax.random.split(key, len(different)) if len(different) > 1 else [key]
        own = [() if each is None else (jax.tree.map(lambda a: a[0], each),)] * len(different)
        stacks = [b.init(k, x, *e)["params"] for b, k, e in zip(different, keys, own, strict=True)]
        return stacks[0] if len(different) == 1 else {str(i): p for i, p in enumerate(stacks)}

    if module.is_initializing() and not module.has_variable("params", "blocks"):
        layers = repeats * len(group) // len(different)
        params = module.param("blocks", lambda key: jax.vmap(init_one)(jax.random.split(key, layers)))
    else:  # not `module.param`: that would compare the shapes of shards with those of whole weights
        params = module.get_variable("params", "blocks")
    if alike:
        params = jax.tree.map(lambda a: rearrange(a, "(l g) ... -> l g ...", g=len(group)), params)
        # By its name, a block is told from the others of its group (`train.layer_statistics`).
        group = [block.clone(name=str(i)) for i, block in enumerate(group)]

    def body(x: jax.Array, inputs: tuple[Params, Any]) -> tuple[jax.Array, Any]:
        p, own = inputs
        parts = _unstack(p, len(group)) if alike else [p[str(i)] for i in range(len(group))] if len(group) > 1 else [p]
        kept = None
        for i, block in enumerate(group):

            def one(x: jax.Array, p: Params, *own: Any, block: nn.Module = block) -> jax.Array:
                return block.apply({"params": gather_params(p)}, x, *own)

            # The body of a loop is a computation of its own. XLA inlines that of a loop of one pass, finds its products
            # in the forward pass and, unless that is forbidden, keeps those instead of recomputing.
            step = jax.checkpoint(one, policy=POLICIES[remat], prevent_cse=len(range(repeats)[part]) == 1)
            arguments = () if own is None else (jax.tree.map(lambda a, i=i: a[i], own),)
            x = step(x, parts[i], *arguments)
            x, kept = x if outputs else (x, None)
        return x, kept

    own = jax.tree.map(lambda a: rearrange(a, "(l g) ... -> l g ...", g=len(group)), each)
    if part != slice(None):
        params, own = jax.tree.map(lambda a: a[part], (params, own))
    x, kept = jax.lax.scan(body, x, (params, own))
    return (x, kept) if outputs else x


def _unstack(params: Params, count: int) -> list[Params]:
    """Parameters (count, …) one by one. Their gradients are joined at once; indexing would add up `count` stacks."""
    leaves, tree = jax.tree.flatten(params)
    each = zip(*([part[0] for part in jnp.split(leaf, count)] for leaf in leaves), strict=True)
    return [jax.tree.unflatten(tree, one) for one in each]


def drop_path(x: jax.Array, keys: jax.Array | None, index: jax.Array, rate: jax.Array) -> jax.Array:
    """Stochastic depth (Huang et al. 2016): a residual branch left out for some samples, scaled up for the others.

    Args:
      x: the branch, (B, …).
      keys: (B,), one for each sample; None: nothing is left out.
      index: a number of the branch's own.
      rate: the chance to be left out.
    """
    if keys is None:
        return x
    kept = jax.vmap(lambda key: jax.random.bernoulli(jax.random.fold_in(key, index), 1 - rate))(keys)
    scale = (kept / (1 - rate)).astype(x.dtype)
    return x * scale.reshape(-1, *[1] * (x.ndim - 1))
