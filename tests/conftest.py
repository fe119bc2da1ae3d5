"""What every test finds: eight virtual devices, set before JAX is imported anywhere, and signals at their defaults."""

import gc
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ["XLA_FLAGS"] = " ".join(
    [os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=8"]
).strip()
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

# A shell that starts the tests in the background has them ignore SIGINT, and with them every program that they start.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Pieces of memory that Linux lets a process map, 65,530 as it comes. A program compiled without optimisations takes a
# thousand of them, and the one that finds none left aborts the process.
MAPS = Path("/proc/self/maps")
MANY = 20_000


@pytest.fixture(scope="module", autouse=True)
def _not_too_many_programs() -> Iterator[None]:
    yield
    if MAPS.exists() and MAPS.read_bytes().count(b"\n") > MANY:
        import jax

        jax.clear_caches()
        gc.collect()
