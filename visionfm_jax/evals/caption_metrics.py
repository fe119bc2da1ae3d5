"""Similarity of captions to those of people: BLEU-4, CIDEr-D, and the share that are the same.

Words are runs of letters and digits, with apostrophes and hyphens inside of them, in small letters; all else is left
out. COCO's own scorer takes the Stanford tokenizer, which needs Java and differs in little: it parts "don't" into two.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

ORDERS = 4  # n-grams of 1 to 4 words
SIGMA = 6.0  # words by which lengths may differ
_WORD = re.compile(r"\w+(?:['’-]\w+)*")

Counts = Counter[tuple[str, ...]]  # n-gram -> how often
Vector = dict[tuple[str, ...], float]  # n-gram -> weight
Weighted = tuple[list[Vector], list[float], int]  # of `_weighted`


def words(text: str) -> list[str]:
    """What counts as the words of a caption."""
    return _WORD.findall(text.lower())


def exact(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """The share of captions that are one of their references, letter by letter but for the amount of white space.

    Raises:
      ValueError: no captions, not as many as lists of references, or one of these is empty.
    """
    _check(hypotheses, references)
    pairs = zip(hypotheses, references, strict=True)
    return float(np.mean([" ".join(h.split()) in {" ".join(r.split()) for r in of} for h, of in pairs]))


def bleu4(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """BLEU-4 of all captions together (Papineni et al. 2002), by sacrebleu (Post 2018), in [0, 1]; not smoothed.

    Args:
      hypotheses: the captions.
      references: of each caption, one or more.

    Raises:
      ValueError: as `exact`.
    """
    from sacrebleu.metrics import BLEU

    _check(hypotheses, references)
    most = max(map(len, references))
    streams = [[" ".join(words(of[i])) if i < len(of) else None for of in references] for i in range(most)]
    scorer = BLEU(tokenize="none", smooth_method="none", max_ngram_order=ORDERS, force=True)
    return scorer.corpus_score([" ".join(words(h)) for h in hypotheses], streams).score / 100


def cider(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """CIDEr-D (Vedantam et al. 2015), the mean over the captions, in [0, 10]; papers often give it times 100.

    The weight of an n-gram is its count times the logarithm of the share of images whose references have it, negated:
    the number depends on the whole set of references, and a single image scores 0.

    Args, Raises: as `bleu4`.
    """
    _check(hypotheses, references)
    of_references = [[_counts(r) for r in of] for of in references]
    images_with = Counter(gram for of in of_references for gram in {g for counts in of for g in counts})
    rarity = {gram: math.log(len(references) / n) for gram, n in images_with.items()}
    unseen = math.log(len(references))
    scores = []
    for hypothesis, of in zip(hypotheses, of_references, strict=True):
        ours = _weighted(_counts(hypothesis), rarity, unseen)
        theirs = [_weighted(counts, rarity, unseen) for counts in of]
        scores.append(np.mean([_similarity(ours, vectors) for vectors in theirs]))
    return 10 * float(np.mean(scores))


def _counts(text: str) -> Counts:
    found = words(text)
    return Counter(tuple(found[i : i + n]) for n in range(1, ORDERS + 1) for i in range(len(found) - n + 1))


def _weighted(counts: Counts, rarity: Vector, unseen: float) -> Weighted:
    """Per order n, the weights and their norm; and the length, which the authors' code counts in pairs of words."""
    vectors: list[Vector] = [{} for _ in range(ORDERS)]
    for gram, count in counts.items():
        vectors[len(gram) - 1][gram] = count * rarity.get(gram, unseen)
    norms = [math.sqrt(sum(w * w for w in vector.values())) for vector in vectors]
    return vectors, norms, sum(count for gram, count in counts.items() if len(gram) == 2)


def _similarity(ours: Weighted, theirs: Weighted) -> float:
    """Mean over n of the clipped cosine, less where the lengths differ; in [0, 1]."""
    total = 0.0
    for vector, norm, other, other_norm in zip(ours[0], ours[1], theirs[0], theirs[1], strict=True):
        if norm and other_norm:
            both = sum(min(weight, other[gram]) * other[gram] for gram, weight in vector.items() if gram in other)
            total += both / (norm * other_norm)
    return total / ORDERS * math.exp(-((ours[2] - theirs[2]) ** 2) / (2 * SIGMA**2))


def _check(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    if not hypotheses or len(hypotheses) != len(references) or not all(references):
        raise ValueError(f"{len(hypotheses)} captions, {len(references)} lists of references: need as many, not empty")
