"""From an encoded image to uint8 pixels, on the host; shapes: H W image height, width, h w those of a part of it.

Decisions, and why:
  * Training is fast: JPEG is decoded by libjpeg-turbo (simplejpeg), scaled by 1/8 … 1/2 in the DCT domain as far as
    every wanted part still covers its size, and resized by OpenCV: bilinear when shrinking by less than 2, where its
    two taps still see every source pixel and an area average costs as much as decoding the JPEG; area average from 2
    on, where bilinear would skip pixels; bicubic when enlarging. After a DCT-scaled decode the remaining factor is
    nearly always below 2.
  * Evaluation is exact: the whole image is decoded, and resized once by Pillow, antialiased, with the geometry of
    torchvision's Resize and CenterCrop. The same drawing gives the same pixels whatever size it is stored at.
  * What libjpeg-turbo refuses goes to Pillow, and what Pillow refuses is damaged; and so is a JPEG that lacks pixels,
    which Pillow would fill with grey, and a PNG with a wrong checksum.
  * Images are turned upright by their EXIF orientation, in training and evaluation alike: people see them so, and the
    model cannot ask. What an annotated dataset counts in pixels as stored is turned with them (`data.sample`).
  * Transparent images are composited on white (their hidden colour is often black: halos otherwise); 16-bit ones
    keep the high byte, rounded; of an animation the first frame counts.
"""

from __future__ import annotations

import contextlib
import functools
import io
import re
from collections.abc import Callable, Iterator, Sequence

import cv2
import numpy as np
import simplejpeg
from PIL import AvifImagePlugin, ExifTags, Image, TiffImagePlugin

from visionfm_jax.config.schema import DataConfig
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
# What Pillow may open. Its other formats are rare among pictures, little tested, and run programs: PostScript.
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "TIFF", "WEBP")

Edges = tuple[float, float, float, float]  # top, left, bottom, right; a pixel is 1 wide
Crop = tuple[Edges, tuple[int, int]]  # of an upright image, in its pixels, and the (height, width) to resize it to

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


class Picture:
    """An upright image; its pixels are made when parts of it are asked for.

    Attributes:
      size: (H, W), upright.
      orientation: the EXIF orientation, 1 … 8, by which what is stored becomes upright.
    """

    def __init__(self, size: tuple[int, int], orientation: int, pixels: np.ndarray | None, data: bytes, most: int):
        self.size, self.orientation = size, orientation
        self._pixels, self._data, self._most = pixels, data, most

    @classmethod
    def of(cls, pixels: np.ndarray) -> Picture:
        """Of uint8 (H, W, 3)."""
        return cls(pixels.shape[:2], 1, pixels, b"", 0)

    def parts(self, parts: Sequence[Crop], exact: bool = False, interpolation: str = "bicubic") -> list[np.ndarray]:
        """Each part resized to its size, uint8 (h, w, 3); the image is decoded once for all of them.

        Args:
          parts: edges within the image. For training they are rounded to whole pixels.
          exact: antialiased by Pillow as evaluation wants it; else fast.
          interpolation: of `exact`: bicubic or bilinear.

        Raises:
          DamagedImage: the image cannot be decoded.
        """
        if self._pixels is None:
            try:
                return self._decode(parts, exact, interpolation)
            except ValueError as error:  # junk between markers, say: Pillow reads what can be read
                if any(what in str(error) for what in LOST):
                    raise DamagedImage(f"{error} ({len(self._data)} bytes)") from error
            with _decoded(self._data, self._most) as (pixels, _):
                pixels = upright(pixels, self.orientation)
                if pixels.shape[:2] != self.size:
                    raise DamagedImage(f"is not of the size that its header states ({len(self._data)} bytes)")
                return [_resized(pixels, edges, size, exact, interpolation) for edges, size in parts]
        return [_resized(self._pixels, edges, size, exact, interpolation) for edges, size in parts]

    def _decode(self, parts: Sequence[Crop], exact: bool, interpolation: str) -> list[np.ndarray]:
        """`parts` of a JPEG. Raises ValueError on all that libjpeg-turbo cannot turn into RGB without a complaint."""
        height, width = self.size
        with _MEMORY.hold(JPEG_BYTES * height * width, OTHER_BYTES * self._most):
            if exact:
                pixels = upright(simplejpeg.decode_jpeg(self._data, "RGB"), self.orientation)
                return [_resized(pixels, edges, size, exact, interpolation) for edges, size in parts]
            # The least scaled image in which every part still covers its size; 5/8 … 7/8 would be slower.
            least = [
                (-(-h * height // max(1, round(bottom - top))), -(-w * width // max(1, round(right - left))))
                for (top, left, bottom, right), (h, w) in parts
            ]
            stored = tuple(max(side) for side in zip(*least, strict=True))
            swap = UPRIGHT.get(self.orientation, (False,))[0]
            min_height, min_width = stored[::-1] if swap else stored
            pixels = simplejpeg.decode_jpeg(self._data, "RGB", min_height=min_height, min_width=min_width, min_factor=2)
            return [resize(self._cut(pixels, edges), size) for edges, size in parts]

    def _cut(self, pixels: np.ndarray, edges: Edges) -> np.ndarray:
        """The part between `edges` of the upright image, cut out of the stored `pixels`, which may be scaled down."""
        swap, flip_rows, flip_columns = UPRIGHT.get(self.orientation, (False, False, False))
        top, left, h, w = _whole_pixels(edges)
        top = self.size[0] - top - h if flip_rows else top
        left = self.size[1] - left - w if flip_columns else left
        if swap:
            top, left, h, w = left, top, w, h
        height, width = self.size[::-1] if swap else self.size
        if pixels.shape[:2] != (height, width):
            down, across = pixels.shape[0] / height, pixels.shape[1] / width
            top, left, h, w = round(top * down), round(left * across), round(h * down), round(w * across)
        return upright(pixels[top : top + h, left : left + w], self.orientation)


@contextlib.contextmanager
def opened(image: bytes | np.ndarray, max_pixels: int = MAX_PIXELS) -> Iterator[Picture]:
    """An image whose size is known; of a JPEG the header is read, all others are decoded.

    Args:
      image: encoded bytes, or uint8 (H, W), (H, W, 1), (H, W, 3) or (H, W, 4).
      max_pixels: of the image; one whose header states more is damaged.

    Raises:
      DamagedImage: the image cannot be decoded.
    """
    if isinstance(image, np.ndarray):
        yield Picture.of(_three_channels(image, max_pixels))
        return
    if not isinstance(image, bytes):
        raise DamagedImage(f"an image is of type {type(image).__name__}, and must be bytes or an array")
    if image[:3] == b"\xff\xd8\xff" and (header := _jpeg_header(image, max_pixels)):
        yield Picture(*header, None, image, max_pixels)
        return
    with _decoded(image, max_pixels) as (pixels, orientation):
        pixels = upright(pixels, orientation)
        yield Picture(pixels.shape[:2], orientation, pixels, b"", max_pixels)


def stored_size(data: bytes) -> tuple[int, int]:
    """(H, W) of an encoded image as it is stored, by its header.

    Raises:
      DamagedImage: it is none.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            return image.height, image.width
    except Exception as error:  # as many kinds as in `_decoded`
        what = _unknown(data) if isinstance(error, Image.UnidentifiedImageError) else str(error)
        raise DamagedImage(f"{what or type(error).__name__} ({len(data)} bytes)") from error


def stored_orientation(data: bytes) -> int:
    """The EXIF orientation, 1 … 8, by which an encoded image that `stored_size` can read becomes upright."""
    if data[:3] == b"\xff\xd8\xff":
        return _jpeg_orientation(data)
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        return _orientation(image.getexif)


def decode_map(data: bytes, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """The values of a picture of one channel as they are stored, uint8 or uint16 (H, W): no colours are made of them.

    Raises:
      DamagedImage: it cannot be decoded, has several channels, or loses values (JPEG).
    """
    try:
        with Image.open(io.BytesIO(data), formats=("PNG", "BMP", "TIFF")) as image:
            _pixels_in_memory(image, max_pixels)
            if image.mode not in ("1", "L", "P") and not image.mode.startswith("I"):
                raise DamagedImage(
                    f"a class map has the channels {image.mode}, and must have one, the class of each pixel: colours "
                    "stand for instances or a palette; convert it"
                )
            if image.format == "PNG":
                _check_sums(data)
            values = np.asarray(image)
            if image.mode == "L":  # Pillow spreads greys of 2 and 4 bits over 0 to 255
                values = values // (255 // (2 ** _bits(image, data) - 1))
    except DamagedImage:
        raise
    except Exception as error:  # as many kinds as in `_decoded`
        unknown = isinstance(error, Image.UnidentifiedImageError)
        what = "a class map is none of PNG, BMP, TIFF" if unknown else str(error)
        raise DamagedImage(f"{what or type(error).__name__} ({len(data)} bytes)") from error
    if values.min(initial=0) < 0 or values.max(initial=0) > 65_535:
        raise DamagedImage(f"a class map has values from {values.min()} to {values.max()}, beyond 16 bits")
    return values.astype(np.uint8 if values.dtype in (np.uint8, np.bool_) else np.uint16)


def _bits(image: Image.Image, data: bytes) -> int:
    """Of a grey in the file, at most 8."""
    if image.format == "PNG":
        return data[24]
    return image.tag_v2.get(258, (8,))[0] if image.format == "TIFF" else 8


def decode(image: bytes | np.ndarray, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """The whole image at its own size.

    Args:
      image, max_pixels: as of `opened`.

    Returns:
      uint8 (H, W, 3), RGB.

    Raises:
      DamagedImage: the image cannot be decoded.
    """
    with opened(image, max_pixels) as picture:
        return picture.parts([((0, 0, *picture.size), picture.size)], exact=True)[0]


def resize(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """uint8 (H, W, 3) to (h, w, 3), fast: first the sides that are too long, then those that are too short."""
    (height, width), (h, w) = pixels.shape[:2], size
    if height > h or width > w:
        how = cv2.INTER_AREA if height >= 2 * h or width >= 2 * w else cv2.INTER_LINEAR
        pixels = cv2.resize(pixels, (min(width, w), min(height, h)), interpolation=how)
    if height < h or width < w:
        pixels = cv2.resize(pixels, (w, h), interpolation=cv2.INTER_CUBIC)
    return pixels


def _resized(pixels: np.ndarray, edges: Edges, size: tuple[int, int], exact: bool, interpolation: str) -> np.ndarray:
    """The part of an upright image between `edges`, resized."""
    if exact:
        top, left, bottom, right = edges
        if (*edges, *size) == (0, 0, *pixels.shape[:2], *pixels.shape[:2]):
            return pixels
        image, how = Image.fromarray(pixels), INTERPOLATION[interpolation]
        return np.asarray(image.resize(size[::-1], how, (left, top, right, bottom)))
    top, left, h, w = _whole_pixels(edges)
    return resize(pixels[top : top + h, left : left + w], size)


def _whole_pixels(edges: Edges) -> tuple[int, int, int, int]:
    """Top, left, height and width, of at least one pixel."""
    top, left, bottom, right = (round(edge) for edge in edges)
    return top - (bottom == top > 0), left - (right == left > 0), max(1, bottom - top), max(1, right - left)


def _jpeg_header(data: bytes, max_pixels: int) -> tuple[tuple[int, int], int] | None:
    """The upright (H, W) and the EXIF orientation; None: libjpeg-turbo gives no RGB of it."""
    orientation = _jpeg_orientation(data)
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError as error:
        if any(what in str(error) for what in LOST):
            raise DamagedImage(f"{error} ({len(data)} bytes)") from error
        return None
    _check_pixels(height, width, max_pixels)
    if colours not in ("YCbCr", "RGB", "Gray"):  # CMYK
        return None
    return ((width, height) if UPRIGHT.get(orientation, (False,))[0] else (height, width)), orientation


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


def upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """(H, W, …) turned and mirrored from how it is stored to how it is seen; contiguous where anything changes."""
    if orientation not in UPRIGHT:
        return pixels
    swap, flip_rows, flip_columns = UPRIGHT[orientation]
    pixels = pixels.swapaxes(0, 1) if swap else pixels
    pixels = pixels[::-1] if flip_rows else pixels
    return np.ascontiguousarray(pixels[:, ::-1] if flip_columns else pixels)


@contextlib.contextmanager
def _decoded(data: bytes, max_pixels: int) -> Iterator[tuple[np.ndarray, int]]:
    """The stored pixels of whatever Pillow reads, and their EXIF orientation; its memory is held meanwhile."""
    with contextlib.ExitStack() as held:
        try:
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                pixels = _pixels_in_memory(image, max_pixels)
                held.enter_context(_MEMORY.hold(OTHER_BYTES * pixels, OTHER_BYTES * max_pixels))
                if image.format == "PNG":
                    _check_sums(data)
                image.load()  # some have their EXIF block after the pixels; a TIFF is turned by this already
                orientation = _orientation(image.getexif)
                pixels = rgb(image)
            del image
        except DamagedImage:
            raise
        except Exception as error:  # parsers raise a dozen kinds (OSError, SyntaxError, struct.error, …) on bad bytes
            what = _unknown(data) if isinstance(error, Image.UnidentifiedImageError) else str(error)
            raise DamagedImage(f"{what or type(error).__name__} ({len(data)} bytes)") from error
        yield pixels, orientation


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


def rgb(image: Image.Image) -> np.ndarray:
    """uint8 (H, W, 3) of what Pillow has opened, as stored: the high byte of 16 bits, transparent ones on white."""
    if image.mode in ("I", "F") and (low_high := image.getextrema()) and _is_no_picture(image.mode, *low_high):
        raise DamagedImage(f"its values are from {low_high[0]:g} to {low_high[1]:g}; store it in 8 or 16 bits")
    if image.mode.startswith("I"):  # 16 bit (or 16 in 32); convert() would clip at 255
        return _three_channels(_by_rows(_high_byte, np.asarray(image)), image.height * image.width)
    if image.has_transparency_data:
        return _by_rows(_on_white, np.asarray(image if image.mode == "RGBA" else image.convert("RGBA")))
    if image.mode == "F":
        image = image.convert("L")  # there is no direct way to RGB
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


def _is_no_picture(mode: str, low: float, high: float) -> bool:
    """Whether values of 32 bits are other than those of 16 bits, or, of floating point, of 8: from 0 to 1, say."""
    return not (0 <= low <= high <= (65_535 if mode == "I" else 255)) or (mode == "F" and 0 < high <= 1)


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
