"""Interrupt a tiny run at random moments, continue it with the same command, and compare it bit for bit.

    python tools/attack/interruptions.py --count=100

An uninterrupted reference run saves its state after every step. Other runs are sent SIGKILL, SIGTERM or SIGINT in one
of six phases, repeatedly, until they complete: during start, compilation (for another number of devices), steps,
saving, evaluation, and at the end, when pictures are drawn. After each interruption, the newest checkpoint and the
metrics up to it must equal those of the reference, bit for bit; at the end, so must the whole run. The exit code is 1
if anything differs.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from absl import logging  # noqa: E402
from runs import EVERY, SMALL, STEPS, finish, start, state, steps  # noqa: E402

from visionfm_jax.telemetry.writers import read_metrics  # noqa: E402

PHASES = ("start", "compile", "step", "save", "evaluation", "end")
KINDS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
CODES = {signal.SIGKILL: {-signal.SIGKILL}, signal.SIGTERM: {75}, signal.SIGINT: {130}}
CLOCKS = ("images_per_s", "tflops_per_device", "data_wait", "mfu")  # what differs between any two runs
BASE = [
    *(word for word in SMALL if "evals" not in word and "log_every" not in word and "keep_last" not in word),
    "--config.evals[0].source.split=combinations",
    "--config.evals[0].batch_size=16",
    f"--config.evals[0].every_steps={EVERY}",
    "--config.telemetry.log_every=7",  # divides no step at which a state is saved
    "--config.checkpoint.keep_last=1000",
]


@dataclasses.dataclass
class Reference:
    """The undisturbed run."""

    folder: Path

    def differences(self, folder: Path, step: int) -> list[str]:
        """Of the run in `folder`, whose newest checkpoint is that of `step`."""
        mine, theirs = state(folder, step), state(self.folder, step)
        found = [f"{name} at step {step}" for name in theirs if mine[name].tobytes() != theirs[name].tobytes()]
        expected, got = rows(self.folder, step), rows(folder, step)
        found += [f"metrics of step {row['step']}: {row}" for row in got if row not in expected]
        found += [f"metrics lack step {row['step']}: {row}" for row in expected if row not in got and "loss" in row]
        if len(got) > len(expected):
            found.append("metrics hold a line twice")
        return found


def rows(folder: Path, step: int) -> list[dict[str, Any]]:
    """The lines of metrics up to `step`, without what clocks say."""
    return [{k: v for k, v in row.items() if k not in CLOCKS} for row in read_metrics(folder) if row["step"] <= step]


def newest(folder: Path) -> int:
    """Step of the newest checkpoint; 0: none."""
    return max(steps(folder), default=0) if (folder / "checkpoints").is_dir() else 0


def is_in(phase: str, folder: Path, log: Path, target: int) -> bool:
    """Whether the run that writes to `log` is in `phase`; between steps: has done `target`."""
    saved, out = newest(folder), Path(f"{log}.out").read_text()
    last = max((row["step"] for row in read_metrics(folder)), default=0)
    if phase == "compile":
        return "starts from" in out
    if phase == "step":
        return last >= target
    if phase == "save":
        return any((folder / "checkpoints").glob("*.orbax-checkpoint-tmp*"))
    if phase == "evaluation":
        at = folder / "checkpoints" / str(saved)
        return "starts from" in out and saved > 0 and saved % EVERY == 0 and not (at / "scores.json").exists()
    if phase == "end":
        return (folder / "checkpoints" / str(STEPS) / "scores.json").exists() and "starts from" in out
    return True


def interrupt(phase: str, kind: signal.Signals, folder: Path, log: Path, rng: random.Random) -> tuple[bool, str]:
    """Start the run in `folder` and send it `kind` in `phase`; whether it came to that, and what is wrong with it."""
    devices = rng.choice((1, 4)) if phase == "compile" else 2
    every = rng.choice((5, 8, 20))
    logged = read_metrics(folder)
    process = start(folder, f"--config.checkpoint.every_steps={every}", devices=devices, base=BASE, log=log)
    if phase == "start":
        time.sleep(rng.uniform(0, 4))
    # Beyond what an earlier attempt has logged, which is there until the new one begins to log.
    target = max([newest(folder), *(row["step"] for row in logged)]) + rng.randint(1, 15)
    end = time.monotonic() + 600
    while process.poll() is None and not is_in(phase, folder, log, target):
        if time.monotonic() > end:
            process.kill()
            return True, "hangs: the phase was not reached in 600 s"
        time.sleep(0.001)
    if phase in ("evaluation", "end"):
        time.sleep(rng.uniform(0, 0.2))
    early = process.poll() is None
    # While Python starts, signals have their ordinary effect.
    young = "starts from" not in Path(f"{log}.out").read_text()
    if early:
        process.send_signal(kind)
    try:
        code = process.wait(300)
    except subprocess.TimeoutExpired:
        process.kill()
        return True, f"{kind.name} does not end it in 300 s"
    errors = Path(f"{log}.err").read_text()
    allowed = {0} | (CODES[kind] if early else set()) | ({-kind, 1} if young and early else set())
    if code not in allowed:
        return early, f"exit code {code}: {errors[-400:]}"
    if "Traceback" in errors and not young:
        return early, f"traceback: {errors[-400:]}"
    return early, ""


def main() -> int:
    """Run the attack; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100, help="number of interruptions (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="random seed (%(default)s)")
    parser.add_argument("--folder", type=Path, help="folder to keep the runs in (a temporary one)")
    arguments = parser.parse_args()
    logging.set_verbosity(logging.ERROR)  # Orbax misses a file when it reads one item of a checkpoint alone
    rng = random.Random(arguments.seed)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell in the background has its children ignore it
    base = arguments.folder or Path(tempfile.mkdtemp(prefix="interruptions-"))
    base.mkdir(parents=True, exist_ok=True)
    os.environ |= {
        "JAX_COMPILATION_CACHE_DIR": str(base / "compiled"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PLATFORMS": "cpu",
    }  # fmt: skip
    began = time.monotonic()
    reference = Reference(base / "reference")
    whole = start(reference.folder, "--config.checkpoint.every_steps=1", base=BASE)
    finish(whole, reference.folder, seconds=900)
    print(f"reference run: {STEPS} steps, {time.monotonic() - began:.0f} s", flush=True)

    # Every phase with every kind equally often, in random order; the phases at the end of a run do not fit its middle.
    trials = [(phase, kind) for phase in PHASES for kind in KINDS]
    trials = [trials[i % len(trials)] for i in range(arguments.count)]
    rng.shuffle(trials)
    made: collections.Counter = collections.Counter()
    wrong: list[str] = []
    run = 0
    while trials or run == 0:
        run += 1
        folder = base / f"run-{run}"
        complete = False
        while not complete:
            saved = newest(folder)
            fits = [t for t in trials if t[0] not in ("evaluation", "save", "step") or saved < STEPS - 15]
            fits = [t for t in fits if t[0] != "end" or saved >= STEPS // 2] or [t for t in fits if t[0] == "end"]
            if not fits or saved >= STEPS:
                log = base / f"run-{run}-last"
                process = start(folder, "--config.checkpoint.every_steps=20", base=BASE, log=log)
                try:
                    finish(process, log, seconds=900)
                except AssertionError as error:
                    wrong.append(f"run {run} cannot be continued: {error}")
                complete = True
                found = reference.differences(folder, STEPS)
                found += [f"{name} is missing" for name in ("learning_curves.png",) if not (folder / name).exists()]
                if rows(folder, STEPS) != rows(reference.folder, STEPS):
                    found.append("the metrics of the whole run differ")
                wrong += [f"run {run}, complete: {line}" for line in found]
                break
            phase, kind = fits[0]
            trials.remove((phase, kind))
            name = f"run-{run}-{sum(made.values())}-{phase}-{kind.name}"
            early, fault = interrupt(phase, kind, folder, base / name, rng)
            made[phase, kind.name if early else "ended before"] += 1
            if fault:
                wrong.append(f"{name}: {fault}")
            if saved := newest(folder):
                wrong += [f"{name}: {line}" for line in reference.differences(folder, saved)]
            print(f"{sum(made.values()):4} {name}: newest step {saved}, {len(wrong)} wrong so far", flush=True)

    columns = [*(kind.name for kind in KINDS), "ended before"]
    print(f"\n| phase | {' | '.join(columns)} |\n| --- | {' | '.join(['---:'] * len(columns))} |")
    for phase in PHASES:
        print(f"| {phase} | {' | '.join(str(made[phase, c]) for c in columns)} |")
    minutes = (time.monotonic() - began) / 60
    print(f"\n{sum(made.values())} interruptions in {run} runs, {minutes:.0f} minutes; {len(wrong)} wrong")
    print(*wrong[:50], sep="\n")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
