import colorsys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from visionfm_jax.config import AugmentConfig
from visionfm_jax.data.augment import _hue_rotation, augment, color_jitter, normalize

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
