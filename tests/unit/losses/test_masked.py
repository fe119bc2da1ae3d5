"""What is hidden, counted; the loss of pixels by hand."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from visionfm_jax.losses.masked import enlarge, hide_blocks, hide_units, hide_words, pixel_loss

KEYS = jax.random.split(jax.random.key(0), 600)


@pytest.mark.parametrize(("side", "ratio"), [(14, 0.6), (3, 0.5), (3, 0.0), (3, 1.0)])
def test_as_many_units_of_each_image(side, ratio):
    hidden = np.asarray(hide_units(KEYS[:8], (side, side), ratio))
    assert hidden.dtype == bool
    assert hidden.shape == (8, side, side)
    assert set(hidden.sum((1, 2))) == {math.ceil(ratio * side**2)}


def test_every_unit_is_as_likely_and_drawn_by_the_images_own_key():
    hidden = np.asarray(hide_units(KEYS, (4, 4), 0.6))
    chance = 10 / 16
    assert np.abs(hidden.mean(0) - chance).max() < 4 * math.sqrt(chance * (1 - chance) / len(KEYS))
    order = np.array([5, 0, 3])
    np.testing.assert_array_equal(hide_units(KEYS[order], (4, 4), 0.6), hidden[order])


@pytest.mark.parametrize("ratio", [0.15, 0.5, 1.0])
def test_a_share_of_the_words_but_one_at_least_and_neither_begin_nor_end_nor_padding(ratio):
    lengths = np.tile(np.arange(1, 13), 50)  # begin and end are counted; 1: there is no text
    hidden = np.asarray(hide_words(KEYS, jnp.asarray(lengths), 14, ratio))
    words = np.maximum(lengths - 2, 0)
    expected = np.maximum(np.round(np.float32(ratio) * words.astype(np.float32)), 1)
    np.testing.assert_array_equal(hidden.sum(1), np.where(words > 0, expected, 0))
    places = np.arange(14)[None]
    assert not hidden[(places == 0) | (places >= lengths[:, None] - 1)].any()


def test_every_word_is_as_likely_and_drawn_by_the_texts_own_key():
    hidden = np.asarray(hide_words(KEYS, jnp.full(len(KEYS), 10), 12, 0.25))
    assert set(hidden.sum(1)) == {2}
    assert np.abs(hidden[:, 1:9].mean(0) - 1 / 4).max() < 4 * math.sqrt(3 / 16 / len(KEYS))
    order = np.array([5, 0, 3])
    np.testing.assert_array_equal(hide_words(KEYS[order], jnp.full(3, 10), 12, 0.25), hidden[order])


def test_units_to_pixels():
    units = jnp.array([[[True, False], [False, True]]])
    expected = [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]
    np.testing.assert_array_equal(enlarge(units, 2)[0], np.array(expected, bool))


def test_pixel_loss_by_hand():
    images = jnp.zeros((2, 2, 2, 3))
    reconstructed = jnp.full_like(images, 100.0)  # where nothing is hidden, nothing counts
    reconstructed = (
        reconstructed.at[0, 0, 0].set(jnp.array([1.0, -2.0, 6.0])).at[0, 1, 1].set(jnp.array([-1.0, 0.0, 1.0]))
    )
    hidden = jnp.zeros((2, 2, 2), bool).at[0, 0, 0].set(True).at[0, 1, 1].set(True)
    np.testing.assert_allclose(pixel_loss(reconstructed, images, hidden), [(3 + 2 / 3) / 2, 0], rtol=1e-6)
    gradient = jax.grad(lambda p: pixel_loss(p, images, hidden).sum())(reconstructed)
    np.testing.assert_allclose(gradient[0, 0, 0], [1 / 6, -1 / 6, 1 / 6], rtol=1e-6)
    assert not np.asarray(gradient)[~np.asarray(hidden)].any()


def test_blocks_are_as_many_patches_as_drawn_and_hang_together():
    hidden = np.asarray(jax.jit(lambda keys: hide_blocks(keys, (16, 12), (0.1, 0.5)))(KEYS))
    share = hidden.mean((1, 2))
    assert 19 / 192 <= share.min() < 0.11
    assert 0.49 < share.max() <= 0.5
    assert share.mean() == pytest.approx(0.3, abs=0.02)
    beside = (hidden[:, :, 1:] & hidden[:, :, :-1]).sum() / hidden[:, :, 1:].sum()
    assert beside > 0.65  # of patches drawn one by one: 0.35
    order = np.array([5, 0, 3])
    np.testing.assert_array_equal(hide_blocks(KEYS[order], (16, 12), (0.1, 0.5)), hidden[order])


def test_no_more_blocks_than_the_largest_share():
    hidden = hide_blocks(KEYS[:2], (10, 10), (0.57, 0.57))  # 57 patches in fp32, 56.99999999999999 in fp64
    assert hidden.sum((1, 2)).tolist() == [math.floor(0.57 * 100)] * 2
