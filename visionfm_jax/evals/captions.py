"""Captions of a record, as they are compared."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

from visionfm_jax.data.sources.record import has_text


def captions_of(record: Mapping[str, Any]) -> tuple[str, ...]:
    """A record's captions in order, without those that are empty or no UTF-8."""
    captions = record["caption"] if isinstance(record["caption"], tuple) else (record["caption"],)
    texts = []
    for caption in captions:
        with contextlib.suppress(UnicodeDecodeError):
            texts.append(caption.decode() if isinstance(caption, bytes) else caption)
    return tuple(text for text in texts if has_text(text))
