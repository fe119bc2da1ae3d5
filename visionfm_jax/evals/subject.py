"""What an eval is given of the model it measures."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

# This host's rows of an evaluation batch -> the task's `predict` for all hosts' rows, with `label` and `mask`.
Predict = Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]
