"""Estimates corrected by measurements: `visionfm bench --compare-plan` writes them, `visionfm plan` reads them.

Seconds of a step are those of the model, each kind times a factor. Before any measurement a factor is 1, give or take
what is known of the card. Every measured step then moves the factors by as much as it tells of them: regression with
that prior, in logarithms, so that half and twice the time are as far from the plan and no factor is negative. The range
follows by the same rule.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from visionfm_jax.errors import OutputError, UserError, complain, printable
from visionfm_jax.parallel.targets import CHIP, TARGETS, Target, chip_of, find_target, sheet_of
from visionfm_jax.planning.rates import VERSION, rates_of
from visionfm_jax.storage import append_line

MATMULS, ATTENTION, ELSE, WAITS = KINDS = ("matmuls", "attention", "all else", "waits")
# Standard deviations of the factors' logarithms.
MEASURED = (0.04, 0.12, 0.05, 0.5)  # of a card that the rates were fitted to; no network was measured
UNMEASURED = (0.08, 0.25, 0.10, 0.5)
FP8 = (0.15, 0.0, 0.10, 0.0)  # at the least, with FP8 products and quantising, which no card was timed with
STEP = 0.02  # of that of a measured step, which no factor explains
SHORTEST, LONGEST = 1e-6, 1e6  # seconds of a step


class Calibration(NamedTuple):
    """What is known of a card."""

    factors: dict[str, float]  # by kind
    covariance: np.ndarray  # (kinds, kinds) of the factors' logarithms
    source: str  # in words

    def deviation(self, modelled: dict[str, float]) -> float:
        """Standard deviation of the logarithm of a step's seconds."""
        seconds = np.array([self.factors[kind] * modelled[kind] for kind in KINDS])
        shares = seconds / seconds.sum()
        return float(np.sqrt(shares @ self.covariance @ shares + STEP**2))


def calibration_of(target: Target, *, fp8: bool) -> Calibration:
    """What is known of a card without a file; `fp8`: of a step with FP8 products."""
    card = find_target(target.description)
    measured = card is not None and chip_of(card) == chip_of(target) and rates_of(target).measured
    source = "calibrated on one H100, 3 steps" if measured else "from data sheets and published rates, not measured"
    if measured and fp8:
        source += " in 16 bit; FP8 from published rates, not measured"
    deviations = np.maximum(MEASURED if measured else UNMEASURED, FP8 if fp8 else 0)
    return Calibration(dict.fromkeys(KINDS, 1.0), np.diag(np.square(deviations)), source)


def read_calibration(path: str, target: Target, *, fp8: bool) -> Calibration:
    """The same, corrected by the steps of a file that were measured on this card, with FP8 products or without.

    Raises:
      UserError: no such file, a line that is no record, or none of such steps.
    """
    try:
        lines = Path(path).read_text("utf-8-sig").splitlines()  # with the mark of editors for Windows or without
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--calibration={path}: cannot be read: {error}") from error
    records = {number: _record(path, number, line) for number, line in enumerate(lines, 1) if line.strip()}
    again = f"visionfm bench --compare-plan={path}"
    if not records:
        raise UserError(f"--calibration={path}: is empty; measure steps by {again}")
    here = {number: r for number, r in records.items() if _is_of(r.device, target)}
    if not here:
        devices = ", ".join(sorted({printable(r.device) for r in records.values()}))
        own = target not in TARGETS.values()
        more = " --targets=FILE, in which description is the device's name," if own else ""
        raise UserError(
            f"--calibration={path}: measured on {devices}, not on {target.description}; run {again}{more} there"
        )
    here = {number: r for number, r in here.items() if _same_figures(r, target)}
    if not here:
        raise UserError(
            f"--calibration={path}: measured on this card, but planned with other figures of it than those of "
            f"{target.name}; measure again by {again}, with the --targets that the plan has"
        )
    here = {number: r for number, r in here.items() if r.fp8 == fp8}
    if not here:
        kinds = ("without", "with") if fp8 else ("with", "without")
        raise UserError(
            f"--calibration={path}: all steps of this card were measured {kinds[0]} FP8 products, and the plan is of "
            f"one {kinds[1]}; measure one by {again}, or leave --calibration out"
        )
    modelled = np.array([r.planned for r in here.values()])
    measured = np.array([r.measured for r in here.values()])
    logs, covariance = _regress(modelled, measured, calibration_of(target, fp8=fp8).covariance)
    misses = np.abs(np.log(modelled @ np.exp(logs) / measured))
    if strange := [str(number) for number, miss in zip(here, misses, strict=True) if miss > 3 * STEP]:
        complain(
            f"--calibration={path}: line {', '.join(strange)}: no factors explain the measured seconds to "
            f"{3 * STEP:.0%}; measure again, or delete what was measured on a busy machine"
        )
    steps = f"{len(here)} measured step{'s' * (len(here) > 1)}"
    factors = dict(zip(KINDS, np.exp(logs).tolist(), strict=True))
    return Calibration(factors, covariance, f"calibrated by {path}, {steps}")


def _is_of(device: str, target: Target) -> bool:
    """Whether a device, by its name, is such a card: one that a file describes, or of the built-in table."""
    card = find_target(device)
    return target.description in (device, card and card.description)


def _same_figures(record: _Record, target: Target) -> bool:
    """Whether a step was planned with the figures of this card, and of its networks if it waited for them."""
    sheet = sheet_of(target)
    return all(record.sheet.get(k) == sheet[k] for k in (sheet if record.planned[KINDS.index(WAITS)] else CHIP))


def _regress(modelled: np.ndarray, measured: np.ndarray, prior: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Logarithms of the factors, most likely ones, and their covariance, by Gauss-Newton steps.

    Steps that lie far outside of what the prior allows show that less was known: its deviations are multiplied by the
    number that makes the measurements most likely (MacKay, "Bayesian interpolation", 1992, section 4), if more than 1.

    Args:
      modelled: seconds by step and kind (steps, kinds).
      measured: seconds (steps,).
      prior: covariance (kinds, kinds).
    """
    logs, widened = np.zeros(len(KINDS)), 1.0
    inverse = np.linalg.inv(prior)

    def misfit(logs: np.ndarray) -> float:
        misses = np.log(modelled @ np.exp(logs) / measured)
        return misses @ misses / STEP**2 + logs @ inverse @ logs / widened

    for _ in range(100):
        seconds = modelled * np.exp(logs)
        shares = seconds / seconds.sum(1, keepdims=True)
        misses = np.log(measured / seconds.sum(1))
        covariance = np.linalg.inv(inverse / widened + shares.T @ shares / STEP**2)
        nearest = np.clip(covariance @ shares.T @ (misses + shares @ logs) / STEP**2, -50, 50)
        logs = min((logs + (nearest - logs) / 2**i for i in range(12)), key=misfit)  # it may have gone too far
        told = len(KINDS) - np.trace(covariance @ inverse) / widened  # how many numbers the steps determine
        widened = max(1.0, logs @ inverse @ logs / told)
    return logs, covariance


class _Record(NamedTuple):
    """A line of a file of measurements."""

    device: str  # as the driver names it
    sheet: dict[str, Any]  # the figures that it was planned with
    fp8: bool  # whether it has FP8 products
    planned: list[float]  # seconds by kind
    measured: float  # seconds


def _record(path: str, number: int, line: str) -> _Record:
    """A line, checked."""
    try:
        record = json.loads(line)
        device = str.strip(record["device"])  # a text
        sheet, fp8 = dict(record["sheet"]), "fp8" in dict(record["mlp_matmuls"]).values()
        planned = [record["planned_seconds"][kind] for kind in KINDS]
        measured, version = record["measured_seconds"], record["rates"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        what = f"lacks {error}" if isinstance(error, KeyError) else "is no record"
        raise UserError(
            f"--calibration={path}: line {number} {what}; delete it, or measure again by visionfm bench --compare-plan"
        ) from error
    if version != VERSION:
        raise UserError(
            f"--calibration={path}: line {number} was planned with version {version!r} of the rates, and here it is "
            f"{VERSION}; delete it, or measure again by visionfm bench --compare-plan"
        )
    numbers = all(type(seconds) in (int, float) and 0 <= seconds <= LONGEST for seconds in (*planned, measured))
    if not numbers or min(sum(planned), measured) < SHORTEST:
        raise UserError(
            f"--calibration={path}: line {number}: seconds must be numbers of at most {LONGEST:g}, those of the kinds "
            f"at least 0, and those of a step from {SHORTEST:g}; delete that line"
        )
    return _Record(device, sheet, fp8, planned, measured)


def append_record(path: str, record: dict[str, Any]) -> None:
    """Add a line to a file of measurements.

    Raises:
      OutputError: it cannot be written.
    """
    try:
        append_line(Path(path), json.dumps(record))
    except OSError as error:
        raise OutputError(
            f"--compare-plan={path}: {error.strerror}; make room, then measure again: nothing was added to the file"
        ) from error
