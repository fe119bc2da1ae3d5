"""Masks by EoMT (`models.eomt`): a class for every pixel, objects, or both, from one head on a plain ViT.

The loss of an image is the sum over what is predicted before each of the blocks that queries join, and after the last.
The losses of masks are divided by the number of masks in the whole batch, that of classes by the weights of all its
queries, whatever the devices and micro-batches. Predictions are made without masked attention, which training gives up
(`models.eomt.mask_shares`); before it has, they are worse than they would be with it.

Shapes: B batch, H W image, h w places of masks, M masks that an image may have, Q queries, C classes, K detections,
N blocks.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange

from visionfm_jax.config import Config, TaskConfig
from visionfm_jax.config.limits import LOSS_WEIGHT, Limits, OneOf, Problem, Range, height_width
from visionfm_jax.data.augment import augment, normalize
from visionfm_jax.data.fields import ClassMap, Fields, Masks
from visionfm_jax.losses.masks import Truth, Weights, set_losses
from visionfm_jax.losses.segmentation import labelled
from visionfm_jax.models.backbones.vit import ViT, ViTConfig, size_of
from visionfm_jax.models.eomt import Eomt, Masked, Predicted, extra_flops, mask_shares, upsamplings
from visionfm_jax.models.layers import GatherParams
from visionfm_jax.models.segmenter import resize
from visionfm_jax.parallel.context import Context
from visionfm_jax.tasks.task import Stateless, loaded, split_keys

COUNT = Range(1, 2**12)
PREDICTED = {"semantic": ("class_map", "logits"), "instance": ("masks",), "panoptic": ("segments",)}
LARGEST = 6e4  # of a mask's logits that are predicted, in float16


@dataclass(kw_only=True)
class EomtConfig(TaskConfig):
    """Masks with classes, by EoMT on a plain ViT (Kerssies et al. 2025)."""

    truth: str = "semantic"  # class maps | instance: masks of objects | panoptic: of segments, each pixel in one
    num_classes: int = 150  # labels are 0 to num_classes - 1; pixels of none do not count
    queries: int = 100  # each predicts a mask and a class
    most_masks: int = 100  # of an image, in class maps of as many classes; what it has more is left out, and counted
    blocks: int = 4  # that queries join, the last ones
    no_object_weight: float = 0.1  # of queries without a mask in the loss of classes
    class_weight: float = 2.0  # of the loss of classes, also among the costs of matching; likewise the next two
    mask_weight: float = 5.0  # of the binary cross-entropy of masks
    dice_weight: float = 5.0  # of the dice loss of masks
    detections: int = 100  # masks predicted of an image, for instance: the best of all queries and classes

    limits: ClassVar[Limits] = {
        "truth": OneOf(tuple(PREDICTED)),
        "num_classes": Range(1, 2**16 - 1),
        "queries": COUNT,
        "most_masks": COUNT,
        "blocks": Range(1, 1024),
        "no_object_weight": LOSS_WEIGHT,
        "class_weight": LOSS_WEIGHT,
        "mask_weight": LOSS_WEIGHT,
        "dice_weight": LOSS_WEIGHT,
        "detections": COUNT,
    }

    model_class: ClassVar[type] = ViTConfig

    @property
    def predictions(self) -> frozenset[str]:
        return frozenset({*PREDICTED[self.truth], "features"})

    def problems(self, run: Config) -> list[Problem]:
        out: list[Problem] = []
        if self.most_masks > self.queries:
            rule = f"is more than task.queries = {self.queries}, of which each has one mask"
            out.append(("task.most_masks", self.most_masks, rule, f"set {self.queries} or less, or more queries"))
        if self.blocks > (depth := size_of(run.model).depth):
            rule = f"is more than the {depth} blocks of the model"
            out.append(("task.blocks", self.blocks, rule, f"set {depth} or less"))
        if run.model.patch_size % 2:
            rule = "must be even: masks have at least twice the resolution of the patches"
            out.append(("model.patch_size", run.model.patch_size, rule, f"set {run.model.patch_size + 1}"))
        if run.model.window:
            rule = "must be 0: queries join the blocks one by one, and a masked one attends to the whole map"
            out.append(("model.window", run.model.window, rule, "set it to 0"))
        if run.model.pool == "map":
            rule = "has parameters, and nothing is pooled"
            out.append(("model.pool", "map", rule, "set gap, and list pool in checkpoint.skip"))
        return out

    def fields(self, run: Config) -> Fields:
        size = height_width(run.model.image_size)
        if self.truth == "semantic":
            return ClassMap(self.num_classes, size)
        return Masks(self.num_classes, self.most_masks, size, stride_of(run), whole=self.truth == "panoptic")

    def make(self, run: Config, dtype: jnp.dtype, gather_params: GatherParams) -> EomtTask:
        return EomtTask(run, dtype, gather_params)


def stride_of(run: Config) -> int:
    """Pixels along a place of a mask."""
    return run.model.patch_size >> upsamplings(run.model.patch_size)


class Draws(NamedTuple):
    """The random keys of rows, (B,) each."""

    augment: jax.Array
    drop_path: jax.Array
    masked: jax.Array  # which queries see their mask alone


class EomtTask(Stateless):
    """The `tasks.task.Task` of EoMT."""

    def __init__(self, config: Config, dtype: jnp.dtype, gather_params: GatherParams):
        self.config, self.task = config, config.task
        task, parts = self.task, (config.model, dtype, gather_params)
        self.model = Eomt(*parts, task.num_classes, task.queries, task.blocks)
        self.backbone = ViT(*parts)
        self.weights = Weights(task.class_weight, task.mask_weight, task.dice_weight, task.no_object_weight)

    def init(self, key: jax.Array) -> Any:
        """Fresh parameters, fp32."""
        return self.model.init(key, jnp.zeros((1, *self._size, 3)))["params"]

    def batch_spec(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
        """What the loader gives: uint8 images (B, H, W, 3), and what `data.fields.ClassMap` or `Masks` makes."""
        return loaded(self.config, batch_size)

    def counts(self, batch: dict, keys: jax.Array) -> dict[str, jax.Array]:
        """`masks`, without those that are left out."""
        del keys
        return {"masks": self._truth(batch)[0].present.sum(dtype=jnp.float32)}

    def loss(
        self, params: Any, batch: dict, keys: jax.Array, context: Context
    ) -> tuple[jax.Array, dict[str, jax.Array], dict[str, jax.Array]]:
        """The mean loss and, per sample (B,), `loss` and parts of it before they are weighted.

        `class_loss`, `mask_loss` and `dice_loss` are of what is predicted after the last block; `cut_masks` is how many
        masks of the image are more than `most_masks`. `masked_share`: of the queries, over blocks, that see their mask
        alone.

        Args:
          params: usable parameters (`parallel.zero`).
          batch: as `batch_spec`.
          keys: (B,), one for each sample.
          context: of the step, with the number of masks.
        """
        task, rows = self.task, len(keys)
        draws = split_keys(Draws, keys)
        images = augment(batch["image"], draws.augment, self.config.data.augment)
        shares = mask_shares(context.step, self.config.total_steps, task.blocks)
        out = self.model.apply({"params": params}, images, draws.drop_path, Masked(shares, draws.masked))
        truth, cut = self._truth(batch)
        count = truth.present.sum(1).max()
        of_image = jax.vmap(lambda *one: set_losses(*one, self.weights, count))
        masks = rearrange(out.masks, "n b h w q -> n b (h w) q")
        parts = jax.vmap(of_image, (0, 0, None))(out.logits, masks, truth)  # (N + 1, B) each

        # A row's share of the whole batch's sum over masks, or over queries: at least one of either.
        found, least = context.counts["masks"], rows / self.config.train.batch_size
        of_masks = rows / jnp.maximum(found, least)
        of_queries = rows / jnp.maximum(found + task.no_object_weight * (rows * task.queries - found), least)
        parts = {name: (of_queries if name == "class" else of_masks) * part for name, part in parts.items()}
        w = self.weights
        total = w.classes * parts["class"] + w.masks * parts["mask"] + w.dice * parts["dice"]
        per_sample = {"loss": total.sum(0), "cut_masks": cut.astype(jnp.float32)}
        per_sample |= {f"{name}_loss": part[-1] for name, part in parts.items()}
        return per_sample["loss"].mean(), per_sample, {"masked_share": shares.mean()}

    def constrain(self, params: Any) -> Any:
        """Any parameters will do."""
        return params

    def predict(self, params: Any, batch: dict, what: Hashable = None) -> dict[str, jax.Array]:
        """What `EomtConfig.predictions` names; None: the first of it for this `truth`.

        class_map: `class_map`, int32 (B, H, W), the best of the scores, resized.
        logits: `logits` (B, h, w, C), the scores: over queries, the sum of the chance of the class times that of the
          place. They are no logits, but can be averaged over views as such.
        masks: of the best pairs of query and class, `masks` (B, K, h, w), logits in float16, `scores` (B, K), the
          chances of the class, and `mask_labels` (B, K).
        segments: of each query likewise (B, Q, …); `mask_labels` is C where the best is that there is nothing.
        features: `features` (B, D), pooled, of the blocks without queries.
        """
        what = what or PREDICTED[self.task.truth][0]
        images = normalize(batch["image"], self.config.data.augment)
        if what == "features":
            return {"features": self.backbone.apply({"params": params}, images).pooled}
        out = jax.tree.map(lambda a: a[-1], self.model.apply({"params": params}, images))
        if what == "segments":
            chances = jax.nn.softmax(out.logits, -1)
            return {"masks": _sent(out.masks), "scores": chances.max(-1), "mask_labels": chances.argmax(-1)}
        if what == "masks":
            return self._best(out)
        scores = class_scores(out)
        if what == "logits":
            return {"logits": scores}
        return {"class_map": resize(scores, images.shape[1:3]).argmax(-1).astype(jnp.int32)}

    def _best(self, out: Predicted) -> dict[str, jax.Array]:
        chances = jax.nn.softmax(out.logits, -1)[..., :-1]
        classes = chances.shape[-1]
        flat = rearrange(chances, "b q c -> b (q c)")
        scores, best = jax.lax.top_k(flat, min(self.task.detections, flat.shape[1]))
        masks = jnp.take_along_axis(out.masks, (best // classes)[:, None, None], -1)
        return {"masks": _sent(masks), "scores": scores, "mask_labels": best % classes}

    @property
    def step_flops(self) -> float:
        """FLOPs of one optimiser step on the global batch: 3 x forward, nothing recomputed counted."""
        model, task = self.config.model, self.task
        extra = extra_flops(model, task.num_classes, task.queries, task.blocks, task.blocks + 1)
        return 3 * (model.flops + extra) * self.config.train.batch_size

    @property
    def _size(self) -> tuple[int, int]:
        return height_width(self.config.model.image_size)

    def _truth(self, batch: dict) -> tuple[Truth, jax.Array]:
        """Of each image, and how many of its masks (B,) are left out."""
        if self.task.truth == "semantic":
            return self._of_classes(batch["class_map"])
        pixels = stride_of(self.config) ** 2
        masks, counted = (rearrange(batch[k], "b ... h w -> b ... (h w)") / pixels for k in ("masks", "counted"))
        present = jnp.arange(self.task.most_masks) < batch["objects"][:, None]
        cut = batch["objects"] - present.sum(1)
        return Truth(masks, counted, batch["mask_labels"], present), cut

    def _of_classes(self, class_map: jax.Array) -> tuple[Truth, jax.Array]:
        """A mask for each class that an image (B, H, W) shows."""
        classes, side = self.task.num_classes, stride_of(self.config)
        pixels = rearrange(class_map, "b (h p) (w q) -> (p q) b (h w)", p=side, q=side)

        def shares(labels: jax.Array) -> jax.Array:
            # Term by term, which is fused: a sum over a dim would first write all masks at the size of the image.
            return sum((labels[..., None] == one[:, None]).astype(jnp.float32) for one in pixels) / len(pixels)

        there = (shares(jnp.arange(classes)[None]) > 0).any(-1)
        labels = jnp.argsort(~there, axis=1, stable=True)[:, : self.task.most_masks]  # those that are there first
        present = jnp.take_along_axis(there, labels, 1)
        counted = labelled(pixels, classes).mean(0, dtype=jnp.float32)
        truth = Truth(shares(labels), counted, labels, present)
        return truth, there.sum(1) - present.sum(1)


def class_scores(out: Predicted) -> jax.Array:
    """(B, h, w, C), over queries the sum of the chances of class and place."""
    chances = jax.nn.softmax(out.logits, -1)[..., :-1]
    return jnp.einsum("bhwq,bqc->bhwc", jax.nn.sigmoid(out.masks), chances, precision=jax.lax.Precision.HIGHEST)


def _sent(masks: jax.Array) -> jax.Array:
    """(B, h, w, Q) as they are predicted, (B, Q, h, w)."""
    return rearrange(jnp.clip(masks, -LARGEST, LARGEST), "b h w q -> b q h w").astype(jnp.float16)
