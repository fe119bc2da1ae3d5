"""Plain-DETR (Lin et al. 2023): boxes of one feature map, by queries that see all of it.

    images -> backbone -> one map (B, h, w, D) -> encoder -> proposals at 4 resolutions: a box and a score at each place
           -> the best are the queries' first boxes -> decoder, of which each layer moves the boxes of the one before

Queries look at all places, biased by where a place lies to the box's edges (`BoxBias`). Of the queries the first ones
are matched with one object each and predict; the others, only in training and unseen by the first, are matched several
to an object (Jia et al. 2023, "hybrid matching"). A layer's loss also teaches the layer before, whose boxes it moves
(Zhang et al. 2022, "DINO": look forward twice).

Weights of attention and MLPs begin as in DETR (Carion et al. 2020; Glorot and Bengio 2010). The decoder published by
Lin et al. begins with a standard deviation of 0.02 at a width of 256: at smaller widths its attention says next to
nothing at first, and training is slower.

The encoder is that of Simeoni et al. 2025 ("DINOv3"); Lin et al. have none. All attention is to places that the image
covers: the canvas beyond it is not seen.

Shapes: B batch, h w the map, S its places, D width, N heads, Q queries, P proposals, C classes, L layers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from visionfm_jax.config.limits import HeightWidth
from visionfm_jax.models.attention import attention
from visionfm_jax.models.backbones import Features
from visionfm_jax.models.boxes import Predicted, decode, to_corners
from visionfm_jax.models.layers import GatherParams, Mlp, dense, layer_norm, no_gather, scan_blocks
from visionfm_jax.models.pyramid import Rescale, rescaled
from visionfm_jax.models.pyramid import forward_flops as rescale_flops

EPS = 1e-5
LEVELS = (1, 0, -1, -2)  # of the maps that have proposals: twice the resolution of the map to a quarter
PROPOSAL = 50 / 8  # sides of a proposal, in places of its map
BIAS_HIDDEN = 512  # width of the networks behind `BoxBias`
BIAS_UNIT = 16  # of a place, into which `BoxBias` divides it: pixels at stride 16
LONGEST = 10_000.0  # period of `sine`, times 2 pi
PRIOR = 0.01  # chance of each class at first
UNSEEN = -1e9  # added to the logits of places that are not seen

_init = nn.initializers.xavier_uniform()
_small = nn.initializers.truncated_normal(0.02)


class DetectorSettings(NamedTuple):
    """The sizes of a `PlainDetr`."""

    num_classes: int
    width: int
    heads: int
    mlp: int
    encoder_depth: int
    decoder_depth: int
    queries: int  # that predict
    many_queries: int  # that are matched several to an object
    stride: int  # pixels of a place of the map that it is given
    upsample: int  # how often the resolution of that map is doubled first
    attention: str
    remat: str

    @property
    def map_stride(self) -> float:
        """Pixels of a place of the map that is encoded."""
        return self.stride / 2**self.upsample


class Detections(NamedTuple):
    """What the detector says of an image, from the proposals to the last layer."""

    proposals: Predicted  # (B, P, …), of one class: that there is something
    valid: jax.Array  # (B, P) bool: the proposal's centre lies on the image
    layers: Predicted  # (L, B, Q, …)


def sine(x: jax.Array, width: int) -> jax.Array:
    """Coordinates (…, K) to sines and cosines (…, K * width) of periods from 1 to `LONGEST`, times 2 pi."""
    angles = x[..., None] / LONGEST ** (jnp.arange(width // 2) / (width // 2))
    return rearrange(jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1), "... k d -> ... (k d)")


def centres(grid: HeightWidth) -> jax.Array:
    """Centres (h, w, 2), x before y, of the places of a map, in places."""
    rows, columns = (jnp.arange(side) + 0.5 for side in grid)
    return jnp.stack(jnp.meshgrid(columns, rows), -1)


class Attend(nn.Module):
    """Multi-head attention whose queries, keys and values are made of different inputs, (B, T, D) or (B, S, D).

    `groups`: x is so many sequences of these lengths one behind another, of which each sees itself alone.
    """

    heads: int
    dtype: jnp.dtype
    implementation: str
    groups: tuple[int, ...] = ()

    @nn.compact
    def __call__(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        bias: jax.Array | None = None,
        lengths: jax.Array | None = None,
    ) -> jax.Array:
        """(B, T, D); `bias` (B, N, T, S); `lengths` (B,): only the first of the S are seen."""
        D, inputs = query.shape[-1], {"query": query, "key": key, "value": value}
        made = [checkpoint_name(dense(x, D, self.dtype, name, kernel_init=_init), "qkv") for name, x in inputs.items()]
        made = [rearrange(x, "b t (n k) -> b t n k", n=self.heads) for x in made]
        ends = [sum(self.groups[: i + 1]) for i in range(len(self.groups) - 1)]
        parts = zip(*(jnp.split(x, ends, axis=1) for x in made), strict=True)
        each = [attention(*part, self.implementation, bias=bias, lengths=lengths) for part in parts]
        y = rearrange(jnp.concatenate(each, 1), "b t n k -> b t (n k)")
        return checkpoint_name(dense(y, D, self.dtype, "out", kernel_init=_init), "projection")


class EncoderLayer(nn.Module):
    """Pre-norm layer on the places of the map; (B, S, D) to (B, S, D).

    Attributes:
      places: (B, S, D), added to queries and keys.
      lengths: (B,), only the first places are seen.
    """

    heads: int
    mlp: int
    dtype: jnp.dtype
    implementation: str
    places: jax.Array
    lengths: jax.Array

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = layer_norm(self.dtype, "ln1", EPS)(x)
        at = y + self.places
        x = x + Attend(self.heads, self.dtype, self.implementation, name="attn")(at, at, y, lengths=self.lengths)
        return x + Mlp(self.mlp, self.dtype, _init, name="mlp")(layer_norm(self.dtype, "ln2", EPS)(x))


class Encoder(nn.Module):
    """Layers on a map, and a norm; (B, S, D) to (B, S, D), 0 where it is not seen."""

    settings: DetectorSettings
    dtype: jnp.dtype
    gather_params: GatherParams

    @nn.compact
    def __call__(self, x: jax.Array, places: jax.Array, seen: jax.Array) -> jax.Array:
        """`places` (S, D), positions; `seen` (B, S) bool."""
        s = self.settings
        if s.encoder_depth:
            # The places that are seen come first, so that any implementation of attention can leave out the others.
            order = jnp.argsort(~seen, axis=1, stable=True)[..., None]
            places = jnp.take_along_axis(places[None], order, 1).astype(self.dtype)
            layer = EncoderLayer(s.heads, s.mlp, self.dtype, s.attention, places, seen.sum(1), parent=None)
            x = scan_blocks(
                self, [layer], s.encoder_depth, jnp.take_along_axis(x, order, 1),
                gather_params=self.gather_params, remat=s.remat,
            )  # fmt: skip
            x = jnp.take_along_axis(x, jnp.argsort(order, 1), 1)
        return jnp.where(seen[..., None], layer_norm(self.dtype, "norm", EPS)(x), 0)


class Predictors(nn.Module):
    """What queries or places say: logits (…, C) and deltas (…, 4) of (…, D), fp32."""

    num_classes: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        prior = nn.initializers.constant(-math.log((1 - PRIOR) / PRIOR))
        logits = dense(x, self.num_classes, jnp.float32, "classes", kernel_init=_small, bias_init=prior)
        for i in (1, 2):
            x = nn.relu(dense(x, x.shape[-1], self.dtype, f"box{i}"))
        return logits, dense(x, 4, jnp.float32, "box3", kernel_init=nn.initializers.zeros)


class Proposals(nn.Module):
    """At each place of maps at several resolutions, whether there is an object, and its box.

    Gives logits (B, P, 1), deltas (B, P, 4), and the boxes (P, 4), by centres, that the deltas move: squares.
    """

    settings: DetectorSettings
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """`x`: (B, h, w, D)."""
        maps, boxes = [], []
        for i, level in enumerate(LEVELS):
            y = Rescale(level, self.dtype, name=f"level{i}")(x)
            unit = self.settings.map_stride / 2.0**level
            at = rearrange(centres(y.shape[1:3]), "h w c -> (h w) c") * unit
            boxes.append(jnp.concatenate([at, jnp.full_like(at, PROPOSAL * unit)], -1))
            maps.append(rearrange(y, "b h w d -> b (h w) d"))
        y = dense(jnp.concatenate(maps, 1), x.shape[-1], self.dtype, "project")
        logits, deltas = Predictors(1, self.dtype, name="predictors")(layer_norm(self.dtype, "norm", EPS)(y))
        return logits, deltas, jnp.concatenate(boxes)


class BoxBias(nn.Module):
    """The bias of attention from boxes to places (Lin et al. 2023, section 4.1); (B, Q, 4) to (B, N, Q, S), fp32.

    A network of where a column lies to the left and right edge of the box, plus one of where a row lies to the upper
    and lower. Offsets are in sixteenths of a place.
    """

    heads: int
    dtype: jnp.dtype
    stride: float  # pixels of a place

    @nn.compact
    def __call__(self, boxes: jax.Array, rows: jax.Array, columns: jax.Array) -> jax.Array:
        """`boxes` by centres; `rows` (B, h) and `columns` (B, w): bool, whether they are seen."""
        corners = to_corners(boxes) * (BIAS_UNIT / self.stride)
        parts = []
        for name, edges, seen in (("column", corners[..., 0::2], columns), ("row", corners[..., 1::2], rows)):
            at = BIAS_UNIT * (jnp.arange(seen.shape[1]) + 0.5)
            x = edges[:, :, None] - at[:, None]
            x = nn.relu(dense(x, BIAS_HIDDEN, jnp.float32, f"{name}1", kernel_init=_small))
            x = dense(x, self.heads, self.dtype, f"{name}2", kernel_init=_small, use_bias=False)
            x = rearrange(x.astype(jnp.float32), "b q l n -> b n q l")
            parts.append(jnp.where(seen[:, None, None], x, UNSEEN))
        column, row = parts
        return rearrange(row[..., :, None] + column[..., None, :], "b n q h w -> b n q (h w)")


class DecoderLayer(nn.Module):
    """Pre-norm layer on queries and their boxes; (B, Q, D) and (B, Q, 4) to the same, and what it predicts.

    Attributes:
      memory: (B, S, D), of the encoder.
      places: (S, D), positions of the memory; query_places (B, Q, D), of the queries.
      rows, columns: (B, h) and (B, w), bool, whether they are seen.
      size: (B, 1, 2), height and width of the image, pixels.
      groups: numbers of queries that see one another.
    """

    settings: DetectorSettings
    dtype: jnp.dtype
    memory: jax.Array
    places: jax.Array
    query_places: jax.Array
    rows: jax.Array
    columns: jax.Array
    size: jax.Array
    groups: tuple[int, ...]

    @nn.compact
    def __call__(self, inputs: tuple[jax.Array, jax.Array]) -> tuple[Any, Any]:
        (x, boxes), s = inputs, self.settings
        y = layer_norm(self.dtype, "ln1", EPS)(x)
        at = y + self.query_places
        x = x + Attend(s.heads, self.dtype, s.attention, self.groups, name="attn")(at, at, y)
        y = layer_norm(self.dtype, "ln2", EPS)(x) + self.query_places
        # Made again in the backward pass: its hidden units are many times as many as all else.
        bias = nn.remat(BoxBias)(s.heads, self.dtype, s.map_stride, name="bias")(boxes, self.rows, self.columns)
        # Not by cuDNN, which has no gradient of a bias of each image.
        cross = Attend(s.heads, self.dtype, "xla", name="cross")
        x = x + cross(y, self.memory + self.places, self.memory, bias)
        x = x + Mlp(s.mlp, self.dtype, _init, name="mlp")(layer_norm(self.dtype, "ln3", EPS)(x))
        out = layer_norm(self.dtype, "norm", EPS)(x)
        logits, deltas = Predictors(s.num_classes, self.dtype, name="predictors")(out)
        moved = decode(deltas, boxes, self.size)
        return (x, jax.lax.stop_gradient(moved)), (logits, deltas, moved)


class Decoder(nn.Module):
    """Layers on queries, of which each moves the boxes of the one before."""

    settings: DetectorSettings
    dtype: jnp.dtype
    gather_params: GatherParams

    @nn.compact
    def __call__(self, x: jax.Array, boxes: jax.Array, size: jax.Array, **more: Any) -> Predicted:
        """(L, B, Q, …), of queries (B, Q, D) and boxes (B, Q, 4); `more`: see `DecoderLayer`."""
        s = self.settings
        layer = DecoderLayer(s, self.dtype, size=size, **more, parent=None)
        _, (logits, deltas, moved) = scan_blocks(
            self, [layer], s.decoder_depth, (x, boxes), gather_params=self.gather_params, remat=s.remat, outputs=True
        )
        # A layer sees the box of the one before without gradient; what it predicts from there has one.
        reference = jnp.concatenate([boxes[None], moved[:-1]])
        return Predicted(logits, deltas, reference, decode(deltas, reference, size))


class PlainDetr(nn.Module):
    """A map (B, h, w, …) to `Detections`."""

    settings: DetectorSettings
    dtype: jnp.dtype = jnp.float32
    gather_params: GatherParams = no_gather

    @nn.compact
    def __call__(self, x: jax.Array, size: jax.Array, many: bool) -> Detections:
        """`size` (B, 2): height and width of what the image covers, pixels; `many`: with the queries of training."""
        s, dtype, D = self.settings, self.dtype, self.settings.width
        x = layer_norm(dtype, "input_norm", EPS)(dense(x, D, dtype, "input"))
        x = Rescale(s.upsample, dtype, name="upsample")(x)
        h, _ = grid = x.shape[1:3]
        size = jnp.maximum(size, 1)  # 0 in the rows that fill up a batch
        rows, columns = (s.map_stride * jnp.arange(side) < size[:, i, None] for i, side in enumerate(grid))
        places = rearrange(sine(centres(grid), D // 2), "h w d -> (h w) d").astype(dtype)
        seen = rearrange(rows[:, :, None] & columns[:, None], "b h w -> b (h w)")
        encoder = Encoder(s, dtype, self.gather_params, name="encoder")
        memory = encoder(rearrange(x, "b h w d -> b (h w) d"), places, seen)

        logits, deltas, squares = Proposals(s, dtype, name="proposals")(rearrange(memory, "b (h w) d -> b h w d", h=h))
        squares = jnp.broadcast_to(squares, (len(x), *squares.shape))
        valid = (squares[..., :2] < size[:, None, ::-1]).all(-1)
        proposals = Predicted(logits, deltas, squares, decode(deltas, squares, size[:, None]))

        count = s.queries + (s.many_queries if many else 0)
        best = jax.lax.top_k(jnp.where(valid, logits[..., 0], -jnp.inf), count)[1]
        boxes = jax.lax.stop_gradient(jnp.take_along_axis(proposals.boxes, best[..., None], 1))
        table = self.param("queries", nn.initializers.normal(1.0), (s.queries + s.many_queries, D), jnp.float32)
        at = dense(sine(boxes / s.map_stride, D // 2), D, dtype, "query_places", kernel_init=_init)
        layers = Decoder(s, dtype, self.gather_params, name="decoder")(
            jnp.broadcast_to(table[:count].astype(dtype), (len(x), count, D)), boxes, size[:, None],
            memory=memory, places=places, query_places=layer_norm(dtype, "query_norm", EPS)(at),
            rows=rows, columns=columns, groups=(s.queries, s.many_queries) if many and s.many_queries else (count,),
        )  # fmt: skip
        return Detections(proposals, valid, layers)


class Detector(nn.Module):
    """A backbone and `PlainDetr` on its last map, whose parameters stand beside the backbone's as "head"."""

    backbone: nn.Module  # a `models.backbones.Backbone`
    settings: DetectorSettings
    dtype: jnp.dtype = jnp.float32
    gather_params: GatherParams = no_gather

    def setup(self) -> None:
        nn.share_scope(self, self.backbone)
        self.head = PlainDetr(self.settings, self.dtype, self.gather_params)

    def __call__(
        self, images: jax.Array, size: jax.Array, keys: jax.Array | None = None, many: bool = False
    ) -> Detections:
        """Of images (B, H, W, 3), normalised, of which `size` (B, 2) is covered; `keys` as `Backbone` takes them."""
        return self.head(self.features(images, keys).normed, size, many)

    def features(self, images: jax.Array, keys: jax.Array | None = None) -> Features:
        """Of the backbone."""
        return self.backbone(images, keys)


def map_grid(settings: DetectorSettings, image: HeightWidth) -> HeightWidth:
    """Places (h, w) of the map that is encoded, of images of (H, W) pixels."""
    return tuple(rescaled(-(-side // settings.stride), settings.upsample) for side in image)


def proposal_count(grid: HeightWidth) -> int:
    """P, of a map of (h, w) places."""
    return sum(math.prod(rescaled(side, level) for side in grid) for level in LEVELS)


def forward_flops(settings: DetectorSettings, image: HeightWidth, width: int, queries: Sequence[int]) -> float:
    """FLOPs of one image's forward pass, the backbone left out: matrix products alone, two per multiply-add.

    Args:
      settings: of the detector.
      image: (H, W), pixels, all of which the image covers.
      width: channels of the map that it is given.
      queries: numbers of those that see one another.
    """
    s, D, Q = settings, settings.width, sum(queries)
    given = math.prod(-(-side // s.stride) for side in image)
    h, w = grid = map_grid(s, image)
    S, P = h * w, proposal_count(grid)
    predictors = 2 * D * D + 4 * D
    encoder = S * (4 * D * D + 2 * D * s.mlp) + 2 * S * S * D
    bias = Q * (h + w) * BIAS_HIDDEN * (2 + s.heads)
    decoder = Q * (6 * D * D + 2 * D * s.mlp + predictors + D * s.num_classes) + 2 * S * D * D
    decoder += 2 * D * (Q * S + sum(q * q for q in queries)) + bias
    total = given * width * D + s.encoder_depth * encoder + s.decoder_depth * decoder
    total += P * (D * D + predictors + D) + Q * 2 * D * D
    resampled = rescale_flops(given, s.upsample, D) + sum(rescale_flops(S, level, D) for level in LEVELS)
    return 2.0 * total + resampled
