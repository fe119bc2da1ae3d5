"""Plain-DETR: its bias against a loop over definitions, what its queries see, and what its layers learn from."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from visionfm_jax.models.boxes import to_corners
from visionfm_jax.models.detector import (
    LEVELS,
    BoxBias,
    DetectorSettings,
    PlainDetr,
    forward_flops,
    map_grid,
    proposal_count,
    sine,
)

pytestmark = pytest.mark.usefixtures("quick_compiles")

SETTINGS = DetectorSettings(
    num_classes=3, width=16, heads=2, mlp=24, encoder_depth=1, decoder_depth=3, queries=5, many_queries=7, stride=8,
    upsample=0, attention="xla", remat="none",
)  # fmt: skip
GRID, WIDTH = (4, 5), 6  # of the map, and its channels


def test_box_bias_by_its_definition():
    rng = np.random.default_rng(0)
    boxes = rng.uniform(1, 40, (2, 3, 4)).astype(np.float32)
    rows, columns = np.array([[1, 1, 1, 0], [1, 1, 1, 1]], bool), np.array([[1] * 5, [1, 1, 0, 0, 0]], bool)
    module = BoxBias(2, jnp.float32, stride=8)
    shapes = jax.eval_shape(module.init, jax.random.key(0), boxes, rows, columns)["params"]
    params = jax.tree.map(lambda p: rng.normal(size=p.shape).astype(np.float32) * 0.1, shapes)
    found = np.asarray(module.apply({"params": params}, boxes, rows, columns)).reshape(2, 2, 3, *GRID)

    def network(name: str, first: float, last: float) -> np.ndarray:  # offsets of the edges, in sixteenths of a place
        one, two = params[f"{name}1"], params[f"{name}2"]
        hidden = np.maximum(np.array([first, last]) @ one["kernel"].astype(np.float64) + one["bias"], 0)
        return hidden @ two["kernel"]

    for b, q, y, x in np.ndindex(2, 3, *GRID):
        if not (rows[b, y] and columns[b, x]):
            assert (found[b, :, q, y, x] < -1e8).all()
            continue
        cx, cy, w, h = boxes[b, q].astype(np.float64)
        left, right, top, bottom = cx - w / 2, cx + w / 2, cy - h / 2, cy + h / 2
        px, py = 8 * (x + 0.5), 8 * (y + 0.5)
        expected = network("column", 2 * (left - px), 2 * (right - px))
        expected += network("row", 2 * (top - py), 2 * (bottom - py))
        np.testing.assert_allclose(found[b, :, q, y, x], expected, rtol=3e-5, atol=1e-4)


def test_sine():
    x, width = np.array([0.5, 3.0]), 8
    expected = []
    for value in x:
        angles = [value / 10_000 ** (i / 4) for i in range(4)]
        expected += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
    np.testing.assert_allclose(sine(jnp.array(x), width), expected, atol=1e-6)


@functools.cache
def weights(settings: DetectorSettings = SETTINGS):
    rng, module = np.random.default_rng(1), PlainDetr(settings)
    inputs = jnp.zeros((1, *GRID, WIDTH)), jnp.array([[32, 40]])
    shapes = jax.eval_shape(lambda key: module.init(key, *inputs, many=True), jax.random.key(0))["params"]
    return jax.tree.map(lambda p: (rng.normal(size=p.shape) * 0.3).astype(np.float32), shapes)


@functools.partial(jax.jit, static_argnums=(3, 4))
def detect(params, x, size, many=False, settings=SETTINGS):
    return PlainDetr(settings).apply({"params": params}, x, size, many)


def some_map(seed: int = 2) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(2, *GRID, WIDTH)).astype(np.float32)


SIZE = np.array([[19, 40], [32, 17]], np.int32)  # rows and columns that are seen: 3 and 5; 4 and 3


def test_what_the_image_does_not_cover_changes_nothing():
    x, other = some_map(), some_map()
    other[0, 3:], other[1, :, 3:] = 9, -5
    a, b = detect(weights(), x, SIZE), detect(weights(), other, SIZE)
    for name, found, expected in zip(a.layers._fields, b.layers, a.layers, strict=True):
        np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5, err_msg=name)
    assert a.valid.any(1).all()
    np.testing.assert_allclose(b.proposals.logits[b.valid], a.proposals.logits[a.valid], rtol=2e-5, atol=2e-5)
    changed = some_map()
    changed[0, 2] = 9
    assert np.abs(detect(weights(), changed, SIZE).layers.logits - a.layers.logits)[:, 0].max() > 1e-2


def test_boxes_lie_on_the_image():
    out = detect(weights(), some_map(), SIZE)
    corners = np.asarray(to_corners(out.layers.boxes))
    assert corners.min() > -1e-3
    assert (corners <= SIZE[:, None, [1, 0, 1, 0]] + 1e-3).all()


def test_queries_of_training_are_not_seen_by_those_that_predict():
    few, all_of_them = detect(weights(), some_map(), SIZE), detect(weights(), some_map(), SIZE, True)
    assert all_of_them.layers.logits.shape == (3, 2, 12, 3)
    for found, expected in zip(all_of_them.layers, few.layers, strict=True):
        np.testing.assert_allclose(found[:, :, :5], expected, rtol=2e-5, atol=2e-5)


def test_a_layers_boxes_teach_the_layer_before_and_none_further_back():
    """Look forward twice."""
    params, x = weights(), some_map()
    big = np.array([[400, 400]] * 2, np.int32)  # nothing is clipped

    def last_boxes(bias: jax.Array) -> jax.Array:  # of the deltas of each layer
        head = jax.tree.map(lambda p: p, params)
        head["decoder"]["blocks"]["predictors"]["box3"]["bias"] = bias
        return detect(head, x, big).layers.boxes[-1].sum()

    gradient = jax.jit(jax.grad(last_boxes))(params["decoder"]["blocks"]["predictors"]["box3"]["bias"])
    assert np.abs(gradient[2]).min() > 1e-2
    assert np.abs(gradient[1]).min() > 1e-2
    np.testing.assert_array_equal(gradient[0], 0)


def test_a_layer_starts_from_the_boxes_of_the_one_before():
    out = detect(weights(), some_map(), SIZE)
    np.testing.assert_allclose(out.layers.reference[1:], out.layers.boxes[:-1], atol=1e-4)
    best = np.argsort(-np.where(out.valid, out.proposals.logits[..., 0], -np.inf), axis=1, kind="stable")[:, :5]
    np.testing.assert_array_equal(
        out.layers.reference[0], np.take_along_axis(np.asarray(out.proposals.boxes), best[..., None], 1)
    )


def test_proposals_stand_on_their_places():
    out = detect(weights(), some_map(), SIZE)
    assert out.valid.shape == (2, proposal_count(GRID)) == (2, 8 * 10 + 4 * 5 + 2 * 3 + 1 * 2)
    first = np.asarray(out.proposals.reference)[0]
    np.testing.assert_allclose(first[[0, 79, 80, 99, 100, 107]], [
        [2, 2, 25, 25], [38, 30, 25, 25], [4, 4, 50, 50], [36, 28, 50, 50], [8, 8, 100, 100], [48, 16, 200, 200],
    ])  # fmt: skip
    np.testing.assert_array_equal(out.valid, (out.proposals.reference[..., :2] < SIZE[:, None, ::-1]).all(-1))


def test_settings_of_maps():
    coarse = SETTINGS._replace(stride=32, upsample=1)
    assert coarse.map_stride == 16
    assert map_grid(coarse, (64, 96)) == (4, 6)
    assert len(LEVELS) == 4
    out = detect(weights(coarse), some_map(), np.array([[128, 160]] * 2), False, coarse)
    assert out.valid.shape[1] == proposal_count((8, 10))
    one, two = (forward_flops(SETTINGS._replace(decoder_depth=n), (32, 40), WIDTH, (5, 7)) for n in (1, 2))
    S, D, Q = 20, 16, 12
    layer = Q * (6 * D * D + 2 * D * 24 + 2 * D * D + 4 * D + 3 * D) + 2 * S * D * D + 2 * D * Q * S
    layer += 2 * D * (25 + 49) + Q * 9 * 512 * 4
    assert two - one == 2 * layer
