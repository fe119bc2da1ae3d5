"""From an encoded image to (S, S, 3) uint8 pixels, on the host; shapes: H W image height, width; S target side.

Decisions, and why:
  * Training is fast: JPEG is decoded by libjpeg-turbo (simplejpeg), scaled by 1/8 … 1/2 in the DCT domain as far as
    the crop still covers the target, and resized by OpenCV: bilinear when shrinking by less than 2, where its two taps
    still see every source pixel and an area average costs as much as decoding the JPEG; area average from 2 on, where
    bilinear would skip pixels; bicubic when enlarging. After a DCT-scaled decode the remaining factor is nearly always
    below 2.
  * Evaluation is exact: the whole image is decoded, and resized once by Pillow, antialiased, with the geometry of
    torchvision's Resize and CenterCrop. The same drawing gives the same pixels whatever size it is stored at.
  * What libjpeg-turbo refuses goes to Pillow, and what Pillow refuses is damaged.
  * Images are turned upright by their EXIF orientation, in training and evaluation alike: people see them so, and the
    model cannot ask. Boxes and masks of annotated datasets that count pixels as stored have to be turned with them.
  * Transparent images are composited on white (their hidden colour is often black: halos otherwise); 16-bit ones
    keep the high byte, rounded; of an animation the first frame counts.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import math
from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np
import simplejpeg
from PIL import ExifTags, Image

from visionfm_jax.config.schema import PreprocessConfig
from visionfm_jax.errors import DataError

cv2.setNumThreads(1)  # the loader runs one image per thread

MAX_PIXELS = 178_956_970  # of the encoded image, from its header; Pillow's own limit against decompression bombs
CROP_RATIO = (3 / 4, 4 / 3)  # width / height of a random crop
CROP_TRIES = 10
# What Pillow may open. Its other formats are rare among pictures, little tested, and run programs: PostScript.
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "TIFF", "WEBP")

Box = tuple[int, int, int, int]  # top, left, height, width in pixels
ChooseBox = Callable[[int, int], Box]  # (height, width of the image) -> box
Finish = Callable[[np.ndarray], np.ndarray]  # the box's pixels, uint8 (h, w, 3) -> the result

_BEFORE_IMAGE = frozenset(bytes((0xFF, marker)) for marker in (*range(0xE0, 0xF0), 0xFE))  # of JPEG: APPn, comment
INTERPOLATION = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
# EXIF orientation -> what makes the stored pixels upright: swap rows and columns, then flip rows, then columns.
UPRIGHT = {
    2: (False, False, True),
    3: (False, True, True),
    4: (False, True, False),
    5: (True, False, False),
    6: (True, False, True),
    7: (True, True, True),
    8: (True, True, False),
}


class DamagedImage(Exception):
    """An image that cannot be decoded, or is larger than `MAX_PIXELS`."""


def train_image(
    image: bytes | np.ndarray, size: int, crop_scale: tuple[float, float], rng: np.random.Generator
) -> np.ndarray:
    """Random resized crop (Szegedy et al. 2015): area share in `crop_scale`, log-uniform ratio 3/4 … 4/3.

    Args:
      image: encoded bytes, or uint8 (H, W), (H, W, 1), (H, W, 3) or (H, W, 4).
      size: side S; a JPEG is decoded no larger than that needs.
      crop_scale: area of the crop relative to the image; (1, 1): the whole image, whatever its ratio.
      rng: always advances by the same amount, whatever the image.

    Returns:
      uint8 (S, S, 3), RGB.

    Raises:
      DamagedImage: the image cannot be decoded.
    """
    draws = rng.random((CROP_TRIES, 4))
    choose = whole_box if tuple(crop_scale) == (1, 1) else functools.partial(random_box, draws, crop_scale)
    return _read(image, size, choose, lambda pixels: resize(pixels, size))


@dataclass(frozen=True)
class EvalTransform:
    """What evaluation makes of an image: uint8 (S, S, 3), RGB.

    Attributes:
      size: side S.
      preprocess: which part is seen, and how it is resized.
    """

    size: int
    preprocess: PreprocessConfig

    def __call__(self, image: bytes | np.ndarray) -> np.ndarray:
        """`image` as in `train_image`.

        Raises:
          DamagedImage: the image cannot be decoded.
        """
        return _read(image, 0, whole_box, self._resize)

    @property
    def settings(self) -> dict[str, float | str]:
        """Its part of an eval's protocol."""
        return {"image_size": self.size, **dataclasses.asdict(self.preprocess)}

    def _resize(self, pixels: np.ndarray) -> np.ndarray:
        box = eval_box(*pixels.shape[:2], self.size, self.preprocess)
        how = INTERPOLATION[self.preprocess.interpolation]
        return np.asarray(Image.fromarray(pixels).resize((self.size, self.size), how, box))


def resize(pixels: np.ndarray, size: int) -> np.ndarray:
    """uint8 (h, w, 3) to (S, S, 3): first the sides that are too long, then those that are too short."""
    height, width = pixels.shape[:2]
    if height > size or width > size:
        how = cv2.INTER_AREA if max(height, width) >= 2 * size else cv2.INTER_LINEAR
        pixels = cv2.resize(pixels, (min(width, size), min(height, size)), interpolation=how)
    if height < size or width < size:
        pixels = cv2.resize(pixels, (size, size), interpolation=cv2.INTER_CUBIC)
    return pixels


def decode(image: bytes | np.ndarray) -> np.ndarray:
    """The whole image at its own size.

    Args:
      image: as in `train_crop`.

    Returns:
      uint8 (H, W, 3), RGB.

    Raises:
      DamagedImage: the image cannot be decoded.
    """
    return _read(image, 0, whole_box, lambda pixels: pixels)


def whole_box(height: int, width: int) -> Box:
    """Everything."""
    return 0, 0, height, width


def random_box(draws: np.ndarray, crop_scale: tuple[float, float], height: int, width: int) -> Box:
    """Box of a random resized crop; after ten tries that do not fit, the largest centre box of an allowed ratio.

    Args:
      draws: (10, 4) in [0, 1): area, ratio, top, left of every try.
      crop_scale: least and largest area of the crop relative to the image.
      height, width: of the image, pixels.
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


def eval_box(height: int, width: int, size: int, preprocess: PreprocessConfig) -> tuple[float, float, float, float]:
    """The part of an image that is resized to (S, S): left, upper, right and lower edge in pixels, for Pillow.

    It is that of timm's evaluation, torchvision's Resize(floor(S / crop)) and CenterCrop(S), whole pixels of the
    resized image and all: resizing this part alone gives the same result for less work.
    """
    shorter = math.floor(size / preprocess.crop)
    if preprocess.resize == "squash":
        resized = shorter, shorter
    else:
        resized = shorter * height // min(height, width), shorter * width // min(height, width)
    top, left = (round((side - size) / 2) for side in resized)
    down, across = height / resized[0], width / resized[1]
    return left * across, top * down, (left + size) * across, (top + size) * down


def _read(image: bytes | np.ndarray, size: int, choose: ChooseBox, finish: Finish) -> np.ndarray:
    """`finish` of the chosen box of an upright image, of a JPEG at the scale that `size` needs; size 0: at its own."""
    if isinstance(image, np.ndarray):
        pixels = _three_channels(image)
    elif image[:3] == b"\xff\xd8\xff":
        try:
            pixels, choose = _decode_jpeg(image, size, choose), whole_box
        except ValueError:  # CMYK, junk between markers, cut off: Pillow reads what can be read
            pixels = _decode_other(image)
    else:
        pixels = _decode_other(image)
    top, left, height, width = choose(*pixels.shape[:2])
    return finish(pixels[top : top + height, left : left + width])


def _decode_jpeg(data: bytes, size: int, choose: ChooseBox) -> np.ndarray:
    """The chosen box, upright. Raises ValueError on all that libjpeg-turbo cannot turn into RGB without a complaint."""
    height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    _check_pixels(height, width)
    if colours not in ("YCbCr", "RGB", "Gray"):
        raise ValueError(colours)
    orientation = _jpeg_orientation(data)
    top, left, h, w = _stored_box(choose, height, width, orientation)
    if size:  # the least scaled image in which the box still covers the target; factors 5/8 … 7/8 would be slower
        least = -(-size * height // h), -(-size * width // w)
        pixels = simplejpeg.decode_jpeg(data, "RGB", min_height=least[0], min_width=least[1], min_factor=2)
    else:
        pixels = simplejpeg.decode_jpeg(data, "RGB")
    if pixels.shape[0] != height or pixels.shape[1] != width:
        down, across = pixels.shape[0] / height, pixels.shape[1] / width
        top, left, h, w = round(top * down), round(left * across), round(h * down), round(w * across)
    return _upright(pixels[top : top + h, left : left + w], orientation)


def _jpeg_orientation(data: bytes) -> int:
    """The EXIF orientation, 1 … 8; 1 where there is none that can be read."""
    place = 2
    while data[place : place + 2] in _BEFORE_IMAGE:
        end = place + 2 + int.from_bytes(data[place + 2 : place + 4])
        if data[place + 4 : place + 10] == b"Exif\0\0":
            return _orientation(functools.partial(_exif, data[place + 4 : end]))
        place = end
    return 1


def _exif(block: bytes) -> Image.Exif:
    exif = Image.Exif()
    exif.load(block)
    return exif


def _orientation(read: Callable[[], Image.Exif]) -> int:
    """That of an EXIF block; 1 where the block is damaged, which the image need not be."""
    try:
        value = read().get(ExifTags.Base.Orientation, 1)
    except Exception:  # as many kinds as in `_decode_other`
        return 1
    return value if isinstance(value, int) else 1


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """(h, w, 3) turned and mirrored from how it is stored to how it is seen; contiguous where anything changes."""
    if orientation not in UPRIGHT:
        return pixels
    swap, flip_rows, flip_columns = UPRIGHT[orientation]
    pixels = pixels.swapaxes(0, 1) if swap else pixels
    pixels = pixels[::-1] if flip_rows else pixels
    return np.ascontiguousarray(pixels[:, ::-1] if flip_columns else pixels)


def _stored_box(choose: ChooseBox, height: int, width: int, orientation: int) -> Box:
    """The box chosen in the upright image, in the (height, width) of the stored one."""
    swap, flip_rows, flip_columns = UPRIGHT.get(orientation, (False, False, False))
    if swap:
        height, width = width, height
    top, left, h, w = choose(height, width)
    top = height - top - h if flip_rows else top
    left = width - left - w if flip_columns else left
    return (left, top, w, h) if swap else (top, left, h, w)


def _decode_other(data: bytes) -> np.ndarray:
    """Whatever Pillow reads, upright, as uint8 (H, W, 3)."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            _check_pixels(image.height, image.width)
            image.load()  # some have their EXIF block after the pixels; a TIFF is turned by this already
            return _upright(_rgb(image), _orientation(image.getexif))
    except DamagedImage:
        raise
    except Exception as error:  # its parsers raise a dozen kinds (OSError, SyntaxError, struct.error, …) on bad bytes
        what = _unknown(data) if isinstance(error, Image.UnidentifiedImageError) else str(error)
        raise DamagedImage(f"{what or type(error).__name__} ({len(data)} bytes)") from error


def _unknown(data: bytes) -> str:
    """What to say of bytes that are in no format that is read."""
    if data[4:12] in (b"ftypheic", b"ftypheix", b"ftyphevc", b"ftypmif1"):
        return "is HEIC, which is not read; convert it to JPEG, PNG or AVIF"
    return f"is none of {', '.join(FORMATS)}"


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
