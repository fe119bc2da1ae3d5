"""From a record to what a row is made of: open the image, apply the transforms that a configuration lists.

Shapes: H W of the images that the model is given, V views.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np

from visionfm_jax.config import Config, EvalConfig, PreprocessConfig, Transform
from visionfm_jax.config.limits import ImageSize, height_width, shortest
from visionfm_jax.data.fields import Spec
from visionfm_jax.data.images import MAX_PIXELS, Picture, opened
from visionfm_jax.data.sample import Placement, Sample
from visionfm_jax.data.transforms import Resize
from visionfm_jax.errors import ConfigError, one_line

FAILS = (ValueError, MemoryError, cv2.error)  # what a transform that cannot do its work raises
TRIED = ((90, 50), (50, 90))  # sizes of images on which transforms are tried before training


@dataclass(frozen=True)
class Chain:
    """The transforms of training, in order.

    Attributes:
      transforms: of the configuration; (): the whole image, whatever its ratio.
      size: (H, W), or the side of a square.
      max_pixels: of an image; one whose header states more is damaged.
      exact: resized as evaluation wants it.
    """

    transforms: Sequence[Transform]
    size: ImageSize
    max_pixels: int = MAX_PIXELS
    exact: bool = False

    @property
    def spec(self) -> Spec:
        """Of the pixels that a row gets: `image`, or the views by name."""
        views = [t.shapes for t in self.transforms if t.shapes]
        shapes = views[-1] if views else {"image": (*height_width(self.size), 3)}
        return {name: (shape, np.uint8) for name, shape in shapes.items()}

    def __call__(self, record: Mapping[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        """The record as `spec` says, and all else in it that lies on the image moved with it (`data.sample.Sample`).

        Args:
          record: "image", encoded bytes or uint8 (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), and the rest.
          rng: the sample's own; advances by the same amount whatever the image, if it can be decoded.

        Raises:
          DamagedImage: it cannot be.
          DamagedRecord: what lies on the image does not fit it.
        """
        with opened(record.get("image"), self.max_pixels) as picture:
            sample = Sample.of(record, picture, height_width(self.size), self.exact)
            for transform in self.transforms or (Resize(),):
                sample = transform(sample, rng)
            return sample.record()

    def __str__(self) -> str:
        """What is done, for people, in a line."""
        names = [type(t).__name__ for t in self.transforms] or ["whole image, resized"]
        return (
            f"{', '.join(names)}; JPEGs are decoded at 1/8, 1/4, 1/2 or full size, as needed, and resized "
            "once by OpenCV (bilinear; area averaging at half the size or less); "
            "evaluation decodes at full size and resizes by Pillow"
        )

    def check(self) -> None:
        """Try the chain on images of two sizes, several times as transforms draw what they do.

        Raises:
          ConfigError: a transform cannot do its work, or what leaves the chain is not of the model's size.
        """
        names = [type(t).__name__ for t in self.transforms]
        for seed, (height, width) in enumerate(TRIED * 8):
            try:
                out = self({"image": np.zeros((height, width, 3), np.uint8)}, np.random.default_rng(seed))
            except FAILS as error:
                problem = f"config.data.transforms = {names}: {one_line(error)}; mend or reorder them"
                raise ConfigError(problem) from error
            for name, (shape, _) in self.spec.items():
                if (found := np.shape(out.get(name))) != shape:
                    raise ConfigError(
                        f"config.data.transforms = {names}: make {name} of {found} of an image of {height} x {width} "
                        f"pixels, and the model is given {shape}; end them by RandomResizedCrop, RandomCrop or Pad"
                    )


@dataclass(frozen=True)
class EvalTransform:
    """The preprocessing of an evaluation's images, to uint8 (H, W, 3), RGB.

    Attributes:
      size: (H, W), or the side of a square.
      preprocess: which part is seen, and how it is resized.
      max_pixels: of an image; one whose header states more is damaged.
    """

    size: ImageSize
    preprocess: Transform
    max_pixels: int = MAX_PIXELS

    @classmethod
    def of(cls, config: EvalConfig, run: Config) -> EvalTransform:
        """That of an eval of `run`.

        Raises:
          ConfigError: its preprocessing makes images of another size.
        """
        transform = cls(config.image_size or run.model.image_size, config.preprocess, run.data.max_pixels)
        field = f"config.evals[name={config.name}].preprocess = {type(config.preprocess).__name__}"
        if config.preprocess.views:
            raise ConfigError(f"{field}: makes several views of an image, and an eval sees one; set another transform")
        wanted, _ = transform.spec["image"]
        try:
            found = {transform(np.zeros((*size, 3), np.uint8)).shape for size in TRIED}
        except FAILS as error:
            raise ConfigError(f"{field}: {one_line(error)}; mend it") from error
        if found != {wanted}:
            made = [str(shape[:2]) for shape in sorted(found)]
            remedy = "let it resize to sample.target" if len(made) > 1 else f"set the eval's image_size to {made[0]}"
            raise ConfigError(
                f"{field}: makes images of {' and '.join(made)} pixels, and the model is given {wanted[:2]}; {remedy}"
            )
        return transform

    def __call__(self, image: bytes | np.ndarray) -> np.ndarray:
        """`image` as that of `Chain`.

        Raises:
          DamagedImage: the image cannot be decoded.
        """
        return self.record({"image": image})["image"]

    def record(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """As `Chain`, the same at every call."""
        chain = Chain((self.preprocess,), self.size, self.max_pixels, exact=True)
        return chain(record, np.random.default_rng(0))

    def sample(self, picture: Picture) -> Sample:
        """An image on the canvas."""
        sample = Sample.of({}, picture, height_width(self.size), exact=True)
        return self.preprocess(sample, np.random.default_rng(0))

    def placement(self, picture: Picture) -> Placement:
        """Which part of an image is seen, and where on the canvas."""
        return self.sample(picture).placement

    @property
    def spec(self) -> Spec:
        """Of the pixels that a row gets."""
        return Chain((self.preprocess,), self.size).spec

    @property
    def settings(self) -> dict[str, Any]:
        """Its part of an eval's protocol."""
        kind = type(self.preprocess)
        name = {} if kind is PreprocessConfig else {"transform": kind.__name__}
        return {"image_size": shortest(height_width(self.size)), **name, **dataclasses.asdict(self.preprocess)}
