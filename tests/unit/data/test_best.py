"""The k largest of numbers in shards, against sorting them."""

import numpy as np
import pytest

from visionfm_jax.data import best

SPECIAL = np.array([0.0, -0.0, np.inf, -np.inf, 1e-310, -1e-310, 5e-324, 1.7e308, -1.7e308, 1.0, np.nextafter(1.0, 2)])


def chosen(shards: list[np.ndarray], keep: int) -> tuple[list[int], int]:
    """Positions of those that are taken, and how many passes that took."""
    passes = []

    def counts(boundary):
        passes.append(boundary)
        return [best.count(best.keys(shard), boundary) for shard in shards]

    boundary = best.find(keep, counts)
    keys = best.keys(np.concatenate(shards))
    above, on = boundary.split(keys)
    assert on.sum() == boundary.on
    taken = np.sort(np.concatenate([np.flatnonzero(above), np.flatnonzero(on)[: boundary.taken]]))
    return taken.tolist(), len(passes)


def numbers(rng: np.random.Generator, kind: str, count: int) -> np.ndarray:
    match kind:
        case "float32":
            return rng.normal(0.3, 0.05, count).astype(np.float32).astype(np.float64)
        case "float64":
            return rng.normal(0, 1, count) * 10.0 ** rng.integers(-300, 300, count)
        case "close":
            return 1 + rng.integers(0, 50, count) * 2.0**-52
        case "ties":
            return rng.integers(-3, 4, count).astype(np.float64)
        case "special":
            return rng.choice(SPECIAL, count)
    raise AssertionError(kind)


@pytest.mark.parametrize("kind", ["float32", "float64", "close", "ties", "special"])
def test_as_sorting_says_in_order_of_position_where_equal(kind):
    rng = np.random.default_rng(0)
    for _ in range(12):
        shards = [numbers(rng, kind, int(n)) for n in rng.integers(0, 40, 5)]
        whole = np.concatenate(shards)
        keep = int(rng.integers(1, len(whole) + 5))
        expected = np.sort(np.argsort(-whole, kind="stable")[:keep]).tolist()
        found, passes = chosen(shards, keep)
        assert found == expected
        assert passes <= (2 if kind in ("float32", "ties") else 3)


def test_keys_have_the_order_of_their_numbers_and_give_them_back():
    rng = np.random.default_rng(1)
    many = np.concatenate([SPECIAL, numbers(rng, "float64", 500)])
    keys = best.keys(many)
    np.testing.assert_array_equal(best.values(keys), many)
    np.testing.assert_array_equal(keys[:, None] < keys, many[:, None] < many)


def test_no_numbers_at_all():
    assert chosen([np.zeros(0)], 3) == ([], 1)
