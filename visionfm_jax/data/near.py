"""Which of many pictures are near-copies: of hashes of 64 bits those that differ in at most `DISTANCE`.

Two hashes that differ in at most d bits agree in one of d + 1 blocks of bits (the pigeonhole principle; Manku et al.
2007, https://doi.org/10.1145/1242572.1242592): only hashes that share a block are compared, and where many do, only
those of them that share a block of the bits that are left, too. No near pair is missed by it; but of a picture with
many better copies only the best are noted (`MOST`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from visionfm_jax.data.signatures import DISTANCE, alike, distances

MOST = 8
"""Better copies that are noted for a picture, in each table: one with a million copies has few edges, not 10**12.

So a picture with more of them may be kept beside a better copy of it that is kept, too: where all that are noted, the
best ones, are dropped for others that it is no copy of, and that copy comes behind these.
"""
_FEW = 256  # hashes that are compared one by one
_DEPTH = 2  # times that those that share a block are told apart by another one
_ALL = 2**64 - 1


def blocks_of(bits: int, count: int = DISTANCE + 1) -> list[int]:
    """The set bits of `bits` in `count` blocks of equal size, as masks."""
    places = [place for place in range(64) if bits >> place & 1]
    return [sum(1 << int(place) for place in part) for part in np.array_split(places, count)]


BLOCKS = blocks_of(_ALL)


def edges(rows: np.ndarray, table: int, accept: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> np.ndarray:
    """Near-copies among rows, of which those are noted here that share block `table` and none before it.

    Args:
      rows: with the fields of SIGNATURE, the best first.
      table: number in `BLOCKS`.
      accept: whether rows of two arrays, whose signatures are near, belong together, bool (N,).

    Returns:
      int64 (E, 2): the worse row and the better one; of each row its `MOST` best ones.
    """
    found = [np.zeros((0, 2), np.int64)]
    found += _search(rows, np.arange(len(rows)), [BLOCKS[table]], _ALL, _DEPTH, accept)
    pairs = np.unique(np.concatenate(found), axis=0)
    different = rows["hash"][pairs[:, 0]] ^ rows["hash"][pairs[:, 1]]
    first = np.ones(len(pairs), bool)
    for block in BLOCKS[:table]:
        first &= different & np.uint64(block) != 0
    pairs = pairs[first]
    rank = np.arange(len(pairs)) - np.searchsorted(pairs[:, 0], pairs[:, 0])  # among those of the same worse row
    return pairs[rank < MOST]


def _search(
    rows: np.ndarray,
    members: np.ndarray,
    blocks: Sequence[int],
    free: int,
    depth: int,
    accept: Callable[[np.ndarray, np.ndarray], np.ndarray],
) -> Iterator[np.ndarray]:
    """Near-copies among `members`, rows in order, that share one of `blocks`; `free` are the bits not yet shared."""
    for block in blocks:
        keys = rows["hash"][members] & np.uint64(block)
        order = np.argsort(keys, kind="stable")
        sorted_members, keys = members[order], keys[order]
        starts = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]])) if len(keys) else np.zeros(0, np.int64)
        lengths = np.diff(np.append(starts, len(keys)))
        many = (lengths > _FEW) if depth else np.zeros(len(starts), bool)
        short = np.repeat(~many, lengths)
        yield _compare(rows, sorted_members[short], lengths[~many], accept)
        left = free & ~block
        for start, length in zip(starts[many].tolist(), lengths[many].tolist(), strict=True):
            run = sorted_members[start : start + length]
            yield from _search(rows, run, blocks_of(left), left, depth - 1, accept)


def _compare(
    rows: np.ndarray,
    members: np.ndarray,
    lengths: np.ndarray,
    accept: Callable[[np.ndarray, np.ndarray], np.ndarray],
) -> np.ndarray:
    """Near-copies within each run of `members`, of `lengths`: with the best of it first, until `MOST` are found."""
    hashes = rows["hash"][members]
    start = np.repeat(np.cumsum(lengths) - lengths, lengths)
    counts = np.zeros(len(members), np.int8)
    active, rank, found = np.arange(len(members)), 0, [np.zeros((0, 2), np.int64)]
    while len(active):
        better = start[active] + rank
        active, better = active[behind := better < active], better[behind]
        candidates = np.flatnonzero(distances(hashes[active], hashes[better]) <= DISTANCE)
        worse, better = active[candidates], better[candidates]
        a, b = rows[members[worse]], rows[members[better]]
        fits = alike(a, b) & accept(a, b)
        found.append(np.stack([members[worse[fits]], members[better[fits]]], 1))
        counts[worse[fits]] += 1
        active = active[counts[active] < MOST]
        rank += 1
    return np.concatenate(found)


class Among:
    """Some pictures, among which those near to others are looked up: two of eight blocks are shared at least.

    Args:
      signatures: SIGNATURE (M,), or with more fields.
    """

    def __init__(self, signatures: np.ndarray):
        blocks = blocks_of(_ALL, DISTANCE + 2)
        self._signatures = signatures
        self._tables = []
        for i, one in enumerate(blocks):
            for other in blocks[:i]:
                mask = np.uint64(one | other)
                order = np.argsort(signatures["hash"] & mask, kind="stable")
                self._tables.append((mask, order, signatures["hash"][order] & mask))

    def nearest(self, signatures: np.ndarray) -> np.ndarray:
        """The number, int64 (N,), of the nearest picture to each, the first one of several; -1: none is near."""
        asked, found = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        for mask, order, keys in self._tables:
            wanted = signatures["hash"] & mask
            first, behind = np.searchsorted(keys, wanted, "left"), np.searchsorted(keys, wanted, "right")
            counts = behind - first
            ask = np.repeat(np.arange(len(signatures)), counts)
            there = order[np.arange(len(ask)) - np.repeat(np.cumsum(counts) - counts - first, counts)]
            close = distances(signatures["hash"][ask], self._signatures["hash"][there]) <= DISTANCE
            asked.append(ask[close])
            found.append(there[close])
        ask, there = np.unique(np.stack([np.concatenate(asked), np.concatenate(found)], 1), axis=0).T
        fits = alike(signatures[ask], self._signatures[there])
        ask, there = ask[fits], there[fits]
        order = np.lexsort((there, distances(signatures["hash"][ask], self._signatures["hash"][there]), ask))
        out = np.full(len(signatures), -1, np.int64)
        out[ask[order[::-1]]] = there[order[::-1]]  # the nearest last, which stays
        return out
