"""Protocols: what was measured, so that numbers are compared only where they can be."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from visionfm_jax.data.sources import Source


def protocol_of(settings: dict[str, Any]) -> str:
    """8 hex digits by which to tell whether two numbers were measured the same way."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]


def measured_on(source: Source, path: str, split: str) -> dict[str, Any]:
    """A dataset's part of a protocol: its name and length, the same on every machine."""
    return {"dataset": Path(path).name, "split": split, "records": len(source)}
