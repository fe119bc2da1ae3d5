"""Which pictures have near embeddings: those of a cosine of at least a threshold, as SemDeDup drops them (Abbas et al.
2023, https://arxiv.org/abs/2303.09540).

An embedding is compared with those of the same clusters alone: those of the `NEAREST` centres of a spherical k-means
(Dhillon & Modha 2001, https://doi.org/10.1023/A:1007612920971) of a sample. What is missed are near pairs that share no
cluster; and of an embedding with many better near ones only the best are noted (`near.MOST`).

Embeddings are rounded to multiples of 1 / `UNIT`: a sum of products of two, of length 1, then is a whole number that
fits into the 24 bits of a float32 whatever the order of the terms. So matrix products are exact, and no machine, block
or thread changes a result, which no library of k-means promises.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import numpy as np

from visionfm_jax.data.column_folder import ColumnFolder
from visionfm_jax.data.near import MOST
from visionfm_jax.errors import DataError, printable

COLUMN = "image_embedding"  # of `visionfm data score --embeddings`
UNIT = 4000  # steps to a length of 1, which moves a cosine by 0.0001 (standard deviation)
LENGTH = 0.01  # by which a length may differ from 1
NEAREST = 2  # clusters that an embedding is compared in
ROUNDS = 10  # of k-means
BLOCK = 1024  # embeddings that are compared with as many at once
_PRODUCTS = 2**24  # with centres, that are in memory at once


def read_embeddings(folder: ColumnFolder, tar: dict) -> tuple[np.ndarray, np.ndarray]:
    """Of a tar's pairs the embeddings of those that have one, int16 (K, E), and which pairs these are, bool (N,).

    Raises:
      DataError: as `ColumnFolder.read`, or one has another length than 1.
    """
    column = folder.read(tar, [COLUMN])[COLUMN].combine_chunks()
    values = column.flatten().to_numpy().reshape(-1, column.type.list_size)
    vectors = rounded(values)
    lengths = np.sqrt(_squares(vectors)) / UNIT
    if (wrong := np.abs(lengths - 1) > LENGTH).any():
        where = printable(str(folder.file(tar["name"])))
        length = lengths[np.argmax(wrong)]
        raise DataError(f"{where}: {COLUMN} has one of length {length:.3g}, not 1; visionfm data score writes them so")
    return vectors, column.is_valid().to_numpy(zero_copy_only=False)


def rounded(values: np.ndarray) -> np.ndarray:
    """Multiples of 1 / `UNIT`, int16, of float16: their products have 23 bits, which a float32 holds."""
    return np.rint(values.astype(np.float32) * UNIT).astype(np.int16)


def digests(vectors: np.ndarray) -> list[int]:
    """A hash of 64 bits of each embedding, int16 (N, E)."""
    return [int.from_bytes(hashlib.blake2b(v.tobytes(), digest_size=8).digest(), "little") for v in vectors]


def centres_of(sample: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """The centres of `count` clusters, or as many as there are different embeddings, int16 (C, E), of int16 (N, E)."""
    sample = np.unique(sample, axis=0)  # else a picture that is there a thousand times would be many centres
    if not len(sample):
        return np.zeros((1, sample.shape[1]), np.int16)
    centres = sample[rng.choice(len(sample), min(count, len(sample)), replace=False)]
    for _ in range(ROUNDS):
        cluster = nearest(sample, centres, 1)[:, 0]
        order = np.argsort(cluster, kind="stable")
        there, starts = np.unique(cluster[order], return_index=True)
        sums = np.add.reduceat(sample[order], starts, dtype=np.int64)
        lengths = np.sqrt(np.maximum(_squares(sums), 1))
        centres[there] = np.rint(sums / lengths[:, None] * UNIT)
    return centres


def nearest(vectors: np.ndarray, centres: np.ndarray, count: int) -> np.ndarray:
    """The numbers of the `count` nearest centres, int64 (N, count) or (N, C), of int16 (N, E) and (C, E)."""
    columns = centres.T.astype(np.float32)
    size = min(max(1, _PRODUCTS // len(centres)), 4 * BLOCK)
    out = np.empty((len(vectors), min(count, len(centres))), np.int64)
    for start in range(0, len(vectors), size):
        products = vectors[start : start + size].astype(np.float32) @ columns
        for rank in range(out.shape[1]):
            best = products.argmax(1)  # of equal ones the first
            out[start : start + size, rank] = best
            products[np.arange(len(best)), best] = -np.inf
    return out


def edges(
    vectors: np.ndarray, threshold: float, accept: Callable[[np.ndarray, np.ndarray], np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Near pairs among embeddings.

    Args:
      vectors: int16 (N, E), the best first; may be a file in memory.
      threshold: the least cosine.
      accept: whether embeddings of two arrays of numbers belong together, bool (N,).

    Returns:
      int64 (P, 2): the worse and the better one, of each row its `MOST` best ones; and their cosines, float64 (P,).
    """
    squares = np.concatenate(
        [np.zeros(0, np.int64), *(_squares(vectors[i : i + BLOCK]) for i in range(0, len(vectors), BLOCK))]
    )
    least = np.floor(threshold * squares.min(initial=4 * UNIT**2))  # no smaller product can be enough
    pairs, cosines = [np.zeros((0, 2), np.int64)], [np.zeros(0)]
    for start in range(0, len(vectors), BLOCK):
        rows = vectors[start : start + BLOCK].astype(np.float32)
        worse, counts = start + np.arange(len(rows)), np.zeros(len(rows), np.int64)
        for first in range(0, start + 1, BLOCK):
            products = rows @ vectors[first : first + BLOCK].astype(np.float32).T
            if first == start:
                products[worse[:, None] <= first + np.arange(products.shape[1])] = -np.inf
            some = np.flatnonzero(products.max(1) >= least)
            w, b = np.nonzero(products[some] >= least)
            w = some[w]
            cosine = products[w, b] / np.sqrt((squares[worse[w]] * squares[first + b]).astype(np.float64))
            fits = cosine >= threshold
            fits[fits] = accept(worse[w[fits]], first + b[fits])
            w, b, cosine = w[fits], b[fits], cosine[fits]
            few = counts[w] + np.arange(len(w)) - np.searchsorted(w, w) < MOST
            pairs.append(np.stack([worse[w], first + b], 1)[few])
            cosines.append(cosine[few])
            counts += np.bincount(w, minlength=len(counts))
            left = counts < MOST
            if not left.any():
                break
            if not left.all():
                rows, worse, counts = rows[left], worse[left], counts[left]
    return np.concatenate(pairs), np.concatenate(cosines)


def _squares(vectors: np.ndarray) -> np.ndarray:
    """The squared lengths, int64 (N,), of whole numbers (N, E)."""
    wide = vectors.astype(np.int64)
    return np.einsum("ne,ne->n", wide, wide)
