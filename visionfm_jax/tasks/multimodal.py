"""Masked images, image-text contrast, captions and masked words, with one pass of the encoder over every image.

Of every p + q samples the first p are pairs and the others bare images (`MultimodalConfig.pair_ratio`). Bare images are
shown in part and reconstructed; pairs are contrasted with all others of the batch, captioned, and their captions'
hidden words guessed.

Shapes: B rows of this device, P pairs among them, H W image, h w its units, L tokens, E width of the joint space.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange

from visionfm_jax.config import Config, TaskConfig
from visionfm_jax.config.limits import LOSS_WEIGHT, SHARE, SIDE, Filled, Limits, Problem, Range, height_width
from visionfm_jax.data.augment import augment, normalize
from visionfm_jax.data.fields import OptionalTexts, check_token
from visionfm_jax.data.tokenizer import open_tokenizer
from visionfm_jax.errors import ConfigError
from visionfm_jax.losses import contrastive
from visionfm_jax.losses.captioning import caption_loss, mean_over, word_losses
from visionfm_jax.losses.contrastive import Targets
from visionfm_jax.losses.masked import enlarge, hide_units, hide_words, pixel_loss
from visionfm_jax.models.aurora import Aurora, AuroraConfig
from visionfm_jax.models.decoder import view_of
from visionfm_jax.models.generate import Decoding, generate
from visionfm_jax.models.layers import GatherParams, l2_normalize
from visionfm_jax.parallel.context import Context
from visionfm_jax.parallel.mesh import all_rows, first_row
from visionfm_jax.tasks.pairs import PairTask
from visionfm_jax.tasks.task import split_keys

EVAL_SEED = 20  # of what evaluations hide: the same in every run


@dataclass(kw_only=True)
class MultimodalConfig(TaskConfig):
    """Masked image modelling, image-text contrast, captioning and masked words, jointly.

    Every image passes the encoder once: of `sum(pair_ratio)` samples the first have captions, the others none.
    """

    tokenizer: str = ""  # path of a SentencePiece model with a mask token, or the name of a shipped one
    pair_ratio: tuple[int, int] = (3, 1)  # (n, m): n samples with caption, then m without, in turn
    masked_image: float = 1.0  # weight of the masked image modelling loss
    contrastive: float = 1.0  # weight of the contrastive loss
    captioning: float = 2.0  # weight of the captioning loss
    masked_language: float = 1.0  # weight of the masked word loss
    mask_unit: int = 32  # pixels; side of a masked square
    mask_ratio: float = 0.6  # share of an image that is masked
    word_mask_ratio: float = 0.4  # share of the tokens that are masked (Wettig et al. 2023); at least one
    image_dropout: float = 0.1  # share of texts whose masked words are predicted without the image
    grad_cache: bool = True  # contrast micro-batches with the whole batch, as for `ContrastiveConfig`

    limits: ClassVar[Limits] = {
        "tokenizer": Filled("is needed for captions", "set the path of a SentencePiece model"),
        "pair_ratio": Range(0, 1000),  # samples
        "masked_image": LOSS_WEIGHT,
        "contrastive": LOSS_WEIGHT,
        "captioning": LOSS_WEIGHT,
        "masked_language": LOSS_WEIGHT,
        "mask_unit": SIDE,
        "mask_ratio": Range(0, 1, above=True, below=True),
        "word_mask_ratio": SHARE,
        "image_dropout": SHARE,
    }

    model_class: ClassVar[type] = AuroraConfig
    predictions: ClassVar[frozenset[str]] = frozenset(
        {"embeddings", "features", "captions", "masked_language", "masked_image"}
    )
    reads_captions: ClassVar[bool] = True

    @property
    def loss_scope(self) -> str:
        return "batch" if self.grad_cache else "micro_batch"

    @property
    def rows(self) -> tuple[int, str]:
        return sum(self.pair_ratio), f" x {sum(self.pair_ratio)} samples of task.pair_ratio = {self.pair_ratio}"

    def problems(self, run: Config) -> list[Problem]:
        image, out = run.model.image, []
        weights = ("masked_image", "contrastive", "captioning", "masked_language")
        if not sum(getattr(self, name) for name in weights):
            out.append(("task", dict.fromkeys(weights, 0.0), "all loss weights are 0", "set one, e.g. captioning"))
        if min(self.pair_ratio) < 1:
            rule = "needs samples with captions and without"
            out.append(("task.pair_ratio", self.pair_ratio, rule, "set (3, 1)"))
        unit, sizes = self.mask_unit, {"model.image.image_size": image.image_size}
        sizes |= {
            f"evals[{i}].image_size": e.image_size
            for i, e in enumerate(run.evals)
            if e.image_size and e.measures == "masked_image"
        }
        for field, size in sizes.items():
            if unit % image.patch_size or any(side % unit for side in height_width(size)):
                rule = f"must be a multiple of model.image.patch_size = {image.patch_size} and divide {field} = {size}"
                out.append(("task.mask_unit", unit, rule, f"set it to {image.patch_size}"))
        return out

    def fields(self, run: Config) -> OptionalTexts:
        """A decoder writes texts: it must know every entry, have no others, and mean the same by special tokens."""
        text, tokenizer = run.model.text, open_tokenizer(self.tokenizer)
        if tokenizer.mask is None:
            raise ConfigError(
                f"config.task.tokenizer = {tokenizer.name!r}: has no mask token; train a tokenizer that has one "
                "by `python -m visionfm_jax.data.tokenizer train`"
            )
        if tokenizer.vocab_size != text.vocab_size:
            raise ConfigError(
                f"config.model.text.vocab_size = {text.vocab_size}: {tokenizer.name} has {tokenizer.vocab_size} "
                f"entries; set it to {tokenizer.vocab_size}"
            )
        check_token("begin", text.begin_token, tokenizer.begin, tokenizer)
        check_token("end", text.end_token, tokenizer.end, tokenizer)
        check_token("mask", text.mask_token, tokenizer.mask, tokenizer)
        return OptionalTexts(tokenizer, text.context)

    def make(self, run: Config, dtype: jnp.dtype, gather_params: GatherParams) -> Multimodal:
        return Multimodal(run, dtype, gather_params)


class Draws(NamedTuple):
    """The random keys of rows, (B,) each."""

    augment: jax.Array
    drop_path: jax.Array
    hide: jax.Array  # units of the image
    words: jax.Array
    image_dropout: jax.Array


class Multimodal(PairTask):
    """The `tasks.task.ContrastTask` of images with and without captions."""

    def __init__(self, config: Config, dtype: jnp.dtype, gather_params: GatherParams):
        self.config, self.task = config, config.task
        self.model = Aurora(config.model, dtype, gather_params)
        self.contrast_weight = config.task.contrastive

    def embed(self, params: Any, batch: dict, keys: jax.Array, context: Context) -> dict[str, jax.Array]:
        """What `contrast` compares, of the pairs alone."""
        del context
        draws = split_keys(Draws, keys)
        images = augment(self._pairs(batch["image"]), self._pairs(draws.augment), self.config.data.augment)
        features = self._run(params, "encode", images, self._pairs(draws.drop_path))
        tokens = self._pairs(batch["text"])
        text = self._run(params, "encode_text", tokens, view_of(tokens, self.config.model.text, causal=True))
        return self._embedded(params, features, text, tokens)

    def forward(self, params: Any, batch: dict, keys: jax.Array, context: Context) -> tuple[dict, dict, dict]:
        """All but the contrast.

        Returns:
          `image` and `text` (P, E) and `scale` (P,) for `contrast`; and per-sample arrays: `loss` (B,), whose mean is
          the weighted sum of the means of `masked_image` (B - P,), `captioning` (P,) and `masked_language` (P,); and
          `logit_scale` (P,); and nothing whose mean is wanted.
        """
        del context
        draws, task = split_keys(Draws, keys), self.task
        images = augment(batch["image"], draws.augment, self.config.data.augment)
        units = hide_units(draws.hide, self._units(images), task.mask_ratio) & self._is_bare(len(images))[:, None, None]
        features = self._run(params, "encode", images, draws.drop_path, self._patches(units))

        reconstructed = self._run(params, "reconstruct", self._bare(features))
        hidden = enlarge(self._bare(units), task.mask_unit)
        own = {"masked_image": pixel_loss(reconstructed, self._bare(images), hidden)}

        tokens, features = self._pairs(batch["text"]), self._pairs(features)
        view, length = view_of(tokens, self.config.model.text, causal=True), tokens.shape[1]
        words = hide_words(self._pairs(draws.words), view.lengths, length, task.word_mask_ratio)
        both = jnp.concatenate([tokens, self._without(words, tokens)], 1)
        mask = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - task.image_dropout))(self._pairs(draws.image_dropout))
        mask = jnp.stack([jnp.ones_like(mask), mask], 1)
        view = view._replace(causal=(True, False))
        text = self._run(params, "encode_text", both, view)
        logits = self._run(params, "decode_text", text, view, self._run(params, "project_tokens", features), mask)
        own["captioning"] = caption_loss(logits[:, :length], tokens, view.lengths)
        own["masked_language"] = mean_over(word_losses(logits[:, length:], tokens), words)

        texts = task.captioning * own["captioning"] + task.masked_language * own["masked_language"]
        own["loss"] = self._rows(texts, task.masked_image * own["masked_image"])
        embedded = self._embedded(params, features, text[:, :length], tokens)
        return embedded, {**own, "logit_scale": jnp.exp(embedded["scale"])}, {}

    def contrast(self, embedded: dict[str, jax.Array], context: Context) -> jax.Array:
        """Loss (P,) of this device's pairs among those of all; `embedded` as `embed` gives it."""
        del context
        images, texts = l2_normalize(embedded["image"]), l2_normalize(embedded["text"])
        targets = Targets(first_row(len(images)) + jnp.arange(len(images)))
        scale = jnp.exp(embedded["scale"])[:, None]
        return contrastive.clip_loss(images, texts, all_rows(images), all_rows(texts), scale, targets)

    def join(self, own: dict[str, jax.Array], contrast: jax.Array) -> dict[str, jax.Array]:
        """Per-sample arrays with the contrast: `contrastive` (P,), and `loss` (B,) with its share."""
        bare = jnp.zeros_like(own["masked_image"])
        loss = own["loss"] + self._rows(self.contrast_weight * contrast, bare)
        return {**own, "loss": loss, "contrastive": contrast}

    def predict(self, params: Any, batch: dict, what: Hashable = "embeddings") -> dict[str, jax.Array]:
        """One of `MultimodalConfig.predictions`; random draws come from the rows' `record`."""
        if isinstance(what, Decoding):
            return {"generated": self._caption(params, batch, what)}
        kinds = {
            "embeddings": self._embeddings, "features": self._features, "masked_language": self._guessed,
            "masked_image": self._reconstructed, "reconstruct": self._reconstructed,
        }  # fmt: skip
        out = kinds[what](params, batch)
        return {k: v for k, v in out.items() if what == "reconstruct" or k not in ("reconstruction", "hidden")}

    @property
    def step_flops(self) -> float:
        """FLOPs of one optimiser step on the global batch: 3 x forward, nothing done twice counted twice."""
        part = self.config.model.flops(readings=2)  # to caption, and to guess
        pairs, bare = (n / sum(self.task.pair_ratio) for n in self.task.pair_ratio)
        texts = sum(part[name] for name in ("pool", "token_projection", "text_projection", "unimodal", "multimodal"))
        return 3 * (part["encoder"] + pairs * texts + bare * part["reconstruction"]) * self.config.train.batch_size

    # Rows: every p + q of them are p pairs, then q bare images.

    def _pairs(self, rows: jax.Array) -> jax.Array:
        return self._some(rows, slice(self.task.pair_ratio[0]))

    def _bare(self, rows: jax.Array) -> jax.Array:
        return self._some(rows, slice(self.task.pair_ratio[0], None))

    def _some(self, rows: jax.Array, which: slice) -> jax.Array:
        turns = rearrange(rows, "(t s) ... -> t s ...", s=sum(self.task.pair_ratio))
        return rearrange(turns[:, which], "t s ... -> (t s) ...")

    def _is_bare(self, rows: int) -> jax.Array:
        return jnp.arange(rows) % sum(self.task.pair_ratio) >= self.task.pair_ratio[0]

    def _rows(self, pairs: jax.Array, bare: jax.Array) -> jax.Array:
        """Losses (P,) and (B - P,) to (B,), whose mean is the sum of their means."""
        p, q = self.task.pair_ratio
        both = [(p + q) / n * rearrange(rows, "(t n) -> t n", n=n) for rows, n in ((pairs, p), (bare, q))]
        return rearrange(jnp.concatenate(both, 1), "t s -> (t s)")

    # Steps of the model.

    def _run(self, params: Any, method: str, *arguments: Any) -> Any:
        return self.model.apply({"params": params}, *arguments, method=method)

    def _units(self, images: jax.Array) -> tuple[int, int]:
        return images.shape[1] // self.task.mask_unit, images.shape[2] // self.task.mask_unit

    def _patches(self, units: jax.Array) -> jax.Array:
        return enlarge(units, self.task.mask_unit // self.config.model.image.patch_size)

    def _embedded(self, params: Any, features: jax.Array, text: jax.Array, tokens: jax.Array) -> dict[str, jax.Array]:
        image = self._run(params, "embed_image", features)
        text = self._run(params, "embed_text", text, tokens)
        return {"image": image, "text": text, "scale": jnp.broadcast_to(params["scale"], len(image))}

    def _without(self, words: jax.Array, tokens: jax.Array) -> jax.Array:
        return jnp.where(words, self.config.model.text.mask_token, tokens)

    # What evaluations ask for.

    def _shown(self, params: Any, batch: dict) -> jax.Array:
        return self._run(params, "encode", normalize(batch["image"], self.config.data.augment))

    def _eval_draws(self, batch: dict) -> Draws:
        fold = jax.vmap(lambda record: jax.random.fold_in(jax.random.key(EVAL_SEED), record))
        return split_keys(Draws, fold(batch["record"]))

    def _embeddings(self, params: Any, batch: dict) -> dict[str, jax.Array]:
        """`image_embedding` and `text_embedding`, (B, E) of length 1, of what the batch holds of the two."""
        out = {}
        if "image" in batch:
            image = self._run(params, "embed_image", self._shown(params, batch))
            out["image_embedding"] = l2_normalize(image)
        if "text" in batch:
            tokens = batch["text"]
            text = self._run(params, "encode_text", tokens, view_of(tokens, self.config.model.text, causal=True))
            out["text_embedding"] = l2_normalize(self._run(params, "embed_text", text, tokens))
        return out

    def _features(self, params: Any, batch: dict) -> dict[str, jax.Array]:
        """`features` of the images, pooled."""
        images = normalize(batch["image"], self.config.data.augment)
        return {"features": self._run(params, "features", images)}

    def _guessed(self, params: Any, batch: dict) -> dict[str, jax.Array]:
        """Sums over the hidden words (B,): `nll`, `nll_without_image`, without the image, and `words`, their number."""
        tokens, image = batch["text"], self._run(params, "project_tokens", self._shown(params, batch))
        view = view_of(tokens, self.config.model.text, causal=False)
        words = hide_words(self._eval_draws(batch).words, view.lengths, tokens.shape[1], self.task.word_mask_ratio)
        text = self._run(params, "encode_text", self._without(words, tokens), view)
        out = {}
        for name, mask in (("nll", jnp.ones), ("nll_without_image", jnp.zeros)):
            losses = word_losses(self._run(params, "decode_text", text, view, image, mask(len(image))), tokens)
            out[name] = jnp.where(words, losses, 0).sum(1)
        return {**out, "words": words.sum(1)}

    def _reconstructed(self, params: Any, batch: dict) -> dict[str, jax.Array]:
        """`reconstruction` uint8 (B, H, W, 3), hidden units reconstructed; `hidden` (B, h, w); `pixel_error` (B,)."""
        config = self.config.data.augment
        images = normalize(batch["image"], config)
        units = hide_units(self._eval_draws(batch).hide, self._units(images), self.task.mask_ratio)
        reconstructed = self._run(
            params, "reconstruct", self._run(params, "encode", images, None, self._patches(units))
        )
        hidden = enlarge(units, self.task.mask_unit)
        pixels = (reconstructed * jnp.array(config.std) + jnp.array(config.mean)) * 255
        pixels = jnp.clip(jnp.round(pixels), 0, 255).astype(jnp.uint8)
        return {
            "reconstruction": jnp.where(hidden[..., None], pixels, batch["image"]),
            "hidden": units,
            "pixel_error": pixel_loss(reconstructed, images, hidden),
        }

    def _caption(self, params: Any, batch: dict, decoding: Decoding) -> jax.Array:
        """Texts (B, L)."""
        text = self.config.model.text
        cache = self._run(params, "init_cache", self._run(params, "project_tokens", self._shown(params, batch)))

        def step(cache: Any, tokens: jax.Array, position: jax.Array) -> tuple[jax.Array, Any]:
            return self._run(params, "decode_token", cache, tokens, position)

        keys = self._eval_draws(batch).words if decoding.method == "nucleus" else None
        return generate(
            step, cache, decoding,
            begin=text.begin_token, end=text.end_token, length=text.context, keys=keys, banned=(text.mask_token,),
        )  # fmt: skip
