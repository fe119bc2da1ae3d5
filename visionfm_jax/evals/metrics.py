"""Retrieval and zero-shot numbers from embeddings, on the host, in bounded memory.

Scores are inner products of embeddings of length 1. Whatever is doubtful counts against the model: wrong answers that
tie with the right one, to fp32 rounding, stand before it; embeddings that are not finite are never right, and as
wrong answers stand before everything. So constant embeddings and NaN score nothing (a mere `score > right` is false
for NaN, and finds all of them perfect).

Shapes: Q queries, N candidates, E embedding, A ids of a query or candidate, C classes, K the best ones, B texts of a
batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from visionfm_jax.evals.beats import beat

TIE = 1e-6  # scores that are this near are equal: fp32 rounds a product of 1,024 terms differently in different places
BLOCK = 2**24  # scores held at a time: 64 MiB


def ranks(queries: np.ndarray, candidates: np.ndarray, query_ids: np.ndarray, candidate_ids: np.ndarray) -> np.ndarray:
    """The place of the best right answer to every query: 1 plus the number of wrong answers before it or tied.

    Args:
      queries: (Q, E) fp32.
      candidates: (N, E) fp32.
      query_ids: (Q,) or (Q, A) integers; one that has fewer than A repeats some.
      candidate_ids: (N,) or (N, A) integers, as many as there are; right for a query are those that share an id.

    Returns:
      (Q,) float64; inf where the query or all its right answers are not finite, or there is none.
    """
    queries, usable = _cleaned(queries)
    candidates, known = _cleaned(candidates)
    ids = candidate_ids.reshape(len(candidates), -1)
    order = np.argsort(ids, axis=None, kind="stable")
    sorted_ids, query_ids = ids.ravel()[order], query_ids.reshape(len(queries), -1)
    first, last = (np.searchsorted(sorted_ids, query_ids, side) for side in ("left", "right"))
    out = np.full(len(queries), np.inf)
    for rows, scores in _scores(queries, candidates):
        right = np.zeros(scores.shape, bool)
        for row, starts, stops in zip(right, first[rows], last[rows], strict=True):
            for start, stop in zip(starts, stops, strict=True):
                row[order[start:stop] // ids.shape[1]] = True
        best = scores.max(1, where=right & known, initial=-np.inf)
        behind = (scores < best[:, None] - TIE) & known  # false for NaN
        place = 1 + (~behind & ~right).sum(1)
        out[rows] = np.where(usable[rows] & np.isfinite(best), place, np.inf)
        beat()
    return out


def best(queries: np.ndarray, candidates: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The candidates of highest score, in order; those that are not finite come last.

    Args:
      queries: (Q, E) fp32.
      candidates: (N, E) fp32.
      k: how many; at most N are returned.

    Returns:
      indices (Q, K) and scores (Q, K), K = min(k, N); a score is NaN where query or candidate is not finite.
    """
    queries, usable = _cleaned(queries)
    candidates, known = _cleaned(candidates)
    k = min(k, len(candidates))
    indices, values = np.zeros((len(queries), k), np.int64), np.full((len(queries), k), np.nan, np.float32)
    for rows, scores in _scores(queries, candidates):
        scores[:, ~known] = -np.inf
        top = np.argpartition(-scores, k - 1, axis=1)[:, :k]
        of_top = np.take_along_axis(scores, top, 1)
        order = np.argsort(-of_top, axis=1, kind="stable")
        indices[rows], values[rows] = np.take_along_axis(top, order, 1), np.take_along_axis(of_top, order, 1)
    values[~usable[:, None] | ~known[indices]] = np.nan
    return indices, values


def recall(places: np.ndarray, k: int) -> float:
    """R@K: the share of `ranks` that are at most k."""
    return float((places <= k).mean())


def class_embeddings(embeddings: Iterable[np.ndarray], classes: int) -> np.ndarray:
    """One embedding a class: the normalised mean of the normalised embeddings of its prompts (Radford et al. 2021).

    Args:
      embeddings: blocks (B, E) of the prompts' embeddings, one after another in the order prompt 0 with class 0, with
        class 1, …, prompt 1 with class 0, ….
      classes: C.

    Returns:
      (C, E) fp32; NaN where a prompt is not finite, or the prompts cancel each other.
    """
    total, first = np.zeros((classes, 1)), 0
    for rows in embeddings:
        total = total if first else np.zeros((classes, rows.shape[1]))
        np.add.at(total, (first + np.arange(len(rows))) % classes, _unit(rows))
        first += len(rows)
    return _unit(total).astype(np.float32)


class ZeroShot(NamedTuple):
    """Scores of zero-shot classification, shares of images.

    Attributes:
      top1, top5: whose class is the best, among the best five.
      guess: (N,) int64 class of each image, -1 where its embedding is not finite; on a tie, a wrong one.
    """

    top1: float
    top5: float
    guess: np.ndarray


def classify(images: np.ndarray, classes: np.ndarray, labels: np.ndarray) -> ZeroShot:
    """Every image against every class.

    Args:
      images: (N, E) fp32, N at least 1.
      classes: (C, E) fp32, of `class_embeddings`.
      labels: (N,) integers in [0, C).
    """
    places = ranks(images, classes, labels, np.arange(len(classes)))
    first = best(images, classes, 2)[0]
    wrong = np.where(first[:, 0] == labels, first[:, -1], first[:, 0])
    guess = np.where(places == 1, labels, np.where(np.isfinite(images).all(1), wrong, -1))
    return ZeroShot(recall(places, 1), recall(places, 5), guess)


def _scores(queries: np.ndarray, candidates: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Blocks of rows and their scores (rows, N)."""
    step = max(1, BLOCK // len(candidates))
    for first in range(0, len(queries), step):
        rows = slice(first, first + step)
        yield rows, queries[rows] @ candidates.T


def _cleaned(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows (N, E) fp32 with zeros for those that are not finite, and which (N,) are finite."""
    finite = np.isfinite(rows).all(1)
    clean = rows if finite.all() else np.where(finite[:, None], rows, np.float32(0))  # gigabytes: no copy for nothing
    return clean.astype(np.float32, copy=False), finite


def _unit(rows: np.ndarray) -> np.ndarray:
    """Rows (N, E) float64 of length 1; NaN where a row is not finite or zero."""
    rows = np.where(np.isfinite(rows), rows, np.nan).astype(np.float64)
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(length > 1e-12, length, np.nan)
