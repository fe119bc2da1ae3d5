"""What processes compare before they go on; with two real ones in `tests/distributed/test_views.py`."""

import json

import jax
import pytest

from visionfm_jax.errors import StorageError
from visionfm_jax.parallel import agreement, cluster


class Store(dict):
    """A key-value store whose other processes have written nothing but `said`, under keys with this ending."""

    def __init__(self, **said: str):
        super().__init__()
        self.said = said

    def key_value_set(self, key: str, value: str) -> None:
        self[key] = value

    def blocking_key_value_get(self, key: str, milliseconds: int) -> str:
        if key in self:
            return self[key]
        if (end := f"of_{key[-1]}") in self.said:
            return json.dumps(self.said[end])
        raise TimeoutError(f"waits for {key}")


@pytest.fixture
def first_of_two(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: 0)
    return lambda store: monkeypatch.setattr(cluster, "store", lambda: store)


def test_the_first_process_waits_until_the_others_have_compared_too(first_of_two):
    """A collective that it entered alone would give up long before a slow host has opened its data."""
    first_of_two(Store())
    with pytest.raises(TimeoutError, match=r"waits for visionfm_jax/agreement/\d+/1$"):
        agreement.require_same([1, "a"], "data.train")
    first_of_two(Store(of_1=""))
    agreement.require_same([1, "a"], "data.train")


def test_every_process_names_the_one_that_sees_something_else(first_of_two):
    first_of_two(Store(of_1="config.data.train: process 1 sees other values than process 0"))
    with pytest.raises(StorageError, match=r"^config\.data\.train: process 1 sees .* than process 0; make sure that"):
        agreement.require_same([1, "a"], "data.train")
