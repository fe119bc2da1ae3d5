"""Kill, stop or terminate each process of a run in every phase, and check how the others end.

    python tools/attack/processes.py --processes=4

Each case is a run of the smallest model on this machine. One process sends itself the signal in the given phase:

    join       on entering jax.distributed.initialize, after all processes have met
    restore    on entering the restoration of a checkpoint
    compile    0.3 s into the first step, while it is traced and compiled
    step       while the device is busy with the third step
    save       while a checkpoint is being written
    evaluate   while the device is busy with a batch of an evaluation

A case of SIGKILL or SIGSTOP passes if every other process ends within two minutes of the signal, with exit code 71 and
one line on stderr that names the lost process and its host. A case of SIGTERM passes if all processes, including the
signalled one, end with 75 in that time. The exit code is 1 if any case fails.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PHASES = ("join", "restore", "compile", "step", "save", "evaluate")
SIGNALS = ("SIGKILL", "SIGSTOP", "SIGTERM")
LIMIT = 120  # seconds after the signal
START = 240  # seconds until the phase is reached
RUN = [
    "--config=configs/vit_huge.py:tiny",
    "--config.model.image_size=16",
    "--config.train.batch_size=16",
    "--config.train.steps=8",
    "--config.train.precision=fp32",
    "--config.optim.warmup_steps=2",
    "--config.checkpoint.every_steps=4",
    "--config.evals[0].batch_size=16",
    "--config.evals[0].every_steps=4",
    "--config.telemetry.log_every=1",
    "--config.telemetry.tensorboard=false",
]


@dataclasses.dataclass
class Case:
    """One signal to one process, and what came of it."""

    phase: str
    rank: int
    signal: str
    seconds: float = 0.0  # until the last survivor ended
    codes: tuple[int | None, ...] = ()  # of the survivors
    lines: tuple[str, ...] = ()  # the errors they wrote, without their own number
    fault: str = ""  # what is not as it should be

    def row(self) -> str:
        codes = ", ".join(sorted({str(c) for c in self.codes}))
        said = " / ".join(sorted(set(self.lines)))
        return f"| {self.phase} | {self.rank} | {self.signal} | {self.seconds:.1f} | {codes} | {self.fault or said} |"


def strike(number: int, mark: str) -> None:
    """Say when, then be gone."""
    Path(mark).write_text(str(time.time()))
    os.kill(os.getpid(), number)


def worker(phase: str, name: str, mark: str, silence: str) -> None:
    """A process of the run that sends itself the signal `name` at `phase`; `phase` "-": an ordinary one.

    `silence`: seconds after which a process counts as stopped; 0: those of the package.
    """
    import jax

    from visionfm_jax import main
    from visionfm_jax.parallel import peers
    from visionfm_jax.train.checkpoint import Checkpoints
    from visionfm_jax.train.step import Trainer

    number = signal.Signals[name]
    peers.SILENCE = float(silence) or peers.SILENCE

    def before(owner: Any, method: str) -> None:
        original = getattr(owner, method)

        def struck(*args: Any, **kwargs: Any) -> Any:
            strike(number, mark)
            return original(*args, **kwargs)

        setattr(owner, method, struck)

    def after_calls(method: str, calls: int) -> None:
        """When the trainer's `method` has been called that often, and its result is not yet there."""
        make, count = Trainer.__init__, [0]

        def made(self: Trainer, *args: Any) -> None:
            make(self, *args)
            original = getattr(self, method)

            def counted(*args: Any) -> Any:
                result = original(*args)
                count[0] += 1
                if count[0] == calls:
                    strike(number, mark)
                return result

            setattr(self, method, counted)

        Trainer.__init__ = made

    if phase == "join":
        before(jax.distributed, "initialize")
    elif phase == "restore":
        before(Checkpoints, "_read")
    elif phase == "compile":
        make = Trainer.__init__

        def made(self: Trainer, *args: Any) -> None:
            make(self, *args)
            original = self.step

            def timed(*args: Any) -> Any:
                threading.Timer(0.3, strike, (number, mark)).start()
                self.step = original
                return original(*args)

            self.step = timed

        Trainer.__init__ = made
    elif phase == "step":
        after_calls("step", 3)
    elif phase == "save":
        save = Checkpoints.save

        def saved(*args: Any, **kwargs: Any) -> None:
            save(*args, **kwargs)
            strike(number, mark)

        Checkpoints.save = saved
    elif phase == "evaluate":
        after_calls("predict", 2)
    sys.exit(main.entry_point(main.main)(sys.argv[1:]))


def start(folder: Path, case: Case | None, rank: int, processes: int, port: int, silence: float) -> subprocess.Popen:
    """One process of a run; it sends itself the signal of `case` if that is its own."""
    struck = case is not None and case.rank == rank
    words = [case.phase if struck else "-", case.signal if struck else "SIGKILL", str(folder / "mark"), str(silence)]
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": "--xla_force_host_platform_device_count=1",
        "VISIONFM_COORDINATOR": f"127.0.0.1:{port}",
        "VISIONFM_PROCESSES": str(processes),
        "VISIONFM_PROCESS": str(rank),
    }
    with open(folder / f"{rank}.out", "w") as out, open(folder / f"{rank}.err", "w") as err:
        return subprocess.Popen(
            [sys.executable, __file__, "--worker", *words, *RUN, f"--config.workdir={folder / 'run'}"],
            cwd=ROOT, env=environment, stdout=out, stderr=err,
        )  # fmt: skip


def start_all(folder: Path, case: Case | None, processes: int, silence: float) -> list[subprocess.Popen]:
    """All processes of a run."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [start(folder, case, rank, processes, port, silence) for rank in range(processes)]


def attack(case: Case, processes: int, scratch: Path, whole: Path | None = None, silence: float = 0) -> Case:
    """Run the case and fill in what came of it; its folder stays if that is not good."""
    folder = scratch / f"{case.phase}-{case.rank}-{case.signal}"
    folder.mkdir()
    if case.phase == "restore":
        shutil.copytree(whole, folder / "run")
        shutil.rmtree(folder / "run" / "checkpoints" / "8")
    run = start_all(folder, case, processes, silence)
    survivors = [p for rank, p in enumerate(run) if rank != case.rank or case.signal == "SIGTERM"]
    mark, end = folder / "mark", time.time() + START
    try:
        while not (mark.exists() and mark.read_text()) and time.time() < end:
            time.sleep(0.05)
        if not mark.exists():
            case.fault = f"the phase was not reached; see {folder}"
            return case
        struck = float(mark.read_text())
        while any(p.poll() is None for p in survivors) and time.time() < struck + LIMIT:
            time.sleep(0.05)
        case.seconds = time.time() - struck
        case.codes = tuple(p.poll() for p in survivors)
    finally:
        for process in run:
            process.kill()
            process.wait()
    errors = [(folder / f"{rank}.err").read_text() for rank in range(processes) if rank != case.rank]
    lines = [[line for line in text.splitlines() if "error" in line.lower()] for text in errors]
    case.lines = tuple(line.split(": ", 3)[-1] for found in lines for line in found)
    who = f"process {case.rank} on {socket.gethostname()} "
    if any(code != (75 if case.signal == "SIGTERM" else 71) for code in case.codes):
        case.fault = f"exit codes {case.codes}; see {folder}"
    elif case.signal != "SIGTERM" and any(len(found) != 1 or who not in found[0] for found in lines):
        case.fault = f"not one line that names {who.strip()}; see {folder}"
    elif any("Traceback" in text or "*** Check" in text for text in errors):
        case.fault = f"a stack of calls; see {folder}"
    else:
        shutil.rmtree(folder)
    return case


def undisturbed(scratch: Path, processes: int) -> Path:
    """A complete run, which also fills the compilation cache."""
    folder = scratch / "whole"
    folder.mkdir()
    codes = [p.wait() for p in start_all(folder, None, processes, 0)]
    if any(codes):
        sys.exit(f"the undisturbed run ended with {codes}; see {folder}")
    return folder / "run"


def main() -> int:
    """Attack, print the table, and say whether all was good."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=4, help="processes per run (%(default)s)")
    parser.add_argument("--phases", nargs="+", default=PHASES, choices=PHASES)
    parser.add_argument("--ranks", nargs="+", type=int, help="processes to signal (all)")
    parser.add_argument("--signals", nargs="+", default=SIGNALS, choices=SIGNALS)
    parser.add_argument("--jobs", type=int, default=1, help="runs in parallel (%(default)s)")
    arguments = parser.parse_args()

    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(tempfile.gettempdir(), "attack-compiled")))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
    scratch = Path(tempfile.mkdtemp(prefix="attack-processes-"))
    whole = undisturbed(scratch, arguments.processes)
    ranks = arguments.ranks or range(arguments.processes)
    cases = [Case(p, r, s) for p in arguments.phases for s in arguments.signals for r in ranks]
    print("| phase | rank | signal | seconds | exit codes | the survivors say |\n|---|---|---|---|---|---|", flush=True)
    bad = 0
    with concurrent.futures.ThreadPoolExecutor(arguments.jobs) as pool:
        for case in pool.map(lambda case: attack(case, arguments.processes, scratch, whole), cases):
            print(case.row(), flush=True)
            bad += bool(case.fault)
    import jax

    print(
        f"\n{len(cases) - bad} of {len(cases)} good; {arguments.processes} processes, jax {jax.__version__}, "
        f"python {platform.python_version()}"
    )
    return 1 if bad else 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        words, sys.argv[1:] = sys.argv[2:6], sys.argv[6:]
        worker(*words)
    else:
        sys.exit(main())
