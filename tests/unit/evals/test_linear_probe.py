"""Logistic regression beside scikit-learn's, and an eval whose features are the pixels."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from visionfm_jax.config import PreprocessConfig
from visionfm_jax.config.load import from_arguments
from visionfm_jax.data.sources.kinds import BundledConfig
from visionfm_jax.errors import DataError
from visionfm_jax.evals import linear_probe
from visionfm_jax.evals.kinds import LinearProbeConfig
from visionfm_jax.evals.linear_probe import LinearProbeEval, probe, split
from visionfm_jax.evals.logistic import fit, zeros

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
    with pytest.raises(DataError, match=r"4,000 images of 196 features in the gallery .*; set shots"):
        eval_of().run(pixels)
    with pytest.raises(DataError, match="a linear_probe eval needs labelled images to learn from; add a source"):
        eval_of(gallery=())
