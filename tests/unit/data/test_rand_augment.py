"""RandAugment: what each operation does to known pixels, and what follows from the seed."""

import io
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from visionfm_jax.data import rand_augment as module
from visionfm_jax.data.rand_augment import FILL, OPERATIONS, rand_augment
from visionfm_jax.data.sources.bundled import read_set

GEOMETRIC = ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")
ENHANCING = ("color", "contrast", "brightness", "sharpness")
ALWAYS = ("autocontrast", "equalize")  # have no magnitude


@pytest.fixture(scope="module")
def photo() -> np.ndarray:
    """Coloured shapes with soft edges, between 40 and 200."""
    arrays, _ = read_set("noto")
    image = Image.open(io.BytesIO(arrays["blob"][: arrays["offsets"][1]].tobytes())).convert("RGB")
    return (np.asarray(image) * (160 / 255) + 40).astype(np.uint8)


def apply(name: str, pixels: np.ndarray, magnitude: float, direction: float = 1.0) -> np.ndarray:
    return np.asarray(OPERATIONS[name](Image.fromarray(pixels), magnitude / 10, direction))


def test_the_operations_are_those_of_the_paper():
    assert len(OPERATIONS) == 14
    assert {*GEOMETRIC, *ENHANCING, *ALWAYS, "identity", "solarize", "posterize"} == set(OPERATIONS)


def test_the_seed_decides(photo):
    first, same, other = (rand_augment(photo, 2, 9.0, np.random.default_rng(s)) for s in (3, 3, 4))
    assert first.tobytes() == same.tobytes() != other.tobytes()
    assert first.dtype == np.uint8
    assert first.shape == photo.shape


@pytest.mark.parametrize("operations", [0, 1, 2, 5])
def test_equally_many_numbers_are_drawn_whatever_comes(photo, operations):
    for seed in range(20):
        rng, expected = np.random.default_rng(seed), np.random.default_rng(seed)
        rand_augment(photo[: seed + 1], operations, float(seed % 11), rng)
        expected.random(2 * operations)
        assert rng.random() == expected.random()


def test_every_operation_comes_equally_often_both_ways(photo, monkeypatch):
    seen = Counter()
    for name in OPERATIONS:
        if name != "identity":
            monkeypatch.setitem(OPERATIONS, name, lambda image, m, way, name=name: seen.update([(name, way)]) or image)
    rng = np.random.default_rng(0)
    for _ in range(1000):
        rand_augment(photo[:1, :1], 5, 9.0, rng)
    assert len(seen) == 13 * 2
    assert all(120 < count < 240 for count in seen.values()), seen  # 5000 / 28 = 179 ± 13
    assert 4500 < sum(seen.values()) < 4750  # the rest is the identity


def test_no_operation_gives_the_pixels_back(photo, monkeypatch):
    assert rand_augment(photo, 0, 9.0, np.random.default_rng(0)) is photo
    monkeypatch.setattr(module, "OPERATIONS", {"identity": OPERATIONS["identity"]})
    assert rand_augment(photo, 3, 9.0, np.random.default_rng(0)) is photo


@pytest.mark.parametrize("direction", [1.0, -1.0])
@pytest.mark.parametrize("name", [n for n in OPERATIONS if n not in ALWAYS])
def test_magnitude_0_is_the_identity_and_10_is_not(photo, name, direction):
    np.testing.assert_array_equal(apply(name, photo, 0, direction), photo)
    if name != "identity":
        assert (apply(name, photo, 10, direction) != photo).any()


@pytest.mark.parametrize("name", [n for n in OPERATIONS if n not in ("identity", *ALWAYS)])
def test_more_magnitude_changes_more(photo, name):
    changes = [np.abs(apply(name, photo, m, -1.0).astype(int) - photo).mean() for m in (1, 4, 10)]
    assert changes == sorted(changes)
    assert changes[2] > changes[0]


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (2, 3)])
def test_the_smallest_images(photo, shape):
    pixels = photo[: shape[0], : shape[1]]
    for name in OPERATIONS:
        for magnitude in (0, 9, 10):
            for direction in (1.0, -1.0):
                assert apply(name, pixels, magnitude, direction).shape == (*shape, 3)
    assert rand_augment(pixels, 8, 9.0, np.random.default_rng(0)).shape == (*shape, 3)


def test_a_crop_that_is_a_view_counts_as_its_copy(photo):
    view = photo[3:40, 5:50]
    assert not view.flags.c_contiguous
    results = [rand_augment(pixels, 3, 9.0, np.random.default_rng(5)) for pixels in (view, view.copy())]
    np.testing.assert_array_equal(*results)


def test_shifts_are_whole_pixels_and_uncover_grey(photo):
    for name, axis in (("translate_x", 1), ("translate_y", 0)):
        for direction in (1, -1):
            shifted = np.moveaxis(apply(name, photo, 5, direction), axis, 0)[::direction]
            source = np.moveaxis(photo, axis, 0)[::direction]
            by = 14  # 150 / 331 * 0.5 * 64 = 14.5
            np.testing.assert_array_equal(shifted[by:], source[:-by])
            assert (shifted[:by] == FILL).all()


@pytest.mark.parametrize(
    ("side", "magnitude", "by"), [(64, 3, 8), (224, 3, 30), (224, 9, 91), (48, 10, 21), (331, 9, 135)]
)
def test_shifts_are_those_of_torchvision(side, magnitude, by):
    """`int(magnitude)` of `RandAugment._augmentation_space` at bin 3 M of 31: cut off, where 8.7 rounds to 9."""
    ramp = np.zeros((side, side, 3), np.uint8)
    ramp[side // 2, side // 2] = 255
    for direction in (1, -1):
        where = np.argwhere(apply("translate_x", ramp, magnitude, direction)[..., 0] == 255)
        np.testing.assert_array_equal(where, [[side // 2, side // 2 + by * direction]])
        where = np.argwhere(apply("translate_y", ramp, magnitude, direction)[..., 0] == 255)
        np.testing.assert_array_equal(where, [[side // 2 + by * direction, side // 2]])


def test_shears_move_rows_or_columns(photo):
    flat = np.full((64, 64, 3), 10, np.uint8)
    grey = (apply("shear_x", flat, 10) == FILL).all(-1)
    assert not grey[0].any()
    assert grey[63].sum() == round(0.3 * 63)
    np.testing.assert_array_equal(grey.T, (apply("shear_y", flat, 10) == FILL).all(-1))
    np.testing.assert_array_equal(apply("shear_y", flat.swapaxes(0, 1), 10, -1)[:, 0], flat[0])


def test_rotations_turn_about_the_centre():
    disc = np.zeros((65, 65, 3), np.uint8)
    disc[32, 32:] = 255
    for direction in (1, -1):
        turned = apply("rotate", disc, 10, direction)[..., 0].astype(int)
        assert turned[32, 32] > 200
        assert tuple(turned[0, ::64]) == (128, 128)
        y, x = np.argwhere(turned[10:55, 40:60] > 90).mean(0) - np.array([22, -8])
        assert np.degrees(np.arctan2(-y, x)) == pytest.approx(30 * direction, abs=1.5)  # anticlockwise


def test_values_are_mapped_as_the_names_say():
    ramp = np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 3, axis=2)
    values = ramp[0, :, 0].astype(int)
    np.testing.assert_array_equal(apply("solarize", ramp, 10)[0, :, 0], 255 - values)
    np.testing.assert_array_equal(apply("solarize", ramp, 5)[0, :, 1], np.where(values < 128, values, 255 - values))
    np.testing.assert_array_equal(apply("posterize", ramp, 10)[0, :, 0], values & 0xF0)
    np.testing.assert_array_equal(apply("posterize", ramp, 5)[0, :, 2], values & 0xFC)
    for direction in (1, -1):
        bright = apply("brightness", ramp, 10, direction)[0, :, 0].astype(int)
        assert np.abs(bright - np.clip(values * (1 + 0.9 * direction), 0, 255)).max() <= 1
        contrast = apply("contrast", ramp, 10, direction)[0, :, 0].astype(int)
        assert np.abs(contrast - np.clip(128 + (values - 128) * (1 + 0.9 * direction), 0, 255)).max() <= 1


def test_colour_sharpness_and_histograms(photo):
    def spread(pixels):
        return np.ptp(pixels.astype(int), axis=-1).mean()

    def edges(pixels):
        return np.abs(np.diff(pixels.astype(int), axis=1)).mean()

    for name, measure in (("color", spread), ("sharpness", edges)):
        assert measure(apply(name, photo, 9, -1)) < measure(photo) < measure(apply(name, photo, 9, 1))
    stretched = apply("autocontrast", photo, 0)
    assert (stretched.min(), stretched.max()) == (0, 255)
    flat = apply("equalize", photo, 0)
    assert flat.max() == 255
    assert flat.std() > photo.std()
