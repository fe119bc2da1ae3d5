"""Pictures and their captions: two towers under a contrastive loss over the global batch.

Shapes: B rows of this device, H W image, L tokens, E width of the joint space.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from visionfm_jax.config import Config, TaskConfig
from visionfm_jax.config.limits import Limits, OneOf, Range
from visionfm_jax.data.augment import augment, normalize, swap_pairs
from visionfm_jax.data.fields import Texts, check_token
from visionfm_jax.data.tokenizer import open_tokenizer
from visionfm_jax.errors import ConfigError
from visionfm_jax.losses import contrastive
from visionfm_jax.losses.contrastive import Targets
from visionfm_jax.models.clip import Clip, ClipConfig, Embeddings
from visionfm_jax.models.layers import GatherParams, l2_normalize
from visionfm_jax.parallel.context import Context
from visionfm_jax.parallel.mesh import all_rows, first_row
from visionfm_jax.tasks.pairs import PairTask


@dataclass(kw_only=True)
class ContrastiveConfig(TaskConfig):
    """Image-text contrast over the global batch (CLIP, SigLIP)."""

    loss: str = "softmax"  # softmax (Radford et al. 2021) | sigmoid (Zhai et al. 2023)
    tokenizer: str = "clip"  # clip, or a path: of a tokenizer.json, or of a SentencePiece model
    mixup: float = 0.0  # alpha of Beta(alpha, alpha), from which the mixing weight is drawn; 0: no Mixup
    grad_cache: bool = True  # contrast micro-batches with the whole batch (Gao et al. 2021); False: each alone

    limits: ClassVar[Limits] = {
        "loss": OneOf(("softmax", "sigmoid")),
        "mixup": Range(1e-3, 100, "of Beta(alpha, alpha)", off=True),
    }

    model_class: ClassVar[type] = ClipConfig
    predictions: ClassVar[frozenset[str]] = frozenset({"embeddings", "features"})
    reads_captions: ClassVar[bool] = True

    @property
    def loss_scope(self) -> str:
        return "batch" if self.grad_cache else "micro_batch"

    @property
    def rows(self) -> tuple[int, str]:
        return (2, " x 2 images to mix") if self.mixup else (1, "")

    def fields(self, run: Config) -> Texts:
        text, tokenizer = run.model.text, open_tokenizer(self.tokenizer)
        if tokenizer.vocab_size > text.vocab_size:
            raise ConfigError(
                f"config.model.text.vocab_size = {text.vocab_size}: {tokenizer.name} has {tokenizer.vocab_size} "
                f"entries; set it to {tokenizer.vocab_size} or more"
            )
        check_token("end", text.end_token, tokenizer.end, tokenizer)
        return Texts(tokenizer, text.context)

    def make(self, run: Config, dtype: jnp.dtype, gather_params: GatherParams) -> Contrastive:
        return Contrastive(run, dtype, gather_params)


class Contrastive(PairTask):
    """The `tasks.task.ContrastTask` of image-text pairs."""

    contrast_weight = 1.0

    def __init__(self, config: Config, dtype: jnp.dtype, gather_params: GatherParams):
        self.config = config
        self.model = Clip(config.model, dtype, gather_params, sigmoid=config.task.loss == "sigmoid")

    def embed(self, params: Any, batch: dict, keys: jax.Array, context: Context) -> dict[str, jax.Array]:
        """What `contrast` compares, row by row: embeddings, logit scale and, if images are mixed, their shares."""
        del context
        keys = jax.vmap(lambda key: jax.random.split(key, 3))(keys)  # (B, 3)
        images = augment(batch["image"], keys[:, 0], self.config.data.augment)
        share = None
        if self.config.task.mixup:
            share = pair_shares(keys[:, 1], self.config.task.mixup)
            images = mix_pairs(images, share)
        out: Embeddings = self.model.apply({"params": params}, images, batch["text"], keys[:, 2])
        rows = {"image": out.image, "text": out.text, "scale": jnp.broadcast_to(out.scale, len(images))}
        rows |= {} if out.bias is None else {"bias": jnp.broadcast_to(out.bias, len(images))}
        return rows | ({} if share is None else {"share": share})

    def forward(self, params: Any, batch: dict, keys: jax.Array, context: Context) -> tuple[dict, dict, dict]:
        """`embed`'s, and per-sample arrays (B,): `loss`, of which there is none but the contrast, and `logit_scale`."""
        embedded = self.embed(params, batch, keys, context)
        return embedded, {"loss": jnp.zeros(len(keys)), "logit_scale": jnp.exp(embedded["scale"])}, {}

    def contrast(self, embedded: dict[str, jax.Array], context: Context) -> jax.Array:
        """Loss (B,) of this device's rows against all; `embedded` as `embed` gives it."""
        del context
        images, texts = l2_normalize(embedded["image"]), l2_normalize(embedded["text"])
        own = jnp.arange(len(images))
        mixed = (own ^ 1, embedded["share"]) if "share" in embedded else (None, None)
        first = first_row(len(images))
        targets = jax.tree.map(lambda row: first + row if row.dtype == jnp.int32 else row, Targets(own, *mixed))
        all_texts, scale = all_rows(texts), jnp.exp(embedded["scale"])[:, None]
        if self.config.task.loss == "sigmoid":
            return contrastive.sigmoid_loss(images, all_texts, scale, embedded["bias"][:, None], targets)
        return contrastive.clip_loss(images, texts, all_rows(images), all_texts, scale, targets)

    def join(self, own: dict[str, jax.Array], contrast: jax.Array) -> dict[str, jax.Array]:
        """Per-sample arrays with the contrast."""
        return {**own, "loss": own["loss"] + contrast}

    def predict(self, params: Any, batch: dict, what: Hashable = "embeddings") -> dict[str, jax.Array]:
        """`image_embedding` and `text_embedding`, (B, E) of length 1, of what the batch holds of the two.

        For "features": `features` of the images, pooled.
        """
        if what == "features":
            images = normalize(batch["image"], self.config.data.augment)
            return {"features": self.model.apply({"params": params}, images, method=Clip.features)}
        out = {}
        if "image" in batch:
            images = normalize(batch["image"], self.config.data.augment)
            out["image_embedding"] = self._embed(params, images, Clip.embed_images)
        if "text" in batch:
            out["text_embedding"] = self._embed(params, batch["text"], Clip.embed_texts)
        return out

    def _embed(self, params: Any, x: jax.Array, method: Any) -> jax.Array:
        return l2_normalize(self.model.apply({"params": params}, x, method=method))

    @property
    def step_flops(self) -> float:
        """FLOPs of one optimiser step on the global batch: 3 x forward of both towers, nothing recomputed counted."""
        return 3 * self.config.model.flops * self.config.train.batch_size


def pair_shares(keys: jax.Array, alpha: float) -> jax.Array:
    """Shares (B,) ~ Beta(alpha, alpha) of keys (B,), the same for rows 2 k and 2 k + 1."""
    shares = jax.vmap(lambda key: jax.random.beta(key, alpha, alpha))(keys[::2])
    return jnp.repeat(shares, 2)


def mix_pairs(images: jax.Array, share: jax.Array) -> jax.Array:
    """Mixup (Zhang et al. 2018) of rows 2 k and 2 k + 1: each keeps its share (B,), the rest is the other's."""
    share = share[:, None, None, None]
    return share * images + (1 - share) * swap_pairs(images)
