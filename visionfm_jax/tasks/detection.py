"""Objects in images, by Plain-DETR on any backbone (`models.detector`).

The loss of an image is the sum of those of every decoder layer, for the queries that predict and for those that are
matched several to an object, and of the proposals, which learn that there is something. It is divided by the number of
objects in the whole batch, whatever the devices and micro-batches.

Shapes: B batch, H W canvas, M objects that an image may have, K detections, L layers.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from visionfm_jax.config import BackboneConfig, Config, TaskConfig
from visionfm_jax.config.limits import LOSS_WEIGHT, ImageSize, Limits, Problem, Range, height_width
from visionfm_jax.data.augment import augment, normalize
from visionfm_jax.data.fields import Objects
from visionfm_jax.losses.detection import Truth, Weights, set_losses
from visionfm_jax.models.boxes import Predicted, to_corners
from visionfm_jax.models.detector import (
    Detections,
    Detector,
    DetectorSettings,
    forward_flops,
    map_grid,
    proposal_count,
)
from visionfm_jax.models.layers import GatherParams
from visionfm_jax.models.sizes import heads_problems
from visionfm_jax.parallel.context import Context
from visionfm_jax.tasks.task import Stateless, loaded, split_keys

COUNT = Range(1, 2**14)
DEPTH = Range(0, 1024)


@dataclass(kw_only=True)
class DetectionConfig(TaskConfig):
    """Boxes of objects, by Plain-DETR (Lin et al. 2023)."""

    num_classes: int = 80  # labels are 0 to num_classes - 1
    most_objects: int = 100  # of an image; what it has more is left out, and counted
    width: int = 256  # channels of the detector
    heads: int = 8  # attention heads of the detector
    mlp: int = 2048  # hidden channels of its MLPs
    encoder_depth: int = 6  # layers on the feature map; 0: none, as Lin et al. 2023
    decoder_depth: int = 6  # layers on the queries
    stride: int = 16  # pixels; a feature map of a larger stride is upsampled to it
    queries: int = 300  # that predict, each matched with at most one object
    many_queries: int = 1500  # in training alone, matched several to an object (Jia et al. 2023); 0: none
    copies: int = 6  # of those, how many are matched with each object
    class_weight: float = 2.0  # of the focal loss of classes, also among the costs of matching; likewise the next two
    box_weight: float = 1.0  # of the L1 loss of box deltas
    giou_weight: float = 2.0  # of the GIoU loss of boxes
    detections: int = 100  # predicted of an image: the best of all queries and classes

    limits: ClassVar[Limits] = {
        "num_classes": Range(1, 2**16),
        "most_objects": COUNT,
        "width": Range(4, 2**16),
        "heads": Range(1, 1024),
        "mlp": Range(1, 2**18),
        "encoder_depth": DEPTH,
        "decoder_depth": Range(1, 1024),
        "stride": Range(1, 256),  # pixels
        "queries": COUNT,
        "many_queries": Range(0, 2**14),
        "copies": Range(1, 64),
        "class_weight": LOSS_WEIGHT,
        "box_weight": LOSS_WEIGHT,
        "giou_weight": LOSS_WEIGHT,
        "detections": COUNT,
    }

    model_class: ClassVar[type] = BackboneConfig
    predictions: ClassVar[frozenset[str]] = frozenset({"boxes", "features"})

    def problems(self, run: Config) -> list[Problem]:
        out = heads_problems("task", self.width, self.heads, 4, ", whose positions take channels in fours")
        if self.most_objects > self.queries:
            rule = f"is more than task.queries = {self.queries}, of which each has one object"
            out.append(("task.most_objects", self.most_objects, rule, f"set {self.queries} or less, or more queries"))
        if self.many_queries and self.copies * self.most_objects > self.many_queries:
            rule = f"must be at least task.copies x task.most_objects = {self.copies * self.most_objects}"
            out.append(("task.many_queries", self.many_queries, rule, "set that, or 0"))
        if self.stride & (self.stride - 1):
            below = 1 << (self.stride.bit_length() - 1)
            rule = "must be a power of two: maps are upsampled by factors of two"
            out.append(("task.stride", self.stride, rule, f"set {below} or {2 * below}"))
        settings, size = settings_of(run), run.model.image_size
        proposals = _proposals(settings, size)
        if (wanted := self.queries + self.many_queries) > proposals:
            rule = f"with task.many_queries = {self.many_queries}, is more than the {proposals} proposals of an image"
            remedy = f"set queries and many_queries to {proposals} or less together, or a smaller stride"
            out.append(("task.queries", self.queries, f"{rule} of model.image_size = {size}: {wanted}", remedy))
        return out

    def size_problems(self, run: Config, field: str, size: ImageSize) -> list[Problem]:
        if self.queries <= (proposals := _proposals(settings_of(run), size)):
            return []
        rule = f"has {proposals} proposals, and task.queries = {self.queries} takes as many"
        return [(field, size, rule, "set a larger one, or fewer queries")]

    def fields(self, run: Config) -> Objects:
        return Objects(self.num_classes, self.most_objects)

    def make(self, run: Config, dtype: jnp.dtype, gather_params: GatherParams) -> Detection:
        return Detection(run, dtype, gather_params)


def settings_of(run: Config) -> DetectorSettings:
    """Of the detector on the run's backbone, whose last map it is given."""
    task, model, upsample = run.task, run.model, 0
    while model.strides[-1] > task.stride * 2**upsample:
        upsample += 1
    return DetectorSettings(
        task.num_classes, task.width, task.heads, task.mlp, task.encoder_depth, task.decoder_depth,
        task.queries, task.many_queries, model.strides[-1], upsample, model.attention, model.remat.partition(":")[0],
    )  # fmt: skip


def _proposals(settings: DetectorSettings, size: ImageSize) -> int:
    """Of an image of `size`."""
    return proposal_count(map_grid(settings, height_width(size)))


class Draws(NamedTuple):
    """The random keys of rows, (B,) each."""

    augment: jax.Array
    drop_path: jax.Array


class Detection(Stateless):
    """The `tasks.task.Task` of detection."""

    def __init__(self, config: Config, dtype: jnp.dtype, gather_params: GatherParams):
        self.config, self.task, self.settings = config, config.task, settings_of(config)
        self.model = Detector(config.model.make(dtype, gather_params), self.settings, dtype, gather_params)
        self.weights = Weights(self.task.class_weight, self.task.box_weight, self.task.giou_weight)

    def init(self, key: jax.Array) -> Any:
        """Fresh parameters, fp32."""
        size = height_width(self.config.model.image_size)
        return self.model.init(key, jnp.zeros((1, *size, 3)), jnp.array([size]))["params"]

    def batch_spec(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
        """What the loader gives: uint8 images (B, H, W, 3), and what `data.fields.Objects` makes."""
        return loaded(self.config, batch_size)

    def counts(self, batch: dict, keys: jax.Array) -> dict[str, jax.Array]:
        """`objects`, without those that are left out."""
        del keys
        return {"objects": self._present(batch).sum(dtype=jnp.float32)}

    def loss(
        self, params: Any, batch: dict, keys: jax.Array, context: Context
    ) -> tuple[jax.Array, dict[str, jax.Array], dict[str, jax.Array]]:
        """The mean loss and, per sample (B,), `loss` and parts of it before they are weighted.

        `class_loss`, `box_loss` and `giou_loss` are of the last layer, `proposal_loss` is of the proposals;
        `cut_objects` is how many objects of the image are more than `most_objects`.

        Args:
          params: usable parameters (`parallel.zero`).
          batch: as `batch_spec`.
          keys: (B,), one for each sample.
          context: of the step, with the number of objects.
        """
        draws = split_keys(Draws, keys)
        images = augment(batch["image"], draws.augment, self.config.data.augment)
        out = self.model.apply({"params": params}, images, batch["size"], draws.drop_path, True)
        per_sample = self.per_sample(out, batch, context)
        return per_sample["loss"].mean(), per_sample, {}

    def per_sample(self, out: Detections, batch: dict, context: Context) -> dict[str, jax.Array]:
        """What `loss` gives per sample, of what the detector says."""
        truth = Truth(batch["boxes"], batch["box_labels"], self._present(batch))
        # A row's share of the whole batch's sum over objects, of which there is at least one.
        rows = len(truth.boxes)
        share = rows / jnp.maximum(context.counts["objects"], rows / self.config.train.batch_size)
        one, many = (
            jax.tree.map(lambda a, part=part: a[:, :, part], out.layers)
            for part in (slice(self.task.queries), slice(self.task.queries, None))
        )
        layers = self._losses(one, truth)
        something = truth._replace(labels=jnp.zeros_like(truth.labels))
        count = truth.present.sum(1).max()
        proposals = jax.vmap(lambda p, t, valid: set_losses(p, t, self.weights, valid=valid, count=count))
        proposals = proposals(out.proposals, something, out.valid)
        sums = [self._weighted(layers).sum(0), self._weighted(proposals)]
        if self.task.many_queries:
            sums.append(self._weighted(self._losses(many, truth, self.task.copies)).sum(0) / self.task.copies)
        per_sample = {"loss": share * sum(sums), "proposal_loss": share * sums[1]}
        per_sample |= {f"{name}_loss": share * part[-1] for name, part in layers.items()}
        return per_sample | {"cut_objects": (batch["objects"] - truth.present.sum(1)).astype(jnp.float32)}

    def constrain(self, params: Any) -> Any:
        """Any parameters will do."""
        return params

    def predict(self, params: Any, batch: dict, what: Hashable = "boxes") -> dict[str, jax.Array]:
        """Per sample, best first: `boxes` (B, K, 4) by corners, pixels, `scores` (B, K) and `box_labels` (B, K).

        For "features": `features` (B, D), pooled.
        """
        images = normalize(batch["image"], self.config.data.augment)
        if what == "features":
            return {"features": self.model.apply({"params": params}, images, method=Detector.features).pooled}
        last = jax.tree.map(lambda a: a[-1], self.model.apply({"params": params}, images, batch["size"]).layers)
        classes = last.logits.shape[-1]
        flat = last.logits.reshape(len(images), -1)
        logits, best = jax.lax.top_k(flat, min(self.task.detections, flat.shape[1]))
        boxes = jnp.take_along_axis(to_corners(last.boxes), best[..., None] // classes, 1)
        return {"boxes": boxes, "scores": jax.nn.sigmoid(logits), "box_labels": best % classes}

    @property
    def step_flops(self) -> float:
        """FLOPs of one optimiser step on the global batch: 3 x forward, nothing recomputed counted."""
        model, task = self.config.model, self.task
        queries = task.queries, task.many_queries
        head = forward_flops(self.settings, height_width(model.image_size), model.widths[-1], queries)
        return 3 * (model.flops + head) * self.config.train.batch_size

    def _present(self, batch: dict) -> jax.Array:
        """(B, M) bool."""
        return jnp.arange(self.task.most_objects) < batch["objects"][:, None]

    def _losses(self, layers: Predicted, truth: Truth, copies: int = 1) -> dict[str, jax.Array]:
        """Of each layer and image, (L, B)."""
        count = truth.present.sum(1).max()
        of_image = jax.vmap(lambda predicted, truth: set_losses(predicted, truth, self.weights, copies, count=count))
        return jax.vmap(of_image, (0, None))(layers, truth)

    def _weighted(self, parts: dict[str, jax.Array]) -> jax.Array:
        w = self.weights
        return w.classes * parts["class"] + w.boxes * parts["box"] + w.giou * parts["giou"]
