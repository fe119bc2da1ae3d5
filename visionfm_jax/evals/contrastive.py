"""What the evals of a contrastive model share. Shapes: B texts or images of a batch, L tokens, E embedding, S side."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from visionfm_jax.data.sources import Source, read_record
from visionfm_jax.data.sources.record import has_text
from visionfm_jax.data.tokenizer import Tokenizer
from visionfm_jax.data.transforms import EvalTransform
from visionfm_jax.evals.subject import Predict


def protocol_of(settings: dict[str, Any]) -> str:
    """8 hex digits by which to tell whether two numbers were measured the same way."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]


def measured_on(source: Source, path: str, split: str) -> dict[str, Any]:
    """A dataset's part of a protocol: its name and length, the same on every machine."""
    return {"dataset": Path(path).name, "split": split, "records": len(source)}


def plain(numbers: dict[str, float]) -> dict[str, float | str]:
    """Numbers as JSON has them: "nan" and "inf" are words, as in metrics.jsonl."""
    return {k: v if math.isfinite(v) else str(v) for k, v in numbers.items()}


def embed_texts(
    predict: Predict,
    texts: Sequence[str],
    tokenizer: Tokenizer,
    *,
    context: int,
    batch_size: int,
    host: int,
    hosts: int,
) -> Iterator[np.ndarray]:
    """The embeddings of all texts in order, in blocks (B, E), on every host; each host embeds its rows of a batch.

    Args:
      predict: the model.
      texts: the same on every host.
      tokenizer: of the run's task.
      context: L.
      batch_size: rows over all hosts; the last batch is filled up with rows whose mask is 0.
      host, hosts: this process and their number.
    """
    rows = batch_size // hosts
    for start in range(0, len(texts), batch_size):
        own = texts[start + host * rows : min(start + (host + 1) * rows, len(texts))]
        batch = {"text": np.zeros((rows, context), np.int32), "mask": np.zeros(rows, np.float32)}
        for row, text in enumerate(own):
            batch["text"][row] = tokenizer(text, context)
        batch["mask"][: len(own)] = 1
        yield predict(batch)["text_embedding"][: len(texts) - start]


def sample(rows: np.ndarray, count: int) -> np.ndarray:
    """At most `count` of the rows, evenly spread: the same ones at every evaluation, whatever the model."""
    return rows[np.linspace(0, len(rows) - 1, min(count, len(rows))).astype(np.int64)]


def image_of(source: Source, record: int, transform: EvalTransform) -> np.ndarray:
    """What the model sees of a record, uint8 (S, S, 3)."""
    return transform(read_record(source, record)["image"])


def captions_of(record: Mapping[str, Any]) -> tuple[str, ...]:
    """A record's captions in order, without those that are empty or no UTF-8."""
    captions = record["caption"] if isinstance(record["caption"], tuple) else (record["caption"],)
    texts = []
    for caption in captions:
        with contextlib.suppress(UnicodeDecodeError):
            texts.append(caption.decode() if isinstance(caption, bytes) else caption)
    return tuple(text for text in texts if has_text(text))
