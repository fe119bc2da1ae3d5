import itertools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from visionfm_jax.errors import ConfigError
from visionfm_jax.models.backbones import swin_v2
from visionfm_jax.models.backbones.swin_v2 import (
    SIZES,
    PatchMerging,
    PositionBias,
    SwinBlock,
    SwinV2,
    SwinV2Config,
    SwinV2Size,
    WindowAttention,
    group_of,
    log_coordinates,
    offset_index,
    partition,
    shifted_window_mask,
    unpartition,
    windows_of,
)
from visionfm_jax.models.layers import drop_path, l2_normalize, layer_norm

pytestmark = pytest.mark.usefixtures("quick_compiles")

TINY = SwinV2Size(16, (2, 4, 1, 1), (1, 2, 2, 4))


@pytest.fixture(autouse=True)
def _tiny(monkeypatch):
    monkeypatch.setitem(SIZES, "tiny", TINY)


def small(**more) -> SwinV2Config:
    return SwinV2Config(**({"size": "tiny", "image_size": 32, "window": 4, "drop_path": 0.0} | more))


def images(*shape: int):
    return jax.random.normal(jax.random.key(1), shape)


def shapes(config: SwinV2Config):
    image = jnp.zeros((1, config.image_size, config.image_size, 3))
    return jax.eval_shape(SwinV2(config).init, jax.random.key(0), image)["params"]


def randomised(shape_tree, seed: int = 7):
    """Every parameter random: at initialisation blocks are the identity."""
    leaves, tree = jax.tree.flatten(shape_tree)
    rng = np.random.default_rng(seed)
    return tree.unflatten([0.1 * rng.standard_normal(leaf.shape, np.float32) for leaf in leaves])


def count(tree) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


# Sizes


# Totals of timm and Hugging Face with 1,000 classes; ours has no head.
@pytest.mark.parametrize(("size", "total"), [("T", 28_347_154), ("S", 49_728_418), ("B", 87_918_816)])
def test_published_parameter_counts(size, total):
    width = 8 * SIZES[size].width
    assert count(shapes(SwinV2Config(size=size, image_size=256, window=8))) == total - 1000 * (width + 1)


@pytest.mark.full_size
def test_full_size_counts(monkeypatch):
    assert count(shapes(SwinV2Config(size="H"))) == 658_027_922 - 1000 * 2817 + 3 * 2 * 1408  # timm, and 3 norms
    giant = shapes(SwinV2Config())
    assert count(giant) == 2_997_843_680
    assert count(giant) == pytest.approx(2.998e9, rel=1e-3)
    assert giant["stage2"]["blocks"]["5"]["norm"]["scale"].shape == (7, 2048)
    assert shapes(SwinV2Config(image_size=640, window=20)) == giant  # nothing depends on the window
    monkeypatch.setitem(SIZES, "without norms", SIZES["G"]._replace(extra_norm_every=0))
    assert count(shapes(SwinV2Config(size="without norms"))) == 2_997_815_008  # timm and Hugging Face


def test_every_size_has_whole_heads_and_norms_at_the_ends_of_groups():
    for size in SIZES.values():
        for i, (depth, heads) in enumerate(zip(size.depths, size.heads, strict=True)):
            assert size.width * 2**i % heads == 0
            assert depth % group_of(depth, size.extra_norm_every) == 0


def test_unknown_size_lists_the_table():
    with pytest.raises(ConfigError, match="P, T, S, B, L, H, G"):
        shapes(SwinV2Config(size="XXL"))


def test_forward_flops_of_the_recipe():
    # A training step is three forward passes.
    assert 3 * SwinV2Config().flops / 1e12 == pytest.approx(3.0, abs=0.05)
    for window, total in ((20, 25.3), (40, 27.8)):
        assert 3 * SwinV2Config(image_size=640, window=window).flops / 1e12 == pytest.approx(total, abs=0.05)


def test_forward_flops_by_hand():
    # Maps of 8, 4, 2, 1 and windows of 4, 4, 2, 1; a layer's matrices hold 12 D² weights.
    total = 64 * 48 * 16
    for side, window, D, depth in [(8, 4, 16, 2), (4, 4, 32, 4), (2, 2, 64, 1), (1, 1, 128, 1)]:
        total += depth * (side**2 * 12 * D**2 + 2 * side**2 * window**2 * D)
    total += 16 * 64 * 32 + 4 * 128 * 64 + 1 * 256 * 128
    assert small().flops == 2 * total


# Windows

CUTS = [
    ((8, 8), 4, True), ((7, 9), 4, True), ((7, 9), 4, False), ((10, 3), 5, True), ((3, 2), 7, True),
    ((14, 14), 7, True),
]  # fmt: skip


@pytest.mark.parametrize(("map", "window", "shifted"), CUTS)
def test_partition_is_undone(map, window, shifted):
    windows = windows_of(map, window, (0, 0), shifted)
    x = images(2, *map, 3)
    cut = partition(x, windows)
    assert cut.shape == (2, windows.tokens, windows.count, 3)
    np.testing.assert_array_equal(unpartition(cut, windows), x)


def test_a_side_within_the_window_is_one_window_and_not_shifted():
    windows = windows_of((10, 4), 4, (0, 0), shifted=True)
    assert (windows.window, windows.shift, windows.padded, windows.count) == ((4, 4), (2, 0), (12, 4), 3)
    assert windows_of((3, 4), 4, (0, 0), shifted=True).shift == (0, 0)
    assert windows_of((3, 9), 4, (0, 0), shifted=True).window == (3, 4)


@pytest.mark.parametrize(("map", "window", "shifted"), CUTS)
def test_the_mask_parts_what_the_roll_joined(map, window, shifted):
    """Neighbours: tokens of one window that lie as far from each other on the map as they do in the window."""
    windows = windows_of(map, window, (0, 0), shifted)
    padded = windows._replace(map=windows.padded)
    at = np.stack(np.meshgrid(*[np.arange(p) for p in windows.padded], indexing="ij"), -1)
    at = np.asarray(partition(jnp.asarray(at, jnp.float32)[None], padded))[0].astype(int)  # (T, windows, 2)
    h, w = windows.window
    inside = np.stack(np.meshgrid(np.arange(h), np.arange(w), indexing="ij"), -1).reshape(-1, 2)
    mask = shifted_window_mask(windows)
    if not any(windows.shift):
        assert mask is None
        mask = np.zeros((windows.count, h * w, h * w))
    for n, i, j in itertools.product(range(windows.count), range(h * w), range(h * w)):
        neighbours = (at[i, n] - at[j, n] == inside[i] - inside[j]).all()
        assert mask[n, i, j] == (0 if neighbours else -100)


def test_attention_sees_neighbours_and_no_others():
    """A change of one token changes the tokens of its own window, up to the border of the map that the roll crosses."""
    windows = windows_of((8, 8), 4, (0, 0), shifted=True)
    attn = WindowAttention(2, windows, jnp.float32, "xla")
    x = images(1, 8, 8, 16)
    params = randomised(jax.eval_shape(attn.init, jax.random.key(0), x))
    moved = np.abs(attn.apply(params, x.at[0, 0, 3].add(1.0)) - attn.apply(params, x)).max(-1)[0] > 1e-6
    expected = np.zeros((8, 8), bool)
    expected[0:2, 2:6] = True  # windows begin at 2; the rows before are a window of their own
    np.testing.assert_array_equal(moved, expected)


def test_padding_has_no_gradient_in_half_precision():
    """Keys of the padding are zero: their direction's derivative is without bound, and 0 times inf is not a number."""
    x = jnp.zeros((2, 4)).at[1].set(3.0)
    np.testing.assert_array_equal(l2_normalize(x), [[0] * 4, [0.5] * 4])
    np.testing.assert_array_equal(jax.grad(lambda x: (l2_normalize(x) * jnp.arange(8.0).reshape(2, 4)).sum())(x)[0], 0)
    attn = WindowAttention(2, windows_of((5, 6), 4, (0, 0), shifted=True), jnp.float16, "xla")
    x = images(1, 5, 6, 16).astype(jnp.float16)
    params = randomised(jax.eval_shape(attn.init, jax.random.key(0), x))
    chex.assert_tree_all_finite(jax.grad(lambda p: (attn.apply(p, x).astype(jnp.float32) ** 2).sum())(params))


# Position bias


def test_log_coordinates_by_hand():
    table = log_coordinates((3, 2), (0, 0))
    assert table.shape == (5, 3, 2)
    half, whole = math.log2(1 + 8 / 2) / 3, math.log2(1 + 8) / 3
    np.testing.assert_allclose(table[:, 0, 0], [-whole, -half, 0, half, whole], rtol=1e-6)
    np.testing.assert_allclose(table[0, :, 1], [-whole, 0, whole], rtol=1e-6)
    np.testing.assert_allclose(log_coordinates((3, 3), (2, 2))[-1, -1], [math.log2(17) / 3] * 2, rtol=1e-6)
    np.testing.assert_array_equal(log_coordinates((1, 1), (0, 0)), np.zeros((1, 1, 2)))


def test_offset_index_names_the_offset():
    window = (3, 2)
    table = log_coordinates(window, (0, 0)).reshape(-1, 2)
    for i, j in itertools.product(range(6), range(6)):
        d = np.array([i // 2 - j // 2, i % 2 - j % 2]) / np.array([2, 1]) * 8
        np.testing.assert_allclose(table[offset_index(window)[i, j]], np.sign(d) * np.log2(1 + abs(d)) / 3, rtol=1e-6)


def test_bias_of_another_window_agrees_where_offsets_do():
    bias = PositionBias(3)
    small, large = (windows_of((s, s), s, (7, 7), shifted=False) for s in (7, 12))
    params = randomised(bias.init(jax.random.key(0), small))
    params["params"]["fc1"]["kernel"] *= 20
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, bias.init(jax.random.key(0), large))
    before = bias.apply(params, windows_of((7, 7), 7, (0, 0), shifted=False)).reshape(3, 7, 7, 7, 7)
    after = bias.apply(params, large).reshape(3, 12, 12, 12, 12)
    for start in (0, 5):
        part = slice(start, start + 7)
        np.testing.assert_allclose(after[:, part, part, part, part], before, rtol=1e-5)
    forgotten = bias.apply(params, large._replace(pretrained=(0, 0))).reshape(3, 12, 12, 12, 12)
    assert np.abs(forgotten[:, :7, :7, :7, :7] - before).max() > 0.1
    assert (before > 0).all()
    assert (before < 16).all()


def test_pretrained_windows_are_those_of_the_run_before(monkeypatch):
    """Odd maps: 18, 9, 5 and 3 for 70 pixels; a window of 7 was 7, 7, 5, 3."""

    def trained(config: SwinV2Config, size: int) -> list[tuple]:
        seen = []
        monkeypatch.setattr(swin_v2, "log_coordinates", lambda w, p: seen.append((w, p)) or log_coordinates(w, p))
        image = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
        params = jax.eval_shape(SwinV2(small()).init, jax.random.key(0), image)
        seen.clear()
        jax.eval_shape(SwinV2(config).apply, params, image)
        return list(dict.fromkeys(seen))

    before = trained(small(window=7, image_size=70), 70)
    assert [w for w, _ in before] == [(7, 7), (5, 5), (3, 3)]
    assert all(own == unit for own, unit in before)
    after = trained(small(window=9, pretrained_window=7, pretrained_image_size=70), 140)
    assert after == [((9, 9), (7, 7)), ((9, 9), (5, 5)), ((5, 5), (3, 3))]


def test_an_offset_means_at_other_sizes_what_it_meant_in_training():
    """Maps of 16 x 24, 8 x 12, 4 x 6, 2 x 3 tokens; on images of twice the size windows do not shrink so soon."""
    config = small(image_size=(64, 96), window=(4, 8))
    assert swin_v2.bias_windows(config) == [(4, 8), (4, 8), (4, 6), (2, 3)]
    assert [swin_v2.windows_of(m, config.window, (0, 0), True).window for m in swin_v2.maps_of((128, 192), 4)] == [
        (4, 8), (4, 8), (4, 8), (4, 6),
    ]  # fmt: skip
    continued = small(image_size=128, window=8, pretrained_window=(4, 8), pretrained_image_size=(64, 96))
    assert swin_v2.bias_windows(continued) == [(4, 8), (4, 8), (4, 6), (2, 3)]


def test_sizes_by_numbers():
    named = SwinV2Config(size="S", image_size=64, window=4)
    numbers = SwinV2Config(
        size="H", width=96, depths=(2, 2, 18, 2), heads=(3, 6, 12, 24), image_size=64, window=4, mlp_ratio=2
    )
    assert swin_v2.size_of(numbers) == swin_v2.size_of(named)._replace(extra_norm_every=6)
    assert swin_v2.size_of(SwinV2Config(size="T", depths=(0, 0, 8, 0))).depths == (2, 2, 8, 2)
    assert numbers.problems("model") == named.problems("model") == []
    assert numbers.flops < named.flops
    kernel = shapes(numbers)["stage1"]["blocks"]["0"]["mlp"]["fc1"]["kernel"]
    assert kernel.shape == (1, 192, 384)


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"heads": (0, 0, 0, 5)}, ("model.image.heads[3]", 5, "must divide the 256 channels of the stage")),
        ({"size": "H", "depths": (0, 0, 20, 0)}, ("model.image.depths[2]", 20, "must be a multiple of 6, by which")),
    ],
)
def test_numbers_that_do_not_go_together_are_refused(fields, problem):
    (found,) = SwinV2Config(**{"size": "P", "image_size": 64, **fields}).problems("model.image")
    assert found[:2] == problem[:2]
    assert found[2].startswith(problem[2])


def test_flops_of_images_that_are_not_square():
    """Where every stage's map is of whole windows, they grow with the image."""
    square, wide = small(image_size=32, window=1), small(image_size=(32, 96), window=1)
    assert wide.flops == pytest.approx(3 * square.flops, rel=1e-12)


# Depth


def test_blocks_start_as_the_identity():
    x = images(2, 8, 8, 16)
    block = SwinBlock(2, 4, windows_of((8, 8), 4, (0, 0), True), jnp.float32, "xla", False, None)
    own = {"layer": 0, "rate": 0.0}
    params = block.init(jax.random.key(0), x, own)
    np.testing.assert_array_equal(block.apply(params, x, own), x)


def by_hand(config: SwinV2Config, params, x, keys=None):
    """The network layer by layer, without a loop."""
    size, P = SIZES[config.size], config.patch_size
    B, H, W, _ = x.shape
    x = x.reshape(B, H // P, P, W // P, P, 3).transpose(0, 1, 3, 2, 4, 5).reshape(B, H // P, W // P, -1)
    x = x @ params["embed"]["kernel"] + params["embed"]["bias"]
    x = layer_norm(jnp.float32, None, epsilon=1e-5).apply({"params": params["embed_norm"]}, x)
    layer, maps = 0, []
    for i, depth in enumerate(size.depths):
        blocks = params[f"stage{i}"]["blocks"]
        group = 1 if "attn" in blocks else len(blocks)
        for j in range(depth):
            own = jax.tree.map(lambda a, j=j, g=group: a[j // g], blocks if group == 1 else blocks[str(j % group)])
            normed = size.extra_norm_every > 0 and j % size.extra_norm_every == size.extra_norm_every - 1
            assert ("norm" in own) == normed
            windows = windows_of(x.shape[1:3], config.window, (0, 0), j % 2 == 1)
            block = SwinBlock(size.heads[i], 4, windows, jnp.float32, "xla", normed, keys)
            rate = config.drop_path * layer / (sum(size.depths) - 1)
            x = block.apply({"params": own}, x, {"layer": jnp.int32(layer), "rate": jnp.float32(rate)})
            layer += 1
        maps.append(x)
        if i < 3:
            x = PatchMerging(jnp.float32).apply({"params": params[f"merging{i}"]}, x)
    return maps


@pytest.mark.parametrize(("depths", "extra_norm_every"), [((2, 4, 1, 1), 0), ((3, 1, 1, 1), 0), ((1, 12, 1, 1), 6)])
def test_the_loop_is_the_layers_in_turn(monkeypatch, depths, extra_norm_every):
    monkeypatch.setitem(SIZES, "tiny", SwinV2Size(8, depths, (1, 1, 2, 2), extra_norm_every))
    config = small(drop_path=0.5, image_size=32, patch_size=2, window=2)
    params = randomised(shapes(config))
    x, keys = images(3, 32, 32, 3), jax.random.split(jax.random.key(2), 3)
    maps = jax.jit(SwinV2(config).apply)({"params": params}, x, keys).maps
    for ours, hand in zip(maps, jax.jit(lambda p: by_hand(config, p, x, keys))(params), strict=True):
        np.testing.assert_allclose(ours, hand, rtol=1e-4, atol=1e-5)


def test_a_norm_of_the_main_branch_ends_its_block():
    x, own = images(2, 4, 4, 16), {"layer": 0, "rate": 0.0}
    block = SwinBlock(2, 4, windows_of((4, 4), 4, (0, 0), False), jnp.float32, "xla", True, None)
    y = block.apply(block.init(jax.random.key(0), x, own), x, own)  # the block itself is the identity
    np.testing.assert_allclose(y.mean(-1), 0, atol=1e-6)
    np.testing.assert_allclose(y.std(-1), 1, atol=1e-4)


def test_rematerialisation_changes_no_gradient(monkeypatch):
    monkeypatch.setitem(SIZES, "tiny", SwinV2Size(8, (4, 1, 1, 1), (1, 2, 2, 4)))
    params, x = randomised(shapes(small())), images(2, 32, 32, 3)
    gradients = {}
    for remat in ("none", "attention", "dots", "full"):
        model = SwinV2(small(remat=remat))

        def loss(params, model=model):
            return jnp.sum(model.apply({"params": params}, x).maps[0] ** 2)  # of the loop of two turns

        gradients[remat] = jax.jit(jax.grad(loss))(params)
    for other in ("attention", "dots", "full"):
        chex.assert_trees_all_close(gradients[other], gradients["none"], rtol=1e-4, atol=1e-4)


# Stochastic depth


def test_drop_path_leaves_out_at_the_stated_rate():
    keys = jax.random.split(jax.random.key(0), 4000)
    x = jnp.ones((4000, 2, 3))
    for index, rate in ((0, 0.0), (3, 0.2), (8, 0.7)):
        y = np.asarray(drop_path(x, keys, index, rate))
        kept = y[:, 0, 0] > 0
        np.testing.assert_allclose(y, np.broadcast_to((kept / (1 - rate))[:, None, None], x.shape), rtol=1e-6)
        assert abs(1 - kept.mean() - rate) < 4 * math.sqrt(rate * (1 - rate) / 4000) + 1e-9
    one, other = (np.asarray(drop_path(x, keys, i, 0.5))[:, 0, 0] > 0 for i in (1, 2))
    assert abs(np.corrcoef(one, other)[0, 1]) < 0.08  # layers draw for themselves
    assert drop_path(x, None, 0, 0.5) is x


def test_drop_path_depends_on_a_samples_key_alone():
    config = small(drop_path=0.6)
    params, x = {"params": randomised(shapes(config))}, images(6, 32, 32, 3)
    keys = jax.random.split(jax.random.key(2), 6)
    forward = jax.jit(SwinV2(config).apply)
    out, order = forward(params, x, keys).pooled, jnp.array([3, 0, 5, 1, 4, 2])
    np.testing.assert_allclose(forward(params, x[order], keys[order]).pooled, out[order], rtol=1e-5, atol=1e-6)
    whole = jax.jit(lambda p, x: SwinV2(config).apply(p, x).pooled)(params, x)
    assert (np.abs(whole - out).max(1) > 1e-3).any()
    never = jax.jit(SwinV2(small()).apply)(params, x, keys).pooled
    np.testing.assert_allclose(never, whole, rtol=1e-5, atol=1e-6)


# The whole


@pytest.mark.parametrize(("height", "width"), [(33, 50), (4, 70)])
def test_any_image_size(height, width):
    x = images(2, height, width, 3)
    params = {"params": randomised(shapes(small()))}
    features = jax.jit(SwinV2(small()).apply)(params, x)
    h, w = -(-height // 4), -(-width // 4)
    for i, stage in enumerate(features.maps):
        assert stage.shape == (2, -(-h // 2**i), -(-w // 2**i), 16 * 2**i)
    chex.assert_tree_all_finite(features)
    chex.assert_type(features.pooled, jnp.float32)


def test_half_precision_keeps_pooled_features_and_is_close():
    params, x = {"params": randomised(shapes(small()))}, images(2, 32, 32, 3)
    exact = SwinV2(small()).apply(params, x)
    for dtype in (jnp.bfloat16, jnp.float16):
        features = jax.jit(SwinV2(small(), dtype).apply)(params, x)
        assert [m.dtype for m in features.maps] == [dtype] * 4
        chex.assert_type(features.pooled, jnp.float32)
        error = np.linalg.norm(features.pooled - exact.pooled) / np.linalg.norm(exact.pooled)
        assert error < 8 * float(jnp.finfo(dtype).eps)
