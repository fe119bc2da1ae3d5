"""Attention in windows: against loops over windows, and what it leaves as it is."""

from __future__ import annotations

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from visionfm_jax.models.attention import attention, windowed_attention
from visionfm_jax.models.backbones.vit import ViT, ViTConfig, windows_of
from visionfm_jax.models.layers import Block
from visionfm_jax.models.positions import rotation

pytestmark = pytest.mark.usefixtures("quick_compiles")

GRID, SIDES = (5, 7), (20, 28)  # patches, of 4 pixels


def config_of(**fields) -> ViTConfig:
    """Four blocks, of which two attend globally, on a map that windows of 3 x 3 do not divide."""
    small = {"size": "P", "width": 32, "depth": 4, "heads": 2, "mlp": 48, "patch_size": 4, "image_size": SIDES}
    return ViTConfig(**{**small, "window": 3, "global_blocks": 2, **fields})


EVERYTHING = {"pool": "cls_gap", "registers": 3, "pos_embed": "all", "rope_theta": 100.0, "qk_norm": True,
              "pre_norm": True, "layer_scale": 0.1, "drop_path": 0.5}  # fmt: skip


def random_params(config: ViTConfig, seed: int = 0):
    shapes = jax.eval_shape(ViT(config).init, jax.random.key(0), jnp.zeros((1, *SIDES, 3)))
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda s: jnp.asarray(0.3 * rng.normal(size=s.shape), jnp.float32), shapes)


def images(count: int = 2, sides=SIDES) -> jax.Array:
    return jnp.asarray(np.random.default_rng(1).normal(size=(count, *sides, 3)), jnp.float32)


def by_padding(q, k, v, grid, window, first):
    """As ViTDet: zeros below and to the right up to whole windows, each by itself; no weight for zeros."""
    T, (h, w) = q.shape[1], grid
    out = np.zeros(q.shape, np.float32)
    inside = [np.zeros((len(q), -(-h // window) * window, -(-w // window) * window, *q.shape[2:])) for _ in range(3)]
    for a, x in zip(inside, (q, k, v), strict=True):
        a[:, :h, :w] = np.asarray(x)[:, first:].reshape(len(q), h, w, *q.shape[2:])
    real = np.zeros(inside[0].shape[1:3], bool)
    real[:h, :w] = True
    place = np.full(real.shape, T)
    place[:h, :w] = first + np.arange(h * w).reshape(h, w)

    def softmax_sum(q, k, v, seen):
        logits = np.einsum("btnk,bsnk->bnts", q, k) / np.sqrt(q.shape[-1])
        weights = np.where(seen, np.exp(logits - logits.max(-1, keepdims=True)), 0)
        return np.einsum("bnts,bsnk->btnk", weights / weights.sum(-1, keepdims=True), v)

    own = [np.asarray(x)[:, :first] for x in (q, k, v)]
    for top in range(0, real.shape[0], window):
        for left in range(0, real.shape[1], window):
            cut = np.s_[top : top + window, left : left + window]
            mine = [a[:, *cut].reshape(len(q), window**2, *q.shape[2:]) for a in inside]
            keys, values = (np.concatenate([o, m], 1) for o, m in zip(own[1:], mine[1:], strict=True))
            seen = np.concatenate([np.ones(first, bool), real[cut].ravel()])
            y, at = softmax_sum(mine[0], keys, values, seen), place[cut].ravel()
            out[:, at[at < T]] = y[:, at < T]
    out[:, :first] = softmax_sum(own[0], np.asarray(k), np.asarray(v), True)
    return out


@pytest.mark.parametrize(
    ("grid", "window", "first"), [((5, 7), 3, 0), ((5, 7), 3, 4), ((6, 4), 2, 1), ((2, 9), 4, 0), ((3, 3), 5, 2)]
)
def test_it_is_attention_inside_padded_windows_whose_padding_is_not_seen(grid, window, first):
    rng = np.random.default_rng(0)
    T = first + grid[0] * grid[1]
    q, k, v = (jnp.asarray(rng.normal(size=(2, T, 3, 8)), jnp.float32) for _ in range(3))
    got = windowed_attention(q, k, v, "xla", grid=grid, window=window)
    np.testing.assert_allclose(got, by_padding(q, k, v, grid, window, first), rtol=1e-5, atol=2e-6)


def seen(grid, window, first) -> np.ndarray:
    """(T, T): who attends to whom."""
    at = np.stack(np.meshgrid(*map(np.arange, grid), indexing="ij"), -1).reshape(-1, 2) // window
    out = np.ones((first + len(at),) * 2, bool)
    out[first:, first:] = (at[:, None] == at[None]).all(-1)
    return out


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_gradients_are_those_of_masked_attention(dtype):
    rng, first = np.random.default_rng(0), 2
    q, k, v, to = (jnp.asarray(rng.normal(size=(2, first + 35, 2, 8)), dtype) for _ in range(4))
    bias = jnp.where(seen(GRID, 3, first), 0.0, -1e30)[None, None]

    def product(attend):
        return lambda *qkv: (attend(*qkv) * to).astype(jnp.float32).sum()

    ours = jax.grad(product(lambda *a: windowed_attention(*a, "xla", grid=GRID, window=3)), (0, 1, 2))(q, k, v)
    masked = jax.grad(product(lambda *a: attention(*a, "xla", bias=bias)), (0, 1, 2))(q, k, v)
    tolerance = {jnp.float32: 1e-5, jnp.bfloat16: 5e-2, jnp.float16: 5e-3}[dtype]
    for a, b in zip(ours, masked, strict=True):
        assert a.dtype == dtype
        assert np.linalg.norm(np.float32(a - b)) <= tolerance * np.linalg.norm(np.float32(b))


@pytest.mark.parametrize("fields", [{}, EVERYTHING], ids=["plain", "everything"])
def test_global_blocks_end_groups_of_equal_length_and_blocks_keep_their_places(fields):
    """Against the blocks one by one, with the weights and the chance to be left out of their own place."""
    config = config_of(depth=6, window=2, **fields)
    assert windows_of(config, GRID) == [2, 2, 0]
    params = random_params(config)
    keys = jax.random.split(jax.random.key(2), 4) if config.drop_path else None
    x = images(4)
    model, blocks = ViT(config), params["params"]["blocks"]

    def one_by_one(self, x, grid, keys, part):
        assert part == slice(None)
        turn = rotation(grid, 4, 16, 100.0) if config.rope_theta else None
        for i, window in enumerate([2, 2, 0, 2, 2, 0]):
            block = Block(
                2, 48, jnp.float32, "xla", 1e-6, qk_norm=1e-6 if config.qk_norm else 0.0, rotation=turn,
                layer_scale=config.layer_scale, keys=keys, window=window, grid=grid, parent=None,
            )  # fmt: skip
            own = () if keys is None else ({"layer": jnp.int32(i), "rate": config.drop_path * i / 5},)
            x = block.apply({"params": jax.tree.map(lambda a, i=i: a[i], blocks)}, x, *own)
        return x

    got = jax.jit(lambda p, x: model.apply(p, x, keys).pooled)(params, x)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ViT, "encode", one_by_one)
        expected = jax.jit(lambda p, x: model.apply(p, x, keys).pooled)(params, x)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
    everywhere = ViT(dataclasses.replace(config, window=0))
    other = everywhere.apply(params, x, keys).pooled
    assert np.linalg.norm(other - got) > 1e-2 * np.linalg.norm(got)


def test_windows_change_neither_parameters_nor_their_initial_values():
    with_windows, without = (
        jax.jit(lambda key, c=c: ViT(c).init(key, jnp.zeros((1, *SIDES, 3))))(jax.random.key(3))
        for c in (config_of(), config_of(window=0))
    )
    chex.assert_trees_all_equal(with_windows, without)


def test_a_window_that_holds_the_map_is_global_attention_whatever_the_image():
    params, config = random_params(config_of()), config_of(window=7)
    everywhere = ViT(config_of(window=0))
    np.testing.assert_array_equal(ViT(config).apply(params, images()).pooled, everywhere.apply(params, images()).pooled)
    larger = images(sides=(32, 40))  # 8 x 10 patches, and the table interpolated
    got, other = (model.apply(params, larger).pooled for model in (ViT(config), everywhere))
    assert np.linalg.norm(got - other) > 1e-3 * np.linalg.norm(other)


def test_rematerialisation_changes_no_gradients():
    gradients = {}
    for remat in ("none", "attention", "dots", "full"):
        config = config_of(remat=remat, **EVERYTHING | {"drop_path": 0.0})
        params, model = random_params(config), ViT(config)
        gradients[remat] = jax.jit(jax.grad(lambda p, model=model: (model.apply(p, images()).pooled ** 2).sum()))(
            params
        )
    for other in ("attention", "dots", "full"):
        chex.assert_trees_all_close(gradients[other], gradients["none"], rtol=1e-4, atol=1e-4)
    assert all(bool(jnp.any(g != 0)) for g in jax.tree.leaves(gradients["none"]["params"]["blocks"]))


def test_flops_by_hand():
    # Patches 5 x 7 in windows of 3 and 2 rows, 3, 3 and 1 columns: (9 + 4) x (9 + 9 + 1) pairs. Two of four blocks.
    layers = 4 * 35 * (4 * 32**2 + 2 * 32 * 48) + 2 * 32 * (2 * 35**2 + 2 * 13 * 19)
    assert config_of().flops == 2 * (35 * 48 * 32 + layers)
    # With a class token and registers, 4 tokens that see all and are seen by all.
    config = config_of(pool="cls", registers=3)
    pairs = 2 * 39**2 + 2 * (13 * 19 + 2 * 4 * 35 + 4**2)
    assert config.flops == 2 * (35 * 48 * 32 + 4 * 39 * (4 * 32**2 + 2 * 32 * 48) + 2 * 32 * pairs)
    assert config_of(window=7).flops == config_of(window=0).flops
    huge = ViTConfig(size="H", patch_size=16, image_size=1024, window=14)
    assert windows_of(huge, (64, 64)) == [14] * 7 + [0]  # blocks 8, 16, 24 and 32 attend globally
    assert huge.flops < 0.72 * dataclasses.replace(huge, window=0).flops


def test_global_blocks_must_divide_the_blocks():
    ((field, value, rule, remedy),) = config_of(depth=6, global_blocks=4).problems("model")
    assert (field, value, remedy) == ("model.global_blocks", 4, "set it to 3")
    assert rule == "must divide the 6 blocks, as model.window = 3"
    assert not config_of(depth=6, global_blocks=4, window=0).problems("model")
