"""Our losses and matching of detection against transformers' DETR family (frozen by `make_detection.py`)."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gates import GRADIENT, check_forward, relative

from visionfm_jax.losses.detection import Truth, Weights, match, matching_costs, set_losses
from visionfm_jax.models.boxes import Predicted, to_corners

pytestmark = pytest.mark.usefixtures("quick_compiles")


@functools.cache
def frozen() -> tuple[dict[str, np.ndarray], dict]:
    with np.load(Path(__file__).with_name("detection.npz")) as file:
        data = dict(file)
    return data, json.loads(str(data.pop("about")))


def arguments(logits, boxes) -> tuple[Predicted, Truth]:
    data, _ = frozen()
    present = np.arange(data["labels"].shape[1]) < data["objects"][:, None]
    truth = Truth(to_corners(data["truth"]), data["labels"], present)
    return Predicted(logits, jnp.zeros_like(boxes), boxes, boxes), truth


@pytest.mark.parametrize("name", ["class", "giou"])
def test_costs(name):
    data, _ = frozen()
    weights = Weights(float(name == "class"), 0.0, float(name == "giou"))
    predicted, truth = arguments(data["logits"], data["boxes"])
    costs = jax.vmap(lambda *a: matching_costs(*a, weights))(predicted, truth)
    check_forward(np.where(truth.present[..., None], costs, 0), data[f"{name}_costs"], name)


def test_matching():
    data, about = frozen()
    predicted, truth = arguments(data["logits"], data["boxes"])
    weights = Weights(about["class"], 0.0, about["giou"])
    query = jax.vmap(lambda p, t: match(matching_costs(p, t, weights), t.present))(predicted, truth)
    np.testing.assert_array_equal(np.where(truth.present, query, -1), data["query"])


@pytest.mark.parametrize("prefix", ["", "many/"])
def test_losses(prefix):
    data, about = frozen()
    copies = about["copies"] if prefix else 1
    weights = Weights(about["class"], 0.0, about["giou"])

    def losses(logits, boxes):
        parts = jax.vmap(lambda p, t: set_losses(p, t, weights, copies))(*arguments(logits, boxes))
        return {name: parts[name].sum() / (data["objects"].sum() * copies) for name in ("class", "giou")}

    def gradients(logits, boxes):
        return losses(logits, boxes), jax.jacrev(losses, (0, 1))(logits, boxes)

    values, found = jax.jit(gradients)(data["logits"], data["boxes"])
    for name, by in (("class", 0), ("giou", 1)):
        check_forward(values[name], data[prefix + name], name)
        assert relative(found[name][by], data[f"{prefix}{name}/gradient"]) <= GRADIENT
