"""From an encoded image to (S, S, 3) uint8 pixels, on the host; shapes: H W image height, width; S target side.

Decisions, and why:
  * JPEG is decoded by libjpeg-turbo (simplejpeg), scaled by 1/8 … 1/2 in the DCT domain as far as the crop still
    covers the target; whatever it refuses goes to Pillow, and what Pillow refuses is damaged.
  * Resizing by OpenCV: bilinear when shrinking by less than 2, where its two taps still see every source pixel and
    an area average costs as much as decoding the JPEG; area average from 2 on, where bilinear would skip pixels;
    bicubic when enlarging. After a DCT-scaled decode the remaining factor is nearly always below 2.
  * Pixels are taken as stored: the EXIF orientation is ignored, as in the usual ImageNet pipelines, so that boxes
    and masks of annotated datasets fit.
  * Transparent images are composited on white (their hidden colour is often black: halos otherwise); 16-bit ones
    keep the high byte, rounded; of an animation the first frame counts.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable

import cv2
import numpy as np
import simplejpeg
from PIL import Image

from visionfm_jax.errors import DataError

cv2.setNumThreads(1)  # the loader runs one image per thread

MAX_PIXELS = 178_956_970  # of the encoded image, from its header; Pillow's own limit against decompression bombs
EVAL_SHARE = 0.875  # of the shorter side, kept by the centre crop: 224 of 256
CROP_RATIO = (3 / 4, 4 / 3)  # width / height of a random crop
CROP_TRIES = 10

Box = tuple[int, int, int, int]  # top, left, height, width in pixels
ChooseBox = Callable[[int, int], Box]  # (height, width of the image) -> box


class DamagedImage(Exception):
    """An image that cannot be decoded, or is larger than `MAX_PIXELS`."""


def train_crop(
    image: bytes | np.ndarray, size: int, crop_scale: tuple[float, float], rng: np.random.Generator
) -> np.ndarray:
    """Random crop (Szegedy et al. 2015) still to be resized: area share in `crop_scale`, log-uniform ratio 3/4 … 4/3.

    Args:
      image: encoded bytes, or uint8 (H, W), (H, W, 1), (H, W, 3) or (H, W, 4).
      size: side S that the crop will be resized to; a JPEG is decoded no larger than that needs.
      crop_scale: area of the crop relative to the image; (1, 1): the whole image, whatever its ratio.
      rng: always advances by the same amount, whatever the image.

    Returns:
      uint8 (h, w, 3), RGB.

    Raises:
      DamagedImage: the image cannot be decoded.
    """
    draws = rng.random((CROP_TRIES, 4))
    if tuple(crop_scale) == (1, 1):
        return _read(image, size, lambda height, width: (0, 0, height, width))
    return _read(image, size, lambda height, width: random_box(draws, height, width, crop_scale))


def eval_crop(image: bytes | np.ndarray, size: int) -> np.ndarray:
    """The part of an image that, resized to (S, S), is what resizing its shorter side to S / 0.875 has in the centre.

    Cropping first and resizing once gives the same pixels up to rounding the box, for less work. An image of (S, S)
    is taken whole.

    Args:
      image: as in `train_crop`.
      size: side S that the crop will be resized to.

    Returns:
      uint8 (h, w, 3), RGB.

    Raises:
      DamagedImage: the image cannot be decoded.
    """
    return _read(image, size, lambda height, width: centre_box(height, width, size))


def resize(pixels: np.ndarray, out: np.ndarray) -> np.ndarray:
    """uint8 (h, w, 3) into `out`, contiguous uint8 (S, S, 3), which is also returned.

    First the sides that are too long, then those that are too short; nothing changes where both fit.
    """
    size = out.shape[0]
    height, width = pixels.shape[:2]
    if (height, width) == (size, size):
        np.copyto(out, pixels)
        return out
    if height > size or width > size:
        how = cv2.INTER_AREA if max(height, width) >= 2 * size else cv2.INTER_LINEAR
        shape = (min(width, size), min(height, size))
        pixels = cv2.resize(pixels, shape, dst=out if shape == (size, size) else None, interpolation=how)
    if height < size or width < size:
        cv2.resize(pixels, (size, size), dst=out, interpolation=cv2.INTER_CUBIC)
    return out


def train_image(
    image: bytes | np.ndarray, size: int, crop_scale: tuple[float, float], rng: np.random.Generator
) -> np.ndarray:
    """`train_crop`, resized: uint8 (S, S, 3)."""
    return resize(train_crop(image, size, crop_scale, rng), np.empty((size, size, 3), np.uint8))


def eval_image(image: bytes | np.ndarray, size: int) -> np.ndarray:
    """`eval_crop`, resized: uint8 (S, S, 3)."""
    return resize(eval_crop(image, size), np.empty((size, size, 3), np.uint8))


def decode(image: bytes | np.ndarray) -> np.ndarray:
    """The whole image at its own size.

    Args:
      image: as in `train_crop`.

    Returns:
      uint8 (H, W, 3), RGB.

    Raises:
      DamagedImage: the image cannot be decoded.
    """
    return _read(image, 0, lambda height, width: (0, 0, height, width))


def random_box(draws: np.ndarray, height: int, width: int, crop_scale: tuple[float, float]) -> Box:
    """Box of a random resized crop; after ten tries that do not fit, the largest centre box of an allowed ratio.

    Args:
      draws: (10, 4) in [0, 1): area, ratio, top, left of every try.
      height, width: of the image, pixels.
      crop_scale: least and largest area of the crop relative to the image.
    """
    low, high = crop_scale
    log_low, log_high = math.log(CROP_RATIO[0]), math.log(CROP_RATIO[1])
    for area, ratio, top, left in draws.tolist():
        pixels = height * width * (low + (high - low) * area)
        aspect = math.exp(log_low + (log_high - log_low) * ratio)
        w, h = round(math.sqrt(pixels * aspect)), round(math.sqrt(pixels / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(top * (height - h + 1)), int(left * (width - w + 1)), h, w
    h = min(height, max(1, round(width / CROP_RATIO[0])))
    w = min(width, max(1, round(height * CROP_RATIO[1])))
    return (height - h) // 2, (width - w) // 2, h, w


def centre_box(height: int, width: int, size: int) -> Box:
    """The centre square whose side is 0.875 of the shorter side; everything where the image is (size, size)."""
    if height == width == size:
        return 0, 0, height, width
    side = max(1, round(min(height, width) * EVAL_SHARE))
    return (height - side) // 2, (width - side) // 2, side, side


def _read(image: bytes | np.ndarray, size: int, choose: ChooseBox) -> np.ndarray:
    """The chosen box of an image, of a JPEG at the scale that `size` needs; size 0: at its own."""
    if isinstance(image, np.ndarray):
        pixels = _three_channels(image)
    elif image[:3] == b"\xff\xd8\xff":
        try:
            return _read_jpeg(image, size, choose)
        except ValueError:  # CMYK, junk between markers, cut off: Pillow reads what can be read
            pixels = _decode_other(image)
    else:
        pixels = _decode_other(image)
    top, left, height, width = choose(*pixels.shape[:2])
    return pixels[top : top + height, left : left + width]


def _read_jpeg(data: bytes, size: int, choose: ChooseBox) -> np.ndarray:
    """As `_read`. Raises ValueError on everything that libjpeg-turbo cannot turn into RGB without a complaint."""
    height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    _check_pixels(height, width)
    if colours not in ("YCbCr", "RGB", "Gray"):
        raise ValueError(colours)
    top, left, h, w = choose(height, width)
    if size:  # the least scaled image in which the box still covers the target; factors 5/8 … 7/8 would be slower
        least = -(-size * height // h), -(-size * width // w)
        pixels = simplejpeg.decode_jpeg(data, "RGB", min_height=least[0], min_width=least[1], min_factor=2)
    else:
        pixels = simplejpeg.decode_jpeg(data, "RGB")
    if pixels.shape[0] != height or pixels.shape[1] != width:
        down, across = pixels.shape[0] / height, pixels.shape[1] / width
        top, left, h, w = round(top * down), round(left * across), round(h * down), round(w * across)
    return pixels[top : top + h, left : left + w]


def _decode_other(data: bytes) -> np.ndarray:
    """Whatever Pillow reads, as uint8 (H, W, 3)."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            _check_pixels(image.height, image.width)
            return _rgb(image)
    except DamagedImage:
        raise
    except Exception as error:  # its parsers raise a dozen kinds (OSError, SyntaxError, struct.error, …) on bad bytes
        what = "no known image format" if isinstance(error, Image.UnidentifiedImageError) else str(error)
        raise DamagedImage(f"{what or type(error).__name__} ({len(data)} bytes)") from error


def _rgb(image: Image.Image) -> np.ndarray:
    if image.mode.startswith("I"):  # 16 bit (or 16 in 32); convert() would clip at 255
        grey = np.asarray(image).astype(np.int64).clip(0, 65535)
        return _three_channels(((grey + 128) // 257).astype(np.uint8))
    if image.has_transparency_data:
        return _on_white(np.asarray(image.convert("RGBA")))
    if image.mode == "F":
        image = image.convert("L")  # there is no direct way to RGB
    return np.asarray(image.convert("RGB"))


def _three_channels(image: np.ndarray) -> np.ndarray:
    if image.dtype != np.uint8 or image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] not in (1, 3, 4)):
        raise DataError(
            f"an image array is {image.dtype} {image.shape}, but must be uint8 (H, W), (H, W, 1), (H, W, 3) or "
            "(H, W, 4); convert it where the dataset is made"
        )
    if not image.size:
        raise DamagedImage(f"an image array of shape {image.shape} has no pixel")
    _check_pixels(*image.shape[:2])
    if image.ndim == 3 and image.shape[2] == 3:
        return image
    if image.ndim == 3 and image.shape[2] == 4:
        return _on_white(image)
    return np.repeat(image.reshape(*image.shape[:2], 1), 3, axis=2)


def _on_white(rgba: np.ndarray) -> np.ndarray:
    """Alpha composition of uint8 (H, W, 4) on white: c a + 255 (1 - a), rounded."""
    alpha = rgba[..., 3:].astype(np.uint32)
    return ((rgba[..., :3] * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)


def _check_pixels(height: int, width: int) -> None:
    if height * width > MAX_PIXELS:
        raise DamagedImage(f"{width}x{height} = {height * width / 1e6:.0f} megapixels exceed {MAX_PIXELS / 1e6:.0f}")
