"""Protocols: what was measured, so that numbers are compared only where they can be."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from visionfm_jax.config import SourceConfig
from visionfm_jax.data.sources import Source
from visionfm_jax.data.tokenizer import Tokenizer


def protocol_of(settings: dict[str, Any]) -> str:
    """8 hex digits by which to tell whether two numbers were measured the same way."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]


def measured_on(source: Source, config: SourceConfig) -> dict[str, Any]:
    """A dataset's part of a protocol, the same on every machine: name, length, and a digest of what it is made of."""
    content = {
        "classes": source.class_names or (),
        "things": getattr(source, "things", ()),
        "parts": source.fingerprint(),
    }
    return {
        "dataset": Path(config.path).name,
        "split": config.split,
        "records": len(source),
        "content": protocol_of(content),
    }


def texts_of(tokenizer: Tokenizer, context: int) -> dict[str, Any]:
    """The part of texts of `context` tokens."""
    return {"tokenizer": Path(tokenizer.name).name, "context": context}
