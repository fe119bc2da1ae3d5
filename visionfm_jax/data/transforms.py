"""From an encoded image to (S, S, 3) uint8 pixels, on the host; shapes: H W image height, width; S target side.

Decisions, and why:
  * Training is fast: JPEG is decoded by libjpeg-turbo (simplejpeg), scaled by 1/8 … 1/2 in the DCT domain as far as
    the crop still covers the target, and resized by OpenCV: bilinear when shrinking by less than 2, where its two taps
    still see every source pixel and an area average costs as much as decoding the JPEG; area average from 2 on, where
    bilinear would skip pixels; bicubic when enlarging. After a DCT-scaled decode the remaining factor is nearly always
    below 2.
  * Evaluation is exact: the whole image is decoded, and resized once by Pillow, antialiased, with the geometry of
    torchvision's Resize and CenterCrop. The same drawing gives the same pixels whatever size it is stored at.
  * What libjpeg-turbo refuses goes to Pillow, and what Pillow refuses is damaged; and so is a JPEG that lacks pixels,
    which Pillow would fill with grey, and a PNG with a wrong checksum.
  * Images are turned upright by their EXIF orientation, in training and evaluation alike: people see them so, and the
    model cannot ask. Boxes and masks of annotated datasets that count pixels as stored have to be turned with them.
  * Transparent images are composited on white (their hidden colour is often black: halos otherwise); 16-bit ones
    keep the high byte, rounded; of an animation the first frame counts.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import cv2
import numpy as np
import simplejpeg
from PIL import AvifImagePlugin, ExifTags, Image, TiffImagePlugin

from visionfm_jax.config.schema import DataConfig, PreprocessConfig
from visionfm_jax.data.budget import Budget
from visionfm_jax.errors import DataError

cv2.setNumThreads(1)  # the loader runs one image per thread
AvifImagePlugin.DEFAULT_MAX_THREADS = 1

MAX_PIXELS = DataConfig.max_pixels
# Bytes a pixel of the encoded image, at most, until the result is made: measured by tools/attack/images.py. The threads
# of a process together hold no more than one image of the largest size in the most expensive format takes.
JPEG_BYTES, OTHER_BYTES = 12, 24
MAX_SCANS = 64  # of a JPEG; usual are 1, and 10 of a progressive one
# Of libjpeg-turbo's complaints those after which pixels are missing or wrong, which Pillow would pass over.
LOST = ("premature end", "Premature end", "bad Huffman code", "instead of RST", "Inconsistent progression")
CROP_RATIO = (3 / 4, 4 / 3)  # width / height of a random crop
CROP_TRIES = 10
# What Pillow may open. Its other formats are rare among pictures, little tested, and run programs: PostScript.
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "TIFF", "WEBP")

Box = tuple[int, int, int, int]  # top, left, height, width in pixels
ChooseBox = Callable[[int, int], Box]  # (height, width of the image) -> box
Finish = Callable[[np.ndarray], np.ndarray]  # the box's pixels, uint8 (h, w, 3) -> the result

_MEMORY = Budget()
_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")  # of JPEG, but for those within pixels: stuffing, restart, fill
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
    """An image that cannot be decoded, or has more pixels than is allowed."""


def train_image(
    image: bytes | np.ndarray,
    size: int,
    crop_scale: tuple[float, float],
    rng: np.random.Generator,
    max_pixels: int = MAX_PIXELS,
) -> np.ndarray:
    """Random resized crop (Szegedy et al. 2015): area share in `crop_scale`, log-uniform ratio 3/4 … 4/3.

    Args:
      image: encoded bytes, or uint8 (H, W), (H, W, 1), (H, W, 3) or (H, W, 4).
      size: side S; a JPEG is decoded no larger than that needs.
      crop_scale: area of the crop relative to the image; (1, 1): the whole image, whatever its ratio.
      rng: always advances by the same amount, whatever the image.
      max_pixels: of the image; one whose header states more is damaged.

    Returns:
      uint8 (S, S, 3), RGB.

    Raises:
      DamagedImage: the image cannot be decoded.
    """
    draws = rng.random((CROP_TRIES, 4))
    choose = whole_box if tuple(crop_scale) == (1, 1) else functools.partial(random_box, draws, crop_scale)
    return _read(image, size, choose, lambda pixels: resize(pixels, size), max_pixels)


@dataclass(frozen=True)
class EvalTransform:
    """What evaluation makes of an image: uint8 (S, S, 3), RGB.

    Attributes:
      size: side S.
      preprocess: which part is seen, and how it is resized.
      max_pixels: of an image; one whose header states more is damaged.
    """

    size: int
    preprocess: PreprocessConfig
    max_pixels: int = MAX_PIXELS

    def __call__(self, image: bytes | np.ndarray) -> np.ndarray:
        """`image` as in `train_image`.

        Raises:
          DamagedImage: the image cannot be decoded.
        """
        return _read(image, 0, whole_box, self._resize, self.max_pixels)

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


def decode(image: bytes | np.ndarray, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """The whole image at its own size.

    Args:
      image, max_pixels: as in `train_image`.

    Returns:
      uint8 (H, W, 3), RGB.

    Raises:
      DamagedImage: the image cannot be decoded.
    """
    return _read(image, 0, whole_box, lambda pixels: pixels, max_pixels)


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


def _read(image: bytes | np.ndarray, size: int, choose: ChooseBox, finish: Finish, max_pixels: int) -> np.ndarray:
    """`finish` of the chosen box of an upright image, of a JPEG at the scale that `size` needs; size 0: at its own."""
    if isinstance(image, np.ndarray):
        return finish(_cut(_three_channels(image, max_pixels), choose))
    if image[:3] == b"\xff\xd8\xff":
        orientation = _jpeg_orientation(image)
        try:
            return _read_jpeg(image, size, choose, finish, max_pixels, orientation)
        except ValueError as error:  # CMYK, junk between markers: Pillow reads what can be read
            if any(what in str(error) for what in LOST):
                raise DamagedImage(f"{error} ({len(image)} bytes)") from error
    return _read_other(image, choose, finish, max_pixels)


def _cut(pixels: np.ndarray, choose: ChooseBox) -> np.ndarray:
    top, left, height, width = choose(*pixels.shape[:2])
    return pixels[top : top + height, left : left + width]


def _read_jpeg(
    data: bytes, size: int, choose: ChooseBox, finish: Finish, max_pixels: int, orientation: int
) -> np.ndarray:
    """As `_read`. Raises ValueError on all that libjpeg-turbo cannot turn into RGB without a complaint."""
    height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    _check_pixels(height, width, max_pixels)
    if colours not in ("YCbCr", "RGB", "Gray"):
        raise ValueError(colours)
    top, left, h, w = _stored_box(choose, height, width, orientation)
    with _MEMORY.hold(JPEG_BYTES * height * width, OTHER_BYTES * max_pixels):
        if size:  # the least scaled image in which the box still covers the target; 5/8 … 7/8 would be slower
            least = -(-size * height // h), -(-size * width // w)
            pixels = simplejpeg.decode_jpeg(data, "RGB", min_height=least[0], min_width=least[1], min_factor=2)
        else:
            pixels = simplejpeg.decode_jpeg(data, "RGB")
        if pixels.shape[0] != height or pixels.shape[1] != width:
            down, across = pixels.shape[0] / height, pixels.shape[1] / width
            top, left, h, w = round(top * down), round(left * across), round(h * down), round(w * across)
        return finish(_upright(pixels[top : top + h, left : left + w], orientation))


def _jpeg_orientation(data: bytes) -> int:
    """The EXIF orientation, 1 … 8; 1 where there is none that can be read.

    Raises:
      DamagedImage: so many scans, each of which is a pass over all pixels, that a small file would take hours.
    """
    orientation, interleaved, scans = 1, b"", 0
    for marker, start, end in _segments(data):
        if marker == 0xE1 and data[start : start + 6] == b"Exif\0\0":
            orientation = _orientation(functools.partial(_exif, data[start:end]))
        elif marker in (0xC0, 0xC1):  # not progressive: a scan of all components is the only one that is read
            interleaved = data[start + 5 : start + 6]
        elif marker == 0xDA:
            scans += 1
            if data[start : start + 1] == interleaved:
                break
            if scans > MAX_SCANS:
                raise DamagedImage(f"a JPEG of more than {MAX_SCANS} scans ({len(data)} bytes)")
    return orientation


def _segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """The marker of each segment of a JPEG up to the end of its image, and where the segment's content lies."""
    place = 2
    while match := _MARKER.search(data, place):
        place = match.end()
        if (marker := data[place - 1]) == 0xD9:
            return
        end = place + int.from_bytes(data[place : place + 2])
        yield marker, place + 2, end
        place = max(end, place)


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


def _read_other(data: bytes, choose: ChooseBox, finish: Finish, max_pixels: int) -> np.ndarray:
    """As `_read`, of whatever Pillow reads, at its own size."""
    with contextlib.ExitStack() as held:
        try:
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                pixels = _pixels_in_memory(image, max_pixels)
                held.enter_context(_MEMORY.hold(OTHER_BYTES * pixels, OTHER_BYTES * max_pixels))
                if image.format == "PNG":
                    _check_sums(data)
                image.load()  # some have their EXIF block after the pixels; a TIFF is turned by this already
                orientation = _orientation(image.getexif)
                pixels = _rgb(image)
            del image
        except DamagedImage:
            raise
        except Exception as error:  # parsers raise a dozen kinds (OSError, SyntaxError, struct.error, …) on bad bytes
            what = _unknown(data) if isinstance(error, Image.UnidentifiedImageError) else str(error)
            raise DamagedImage(f"{what or type(error).__name__} ({len(data)} bytes)") from error
        return finish(_cut(_upright(pixels, orientation), choose))


def _pixels_in_memory(image: Image.Image, max_pixels: int) -> int:
    """Pixels that decoding will hold: of the image, or of a TIFF's tile, which may be larger.

    Raises:
      DamagedImage: too many.
    """
    _check_pixels(image.height, image.width, max_pixels)
    if not isinstance(image, TiffImagePlugin.TiffImageFile):
        return image.height * image.width
    tile = image.tag_v2.get(TiffImagePlugin.TILELENGTH, 1), image.tag_v2.get(TiffImagePlugin.TILEWIDTH, 1)
    _check_pixels(*tile, max_pixels)
    return max(image.height * image.width, tile[0] * tile[1])


def _check_sums(png: bytes) -> None:
    """Pillow does not, while decoding, compare the pixels of a PNG with their checksums.

    Raises:
      SyntaxError, OSError: one is wrong.
    """
    with Image.open(io.BytesIO(png), formats=("PNG",)) as image:
        image.verify()


def _unknown(data: bytes) -> str:
    """What to say of bytes that are in no format that is read."""
    if data[4:12] in (b"ftypheic", b"ftypheix", b"ftyphevc", b"ftypmif1"):
        return "is HEIC, which is not read; convert it to JPEG, PNG or AVIF"
    return f"is none of {', '.join(FORMATS)}"


def _rgb(image: Image.Image) -> np.ndarray:
    if image.mode.startswith("I"):  # 16 bit (or 16 in 32); convert() would clip at 255
        return _three_channels(_by_rows(_high_byte, np.asarray(image)), image.height * image.width)
    if image.has_transparency_data:
        return _by_rows(_on_white, np.asarray(image if image.mode == "RGBA" else image.convert("RGBA")))
    if image.mode == "F":
        image = image.convert("L")  # there is no direct way to RGB
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


def _three_channels(image: np.ndarray, max_pixels: int) -> np.ndarray:
    if image.dtype != np.uint8 or image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] not in (1, 3, 4)):
        raise DataError(
            f"an image array is {image.dtype} {image.shape}, but must be uint8 (H, W), (H, W, 1), (H, W, 3) or "
            "(H, W, 4); convert it where the dataset is made"
        )
    if not image.size:
        raise DamagedImage(f"an image array of shape {image.shape} has no pixel")
    _check_pixels(*image.shape[:2], max_pixels)
    if image.ndim == 3 and image.shape[2] == 3:
        return image
    if image.ndim == 3 and image.shape[2] == 4:
        return _by_rows(_on_white, image)
    return np.repeat(image.reshape(*image.shape[:2], 1), 3, axis=2)


def _by_rows(function: Callable[[np.ndarray], np.ndarray], pixels: np.ndarray) -> np.ndarray:
    """`function` of some rows after the other: what it holds in between is small."""
    rows = max(1, 2**18 // pixels.shape[1])
    out = np.empty((pixels.shape[0], *function(pixels[:1]).shape[1:]), np.uint8)
    for top in range(0, pixels.shape[0], rows):
        out[top : top + rows] = function(pixels[top : top + rows])
    return out


def _high_byte(grey: np.ndarray) -> np.ndarray:
    """uint8 (H, W) of 16 bits in whatever integers: v / 257, rounded."""
    return ((grey.astype(np.int32).clip(0, 65535) + 128) // 257).astype(np.uint8)


def _on_white(rgba: np.ndarray) -> np.ndarray:
    """Alpha composition of uint8 (H, W, 4) on white: c a + 255 (1 - a), rounded; it fits into 16 bits."""
    alpha = rgba[..., 3:].astype(np.uint16)
    return ((rgba[..., :3] * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)


def _check_pixels(height: int, width: int, max_pixels: int) -> None:
    if height * width > max_pixels:
        raise DamagedImage(f"{width} x {height} pixels are more than data.max_pixels = {max_pixels:,}")
