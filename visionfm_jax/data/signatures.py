"""What tells near-copies of a picture, and equal captions, from others: 56 bytes of a picture, 8 of a caption.

A picture's signature is its perceptual hash, 64 bits (pHash: the signs of the low frequencies, Zauner 2010,
https://www.phash.org/docs/pubs/thesis_zauner.pdf), and the mean colours of 4 x 4 parts of it. Copies that were
compressed again, resized, cut a little or brightened keep most bits of the hash; but so does a drawing in another
colour, as the hash knows only light and dark. So both must fit: the hash by `DISTANCE`, the colours by `alike`.

A picture of one colour has no low frequencies: its hash is `FLAT`, and only one of the very same colours is its copy.

All is computed with integers, or value by value, so that every machine gives the same.
"""

from __future__ import annotations

import hashlib
import unicodedata

import cv2
import numpy as np

from visionfm_jax.data.images import opened

SIGNATURE = np.dtype([("hash", "<u8"), ("colours", "u1", (4, 4, 3))])
"""Of a picture: perceptual hash, and mean RGB of its parts."""

DISTANCE = 6  # bits in which the hashes of copies may differ
FLAT = 0  # the hash of a picture of one colour; others have their brightest frequency, the mean, above the median
RANGE = 6  # of 255, that the greys of a picture of one colour may span
BRIGHTER = 1.25  # times that a copy may be brighter
COLOUR = 20  # of 255, by which a part may differ in a channel, at equal brightness
TINT = 14  # of 255, by which the channels of a part may differ from their mean otherwise: skin tones differ by more
SIDE, _LOW = 32, 8  # pixels and frequencies along a side
_GREY = np.array([299, 587, 114])  # thousandths, ITU-R BT.601
_COSINES = np.round(np.cos(np.pi * np.outer(np.arange(_LOW), 2 * np.arange(SIDE) + 1) / (2 * SIDE)) * 2**14).astype(
    np.int64
)


def shrunk(image: bytes | np.ndarray) -> tuple[np.ndarray, int]:
    """What `of_pixels` takes, uint8 (32, 32, 3), of an image as `images.opened` takes it, and its number of pixels.

    Raises:
      DamagedImage: it cannot be decoded.
    """
    with opened(image) as picture:
        height, width = picture.size
        [pixels] = picture.parts([((0, 0, height, width), (2 * SIDE, 2 * SIDE))])  # twice, or JPEG's blocks alias
    return cv2.resize(pixels, (SIDE, SIDE), interpolation=cv2.INTER_AREA), height * width


def of_pixels(small: np.ndarray) -> np.ndarray:
    """The signature, SIGNATURE (), of uint8 (32, 32, 3)."""
    found = np.zeros((), SIGNATURE)
    part = SIDE // 4
    found["colours"] = small.reshape(4, part, 4, part, 3).sum((1, 3), dtype=np.int64) // part**2
    grey = small.astype(np.int64) @ _GREY
    if grey.max() - grey.min() >= 1000 * RANGE:
        low = (_COSINES @ grey @ _COSINES.T).ravel()
        found["hash"] = int.from_bytes(np.packbits(low > np.partition(low, low.size // 2 - 1)[low.size // 2 - 1]))
    return found


def of_caption(text: str) -> int:
    """A hash of 64 bits, equal for captions that differ in case, punctuation, white space or Unicode's forms alone.

    Short texts, as captions are, share too few words for MinHash to tell a near-copy from another one.
    """
    letters = [c for c in unicodedata.normalize("NFKC", text).casefold() if unicodedata.category(c)[0] not in "PZC"]
    return int.from_bytes(hashlib.blake2b(("".join(letters) or text).encode(), digest_size=8).digest(), "little")


def distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """In how many bits each hash, uint64, of `a` and of `b` differs."""
    return np.bitwise_count(a ^ b)


def alike(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Whether the colours are those of copies, bool (N,), of pictures whose hashes are near.

    Args:
      a, b: SIGNATURE (N,), or with more fields.
    """
    x, y = a["colours"].astype(np.float64), b["colours"].astype(np.float64)
    brightness = [colours.sum((1, 2, 3)) for colours in (x, y)]
    gain = np.minimum(np.maximum(*brightness) / np.maximum(np.minimum(*brightness), 1), BRIGHTER)
    for colours, one, other in ((x, *brightness), (y, *brightness[::-1])):
        colours *= np.where(one < other, gain, 1)[:, None, None, None]
        np.minimum(colours, 255, out=colours)
    tint = np.abs((x - x.mean(3, keepdims=True)) - (y - y.mean(3, keepdims=True))).max((1, 2, 3))
    fits = (np.abs(x - y).max((1, 2, 3)) <= COLOUR) & (tint <= TINT)
    same = (a["colours"] == b["colours"]).all((1, 2, 3))
    return np.where((a["hash"] == FLAT) | (b["hash"] == FLAT), same & (a["hash"] == b["hash"]), fits)


def near(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Whether each picture of `a` and of `b` are copies of one another, bool (N,)."""
    return (distances(a["hash"], b["hash"]) <= DISTANCE) & alike(a, b)
