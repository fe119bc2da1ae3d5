"""Patch embeddings and position tables for other sizes."""

from __future__ import annotations

import jax
import numpy as np

from visionfm_jax.interop.resample import resize_patches, resize_positions, way
from visionfm_jax.models.backbones.vit import ViTConfig
from visionfm_jax.models.positions import resize_table
from visionfm_jax.models.text import TextConfig

RNG = np.random.default_rng(0)


def test_products_with_larger_patches_are_those_of_before():
    kernel = RNG.normal(size=(4 * 4 * 3, 5)).astype(np.float32)
    patches = RNG.normal(size=(7, 4, 4, 3)).astype(np.float32)
    for side in (4, 6, 9):
        larger = jax.vmap(lambda patch, side=side: resize_table(patch, (side, side), "bicubic_antialias"))(patches)
        products = np.asarray(larger).reshape(7, -1) @ resize_patches(kernel, side)
        np.testing.assert_allclose(products, patches.reshape(7, -1) @ kernel, atol=2e-5)


def test_patches_are_resized_as_timm_resizes_them():
    """`timm.layers.patch_embed.resample_patch_embed` of timm 1.0.31, the first numbers of the first channel."""
    theirs = {
        6: [0.18927, -0.07167, -0.22127, 0.22639, 0.11675, -0.1084, -0.12976],
        3: [-0.2919, 1.17747, 0.67345, -0.83419, -0.10985, 1.64614, -3.32041],
    }
    kernel = np.random.default_rng(0).normal(size=(1, 3, 4, 4))
    ours = kernel.transpose(2, 3, 1, 0).reshape(-1, 1).astype(np.float32)
    for side, numbers in theirs.items():
        first = resize_patches(ours, side).reshape(side, side, 3)[..., 0].ravel()
        np.testing.assert_allclose(first[:7], numbers, atol=2e-5)


def test_positions_of_images_that_are_not_square_are_resized_as_timm_resizes_them():
    """`timm.layers.resample_abs_pos_embed` of timm 1.0.31: one channel's first numbers, the sum of all squares."""
    theirs = {
        (5, 9): ([0.00867, 0.63674, 0.83776, -0.73699, -0.38476, 0.55663, 0.83537], 261.1571157557464),
        (3, 2): ([0.12545, -0.15003, -0.32392, -0.0158, -0.54562, 0.80233], 13.56198377167259),
        (6, 4): ([0.49271, -0.16843, 0.47602, -0.50781, 0.31814, -0.27203, 0.08862], 96.76152482353527),
    }
    table = np.random.default_rng(0).normal(size=(1 + 4 * 6, 8)).astype(np.float32)
    for new, (numbers, squares) in theirs.items():
        found = resize_positions(table, (4, 6), new, "bicubic_antialias")
        np.testing.assert_array_equal(found[0], table[0])
        np.testing.assert_allclose(found[1:, 3][: len(numbers)], numbers, atol=1e-5)
        np.testing.assert_allclose((found.astype(np.float64) ** 2).sum(), squares, rtol=1e-6)


def test_a_table_of_as_many_patches_may_be_for_other_sides():
    wide = ViTConfig(pool="cls", patch_size=8, image_size=(32, 72))  # 4 x 9 patches
    assert way("pos_embed", (37, 8), (37, 8), wide).what == "6 x 6 to 4 x 9 positions (bicubic_antialias)"
    assert way("pos_embed", (37, 8), (37, 8), wide, (4, 9)) is None
    assert way("pos_embed", (37, 8), (37, 8), wide, (9, 4)).what.startswith("9 x 4 to 4 x 9")
    square = ViTConfig(pool="cls", patch_size=8, image_size=48)
    assert way("pos_embed", (37, 8), (37, 8), square) is None
    assert way("pos_embed", (37, 8), (37, 8), square, (4, 9)).what.startswith("4 x 9 to 6 x 6")
    assert way("pos_embed", (25, 8), (37, 8), square, (4, 6)).what.startswith("4 x 6 to 6 x 6")
    assert way("pos_embed", (25, 8), (37, 8), square) is None  # 24 patches of which sides?
    assert way("pos_embed", (26, 8), (37, 8), square, (4, 6)).what.startswith("5 x 5 to 6 x 6")  # not those


def test_only_sizes_of_images_and_patches_have_a_way():
    vit = ViTConfig(pool="cls", image_size=70)
    assert way("pos_embed", (17, 8), (26, 8), vit).what == "4 x 4 to 5 x 5 positions (bicubic_antialias)"
    table = RNG.normal(size=(17, 8)).astype(np.float32)
    new = way("pos_embed", (17, 8), (26, 8), vit).apply(table)
    np.testing.assert_array_equal(new[0], table[0])
    assert new.shape == (26, 8)
    for there, here in (((16, 8), (26, 8)), ((17, 8), (26, 9)), ((17, 8), (25, 8)), ((1, 8), (26, 8)), ((8,), (9,))):
        assert way("pos_embed", there, here, vit) is None
    assert way("embed/kernel", (48, 8), (75, 8), vit).what == "patches of 4 to 5 pixels (pseudo-inverse)"
    assert way("embed/kernel", (47, 8), (75, 8), vit) is None
    assert way("embed/kernel", (3 * 64**2, 8), (75, 8), vit).what == "patches of 64 to 5 pixels (pseudo-inverse)"
    assert way("embed/kernel", (3 * 65**2, 8), (75, 8), vit) is None  # more would take minutes, and gigabytes
    assert way("norm/scale", (8, 8), (9, 8), vit) is None
    text = TextConfig()
    assert way("pos_embed", (77, 8), (24, 8), text).apply(np.zeros((77, 8))).shape == (24, 8)
    assert way("pos_embed", (24, 8), (77, 8), text) is None
