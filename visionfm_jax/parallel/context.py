"""The context that a step hands to a loss beside parameters and rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax


class Context(NamedTuple):
    """The context of one step, the same for all its micro-batches, without gradients.

    Attributes:
      step: int32, how many steps the run has done.
      teacher: the averaged parameters, in the form that the loss gets its parameters in; None: the task has no teacher.
      state: the task's own arrays between steps (centres, queues, …), whole; None: it has none.
      counts: the task's `counts` of the global batch, divided by the number of micro-batches of all devices. So a
        micro-batch's sum over what was counted, divided by the count, is the sum over the whole batch divided by the
        number in it, once the step has taken the mean over micro-batches and devices.
    """

    step: jax.Array
    teacher: Any = None
    state: Any = None
    counts: Mapping[str, jax.Array] = {}
