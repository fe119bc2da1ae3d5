"""Signatures: equal for copies of a picture, different for other pictures, other colours and other captions."""

import io
import itertools

import numpy as np
import pytest
from PIL import Image

from visionfm_jax.data import signatures
from visionfm_jax.data.images import DamagedImage, decode
from visionfm_jax.data.sources.bundled import read_set
from visionfm_jax.data.sources.kinds import ScenesConfig
from visionfm_jax.data.sources.scenes import ScenesSource


@pytest.fixture(scope="module")
def pictures() -> list[np.ndarray]:
    """120 scenes and 120 emoji of different concepts."""
    scenes = ScenesSource(ScenesConfig(path="noto", scenes=120))
    arrays, _ = read_set("twemoji")
    _, rows = np.unique(arrays["concept"], return_index=True)
    emoji = [arrays["blob"][arrays["offsets"][i] : arrays["offsets"][i + 1]].tobytes() for i in rows[::14][:120]]
    large = [np.asarray(Image.fromarray(decode(one)).resize((128, 128))) for one in emoji]
    return [scenes[i]["image"] for i in range(120)] + large


def of(image) -> np.ndarray:
    return signatures.of_pixels(signatures.shrunk(image)[0])


def copied(pixels: np.ndarray, rng: np.random.Generator, *, cut: float) -> bytes:
    """Cut by a share of each side, resized by 0.5 … 2, brightened by 0.9 … 1.1, as JPEG of quality 50 … 90."""
    height, width = pixels.shape[:2]
    left, top = rng.uniform(0, cut, 2) * (width, height)
    box = (left, top, left + width * (1 - cut), top + height * (1 - cut))
    scale = 2 ** rng.uniform(-1, 1)
    image = Image.fromarray(pixels).resize((round(width * scale), round(height * scale)), Image.Resampling.BICUBIC, box)
    factor = rng.uniform(0.9, 1.1)
    image, buffer = image.point(lambda value: value * factor), io.BytesIO()
    image.save(buffer, "JPEG", quality=int(rng.integers(50, 91)))
    return buffer.getvalue()


@pytest.mark.parametrize(("cut", "scenes", "emoji"), [(0.0, 0.97, 0.78), (0.02, 0.9, 0.55)])
def test_most_copies_are_found_and_nothing_else(pictures, cut, scenes, emoji):
    rng = np.random.default_rng(0)
    originals = np.array([of(picture) for picture in pictures])
    copies = np.array([of(copied(picture, rng, cut=cut)) for picture in pictures])
    found = signatures.near(originals, copies)
    assert found[:120].mean() >= scenes
    assert found[120:].mean() >= emoji
    a, b = np.array(list(itertools.combinations(range(240), 2))).T
    assert not signatures.near(originals[a], copies[b]).any()


def test_the_hash_is_the_definition_of_phash(pictures):
    for pixels in pictures[::60]:
        small, count = signatures.shrunk(pixels)
        grey = small @ np.array([0.299, 0.587, 0.114])
        low = np.zeros((8, 8))
        for u, v in itertools.product(range(8), repeat=2):
            for y, x in itertools.product(range(32), repeat=2):
                wave = np.cos(np.pi * u * (2 * y + 1) / 64) * np.cos(np.pi * v * (2 * x + 1) / 64)
                low[u, v] += grey[y, x] * wave
        bits = "".join("01"[int(value > np.median(low))] for value in low.ravel())
        assert signatures.of_pixels(small)["hash"] == int(bits, 2)
        assert count == pixels.shape[0] * pixels.shape[1]


def test_a_drawing_in_other_colours_is_no_copy():
    """Skin tones are told apart, though their hashes are near."""
    arrays, meta = read_set("twemoji")
    hands = [
        of(arrays["blob"][arrays["offsets"][i] : arrays["offsets"][i + 1]].tobytes())
        for i, concept in enumerate(arrays["concept"])
        if meta["concepts"][concept]["name"] == "thumbs up"
    ]
    a, b = (np.array(side) for side in zip(*itertools.combinations(hands, 2), strict=True))
    assert len(a) == 15
    assert (signatures.distances(a["hash"], b["hash"]) <= signatures.DISTANCE).sum() == 9
    assert not signatures.near(a, b).any()


def test_pictures_of_one_colour_are_copies_of_the_same_colour_alone():
    def flat(*colour):
        return np.full((40, 60, 3), colour, np.uint8)

    black, white, grey, light = (of(flat(value)) for value in (0, 255, 128, 140))
    faint = flat(250)
    faint[10:20, 10:20] = 200
    assert of(faint)["hash"] != signatures.FLAT
    for one, other in itertools.combinations((black, white, grey, light, of(faint)), 2):
        assert not signatures.near(one[None], other[None])[0]
    assert signatures.near(white[None], of(np.full((9, 9), 255, np.uint8))[None])[0]


def test_captions_are_equal_but_for_their_spelling():
    equal = ["A photo of a cat", "a PHOTO of  a cat!", "“A photo: of a cat…”", "ａ photo of a\ncat"]
    assert len({signatures.of_caption(text) for text in equal}) == 1
    others = ["a photo of a hat", "!!!", "???", "猫の写真", "🐱", "🐶", "a photo of a café", "a photo of a cafe"]
    assert len({signatures.of_caption(text) for text in [*others, *equal]}) == len(others) + 1


def test_what_is_no_image_is_damaged():
    with pytest.raises(DamagedImage):
        signatures.shrunk(b"GIF89a")
