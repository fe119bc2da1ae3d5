"""One label per image: any backbone under softmax or sigmoid cross-entropy.

Shapes: B batch, H W image, C classes.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from visionfm_jax.config import BackboneConfig, Config, TaskConfig
from visionfm_jax.config.limits import SHARE, HeightWidth, Limits, OneOf, Range, height_width
from visionfm_jax.data.augment import augment, normalize, swap_pairs
from visionfm_jax.data.fields import Labels
from visionfm_jax.losses.classification import sigmoid_cross_entropy, softmax_cross_entropy
from visionfm_jax.models.heads import Classifier
from visionfm_jax.models.layers import GatherParams
from visionfm_jax.parallel.context import Context
from visionfm_jax.tasks.task import Stateless, loaded, split_keys

LOSSES = {"softmax": softmax_cross_entropy, "sigmoid": sigmoid_cross_entropy}


@dataclass(kw_only=True)
class ClassificationConfig(TaskConfig):
    """One label per image."""

    num_classes: int = 1000  # labels are 0 to num_classes - 1
    loss: str = "softmax"  # softmax | sigmoid (one-vs-all; Beyer et al. 2020)
    label_smoothing: float = 0.1  # share of the target that is spread over all classes
    cutmix: float = 0.0  # alpha of Beta(alpha, alpha), from which the share is drawn that an image keeps; 0: no CutMix

    limits: ClassVar[Limits] = {
        "num_classes": Range(2, 2**24),
        "loss": OneOf(tuple(LOSSES)),
        "label_smoothing": SHARE,
        "cutmix": Range(1e-3, 100, "of Beta(alpha, alpha)", off=True),
    }

    model_class: ClassVar[type] = BackboneConfig
    predictions: ClassVar[frozenset[str]] = frozenset({"labels", "features"})

    @property
    def rows(self) -> tuple[int, str]:
        return (2, " x 2 images to mix") if self.cutmix else (1, "")

    def fields(self, run: Config) -> Labels:
        return Labels(self.num_classes)

    def make(self, run: Config, dtype: jnp.dtype, gather_params: GatherParams) -> Classification:
        return Classification(run, dtype, gather_params)


class Draws(NamedTuple):
    """The random keys of rows, (B,) each."""

    augment: jax.Array
    drop_path: jax.Array
    cutmix: jax.Array


class Classification(Stateless):
    """The `tasks.task.Task` of image classification."""

    def __init__(self, config: Config, dtype: jnp.dtype, gather_params: GatherParams):
        self.config = config
        self.model = Classifier(config.model.make(dtype, gather_params), config.task.num_classes, dtype)

    def init(self, key: jax.Array) -> Any:
        """Fresh parameters, fp32."""
        size = height_width(self.config.model.image_size)
        return self.model.init(key, jnp.zeros((1, *size, 3)))["params"]

    def batch_spec(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
        """What the loader gives: uint8 images (B, H, W, 3) and int32 labels (B,)."""
        return loaded(self.config, batch_size)

    def loss(
        self, params: Any, batch: dict, keys: jax.Array, context: Context
    ) -> tuple[jax.Array, dict[str, jax.Array], dict[str, jax.Array]]:
        """Mean loss and, per sample (B,), `loss` and `logit_max`, the largest absolute logit.

        Args:
          params: usable parameters (`parallel.zero`).
          batch: as `batch_spec`.
          keys: (B,), one for each sample.
          context: of the step, not needed.
        """
        del context
        draws, task = split_keys(Draws, keys), self.config.task
        images = augment(batch["image"], draws.augment, self.config.data.augment)
        if task.cutmix:
            cut = pair_boxes(draws.cutmix, images.shape[1:3], task.cutmix)
            images = jnp.where(cut[..., None], swap_pairs(images), images)
        logits = self._logits(params, images, draws.drop_path)
        loss = LOSSES[task.loss](logits, batch["label"], task.label_smoothing)
        if task.cutmix:
            other = LOSSES[task.loss](logits, swap_pairs(batch["label"]), task.label_smoothing)
            loss += cut.mean((1, 2)) * (other - loss)
        return loss.mean(), {"loss": loss, "logit_max": jnp.abs(logits).max(-1)}, {}

    def constrain(self, params: Any) -> Any:
        """Any parameters will do."""
        return params

    def predict(self, params: Any, batch: dict, what: Hashable = "labels") -> dict[str, jax.Array]:
        """Per sample: `loss` without smoothing (B,), `probability` (B, k) and `top` (B, k), the k <= 5 best ids.

        For "probabilities": `probabilities` (B, C) of all classes; for "features": `features` (B, D), pooled.
        """
        images = normalize(batch["image"], self.config.data.augment)
        if what == "features":
            return {"features": self.model.apply({"params": params}, images, method=Classifier.features)}
        logits = self._logits(params, images)
        probabilities = jax.nn.softmax(logits)
        if what == "probabilities":
            return {"probabilities": probabilities}
        probability, top = jax.lax.top_k(probabilities, min(5, logits.shape[-1]))
        loss = LOSSES[self.config.task.loss](logits, batch["label"])
        return {"loss": loss, "probability": probability, "top": top}

    def _logits(self, params: Any, images: jax.Array, keys: jax.Array | None = None) -> jax.Array:
        return self.model.apply({"params": params}, images, keys)

    @property
    def step_flops(self) -> float:
        """FLOPs of one optimiser step on the global batch: 3 x forward, nothing recomputed counted."""
        forward = self.config.model.flops + 2.0 * self.config.model.features * self.config.task.num_classes
        return 3 * forward * self.config.train.batch_size


def pair_boxes(keys: jax.Array, size: HeightWidth, alpha: float) -> jax.Array:
    """CutMix's boxes (Yun et al. 2019, section 3.1), bool (B, H, W), of keys (B,): one for rows 2 k and 2 k + 1.

    The share outside is drawn from Beta(alpha, alpha) and the centre evenly; what lies beyond the image is cut off.
    """

    def box(key: jax.Array) -> jax.Array:
        of_share, of_centre = jax.random.split(key)
        side = jnp.sqrt(1 - jax.random.beta(of_share, alpha, alpha))
        centre = jax.random.uniform(of_centre, (2,))
        inside = [abs((jnp.arange(n) + 0.5) / n - at) < side / 2 for n, at in zip(size, centre, strict=True)]
        return inside[0][:, None] & inside[1]

    return jnp.repeat(jax.vmap(box)(keys[::2]), 2, axis=0)
