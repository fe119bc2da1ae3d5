"""Logistic regression beside scikit-learn's, and an eval whose features are the pixels."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from visionfm_jax.config import PreprocessConfig
from visionfm_jax.config.load import from_arguments
from visionfm_jax.data.sources.kinds import BundledConfig
from visionfm_jax.errors import DataError
from visionfm_jax.evals import linear_probe, logistic
from visionfm_jax.evals.beats import heard_by
from visionfm_jax.evals.kinds import LinearProbeConfig
from visionfm_jax.evals.linear_probe import RATES, LinearProbeEval, probe, probe_by_sgd, split
from visionfm_jax.evals.logistic import fit, fit_by_sgd, zeros

pytestmark = pytest.mark.usefixtures("quick_compiles")


def blobs(count: int = 300, features: int = 12, classes: int = 4) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, classes, count)
    centres = rng.normal(size=(classes, features))
    return (centres[labels] + 1.5 * rng.normal(size=(count, features))).astype(np.float32), labels


@pytest.mark.parametrize("penalty", [0.1, 1.0, 100.0])
def test_it_is_scikit_learns(penalty):
    x, y = blobs()
    ours = fit(x, y, penalty, zeros(12, 4))
    theirs = LogisticRegression(C=1 / penalty, tol=1e-8, max_iter=10_000).fit(x, y)
    np.testing.assert_allclose(ours.kernel, theirs.coef_.T, atol=2e-3)
    centred = ours.bias - np.mean(ours.bias), theirs.intercept_ - theirs.intercept_.mean()  # they are free together
    np.testing.assert_allclose(*centred, atol=2e-3)
    np.testing.assert_array_equal(np.argmax(ours(x), 1), theirs.predict(x))


def test_a_long_fit_goes_on_in_parts(monkeypatch):
    """As many times as watchdogs need, with the result and the one program of a fit without them."""
    x, y = blobs()
    monkeypatch.setattr(logistic, "TOLERANCE", 0.0)
    monkeypatch.setattr(logistic, "ITERATIONS", 20)
    logistic._iterate.clear_cache()
    whole, beats = fit(x, y, 1.0, zeros(12, 4)), []
    monkeypatch.setattr(logistic, "BETWEEN_BEATS", 6)
    with heard_by(beats.append):
        parts = fit(x, y, 1.0, zeros(12, 4))
    assert beats == [False] * 4
    np.testing.assert_array_equal(parts.kernel, whole.kernel)
    assert logistic._iterate._cache_size() == 1
    logistic._iterate.clear_cache()  # of the tolerance
    learn, choose = split(y, 0, 0)
    monkeypatch.setattr(linear_probe, "PENALTIES", (1.0, 10.0))
    beats.clear()
    with heard_by(beats.append):
        probe(x, y, learn, choose, 4, final=True)
        assert beats.count(True) == 2  # one a penalty
        probe_by_sgd(x, y, learn, choose, 4, final=False)
    assert beats.count(True) > 20


def test_scales_are_made_alike_in_blocks(monkeypatch):
    x = 3 + 5 * np.random.default_rng(0).normal(size=(100, 7)).astype(np.float32)
    monkeypatch.setattr(linear_probe, "AT_ONCE", 13)
    mean, rms = linear_probe.moments(x)
    assert mean.dtype == np.float32
    np.testing.assert_allclose(mean, x.mean(0, dtype=float), rtol=1e-6)
    assert rms == pytest.approx(np.sqrt(((x - x.mean(0, dtype=float)) ** 2).mean()))
    assert linear_probe.moments(np.ones((4, 2), np.float32))[1] == 1


def test_the_penalty_is_the_one_that_unseen_images_choose():
    x, y = blobs(classes=3)
    x[:, 2:] = 0.1 * np.random.default_rng(1).normal(size=x[:, 2:].shape)
    learn, choose = split(y, 0, 0)
    assert sorted([*learn, *choose]) == list(range(len(y)))
    assert len(choose) / len(y) == pytest.approx(0.2, abs=0.01)
    classifier, penalty = probe(x, y, learn, choose, 3, final=True)
    right = {}
    for other in linear_probe.PENALTIES:
        theirs = LogisticRegression(C=1 / other, tol=1e-6, max_iter=10_000).fit(x[learn], y[learn])
        right[other] = (theirs.predict(x[choose]) == y[choose]).mean()
    assert right[penalty] == pytest.approx(max(right.values()), abs=1.5 / len(choose))
    whole = LogisticRegression(C=1 / penalty, tol=1e-8, max_iter=10_000).fit(x, y)
    assert (np.argmax(classifier(x), 1) == whole.predict(x)).mean() > 0.99


def test_of_penalties_that_are_right_as_often_the_loss_decides():
    """Six images choose, and all penalties are right of them: the strongest would be as good as a guess elsewhere."""
    random = np.random.default_rng(0)
    y = np.arange(30) % 2
    x = (random.standard_normal((30, 4)) * 0.3 + np.where(y, 1, -1)[:, None]).astype(np.float32)
    learn, choose = split(y, 0, 0)
    assert len(choose) == 6
    _, penalty = probe(x, y, learn, choose, 2, final=True)
    assert penalty < 1


def test_sgd_takes_the_steps_of_its_definition(monkeypatch):
    """Written out in NumPy: softmax, momentum, a cosine to 0; a new order of the rows in each epoch."""
    monkeypatch.setattr(logistic, "BATCH", 64)
    monkeypatch.setattr(logistic, "STEPS", 30)
    monkeypatch.setattr(logistic, "EPOCHS", 1)
    x, y = blobs()
    rows, rates, steps = np.arange(20, 220), (0.03, 0.3), 30
    found = fit_by_sgd(x, y, rows, rates, 4)
    for rate, ours in zip(rates, found, strict=True):
        kernel, bias, moving = np.zeros((12, 4)), np.zeros(4), [0.0, 0.0]
        orders = np.concatenate([np.random.default_rng([e]).permutation(rows)[:192] for e in range(10)])
        for number in range(steps):
            batch = orders[number * 64 : (number + 1) * 64]
            logits = x[batch] @ kernel + bias
            share = np.exp(logits - logits.max(1, keepdims=True))
            wrong = (share / share.sum(1, keepdims=True) - np.eye(4)[y[batch]]) / 64
            moving = [0.9 * m + g for m, g in zip(moving, (x[batch].T @ wrong, wrong.sum(0)), strict=True)]
            now = rate * (1 + np.cos(np.pi * number / steps)) / 2
            kernel, bias = kernel - now * moving[0], bias - now * moving[1]
        np.testing.assert_allclose(ours.kernel, kernel, atol=1e-5)
        np.testing.assert_allclose(ours.bias, bias, atol=1e-5)
    assert len({tuple(orders[i : i + 192]) for i in range(0, 768, 192)}) == 4


def test_sgd_finds_what_the_best_penalty_finds():
    x, y = blobs(1500)
    learn, choose = split(y[:1000], 0, 0)
    classifier, rate = probe_by_sgd(x[:1000], y[:1000], learn, choose, 4, final=True)
    best, _ = probe(x[:1000], y[:1000], learn, choose, 4, final=True)
    ours, theirs = (float(np.mean(np.argmax(c(x[1000:]), 1) == y[1000:])) for c in (classifier, best))
    assert rate in RATES
    assert ours == pytest.approx(theirs, abs=0.02)
    assert theirs > 0.7


def test_a_rate_at_which_sgd_diverges_is_not_chosen(monkeypatch):
    monkeypatch.setattr(linear_probe, "RATES", (0.1, 1e38))
    x, y = blobs()
    learn, choose = split(y, 0, 0)
    assert not np.isfinite(fit_by_sgd(x, y, learn, (1e38,), 4)[0].kernel).all()
    assert probe_by_sgd(x, y, learn, choose, 4, final=False)[1] == 0.1


def test_shots_are_so_many_of_each_class_and_others_for_every_draw():
    labels = np.repeat([0, 1, 2], [50, 9, 2])
    (learn, choose), (other, _) = split(labels, 3, 0), split(labels, 3, 1)
    assert np.bincount(labels[learn]).tolist() == [3, 3, 2]
    assert np.bincount(labels[choose]).tolist() == [3, 3]
    assert not set(learn) & set(choose)
    assert set(learn) != set(other)
    np.testing.assert_array_equal(learn, split(labels, 3, 0)[0])


def eval_of(**changes) -> LinearProbeEval:
    config, _ = from_arguments(["--config=configs/quickstart.py"])
    digits, train = (BundledConfig(path="digits", split=split) for split in ("test", "train"))
    settings = {"source": digits, "gallery": (train,), "preprocess": PreprocessConfig(crop=1.0)} | changes
    return LinearProbeEval(LinearProbeConfig(batch_size=500, **settings), config, 0, 1)


def pixels(batch, what):
    assert what == "features"
    features = batch["image"][:, ::2, ::2, 0].reshape(len(batch["image"]), -1).astype(np.float32)
    return {k: v for k, v in batch.items() if k != "image"} | {"features": features}


def test_features_that_are_the_pixels():
    measured = eval_of(shots=10)
    scores = measured.run(pixels)
    assert 0.6 < scores["top1"] < 0.9
    assert measured.details["protocol"] == measured.protocol != eval_of(shots=5).protocol
    draws = measured.details["draws"]
    assert len({one["top1"] for one in draws}) > 1
    assert scores["top1"] == pytest.approx(np.mean([one["top1"] for one in draws]))
    assert scores["top1_std"] == pytest.approx(np.std([one["top1"] for one in draws], ddof=1))


def test_sgd_in_place_of_lbfgs():
    """With more features than a device holds, too."""
    by_sgd = eval_of(solver="sgd")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear_probe, "MAX_NUMBERS", 1000)
        scores = by_sgd.run(pixels)
    assert scores["top1"] == pytest.approx(eval_of().run(pixels)["top1"], abs=0.03)
    assert "top1_std" not in scores
    assert by_sgd.details["draws"][0]["learning_rate"] in RATES
    assert by_sgd.protocol != eval_of().protocol


@pytest.mark.parametrize("name", ["ITERATIONS", "TOLERANCE", "KEPT"])
def test_what_decides_the_number_is_part_of_the_protocol(monkeypatch, name):
    before = eval_of().protocol
    monkeypatch.setattr(linear_probe, name, 7)
    assert eval_of().protocol != before


def test_what_is_not_finite_is_never_right_and_teaches_nothing():
    measured = eval_of(shots=3)
    whole = measured.run(pixels)["top1"]

    def some(batch, what):
        out = pixels(batch, what)
        out["features"][::2] = np.nan
        return out

    assert 0 < measured.run(some)["top1"] < 0.6 * whole  # half of the images have no features
    with pytest.raises(DataError, match="no image of the gallery has finite features"):
        measured.run(lambda batch, what: pixels(batch, what) | {"features": np.full((500, 3), np.inf)})


def test_more_features_than_a_device_holds(monkeypatch):
    monkeypatch.setattr(linear_probe, "MAX_NUMBERS", 1000)
    with pytest.raises(DataError, match=r"4,000 images of 196 features in the gallery .*; set solver='sgd', or shots"):
        eval_of().run(pixels)
    with pytest.raises(DataError, match="a linear_probe eval needs labelled images to learn from; add a source"):
        eval_of(gallery=())
