"""Swin Transformer V2 (Liu et al. 2022, "Swin Transformer V2: Scaling Up Capacity and Resolution").

Shapes: B batch, H W map, T tokens of a window, D width, N heads, K head dim, L layers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from visionfm_jax.config import BackboneConfig
from visionfm_jax.config.limits import (
    ATTENTION,
    MLP_MATMULS,
    REMAT,
    SHARE,
    SIDE,
    HeightWidth,
    ImageSize,
    Limits,
    OneOf,
    Problem,
    Range,
    height_width,
    multiple_of,
    shortest,
)
from visionfm_jax.models.attention import attention
from visionfm_jax.models.backbones import Features, Hidden
from visionfm_jax.models.fused import add_rows
from visionfm_jax.models.layers import (
    GatherParams,
    Mlp,
    Qkv,
    dense,
    drop_path,
    l2_normalize,
    layer_norm,
    no_gather,
    scan_blocks,
)
from visionfm_jax.models.sizes import size_by_name


class SwinV2Size(NamedTuple):
    """Width of the first stage, layers and heads of each, and blocks from one norm of the main branch to the next."""

    width: int
    depths: tuple[int, int, int, int]
    heads: tuple[int, int, int, int]
    extra_norm_every: int = 0  # 0: no such norms


# Liu et al. 2022, section 4.1 and appendix; G with 4 layers in the last stage is the one of 3.0 B parameters.
# P ("pico") is ours, for machines without an accelerator.
SIZES = {
    "P": SwinV2Size(32, (1, 1, 4, 1), (1, 2, 4, 8)),
    "T": SwinV2Size(96, (2, 2, 6, 2), (3, 6, 12, 24)),
    "S": SwinV2Size(96, (2, 2, 18, 2), (3, 6, 12, 24)),
    "B": SwinV2Size(128, (2, 2, 18, 2), (4, 8, 16, 32)),
    "L": SwinV2Size(192, (2, 2, 18, 2), (6, 12, 24, 48)),
    "H": SwinV2Size(352, (2, 2, 18, 2), (11, 22, 44, 88), extra_norm_every=6),
    "G": SwinV2Size(512, (2, 2, 42, 4), (16, 32, 64, 128), extra_norm_every=6),
}
EPS = 1e-5
BIAS_HIDDEN = 512  # width of the network behind the position bias
MAX_SCALE = math.log(100.0)  # of cosine attention, in logarithms
MASKED = -100.0  # added to the logits of pairs that are no neighbours

_init = nn.initializers.truncated_normal(0.02)


@dataclass(kw_only=True)
class SwinV2Config(BackboneConfig):
    """A Swin Transformer V2 (Liu et al. 2022); sizes in `SIZES`."""

    size: str = "G"  # width, depths and heads by name; with H and G, norms of the main branch
    width: int = 0  # channels of the first stage, doubled at each stage; 0: the value of size; likewise depths, heads
    depths: tuple[int, int, int, int] = (0, 0, 0, 0)  # number of blocks of each stage
    heads: tuple[int, int, int, int] = (0, 0, 0, 0)  # attention heads of each stage; must divide its width
    mlp_ratio: int = 4  # hidden channels of the MLPs / width
    patch_size: int = 4  # pixels, side of a square
    image_size: ImageSize = 224  # pixels, side of a square or (height, width)
    window: ImageSize = 14  # tokens, side or (height, width); a smaller feature map is one window
    pretrained_window: ImageSize = 0  # window of the run whose weights are continued; 0: none
    pretrained_image_size: ImageSize = 0  # pixels; image size of that run; 0: none
    roll_first: bool = False  # padded shifted maps: True: roll, then pad, as timm; False: pad, then roll
    attention: str = "auto"  # auto: cudnn if this GPU runs it, else xla | xla | cudnn
    remat: str = (
        "none"  # recomputed in the backward pass: none | attention | dots | branches | full; full:N: in N blocks
    )
    scan_layers: bool = True  # run blocks as a loop, compiled once; False: a faster step on GPUs, a longer compile
    mlp_matmuls: str = "compute"  # of the MLPs, in training: compute (train.precision) | fp8 (Ada, Hopper and later)
    drop_path: float = 0.2  # probability of dropping the last block; decreases linearly to 0 at the first

    limits: ClassVar[Limits] = {
        "size": OneOf(tuple(SIZES)),
        "width": Range(0, 2**16),
        "depths": Range(0, 1024),
        "heads": Range(0, 1024),
        "mlp_ratio": Range(1, 64),
        "patch_size": Range(1, 256),  # pixels
        "image_size": SIDE,
        "window": Range(1, 64, "a window's tokens are compared each with each"),
        "pretrained_window": Range(1, 64, off=True),
        "pretrained_image_size": Range(1, 4096, off=True),  # pixels
        "attention": ATTENTION,
        "remat": REMAT,
        "mlp_matmuls": MLP_MATMULS,
        "drop_path": SHARE,
    }

    @property
    def blocks(self) -> int:
        return sum(size_of(self).depths)

    @property
    def strides(self) -> tuple[int, ...]:
        return tuple(self.patch_size * 2**stage for stage in range(4))

    @property
    def widths(self) -> tuple[int, ...]:
        return tuple(size_of(self).width * 2**stage for stage in range(4))

    @property
    def features(self) -> int:
        return self.widths[-1]

    @property
    def embed_width(self) -> int:
        return self.widths[0]

    @property
    def flops(self) -> float:
        size = size_of(self)
        maps = [math.prod(map) for map in maps_of(self.image_size, self.patch_size)]
        total = maps[0] * 3 * self.patch_size**2 * size.width
        for i, (depth, map) in enumerate(zip(size.depths, maps_of(self.image_size, self.patch_size), strict=True)):
            D = size.width * 2**i
            windows = windows_of(map, self.window, (0, 0), shifted=False)
            tokens = windows.count * windows.tokens
            layer = tokens * (4 * D * D + 2 * windows.tokens * D) + maps[i] * 2 * self.mlp_ratio * D * D
            total += depth * layer
            if i < 3:
                total += maps[i + 1] * 8 * D * D
        return 2.0 * total

    def make(self, dtype: jnp.dtype, gather_params: GatherParams) -> SwinV2:
        return SwinV2(self, dtype, gather_params)

    def problems(self, name: str) -> list[Problem]:
        out = self.size_problems(f"{name}.image_size", self.image_size, name)
        map, window = maps_of(self.image_size, self.patch_size)[0], height_width(self.window)
        if not out and any(length > side for length, side in zip(window, map, strict=True)):
            rule = f"is larger than the map, {map[0]} x {map[1]} tokens"
            fits = shortest(tuple(min(length, side) for length, side in zip(window, map, strict=True)))
            out.append((f"{name}.window", self.window, rule, f"set it to {fits} or less"))
        if bool(self.pretrained_window) != bool(self.pretrained_image_size):
            rule = "goes with pretrained_image_size"
            out.append((f"{name}.pretrained_window", self.pretrained_window, rule, "set both, or both to 0"))
        size = size_of(self)
        for i, (width, depth, heads) in enumerate(zip(self.widths, size.depths, size.heads, strict=True)):
            if width % heads:
                rule = f"must divide the {width} channels of the stage"
                out.append((f"{name}.heads[{i}]", heads, rule, f"set {name}.heads, or {name}.width"))
            if depth % group_of(depth, size.extra_norm_every):
                rule = f"must be a multiple of {size.extra_norm_every}, by which {name}.size = {self.size} has norms"
                out.append((f"{name}.depths[{i}]", depth, rule, "set that, or another size"))
        return out

    def size_problems(self, field: str, size: ImageSize, name: str = "model") -> list[Problem]:
        out = multiple_of(field, size, self.patch_size, f"{name}.patch_size = {self.patch_size}")
        map = maps_of(size, self.patch_size)[0]
        if (pairs := math.prod((*map, *height_width(self.window)))) > 2**28:
            rule = f"compares {pairs} pairs of tokens in windows of {name}.window = {self.window}; the most is {2**28}"
            out.append((field, size, rule, "set a smaller size, a smaller window, or larger patches"))
        return out


def size_of(config: SwinV2Config) -> SwinV2Size:
    """The row of `SIZES`, with what the configuration gives as numbers in its place.

    Raises:
      ConfigError: no such size.
    """
    return size_by_name(SIZES, config)


class Windows(NamedTuple):
    """The windows of a stage: all that is static of its attention. Pairs are (height, width)."""

    map: HeightWidth
    window: HeightWidth
    shift: HeightWidth
    pretrained: HeightWidth  # windows that the position bias is trained on; 0: these
    roll_first: bool = False  # the map is rolled before it is padded

    @property
    def padded(self) -> HeightWidth:
        """The map, lengthened at its end to whole windows."""
        return tuple(-(-m // w) * w for m, w in zip(self.map, self.window, strict=True))

    @property
    def count(self) -> int:
        return math.prod(p // w for p, w in zip(self.padded, self.window, strict=True))

    @property
    def tokens(self) -> int:
        return math.prod(self.window)


def maps_of(image_size: ImageSize, patch_size: int) -> list[HeightWidth]:
    """Sides of the stages' maps, whose odd ones are lengthened."""
    return [tuple(-(-side // (patch_size * 2**stage)) for side in height_width(image_size)) for stage in range(4)]


def windows_of(
    map: HeightWidth, window: ImageSize, pretrained: HeightWidth, shifted: bool, roll_first: bool = False
) -> Windows:
    """The windows of a map (H, W): a side no longer than the window is one window, and not shifted."""
    sides = tuple(zip(height_width(window), map, strict=True))
    shift = tuple(w // 2 if shifted and m > w else 0 for w, m in sides)
    return Windows(map, tuple(min(side) for side in sides), shift, pretrained, roll_first)


def pretrained_windows(config: SwinV2Config) -> list[HeightWidth]:
    """The windows, by stage, of the run whose weights this continues; (0, 0): there is none."""
    window, maps = height_width(config.pretrained_window), maps_of(config.pretrained_image_size, config.patch_size)
    return [tuple(min(w, m) if m else w for w, m in zip(window, map, strict=True)) for map in maps]


def bias_windows(config: SwinV2Config) -> list[HeightWidth]:
    """The windows, by stage, whose offsets are the unit of the position bias: of the run before, or of this training.

    On images of another size a window of the last stages may have another size; an offset of a token means the same.
    """
    own = [
        windows_of(map, config.window, (0, 0), False).window for map in maps_of(config.image_size, config.patch_size)
    ]
    return [before if any(before) else window for before, window in zip(pretrained_windows(config), own, strict=True)]


def log_coordinates(window: tuple[int, int], pretrained: tuple[int, int]) -> np.ndarray:
    """Log-spaced offsets between any two tokens of a window, (2 h - 1, 2 w - 1, 2), fp32; the paper's equation 4.

    The longest offset inside the (pretrained) window becomes log2(9) / 3 = 1.06.
    """
    sides = []
    for side, trained in zip(window, pretrained, strict=True):
        offsets = np.arange(1 - side, side, dtype=np.float32) * 8 / max((trained or side) - 1, 1)
        sides.append(np.sign(offsets) * np.log2(np.abs(offsets) + 1) / np.float32(3))
    return np.stack(np.meshgrid(*sides, indexing="ij"), -1).astype(np.float32)


def offset_index(window: tuple[int, int]) -> np.ndarray:
    """Of each pair of a window's tokens, the row of its offset in flattened `log_coordinates`, (T, T)."""
    at = np.stack(np.meshgrid(*map(np.arange, window), indexing="ij"), -1).reshape(-1, 2)
    offset = at[:, None] - at[None] + np.array(window) - 1
    return offset[..., 0] * (2 * window[1] - 1) + offset[..., 1]


def shifted_window_mask(windows: Windows) -> np.ndarray | None:
    """0 for pairs of a window's tokens that are neighbours on the map, else `MASKED`, (windows, T, T).

    After the map is rolled by the shift, the last windows hold tokens of both of its ends. None: it is not shifted.
    """
    if not any(windows.shift):
        return None
    regions = []
    for padded, window, shift in zip(windows.padded, windows.window, windows.shift, strict=True):
        position = np.arange(padded)
        last = (position >= padded - window).astype(int) + (position >= padded - shift)
        regions.append(last if shift else 0 * position)
    region = 3 * regions[0][:, None] + regions[1][None]
    h, w = windows.window
    region = rearrange(region, "(a h) (b w) -> (a b) (h w)", h=h, w=w)
    return np.where(region[:, :, None] == region[:, None], np.float32(0), np.float32(MASKED))


def partition(x: jax.Array, windows: Windows) -> jax.Array:
    """(B, H, W, D) to (B, T, windows, D): padded with zeros, rolled by the shift, or in the other order; then cut."""
    pad = [(0, p - m) for p, m in zip(windows.padded, windows.map, strict=True)]
    back = [-s for s in windows.shift]
    if windows.roll_first:
        x = jnp.roll(x, back, (1, 2))
    x = jnp.pad(x, ((0, 0), *pad, (0, 0)))
    if not windows.roll_first:
        x = jnp.roll(x, back, (1, 2))
    h, w = windows.window
    return rearrange(x, "b (m h) (n w) d -> b (h w) (m n) d", h=h, w=w)


def unpartition(x: jax.Array, windows: Windows) -> jax.Array:
    """The reverse of `partition`."""
    h, (H, W) = windows.window[0], windows.map
    x = rearrange(x, "b (h w) (m n) d -> b (m h) (n w) d", h=h, m=windows.padded[0] // h)
    if windows.roll_first:
        return jnp.roll(x[:, :H, :W], windows.shift, (1, 2))
    return jnp.roll(x, windows.shift, (1, 2))[:, :H, :W]


class PositionBias(nn.Module):
    """Continuous relative position bias: a network of the log-spaced offsets; () to (N, T, T), fp32.

    Nothing of a window's size is stored, so that weights serve any window.
    """

    heads: int

    @nn.compact
    def __call__(self, windows: Windows) -> jax.Array:
        coordinates = log_coordinates(windows.window, windows.pretrained).reshape(-1, 2)
        x = nn.relu(nn.Dense(BIAS_HIDDEN, kernel_init=_init, name="fc1")(coordinates))
        x = 16 * nn.sigmoid(nn.Dense(self.heads, use_bias=False, kernel_init=_init, name="fc2")(x))
        return rearrange(x[offset_index(windows.window)], "q k n -> n q k")


class WindowAttention(nn.Module):
    """Scaled cosine attention inside windows; (B, H, W, D) to (B, H, W, D)."""

    heads: int
    windows: Windows
    dtype: jnp.dtype
    implementation: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = partition(x, self.windows)
        q, k, v = Qkv(self.dtype, biases="no_key", kernel_init=_init, name="qkv")(x)
        scale = self.param("scale", nn.initializers.constant(math.log(10.0)), (self.heads,), jnp.float32)
        bias = PositionBias(self.heads, name="bias")(self.windows)
        y = folded_attention(q, k, v, scale, bias, shifted_window_mask(self.windows), self.implementation)
        y = unpartition(dense(y, x.shape[-1], self.dtype, "out", kernel_init=_init), self.windows)
        return checkpoint_name(y, "projection")


def folded_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    mask: np.ndarray | None,
    implementation: str,
) -> jax.Array:
    """Scaled cosine attention inside windows, which are folded into heads.

    One call over (B, T, windows * N, K), whose bias of (1, windows * N, T, T) carries position and mask without a copy
    over the batch.

    Args:
      q, k, v: (B, T, windows, D).
      scale: (N,), in logarithms.
      bias: (N, T, T).
      mask: (windows, T, T), as `shifted_window_mask` gives it.
      implementation: of `models.attention`.

    Returns:
      (B, T, windows, D).
    """
    count, N = q.shape[2], len(scale)
    q, k, v = (rearrange(a, "b t c (n k) -> b t (c n) k", n=N) for a in (q, k, v))
    scale = jnp.tile(jnp.exp(jnp.minimum(scale, MAX_SCALE)), count)[:, None]
    q, k = (l2_normalize(q) * scale).astype(q.dtype), l2_normalize(k).astype(k.dtype)
    bias = jnp.tile(bias, (count, 1, 1, 1)) if mask is None else bias + mask[:, None]
    y = attention(q, k, v, implementation, bias=rearrange(bias, "c n t s -> 1 (c n) t s"), scale=1.0)
    return rearrange(y, "b t (c n) k -> b t c (n k)", n=N)


class SwinBlock(nn.Module):
    """Residual post-norm layer: x + norm(attention(x)), then x + norm(mlp(x)); (B, H, W, D) to (B, H, W, D).

    Both norms start at zero, so that each block starts as the identity. With `extra_norm` the main branch is normed
    at the end.
    """

    heads: int
    mlp_ratio: int
    windows: Windows
    dtype: jnp.dtype
    implementation: str
    extra_norm: bool
    keys: jax.Array | None
    matmuls: str = "compute"  # of `Mlp`

    @nn.compact
    def __call__(self, x: jax.Array, own: dict[str, jax.Array]) -> jax.Array:
        zero = {"epsilon": EPS, "scale_init": nn.initializers.zeros}

        def drop(branch: jax.Array, index: int) -> jax.Array:
            return drop_path(branch, self.keys, 2 * own["layer"] + index, own["rate"])

        y = WindowAttention(self.heads, self.windows, self.dtype, self.implementation, name="attn")(x)
        x = add_rows(x, drop(layer_norm(self.dtype, "ln1", **zero)(y), 0))
        y = Mlp(self.mlp_ratio * x.shape[-1], self.dtype, kernel_init=_init, matmuls=self.matmuls, name="mlp")(x)
        x = add_rows(x, drop(layer_norm(self.dtype, "ln2", **zero)(y), 1))
        return layer_norm(self.dtype, "norm", epsilon=EPS)(x) if self.extra_norm else x


class PatchMerging(nn.Module):
    """Four neighbours to one, of twice the width; (B, H, W, D) to (B, H / 2, W / 2, 2 D). Odd sides are lengthened."""

    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        D = x.shape[-1]
        x = jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, x.shape[2] % 2), (0, 0)))
        x = rearrange(x, "b (h p) (w q) d -> b h w (q p d)", p=2, q=2)
        x = dense(x, 2 * D, self.dtype, "reduction", use_bias=False, kernel_init=_init)
        return layer_norm(self.dtype, "norm", epsilon=EPS)(x)


class SwinStage(nn.Module):
    """Blocks on one map, every other one with shifted windows; (B, H, W, D) to the same."""

    config: SwinV2Config
    number: int
    dtype: jnp.dtype
    gather_params: GatherParams

    @nn.compact
    def __call__(self, x: jax.Array, keys: jax.Array | None) -> jax.Array:
        config, size = self.config, size_of(self.config)
        depth, heads = size.depths[self.number], size.heads[self.number]
        pretrained = bias_windows(config)[self.number]
        group = group_of(depth, size.extra_norm_every)

        def block(i: int) -> SwinBlock:
            windows = windows_of(x.shape[1:3], config.window, pretrained, i % 2 == 1, config.roll_first)
            extra_norm = size.extra_norm_every > 0 and (i + 1) % size.extra_norm_every == 0
            return SwinBlock(
                heads, config.mlp_ratio, windows, self.dtype, config.attention, extra_norm, keys, config.mlp_matmuls,
                parent=None,
            )  # fmt: skip

        first, total = sum(size.depths[: self.number]), sum(size.depths)
        layer = jnp.arange(first, first + depth)
        each = {"layer": layer, "rate": config.drop_path * layer / max(total - 1, 1)}
        return scan_blocks(
            self, [block(i) for i in range(group)], depth // group, x,
            gather_params=self.gather_params, remat=config.remat,
            unroll=not config.scan_layers, each=each,
            first=first,
        )  # fmt: skip


def group_of(depth: int, extra_norm_every: int) -> int:
    """Blocks after which a stage repeats: an unshifted and a shifted one, or all up to a norm of the main branch."""
    if extra_norm_every and depth >= extra_norm_every:
        return extra_norm_every
    return 2 if depth % 2 == 0 else depth


class SwinV2(nn.Module):
    """The `Backbone` of a `SwinV2Config`; images of any size."""

    config: SwinV2Config
    dtype: jnp.dtype = jnp.float32  # of activations and products; norms, softmax and cosines are fp32
    gather_params: GatherParams = no_gather

    @nn.compact
    def __call__(
        self,
        images: jax.Array,
        keys: jax.Array | None = None,
        hidden: Hidden | None = None,
        layers: tuple[int, ...] = (),
    ) -> Features:
        """As `Backbone`; the last map is normed in fp32, and `layers` are the stages."""
        chex.assert_shape(images, (None, None, None, 3))
        P, maps = self.config.patch_size, []
        pad = [(0, -side % P) for side in images.shape[1:3]]
        x = rearrange(jnp.pad(images, ((0, 0), *pad, (0, 0))), "b (h p) (w q) c -> b h w (p q c)", p=P, q=P)
        x = dense(x, size_of(self.config).width, self.dtype, "embed", kernel_init=_init)
        x = layer_norm(self.dtype, "embed_norm", epsilon=EPS)(x)
        if hidden is not None:
            x = jnp.where(hidden.where[..., None], hidden.token.astype(self.dtype), x)
        for i in range(4):
            x = SwinStage(self.config, i, self.dtype, self.gather_params, name=f"stage{i}")(x, keys)
            maps.append(x)
            if i < 3:
                x = PatchMerging(self.dtype, name=f"merging{i}")(x)
        normed = layer_norm(jnp.float32, "norm", epsilon=EPS)(x)
        prefix = jnp.zeros((x.shape[0], 0, x.shape[-1]))
        return Features(tuple(maps), normed, prefix, normed.mean((1, 2)), tuple(maps[i] for i in layers))
