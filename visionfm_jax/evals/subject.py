"""The interface by which an eval asks the model that it measures."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

# This host's rows of an evaluation batch, and which of the task's predictions, if it has several -> the task's
# `predict` for all hosts' rows, and all else of the batch but images and texts: `label`, `mask`, `record`, ….
Predict = Callable[..., dict[str, np.ndarray]]
