"""Boxes, their losses, and the matching of objects with queries."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from visionfm_jax.losses.detection import FEW, Truth, Weights, match, set_losses
from visionfm_jax.models.boxes import MOST_SCALING, Predicted, decode, encode, giou, to_centres, to_corners

pytestmark = pytest.mark.usefixtures("quick_compiles")

M, Q, PROBLEMS = 12, 30, 40


@functools.cache
def matcher():
    return jax.jit(jax.vmap(match))


def some_boxes(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """By centres, pixels of an image of 100 x 80; some of less than a pixel."""
    return np.concatenate([rng.uniform(0, 80, (*shape, 2)), rng.exponential(20, (*shape, 2)) + 0.01], -1)


def test_deltas_by_their_definition():
    """Element by element, in double precision."""
    rng = np.random.default_rng(0)
    reference, deltas, height, width = some_boxes(rng, 50), rng.normal(0, 2.5, (50, 4)), 80, 100
    expected = []
    for (x, y, w, h), (dx, dy, dw, dh) in zip(reference, deltas, strict=True):
        w, h = max(w, 1), max(h, 1)
        x, y, ratios = x + w * dx, y + h * dy, [min(max(d, -MOST_SCALING), MOST_SCALING) for d in (dw, dh)]
        w, h = w * np.exp(ratios[0]), h * np.exp(ratios[1])
        left, right = (min(max(edge, 0), width) for edge in (x - w / 2, x + w / 2))
        top, bottom = (min(max(edge, 0), height) for edge in (y - h / 2, y + h / 2))
        expected.append([(left + right) / 2, (top + bottom) / 2, right - left, bottom - top])
    found = decode(jnp.array(deltas), jnp.array(reference), jnp.array([height, width]))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-4)


def test_encode_is_the_reverse_of_decode():
    rng = np.random.default_rng(1)
    reference = some_boxes(rng, 50)
    deltas = rng.normal(0, 0.5, (50, 4)).astype(np.float32)
    boxes = decode(jnp.array(deltas), jnp.array(reference), jnp.array([1000, 1000]))
    inside = (np.asarray(to_corners(boxes)) > 0).all(-1) & (np.asarray(boxes)[:, 2:] > 1).all(-1)
    assert inside.sum() > 10
    np.testing.assert_allclose(encode(boxes, jnp.array(reference))[inside], deltas[inside], atol=2e-4)
    np.testing.assert_allclose(to_centres(to_corners(reference)), reference, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ((0, 0, 2, 2), (0, 0, 2, 2), 1.0),
        ((0, 0, 2, 2), (1, 0, 3, 2), 1 / 3),
        ((0, 0, 1, 1), (2, 0, 3, 1), -1 / 3),
        ((1, 1, 1, 1), (0, 0, 2, 2), 0.0),
        ((1, 1, 1, 1), (1, 1, 1, 1), 0.0),
    ],
)
def test_overlap(a, b, expected):
    value, gradient = jax.value_and_grad(giou)(jnp.array(a, jnp.float32), jnp.array(b, jnp.float32))
    assert value == pytest.approx(expected, abs=1e-6)
    assert np.isfinite(gradient).all()


def test_matching_is_scipys():
    """Any number of objects, costs of any size and sign, and of little difference."""
    rng = np.random.default_rng(2)
    costs = rng.normal(0, 10.0 ** rng.integers(-2, 4, (PROBLEMS, 1, 1)), (PROBLEMS, M, Q)).astype(np.float32)
    costs[1::4] = costs[1::4].mean(1, keepdims=True) + 0.1 * costs[1::4]  # all want the same queries
    present = np.arange(M) < rng.integers(0, M + 1, (PROBLEMS, 1))
    present[2::4] = rng.random((len(present[2::4]), M)) < 0.5
    assert present.any(1).sum() < PROBLEMS < present.sum()
    for cost, here, query in zip(costs, present, np.asarray(matcher()(costs, present)), strict=True):
        np.testing.assert_array_equal(query[here], linear_sum_assignment(cost[here])[1])
        assert (query < Q).all()


def test_matching_of_equal_costs():
    """There are several matchings of least cost, as there are for an object that is matched several times."""
    rng = np.random.default_rng(3)
    costs = rng.integers(0, 3, (PROBLEMS, M, Q)).astype(np.float32)
    costs[::2] = np.repeat(costs[::2, ::3], 3, axis=1)
    for cost, query in zip(costs, np.asarray(matcher()(costs, np.ones((PROBLEMS, M), bool))), strict=True):
        assert len(set(query)) == M
        rows, columns = linear_sum_assignment(cost)
        assert cost[np.arange(M), query].sum() == cost[rows, columns].sum()


def test_matching_of_few_takes_the_same():
    rng = np.random.default_rng(7)
    most = FEW + 8
    costs = rng.normal(size=(5, most, most + 5)).astype(np.float32)
    program = jax.jit(lambda c, p, n: jax.vmap(lambda c, p: match(c, p, n))(c, p))
    for count in (0, 1, 5, 6, 20, 21, most):  # by three programs
        present = np.arange(most) < np.minimum(rng.integers(0, most + 1, (5, 1)), count)
        found, expected = program(costs, present, count), matcher()(costs, present)
        np.testing.assert_array_equal(np.where(present, found, -1), np.where(present, expected, -1))


def test_costs_that_are_not_finite_are_taken_last():
    rng = np.random.default_rng(4)
    costs = rng.normal(size=(PROBLEMS, M, Q)).astype(np.float32)
    broken = rng.random((PROBLEMS, 1, Q)) < 0.4
    costs = np.where(broken, np.array([np.nan, np.inf, -np.inf, 1e30])[rng.integers(0, 4, costs.shape)], costs)
    costs = costs.astype(np.float32)
    costs[0] = np.nan
    everyone = np.ones((PROBLEMS, M), bool)
    for cost, query in zip(costs, np.asarray(matcher()(costs, everyone)), strict=True):
        assert len(set(query)) == M
        usable = np.isfinite(cost).all(0) & (np.abs(cost) < 1e6).all(0)
        if usable.sum() >= M:
            assert usable[query].all()
            np.testing.assert_array_equal(query, np.flatnonzero(usable)[linear_sum_assignment(cost[:, usable])[1]])


def predicted_of(rng: np.random.Generator) -> tuple[Predicted, Truth]:
    reference = jnp.array(some_boxes(rng, Q), jnp.float32)
    deltas = jnp.array(rng.normal(0, 0.3, (Q, 4)), jnp.float32)
    logits = jnp.array(rng.normal(0, 1, (Q, 5)), jnp.float32)
    boxes = to_corners(jnp.array(some_boxes(rng, M), jnp.float32))
    truth = Truth(boxes, jnp.array(rng.integers(0, 5, M)), jnp.arange(M) < 4)
    return Predicted(logits, deltas, reference, decode(deltas, reference, jnp.array([80, 100]))), truth


def test_what_is_absent_or_not_valid_does_not_count():
    rng = np.random.default_rng(5)
    predicted, truth = predicted_of(rng)
    weights, valid = Weights(2.0, 1.0, 2.0), jnp.array(rng.random(Q) < 0.7)

    def loss(predicted: Predicted, truth: Truth) -> jax.Array:
        return sum(set_losses(predicted, truth, weights, valid=valid).values())

    program = jax.jit(jax.value_and_grad(loss))
    value, gradient = program(predicted, truth)
    here = truth.present[:, None]
    other = truth._replace(boxes=jnp.where(here, truth.boxes, 7), labels=jnp.where(here[:, 0], truth.labels, 3))
    again, _ = program(predicted._replace(logits=jnp.where(valid[:, None], predicted.logits, 50)), other)
    assert again == value
    for name, part in gradient._asdict().items():
        assert np.isfinite(part).all(), name
        np.testing.assert_array_equal(part[~valid], 0, err_msg=name)
        assert part.any(), name


def test_several_queries_for_an_object():
    predicted, truth = predicted_of(np.random.default_rng(6))
    weights = Weights(2.0, 1.0, 2.0)
    several = jax.tree.map(lambda a: jnp.concatenate([a, a]), truth)
    found, expected = set_losses(predicted, truth, weights, copies=2), set_losses(predicted, several, weights)
    for name in expected:
        assert float(found[name]) == pytest.approx(float(expected[name]), rel=1e-5), name
