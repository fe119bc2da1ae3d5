"""Votes by hand, and an eval whose features are the pixels."""

import numpy as np
import pytest
from PIL import Image

from visionfm_jax.config import PreprocessConfig
from visionfm_jax.config.load import from_arguments
from visionfm_jax.data.sources.kinds import BundledConfig, FolderConfig
from visionfm_jax.errors import DataError
from visionfm_jax.evals import knn
from visionfm_jax.evals.kinds import KnnConfig


def by_hand(gallery, labels, queries, classes):
    x, q = (a / np.linalg.norm(a, axis=1, keepdims=True) for a in (gallery, queries))
    cosine = q @ x.T
    votes = np.zeros((len(q), classes))
    for row, scores in enumerate(cosine):
        for i in np.argsort(-scores)[: knn.NEIGHBOURS]:
            votes[row, labels[i]] += np.exp(scores[i] / knn.TEMPERATURE)
    return votes.argmax(1)


def test_votes_in_blocks(monkeypatch):
    rng = np.random.default_rng(0)
    gallery, queries = (rng.normal(size=(n, 6)).astype(np.float32) for n in (100, 50))
    labels = rng.integers(0, 5, 100)
    expected = by_hand(gallery, labels, queries, 5)
    assert len(set(expected)) > 3
    np.testing.assert_array_equal(knn.vote(gallery, labels, queries, 5), expected)
    monkeypatch.setattr(knn, "QUERIES", 13)
    monkeypatch.setattr(knn, "GALLERY", 32)
    np.testing.assert_array_equal(knn.vote(gallery, labels, queries, 5), expected)
    # What is not finite is nobody's neighbour, and is never right.
    more, numbers = np.concatenate([gallery, np.full((30, 6), np.nan, np.float32)]), np.r_[labels, np.zeros(30, int)]
    queries[7, 2] = np.inf
    expected[7] = -1
    np.testing.assert_array_equal(knn.vote(more, numbers, queries, 5), expected)
    np.testing.assert_array_equal(knn.vote(gallery[:3], labels[:3], queries[:1], 5) >= 0, True)


def test_large_images_are_averaged():
    images = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), np.uint8)
    got = knn.shrunk(images).reshape(2, 32, 32, 3)
    np.testing.assert_allclose(
        got, images.reshape(2, 32, 2, 32, 2, 3).mean((2, 4)), atol=1.01
    )  # Pillow rounds after each side
    np.testing.assert_array_equal(knn.shrunk(images[:, :16, :16]), images[:, :16, :16].reshape(2, -1))
    wide = images[:, :16].reshape(2, 16, 32, 2, 3).mean(3)
    np.testing.assert_allclose(knn.shrunk(images[:, :16]).reshape(2, 16, 32, 3), wide, atol=1.01)


def eval_of(**changes):
    config, _ = from_arguments(["--config=configs/quickstart.py"])
    digits, train = (BundledConfig(path="digits", split=split) for split in ("test", "train"))
    settings = {"source": digits, "gallery": (train,), "preprocess": PreprocessConfig(crop=1.0)} | changes
    return knn.KnnEval(KnnConfig(batch_size=250, **settings), config, 0, 1)


def test_features_that_are_the_pixels_score_as_the_pixels_do():
    asked = []

    def predict(batch, what):
        asked.append(what)
        return {k: v for k, v in batch.items() if k != "image"} | {
            "features": batch["image"].reshape(len(batch["image"]), -1).astype(np.float32)
        }

    measured = eval_of()
    scores = measured.run(predict)
    assert set(asked) == {"features"}
    assert 0.9 < scores["top1"] == scores["pixels_top1"] <= 1
    assert measured.details["protocol"] == measured.protocol
    broken = measured.run(
        lambda batch, what: predict(batch, what) | {"features": np.full((250, 3), np.nan, np.float32)}
    )
    assert broken == {"top1": 0.0, "pixels_top1": scores["pixels_top1"]}


def test_sources_that_cannot_serve_are_refused():
    with pytest.raises(DataError, match="gallery"):
        eval_of(gallery=())
    with pytest.raises(DataError, match="9 classes"):
        eval_of(gallery=(BundledConfig(path="noto", split="test"),))
    train, same = (BundledConfig(path="digits", split=split) for split in ("train", "test"))
    with pytest.raises(
        DataError, match=r"^gallery: bundled digits/test holds the images that are measured.*; set anot"
    ):
        eval_of(gallery=(train, same))


def test_a_gallery_whose_labels_mean_other_classes_is_refused(tmp_path):
    for folder, classes in (("a", ("cat", "dog")), ("b", ("cat", "eel"))):
        for name in classes:
            (tmp_path / folder / name).mkdir(parents=True)
            Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / folder / name / "0.png")
    sources = [FolderConfig(path=str(tmp_path / name), split="") for name in "ab"]
    with pytest.raises(DataError, match=r"^gallery: .*/b: label 1 is the class 'eel', but 'dog' in source; give both"):
        eval_of(source=sources[0], gallery=sources[1:])
