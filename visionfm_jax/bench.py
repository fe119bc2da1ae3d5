"""Time the training step on synthetic data: `python -m visionfm_jax.bench --config=FILE.py[:VARIANT] …`.

The data of the configuration are not opened. Prints one line of JSON. With --compare-plan=FILE, on a GPU, it also plans
the program that ran and adds both to FILE, by which `plan --calibration=FILE` corrects its times.

Needs only jax, flax, optax, chex, einops and absl-py.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from importlib.metadata import distributions
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from visionfm_jax.config import Config
from visionfm_jax.config.arguments import Parser
from visionfm_jax.errors import UserError, entry_point
from visionfm_jax.parallel import cluster
from visionfm_jax.parallel.mesh import BATCH, make_mesh
from visionfm_jax.parallel.targets import TARGETS, Cluster, find_target, peak_flops
from visionfm_jax.planning.calibration import append_record, check_appendable
from visionfm_jax.planning.compiled import GPU, described
from visionfm_jax.planning.estimate import estimate
from visionfm_jax.train.step import Trainer

if TYPE_CHECKING:
    from jax.stages import Compiled


def synthetic_batch(trainer: Trainer) -> dict[str, jax.Array]:
    """Random rows of the shapes and types that the task's loader gives, laid out on the mesh."""
    spec = trainer.task.batch_spec(trainer.config.train.batch_size)

    def make(key: jax.Array) -> dict[str, jax.Array]:
        high = {k: 256 if s.dtype == "uint8" else 2 for k, s in spec.items()}  # pixels; labels and tokens
        return {k: jax.random.randint(key, s.shape, 0, high[k]).astype(s.dtype) for k, s in spec.items()}

    return jax.jit(make, out_shardings=NamedSharding(trainer.mesh, BATCH))(jax.random.key(0))


def measure(config: Config, steps: int = 20, warmup: int = 3, compare: bool = False) -> dict[str, Any]:
    """Compile and run the real step; seconds are wall-clock, the device always has a step queued.

    Args:
      config: as for training; its data is not opened.
      steps: timed ones.
      warmup: untimed ones before.
      compare: also what `plan` says of the program that ran, as "plan".

    Returns:
      The figures of the JSON line, with units in their names.
    """
    config.validate_devices(jax.device_count(), jax.process_count())
    trainer = Trainer(config, make_mesh(config.parallel.replicas))
    state, batch = trainer.init(), synthetic_batch(trainer)
    began = time.perf_counter()
    compiled = trainer.step.lower(state, batch).compile()
    compile_seconds = time.perf_counter() - began
    memory = compiled.memory_analysis()

    marks, previous = [], None
    for _ in range(warmup + steps + 1):
        state, metrics = compiled(state, batch)
        if previous is not None:
            jax.block_until_ready(previous)
        marks.append(time.perf_counter())
        previous = metrics["loss"]
    seconds = np.diff(marks[warmup:])
    # In fp16 gradients overflow until the loss scale has found its size, and the step does the same work.
    checked = "loss" if config.train.precision == "fp16" else "grad_norm"
    if not np.isfinite(float(metrics[checked])):
        raise UserError("the step gives a non-finite gradient; a figure for it would mean nothing")

    rate = config.train.batch_size / seconds.mean()
    tflops = trainer.task.step_flops / seconds.mean() / trainer.mesh.size / 1e12
    device = jax.devices()[0]
    peak, stats = peak_flops(device.device_kind), device.memory_stats() or {}
    figures = {
        "config": config.name,
        "device": device.device_kind,
        "devices": trainer.mesh.size,
        "jax": jax.__version__,
        "batch_size": config.train.batch_size,
        "accumulate": config.train.accumulate,
        "precision": config.train.precision,
        "stage": config.parallel.stage,
        "attention": {name: network.attention for name, network in config.model.networks().items()},
        "remat": {name: network.remat for name, network in config.model.networks().items()},
        "images_per_s": round(rate, 3),
        "tflops_per_device": round(tflops, 4),
        "mfu": round(tflops * 1e12 / peak, 4) if peak else None,
        "step_ms": {f"p{q}": round(float(np.percentile(seconds, q)) * 1e3, 3) for q in (10, 50, 90, 99)},
        "compile_s": round(compile_seconds, 2),
        "peak_gib_measured": round(stats["peak_bytes_in_use"] / 2**30, 3) if "peak_bytes_in_use" in stats else None,
        "peak_gib_compiled": round(memory.peak_memory_in_bytes / 2**30, 3) if memory else None,
    }
    if compare:
        figures["plan"] = planned(trainer, compiled)
    return figures


def planned(trainer: Trainer, compiled: Compiled) -> dict[str, Any]:
    """What `plan` says of a step that was compiled for the GPUs at hand, without a calibration."""
    cluster = Cluster(find_target(jax.devices()[0].device_kind), jax.process_count(), jax.local_device_count())
    found = estimate(described(trainer, compiled, GPU, cluster.per_host, 0.0), cluster)
    return {
        "seconds": found.modelled,
        "range_ms": [round(seconds * 1e3, 3) for seconds in found.range],
        "peak_gib": round(found.compiled.peak / 2**30, 3),
    }


def record_of(figures: dict[str, Any]) -> dict[str, Any]:
    """The measured step beside the planned one, as `plan --calibration` reads it."""
    plan = figures["plan"]
    cudnn = (d.version for d in distributions() if d.name.startswith("nvidia-cudnn"))
    kept = (
        "device",
        "devices",
        "jax",
        "config",
        "batch_size",
        "accumulate",
        "precision",
        "stage",
        "attention",
        "remat",
    )
    return {
        **{name: figures[name] for name in kept},
        "cudnn": next(cudnn, None),
        "measured_seconds": figures["step_ms"]["p50"] / 1e3,
        "planned_seconds": plan["seconds"],
        "measured_peak_gib": figures["peak_gib_measured"],
        "planned_peak_gib": plan["peak_gib"],
    }


def check_comparable(path: str) -> None:
    """Before minutes of measuring.

    Raises:
      UserError: the devices are none that a plan knows, or the file cannot be written.
    """
    device = jax.devices()[0]
    if device.platform != "gpu" or find_target(device.device_kind) is None:
        raise UserError(
            f"--compare-plan={path}: the step runs on {device.device_kind}, for which there is no plan; "
            f"run it on one of {', '.join(TARGETS)}"
        )
    check_appendable(path)


def main(argv: Sequence[str], program: str = "python -m visionfm_jax.bench") -> int:
    """Parse, measure, print."""
    parser = Parser(program, __doc__)
    parser.add_argument("--steps", type=int, default=20, help="steps to time (%(default)s)")
    parser.add_argument("--warmup", type=int, default=3, help="untimed steps before them (%(default)s)")
    parser.add_argument(
        "--compare-plan", metavar="FILE", help="add the step, measured and planned, to this file for plan --calibration"
    )
    config, arguments = parser.parse_with_config(argv)
    if arguments.steps < 1 or arguments.warmup < 1:
        raise UserError(f"--steps={arguments.steps} --warmup={arguments.warmup}: both must be at least 1; raise them")
    process, _ = cluster.initialize()
    path = arguments.compare_plan

    def work() -> int:
        if path:
            check_comparable(path)
        figures = measure(config, arguments.steps, arguments.warmup, compare=bool(path))
        if process == 0:
            if path:
                append_record(path, record_of(figures))
            print(json.dumps(figures), flush=True)
        return 0

    return cluster.run_together(work)


if __name__ == "__main__":
    sys.exit(entry_point(main)(sys.argv[1:]))
