"""The trace of some steps."""

import jax
import pytest

from visionfm_jax.config import load
from visionfm_jax.errors import ConfigError
from visionfm_jax.telemetry.trace import SUBFOLDER, StepTrace


def steps_in(folder):
    """The numbers of the steps in the only trace below `folder`."""
    (file,) = (folder / SUBFOLDER).rglob("*.xplane.pb")
    events = [
        event
        for plane in jax.profiler.ProfileData.from_file(str(file)).planes
        for line in plane.lines
        for event in line.events
        if event.name == "train"
    ]
    return sorted(int(dict(event.stats)["step_num"]) for event in events)


def run(trace, steps):
    step = jax.jit(lambda x: x + 1)
    for i in steps:
        with trace.dispatching(i):
            jax.block_until_ready(step(i))
        trace.finished(i + 1)
    trace.close()


@pytest.mark.parametrize(
    ("profile", "steps", "traced"),
    [((3, 5), range(9), [3, 4, 5]), ((3, 5), range(4, 9), [4, 5]), ((3, 5), range(5), [3, 4])],
    ids=["whole", "continued within", "stopped within"],
)
def test_a_trace_has_its_steps(tmp_path, profile, steps, traced):
    notes = []
    run(StepTrace(profile, tmp_path, notes.append), steps)
    assert steps_in(tmp_path) == traced
    (note,) = notes
    assert "xprof --logdir=" in note


def test_without_a_trace_nothing_is_written(tmp_path):
    run(StepTrace((0, 0), tmp_path, pytest.fail), range(3))
    run(StepTrace((3, 5), tmp_path, pytest.fail), range(7, 9))
    assert not list(tmp_path.iterdir())


def test_a_trace_that_cannot_be_costs_a_line(tmp_path):
    notes = []
    with jax.profiler.trace(tmp_path / "other"):
        run(StepTrace((1, 2), tmp_path, notes.append), range(4))
    (note,) = notes
    assert note.startswith("no trace of steps: ")


@pytest.mark.parametrize("steps", ["(5, 3)", "(0, 5000)"])
def test_few_steps_in_order(steps):
    with pytest.raises(ConfigError, match=r"profile_steps = .* needs first <= last"):
        load.from_arguments(["--config=configs/quickstart.py", f"--config.telemetry.profile_steps={steps}"])
