"""Transforms of whole samples: image, boxes, masks and maps move together.

A transform is a dataclass of settings and a call, `transform(sample, rng) -> sample`; a configuration lists a chain of
them. One of your own, in any module, is a subclass of `visionfm_jax.config.Transform`. Rules for it:
  * `rng` is the sample's own, of (seed, global sample index): draw from nothing else, and as much whatever the image,
    so that what comes after does not depend on it.
  * `sample.crop`, `resize` and `flip` move all fields at once, and are free: pixels are made when somebody looks at
    them (`sample.image`), the whole chain in one decode and one resize. So geometry comes first, and what changes
    colours after it.

This module needs NumPy alone: configurations are read where there is no image library.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from visionfm_jax.config import PhotometricConfig, Transform
from visionfm_jax.config.limits import (
    CHANCE,
    HeightWidth,
    ImageSize,
    Limits,
    OneOf,
    Problem,
    Range,
    height_width,
    shortest,
)

if TYPE_CHECKING:
    from visionfm_jax.data.sample import Sample

TRIES = 10  # of a random resized crop, to fit into the image
SIZE = Range(0, 4096)  # pixels
INTERPOLATION = OneOf(("bicubic", "bilinear"))


def random_box(
    draws: np.ndarray, scale: tuple[float, float], ratio: tuple[float, float], image: HeightWidth, to: HeightWidth
) -> tuple[int, int, int, int]:
    """Top, left, height and width of a random resized crop (Szegedy et al. 2015).

    After ten tries that do not fit it is the largest centre box of an allowed ratio.

    Args:
      draws: (10, 4) in [0, 1): area, ratio, top, left of every try.
      scale: least and largest area of the crop relative to the image.
      ratio: least and largest factor by which width / height differs from that of `to`; log-uniform.
      image: (H, W) in pixels.
      to: (H, W) that the crop is resized to.
    """
    (height, width), ratio = image, [r * to[1] / to[0] for r in ratio]
    (low, high), (log_low, log_high) = scale, (math.log(r) for r in ratio)
    for area, aspect, top, left in draws.tolist():
        pixels = height * width * (low + (high - low) * area)
        aspect = math.exp(log_low + (log_high - log_low) * aspect)
        w, h = round(math.sqrt(pixels * aspect)), round(math.sqrt(pixels / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(top * (height - h + 1)), int(left * (width - w + 1)), h, w
    h = min(height, max(1, round(width / ratio[0])))
    w = min(width, max(1, round(height * ratio[1])))
    return (height - h) // 2, (width - w) // 2, h, w


@dataclass(kw_only=True)
class RandomResizedCrop(Transform):
    """A random part of the image, resized (Szegedy et al. 2015)."""

    scale: tuple[float, float] = (0.08, 1.0)  # area of the crop relative to the image
    ratio: tuple[float, float] = (3 / 4, 4 / 3)  # width / height of the crop over that of `size`, log-uniform
    size: tuple[int, int] = (0, 0)  # height, width, pixels; 0: the model's
    min_visible: float = 0.0  # objects with a smaller share of their box left are dropped

    limits: ClassVar[Limits] = {
        "scale": Range(0, 1, above=True),
        "ratio": Range(0.01, 100),
        "size": SIZE,
        "min_visible": CHANCE,
    }

    def problems(self, name: str) -> list[Problem]:
        return ordered(self, name, "scale") + ordered(self, name, "ratio")

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        size = size_of(self, sample)
        box = random_box(rng.random((TRIES, 4)), self.scale, self.ratio, sample.size, size)
        return sample.crop(*box, min_visible=self.min_visible).resize(size)


@dataclass(kw_only=True)
class Resize(Transform):
    """The whole image at another size."""

    to: str = "both"  # both: exactly `size` | shorter: cover `size` | longer: fit into `size`
    size: tuple[int, int] = (0, 0)  # height, width, pixels; 0: the model's
    scale: tuple[float, float] = (1.0, 1.0)  # range of a random factor on `size`; detection: (0.1, 2.0)
    interpolation: str = "bicubic"  # in evaluation: bicubic | bilinear; training uses a faster one

    limits: ClassVar[Limits] = {
        "to": OneOf(("both", "shorter", "longer")),
        "size": SIZE,
        "scale": Range(0.01, 100),
        "interpolation": INTERPOLATION,
    }

    def problems(self, name: str) -> list[Problem]:
        return ordered(self, name, "scale")

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        low, high = self.scale
        factor = low + (high - low) * rng.random()
        size = tuple(factor * side for side in size_of(self, sample))
        if self.to != "both":
            factors = [new / old for new, old in zip(size, sample.size, strict=True)]
            factor = max(factors) if self.to == "shorter" else min(factors)
            size = tuple(factor * side for side in sample.size)
        return sample.resize(tuple(max(1, round(side)) for side in size), self.interpolation)


@dataclass(kw_only=True)
class CenterCrop(Transform):
    """The centre of the image, padded if the image is smaller."""

    size: tuple[int, int] = (0, 0)  # height, width, pixels; 0: the model's
    min_visible: float = 0.0  # objects with a smaller share of their box left are dropped

    limits: ClassVar[Limits] = {"size": SIZE, "min_visible": CHANCE}

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        height, width = size_of(self, sample)
        top, left = round((sample.size[0] - height) / 2), round((sample.size[1] - width) / 2)
        return sample.crop(top, left, height, width, self.min_visible)


@dataclass(kw_only=True)
class RandomCrop(Transform):
    """A window at a random place, padded to the right and below if the image is smaller."""

    size: tuple[int, int] = (0, 0)  # height, width, pixels; 0: the model's
    padding: int = 0  # pixels that the window may extend beyond the image
    min_visible: float = 0.0  # objects with a smaller share of their box left are dropped

    limits: ClassVar[Limits] = {"size": SIZE, "padding": SIZE, "min_visible": CHANCE}

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        size, draws = size_of(self, sample), rng.random(2)
        place = [
            -self.padding + int(draw * (max(0, side - window) + 2 * self.padding + 1))
            for draw, side, window in zip(draws, sample.size, size, strict=True)
        ]
        return sample.crop(*place, *size, self.min_visible)


@dataclass(kw_only=True)
class Pad(Transform):
    """A border to the right of the image and below, up to a size; larger images are cropped."""

    size: tuple[int, int] = (0, 0)  # height, width, pixels; 0: the model's

    limits: ClassVar[Limits] = {"size": SIZE}

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        return sample.crop(0, 0, *size_of(self, sample))


@dataclass(kw_only=True)
class Flip(Transform):
    """Mirrored, left to right; not for flags, digits, clock faces."""

    chance: float = 0.5  # probability

    limits: ClassVar[Limits] = {"chance": CHANCE}

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        return sample.flip() if rng.random() < self.chance else sample


@dataclass(kw_only=True)
class RandAugment(Transform):
    """Random operations on colours and shapes (Cubuk et al. 2020), on the image or on each view; boxes stay."""

    operations: int = 2  # number per image
    magnitude: float = 9.0  # from 0 to 10

    limits: ClassVar[Limits] = {"operations": Range(0, 100), "magnitude": Range(0, 10)}

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        from visionfm_jax.data.rand_augment import rand_augment

        return sample.map_pixels(lambda pixels: rand_augment(pixels, self.operations, self.magnitude, rng))


@dataclass(kw_only=True)
class Views:
    """Views with the same settings, each a random resized crop of the image."""

    name: str = "global"  # of the array in the batch, uint8 (B, V, H, W, 3); several `Views` may share it
    count: int = 2  # number of views per sample
    size: ImageSize = 224  # pixels, side of a square or (height, width)
    scale: tuple[float, float] = (0.32, 1.0)  # area of the crop relative to the image
    flip: float = 0.5  # probability of mirroring left to right
    photometric: PhotometricConfig = field(default_factory=PhotometricConfig)  # on the device: `augment.augment_views`

    limits: ClassVar[Limits] = {
        "count": Range(1, 64),
        "size": Range(1, 4096),
        "scale": Range(0, 1, above=True),
        "flip": CHANCE,
    }


@dataclass(kw_only=True)
class MultiCrop(Transform):
    """Several views in place of an image (Caron et al. 2020), decoded once."""

    views: tuple[Views, ...] = ()

    limits: ClassVar[Limits] = {}

    def problems(self, name: str) -> list[Problem]:
        out = [] if self.views else [(f"{name}.views", (), "needs at least one", "add Views(name='global')")]
        sizes = {}
        for i, views in enumerate(self.views):
            out += ordered(views, f"{name}.views[{i}]", "scale")
            size = height_width(views.size)
            if (other := sizes.setdefault(views.name, size)) != size:
                rule = f"is not {shortest(other)}, of others that are named {views.name}"
                out.append((f"{name}.views[{i}].size", views.size, rule, "set the same, or another name"))
        return out

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        places: dict[str, list] = {}
        for views in self.views:
            size = height_width(views.size)
            for draws in rng.random((views.count, TRIES * 4 + 1)):
                box = random_box(draws[:-1].reshape(TRIES, 4), views.scale, (3 / 4, 4 / 3), sample.size, size)
                place = sample.placement.crop(*box).resize(size)
                places.setdefault(views.name, []).append(place.flip() if draws[-1] < views.flip else place)
        return sample.with_views(places)


def size_of(transform: Transform, sample: Sample) -> tuple[int, int]:
    """The size that a transform asks for, sides of 0 replaced by those that the model is given."""
    return tuple(side or wanted for side, wanted in zip(transform.size, sample.target, strict=True))


def ordered(transform: object, name: str, leaf: str) -> list[Problem]:
    """The rule that a pair of bounds is in order."""
    low, high = value = getattr(transform, leaf)
    return [] if low <= high else [(f"{name}.{leaf}", value, "needs low <= high", f"set {high, low}")]
