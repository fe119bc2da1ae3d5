"""Estimates corrected by measurements: `visionfm bench --compare-plan` writes them, `visionfm plan` reads them.

Seconds of a step are those of the model, each kind times a factor. Before any measurement a factor is 1, give or take
what is known of the card. Every measured step then moves the factors by as much as it tells of them (linear regression
with that prior, in units of the measured time), and the range shrinks by the same rule.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from visionfm_jax.errors import OutputError, UserError
from visionfm_jax.parallel.targets import TARGETS, Target, find_target
from visionfm_jax.planning.rates import VERSION, rates_of

MATMULS, ATTENTION, ELSE, WAITS = KINDS = ("matmuls", "attention", "all else", "waits")
# Standard deviations of the factors.
MEASURED = (0.04, 0.12, 0.05, 0.5)  # of a card that the rates were fitted to; no network was measured
UNMEASURED = (0.08, 0.25, 0.10, 0.5)
STEP = 0.02  # of a measured step, that no factor explains


class Calibration(NamedTuple):
    """What is known of a card."""

    factors: dict[str, float]  # by kind
    covariance: np.ndarray  # (kinds, kinds) of the factors
    source: str  # in words

    def deviation(self, modelled: dict[str, float]) -> float:
        """Standard deviation of the seconds of a step."""
        seconds = np.array([modelled[kind] for kind in KINDS])
        total = sum(self.factors[kind] * modelled[kind] for kind in KINDS)
        return float(np.sqrt(seconds @ self.covariance @ seconds + (STEP * total) ** 2))


def calibration_of(target: Target) -> Calibration:
    """What is known of a card without a file."""
    measured = rates_of(target).measured
    source = "calibrated on one H100, 3 steps" if measured else "from data sheets and published rates, not measured"
    return Calibration(dict.fromkeys(KINDS, 1.0), np.diag(np.square(MEASURED if measured else UNMEASURED)), source)


def read_calibration(path: str, target: Target) -> Calibration:
    """The same, corrected by the steps of a file that were measured on this card.

    Raises:
      UserError: no such file, a line that is no record, or none of this card.
    """
    try:
        lines = Path(path).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--calibration={path}: cannot be read: {error}") from error
    records = [_record(path, number, line) for number, line in enumerate(lines, 1) if line.strip()]
    devices = sorted({device for device, _, _ in records})
    records = [r for r in records if (card := find_target(r[0])) and card.description == target.description]
    if not records:
        there = ", ".join(devices) or "nothing"
        known = any(card.description == target.description for card in TARGETS.values())
        remedy = (
            f"run visionfm bench --compare-plan={path} there"
            if known
            else "leave --calibration out: only cards of the built-in table can be measured"
        )
        raise UserError(f"--calibration={path}: measured on {there}, not on {target.description}; {remedy}")
    prior = calibration_of(target)
    modelled = np.array([seconds for _, seconds, _ in records])
    measured = np.array([seconds for _, _, seconds in records])
    rows, precision = modelled / measured[:, None], np.linalg.inv(prior.covariance)
    covariance = np.linalg.inv(precision + rows.T @ rows / STEP**2)
    factors = 1 + covariance @ rows.T @ (1 - rows.sum(1)) / STEP**2
    steps = f"{len(records)} measured step{'s' * (len(records) > 1)}"
    return Calibration(dict(zip(KINDS, factors.tolist(), strict=True)), covariance, f"calibrated by {path}, {steps}")


def _record(path: str, number: int, line: str) -> tuple[str, list[float], float]:
    """(device, modelled seconds by kind, measured seconds) of a line."""
    try:
        record = json.loads(line)
        device = str.strip(record["device"])  # a text
        modelled = [float(record["planned_seconds"][kind]) for kind in KINDS]
        measured, version = float(record["measured_seconds"]), record["rates"]
    except (ValueError, KeyError, TypeError) as error:
        what = f"lacks {error}" if isinstance(error, KeyError) else "is no record"
        raise UserError(
            f"--calibration={path}: line {number} {what}; delete it, or measure again by visionfm bench --compare-plan"
        ) from error
    if version != VERSION:
        raise UserError(
            f"--calibration={path}: line {number} was planned with version {version!r} of the rates, and here it is "
            f"{VERSION}; delete it, or measure again by visionfm bench --compare-plan"
        )
    if not all(0 <= n < np.inf for n in modelled) or not 0 < measured < np.inf:
        raise UserError(f"--calibration={path}: line {number}: seconds must be finite and positive; delete that line")
    return device, modelled, measured


def append_record(path: str, record: dict[str, Any]) -> None:
    """Add a line to a file of measurements.

    Raises:
      OutputError: it cannot be written.
    """
    try:
        with open(path, "a") as file:
            file.write(json.dumps(record) + "\n")
    except OSError as error:
        raise OutputError(
            f"--compare-plan={path}: {error.strerror}; make room, then measure again: nothing was added to the file"
        ) from error
