import colorsys

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from visionfm_jax.config import AugmentConfig, PhotometricConfig
from visionfm_jax.data.augment import (
    _hue_rotation,
    augment,
    augment_views,
    color_jitter,
    gaussian_blur,
    normalize,
    photometric,
)
from visionfm_jax.data.transforms import MultiCrop, Views

IMAGES = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), np.uint8)
KEYS = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0), jnp.arange(6))
PLAIN = AugmentConfig(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))


def test_without_augmentation_only_normalisation_remains():
    np.testing.assert_allclose(
        augment(IMAGES, KEYS, AugmentConfig()), normalize(IMAGES, AugmentConfig()), rtol=1e-4, atol=1e-5
    )
    expected = (IMAGES / 255 - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])
    np.testing.assert_allclose(normalize(IMAGES, AugmentConfig()), expected, rtol=1e-4, atol=1e-5)


def test_a_sample_depends_on_its_own_key_alone():
    config = AugmentConfig(jitter=(0.4, 0.4, 0.4, 0.1))
    whole = augment(IMAGES, KEYS, config)
    np.testing.assert_allclose(augment(IMAGES[2:4], KEYS[2:4], config), whole[2:4], rtol=1e-5, atol=1e-5)
    assert not np.allclose(augment(IMAGES, jax.random.split(jax.random.key(9), 6), config), whole, atol=0.05)


def test_jitter_stays_in_range_and_hue_keeps_grey():
    keys = jax.random.split(jax.random.key(1), 50)
    out = jax.vmap(lambda k: color_jitter(IMAGES[0] / 255.0, k, (0.4, 0.4, 0.4, 0.1)))(keys)
    assert out.min() >= 0
    assert out.max() <= 1
    grey = jnp.full((4, 4, 3), 0.5)
    turned = jax.vmap(lambda k: color_jitter(grey, k, (0.0, 0.0, 0.0, 0.5)))(keys)
    np.testing.assert_allclose(turned, 0.5, atol=2e-3)


def test_hue_turns_red_round_the_circle():
    red = jnp.zeros((2, 2, 3)).at[..., 0].set(0.5)
    keys = jax.random.split(jax.random.key(1), 300)
    turned = jax.vmap(lambda k: color_jitter(red, k, (0.0, 0.0, 0.0, 0.5)))(keys)[:, 0, 0]
    assert set(np.argmax(turned, -1).tolist()) == {0, 1, 2}


@pytest.mark.parametrize("turn", [-0.1, 0.05, 0.1])
@pytest.mark.parametrize("colour", [(0.6, 0.4, 0.4), (0.4, 0.6, 0.4), (0.4, 0.4, 0.6), (0.6, 0.5, 0.35)])
def test_hue_turns_the_way_of_torchvision(colour, turn):
    """Its `adjust_hue` adds `turn` to the hue of HSV; the chroma plane of YIQ is a little askew to that circle."""
    hue, _, _ = colorsys.rgb_to_hsv(*colour)
    turned, _, _ = colorsys.rgb_to_hsv(*np.asarray(jnp.array(colour) @ _hue_rotation(2 * jnp.pi * turn)).tolist())
    moved = (turned - hue + 0.5) % 1 - 0.5
    assert moved == pytest.approx(turn, abs=0.06)
    assert np.sign(moved) == np.sign(turn)


def shares(images, keys, **fields) -> np.ndarray:
    """Which of the images (N, H, W, 3) in [0, 1] are changed."""
    out = jax.jit(jax.vmap(lambda x, key: photometric(x, key, PhotometricConfig(**fields))))(images, keys)
    return np.asarray(jnp.abs(out - images).max((1, 2, 3)) > 1e-3)


def test_a_jitter_that_comes_by_chance_turns_hues_both_ways():
    reddish = jnp.tile(jnp.array([0.6, 0.4, 0.4]), (400, 2, 2, 1))
    fields = PhotometricConfig(jitter=(0, 0, 0, 0.1), jitter_chance=0.3)
    out = np.asarray(jax.vmap(lambda x, key: photometric(x, key, fields))(reddish, jax.random.split(KEYS[0], 400)))
    turn = (out[..., 1] - out[..., 2]).mean((1, 2))  # towards green, away from blue
    turned = turn[np.abs(turn) > 1e-6]
    assert 85 < len(turned) < 155  # 120 ± 9
    assert 0.3 < (turned > 0).mean() < 0.7


def test_every_change_of_colours_comes_as_often_as_its_chance_says():
    keys, jitter = jax.random.split(jax.random.key(5), 400), (0.4, 0.4, 0.4, 0.1)
    images = jnp.tile(IMAGES[:1] / 255.0, (400, 1, 1, 1))
    changed = {
        name: shares(images, keys, **{name: 0.3}, **({"jitter": jitter} if name == "jitter_chance" else {}))
        for name in ("jitter_chance", "grey_chance", "blur_chance", "solarize_chance")
    }
    for name, which in changed.items():
        assert 85 < which.sum() < 155, name  # 120 ± 9
    pairs = [np.corrcoef(a, b)[0, 1] for k, a in enumerate(changed.values()) for b in list(changed.values())[:k]]
    assert np.abs(pairs).max() < 0.2


def test_grey_and_solarised_values():
    image = jnp.asarray(IMAGES[0] / 255.0)
    grey = photometric(image, KEYS[0], PhotometricConfig(grey_chance=1.0))
    np.testing.assert_allclose(grey, np.broadcast_to((image @ jnp.array([0.299, 0.587, 0.114]))[..., None], (8, 8, 3)))
    light = photometric(image, KEYS[0], PhotometricConfig(solarize_chance=1.0))
    np.testing.assert_allclose(light * 255, np.where(IMAGES[0] >= 128, 255.0 - IMAGES[0], IMAGES[0]), atol=1e-3)


def test_blur_is_a_gaussian_that_mirrors_at_the_edges():
    image = np.random.default_rng(1).random((20, 24, 3)).astype(np.float32)
    for sigma in (0.1, 0.8, 2.0):
        expected = cv2.GaussianBlur(image, (9, 9), sigma, borderType=cv2.BORDER_REFLECT_101)
        np.testing.assert_allclose(gaussian_blur(jnp.asarray(image), sigma, 4.0), expected, atol=1e-5)
    assert gaussian_blur(jnp.ones((3, 3, 3)), 2.0, 4.0).shape == (3, 3, 3)


def test_each_view_is_varied_as_its_group_says_by_a_key_of_its_own():
    strong = PhotometricConfig(jitter=(0.4, 0.4, 0.2, 0.1))
    crop = MultiCrop(views=(Views(count=1, size=8), Views(count=1, size=8, photometric=strong),
                            Views(name="local", count=3, size=8, photometric=strong)))  # fmt: skip
    batch = {"global": jnp.asarray(np.stack([IMAGES] * 2, 1)), "local": jnp.asarray(np.stack([IMAGES] * 3, 1))}
    config = AugmentConfig(jitter=(1.0, 1.0, 1.0, 0.5))  # of images, not of views
    out = augment_views(batch, KEYS, crop, config)
    assert {k: (v.shape, v.dtype.name) for k, v in out.items()} == {
        "global": ((6, 2, 8, 8, 3), "float32"), "local": ((6, 3, 8, 8, 3), "float32"),
    }  # fmt: skip
    np.testing.assert_allclose(out["global"][:, 0], normalize(IMAGES, config), rtol=1e-4, atol=1e-5)
    views = [out["global"][:, 1], *out["local"].swapaxes(0, 1)]
    for k, view in enumerate(views):
        assert not any(np.allclose(view, other, atol=0.05) for other in views[:k])
    part = augment_views({k: v[2:4] for k, v in batch.items()}, KEYS[2:4], crop, config)
    for name, expected in out.items():
        np.testing.assert_allclose(part[name], expected[2:4], rtol=1e-4, atol=1e-5)
