"""Near-copies are those of a comparison of each with each; of a chain of copies, those of a kept one are dropped."""

import numpy as np
import pytest

from visionfm_jax.data import held_out, near, signatures
from visionfm_jax.data.duplicates import DUPLICATE, EDGE, EQUAL, choose
from visionfm_jax.data.sources.store import write_table


def hashes(rng: np.random.Generator, count: int) -> np.ndarray:
    """SIGNATURE (count,), of one colour each; half of them copies of another, with up to 8 bits changed."""
    rows = np.zeros(count, signatures.SIGNATURE)
    rows["hash"] = rng.integers(1, 2**64, count, np.uint64) | np.uint64(2**63)
    rows["colours"] = rng.integers(0, 2, count)[:, None, None, None] * 200
    for i in range(count // 2, count):
        changed = sum(1 << int(bit) for bit in rng.choice(63, rng.integers(9), replace=False))
        other = int(rng.integers(i))
        rows[i] = (rows["hash"][other] ^ np.uint64(changed), rows["colours"][other])
    return rows


@pytest.mark.parametrize("few", [4, 256])
def test_nothing_is_missed_however_many_share_a_block(monkeypatch, few):
    monkeypatch.setattr(near, "_FEW", few)
    monkeypatch.setattr(near, "MOST", 100)
    rows = hashes(np.random.default_rng(few), 400)
    low = np.uint64(2**10 - 1)
    rows["hash"][:200] |= low  # many share blocks
    found = [near.edges(rows, table, lambda a, b: np.ones(len(a), bool)) for table in range(len(near.BLOCKS))]
    i, j = np.tril_indices(len(rows), -1)
    expected = signatures.near(rows[i], rows[j])
    pairs = np.concatenate(found)
    assert len(pairs) == len(np.unique(pairs, axis=0)), "an edge is in several tables"
    assert set(map(tuple, pairs.tolist())) == set(zip(i[expected].tolist(), j[expected].tolist(), strict=True))
    assert expected.sum() > 100


def test_of_many_copies_the_best_are_noted():
    rng = np.random.default_rng(0)
    rows = np.zeros(600, signatures.SIGNATURE)
    rows["hash"] = 2**63 | np.uint64(1) << rng.integers(10, 63, 600, np.uint64)  # not in block 0
    found = near.edges(rows, 0, lambda a, b: np.ones(len(a), bool))
    assert set(range(1, 600)) == set(found[found[:, 1] == 0, 0].tolist())
    assert np.bincount(found[:, 0]).max() == near.MOST


def test_the_nearest_of_some_pictures():
    rng = np.random.default_rng(0)
    rows = hashes(rng, 300)
    some, asked = rows[:150], rows[150:]
    found = near.Among(some).nearest(asked)
    for row, place in zip(asked, found.tolist(), strict=True):
        fits = signatures.near(np.repeat(row[None], 150), some)
        bits = np.where(fits, signatures.distances(np.repeat(row["hash"], 150), some["hash"]), 99)
        assert place == (int(np.argmin(bits)) if fits.any() else -1)
    assert (found >= 0).sum() > 30
    assert near.Among(some[:0]).nearest(asked).tolist() == [-1] * 150


def chosen(*edges: tuple[int, int, int]) -> dict[int, int]:
    found = choose(np.array(list(edges), EDGE))
    assert found.dtype == DUPLICATE
    return dict(found.tolist())


def test_a_pair_is_dropped_for_a_kept_copy_alone():
    assert chosen((2, 1, 3)) == {2: 1}
    assert chosen((2, 1, 3), (3, 2, 3)) == {2: 1}, "3 is no copy of 1, and 2 is not kept"
    assert chosen(*((i + 1, i, 3) for i in range(50))) == {i + 1: i for i in range(0, 50, 2)}
    assert chosen((1, 0, 6), (5, 0, 4), (5, 3, 2), (5, 1, 1)) == {1: 0, 5: 3}, "the nearest that is kept"
    assert chosen() == {}


def test_equal_pairs_share_their_fate():
    assert chosen((7, 2, EQUAL), (9, 2, EQUAL)) == {7: 2, 9: 2}
    assert chosen((7, 2, EQUAL), (2, 1, 3)) == {2: 1, 7: 1}


def test_held_out_images_of_one_colour_match_nothing(tmp_path):
    meta = {"word": "folder:flat@", "names": ["a.png"]}
    write_table(tmp_path / "held-out", [np.zeros(1, held_out.HELD_OUT)], lambda: meta)
    assert held_out.HeldOut([tmp_path / "held-out"]).matches(np.zeros(2, signatures.SIGNATURE)) == [None, None]
