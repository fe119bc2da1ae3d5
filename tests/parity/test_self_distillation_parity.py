"""Our losses and head of self-distillation against torch (frozen by `make_self_distillation.py`)."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gates import GRADIENT, check_forward, relative
from jax.sharding import PartitionSpec as P

from visionfm_jax.losses import self_distillation
from visionfm_jax.models.prototypes import PrototypeHead
from visionfm_jax.parallel.mesh import BATCH, DEVICES, make_mesh

pytestmark = pytest.mark.usefixtures("quick_compiles")


@functools.cache
def frozen() -> tuple[dict[str, np.ndarray], dict]:
    with np.load(Path(__file__).with_name("self_distillation.npz")) as file:
        data = dict(file)
    return data, json.loads(str(data.pop("about")))


def rows() -> np.ndarray:
    return frozen()[0]["teacher"].reshape(-1, frozen()[0]["teacher"].shape[-1])


def sinkhorn_on(devices: int, logits: np.ndarray, chosen: np.ndarray) -> jax.Array:
    mesh = make_mesh(1, jax.devices()[:devices])
    local = functools.partial(self_distillation.sinkhorn, axes=DEVICES)
    program = jax.shard_map(local, mesh=mesh, in_specs=(BATCH, P(), BATCH), out_specs=BATCH, check_vma=False)
    return jax.jit(program)(logits, frozen()[1]["teacher"], chosen)


def test_targets():
    data, about = frozen()
    everyone = np.ones(len(rows()), bool)
    check_forward(self_distillation.sinkhorn(rows(), about["teacher"], everyone), data["sinkhorn"], "sinkhorn")
    chosen = self_distillation.sinkhorn(rows(), about["teacher"], data["chosen"])
    check_forward(chosen, data["sinkhorn_chosen"], "chosen")
    np.testing.assert_array_equal(chosen[~data["chosen"]], 0)
    check_forward(self_distillation.centred(rows(), data["centre"], about["teacher"]), data["centred"], "centred")


def test_sinkhorn_is_of_all_devices():
    data, _ = frozen()
    for devices in (2, 4):
        check_forward(sinkhorn_on(devices, rows(), data["chosen"]), data["sinkhorn_chosen"], str(devices))
    nobody = np.zeros(len(rows()), bool)
    np.testing.assert_array_equal(sinkhorn_on(2, rows(), nobody), 0)


def test_views():
    data, about = frozen()
    targets = data["centred"].reshape(data["teacher"].shape)
    program = jax.value_and_grad(lambda s: self_distillation.views_loss(s, targets, about["student"]).mean())
    loss, gradient = jax.jit(program)(data["student"])
    check_forward(loss, data["views"], "views")
    assert relative(gradient, data["views/gradient"]) <= GRADIENT


def test_patches():
    data, about = frozen()
    targets = data["centred"].reshape(data["teacher"].shape).swapaxes(0, 1)
    student = data["student"][:2].swapaxes(0, 1)

    def loss(student):
        return self_distillation.patches_loss(student, targets, data["masked"], about["student"]).mean()

    value, gradient = jax.jit(jax.value_and_grad(loss))(student)
    check_forward(value, data["patches"], "patches")
    assert relative(gradient, data["patches/gradient"]) <= GRADIENT


def test_koleo():
    data, _ = frozen()
    check_forward(self_distillation.koleo(data["features"]), data["koleo"], "koleo")
    gradient = jax.jit(jax.grad(lambda x: self_distillation.koleo(x).sum()))(data["features"])
    assert relative(gradient, data["koleo/gradient"]) <= GRADIENT


def test_head():
    data, _ = frozen()
    params = {"prototypes": data["head/prototypes"].T}
    for i in (1, 2, 3):
        params[f"fc{i}"] = {"kernel": data[f"head/fc{i}.weight"].T, "bias": data[f"head/fc{i}.bias"]}
    head = PrototypeHead(data["teacher"].shape[-1], 20, 8, jnp.float32)

    def loss(x, params):
        logits = head.apply({"params": params}, x)
        return (logits**2).mean(), logits

    (of_x, of_params), logits = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(data["head/x"], params)
    check_forward(logits, data["head/logits"], "logits")
    assert relative(of_x, data["head/gradient/x"]) <= GRADIENT
    assert relative(of_params["prototypes"].T, data["head/gradient/prototypes"]) <= GRADIENT
    for i in (1, 2, 3):
        assert relative(of_params[f"fc{i}"]["kernel"].T, data[f"head/gradient/fc{i}.weight"]) <= GRADIENT
        assert relative(of_params[f"fc{i}"]["bias"], data[f"head/gradient/fc{i}.bias"]) <= GRADIENT
