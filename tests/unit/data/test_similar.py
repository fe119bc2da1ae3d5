"""Near embeddings are those of a comparison of each with each, whatever the blocks."""

import numpy as np
import pyarrow as pa
import pytest

from visionfm_jax.data import column_folder, near, similar
from visionfm_jax.errors import DataError

TAR = {"name": "00000.tar", "pairs": 3, "crc": 7}


def embeddings(rng: np.random.Generator, count: int, width: int = 24) -> np.ndarray:
    """int16 (count, width) around a few themes."""
    rows = rng.standard_normal((5, width))[rng.integers(0, 5, count)] + 0.2 * rng.standard_normal((count, width))
    return np.rint(rows / np.linalg.norm(rows, axis=1, keepdims=True) * similar.UNIT).astype(np.int16)


def everything(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.ones(len(a), bool)


def test_products_are_exact():
    longest = (1 + similar.LENGTH) * similar.UNIT
    assert longest**2 < 2**24
    rows = embeddings(np.random.default_rng(0), 50, 4096)
    exact = rows.astype(np.int64) @ rows.astype(np.int64).T
    np.testing.assert_array_equal(rows.astype(np.float32) @ rows.astype(np.float32).T, exact)


@pytest.mark.parametrize("block", [7, 64, 1024])
def test_nothing_is_missed_in_a_cluster_whatever_the_blocks(monkeypatch, block):
    monkeypatch.setattr(similar, "BLOCK", block)
    monkeypatch.setattr(similar, "MOST", 200)
    rows = embeddings(np.random.default_rng(1), 200)
    wide = rows.astype(np.float64)
    cosine = wide @ wide.T / np.sqrt(np.outer((wide**2).sum(1), (wide**2).sum(1)))
    for accept in (everything, lambda a, b: (a - b) % 3 == 0):
        pairs, cosines = similar.edges(rows, 0.9, accept)
        i, j = np.nonzero(np.tril(cosine >= 0.9, -1))
        fits = accept(i, j)
        assert sorted(map(tuple, pairs.tolist())) == list(zip(i[fits].tolist(), j[fits].tolist(), strict=True))
        np.testing.assert_allclose(cosines, cosine[*pairs.T], rtol=1e-15)
        assert 200 < len(pairs) < 19_000


@pytest.mark.parametrize("block", [7, 1024])
def test_of_many_near_ones_the_best_are_noted(monkeypatch, block):
    monkeypatch.setattr(similar, "BLOCK", block)
    rows = embeddings(np.random.default_rng(2), 100)
    monkeypatch.setattr(similar, "MOST", 200)
    pairs = similar.edges(rows, 0.8, everything)[0]
    monkeypatch.setattr(similar, "MOST", near.MOST)
    expected = [(w, b) for w in range(100) for b in np.sort(pairs[pairs[:, 0] == w, 1])[: near.MOST].tolist()]
    assert sorted(map(tuple, similar.edges(rows, 0.8, everything)[0].tolist())) == expected
    assert len(expected) < len(pairs)


def test_equal_embeddings_have_a_cosine_of_one():
    rows = np.repeat(embeddings(np.random.default_rng(3), 20), 2, axis=0)
    pairs, cosines = similar.edges(rows, 1, everything)
    assert pairs.tolist() == [[2 * i + 1, 2 * i] for i in range(20)]
    assert (cosines == 1).all()


def test_the_nearest_centres_in_order(monkeypatch):
    rng = np.random.default_rng(4)
    rows, centres = embeddings(rng, 100), embeddings(rng, 10)
    expected = np.argsort(-(rows.astype(np.int64) @ centres.astype(np.int64).T), axis=1, kind="stable")
    np.testing.assert_array_equal(similar.nearest(rows, centres, 3), expected[:, :3])
    monkeypatch.setattr(similar, "_PRODUCTS", 30)
    np.testing.assert_array_equal(similar.nearest(rows, centres, 11), expected)


def test_centres_are_of_what_lies_together():
    rows = embeddings(np.random.default_rng(5), 400)
    centres = similar.centres_of(rows, 5, np.random.default_rng(0))
    again = similar.centres_of(np.concatenate([rows[::-1], rows]), 5, np.random.default_rng(0))
    np.testing.assert_array_equal(centres, again)
    products = rows.astype(np.float64) @ centres.T.astype(np.float64) / similar.UNIT**2
    drawn = rows[:5].astype(np.float64)
    assert products.max(1).mean() > (rows @ drawn.T / similar.UNIT**2).max(1).mean()
    np.testing.assert_allclose(np.linalg.norm(centres / similar.UNIT, axis=1), 1, atol=1e-3)
    assert len(similar.centres_of(rows[:3], 5, np.random.default_rng(0))) == 3
    assert similar.centres_of(rows[:0], 5, np.random.default_rng(0)).shape == (1, 24)


def test_near_pairs_share_a_cluster_mostly():
    rng = np.random.default_rng(6)
    rows = rng.standard_normal((2_000, 64))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    noise = rng.standard_normal(rows.shape)
    others = 0.97 * rows + np.sqrt(1 - 0.97**2) * noise / np.linalg.norm(noise, axis=1, keepdims=True)
    rows, others = (np.rint(part * similar.UNIT).astype(np.int16) for part in (rows, others))
    centres = similar.centres_of(rows[:400], 20, rng)
    a, b = (similar.nearest(part, centres, similar.NEAREST) for part in (rows, others))
    assert (a[:, :, None] == b[:, None]).any((1, 2)).mean() > 0.97 > (a[:, 0] == b[:, 0]).mean()


def test_embeddings_of_a_tar_without_those_that_are_not_there(tmp_path):
    folder = column_folder.create(tmp_path / "scores", {"command": "data score"})

    def write(*lengths: float) -> None:
        flat = pa.array(np.outer(lengths, [0.6, 0, 0.8, 0]).astype(np.float16).ravel())
        column = pa.FixedSizeListArray.from_arrays(flat, 4, mask=pa.array([False, True, False]))
        folder.write(TAR, ["a", "b", "c"], {"image_embedding": column})

    write(1, 9, -1)
    vectors, known = similar.read_embeddings(folder, TAR)
    assert vectors.tolist() == [[2400, 0, 3199, 0], [-2400, 0, -3199, 0]]
    assert known.tolist() == [True, False, True]
    write(1, 1, 0.5)
    with pytest.raises(
        DataError, match=r"00000.parquet: image_embedding has one of length 0.5, not 1; visionfm data sc"
    ):
        similar.read_embeddings(folder, TAR)
