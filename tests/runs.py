"""Real runs of the training command, small enough to start in a few seconds."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from visionfm_jax.config import CheckpointConfig
from visionfm_jax.telemetry.writers import read_metrics
from visionfm_jax.train.checkpoint import Checkpoints

ROOT = Path(__file__).parents[1]
STEPS, EVERY, BATCH = 60, 20, 16
SMALL = [
    "--config=configs/vit_huge.py:tiny",
    "--config.model.image_size=16",
    f"--config.train.batch_size={BATCH}",
    f"--config.train.steps={STEPS}",
    "--config.train.precision=fp32",
    "--config.optim.warmup_steps=4",
    "--config.optim.ema=0.9",
    f"--config.checkpoint.every_steps={EVERY}",
    "--config.checkpoint.keep_last=3",
    "--config.evals=()",
    "--config.telemetry.log_every=1",
    "--config.telemetry.tensorboard=false",
]


def environment(devices: int) -> dict[str, str]:
    """Of a process with that many virtual devices."""
    flags = re.sub(r"(--xla_force_host_platform_device_count)=\d+", rf"\1={devices}", os.environ["XLA_FLAGS"])
    quick = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}  # compiling takes nearly all the time of small networks
    return {**quick, **os.environ, "XLA_FLAGS": flags}


def start(
    folder: Path,
    *arguments: str,
    devices: int = 2,
    base: Sequence[str] = SMALL,
    prefix: Sequence[str] = (),
    env: dict[str, str] | None = None,
    log: Path | None = None,
    cwd: Path = ROOT,
) -> subprocess.Popen:
    """A run of `base` in `folder`, behind the words `prefix`; output to LOG.out and LOG.err, else beside the folder.

    Later arguments win.
    """
    command = [*prefix, sys.executable, "-m", "visionfm_jax.main", *base, f"--config.workdir={folder}", *arguments]
    with open(f"{log or folder}.out", "w") as out, open(f"{log or folder}.err", "w") as err:
        environ = {**environment(devices), **(env or {})}
        return subprocess.Popen(command, cwd=cwd, env=environ, stdout=out, stderr=err)


def finish(process: subprocess.Popen, log: Path, code: int = 0, seconds: float = 180) -> tuple[str, str]:
    """Wait for the exit code `code`; returns stdout and stderr."""
    try:
        got = process.wait(seconds)
    finally:
        process.kill()
    out, err = Path(f"{log}.out").read_text(), Path(f"{log}.err").read_text()
    assert got == code, f"exit code {got}, not {code}:\n{out}\n{err}"
    assert "Traceback" not in err, err
    assert "WARNING" not in err, err
    return out, err


def start_processes(
    folder: Path,
    count: int,
    *arguments: str,
    devices: int = 1,
    own: Sequence[Sequence[str]] | None = None,
    base: Sequence[str] = SMALL,
) -> list[subprocess.Popen]:
    """One run of `base` in so many processes, of so many devices each; `own` are the arguments of each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{free.getsockname()[1]}"
    environ = {"VISIONFM_COORDINATOR": coordinator, "VISIONFM_PROCESSES": str(count)}
    return [
        start(
            folder,
            *arguments,
            *(own[i] if own else ()),
            devices=devices,
            base=base,
            log=Path(f"{folder}-{i}"),
            env=environ | {"VISIONFM_PROCESS": str(i)},
        )
        for i in range(count)
    ]


def finish_processes(
    processes: Sequence[subprocess.Popen], folder: Path, code: int = 0, seconds: float = 180
) -> list[tuple[str, str]]:
    """As `finish`, of each."""
    try:
        return [finish(p, Path(f"{folder}-{i}"), code, seconds) for i, p in enumerate(processes)]
    finally:
        for process in processes:
            process.kill()


def run(folder: Path, *arguments: str, code: int = 0, devices: int = 2) -> tuple[str, str]:
    return finish(start(folder, *arguments, devices=devices), folder, code)


def only_error(err: str) -> str:
    """The one line that stderr has besides the progress lines."""
    lines = [line for line in err.splitlines() if not line.startswith("step ")]
    assert len(lines) == 1, err
    assert lines[0].startswith("visionfm_jax: error: "), err
    return lines[0]


def until(condition: Callable[[], bool], process: subprocess.Popen, seconds: float = 120) -> None:
    """Wait for it; the process must live."""
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, f"ended with {process.returncode} too early"
        assert time.monotonic() < end, "did not happen in time"
        time.sleep(0.002)


def signal_after(process: subprocess.Popen, folder: Path, step: int, number: signal.Signals) -> None:
    """Send a signal soon after `step` is done."""
    until(lambda: last_step(folder) >= step, process)
    process.send_signal(number)


def kill_a_worker(process: subprocess.Popen) -> None:
    """SIGKILL for one of the processes that a command with --jobs has started."""
    for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes():
            return os.kill(int(child), signal.SIGKILL)
    raise AssertionError("no worker is there")


def last_step(folder: Path) -> int:
    rows = read_metrics(folder)
    return rows[-1]["step"] if rows else 0


def losses(folder: Path) -> dict[int, float]:
    """Step to loss; each step once."""
    rows = [row for row in read_metrics(folder) if "loss" in row]
    out = {row["step"]: row["loss"] for row in rows}
    assert len(out) == len(rows), "a step was logged twice"
    return out


def steps(folder: Path) -> list[int]:
    """Of the complete checkpoints."""
    return sorted(int(p.name) for p in (folder / "checkpoints").iterdir() if p.name.isdigit())


def state(folder: Path, step: int | None = None) -> dict[str, np.ndarray]:
    """A checkpoint (the newest), path to array."""
    path = folder.absolute() / "checkpoints" / str(step or steps(folder)[-1]) / "default"
    with ocp.PyTreeCheckpointer() as reader:
        tree = reader.metadata(path).item_metadata.tree
        arguments = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        tree = reader.restore(path, restore_args=arguments)
    return {jax.tree_util.keystr(k): np.asarray(v) for k, v in jax.tree_util.tree_leaves_with_path(tree)}


def samples(folder: Path) -> list[list[int]]:
    """By the newest checkpoint: of each process, how many samples it has seen since the run began, and damaged ones."""
    with Checkpoints(folder, CheckpointConfig(), read_only=True) as checkpoints:
        return checkpoints.record(steps(folder)[-1])["samples"]


def assert_identical(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
    """To the last bit."""
    assert a.keys() == b.keys()
    other = [k for k in a if a[k].tobytes() != b[k].tobytes()]
    assert not other, f"{len(other)} of {len(a)} arrays differ: {other[:4]}"


def files(folder: Path) -> dict[str, bytes]:
    """Everything in a folder, to show that nothing was lost."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def copy(whole: Path, to: Path, *keep: int) -> Path:
    """A run folder of which only some checkpoints are there; its later metrics remain, as after a crash."""
    shutil.copytree(whole, to)
    for step in steps(to):
        if step not in keep:
            shutil.rmtree(to / "checkpoints" / str(step))
    return to


@contextlib.contextmanager
def compiled_once(factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder for all processes of the test session.

    In it, the same program is compiled once for all runs; what it computes stays the same to the last bit.
    """
    base = factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(shared / "compiled"))
        patch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        yield shared


def once(folder: Path, make: Callable[[Path], object]) -> Path:
    """`folder`, made by the first of several test processes to come."""
    with open(f"{folder}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not Path(f"{folder}.done").exists():
            make(folder)
            Path(f"{folder}.done").touch()
    return folder
