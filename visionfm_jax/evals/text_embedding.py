"""Embeddings of texts by a contrastive model. Shapes: B texts of a batch, L tokens, E embedding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from visionfm_jax.data.tokenizer import Tokenizer
from visionfm_jax.evals.eval import Predict


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
