"""How close two fp32 computations must be; README.md says why."""

from __future__ import annotations

import numpy as np

FORWARD, FORWARD_MAX = 3e-6, 1e-5  # ||a - b|| / ||b||, max |a - b| / max |b|
GRADIENT, GRADIENT_TENSOR = 1e-5, 5e-5  # over all parameters, over the worst one


def relative(a: np.ndarray, b: np.ndarray) -> float:
    """||a - b|| / ||b||."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))
