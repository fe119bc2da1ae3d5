"""The training step of a configuration, compiled for a cluster's GPUs, without them.

Each compile is a process of its own (`python -m visionfm_jax.planning.compiled`): it needs its own XLA settings,
several run side by side, and one that crashes takes nothing along. Results are kept in a cache on disk.
"""

from __future__ import annotations

import dataclasses
import functools
import gzip
import hashlib
import importlib.metadata
import json
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from visionfm_jax.config import Config
from visionfm_jax.config.load import MODULE
from visionfm_jax.errors import UserError, complain
from visionfm_jax.parallel.cluster import is_installed
from visionfm_jax.parallel.targets import XLA_FLAGS, Cluster
from visionfm_jax.storage import replacing

if TYPE_CHECKING:
    from jax.stages import Compiled

    from visionfm_jax.train.state import TrainState
    from visionfm_jax.train.step import Trainer

GPU, CPU = "cuda", "cpu"
# No kernel is ever run: no time goes into optimising its code, and none into assembling it (see `ASSEMBLER`). What XLA
# schedules and how it lays out memory is decided before.
COMPILE_ONLY_FLAGS = (
    "--xla_gpu_enable_triton_gemm=false",  # matmuls by cuBLAS: XLA's own kernels need a GPU to be tuned on
    "--xla_backend_optimization_level=0",
    "--xla_gpu_enable_libnvjitlink=false",
    "--xla_gpu_enable_libnvptxcompiler=false",
    # Minutes of a large model's compile: generating each fused kernel in turn to choose who generates it, and a new
    # analysis of tiles by which fusions are judged; the former one is as good.
    "--xla_gpu_experimental_enable_fusion_autotuner=false",
    "--xla_gpu_experimental_enable_tiling_propagation=false",
)
# Stands in for NVIDIA's assembler on the PATH, which laptops lack and which may take minutes for one kernel.
ASSEMBLER = """#!/bin/sh
[ "$1" = --version ] && { echo "Cuda compilation tools, release 13.0, V13.0.88"; exit 0; }
while [ $# -gt 0 ]; do [ "$1" = -o ] && echo none > "$2"; shift; done
"""
PACKAGES = {"jax_plugins.xla_cuda13": "the compiler", "nvidia.cudnn": "cuDNN"}


@dataclasses.dataclass(frozen=True)
class CompiledStep:
    """A compiled step, in figures; bytes are one GPU's."""

    platform: str  # cuda, or cpu where the CUDA packages are missing
    parameters: dict[str, int]  # by part of the network
    state: dict[str, int]  # bytes: weights, optimiser, EMA weights or the teacher, the task's own state, batch
    weights_in_use: int  # bytes: the 16-bit copy that products read, where it is whole all the time
    gradients: int  # bytes, accumulated over micro-batches
    checkpoint_host_bytes: int  # that the busiest host writes
    step_flops: float  # of the model, over all GPUs, nothing recomputed counted
    total_steps: int
    batch_size: int
    peak: int  # bytes
    arguments: int  # bytes
    seconds: float  # that the compiler took
    hlo: str  # the scheduled program

    @property
    def held(self) -> dict[str, int]:
        """Bytes by kind that are held from the beginning of a step to its end; they follow from the ZeRO stage."""
        rest = {kind: size for kind, size in self.state.items() if kind != "weights"}
        kinds = {"weights": self.state["weights"] + self.weights_in_use, "gradients": self.gradients, **rest}
        return {kind: size for kind, size in kinds.items() if size}


class CompileError(UserError):
    """A step that does not compile."""


def missing_packages() -> list[str]:
    """What `visionfm_jax[plan]` would bring and is not here, in words."""
    return [word for name, word in PACKAGES.items() if not is_installed(name)]


def compile_step(config: Config, cluster: Cluster, platform: str) -> CompiledStep:
    """The compiled step, from the cache or a process of its own.

    Raises:
      CompileError: the compiler refuses it, with its reason.
    """
    config = _relevant(config)
    entry = cache_folder() / f"{_key(config, cluster, platform)}.json.gz"
    try:
        return CompiledStep(**json.loads(gzip.decompress(entry.read_bytes())))
    except (OSError, EOFError, zlib.error, ValueError, TypeError):  # not there, or damaged: made again
        pass
    data = gzip.compress(_in_own_process(config, cluster, platform), compresslevel=3)
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        with replacing(entry) as part:
            part.write_bytes(data)
    except OSError as error:  # only the next plan is slower
        _complain_once(f"compiles are not cached: {entry.parent}: {error.strerror}")
    return CompiledStep(**json.loads(gzip.decompress(data)))


_complain_once = functools.cache(complain)  # of the many settings that are compared


def cache_folder() -> Path:
    """Where compiled steps are kept: $XDG_CACHE_HOME/visionfm_jax/plan; safe to delete."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "visionfm_jax", "plan")


def _relevant(config: Config) -> Config:
    """The configuration without what the step does not depend on."""
    data = dataclasses.replace(config.data, train=())
    return Config(
        name="", seed=config.seed, model=config.model, task=config.task, data=data,
        optim=config.optim, parallel=config.parallel, train=config.train,
    )  # fmt: skip


def _key(config: Config, cluster: Cluster, platform: str) -> str:
    digest = hashlib.sha256()
    # The speed of networks changes the estimate, not the program.
    target = dataclasses.replace(cluster.target, name="", peak_flops=0, network_inside=0, network_between=0)
    digest.update(repr((config, target, cluster.hosts, cluster.per_host, platform)).encode())
    for package in ("jax", "jaxlib", "flax", "optax"):
        digest.update(importlib.metadata.version(package).encode())
    for name, source in _sources(config):
        digest.update(name.encode() + source)
    return digest.hexdigest()[:32]


def _sources(config: Config) -> Iterator[tuple[str, bytes]]:
    """The code of the package, and of the user's own models, tasks and transforms: another version is another step.

    Of these the files that define the class and those it is derived from.
    """
    package = Path(__file__).parents[1]
    for part in ("config", "data", "losses", "models", "optim", "parallel", "tasks", "train"):
        for path in sorted((package / part).rglob("*.py")):
            yield str(path.relative_to(package)), path.read_bytes()
    yield "compiled.py", Path(__file__).read_bytes()
    parts = (config.model, *config.model.networks().values(), config.task, *config.data.transforms)
    modules = {sys.modules[cls.__module__] for part in parts for cls in type(part).__mro__}
    for path in sorted({Path(file) for module in modules if (file := getattr(module, "__file__", None))}):
        if package not in path.parents:
            yield path.name, path.read_bytes()


def _in_own_process(config: Config, cluster: Cluster, platform: str) -> bytes:
    flags = [f"--xla_force_host_platform_device_count={cluster.devices}"]
    if platform == GPU:
        flags = [*XLA_FLAGS, *COMPILE_ONLY_FLAGS]
    with tempfile.TemporaryDirectory() as folder:
        assembler = Path(folder, "ptxas")
        assembler.write_text(ASSEMBLER)
        assembler.chmod(0o755)
        environment = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")} | {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": " ".join(flags),
            "TF_CPP_MIN_LOG_LEVEL": "3",
            "JAX_COMPILATION_CACHE_DIR": "",
            "JAX_TRACEBACK_FILTERING": "off",  # so that an error's last line is its reason
            "PATH": f"{folder}{os.pathsep}{os.environ.get('PATH', '')}",
        }
        child = subprocess.Popen(
            [sys.executable, "-m", "visionfm_jax.planning.compiled"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment,
        )  # fmt: skip
        try:
            out, err = child.communicate(_pickled((config, cluster, platform)))
        finally:
            child.kill()
    if child.returncode == -signal.SIGINT:
        raise UserError("the compiler was interrupted")
    if child.returncode in (-signal.SIGKILL, -signal.SIGTERM):  # which says nothing of the step
        raise UserError(f"the compiler was killed by signal {-child.returncode}, as where memory runs out; free some")
    if child.returncode:
        said, *_ = err.decode(errors="replace").split("=== Source Location Trace")  # of XLA's code, by jax 0.12
        lines = [line for line in said.splitlines() if line.strip()]
        reason = lines[-1][:300] if lines else f"the compiler ended with {child.returncode}"
        raise CompileError(f"the step does not compile for {cluster.name}: {reason}")
    return out


def _pickled(what: Any) -> bytes:
    """`what`, with the classes that a configuration file defines itself, which another process cannot import."""
    import cloudpickle  # which those who only bench need not have

    if (module := sys.modules.get(MODULE)) is not None:
        cloudpickle.register_pickle_by_value(module)
    return cloudpickle.dumps(what)


def examine(config: Config, cluster: Cluster, platform: str) -> CompiledStep:
    """Compile in this process; on `platform` cpu it needs as many (virtual) devices as the cluster has."""
    import jax

    from visionfm_jax.parallel.mesh import make_mesh
    from visionfm_jax.train.step import Trainer

    devices = describe_devices(cluster) if platform == GPU else jax.devices("cpu")[: cluster.devices]
    trainer = Trainer(config, make_mesh(config.parallel.replicas, devices))
    state, batch = inputs_of(trainer, config.train.batch_size)
    began = time.perf_counter()
    compiled = trainer.step.trace(state, batch).lower(lowering_platforms=(platform,)).compile()
    return described(trainer, compiled, platform, cluster.per_host, time.perf_counter() - began)


def described(trainer: Trainer, compiled: Compiled, platform: str, per_host: int, seconds: float) -> CompiledStep:
    """A compiled step of this trainer, in figures.

    Args:
      platform: that it is compiled for.
      per_host: devices of a host.
      seconds: that the compiler took.
    """
    config, memory = trainer.config, compiled.memory_analysis()
    state, batch = inputs_of(trainer, config.train.batch_size)
    in_use, gradients = trainer.zero.held_bytes(trainer.shapes.params, config.train.accumulate)
    return CompiledStep(
        platform=platform,
        parameters=parts(trainer.shapes.params),
        state=state_bytes(state, batch, in_use if trainer.task.momentum else None),
        weights_in_use=in_use,
        gradients=gradients,
        checkpoint_host_bytes=checkpoint_host_bytes(state, per_host, trainer.mesh.size),
        step_flops=trainer.task.step_flops,
        total_steps=config.total_steps,
        batch_size=config.train.batch_size,
        peak=memory.peak_memory_in_bytes,
        arguments=memory.argument_size_in_bytes,
        seconds=seconds,
        hlo=compiled.as_text(),
    )  # fmt: skip


def inputs_of(trainer: Trainer, batch_size: int) -> tuple[TrainState, dict[str, Any]]:
    """Shapes of the state and the batch that a step is given, and where they lie."""
    import jax
    from jax.sharding import NamedSharding

    from visionfm_jax.parallel.mesh import BATCH

    shardings = trainer.shardings
    state = jax.tree.map(lambda s, at: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=at), trainer.shapes, shardings)
    rows, spec = NamedSharding(trainer.mesh, BATCH), trainer.task.batch_spec(batch_size)
    return state, {k: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=rows) for k, s in spec.items()}


def state_bytes(state: TrainState, batch: dict[str, Any], teacher_in_use: int | None) -> dict[str, int]:
    """Bytes of each device, by kind, of what `inputs_of` gives.

    Args:
      teacher_in_use: the teacher's copy that products read, in bytes; None: there is no teacher.
    """
    import jax

    def held(tree: Any) -> int:
        return sum(shard_bytes(leaf) for leaf in jax.tree.leaves(tree))

    average = "EMA weights" if teacher_in_use is None else "teacher"
    return {
        "weights": held(state.params), "optimiser": held(state.opt_state),
        average: held(state.ema) + (teacher_in_use or 0), "task state": held(state.task_state), "batch": held(batch),
    }  # fmt: skip


def shard_bytes(leaf: Any) -> int:
    """Bytes of a `jax.ShapeDtypeStruct` on each device."""
    import math

    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize


def checkpoint_host_bytes(state: Any, per_host: int, devices: int) -> int:
    """Bytes of a checkpoint that the busiest host holds while it is written: each shard is written by one host."""
    import jax

    total = 0
    for leaf in jax.tree.leaves(state):
        shard = shard_bytes(leaf)
        copies = devices * shard // (leaf.size * leaf.dtype.itemsize)  # of each shard; the first copy is written
        total += shard * min(per_host, devices // copies)
    return total


def parts(params: Any) -> dict[str, int]:
    """Parameters by part: the tree's first names, and those of a layer below its stack."""
    import jax

    from visionfm_jax.parallel.zero import SCANNED

    counts: dict[str, int] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        names = [key.key for key in path]
        depth = names.index(SCANNED) + 2 if SCANNED in names else 1
        part = "/".join(names[:depth])
        counts[part] = counts.get(part, 0) + leaf.size
    return counts


def describe_devices(cluster: Cluster) -> list[Any]:
    """The cluster's GPUs, to compile for."""
    from jax.experimental import topologies

    target = cluster.target
    major, minor = target.capability
    text = f"""
        gpu_device_info {{
          threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
          shared_memory_per_block: 49152 shared_memory_per_core: {target.shared_memory_per_core}
          shared_memory_per_block_optin: {target.shared_memory_per_core - 1024}
          core_count: {target.cores} fpus_per_core: {target.fpus_per_core} clock_rate_ghz: {target.clock_ghz}
          block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
          registers_per_core_limit: 65536 registers_per_block_limit: 65536
          memory_bandwidth: {int(target.memory_bandwidth)} l2_cache_size: {target.l2_bytes}
          device_memory_size: {target.memory_bytes}
          cuda_compute_capability {{ major: {major} minor: {minor} }}
        }}
        platform_name: "CUDA"
        dnn_version_info {{ major: 9 minor: 15 }}
        runtime_version {{ major: 13 minor: 0 patch: 0 }}
        device_description_str: "{target.description}"
    """
    topology = topologies.get_topology_desc(
        platform="cuda", topology_name=cluster.name, topology=f"1x{cluster.hosts}x{cluster.per_host}",
        target_config=text,
    )  # fmt: skip
    return list(topology.devices)


def main() -> None:
    """Of the child process: a pickled (config, cluster, platform) in, the result as JSON out."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C does not wait for the compiler
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    step = examine(*pickle.loads(sys.stdin.buffer.read()))
    sys.stdout.buffer.write(json.dumps(dataclasses.asdict(step)).encode())


def _end_with(parent: int) -> None:
    """End this process once its parent is gone, which nobody may have told to end it."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


if __name__ == "__main__":
    main()
