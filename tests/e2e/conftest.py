"""What the end-to-end tests share: compiled programs and one undisturbed run."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from runs import once, run


@pytest.fixture(scope="session")
def shared(tmp_path_factory) -> Path:
    """One folder for all processes of the test session."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session", autouse=True)
def compiled_once(shared):
    """The same program is compiled once for all runs; what it computes stays the same to the last bit."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(shared / "compiled"))
        patch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        yield


@pytest.fixture(scope="session")
def whole(shared, compiled_once) -> Path:
    """The folder of a run that nothing disturbed, with checkpoints at steps 20, 40 and 60; not to be changed."""
    return once(shared / "whole", run)
