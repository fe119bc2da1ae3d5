"""The loss scale follows the rule of DeepSpeed up to 0.17.0, step by step."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from visionfm_jax.optim import loss_scale


class Restated:
    """DeepSpeed's dynamic scaler in its own terms: an iteration count, and the iteration of the last overflow.

    Defaults as DeepSpeed documents them for training in fp16: window 1000, hysteresis 2, minimum 1.
    """

    def __init__(self, window: int = 1000, hysteresis: int = 2, start: float = 2.0**16, least: float = 1.0):
        self.scale, self.window, self.full, self.least = start, window, hysteresis, least
        self.left, self.iteration, self.overflowed_at = hysteresis, 0, -1

    def step(self, overflow: bool) -> float:
        if overflow:
            if self.left > 1:
                self.left -= 1
            else:
                self.scale = max(self.scale / 2, self.least)
            self.overflowed_at = self.iteration
        elif (self.iteration - self.overflowed_at) % self.window == 0:
            self.left = self.full
            self.scale *= 2
        self.iteration += 1
        return self.scale


def scales(finite: list[bool]) -> list[float]:
    def one(state: loss_scale.LossScale, finite: jax.Array) -> tuple[loss_scale.LossScale, jax.Array]:
        state = loss_scale.update(state, finite)
        return state, state.scale

    return jax.jit(lambda f: jax.lax.scan(one, loss_scale.init(), f))(np.array(finite))[1].tolist()


def test_the_constants_are_the_recipe_s():
    assert (loss_scale.START, loss_scale.FACTOR, loss_scale.INTERVAL) == (65536, 2, 1000)
    assert (loss_scale.HYSTERESIS, loss_scale.FLOOR) == (2, 1)
    assert loss_scale.init().scale.dtype == np.float32


def test_growth_after_a_thousand_clean_steps_in_a_row():
    got = scales([True] * 2500)
    assert got == [2.0**16] * 999 + [2.0**17] * 1000 + [2.0**18] * 501
    got = scales([True] * 999 + [False] + [True] * 1000)
    assert got == [2.0**16] * 1999 + [2.0**17]  # the overflow spent hysteresis alone, and the count began anew


def test_hysteresis_is_spent_once_and_comes_back_with_growth():
    down = [False, False, False, True, False]  # only the first is forgiven, a clean step restores nothing
    assert scales(down) == [65536, 32768, 16384, 16384, 8192]
    got = scales([*down, *[True] * 1000, False, False])
    assert got[-3:] == [16384, 16384, 8192]


def test_the_floor():
    got = scales([False] * 20)
    assert got[:2] == [65536, 32768]
    assert got[16:] == [1, 1, 1, 1]
    assert got[15] == 2
    assert scales([False] * 20 + [True] * 1000)[-1] == 2


@pytest.mark.parametrize("share", [0.15, 0.25, 0.5])
def test_any_sequence_is_deepspeed_s(monkeypatch, share):
    monkeypatch.setattr(loss_scale, "INTERVAL", 7)
    finite = (np.random.default_rng(0).random(1000) > share).tolist()
    restated = Restated(window=7)
    assert scales(finite) == [np.float32(restated.step(not f)) for f in finite]
