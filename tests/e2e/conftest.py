"""What the end-to-end tests share: compiled programs and one undisturbed run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from runs import compiled_once, once, run


@pytest.fixture(scope="session", autouse=True)
def shared(tmp_path_factory) -> Iterator[Path]:
    with compiled_once(tmp_path_factory) as folder:
        yield folder


@pytest.fixture(scope="session")
def whole(shared) -> Path:
    """The folder of a run that nothing disturbed, with checkpoints at steps 20, 40 and 60; not to be changed."""
    return once(shared / "whole", run)
