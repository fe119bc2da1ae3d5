"""What one process finds out counts for all: what they read and then decide on must be the same everywhere.

A file system over a network may show two hosts different states of a folder for a while, and a disk may fail for one of
them alone. Where each decided for itself, one would wait for ever in a collective that the others never enter.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

LONGEST = 1000  # bytes of a text of `first_text`


def from_first(make: Callable[[], Any]) -> Any:
    """What `make()` gives on process 0, on every process; all call this at the same place.

    An error of `make` ends process 0, and with it the others (`cluster.run_together`).

    Args:
      make: gives a JSON value of lists, dicts with str keys, str, numbers (also NaN), bool and None.
    """
    if jax.process_count() == 1:
        return make()
    content = json.dumps(make()).encode() if jax.process_index() == 0 else b""
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(content))))
    padded = np.frombuffer(content.ljust(size), np.uint8)
    return json.loads(np.asarray(multihost_utils.broadcast_one_to_all(padded), np.uint8).tobytes())


def first_text(own: str) -> str:
    """Of the texts that the processes give here, the first that is not empty; "": all are."""
    if jax.process_count() == 1:
        return own
    content = own.encode()[:LONGEST].ljust(LONGEST, b"\0")
    rows = multihost_utils.process_allgather(np.frombuffer(content, np.uint8))
    texts = (np.asarray(row, np.uint8).tobytes().rstrip(b"\0").decode(errors="ignore") for row in rows)
    return next(filter(None, texts), "")
