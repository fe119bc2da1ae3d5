"""Ranks and zero-shot numbers against naive loops, and every way in which a broken model could look good."""

import tracemalloc

import numpy as np
import pytest
from pair_fakes import unit

from visionfm_jax.evals import metrics

RNG = np.random.default_rng


def naive_ranks(queries, candidates, query_ids, candidate_ids):
    out = []
    for query, own in zip(queries, query_ids, strict=True):
        scores = [float(np.dot(query.astype(float), c.astype(float))) for c in candidates]
        right = max(s for s, c in zip(scores, candidate_ids, strict=True) if c == own)
        out.append(1 + sum(s >= right for s, c in zip(scores, candidate_ids, strict=True) if c != own))
    return out


def pairs(count=40, dim=6, noise=1.5, seed=0):
    rng = RNG(seed)
    texts = unit(rng.normal(size=(count, dim)))
    return unit(texts + noise * unit(rng.normal(size=(count, dim)))), texts


@pytest.mark.parametrize("block", [1, 97, 2**24])
def test_ranks_are_those_of_a_naive_loop(monkeypatch, block):
    monkeypatch.setattr(metrics, "BLOCK", block)
    images, texts = pairs()
    ids = RNG(1).integers(0, 25, 40)  # several candidates with one id: the best of them counts
    got = metrics.ranks(images[:30], texts, ids[:30], ids)
    np.testing.assert_array_equal(got, naive_ranks(images[:30], texts, ids[:30], ids))
    assert 1 in got
    assert got.max() > 5


@pytest.mark.parametrize("block", [1, 97, 2**24])
def test_several_ids_of_a_query_or_a_candidate(monkeypatch, block):
    monkeypatch.setattr(metrics, "BLOCK", block)
    images, texts = pairs(30)
    image_ids = RNG(1).integers(-9, 9, (30, 3))  # any integers, some twice in a row
    text_ids = RNG(2).integers(-9, 9, 30)

    def naive(queries, candidates, right):
        out = []
        for scores, own in zip(queries.astype(float) @ candidates.T, right, strict=True):
            best = scores[own].max(initial=-np.inf)
            out.append(1 + (scores[~own] >= best).sum() if own.any() else np.inf)
        return out

    right = (image_ids[:, :, None] == text_ids).any(1)
    np.testing.assert_array_equal(metrics.ranks(images, texts, image_ids, text_ids), naive(images, texts, right))
    np.testing.assert_array_equal(metrics.ranks(texts, images, text_ids, image_ids), naive(texts, images, right.T))


def test_recall_counts_ranks_up_to_k():
    assert [metrics.recall(np.array([1, 2, 6, np.inf]), k) for k in (1, 5, 10)] == [0.25, 0.5, 0.75]


@pytest.mark.parametrize("dim", [1, 512, 1021])
def test_constant_embeddings_stand_behind_every_wrong_answer(dim):
    same = np.repeat(unit(RNG(0).normal(size=(1, dim))), 701, 0)
    ids = np.arange(701)
    assert (metrics.ranks(same, same, ids, ids) == 701).all()
    nearly = unit(same + 1e-8 * RNG(1).normal(size=same.shape))  # what fp32 leaves of a collapsed model
    assert metrics.recall(metrics.ranks(nearly, nearly, ids, ids), 10) == 0


def test_a_tie_with_one_wrong_answer_costs_one_place():
    candidates = unit([[1, 0], [1, 0], [0, 1]])
    np.testing.assert_array_equal(metrics.ranks(candidates, candidates, np.arange(3), np.arange(3)), [2, 2, 1])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_never_right_and_helps_nobody(bad):
    eye, ids = np.eye(4, dtype=np.float32), np.arange(4)
    broken = eye.copy()
    broken[1, 3] = bad
    np.testing.assert_array_equal(metrics.ranks(broken, eye, ids, ids), [1, np.inf, 1, 1])  # one query
    np.testing.assert_array_equal(metrics.ranks(eye, broken, ids, ids), [2, np.inf, 2, 2])  # one candidate
    everything = np.full_like(eye, bad)
    assert np.isinf(metrics.ranks(everything, everything, ids, ids)).all()
    assert np.isinf(metrics.ranks(eye, everything, ids, ids)).all()
    huge = np.full_like(eye, 1e30)  # finite, but their products are not
    with np.errstate(over="ignore"):
        assert np.isinf(metrics.ranks(huge, huge, ids, ids)).all()


def test_a_query_without_a_right_answer_has_no_rank():
    eye = np.eye(2, dtype=np.float32)
    np.testing.assert_array_equal(metrics.ranks(eye, eye, np.array([0, 7]), np.array([0, 1])), [1, np.inf])


def test_equal_captions_are_right_for_each_other():
    images, texts = unit([[1, 0.1], [1, -0.1], [0, 1]]), unit([[1, 0], [1, 0], [0, 1]])
    ids = np.array([5, 5, 9])
    np.testing.assert_array_equal(metrics.ranks(images, texts, ids, ids), [1, 1, 1])
    np.testing.assert_array_equal(metrics.ranks(texts, images, ids, ids), [1, 1, 1])


def test_memory_does_not_grow_with_the_square(monkeypatch):
    monkeypatch.setattr(metrics, "BLOCK", 2**16)
    images, texts = pairs(4000, 8)
    ids, of_images = np.arange(4000), np.arange(4000)[:, None] // 5 + np.arange(5)  # five captions an image
    tracemalloc.start()
    metrics.ranks(images, texts, ids, ids)
    metrics.ranks(images, texts, of_images, ids)
    metrics.ranks(texts, images, ids, of_images)
    metrics.best(images, texts, 5)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * 2**20  # all scores: 64 MiB


def test_best_come_in_order_with_those_that_are_not_finite_last():
    images, texts = pairs(30)
    texts[3] = np.nan
    indices, scores = metrics.best(images, texts, 30)
    assert (indices[:, -1] == 3).all()
    assert np.isnan(scores[:, -1]).all()
    full = np.delete(images @ texts.T, 3, 1)
    np.testing.assert_allclose(scores[:, :-1], -np.sort(-full, 1), atol=1e-6)
    assert metrics.best(images, texts, 99)[0].shape == (30, 30)
    assert np.isnan(metrics.best(np.full_like(images, np.inf), texts, 2)[1]).all()


@pytest.mark.parametrize("size", [1, 4, 7, 12])
def test_a_class_is_the_normalised_mean_of_normalised_prompts(size):
    prompts = RNG(0).normal(size=(4, 3, 5)).astype(np.float32)  # prompt, class, dim; of any length
    flat = prompts.reshape(12, 5)
    got = metrics.class_embeddings((flat[i : i + size] for i in range(0, 12, size)), 3)
    for c in range(3):
        mean = np.mean([p[c] / np.linalg.norm(p[c]) for p in prompts.astype(float)], 0)
        np.testing.assert_allclose(got[c], mean / np.linalg.norm(mean), atol=1e-6)
    assert got.dtype == np.float32


def test_classes_whose_prompts_cancel_or_are_not_finite_get_no_embedding():
    blocks = [np.array([[1, 0], [1, 0], [0, 1.0]]), np.array([[-1, 0], [np.nan, 0], [0, 1.0]])]
    got = metrics.class_embeddings(blocks, 3)
    assert np.isnan(got[:2]).all()
    np.testing.assert_allclose(got[2], [0, 1])


def test_classify_is_a_naive_loop():
    classes = unit(RNG(0).normal(size=(9, 4)))
    labels = RNG(1).integers(0, 8, 300)  # class 8 has no image
    images = unit(classes[labels] + 1.6 * unit(RNG(2).normal(size=(300, 4))))
    got = metrics.classify(images, classes, labels)
    right, top5 = [], 0
    for image, label in zip(images, labels, strict=True):
        order = sorted(range(9), key=lambda c: -float(image @ classes[c]))
        right.append(order[0] == label)
        assert got.guess[len(right) - 1] == order[0]
        top5 += label in order[:5]
    assert got.top1 == pytest.approx(np.mean(right))
    assert got.top5 == pytest.approx(top5 / 300)
    assert got.top1 < got.top5 < 1


@pytest.mark.parametrize("what", ["constant", "nan"])
def test_a_broken_model_classifies_nothing(what):
    labels = np.arange(40) % 8
    images = np.full((40, 4), 0.5 if what == "constant" else np.nan, np.float32)
    got = metrics.classify(images, np.full((8, 4), 0.5, np.float32), labels)
    assert (got.top1, got.top5) == (0, 0)
    assert (got.guess != labels).all()
    assert (got.guess == -1).all() == (what == "nan")


def test_a_class_that_is_not_finite_is_never_right():
    classes = np.eye(3, dtype=np.float32)
    classes[1] = np.nan
    got = metrics.classify(np.eye(3, dtype=np.float32), classes, np.arange(3))
    assert (got.top1, got.top5) == (0, pytest.approx(2 / 3))
    assert (got.guess != np.arange(3)).all()
