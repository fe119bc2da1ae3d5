"""The k largest of numbers that lie in shards: exact, in a few passes, with memory for one histogram.

A selection by radix: the order of float64 numbers is that of `keys`, whole numbers of 64 bits. The first pass counts
their first bits. The boundary between what is taken and what is not lies in one of these bins; the next pass counts the
next bits of that bin alone, and so on. Two passes find the boundary among float32 numbers, three among any.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

DIGITS = ((44, 20), (22, 22), (0, 22))
"""Of each pass: how many bits lie below those that are counted, and how many are counted."""


@dataclass(frozen=True)
class Boundary:
    """Where the best end: the numbers on it have keys that begin with the same bits, and some of them are taken.

    Attributes:
      shift: number of bits behind these.
      prefix: these bits.
      on: how many numbers lie on the boundary.
      taken: how many of them are taken, in order of their position; all above are.
    """

    shift: int = 64
    prefix: int = 0
    on: int = 0
    taken: int = 0

    def split(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Which lie above the boundary, and which on it: bool (n,)."""
        if self.shift == 64:  # a shift that numpy does not do
            return np.zeros(len(keys), bool), np.ones(len(keys), bool)
        begin = keys >> np.uint64(self.shift)
        return begin > self.prefix, begin == self.prefix


@dataclass(frozen=True)
class Counts:
    """How often the bits of a pass occur in a shard: `numbers` (m,) times each of `digits` (m,).

    `low` and `high` bound the bits behind; empty shards have low > high.
    """

    digits: np.ndarray
    numbers: np.ndarray
    low: int
    high: int


def keys(values: np.ndarray) -> np.ndarray:
    """uint64 (n,) in the order of the float64 (n,); equal where these are, so for both zeros. None is NaN."""
    bits = (values + 0.0).view(np.uint64)  # -0.0 + 0.0 is 0.0
    return np.where(bits >> np.uint64(63), ~bits, bits | np.uint64(1 << 63))


def values(keys: np.ndarray) -> np.ndarray:
    """The float64 (n,) of `keys`."""
    return np.where(keys >> np.uint64(63), keys & np.uint64(2**63 - 1), ~keys).view(np.float64)


def count(keys: np.ndarray, boundary: Boundary) -> Counts:
    """Of the keys (n,) of a shard that lie on the boundary, for the pass after it."""
    shift, bits = DIGITS[_next(boundary)]
    on = keys[boundary.split(keys)[1]]
    digits, numbers = np.unique((on >> np.uint64(shift)) & np.uint64(2**bits - 1), return_counts=True)
    rest = on & np.uint64(2**shift - 1)
    low, high = (int(rest.min()), int(rest.max())) if len(rest) else (2**shift, -1)
    return Counts(digits.astype(np.int64), numbers, low, high)


def find(keep: int, passes: Callable[[Boundary], Iterable[Counts]]) -> Boundary:
    """The boundary of the `keep` largest; of all, if there are fewer.

    Args:
      keep: how many are wanted, at least 1.
      passes: gives `count` of each shard, for a boundary.
    """
    boundary = Boundary(taken=keep)
    for shift, bits in DIGITS:
        total, low, high = np.zeros(2**bits, np.int64), 2**64, -1
        for counts in passes(boundary):
            total[counts.digits] += counts.numbers
            low, high = min(low, counts.low), max(high, counts.high)
        if boundary.shift == 64 and (there := int(total.sum())) <= keep:
            return Boundary(on=there, taken=there)
        above = np.cumsum(total[::-1])[::-1] - total  # numbers in higher bins
        digit = int(np.flatnonzero(above < boundary.taken)[0])
        on, taken = int(total[digit]), boundary.taken - int(above[digit])
        boundary = Boundary(shift, boundary.prefix << bits | digit, on, taken)
        if on == taken or low >= high:  # the bin is taken whole, or its numbers are equal
            break
    return boundary


def _next(boundary: Boundary) -> int:
    return next(i for i, (shift, bits) in enumerate(DIGITS) if shift + bits == boundary.shift)


def histogram(total: np.ndarray, parts: int = 24) -> tuple[np.ndarray, np.ndarray]:
    """Intervals of nearly equal width that hold all finite numbers, from the counts of the first pass's bits.

    Args:
      total: int64 (2**20,), how often each value of these bits occurs.
      parts: intervals, at most.

    Returns:
      The bounds in number space, float64 (P+1,), and where they lie in `total`, int64 (P+1,); empty if there is none.
    """
    shift, bits = DIGITS[0]
    begins = values(np.arange(2**bits, dtype=np.uint64) << np.uint64(shift))  # the least number of each
    used = np.flatnonzero((total > 0) & np.isfinite(begins))
    if not len(used):
        return np.zeros(0), np.zeros(0, np.int64)
    first, end = int(used[0]), int(used[-1]) + 1
    low, high = begins[first], min(begins[end], np.finfo(np.float64).max)
    wanted = np.linspace(0, 1, parts + 1)
    wanted = low * (1 - wanted) + high * wanted
    places = np.unique(np.clip(first + np.searchsorted(begins[first:end], wanted), first, end))
    return np.append(begins[places[:-1]], high), places
