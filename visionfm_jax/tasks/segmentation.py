"""A class for every pixel: any backbone under a linear probe or UPerNet.

Shapes: B batch, H W image, h w map, C classes.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from visionfm_jax.config import BackboneConfig, Config, TaskConfig
from visionfm_jax.config.limits import LOSS_WEIGHT, HeightWidth, Limits, OneOf, Problem, Range, height_width
from visionfm_jax.data.augment import augment, normalize
from visionfm_jax.data.fields import ClassMap
from visionfm_jax.losses.segmentation import labelled, pixel_cross_entropy
from visionfm_jax.models.layers import GatherParams
from visionfm_jax.models.segmenter import LinearProbe, Segmenter, UPerNet, probe_flops, resize, upernet_flops
from visionfm_jax.parallel.context import Context
from visionfm_jax.tasks.task import Stateless, loaded, split_keys


@dataclass(kw_only=True)
class SegmentationConfig(TaskConfig):
    """A class for every pixel."""

    num_classes: int = 150  # classes are 0 to num_classes - 1; pixels of none do not count
    head: str = "upernet"  # linear: on each place | upernet (Xiao et al. 2018)
    frozen: bool = False  # only the head is trained, on features without drop path
    channels: int = 512  # of UPerNet
    auxiliary: float = 0.4  # weight of the loss of UPerNet's auxiliary head; 0: no such head
    auxiliary_channels: int = 256  # of that head

    limits: ClassVar[Limits] = {
        "num_classes": Range(2, 2**16 - 1),
        "head": OneOf(("linear", "upernet")),
        "channels": Range(1, 2**14),
        "auxiliary": LOSS_WEIGHT,
        "auxiliary_channels": Range(1, 2**14),
    }

    model_class: ClassVar[type] = BackboneConfig
    predictions: ClassVar[frozenset[str]] = frozenset({"class_map", "logits", "features"})

    @property
    def trained(self) -> tuple[str, ...]:
        return ("head",) if self.frozen else ()

    def problems(self, run: Config) -> list[Problem]:
        if self.frozen and run.optim.layer_decay < 1:
            rule = "has no effect, as task.frozen = True trains the head alone"
            return [("optim.layer_decay", run.optim.layer_decay, rule, "set it to 1")]
        return []

    def fields(self, run: Config) -> ClassMap:
        return ClassMap(self.num_classes, height_width(run.model.image_size))

    def make(self, run: Config, dtype: jnp.dtype, gather_params: GatherParams) -> Segmentation:
        return Segmentation(run, dtype, gather_params)


class Draws(NamedTuple):
    """The random keys of rows, (B,) each."""

    augment: jax.Array
    drop_path: jax.Array


class Segmentation(Stateless):
    """The `tasks.task.Task` of semantic segmentation by the logits of pixels."""

    def __init__(self, config: Config, dtype: jnp.dtype, gather_params: GatherParams):
        self.config, self.task = config, config.task
        self.backbone = config.model.make(dtype, gather_params)
        self.model = self._model(dtype, gather_params)

    def _model(self, dtype: jnp.dtype, gather_params: GatherParams) -> nn.Module:
        task = self.task
        if task.head == "linear":
            head = functools.partial(LinearProbe, task.num_classes, dtype)
        else:
            auxiliary = task.auxiliary_channels if task.auxiliary else 0
            head = functools.partial(UPerNet, task.num_classes, task.channels, auxiliary, dtype)
        return Segmenter(self.backbone, head, task.frozen)

    def init(self, key: jax.Array) -> Any:
        """Fresh parameters, fp32."""
        return self.model.init(key, jnp.zeros((1, *self._size, 3)))["params"]

    def batch_spec(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
        """What the loader gives: uint8 images (B, H, W, 3) and the classes of pixels (B, H, W)."""
        return loaded(self.config, batch_size)

    def counts(self, batch: dict, keys: jax.Array) -> dict[str, jax.Array]:
        """`labelled`: pixels, by which the losses' sum divides."""
        del keys
        return {"labelled": labelled(batch["class_map"], self.task.num_classes).sum(dtype=jnp.float32)}

    def loss(
        self, params: Any, batch: dict, keys: jax.Array, context: Context
    ) -> tuple[jax.Array, dict[str, jax.Array], dict[str, jax.Array]]:
        """Mean loss and, per sample (B,), shares of it, so that every labelled pixel of the whole batch counts alike.

        Args:
          params: usable parameters (`parallel.zero`).
          batch: as `batch_spec`.
          keys: (B,), one for each sample.
          context: of the step, with the number of labelled pixels.

        Returns:
          The mean over these rows; per sample `loss`, of UPerNet `auxiliary_loss` before it is weighted, and
          `accuracy`, of which the means over the batch are those over pixels.
        """
        draws = split_keys(Draws, keys)
        images = augment(batch["image"], draws.augment, self.config.data.augment)
        logits = self._run(params, images, draws.drop_path)
        out = self.per_sample(logits, batch, context)
        return out["loss"].mean(), out, {}

    def per_sample(self, logits: Sequence[jax.Array], batch: dict, context: Context) -> dict[str, jax.Array]:
        """What `loss` gives per sample, of the logits of a head and of its auxiliary head."""
        # Nothing is labelled: all sums are 0.
        per_row = jnp.maximum(context.counts["labelled"], 1e-6) / len(batch["class_map"])
        sums = [pixel_cross_entropy(resize(x, self._size), batch["class_map"]) for x in logits]
        out = {"loss": sums[0][0] / per_row, "accuracy": sums[0][1] / per_row}
        if len(sums) > 1:
            out["auxiliary_loss"] = sums[1][0] / per_row
            out["loss"] += self.task.auxiliary * out["auxiliary_loss"]
        return out

    def constrain(self, params: Any) -> Any:
        """Any parameters will do."""
        return params

    def predict(self, params: Any, batch: dict, what: Hashable = "class_map") -> dict[str, jax.Array]:
        """`class_map`, int32 (B, H, W); for "logits" `logits` (B, h, w, C), fp32; for "features" `features` (B, D)."""
        images = normalize(batch["image"], self.config.data.augment)
        if what == "features":
            return {"features": self.backbone.apply({"params": params}, images).pooled}
        size = images.shape[1:3] if what == "class_map" else None
        logits = self._logits(params, images, size)
        return {"logits": logits} if size is None else {"class_map": logits.argmax(-1).astype(jnp.int32)}

    def _logits(self, params: Any, images: jax.Array, size: HeightWidth | None) -> jax.Array:
        """(B, H, W, C) of `size`; None: as the head makes them."""
        logits = self._run(params, images)[0]
        return logits if size is None else resize(logits, size)

    @property
    def step_flops(self) -> float:
        """FLOPs of one optimiser step on the global batch: 3 x forward, of a frozen backbone once, no recomputation."""
        task, model = self.task, self.config.model
        if task.head == "linear":
            head = probe_flops(model, task.num_classes)
        else:
            auxiliary = task.auxiliary_channels if task.auxiliary else 0
            head = upernet_flops(model, task.num_classes, task.channels, auxiliary)
        return ((1 if task.frozen else 3) * model.flops + 3 * head) * self.config.train.batch_size

    @property
    def _size(self) -> tuple[int, int]:
        return height_width(self.config.model.image_size)

    def _run(self, params: Any, images: jax.Array, *more: Any) -> Any:
        return self.model.apply({"params": params}, images, *more)
