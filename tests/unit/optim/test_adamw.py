import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from visionfm_jax.config import OptimConfig
from visionfm_jax.errors import ConfigError
from visionfm_jax.models.backbones.swin_v2 import SwinV2, SwinV2Config
from visionfm_jax.models.backbones.vit import ViT, ViTConfig
from visionfm_jax.models.heads import Classifier
from visionfm_jax.models.pooling import AttentionPool
from visionfm_jax.optim.adamw import decay_mask, layer_scales, make_optimizer, schedule, update_count

PARAMS = {
    "embed": {"kernel": jnp.ones((4, 6)), "bias": jnp.ones(6)},
    "pos_embed": jnp.ones((3, 6)),
    "blocks": {"ln1": {"scale": jnp.ones((2, 6))}, "fc": {"kernel": jnp.ones((2, 6, 5)), "bias": jnp.ones((2, 5))}},
    "norm": {"scale": jnp.ones(6)},
    "head": {"kernel": jnp.ones((6, 3)), "bias": jnp.ones(3)},
}


def test_schedule_is_linear_then_cosine_to_the_floor():
    lr = schedule(OptimConfig(lr=1.0, final_lr=0.1, warmup_steps=10), 110)
    np.testing.assert_allclose(lr(0), 0.0)
    np.testing.assert_allclose(lr(5), 0.5)
    np.testing.assert_allclose(lr(10), 1.0)
    np.testing.assert_allclose(lr(60), 0.1 + 0.9 / 2, rtol=1e-6)
    np.testing.assert_allclose(lr(110), 0.1, rtol=1e-6)
    np.testing.assert_allclose(schedule(OptimConfig(lr=1.0, warmup_steps=0), 10)(0), 1.0)


def test_decay_acts_on_matrices_alone():
    assert decay_mask(PARAMS) == {
        "embed": {"kernel": True, "bias": False},
        "pos_embed": False,
        "blocks": {"ln1": {"scale": False}, "fc": {"kernel": True, "bias": False}},
        "norm": {"scale": False},
        "head": {"kernel": True, "bias": False},
    }


def test_position_bias_and_probe_are_not_decayed():
    """As in the lists of SwinV2's authors and of big_vision, with the names and shapes of our modules."""
    swin = SwinV2(SwinV2Config(size="P", image_size=64, patch_size=8), jnp.float32)
    pool = AttentionPool(1, 32, jnp.float32, 1e-5)
    init = jax.eval_shape(swin.init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))["params"]
    stage = decay_mask(init)["stage0"]["blocks"]["attn"]
    assert not any(jax.tree.leaves(stage["bias"]))
    assert len(jax.tree.leaves(stage["bias"])) == 3
    assert stage["qkv"] == stage["out"] == {"kernel": True, "bias": False}
    init = jax.eval_shape(pool.init, jax.random.key(0), jnp.zeros((1, 4, 8)))["params"]
    assert decay_mask(init)["probe"] is False
    assert decay_mask(init)["mlp"]["fc1"]["kernel"] is True


def test_a_vit_of_every_part_decays_its_matrices_alone_and_scales_by_depth():
    config = ViTConfig(
        size="P", width=16, depth=2, heads=2, mlp=24, image_size=28, pool="map", class_token=True, registers=3,
        pos_embed="all", qk_norm=True, pre_norm=True, layer_scale=0.1,
    )  # fmt: skip
    gated = dataclasses.replace(config, pool="cls", activation="swiglu")
    for form in (config, gated):
        params = jax.eval_shape(Classifier(ViT(form), 5).init, jax.random.key(0), jnp.zeros((1, 28, 28, 3)))["params"]
        flat = jax.tree_util.tree_leaves_with_path(decay_mask(params))
        decayed = {"/".join(key.key for key in path) for path, decays in flat if decays}
        assert {name.rpartition("/")[2] for name in decayed} == {"kernel"}
        assert len(decayed) == sum(path[-1].key == "kernel" for path, _ in flat)
        scales = layer_scales(params, 0.5)
        low, high = (jax.tree.leaves(scales[k]) for k in ("embed", "pool" if form.pool == "map" else "norm"))
        assert set(map(float, high)) == {1.0}
        assert set(map(float, [*low, scales["registers"], scales["cls_token"], scales["pos_embed"]])) == {0.125}
        assert set(map(float, jax.tree.leaves(scales["norm_pre"]))) == {0.125}
        np.testing.assert_allclose(scales["blocks"]["ls1"].ravel(), [0.25, 0.5])


def test_layer_decay_of_a_model_without_scanned_layers_is_refused():
    with pytest.raises(ConfigError, match=r"optim\.layer_decay = 0\.5: needs layers that are scanned.*; set it to 1"):
        layer_scales({"mix_0": {"kernel": jnp.ones((3, 3))}, "head": {"kernel": jnp.ones((3, 2))}}, 0.5)


def test_layer_scales_fall_towards_the_embedding():
    scales = layer_scales(PARAMS, 0.5)
    assert scales["head"]["kernel"] == scales["norm"]["scale"] == 1
    np.testing.assert_allclose(scales["blocks"]["fc"]["kernel"].ravel(), [0.25, 0.5])
    assert scales["blocks"]["fc"]["kernel"].shape == (2, 1, 1)
    assert scales["embed"]["bias"] == scales["pos_embed"] == 0.125


def test_layers_of_a_head_are_above_those_of_the_network():
    head = {"decoder": {"blocks": {"kernel": jnp.ones((5, 6, 6))}}, "queries": jnp.ones((4, 6))}
    scales = layer_scales(PARAMS | {"head": head}, 0.5)
    assert set(map(float, jax.tree.leaves(scales["head"]))) == {1}
    chex.assert_trees_all_equal(scales["blocks"], layer_scales(PARAMS, 0.5)["blocks"])


def test_layers_of_stages_are_numbered_through_and_every_network_by_itself():
    image = SwinV2Config(size="P", image_size=64, patch_size=8)  # 1, 1, 4 and 1 layers
    own = jax.eval_shape(SwinV2(image).init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))["params"]
    both = {"image": own, "text": PARAMS, "image_projection": jnp.ones((6, 3)), "scale": jnp.ones(())}
    scales = layer_scales(both, 0.5)
    assert scales["image_projection"] == scales["scale"] == 1
    assert scales["text"]["embed"]["bias"] == 0.125
    image = scales["image"]
    assert jax.tree.map(float, image["norm"]) == {"bias": 1, "scale": 1}
    for name in ("embed", "embed_norm"):
        assert set(map(float, jax.tree.leaves(image[name]))) == {0.5**8}
    for stage, layers in enumerate(([7], [6], [5, 4, 3, 2], [1])):
        blocks = image[f"stage{stage}"]["blocks"]
        groups = [blocks[str(i)] for i in range(len(layers)) if str(i) in blocks] or [blocks]
        for i, group in enumerate(groups):
            for leaf in jax.tree.leaves(group):
                np.testing.assert_allclose(leaf.ravel(), [0.5**n for n in layers[i :: len(groups)]])
        if stage:
            assert set(map(float, jax.tree.leaves(image[f"merging{stage - 1}"]))) == {0.5 ** layers[0]}
    jax.tree.map(lambda scale, leaf: jnp.broadcast_to(scale, leaf.shape), scales, both)


def test_first_update_by_hand():
    config = OptimConfig(lr=0.1, warmup_steps=0, b1=0.9, b2=0.99, eps=0.0, weight_decay=0.5, clip_norm=0.0)
    tx = make_optimizer(config, 1000)
    state = tx.init(PARAMS)
    grads = jax.tree.map(lambda p: jnp.full_like(p, 3.0), PARAMS)
    updates, state = tx.update(grads, state, PARAMS)
    # Adam's first step is the sign of the gradient; decay adds 0.5 x weight on matrices.
    np.testing.assert_allclose(updates["head"]["kernel"], -0.1 * (1 + 0.5), rtol=1e-5)
    np.testing.assert_allclose(updates["head"]["bias"], -0.1, rtol=1e-5)
    assert update_count(state) == 1


@pytest.mark.parametrize("layer_decay", [1.0, 0.7])
def test_updates_are_those_of_the_formula_in_its_order(layer_decay):
    """Clip, Adam, decay, factors by depth, learning rate: to the bit but for the factors, which act last."""
    config = OptimConfig(lr=0.1, warmup_steps=2, weight_decay=0.5, clip_norm=1.0, layer_decay=layer_decay)
    factors = layer_scales(PARAMS, layer_decay)
    expected = optax.chain(
        optax.clip_by_global_norm(1.0), optax.scale_by_adam(config.b1, config.b2, config.eps),
        optax.add_decayed_weights(0.5, decay_mask),
        optax.stateless(lambda updates, _: jax.tree.map(jnp.multiply, updates, factors)),
        optax.scale_by_learning_rate(schedule(config, 10)),
    )  # fmt: skip
    ours, rng = make_optimizer(config, 10), np.random.default_rng(0)
    state, other = ours.init(PARAMS), expected.init(PARAMS)
    for _ in range(4):
        grads = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), jnp.float32), PARAMS)
        updates, state = ours.update(grads, state, PARAMS)
        same, other = expected.update(grads, other, PARAMS)
        for a, b in zip(jax.tree.leaves(updates), jax.tree.leaves(same), strict=True):
            np.testing.assert_allclose(a, b, rtol=0 if layer_decay == 1 else 2e-7, atol=0)
    assert update_count(state) == 4


@pytest.mark.parametrize("norm", [1.0, 1e6])
def test_clipping_is_by_global_norm(norm):
    tx = make_optimizer(
        OptimConfig(lr=1.0, warmup_steps=0, clip_norm=norm, weight_decay=0.0, b1=0.0, b2=0.0, eps=1.0), 10
    )
    grads = jax.tree.map(lambda p: jnp.full_like(p, 2.0), PARAMS)
    scale = min(1.0, norm / float(optax.tree.norm(grads)))
    updates, _ = tx.update(grads, tx.init(PARAMS), PARAMS)
    np.testing.assert_allclose(updates["norm"]["scale"], -2 * scale / (2 * scale + 1), rtol=1e-5)
