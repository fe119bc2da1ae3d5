"""Decisions when to stop and when to save, which every host must take alike."""

from __future__ import annotations

import os
import signal
import threading
import time

import jax
import numpy as np
from jax.experimental import multihost_utils

from visionfm_jax.config import Config
from visionfm_jax.errors import INTERRUPTED, PREEMPTED, complain
from visionfm_jax.parallel import cluster


class StopSignal:
    """SIGTERM (a scheduler's notice) and Ctrl-C ask for a saved state and an end; a second Ctrl-C ends at once.

    Until it is first asked, after the first step of this start, there is nothing to save: they end the program at
    once, with the same codes, even while a program is compiled, which no handler of Python's could interrupt. It is
    made before the processes meet, so that this holds from the beginning on. With several hosts the notice may reach
    one of them only: JAX's preemption service then agrees on a step.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._asked, self._stop, self._several = 0, False, False
        signal.signal(signal.SIGINT, self._receive)
        signal.signal(signal.SIGTERM, self._receive)
        arrivals, notice = os.pipe()
        os.set_blocking(notice, False)
        signal.set_wakeup_fd(notice, warn_on_full_buffer=False)  # written to whatever the main thread does
        threading.Thread(target=self._watch, args=(arrivals,), name="signals", daemon=True).start()

    def _receive(self, number: int, _: object) -> None:
        if number == signal.SIGINT and self.received == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number
        if self._several:
            os.kill(os.getpid(), signal.SIGTERM)  # what the service listens to

    def _watch(self, arrivals: int) -> None:
        while number := os.read(arrivals, 1):
            if number[0] in (signal.SIGINT, signal.SIGTERM) and not self._asked:
                text = "stopped before a new step: there is nothing new to save"
                complain(text)
                cluster.end_all(INTERRUPTED if number[0] == signal.SIGINT else PREEMPTED, text)

    def __call__(self) -> bool:
        """Whether to stop here; asked on every host at every step and evaluation batch."""
        self._asked += 1
        if self._asked == 1 and jax.process_count() > 1:
            cluster.listen_for_preemption()  # it has its own handler of SIGTERM
            self._several = True
            if self.received:
                os.kill(os.getpid(), signal.SIGTERM)
        if not self._stop:  # the service says so once, at the question that all hosts have in common
            self._stop = (
                multihost_utils.reached_preemption_sync_point(self._asked) if self._several else bool(self.received)
            )
        return self._stop

    @property
    def exit_code(self) -> int:
        """Of a run that was stopped and saved."""
        return INTERRUPTED if self.received == signal.SIGINT else PREEMPTED


class SaveTimer:
    """The clock that says when a checkpoint is due, by steps or by minutes."""

    def __init__(self, config: Config):
        self.every_steps = config.checkpoint.every_steps
        self.every_seconds = config.checkpoint.every_minutes * 60
        self.look_every = config.telemetry.log_every  # hosts' clocks differ: asking the first one costs a message
        self.last = time.monotonic()

    def __call__(self, step: int) -> bool:
        """Whether to save after `step`; asked on every host at every step, with one answer."""
        if self.every_steps and step % self.every_steps == 0:
            self.last = time.monotonic()
            return True
        if not self.every_seconds or step % self.look_every:
            return False
        due = np.asarray(time.monotonic() - self.last >= self.every_seconds)
        if jax.process_count() > 1:
            due = multihost_utils.broadcast_one_to_all(due)
        if due:
            self.last = time.monotonic()
        return bool(due)
