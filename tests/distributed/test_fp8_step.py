"""Training with MLPs of 8-bit operands: what is compiled for GPUs, and that the loss falls as that of bf16 does."""

from __future__ import annotations

from collections import Counter

import jax
import numpy as np
import pytest
from small_run import batches, small_config

from visionfm_jax.config import Config
from visionfm_jax.models.backbones.vit import size_of
from visionfm_jax.parallel.hlo import Module
from visionfm_jax.parallel.mesh import make_mesh, to_global
from visionfm_jax.parallel.targets import find_cluster
from visionfm_jax.planning.compiled import GPU, compile_step
from visionfm_jax.train.step import Trainer

pytestmark = pytest.mark.usefixtures("quick_compiles", "quick_gpu_compiles")


def config_of(mlp_matmuls: str) -> Config:
    config = small_config(stage=3, precision="bf16")
    config.model.mlp_matmuls, config.train.steps = mlp_matmuls, 40
    config.validate()
    return config


def test_all_products_of_mlps_are_of_8_bit_operands_on_hopper():
    config = config_of("fp8")
    config.model.remat = "dots"
    module = Module(compile_step(config, find_cluster("h100:1x8"), GPU).hlo)
    products, gathered = Counter(), Counter()
    for instruction, inside, times in module.instructions():
        if "$f8" in instruction.attributes:
            products[tuple(inside[name].outputs[0].dtype for name in instruction.operands[:2])] += times
        if collective := module.collective(instruction, inside, times):
            gathered.update(a.dtype for a in collective.arrays if collective.kind == "all-gather")
    layers = size_of(config.model).depth
    assert products == {
        ("f8e4m3fn", "f8e4m3fn"): 2 * layers,  # forward, once: what follows from its results is recomputed, not they
        ("f8e5m2", "f8e4m3fn"): 2 * layers,  # gradients of activations
        ("f8e4m3fn", "f8e5m2"): 2 * layers,  # and of weights
    }
    assert not any(dtype.startswith("f8") for dtype in gathered)  # the quantized weights of a layer live as long as it


def test_training_agrees_with_bf16():
    """Over 40 steps on four batches the losses of both stay within 2 % of each other."""
    curves = {}
    for mlp_matmuls in ("compute", "fp8"):
        trainer = Trainer(config_of(mlp_matmuls), make_mesh(1, jax.devices()[:2]))
        state, losses = trainer.init(), []
        for step in range(40):
            state, metrics = trainer.step(state, to_global(trainer.mesh, batches(step % 4 + 1)[-1]))
            losses.append(float(metrics["loss"]))
        curves[mlp_matmuls] = np.array(losses)
    assert curves["compute"][-4:].mean() < curves["compute"][:4].mean() - 0.1
    np.testing.assert_allclose(curves["fp8"], curves["compute"], rtol=0.02)
    assert (curves["fp8"] != curves["compute"]).any()
