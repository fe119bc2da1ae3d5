"""Training end to end: killed and continued, finished, continued in another folder. Part of the quick tests."""

from __future__ import annotations

import signal
import time

from runs import (
    EVERY,
    STEPS,
    assert_identical,
    copy,
    finish,
    last_step,
    losses,
    run,
    start,
    state,
    steps,
    until,
)


def test_killed_in_the_middle_of_a_save(tmp_path, whole):
    folder = tmp_path / "run"
    process = start(folder, "--config.checkpoint.every_steps=1")

    def half_written():
        return [p.name for p in (folder / "checkpoints").glob("*.orbax-checkpoint-tmp*")]

    while True:
        until(lambda: last_step(folder) > 5 and half_written(), process)
        process.send_signal(signal.SIGSTOP)
        time.sleep(0.05)
        if half_written():
            break
        process.send_signal(signal.SIGCONT)
    process.send_signal(signal.SIGKILL)
    finish(process, folder, code=-signal.SIGKILL)
    assert half_written()

    newest = steps(folder)[-1]
    out, _ = run(folder)
    assert f"starts from      step {newest} of its own folder" in out
    assert not half_written()
    assert_identical(state(folder), state(whole))


def test_a_finished_run_is_not_trained_again(tmp_path, whole):
    folder = copy(whole, tmp_path / "run", STEPS)
    out, _ = run(folder)
    assert f"starts from      step {STEPS} of its own folder" in out
    assert f"the run was complete already, with {STEPS} steps; to train on, raise config.train.steps" in out
    assert losses(folder) == losses(whole)
    assert f"finished, step {STEPS} of {STEPS}" in (whole / "report.html").read_text()
    # Also where the run was shortened meanwhile: a scheduler must not start it again and again.
    run(folder, f"--config.train.steps={STEPS - 10}")


def test_resume_continues_another_run(tmp_path, whole):
    first = copy(whole, tmp_path / "first", EVERY * 2)
    folder = tmp_path / "second"
    out, _ = run(folder, f"--config.checkpoint.resume={first}")
    assert f"starts from      step {EVERY * 2} of {first}" in out
    assert_identical(state(folder), state(whole))
    assert list(losses(folder)) == list(range(EVERY * 2 + 1, STEPS + 1))
