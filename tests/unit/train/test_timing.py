"""When to save and when to stop."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from visionfm_jax.config import CheckpointConfig, Config, TelemetryConfig
from visionfm_jax.errors import INTERRUPTED, PREEMPTED
from visionfm_jax.models.backbones.vit import ViTConfig
from visionfm_jax.tasks.classification import ClassificationConfig
from visionfm_jax.train import timing
from visionfm_jax.train.timing import SaveTimer, StopSignal


@pytest.fixture
def clock(monkeypatch):
    """Seconds, to be set by the test."""
    now = [1000.0]
    monkeypatch.setattr(timing.time, "monotonic", lambda: now[0])
    return now


def timer(steps: int = 0, minutes: float = 0.0, log_every: int = 1) -> SaveTimer:
    return SaveTimer(
        Config(
            name="timer",
            model=ViTConfig(),
            task=ClassificationConfig(),
            checkpoint=CheckpointConfig(every_steps=steps, every_minutes=minutes),
            telemetry=TelemetryConfig(log_every=log_every),
        )
    )


def test_saves_by_steps():
    due = timer(steps=5)
    assert [step for step in range(1, 16) if due(step)] == [5, 10, 15]


def test_saves_by_minutes_at_logging_steps(clock):
    due, saved = timer(minutes=1, log_every=10), []
    for step in range(1, 101):
        clock[0] += 4  # seconds a step: the minute is over after 15
        if due(step):
            saved.append(step)
    assert saved == [20, 40, 60, 80, 100]


def test_a_save_by_steps_starts_the_minute_anew(clock):
    due, saved = timer(steps=12, minutes=1), []
    for step in range(1, 31):
        clock[0] += 5.5
        if due(step):
            saved.append(step)
    assert saved == [11, 12, 23, 24]


def test_never_without_an_interval(clock):
    due = timer()
    clock[0] += 1e9
    assert not any(due(step) for step in range(1, 100))


@pytest.fixture
def stop():
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield StopSignal()
    signal.set_wakeup_fd(-1)
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, PREEMPTED), (signal.SIGINT, INTERRUPTED)])
def test_a_signal_stops_after_the_step(stop, number, code):
    assert not stop()
    os.kill(os.getpid(), number)
    assert stop()
    assert stop.exit_code == code


def test_a_second_interrupt_does_not_wait(stop):
    stop()
    os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


BUSY = """
import time
from visionfm_jax.train.timing import StopSignal
stop = StopSignal()
print("ready", flush=True)
while True:
    time.sleep(60)
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, PREEMPTED), (signal.SIGINT, INTERRUPTED)])
def test_with_nothing_to_save_it_ends_at_once(number, code):
    """Before the first step, and in an evaluation alone."""
    with subprocess.Popen(
        [sys.executable, "-c", BUSY], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        _, err = process.communicate(timeout=30)
    assert process.returncode == code
    assert err.splitlines()[-1] == "visionfm_jax: stopped before a new step: there is nothing new to save"
