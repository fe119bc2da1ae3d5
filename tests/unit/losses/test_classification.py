import jax
import numpy as np
import optax
import pytest

from visionfm_jax.losses.classification import sigmoid_cross_entropy, softmax_cross_entropy

LOGITS = 3 * jax.random.normal(jax.random.key(0), (5, 7))
LABELS = np.array([0, 6, 3, 3, 1])


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_softmax_equals_the_dense_formula(smoothing):
    targets = optax.smooth_labels(jax.nn.one_hot(LABELS, 7), smoothing)
    expected = optax.softmax_cross_entropy(LOGITS, targets)
    np.testing.assert_allclose(softmax_cross_entropy(LOGITS, LABELS, smoothing), expected, rtol=1e-5)


def test_sigmoid_sums_binary_losses():
    p = 1 / (1 + np.exp(-np.asarray(LOGITS, np.float64)))
    y = np.eye(7)[LABELS]
    expected = -(y * np.log(p) + (1 - y) * np.log(1 - p)).sum(-1)
    np.testing.assert_allclose(sigmoid_cross_entropy(LOGITS, LABELS), expected, rtol=1e-5)


def test_large_logits_stay_finite():
    assert np.isfinite(softmax_cross_entropy(LOGITS * 1e4, LABELS, 0.1)).all()
    assert np.isfinite(sigmoid_cross_entropy(LOGITS * 1e4, LABELS, 0.1)).all()
