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


# Folders whose files take longest come first: launch/test.sh hands out whole files in this order, so that both workers
# are busy to the end and what the tests of a file share is made once.
LONGEST_FIRST = ("e2e", "distributed", "parity", "unit/models", "golden")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order the files of tests; those of a file stay together."""
    tests = Path(__file__).parent

    def place(item: pytest.Item) -> int:
        folder = item.path.parent.relative_to(tests).as_posix()
        return LONGEST_FIRST.index(folder) if folder in LONGEST_FIRST else len(LONGEST_FIRST)

    items.sort(key=place)


@pytest.fixture(scope="module", autouse=True)
def _not_too_many_programs() -> Iterator[None]:
    yield
    if MAPS.exists() and MAPS.read_bytes().count(b"\n") > MANY:
        import jax

        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="module")
def quick_compiles() -> Iterator[None]:
    """Programs compiled without most optimisations, for small networks: compiling takes nearly all of their time."""
    import jax

    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
