"""Measurements on held-out data: a configuration for each.

The modules that measure are imported when an eval is made, so that a configuration file does not wait for them.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from visionfm_jax.config import Config, EvalConfig, SourceConfig
from visionfm_jax.config.limits import Limits, OneOf, Range

if TYPE_CHECKING:
    from visionfm_jax.evals.eval import Eval


class Measurement(EvalConfig):
    """An eval of this package: made by `measured_by`, "module:name" in `evals`, which is imported then."""

    measured_by: ClassVar[str]

    def make(self, run: Config, host: int, hosts: int) -> Eval:
        module, name = self.measured_by.split(":")
        return getattr(importlib.import_module(f"visionfm_jax.evals.{module}"), name)(self, run, host, hosts)


@dataclass(kw_only=True)
class AccuracyConfig(Measurement):
    """Loss and accuracy of a classifier on labelled images."""

    kind: ClassVar[str] = "classification"
    measured_by: ClassVar[str] = "classification:ClassificationEval"
    measures: ClassVar[str] = "labels"
    metrics: ClassVar[tuple[str, ...]] = ("top1", "top5", "balanced_accuracy")


@dataclass(kw_only=True)
class PixelBaselineConfig(Measurement):
    """Logistic regression on the pixels of `data.train`, which a classifier must beat."""

    kind: ClassVar[str] = "pixel_baseline"
    measured_by: ClassVar[str] = "pixel_baseline:PixelBaseline"
    measures: ClassVar[str] = "labels"
    metrics: ClassVar[tuple[str, ...]] = ("top1",)


@dataclass(kw_only=True)
class ZeroShotConfig(Measurement):
    """Accuracy of images against the names of their classes."""

    kind: ClassVar[str] = "zero_shot"
    measured_by: ClassVar[str] = "zero_shot:ZeroShotEval"
    measures: ClassVar[str] = "embeddings"
    metrics: ClassVar[tuple[str, ...]] = ("top1", "top5", "balanced_accuracy")

    classes: str = ""  # shipped list or file of class names, one per line; empty: those of the source
    prompts: str = ""  # shipped list or file, or one prompt with {} for the name; empty: imagenet_prompts_short


@dataclass(kw_only=True)
class RetrievalConfig(Measurement):
    """Recall of captions by image and of images by caption."""

    kind: ClassVar[str] = "retrieval"
    measured_by: ClassVar[str] = "retrieval:RetrievalEval"
    measures: ClassVar[str] = "embeddings"
    metrics: ClassVar[tuple[str, ...]] = (
        "image_to_text_r1", "image_to_text_r5", "image_to_text_r10",
        "text_to_image_r1", "text_to_image_r5", "text_to_image_r10",
    )  # fmt: skip

    gallery: tuple[SourceConfig, ...] = ()  # additional pairs to retrieve from

    @property
    def sources(self) -> tuple[SourceConfig, ...]:
        return (self.source, *self.gallery)


@dataclass(kw_only=True)
class KnnConfig(Measurement):
    """Accuracy of the nearest neighbours among features of labelled images, and the same by pixels."""

    kind: ClassVar[str] = "knn"
    measured_by: ClassVar[str] = "knn:KnnEval"
    measures: ClassVar[str] = "features"
    metrics: ClassVar[tuple[str, ...]] = ("top1",)

    gallery: tuple[SourceConfig, ...] = ()  # labelled images to compare with

    @property
    def sources(self) -> tuple[SourceConfig, ...]:
        return (self.source, *self.gallery)


@dataclass(kw_only=True)
class CaptioningConfig(Measurement):
    """Captions that the model writes, against the true ones."""

    kind: ClassVar[str] = "captioning"
    measured_by: ClassVar[str] = "captioning:CaptioningEval"
    measures: ClassVar[str] = "captions"
    metrics: ClassVar[tuple[str, ...]] = ("exact", "bleu4", "cider")

    decoding: str = "greedy"  # greedy | beam | nucleus
    beams: int = 4  # number of beams, for beam
    top_p: float = 0.9  # for nucleus

    limits: ClassVar[Limits] = {
        "decoding": OneOf(("greedy", "beam", "nucleus")),
        "beams": Range(1, 64),
        "top_p": Range(0, 1, above=True),
    }


@dataclass(kw_only=True)
class PerplexityConfig(Measurement):
    """Perplexity of masked words in captions, with the image and without."""

    kind: ClassVar[str] = "perplexity"
    measured_by: ClassVar[str] = "perplexity:PerplexityEval"
    measures: ClassVar[str] = "masked_language"
    metrics: ClassVar[tuple[str, ...]] = ("image_gain",)


@dataclass(kw_only=True)
class ReconstructionConfig(Measurement):
    """Error of the hidden pixels of images."""

    kind: ClassVar[str] = "reconstruction"
    measured_by: ClassVar[str] = "reconstruction:ReconstructionEval"
    measures: ClassVar[str] = "masked_image"
    metrics: ClassVar[tuple[str, ...]] = ("colour_gain",)
