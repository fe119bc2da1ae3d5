"""Protocols and digests: how a number was measured, and of which model, so that only what is alike is compared."""

from __future__ import annotations

import contextlib
import hashlib
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

from visionfm_jax.config import Config, SourceConfig
from visionfm_jax.config.schema import to_dict
from visionfm_jax.data.sources import Source
from visionfm_jax.data.tokenizer import Tokenizer, file_digest
from visionfm_jax.errors import DataError


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
    """The part of texts of `context` tokens; a tokenizer's file counts by its content, whatever its name.

    Raises:
      DataError: the file cannot be read.
    """
    return {"tokenizer": file_digest(tokenizer.name), "context": context}


def digest_of(params: Any, config: Config) -> str:
    """16 hex digits of a model: its weights, and what of its configuration decides what they compute.

    Args:
      params: arrays, all of them on this host.
      config: of the model; a tokenizer's file counts by its content, if it is there.
    """
    tokenizer = getattr(config.task, "tokenizer", "")
    with contextlib.suppress(DataError):  # who reads texts by it says that it is not there
        tokenizer = tokenizer and file_digest(tokenizer)
    about = {
        "model": to_dict(config.model),
        "task": {**to_dict(config.task), "tokenizer": tokenizer},
        "precision": config.train.precision,
        "pixels": [config.data.augment.mean, config.data.augment.std],
    }
    digest = hashlib.blake2b(json.dumps(about, sort_keys=True, default=str).encode(), digest_size=8)
    for path, leaf in jax.tree.leaves_with_path(params):
        digest.update(jax.tree_util.keystr(path).encode())
        digest.update(np.ascontiguousarray(leaf))
    return digest.hexdigest()
