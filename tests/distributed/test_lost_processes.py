"""A run of two of which one is lost in the middle of a step; the whole form is tools/attack/processes.py."""

from __future__ import annotations

import importlib.util
import sys

import pytest
from runs import ROOT, compiled_once


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """The program of the attack, with the compiled programs of the test session."""
    spec = importlib.util.spec_from_file_location("attack_processes", ROOT / "tools/attack/processes.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with compiled_once(tmp_path_factory), pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # compiling takes nearly all the time
        yield module


@pytest.mark.parametrize(("rank", "signal"), [(1, "SIGKILL"), (0, "SIGSTOP")])
def test_the_survivor_ends_and_names_the_lost_one(tmp_path, processes, rank, signal):
    case = processes.attack(processes.Case("step", rank, signal), 2, tmp_path, silence=20)
    assert not case.fault
    assert case.codes == (71,)
    assert case.seconds < 60
