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
from visionfm_jax.models.fused import LayerNorm, add_rows, gelu, products

Params = Any  # a pytree of arrays
GatherParams = Callable[[Params], Params]

# Values a block names for rematerialisation: what matmuls make, with a block's sum of the two where that serves as
# well; and what matmuls read that elementwise kernels make.
RESULTS = ("qkv", "attention", "projection", "residual", "mlp_hidden", "mlp_output", "fp8_scale")
OPERANDS = ("normed", "activated")
BRANCHES = ("attention", "projection", "mlp_output")  # of the results, those with the most arithmetic to a byte


def no_gather(params: Params) -> Params:
    """The `GatherParams` of parameters that are whole already."""
    return params


def layer_norm(dtype: jnp.dtype, name: str, epsilon: float, **more: Any) -> LayerNorm:
    """The module of a norm: (…, D) to (…, D) in `dtype`."""
    return LayerNorm(dtype, epsilon, name=name, **more)


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
        parts = list(products(rows, tuple(jnp.split(kernel, 3, axis=1))))
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
        y = checkpoint_name(dense(rearrange(y, "b t n k -> b t (n k)"), D, self.dtype, "out"), "projection")
        return y if cache is None else (y, cache)


def activate(x: jax.Array, activation: str) -> jax.Array:
    """GELU (Hendrycks & Gimpel 2016), exact, by their approximation with tanh, or by theirs with a sigmoid."""
    if activation == "quick_gelu":
        return x * nn.sigmoid(1.702 * x)
    return nn.gelu(x, approximate=True) if activation == "gelu_tanh" else gelu(x)


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
        return checkpoint_name(layer(checkpoint_name(h, "activated"), x.shape[-1], "fc2"), "mlp_output")


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
        y = layer_norm(self.dtype, "ln1", self.epsilon)(x)
        x = add_rows(x, branch(attend(y, mask=self.mask), 1))
        y = layer_norm(self.dtype, "ln2", self.epsilon)(x)
        mlp = Mlp(self.mlp, self.dtype, activation=self.activation, matmuls=self.matmuls, name="mlp")
        return add_rows(x, branch(mlp(y), 2))


def _save(*names: str, logits: bool = False) -> Callable[..., bool]:
    """Values to be saved: those of these names, what fused attention makes, and with `logits` those of plain attention.

    cuDNN's attention is saved by its kind: its softmax statistics carry no name, and without them the backward pass
    would run the forward kernel again. Inside a block only attention multiplies arrays of rank 4.
    """
    named = jax.checkpoint_policies.save_only_these_names(*names)

    def policy(prim: Any, *inputs: Any, **params: Any) -> bool:
        kernel = "dot_product_attention" in prim.name
        plain = logits and prim.name == "dot_general" and inputs[0].ndim >= 4
        return kernel or plain or named(prim, *inputs, **params)

    return policy


# What the backward pass recomputes, from most memory to most arithmetic. What elementwise kernels compute in fp32 is
# never saved: writing and reading it takes longer than computing it again.
POLICIES = {
    "none": _save(*RESULTS, *OPERANDS, logits=True),  # elementwise kernels
    "attention": _save(*RESULTS, *OPERANDS),  # and the logits of attention, where it is not fused
    "dots": _save(*RESULTS),  # and norms and activations
    "branches": _save(*BRANCHES),  # and the first matmuls of attention and MLP
    "full": jax.checkpoint_policies.nothing_saveable,
}
LIGHTER = dict(zip(list(POLICIES)[1:], POLICIES, strict=False))  # the next that recomputes less


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
    unroll: bool = False,
    first: int = 0,
) -> Any:
    """Apply the blocks of `group` in turn, `repeats` times, with parameters stacked under "blocks".

    As a loop they are compiled once whatever the depth. What a loop keeps for its backward pass it copies into stacks,
    filled with zeros before, and out of them again. Each block is made whole and recomputed on its own.

    Args:
      module: the network that owns the parameters, inside its compact method.
      group: unbound blocks (`parent=None`) that map x to the same shape and dtype. A group of several stores the
        parameters of each under its number, or, if they are `alike`, those of all blocks in one stack.
      repeats: L, the loop's length.
      x: (B, …).
      gather_params: applied to one block's parameters inside the loop, so that a weight is whole for one block only.
      remat: a key of `POLICIES`; with a number N, as "full:18", for the first N of the network's blocks, and for the
        others the one that `LIGHTER` has for it.
      each: arrays (L * len(group), …) of which each block gets its own as a second argument; None: no such argument.
      outputs: the one block of `group` returns a pair: x, and what is to be kept of it.
      part: of the L passes, those that are made; calls one after another may make them all.
      alike: the blocks of `group` have parameters of the same names and shapes.
      unroll: no loop, so that each array is kept where it was made.
      first: the number of the first block of `group` among the network's.

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

    shapes = jax.tree.map(lambda a: a.shape, x)

    def from_rows(x: Any) -> Any:
        return jax.tree.map(lambda a, shape: a.reshape(shape), x, shapes)

    passes = range(repeats)[part]

    def body(policy: str, loop: bool, x: Any, inputs: tuple[Params, Any]) -> tuple[Any, Any]:
        p, own = inputs
        x = from_rows(x)
        parts = _unstack(p, len(group)) if alike else [p[str(i)] for i in range(len(group))] if len(group) > 1 else [p]
        kept = None
        for i, block in enumerate(group):
            if len(policies) > 1:  # by its name, a block is told from that of the other loop (`train.layer_statistics`)
                block = block.clone(name=f"{policy}{i}")

            def one(x: jax.Array, p: Params, *own: Any, block: nn.Module = block) -> jax.Array:
                return block.apply({"params": gather_params(p)}, x, *own)

            # The body of a loop is a computation of its own. Without one, and XLA inlines one of a single pass, it
            # finds the body's products in the forward pass and, unless that is forbidden, keeps those instead.
            step = jax.checkpoint(one, policy=POLICIES[policy], prevent_cse=not loop)
            arguments = () if own is None else (jax.tree.map(lambda a, i=i: a[i], own),)
            x = step(x, parts[i], *arguments)
            x, kept = x if outputs else (x, None)
        return as_rows(x), kept

    own = jax.tree.map(lambda a: rearrange(a, "(l g) ... -> l g ...", g=len(group)), each)
    if part != slice(None):
        params, own = jax.tree.map(lambda a: a[part], (params, own))
    x, kept = as_rows(x), []
    policies = _by_policy(remat, first + len(group) * passes.start, len(group), (params, own))
    for policy, inputs in policies:
        count = len(jax.tree.leaves(inputs)[0])
        loop = count > 1 and not unroll
        x, more = jax.lax.scan(functools.partial(body, policy, loop), x, inputs, unroll=1 if loop else max(count, 1))
        kept.append(more)
    x = from_rows(x)
    return (x, jax.tree.map(lambda *parts: jnp.concatenate(parts), *kept)) if outputs else x


def _by_policy(remat: str, first: int, group: int, inputs: Any) -> list[tuple[str, Any]]:
    """Inputs of passes (L, …) by what is recomputed: each is of `group` blocks, from the network's `first`."""
    name, _, blocks = remat.partition(":")
    passes = len(jax.tree.leaves(inputs)[0])
    heavier = min(max(-(-(int(blocks) - first) // group), 0), passes) if blocks else passes
    if heavier == passes:
        return [(name, inputs)]
    if not heavier:
        return [(LIGHTER[name], inputs)]
    leaves, tree = jax.tree.flatten(inputs)
    parts = zip(*(jnp.split(leaf, [heavier]) for leaf in leaves), strict=True)  # whose gradients are joined at once
    return list(zip((name, LIGHTER[name]), (jax.tree.unflatten(tree, part) for part in parts), strict=True))


def as_rows(x: Any) -> Any:
    """Arrays (…, D) as (R, D), for which a loop's carry has one layout in memory."""
    return jax.tree.map(lambda a: a.reshape(-1, a.shape[-1]), x)


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
