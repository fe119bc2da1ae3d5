"""Agreement between processes: what one finds out counts for all, as they must decide alike.

A file system over a network may show two hosts different states of a folder for a while, and a disk may fail for one of
them alone. Where each decided for itself, one would wait for ever in a collective that the others never enter.

Values go through the key-value store of `jax.distributed`, which waits as long as it takes: hosts may be hours apart
when they have opened their datasets, and collectives on CPUs give up after half a minute.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from typing import Any

import jax

from visionfm_jax.errors import StorageError
from visionfm_jax.parallel import cluster

_DAY = 24 * 3600 * 1000  # milliseconds; who dies meanwhile is noticed by `parallel.peers`
_numbers = itertools.count()  # of the questions, which all processes ask in the same order


def from_first(make: Callable[[], Any]) -> Any:
    """What `make()` gives on process 0, on every process; all call this at the same place.

    An error of `make` ends process 0, and with it the others (`cluster.run_together`).

    Args:
      make: gives a JSON value: of lists, dicts with str keys, str, numbers (also NaN), bool and None.
    """
    if jax.process_count() == 1:
        return make()
    key = _key()
    if jax.process_index() == 0:
        cluster.store().key_value_set(key, json.dumps(make()))
    return json.loads(cluster.store().blocking_key_value_get(key, _DAY))


def from_each(own: Any) -> list[Any]:
    """What the processes give here, JSON values, in the order of their numbers; all call this at the same place."""
    if jax.process_count() == 1:
        return [own]
    key = _key()
    cluster.store().key_value_set(f"{key}/{jax.process_index()}", json.dumps(own))
    return [json.loads(cluster.store().blocking_key_value_get(f"{key}/{i}", _DAY)) for i in range(jax.process_count())]


def first_text(own: str) -> str:
    """Of the texts that the processes give here, the first that is not empty; "": all are."""
    return next(filter(None, from_each(own)), "")


def require_same(value: Any, field: str) -> None:
    """Refuse to go on where a process sees something else than process 0 does; returns when all have come here.

    Args:
      value: JSON, of lists, str and numbers.
      field: of the configuration, that it follows from.

    Raises:
      StorageError: they differ.
    """
    other = from_first(lambda: value) != value
    text = f"config.{field}: process {jax.process_index()} sees other values than process 0" if other else ""
    if text := first_text(text):
        raise StorageError(f"{text}; make sure that all hosts see the same files, then start the same command again")


def _key() -> str:
    return f"visionfm_jax/agreement/{next(_numbers)}"
