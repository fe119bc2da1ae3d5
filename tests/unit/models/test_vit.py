from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from visionfm_jax.config import load
from visionfm_jax.errors import ConfigError
from visionfm_jax.models.attention import attention
from visionfm_jax.models.backbones.vit import SIZES, ViT, ViTConfig
from visionfm_jax.models.heads import Classifier
from visionfm_jax.models.layers import no_gather
from visionfm_jax.parallel.mesh import make_mesh
from visionfm_jax.train.step import Trainer

pytestmark = pytest.mark.usefixtures("quick_compiles")

CONFIG = Path(__file__).parents[3] / "configs" / "vit_huge.py"


def small(**kwargs) -> ViTConfig:
    return ViTConfig(size="P", image_size=28, patch_size=14, **kwargs)


def classifier(config: ViTConfig, classes: int = 10, dtype=jnp.float32) -> Classifier:
    return Classifier(config.make(dtype, no_gather), classes, dtype)


def flops(config: ViTConfig, classes: int) -> float:
    return config.flops + 2 * config.features * classes


def init(model, size: int = 28):
    return model.init(jax.random.key(0), jnp.zeros((1, size, size, 3)))


def shapes(config: ViTConfig, classes: int):
    size = config.image_size
    return jax.eval_shape(lambda: classifier(config, classes).init(jax.random.key(0), jnp.zeros((1, size, size, 3))))


def count(tree) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


# Totals of the published models (timm, torchvision), with 1,000 classes and a class token.
@pytest.mark.parametrize(
    ("size", "patch", "total"),
    [
        ("Ti", 16, 5_717_416),
        ("S", 16, 22_050_664),
        ("B", 16, 86_567_656),
        ("L", 16, 304_326_632),
        ("H", 14, 632_045_800),
    ],
)
def test_published_parameter_counts(size, patch, total):
    assert count(shapes(ViTConfig(size=size, patch_size=patch, pool="cls"), 1000)) == total


def test_every_size_has_whole_heads():
    for size in SIZES.values():
        assert size.width % size.heads == 0


def test_unknown_size_lists_the_table():
    with pytest.raises(ConfigError, match="P, Ti, S, B, L, H, g"):
        shapes(ViTConfig(size="XXL"), 10)


@pytest.mark.parametrize("pool", ["gap", "cls"])
def test_logits_are_fp32_and_zero_at_initialisation(pool):
    model = classifier(small(pool=pool), dtype=jnp.bfloat16)
    logits = model.apply(init(model), jax.random.normal(jax.random.key(1), (2, 28, 28, 3)))
    chex.assert_shape(logits, (2, 10))
    chex.assert_type(logits, jnp.float32)
    np.testing.assert_array_equal(logits, 0)


def test_rematerialisation_changes_memory_not_gradients():
    images = jax.random.normal(jax.random.key(1), (4, 28, 28, 3))
    params = init(classifier(small()))
    params = jax.tree.map(lambda p: p + 0.05 * jax.random.normal(jax.random.key(p.size), p.shape), params)
    gradients, residuals = {}, {}
    for remat in ("none", "attention", "dots", "full"):
        model = classifier(small(remat=remat))

        def loss(params, images, model=model):
            return jnp.sum(model.apply(params, images) ** 2)

        gradients[remat] = jax.jit(jax.grad(loss))(params, images)
        saved = jax.eval_shape(lambda p, loss=loss: jax.vjp(lambda q: loss(q, images), p)[1], params)
        residuals[remat] = sum(np.prod(r.shape) for r in jax.tree.leaves(saved))
    for other in ("attention", "dots", "full"):
        chex.assert_trees_all_close(gradients[other], gradients["none"], rtol=2e-5, atol=1e-5)
    assert residuals["full"] < residuals["dots"] < residuals["attention"] < residuals["none"]


def test_attention_is_softmax_of_scaled_products():
    q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 5, 3, 8))
    logits = np.einsum("btnk,bsnk->bnts", q, k) / np.sqrt(8)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    expected = np.einsum("bnts,bsnk->btnk", weights / weights.sum(-1, keepdims=True), v)
    chex.assert_trees_all_close(attention(q, k, v, "xla"), expected, rtol=1e-5, atol=1e-6)


def test_forward_flops_by_hand():
    # 2 x (patches·588·96 + 6 layers·(T·(4·96² + 2·96·384) + 2·T²·96) + 96·10), T = 4
    expected = 2 * (4 * 588 * 96 + 6 * (4 * (4 * 96**2 + 2 * 96 * 384) + 2 * 16 * 96) + 96 * 10)
    assert flops(small(), 10) == expected
    full = ViTConfig(size="H", patch_size=14, pool="cls")
    assert 3 * flops(full, 21_841) / 1e12 == pytest.approx(1.004, rel=1e-3)


def test_forward_flops_of_the_dialects_by_hand():
    # 4 patches; T = 4 + 1 + 4 with a class token and registers; a gate is a third matrix.
    config = small(pool="cls", registers=4, activation="swiglu", width=64, depth=2, heads=2, mlp=96)
    expected = 2 * (4 * 588 * 64 + 2 * (9 * (4 * 64**2 + 3 * 64 * 96) + 2 * 81 * 64) + 64 * 10)
    assert flops(config, 10) == expected
    # Attention pooling: keys and values of 4 tokens, one query, its logits and sum, its output and MLP.
    layers = 6 * (4 * (4 * 96**2 + 2 * 96 * 384) + 2 * 16 * 96)
    pool = 4 * (2 * 96**2 + 2 * 96) + 2 * 96**2 + 2 * 96 * 384
    assert flops(small(pool="map"), 10) == 2 * (4 * 588 * 96 + layers + pool + 96 * 10)
    assert flops(small(pool="cls_gap"), 10) - flops(small(pool="cls"), 10) == 2 * 96 * 10


# Totals of the published models without head (timm 1.0.31 and transformers 5.23.0, built on the meta device).
GIANT = {"width": 1536, "depth": 40, "heads": 24, "mlp": 4096, "activation": "swiglu"}
DINOV2 = {"pool": "cls", "patch_size": 14, "image_size": 518, "layer_scale": 1e-5}
DINOV3 = {"pool": "cls", "patch_size": 16, "registers": 4, "pos_embed": "none", "rope_theta": 100.0,
          "layer_scale": 1e-5, "qkv_bias": "no_key"}  # fmt: skip
PUBLISHED = {
    "dinov2_g14": ({**DINOV2, **GIANT}, 1_136_479_232),
    "dinov2_s14_registers": ({**DINOV2, "size": "S", "registers": 4}, 22_057_728),
    "dinov3_s16": ({**DINOV3, "size": "S"}, 21_596_160),
    "dinov3_7b": (
        {**DINOV3, "width": 4096, "depth": 40, "heads": 32, "mlp": 8192, "activation": "swiglu", "qkv_bias": "none"},
        6_716_030_976,
    ),
    "siglip_so400m_14": ({"pool": "map", "width": 1152, "depth": 27, "heads": 16, "mlp": 4304}, 427_680_704),
    "clip_l14": ({"pool": "cls", "size": "L", "pre_norm": True, "patch_bias": False}, 303_179_776),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_dialects_have_their_counts(name):
    fields, total = PUBLISHED[name]
    assert count(shapes(ViTConfig(**{"size": "B", **fields}), 0)) == total


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"heads": 7}, "must be a multiple of 7, for 7 heads"),
        ({"rope_theta": 100.0, "heads": 16}, "must be a multiple of 64, for 16 heads whose channels rotary"),
    ],
)
def test_a_width_that_heads_cannot_share_is_refused(fields, says):
    ((field, value, rule, remedy),) = small(**fields).problems("model.image")
    assert (field, value) == ("model.image.width", 96)
    assert rule.startswith(says)
    assert "or set model.image.heads" in remedy


def test_images_that_patches_do_not_divide_are_refused():
    with pytest.raises(ConfigError, match=r"patch_size = 14: must divide the sides of an image of 28 x 30 pixels"):
        jax.eval_shape(lambda: ViT(small()).init(jax.random.key(0), jnp.zeros((1, 28, 30, 3))))


def everything(**kwargs) -> ViTConfig:
    """All that a block can have."""
    fields = {"pool": "map", "class_token": True, "registers": 3, "pos_embed": "all", "rope_theta": 100.0,
              "qk_norm": True, "pre_norm": True, "layer_scale": 0.1, "drop_path": 0.5, "width": 32, "depth": 3,
              "heads": 2, "mlp": 48}  # fmt: skip
    return small(**{**fields, **kwargs})


def test_stochastic_depth_is_drawn_by_keys_and_spares_the_first_block():
    model = ViT(everything(pool="cls_gap"))
    images = jax.random.normal(jax.random.key(1), (64, 28, 28, 3))
    params = jax.tree.map(lambda p: p + 0.1 * jax.random.normal(jax.random.key(p.size), p.shape), init(model))
    keys, run = jax.random.split(jax.random.key(2), 64), jax.jit(lambda *args: model.apply(*args).pooled)
    kept, dropped = run(params, images), run(params, images, keys)
    np.testing.assert_array_equal(dropped, run(params, images, keys))
    assert (jnp.abs(kept - dropped).max(-1) > 1e-3).all()  # what is not left out is scaled up
    assert (jnp.abs(run(params, images, keys[::-1]) - dropped).max(-1) > 1e-3).mean() > 0.5
    blocks = params["params"]["blocks"]
    for name in ("ls1", "ls2"):  # the last two blocks add nothing: the first's rate is 0
        blocks[name] = blocks[name].at[1:].set(0)
    np.testing.assert_allclose(run(params, images, keys), run(params, images), rtol=2e-5, atol=2e-5)


def test_both_hidden_layers_of_a_gated_mlp_are_saved_by_name():
    saved = {}
    for remat in ("dots", "full"):
        model = ViT(everything(remat=remat, activation="swiglu", pool="gap"))
        params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 28, 28, 3)))

        def pull(p, model=model):
            return jax.vjp(lambda q: model.apply(q, jnp.zeros((4, 28, 28, 3))).pooled.sum(), p)[1]

        saved[remat] = [leaf.shape for leaf in jax.tree.leaves(jax.eval_shape(pull, params))]
    hidden = (3, 4, 8, 48)  # (L, B, T, M)
    assert (saved["dots"].count(hidden), saved["full"].count(hidden)) == (2, 0)


@pytest.mark.full_size
def test_full_size_counts():
    assert count(shapes(ViTConfig(size="H", pool="cls"), 21_841)) == 658_743_121
    assert count(shapes(ViTConfig(size="H", pool="gap"), 21_841)) == 658_740_561


@pytest.mark.full_size
def test_the_compiled_step_does_not_grow_with_depth():
    """The program that XLA gets: 12, 24, 32 and 40 layers are the same loop, in the step of the full configuration."""
    lines = {}
    for size in ("B", "L", "H", "g"):
        flags = [f"--config.model.size={size}", "--config.model.scan_layers=True"]
        config, _ = load.from_arguments([f"--config={CONFIG}", *flags])
        trainer = Trainer(config, make_mesh())
        lowered = trainer.step.lower(trainer.shapes, trainer.task.batch_spec(config.train.batch_size))
        lines[size] = len(lowered.as_text().splitlines())
    assert len(set(lines.values())) == 1, lines
