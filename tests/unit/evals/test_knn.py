"""Votes by hand, and an eval whose features are the pixels."""

import numpy as np
import pytest
from PIL import Image
from sklearn.neighbors import KNeighborsClassifier

from visionfm_jax.config import PreprocessConfig
from visionfm_jax.config.load import from_arguments
from visionfm_jax.data.sources.kinds import BundledConfig, FolderConfig
from visionfm_jax.errors import DataError
from visionfm_jax.evals import knn
from visionfm_jax.evals.beats import heard_by
from visionfm_jax.evals.kinds import KnnConfig

pytestmark = pytest.mark.usefixtures("quick_compiles")


def scikit_learns(gallery, labels, queries, neighbours=20, temperature=0.07):
    model = KNeighborsClassifier(
        neighbours, metric="cosine", algorithm="brute", weights=lambda distance: np.exp((1 - distance) / temperature)
    )
    return model.fit(gallery.astype(np.float64), labels).predict(queries.astype(np.float64))


def vote(gallery, labels, queries, classes, neighbours=20, temperature=0.07):
    return knn.vote(gallery, labels, queries, classes, neighbours, temperature)


@pytest.mark.parametrize(("neighbours", "temperature"), [(1, 0.07), (5, 0.01), (20, 0.07), (50, 1.0), (100, 0.002)])
def test_votes_are_scikit_learns(neighbours, temperature):
    rng = np.random.default_rng(1)
    labels, others = rng.integers(0, 5, 200), rng.integers(0, 5, 150)
    centres = rng.normal(size=(5, 8))
    gallery, queries = (
        (centres[of] + 1.5 * rng.normal(size=(len(of), 8))).astype(np.float32) for of in (labels, others)
    )
    ours = vote(gallery, labels, queries, 5, neighbours, temperature)
    np.testing.assert_array_equal(ours, scikit_learns(gallery, labels, queries, neighbours, temperature))
    assert 0.4 < (ours == others).mean() < 1


def test_votes_that_tell_nothing_are_wrong():
    rng = np.random.default_rng(0)
    gallery, labels = rng.normal(size=(60, 4)).astype(np.float32), np.repeat(np.arange(3), 20)
    queries = rng.normal(size=(5, 4)).astype(np.float32)
    assert vote(gallery, labels, queries, 3).min() >= 0
    for constant in (0.0, 1.0, 1e4):
        same = np.full((60, 4), constant, np.float32)
        np.testing.assert_array_equal(vote(same, labels, same[:5], 3), -1)
    np.testing.assert_array_equal(vote(np.full_like(gallery, np.nan), labels, queries, 3), -1)
    two = np.float32([[1, 0], [0, 1]])
    np.testing.assert_array_equal(vote(two, np.array([0, 1]), np.float32([[1, 1], [1, 0], [0, 0]]), 2), [-1, 0, -1])
    np.testing.assert_array_equal(vote(two, np.array([1, 1]), np.float32([[1, 0.9]]), 2), 1)
    twice = np.concatenate([gallery, gallery])  # neighbours of one class are no tie
    np.testing.assert_array_equal(vote(twice, np.r_[labels, labels], gallery[:5], 3, 1), labels[:5])


def test_votes_in_blocks(monkeypatch):
    rng = np.random.default_rng(0)
    gallery, queries = (rng.normal(size=(n, 6)).astype(np.float32) for n in (100, 50))
    labels = rng.integers(0, 5, 100)
    expected = scikit_learns(gallery, labels, queries)
    assert len(set(expected)) > 3
    np.testing.assert_array_equal(vote(gallery, labels, queries, 5), expected)
    monkeypatch.setattr(knn, "QUERIES", 13)
    monkeypatch.setattr(knn, "GALLERY", 32)
    beats = []
    with heard_by(beats.append):
        np.testing.assert_array_equal(vote(gallery, labels, queries, 5), expected)
    assert beats == [True] * 16
    # What is not finite is nobody's neighbour, and is never right.
    more, numbers = np.concatenate([gallery, np.full((30, 6), np.nan, np.float32)]), np.r_[labels, np.zeros(30, int)]
    queries[7, 2] = np.inf
    expected[7] = -1
    np.testing.assert_array_equal(vote(more, numbers, queries, 5), expected)
    np.testing.assert_array_equal(vote(gallery[:3], labels[:3], queries[:1], 5) >= 0, True)


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
