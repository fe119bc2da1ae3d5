"""One stack of blocks in all its forms: loop or not, and whatever is recomputed, the same values and gradients."""

import re

import chex
import jax
import jax.numpy as jnp
import pytest

from visionfm_jax.config.limits import REMAT
from visionfm_jax.models.backbones.swin_v2 import SwinV2Config
from visionfm_jax.models.backbones.vit import ViTConfig
from visionfm_jax.models.layers import POLICIES, no_gather

VIT = {"width": 24, "depth": 3, "heads": 2, "mlp": 40, "patch_size": 4, "image_size": 12}  # odd: 9 tokens, 3 blocks
SWIN = {
    "size": "P", "width": 8, "depths": (1, 1, 4, 1), "heads": (1, 1, 2, 2), "patch_size": 2, "image_size": 32,
    "window": 4,
}  # fmt: skip


def gradients(config, images):
    """Gradients of a random function of the features, whose parameters are all random."""
    module = config.make(jnp.float32, no_gather)
    shapes = jax.eval_shape(module.init, jax.random.key(0), images)
    leaves, tree = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    params = jax.tree.unflatten(tree, [0.2 * jax.random.normal(k, s.shape) for k, s in zip(keys, leaves, strict=True)])
    weights = jax.random.normal(jax.random.key(2), (config.features,))
    return jax.jit(jax.value_and_grad(lambda p: (module.apply(p, images).pooled @ weights).sum()))(params)


@pytest.mark.usefixtures("quick_compiles")
def test_every_form_has_the_same_gradients():
    images = jax.random.normal(jax.random.key(3), (2, 12, 12, 3))
    expected = gradients(ViTConfig(**VIT, remat="none"), images)
    for form in ({"remat": "branches:1"}, {"remat": "full:2"}, {"remat": "full:2", "scan_layers": False}):
        chex.assert_trees_all_close(gradients(ViTConfig(**VIT, **form), images), expected, rtol=2e-5, atol=1e-5)


@pytest.mark.usefixtures("quick_compiles")
def test_stages_have_the_same_gradients_without_a_loop_and_recomputed_in_part():
    images = jax.random.normal(jax.random.key(3), (2, 32, 32, 3))
    expected = gradients(SwinV2Config(**SWIN), images)
    form = {"remat": "full:4", "scan_layers": False}  # the first two stages, and half of the third
    chex.assert_trees_all_close(gradients(SwinV2Config(**SWIN, **form), images), expected, rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize(("remat", "loops"), [("full", [3]), ("full:2", [2, 1]), ("full:3", [3]), ("full:9", [3])])
def test_so_many_blocks_are_loops_of_their_own(remat, loops):
    config = ViTConfig(**VIT, remat=remat)
    module, images = config.make(jnp.bfloat16, no_gather), jnp.zeros((2, 12, 12, 3))
    shapes = jax.eval_shape(module.init, jax.random.key(0), images)
    text = str(jax.make_jaxpr(module.apply)(shapes, images))
    assert [int(n) for n in re.findall(r"\blength=(\d+)", text)] == loops


@pytest.mark.usefixtures("quick_compiles")
def test_no_block_at_all_is_the_identity():
    """As before the first of the blocks that queries join, where they join all."""
    module = ViTConfig(**VIT, remat="none").make(jnp.float32, no_gather)
    x, images = jax.random.normal(jax.random.key(0), (2, 9, 24)), jnp.zeros((2, 12, 12, 3))
    params = module.init(jax.random.key(1), images)
    y = module.apply(params, x, (3, 3), None, slice(0), method="encode")
    chex.assert_trees_all_equal(y, x)


def memory(remat):
    config = ViTConfig(width=64, depth=6, heads=4, mlp=256, patch_size=4, image_size=32, remat=remat)
    module, images = config.make(jnp.bfloat16, no_gather), jnp.zeros((16, 32, 32, 3))
    shapes = jax.eval_shape(module.init, jax.random.key(0), images)
    step = jax.jit(jax.grad(lambda p: module.apply(p, images).pooled.sum()))
    return step.lower(shapes).compile().memory_analysis().temp_size_in_bytes


def test_recomputing_more_needs_less_memory():
    sizes = [memory(remat) for remat in (*POLICIES, "full:3")]
    none, attention, dots, *rest = sizes  # of which XLA makes one or the other smaller on CPUs, by its version
    assert none > attention > dots > max(rest)


def test_policies_are_those_that_configurations_name():
    assert REMAT.names == tuple(POLICIES)
    assert all(REMAT.problem(name) is None for name in (*POLICIES, "full:18", "dots:1"))


@pytest.mark.parametrize(
    ("value", "rule", "remedy"),
    [
        ("dot", "one of", "set it to dots"),
        ("none:3", "without a number of blocks", "set it to none"),
        ("full:", "number of blocks", "set it to full:18, or to full for all blocks"),
        ("dots:x", "number of blocks", "set it to dots:18, or to dots for all blocks"),
        ("full:0", "number", "full:18"),
        ("ful:3", "one of", "set it to full"),
    ],
)
def test_other_words_are_refused(value, rule, remedy):
    said = REMAT.problem(value)
    assert rule in said[0]
    assert remedy in said[1]
