"""Statistics of layers on two virtual devices, in two micro-batches: numbers, order, and the first bad value."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_run import BATCH, batches, small_config

from visionfm_jax.data.augment import augment
from visionfm_jax.models.backbones.vit import SIZES
from visionfm_jax.models.layers import Block
from visionfm_jax.optim.loss_scale import LossScale
from visionfm_jax.parallel.context import Context
from visionfm_jax.parallel.mesh import make_mesh, to_global
from visionfm_jax.tasks.classification import Draws
from visionfm_jax.tasks.task import split_keys
from visionfm_jax.train.layer_statistics import INPUT, OUTPUT, Layer, LayerStatistics
from visionfm_jax.train.step import Trainer, sample_keys, with_keys

pytestmark = pytest.mark.usefixtures("quick_compiles")

STEP, SCALE, DEPTH = 3, 8.0, SIZES["P"].depth


@pytest.fixture(scope="module")
def measured() -> Callable[..., list[Layer]]:
    """(factors of the images, loss scale, parameters) -> layers, and the trainer and its parameters as attributes."""
    config = small_config(accumulate=2)
    config.model.remat = "full:2"  # two loops over the blocks
    trainer = Trainer(config, make_mesh(1, jax.devices()[:2]))
    plain, logits = trainer.task.loss, trainer.task._logits

    def loss(params: dict, rows: dict, keys: jax.Array, context: Context) -> tuple[jax.Array, dict, dict]:
        factor = rows["factor"][:, None, None, None]
        trainer.task._logits = lambda params, images, *keys: logits(params, images * factor, *keys)
        return plain(params, {k: v for k, v in rows.items() if k != "factor"}, keys, context)

    trainer.task.loss = loss
    statistics, state = LayerStatistics(trainer), trainer.init()
    random = np.random.default_rng(1)
    params = jax.tree.map(
        lambda p: p + 0.02 * random.standard_normal(p.shape, np.float32), jax.device_get(state.params)
    )

    def run(factor: dict[int, float], scale: float = SCALE, params: dict = params) -> list[Layer]:
        factors = np.ones(BATCH, np.float32)
        factors[list(factor)] = list(factor.values())
        scaled = LossScale(jnp.float32(scale), jnp.int32(0), jnp.int32(0))
        own = state.replace(params=jax.device_put(params, trainer.shardings.params), loss_scale=scaled)
        return statistics(own, to_global(trainer.mesh, {**batches(1)[0], "factor": factors}), STEP)

    run.trainer, run.params = trainer, params
    return run


def named(layers: list[Layer]) -> dict[str, Layer]:
    return {str(layer): layer for layer in layers}


def test_the_numbers_are_those_of_the_layers_computed_one_by_one(measured):
    config, params, batch = measured.trainer.config, measured.params, batches(1)[0]
    keys = with_keys(config, measured.trainer.mesh, jnp.int32(STEP), {})["key"]
    images = augment(jnp.asarray(batch["image"]), split_keys(Draws, keys).augment, config.data.augment)
    size = SIZES["P"]
    block = Block(size.heads, size.mlp, jnp.float32, "xla", config.model.norm_eps)

    def whole(added: list[jax.Array]) -> tuple[jax.Array, list[jax.Array]]:
        """The mean loss, with something added to each block's output and to the logits; and these."""
        out = []
        patches = images.reshape(BATCH, 2, 8, 2, 8, 3).transpose(0, 1, 3, 2, 4, 5).reshape(BATCH, 4, -1)
        x = patches @ params["embed"]["kernel"] + params["embed"]["bias"] + params["pos_embed"]
        for layer in range(DEPTH):
            x = block.apply({"params": jax.tree.map(lambda p, i=layer: p[i], params["blocks"])}, x) + added[layer]
            out.append(x)
        x = x.mean(1)
        x = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-6)
        x = x * params["norm"]["scale"] + params["norm"]["bias"]
        out.append(x @ params["head"]["kernel"] + params["head"]["bias"] + added[-1])
        targets = 0.9 * jax.nn.one_hot(batch["label"], 10) + 0.01
        return -(jax.nn.log_softmax(out[-1]) * targets).sum(-1).mean(), out

    zeros = [jnp.zeros((BATCH, 4, size.width))] * DEPTH + [jnp.zeros((BATCH, 10))]
    gradients, values = jax.jit(jax.grad(whole, has_aux=True))(zeros)
    layers = named(measured({}))
    names = [f"{OUTPUT} blocks[{i}]" for i in range(DEPTH)] + [f"{OUTPUT} the network"]
    for name, value, gradient in zip(names, values, gradients, strict=True):
        for got, x in ((layers[name].forward, value), (layers[name].backward, SCALE * gradient)):
            assert got.rms == pytest.approx(float(jnp.sqrt((x**2).mean())), rel=1e-4)
            assert got.largest == pytest.approx(float(jnp.abs(x).max()), rel=1e-4)
            assert got.bad == 0
            assert got.rows == ()
    got = layers[f"{INPUT} the network"].forward
    assert got.largest == pytest.approx(float(jnp.abs(images).max()), rel=1e-6)


def test_layers_come_in_the_order_in_which_they_run(measured):
    names = [str(layer) for layer in measured({})]
    assert len(names) == len(set(names))
    assert names[:3] == [f"{INPUT} the network", f"{INPUT} embed", f"{OUTPUT} embed"]
    assert names[-1] == f"{OUTPUT} the network"
    inside = ["ln1", "attn.qkv", "attn.out", "attn", "ln2", "mlp.fc1", "mlp.fc2", "mlp"]
    blocks = [name for name in names if name.startswith(f"{OUTPUT} blocks")]
    assert blocks == [f"{OUTPUT} blocks[{i}]{part}" for i in range(DEPTH) for part in [*(f".{p}" for p in inside), ""]]


def test_the_first_bad_value_is_found_with_its_row(measured):
    # Rows are two devices' (16 each), of two micro-batches (8 each).
    layers = measured({5: np.inf, 25: np.nan, 30: np.inf})
    assert layers[0].forward.bad > 0
    assert layers[0].forward.rows == (5, 25)  # the first of each micro-batch
    # So large that the next product overflows.
    layers = measured({18: 1.25e38})
    first = next(layer for layer in layers if layer.forward.bad)
    assert str(first) == f"{OUTPUT} embed"
    assert next(layer for layer in layers if layer.forward.rows).forward.rows == (18,)
    assert not any(set(layer.forward.rows) - {18} for layer in layers)
    # Nearly all of the sum of squares is that one row's; its largest number is about twice its RMS.
    at = named(layers)[f"{INPUT} the network"].forward
    assert at.rms == pytest.approx(at.largest / 2 / BATCH**0.5, rel=0.5)


def test_a_bad_weight_is_found_in_its_layer(measured):
    params = jax.tree.map(np.copy, measured.params)
    params["blocks"]["mlp"]["fc1"]["bias"][4, 7] = np.inf
    layers = measured({}, params=params)
    assert str(next(layer for layer in layers if layer.forward.bad)) == f"{OUTPUT} blocks[4].mlp.fc1"


def test_gradients_that_overflow_are_found_where_the_backward_pass_first_does(measured):
    params = jax.tree.map(np.copy, measured.params)
    params["head"]["kernel"] *= 1e4
    layers = measured({}, scale=3e38, params=params)
    assert not any(layer.forward.bad for layer in layers)
    bad = [str(layer) for layer in layers if layer.backward.bad]
    assert bad[-1] == f"{INPUT} head"  # whose output's gradient is finite
    assert f"{INPUT} blocks[0]" in bad


def test_keys_are_those_of_the_step(measured):
    config, mesh = measured.trainer.config, measured.trainer.mesh
    seed = jax.random.fold_in(jax.random.key(config.seed), 1)
    expected = sample_keys(seed, jnp.int32(STEP), BATCH)
    assert jax.random.key_data(with_keys(config, mesh, jnp.int32(STEP), {})["key"]).tolist() == (
        jax.random.key_data(expected).tolist()
    )
