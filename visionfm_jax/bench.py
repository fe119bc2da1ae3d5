"""Time the training step on synthetic data: `python -m visionfm_jax.bench --config=FILE.py[:VARIANT] …`.

Prints one line of JSON. The data of the configuration are opened with `--with-data` only: the same step is then timed
once more on the batches of the run, and its loader by itself. With --compare-plan=FILE, on a GPU, it also plans the
program that ran and adds both to FILE, by which `plan --calibration=FILE` corrects its times.

Without --with-data, only jax, flax, optax, chex, einops and absl-py are needed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import distributions
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from visionfm_jax.config import Config
from visionfm_jax.config.arguments import Parser, file_name
from visionfm_jax.errors import UserError, complain, entry_point
from visionfm_jax.parallel import cluster
from visionfm_jax.parallel.agreement import from_each
from visionfm_jax.parallel.mesh import BATCH, make_mesh, to_global
from visionfm_jax.parallel.targets import TARGETS, Cluster, Target, find_target, peak_flops, read_targets, sheet_of
from visionfm_jax.planning.calibration import append_record
from visionfm_jax.planning.compiled import GPU, described
from visionfm_jax.planning.estimate import estimate
from visionfm_jax.planning.rates import VERSION
from visionfm_jax.storage import check_writable
from visionfm_jax.train.state import TrainState
from visionfm_jax.train.step import Trainer, check_card

if TYPE_CHECKING:
    from jax.stages import Compiled

    from visionfm_jax.data.fields import Fields
    from visionfm_jax.data.sources import Source

NETWORK = ("remat", "scan_layers", "mlp_matmuls")  # what a step follows from, of each network
REACHED = 0.9  # share of the slower one's speed, from which on step and loader together are as fast as that one


def synthetic_batch(trainer: Trainer) -> dict[str, jax.Array]:
    """Random rows of the shapes and types that the task's loader gives, laid out on the mesh."""
    spec = trainer.task.batch_spec(trainer.config.train.batch_size)

    def make(key: jax.Array) -> dict[str, jax.Array]:
        high = {k: 256 if s.dtype == "uint8" else 2 for k, s in spec.items()}  # pixels; labels and tokens
        return {k: jax.random.randint(key, s.shape, 0, high[k]).astype(s.dtype) for k, s in spec.items()}

    return jax.jit(make, out_shardings=NamedSharding(trainer.mesh, BATCH))(jax.random.key(0))


def timed_steps(
    compiled: jax.stages.Compiled, state: TrainState, batches: Iterator[dict[str, jax.Array]], steps: int, warmup: int
) -> tuple[TrainState, dict[str, jax.Array], np.ndarray]:
    """State and metrics after the last step, and wall-clock seconds (steps,); the device always has a step queued."""
    marks, previous, metrics = [], None, {}
    for batch in itertools.islice(batches, warmup + steps + 1):
        state, metrics = compiled(state, batch)
        if previous is not None:
            jax.block_until_ready(previous)
        marks.append(time.perf_counter())
        previous = metrics["loss"]
    return state, metrics, np.diff(marks[warmup:])


def bound(step: float, loader: float, both: float) -> str:
    """What limits both together, by the images/s of each alone and of both."""
    if both < REACHED * min(step, loader):
        return "what step and loader share: cores, memory, the host's connection to the device"
    return "step" if step <= loader else "loader"


def measure_with_data(
    trainer: Trainer,
    data: tuple[list[Source], Fields],
    compiled: jax.stages.Compiled,
    state: TrainState,
    alone: float,
    steps: int,
    warmup: int,
) -> dict[str, Any]:
    """Time the loader of the run by itself, then the step on its batches.

    Args:
      trainer, compiled, state: the step.
      data: as `open_data` gives them.
      alone: images/s of the step by itself.
      steps: timed ones, also batches of the loader.
      warmup: untimed ones before.

    Returns:
      Figures of the JSON line.
    """
    from visionfm_jax.cli.data import open_loader  # this needs image libraries

    config, fields = trainer.config, trainer.task.batch_spec(1).keys()
    with open_loader(trainer, *data, 0) as loader:
        for _ in range(warmup + config.data.prefetch * max(1, loader.workers) + 2):  # what had been held ready
            next(loader)
        began = time.perf_counter()
        for _ in range(steps):
            next(loader)
        loading = config.train.batch_size * steps / (time.perf_counter() - began)
        batches = (to_global(trainer.mesh, {k: batch[k] for k in fields}) for batch in loader)
        seconds = timed_steps(compiled, state, batches, steps, warmup)[2]
    both = config.train.batch_size / seconds.mean()
    return {
        "images_per_s_with_data": round(both, 3),
        "images_per_s_of_loader": round(loading, 3),
        "bound_by": bound(alone, loading, both),
        "workers": loader.workers,
        "threads": config.data.threads,
    }


def measure(
    config: Config, steps: int = 20, warmup: int = 3, *, with_data: bool = False, compare: Cluster | None = None
) -> dict[str, Any]:
    """Compile and run the real step on random rows.

    Args:
      config: as for training.
      steps: timed ones.
      warmup: untimed ones before.
      with_data: also time the data of the configuration, by themselves and with the step; else they are not opened.
      compare: the devices at hand; also what `plan` says of the program that ran on them, as "plan".

    Returns:
      The figures of the JSON line, with units in their names.

    Raises:
      DataError, ConfigError: the data cannot be opened; before anything is compiled.
    """
    config.validate_devices(jax.device_count(), jax.process_count())
    trainer = Trainer(config, make_mesh(config.parallel.replicas))
    check_card(config, trainer.mesh)
    if with_data:
        from visionfm_jax.cli.data import open_data  # this needs image libraries

        data = open_data(config, trainer.task)
    state, batch = trainer.init(), synthetic_batch(trainer)
    if jax.process_index() == 0:
        complain("compiling the step …")
    began = time.perf_counter()
    compiled = trainer.step.lower(state, batch).compile()
    compile_seconds = time.perf_counter() - began
    memory = compiled.memory_analysis()

    state, metrics, seconds = timed_steps(compiled, state, itertools.repeat(batch), steps, warmup)
    # In fp16 gradients overflow until the loss scale has found its size, and the step does the same work.
    checked = "loss" if config.train.precision == "fp16" else "grad_norm"
    if not np.isfinite(float(metrics[checked])):
        raise UserError("the step gives a non-finite gradient; a figure for it would mean nothing")

    rate = config.train.batch_size / seconds.mean()
    tflops = trainer.task.step_flops / seconds.mean() / trainer.mesh.size / 1e12
    device = jax.devices()[0]
    peak = compare.target.peak_flops if compare else peak_flops(device.device_kind)
    stats = device.memory_stats() or {}
    with_loader = measure_with_data(trainer, data, compiled, state, rate, steps, warmup) if with_data else {}
    figures = {
        "config": config.name,
        "device": device.device_kind,
        "devices": trainer.mesh.size,
        "jax": jax.__version__,
        "batch_size": config.train.batch_size,
        "accumulate": config.train.accumulate,
        "precision": config.train.precision,
        "stage": config.parallel.stage,
        "attention": trainer.attention,
        **{
            field: {name: getattr(network, field) for name, network in config.model.networks().items()}
            for field in NETWORK
        },
        "images_per_s": round(rate, 3),
        **with_loader,
        "tflops_per_device": round(tflops, 4),
        "mfu": round(tflops * 1e12 / peak, 4) if peak else None,
        "step_ms": {f"p{q}": round(float(np.percentile(seconds, q)) * 1e3, 3) for q in (10, 50, 90, 99)},
        "compile_s": round(compile_seconds, 2),
        "peak_gib_measured": round(stats["peak_bytes_in_use"] / 2**30, 3) if "peak_bytes_in_use" in stats else None,
        "peak_gib_compiled": round(memory.peak_memory_in_bytes / 2**30, 3) if memory else None,
    }
    if compare:
        figures["plan"] = planned(trainer, compiled, compare)
    return figures


def planned(trainer: Trainer, compiled: Compiled, cluster: Cluster) -> dict[str, Any]:
    """What `plan` says of a step that was compiled for the GPUs of this cluster, without a calibration."""
    found = estimate(described(trainer, compiled, GPU, cluster.per_host, 0.0), cluster)
    return {
        "sheet": sheet_of(cluster.target),
        "seconds": found.modelled,
        "range_ms": [round(seconds * 1e3, 3) for seconds in found.range],
        "peak_gib": round(found.compiled.peak / 2**30, 3),
    }


def record_of(figures: dict[str, Any]) -> dict[str, Any]:
    """The measured step beside the planned one, as `plan --calibration` reads it."""
    plan = figures["plan"]
    cudnn = (d.version for d in distributions() if d.name.startswith("nvidia-cudnn"))
    about = (
        "device", "devices", "jax", "config", "batch_size", "accumulate", "precision", "stage", "attention", *NETWORK
    )  # fmt: skip
    return {
        **{name: figures[name] for name in about},
        "cudnn": next(cudnn, None),
        "rates": VERSION,
        "sheet": plan["sheet"],
        "measured_seconds": figures["step_ms"]["p50"] / 1e3,
        "planned_seconds": plan["seconds"],
        "measured_peak_gib": figures["peak_gib_measured"],
        "planned_peak_gib": plan["peak_gib"],
    }


def count_machines(hosts: Sequence[str]) -> int:
    """How many machines the processes run on, by the name of each one's host.

    Raises:
      UserError: neighbours do not share a machine, or machines have different numbers of processes.
    """
    runs = [(host, len(list(same))) for host, same in itertools.groupby(hosts)]
    if len(set(hosts)) < len(runs) or len({processes for _, processes in runs}) > 1:
        there = ", ".join(f"{processes} on {host}" for host, processes in runs[:8])
        raise UserError(
            f"--compare-plan: the processes run, in their order, {there}: a plan is for as many, and neighbours, on "
            "each machine; start them so (srun --distribution=block)"
        )
    return len(runs)


def cluster_at_hand(path: str, targets: dict[str, Target]) -> Cluster:
    """The devices of this run as a plan has them; all processes call this, before minutes of measuring.

    Raises:
      UserError: they are none that a plan knows.
    """
    device = jax.devices()[0]
    runs = f"--compare-plan={path}: the step runs on {device.device_kind}"
    if device.platform != "gpu":
        raise UserError(f"{runs}, for which there is no plan; run it on a GPU")
    if (target := find_target(device.device_kind, targets)) is None:
        raise UserError(f"{runs}, which is none of {', '.join(targets)}; describe it in a file for --targets")
    machines = count_machines(from_each(socket.gethostname()))
    return Cluster(target, machines, jax.device_count() // machines)


def any_length(config: Config, _: argparse.Namespace) -> None:
    """Set another length of the run than the recipe's, whose epochs of small batches may be too many steps."""
    config.train.steps, config.train.epochs = 1_000_000, 0


def main(argv: Sequence[str], program: str = "python -m visionfm_jax.bench") -> int:
    """Parse, measure, print."""
    parser = Parser(program, __doc__)
    parser.add_argument("--steps", type=int, default=20, help="steps to time (%(default)s)")
    parser.add_argument("--warmup", type=int, default=3, help="untimed steps before them (%(default)s)")
    parser.add_argument(
        "--compare-plan",
        metavar="FILE",
        type=file_name,
        help="add the step, measured and planned, to this file for plan --calibration",
    )
    parser.add_argument(
        "--targets", metavar="FILE.toml", type=file_name, help="more GPUs, for --compare-plan; see docs/plan.md"
    )
    parser.add_argument(
        "--with-data", action="store_true", help="also time the run's own data: its loader alone, and with the step"
    )
    config, arguments = parser.parse_with_config(argv, any_length)
    if arguments.steps < 1 or arguments.warmup < 1:
        raise UserError(f"--steps={arguments.steps} --warmup={arguments.warmup}: both must be at least 1; raise them")
    path = arguments.compare_plan
    if arguments.targets and not path:
        raise UserError("--targets: is for --compare-plan; add --compare-plan=FILE, or leave it out")
    targets = read_targets(arguments.targets) if arguments.targets else TARGETS
    process, _ = cluster.initialize()

    def work() -> int:
        compare = cluster_at_hand(path, targets) if path else None
        if path and process == 0:
            check_writable(path, "--compare-plan")
        figures = measure(config, arguments.steps, arguments.warmup, with_data=arguments.with_data, compare=compare)
        if process == 0:
            print(json.dumps(figures), flush=True)
            if path:  # last: a full disk does not lose the figures
                append_record(path, record_of(figures))
        return 0

    return cluster.run_together(work)


if __name__ == "__main__":
    sys.exit(entry_point(main)(sys.argv[1:]))
