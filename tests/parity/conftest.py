"""Parity is judged in full fp32, whatever the backend's default."""

from collections.abc import Iterator

import jax
import pytest


@pytest.fixture(autouse=True)
def _full_precision() -> Iterator[None]:
    with jax.default_matmul_precision("highest"):
        yield
