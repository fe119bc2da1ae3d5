"""Captions of a record, as they are compared, and what has them."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from visionfm_jax.data.fields import NoFields, Row
from visionfm_jax.data.sources import Source
from visionfm_jax.data.sources.record import DamagedRecord, has_text
from visionfm_jax.errors import DataError


def require_captions(sources: Sequence[Source], kind: str) -> None:
    """Nothing if all have them, which an eval of `kind` reads.

    Raises:
      DataError: one has none.
    """
    for source in sources:
        if not source.has_captions:
            raise DataError(f"{source.name} has no captions, which {kind} needs; set caption_key, or another source")


def captions_of(record: Mapping[str, Any]) -> tuple[str, ...]:
    """A record's captions in order, without those that are empty or no UTF-8."""
    captions = record["caption"] if isinstance(record["caption"], tuple) else (record["caption"],)
    texts = []
    for caption in captions:
        with contextlib.suppress(UnicodeDecodeError):
            texts.append(caption.decode() if isinstance(caption, bytes) else caption)
    return tuple(text for text in texts if has_text(text))


class CaptionedImages(NoFields):
    """Nothing beside the image; those without a readable caption are damaged."""

    def __call__(self, record: Mapping[str, Any], rng: np.random.Generator | None = None) -> Row:
        if not captions_of(record):
            raise DamagedRecord("there is no caption that is UTF-8 and not empty")
        return {}
