"""Self-distillation: a student that follows its own average over several views of each image, without labels.

DINOv2 (Oquab et al. 2023): of each image two global views and some local ones. The teacher, the average of the
student's weights, sees the global views; the student all of them, one of the global ones with blocks of patches
hidden. It learns what the teacher says of the image (DINO, Caron et al. 2021) and of the hidden patches (iBOT, Zhou et
al. 2022), and to spread images evenly (KoLeo, Sablayrolles et al. 2019).

Where this differs from the published code: of the two global views of each image one, drawn at random, is masked,
there half of the batch's; the two heads' prototypes have length 1 from the start.

"Patches" are the places of the backbone's last map: of a ViT its patches; of SwinV2, whose last stage merges 8 x 8,
squares of as many, as SimMIM masks them (Xie et al. 2022).

Shapes: B rows of this device, U = 2 global views, V views with the local ones, H W a view, h w its patches, M
patches that may be hidden of it, D width, K prototypes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import optax
from einops import rearrange

from visionfm_jax.config import BackboneConfig, Config, TaskConfig, Transform
from visionfm_jax.config.limits import (
    LOSS_WEIGHT,
    STEPS,
    Limits,
    OneOf,
    Problem,
    Range,
    height_width,
    multiple_of,
    shortest,
)
from visionfm_jax.data.augment import augment_views, normalize
from visionfm_jax.data.fields import NoFields
from visionfm_jax.losses.masked import enlarge, hide_blocks
from visionfm_jax.losses.self_distillation import centred, koleo, patches_loss, sinkhorn, views_loss
from visionfm_jax.models.backbones import Features
from visionfm_jax.models.layers import GatherParams
from visionfm_jax.models.prototypes import forward_flops
from visionfm_jax.models.self_distillation import SelfDistilled
from visionfm_jax.parallel.context import Context
from visionfm_jax.parallel.mesh import DEVICES
from visionfm_jax.tasks.task import split_keys

TEMPERATURE = Range(1e-3, 10)
MOMENTUM = Range(0, 1)


@dataclass(kw_only=True)
class SelfDistillationConfig(TaskConfig):
    """DINOv2's self-distillation: matching views of an image, and predicting masked patches."""

    prototypes: int = 65_536  # outputs of each head (DINO and iBOT)
    head_hidden: int = 2048  # channels of the hidden layers of the heads
    head_bottleneck: int = 256  # channels of the last layer before the prototypes
    image: float = 1.0  # weight of the DINO loss, on views
    patch: float = 1.0  # weight of the iBOT loss, on masked patches
    koleo: float = 0.1  # weight of the KoLeo regularizer, on distances between images
    targets: str = "sinkhorn"  # sinkhorn: over the global micro-batch | centring: by a running mean
    centre_momentum: float = 0.9  # decay of that running mean
    student_temperature: float = 0.1
    teacher_temperature: tuple[float, float] = (0.04, 0.07)  # at the start, after the warm-up
    temperature_warmup_steps: int = 0  # steps of linear warm-up of the teacher temperature
    teacher_momentum: tuple[float, float] = (0.992, 1.0)  # at the start, at the end; cosine schedule
    freeze_steps: int = 0  # steps for which the prototypes of the DINO head are frozen
    mask_share: tuple[float, float] = (0.1, 0.5)  # share of masked patches of a view: minimum, maximum

    limits: ClassVar[Limits] = {
        "prototypes": Range(2, 2**20),
        "head_hidden": Range(1, 2**16),
        "head_bottleneck": Range(1, 2**16),
        "image": LOSS_WEIGHT,
        "patch": LOSS_WEIGHT,
        "koleo": LOSS_WEIGHT,
        "targets": OneOf(("sinkhorn", "centring")),
        "centre_momentum": MOMENTUM,
        "student_temperature": TEMPERATURE,
        "teacher_temperature": TEMPERATURE,
        "temperature_warmup_steps": STEPS,
        "teacher_momentum": MOMENTUM,
        "freeze_steps": STEPS,
        "mask_share": Range(0, 1, above=True),
    }

    model_class: ClassVar[type] = BackboneConfig
    predictions: ClassVar[frozenset[str]] = frozenset({"features"})
    loss_scope = "micro_batch"

    @property
    def rows(self) -> tuple[int, str]:
        return (2, " x 2 images, as task.koleo needs a neighbour for each") if self.koleo else (1, "")

    def problems(self, run: Config) -> list[Problem]:
        out: list[Problem] = []
        low, high = self.mask_share
        if low > high:
            out.append(("task.mask_share", self.mask_share, "needs low <= high", f"set {high, low}"))
        if run.optim.ema:
            rule = "averages the weights, which the teacher does by task.teacher_momentum"
            out.append(("optim.ema", run.optim.ema, rule, "set it to 0"))
        made = views_of(run)
        shapes = made.shapes if made else {}
        size = run.model.image_size
        wanted = {"global": (2, *height_width(size), 3)} | {k: v for k, v in shapes.items() if k == "local"}
        if shapes != wanted:
            rule = f"must make views: two named global of model.image_size = {size} pixels, and others named local"
            remedy = f'end them by MultiCrop(views=(Views(size={size}), Views(name="local", …)))'
            out.append(("data.transforms", shapes, rule, remedy))
        elif "local" in shapes:
            out += run.model.size_problems("data.transforms: size of the local views", shortest(shapes["local"][1:3]))
        stride = run.model.strides[-1]
        return out + multiple_of("model.image_size", size, stride, f"{stride}, the stride of the masked features")

    def fields(self, run: Config) -> NoFields:
        return NoFields()

    def make(self, run: Config, dtype: jnp.dtype, gather_params: GatherParams) -> SelfDistillation:
        return SelfDistillation(run, dtype, gather_params)


def views_of(run: Config) -> Transform | None:
    """The transform that makes several views of an image; None: none does."""
    return next((t for t in run.data.transforms if t.views), None)


class Draws(NamedTuple):
    """The random keys of rows, (B,) each."""

    colours: jax.Array
    drop_path: jax.Array
    local_drop_path: jax.Array
    masked: jax.Array  # which view
    blocks: jax.Array


class SelfDistillation:
    """The `tasks.task.Task` of self-distillation."""

    def __init__(self, config: Config, dtype: jnp.dtype, gather_params: GatherParams):
        self.config, self.task, self.views = config, config.task, views_of(config)
        task, model = config.task, config.model
        self.model = SelfDistilled(
            model.make(dtype, gather_params), model.embed_width,
            task.prototypes, task.head_hidden, task.head_bottleneck, dtype,
        )  # fmt: skip
        first, last = task.teacher_temperature
        warmup = task.temperature_warmup_steps
        self._temperature = optax.linear_schedule(first if warmup else last, last, warmup)

    def init(self, key: jax.Array) -> Any:
        """Fresh parameters, fp32."""
        size = height_width(self.config.model.image_size)
        return self.model.init(key, jnp.zeros((1, *size, 3)))["params"]

    def batch_spec(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
        """What the loader gives: uint8 views `global` (B, U, H, W, 3) and, if there are any, `local`, smaller ones."""
        shapes = self.views.shapes
        return {name: jax.ShapeDtypeStruct((batch_size, *shape), jnp.uint8) for name, shape in shapes.items()}

    # What lasts from step to step.

    def momentum(self, step: jax.Array) -> jax.Array:
        """Of the teacher: from the first to the last of `teacher_momentum`, by half a cosine over the run."""
        first, last = self.task.teacher_momentum
        progress = step / self.config.total_steps
        return last - (last - first) * (1 + jnp.cos(jnp.pi * progress)) / 2

    def init_state(self) -> Any:
        """The centres of both heads' logits, (K,) each; None with Sinkhorn-Knopp."""
        if self.task.targets == "sinkhorn":
            return None
        return {name: jnp.zeros(self.task.prototypes) for name in ("image_centre", "patch_centre")}

    def counts(self, batch: dict, keys: jax.Array) -> dict[str, jax.Array]:
        """`hidden`: patches, by which the mean of their logits divides."""
        del batch
        return {} if self.task.targets == "sinkhorn" else {"hidden": self._hidden(split_keys(Draws, keys)).sum()}

    def update(self, state: Any, means: dict[str, jax.Array]) -> Any:
        """The centres, moved towards this batch's."""
        m = self.task.centre_momentum
        return None if state is None else {name: m * centre + (1 - m) * means[name] for name, centre in state.items()}

    def constrain(self, params: Any) -> Any:
        """Any parameters will do."""
        return params

    def loss(
        self, params: Any, batch: dict, keys: jax.Array, context: Context
    ) -> tuple[jax.Array, dict[str, jax.Array], dict[str, jax.Array]]:
        """The weighted sum of three losses.

        Args:
          params: of the student, usable (`parallel.zero`).
          batch: as `batch_spec`.
          keys: (B,), one for each sample.
          context: with the teacher and, for centring, the centres.

        Returns:
          The mean over this device's rows; per sample `loss` (B,), its parts before they are weighted, `image_loss`,
          `patch_loss` and `koleo`, and `target_entropy`, in nats, of the teacher's targets: 0 or ln K where it has
          collapsed; and for centring the means of the teacher's logits.
        """
        task, draws = self.task, split_keys(Draws, keys)
        views = augment_views(batch, draws.colours, self.views, self.config.data.augment)
        views = {name: rearrange(x, "b v h w c -> v b h w c") for name, x in views.items()}
        hidden, second = self._hidden(draws), jax.vmap(jax.random.bernoulli)(draws.masked)
        order, chosen = _first(hidden, self._most)  # (B, M) both

        def of_hidden(features: jax.Array) -> jax.Array:  # (U B, h, w, D) to (B M, D)
            both = rearrange(features, "(u b) h w d -> u b (h w) d", u=2)
            one = jnp.where(second[:, None, None], both[1], both[0])
            return rearrange(jnp.take_along_axis(one, order[..., None], 1), "b m d -> (b m) d")

        teacher = self._encode(context.teacher, views["global"])
        image_logits = self._run(context.teacher, "image_logits", teacher.pooled)
        patch_logits = self._run(context.teacher, "patch_logits", of_hidden(teacher.normed))
        image_targets = self._targets(image_logits, jnp.ones(len(image_logits), bool), "image_centre", context)
        patch_targets = self._targets(patch_logits, chosen.ravel(), "patch_centre", context)

        where = jnp.stack([hidden & ~second[:, None, None], hidden & second[:, None, None]])
        student = self._encode(params, views["global"], draws.drop_path, where)
        pooled = [student.pooled]
        if "local" in views:
            pooled.append(self._encode(params, views["local"], draws.local_drop_path).pooled)
        own_logits = self._run(self._frozen(params, context.step), "image_logits", jnp.concatenate(pooled))
        own_patches = self._run(params, "patch_logits", of_hidden(student.normed))

        by_image = {"b": len(keys)}
        image_targets, own_logits = (rearrange(x, "(v b) k -> v b k", **by_image) for x in (image_targets, own_logits))
        patches = patch_targets, own_patches
        patch_targets, own_patches = (rearrange(x, "(b m) k -> b m k", **by_image) for x in patches)
        out = {
            "image_loss": views_loss(own_logits, image_targets, task.student_temperature),
            # Of both global views, of which one is whole and adds nothing: the published weight is of such a mean.
            "patch_loss": patches_loss(own_patches, patch_targets, chosen, task.student_temperature) / 2,
        }
        if task.koleo:
            out["koleo"] = sum(map(koleo, jnp.split(student.pooled, 2)))
        loss = task.image * out["image_loss"] + task.patch * out["patch_loss"] + task.koleo * out.get("koleo", 0)
        entropy = -jax.scipy.special.xlogy(image_targets, image_targets).sum(2).mean(0)
        means = {}
        if context.state is not None:
            share = chosen.ravel() / jnp.maximum(context.counts["hidden"], 1e-6)
            means = {"image_centre": image_logits.mean(0), "patch_centre": share @ patch_logits}
        return loss.mean(), {"loss": loss, **out, "target_entropy": entropy}, means

    def predict(self, params: Any, batch: dict, what: Hashable = "features") -> dict[str, jax.Array]:
        """`features` (B, D), pooled."""
        images = normalize(batch["image"], self.config.data.augment)
        return {"features": self._run(params, "encode", images).pooled}

    @property
    def step_flops(self) -> float:
        """FLOPs of one optimiser step on the global batch: 3 x forward of the student, 1 x of the teacher."""
        task, model = self.task, self.config.model
        row = forward_flops(model.features, task.prototypes, task.head_hidden, task.head_bottleneck)
        flops = {
            name: count * (dataclasses.replace(model, image_size=shortest(tuple(size))).flops + row)
            for name, (count, *size, _) in self.views.shapes.items()
        }
        patches = sum(task.mask_share) / 2 * math.prod(self._grid) * row
        return (3 * (sum(flops.values()) + patches) + flops["global"] + patches) * self.config.train.batch_size

    # Steps of it.

    def _run(self, params: Any, method: str, *arguments: Any) -> Any:
        return self.model.apply({"params": params}, *arguments, method=method)

    def _encode(
        self, params: Any, views: jax.Array, keys: jax.Array | None = None, hidden: jax.Array | None = None
    ) -> Features:
        """Features of views (V, B, H, W, 3), rows (V B,).

        Args:
          params: of the student or the teacher.
          views: normalised.
          keys: (B,), by which each view leaves out layers of its own; None: none is left out.
          hidden: (V, B, h, w); None: all are seen.
        """
        if keys is not None:
            fold = jax.vmap(jax.random.fold_in, (0, None))
            keys = jnp.concatenate([fold(keys, i) for i in range(len(views))])
        if hidden is not None:
            hidden = enlarge(rearrange(hidden, "v b h w -> (v b) h w"), self._merged)
        return self._run(params, "encode", rearrange(views, "v b h w c -> (v b) h w c"), keys, hidden)

    def _targets(self, logits: jax.Array, chosen: jax.Array, centre: str, context: Context) -> jax.Array:
        temperature = self._temperature(context.step)
        if context.state is None:
            return sinkhorn(logits, temperature, chosen, DEVICES)
        return centred(logits, context.state[centre], temperature)

    def _frozen(self, params: Any, step: jax.Array) -> Any:
        """Parameters whose prototypes of views have no gradient in the first steps."""
        if not self.task.freeze_steps:
            return params
        prototypes = params["image_head"]["prototypes"]
        fixed = jnp.where(step < self.task.freeze_steps, jax.lax.stop_gradient(prototypes), prototypes)
        return {**params, "image_head": {**params["image_head"], "prototypes": fixed}}

    @property
    def _grid(self) -> tuple[int, int]:
        height, width = height_width(self.config.model.image_size)
        return height // self.config.model.strides[-1], width // self.config.model.strides[-1]

    @property
    def _merged(self) -> int:
        """Patches of the embedding along one side of a patch of the last map."""
        return self.config.model.strides[-1] // self.config.model.patch_size

    @property
    def _most(self) -> int:
        """M."""
        return max(1, math.floor(self.task.mask_share[1] * math.prod(self._grid)))

    def _hidden(self, draws: Draws) -> jax.Array:
        """Patches of the masked view, (B, h, w)."""
        return hide_blocks(draws.blocks, self._grid, self.task.mask_share)


def _first(hidden: jax.Array, most: int) -> tuple[jax.Array, jax.Array]:
    """Numbers (B, M) of the patches that are hidden (B, h, w), the others behind them; and whether each is."""
    flat = rearrange(hidden, "b h w -> b (h w)")
    order = jnp.argsort(~flat, axis=1, stable=True)[:, :most]
    return order, jnp.take_along_axis(flat, order, 1)
