"""RandAugment (Cubuk et al. 2020, arXiv 1909.13719): N of the paper's 14 operations, drawn with replacement, at one
magnitude M of 10.

Pillow does the work. The ranges are torchvision's, where every operation gets stronger with M (timm's "increasing"
set; the paper's own code weakens some of them): at M = 10 a rotation by 30 degrees, a shear by 0.3, a shift by 150/331
of the side, colour, contrast, brightness and sharpness times 1 ± 0.9, 4 bits left, all values inverted. What has two
directions takes either. Pixels from outside the image are mid-grey, whatever lies around it.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

FILL = (128, 128, 128)

Operation = Callable[[Image.Image, float, float], Image.Image]  # (image, strength in [0, 1], direction ±1) -> image


def rand_augment(pixels: np.ndarray, operations: int, magnitude: float, rng: np.random.Generator) -> np.ndarray:
    """`operations` random operations, one after the other.

    Args:
      pixels: uint8 (H, W, 3), RGB.
      operations: N, how many; 0: none.
      magnitude: M in [0, 10]; 0 changes nothing, except by autocontrast and equalize, which have no magnitude.
      rng: advances by 2 N numbers, whatever the image and the operations.

    Returns:
      uint8 (H, W, 3); read-only, or `pixels` itself where nothing was done.
    """
    names = tuple(OPERATIONS)
    draws = rng.random((operations, 2))
    chosen = [(names[int(which * len(names))], 1.0 if way < 0.5 else -1.0) for which, way in draws.tolist()]
    chosen = [(name, direction) for name, direction in chosen if name != "identity"]
    if not chosen:
        return pixels
    image = Image.fromarray(pixels)
    for name, direction in chosen:
        image = OPERATIONS[name](image, magnitude / 10, direction)
    return np.asarray(image)


def _affine(image: Image.Image, matrix: tuple[float, ...], resample: Image.Resampling) -> Image.Image:
    """Pixel (x, y) of the result is pixel (a x + b y + c, d x + e y + f) of the image."""
    return image.transform(image.size, Image.Transform.AFFINE, matrix, resample, fillcolor=FILL)


def _shift(image: Image.Image, x: float, y: float) -> Image.Image:
    """By whole pixels, so that nothing is blurred; what is over is cut off, as torchvision does."""
    return _affine(image, (1, 0, -int(x), 0, 1, -int(y)), Image.Resampling.NEAREST)


def _enhance(kind: Callable[[Image.Image], ImageEnhance._Enhance]) -> Operation:
    return lambda image, strength, direction: kind(image).enhance(1 + 0.9 * strength * direction)


OPERATIONS: dict[str, Operation] = {
    "identity": lambda image, m, way: image,
    "autocontrast": lambda image, m, way: ImageOps.autocontrast(image),
    "equalize": lambda image, m, way: ImageOps.equalize(image),
    "rotate": lambda image, m, way: image.rotate(30 * m * way, Image.Resampling.BILINEAR, fillcolor=FILL),
    "solarize": lambda image, m, way: ImageOps.solarize(image, round(256 * (1 - m))),
    "color": _enhance(ImageEnhance.Color),
    "posterize": lambda image, m, way: ImageOps.posterize(image, 8 - round(4 * m)),
    "contrast": _enhance(ImageEnhance.Contrast),
    "brightness": _enhance(ImageEnhance.Brightness),
    "sharpness": _enhance(ImageEnhance.Sharpness),
    "shear_x": lambda image, m, way: _affine(image, (1, 0.3 * m * way, 0, 0, 1, 0), Image.Resampling.BILINEAR),
    "shear_y": lambda image, m, way: _affine(image, (1, 0, 0, 0.3 * m * way, 1, 0), Image.Resampling.BILINEAR),
    "translate_x": lambda image, m, way: _shift(image, 150 * m * way * image.width / 331, 0),
    "translate_y": lambda image, m, way: _shift(image, 0, 150 * m * way * image.height / 331),
}
