"""The cluster of a run's processes, and how they find each other before JAX touches a device.

`initialize` is the first call of every entry point. Explicit values win: arguments, or the variables that the
scripts of `launch/` export,

    VISIONFM_COORDINATOR=HOST:PORT   where process 0 listens
    VISIONFM_PROCESSES=N             how many processes the run has
    VISIONFM_PROCESS=P               which one this is, 0 .. N-1

and otherwise JAX's own detection of SLURM, Open MPI and Kubernetes is asked, but only when the
environment says that there is more than one process: a lone process never waits for others.

This is the one place that uses what `jax.distributed` has no public name for in jax 0.10 - 0.12.
"""

from __future__ import annotations

import atexit
import ctypes
import importlib.util
import os
import time
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

import jax
from jax._src import clusters, distributed

from visionfm_jax.errors import INTERRUPTED, ConfigError, LostError, UserError, one_line
from visionfm_jax.parallel.peers import SILENCE, Peers, exit_now

START_TIMEOUT = 300  # seconds that all processes have to appear
# Seconds after an error until it counts as this process's own: a collective of which a process has died breaks
# before the news of that death is there.
NEWS = 3.0

_peers: Peers | None = None  # of a run of several processes, once they have met


def initialize(
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    *,
    timeout: int = START_TIMEOUT,
) -> tuple[int, int]:
    """Join the run's other processes, if it has any.

    Args:
      coordinator: "host:port" of process 0; None: VISIONFM_COORDINATOR, else detected.
      processes: how many there are; None: VISIONFM_PROCESSES, else detected.
      process: which one this is; None: VISIONFM_PROCESS, else detected.
      timeout: seconds to wait until all have come.

    Returns:
      (process, processes); (0, 1) for a run of one process.

    Raises:
      ConfigError: half of the three values, a value out of range, or a cluster that cannot be read.
      LostError: process 0 does not come. That others do not come ends the process here, with the same code.
    """
    take_cpu_without_driver()
    # CPU processes talk through gloo; read when the backend starts, so it is set before anything else.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    coordinator = coordinator or os.environ.get("VISIONFM_COORDINATOR") or None
    processes = _integer("VISIONFM_PROCESSES") if processes is None else processes
    process = _integer("VISIONFM_PROCESS") if process is None else process
    if coordinator is None and processes is None and process is None:
        return _detect(timeout)
    _check(coordinator, processes, process)
    if processes == 1:
        return 0, 1
    return _join(timeout, coordinator, processes, process)


def is_installed(module: str) -> bool:
    """Whether `import module` would find it; nothing of it is run."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package that it would be in
        return False


def take_cpu_without_driver() -> None:
    """Have JAX take the CPU where there is its CUDA plugin, but not NVIDIA's driver; before it touches a device.

    Plans are compiled with the plugin alone; it would print a traceback before JAX takes the CPU.
    """
    if "JAX_PLATFORMS" in os.environ or not any(is_installed(f"jax_plugins.xla_cuda{n}") for n in (12, 13)):
        return
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        jax.config.update("jax_platforms", "cpu")


def _integer(name: str) -> int | None:
    text = os.environ.get(name, "").strip()
    if not text:
        return None
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"{name} = {text!r}: must be a whole number; set it in the launch script") from None


def _check(coordinator: str | None, processes: int | None, process: int | None) -> None:
    """The rules of the three explicit values."""
    if processes is not None and processes < 1:
        raise ConfigError(f"processes = {processes}: must be at least 1; set VISIONFM_PROCESSES to how many you start")
    if process is not None and processes is not None and not 0 <= process < processes:
        raise ConfigError(f"process = {process}: must lie in 0 .. {processes - 1}; number the {processes} from 0")
    if processes == 1:
        return
    given = {"coordinator": coordinator, "processes": processes, "process": process}
    missing = [name for name, value in given.items() if value is None]
    if missing:
        have = ", ".join(f"{name} = {value!r}" for name, value in given.items() if value is not None)
        names = " and ".join(f"VISIONFM_{name.upper()}" for name in missing)
        raise ConfigError(f"{have}: given without {' and '.join(missing)}; set {names} too, or none of the three")
    host, _, port = coordinator.rpartition(":")
    try:
        host.encode("idna")  # as Python looks it up
    except UnicodeError:
        host = ""
    if not host or not (port.isascii() and port.isdigit()) or not 0 < int(port[:6]) < 65536:
        raise ConfigError(f"coordinator = {coordinator!r}: must be HOST:PORT; e.g. 10.0.0.1:12345")


def _detect(timeout: int) -> tuple[int, int]:
    """Ask the environment; single-process unless it names several."""
    env = os.environ
    slurm = _integer("SLURM_STEP_NUM_TASKS") or _integer("SLURM_NTASKS") or 1
    mpi = _integer("OMPI_COMM_WORLD_SIZE") or _integer("PMI_SIZE") or 1
    # SLURM_STEP_NODELIST exists only under srun: a bare shell of an allocation is one process.
    if slurm > 1 and "SLURM_STEP_NODELIST" in env and "SLURM_PROCID" in env:
        per_node = _first_number(env.get("SLURM_STEP_TASKS_PER_NODE", "1"))
        ids = local_devices(_integer("SLURM_LOCALID") or 0, per_node, env)
        return _join(timeout, *_ask_jax("slurm", timeout, ids))
    elif mpi > 1:
        ids = local_devices(
            _integer("OMPI_COMM_WORLD_LOCAL_RANK") or 0, _integer("OMPI_COMM_WORLD_LOCAL_SIZE") or 1, env
        )
        return _join(timeout, *_ask_jax(_mpi_method(), timeout, ids))
    elif "KUBERNETES_SERVICE_HOST" in env and "JOB_COMPLETION_INDEX" in env:
        if importlib.util.find_spec("kubernetes") is None:
            raise ConfigError(
                "an indexed Kubernetes job, but the package `kubernetes` is not installed to read its size; "
                "set VISIONFM_COORDINATOR, _PROCESSES and _PROCESS as launch/k8s-jobset.yaml does "
                "(VISIONFM_PROCESSES=1 for a lone pod)"
            )
        return _join(timeout, *_ask_jax(None, timeout))
    return 0, 1


def _first_number(text: str) -> int:
    """Tasks on a node from SLURM's "8(x16)" or "8,4"; nodes of one run are alike."""
    digits = text.split("(")[0].split(",")[0]
    return int(digits) if digits.isdigit() else 1


def local_devices(local: int, tasks: int, env: dict[str, str] | os._Environ[str]) -> list[int] | None:
    """Which of the visible GPUs the process `local` of `tasks` on this machine takes.

    JAX's own rule is GPU number `local`: wrong when the scheduler shows each task its own GPUs only
    (task 3 has no GPU 3), and wasteful with one task per node (it would take the first of eight).

    Returns:
      Indices among the visible GPUs; None where the environment does not tell (JAX's rule then).

    Raises:
      ConfigError: more processes than GPUs.
    """
    shown = env.get("CUDA_VISIBLE_DEVICES")
    if shown is not None:
        visible = len([part for part in shown.split(",") if part.strip()])
    elif env.get("SLURM_GPUS_ON_NODE", "").isdigit():
        visible = int(env["SLURM_GPUS_ON_NODE"])
    else:
        return None
    if visible == 0:
        return None
    own = visible == 1 or "SLURM_GPUS_PER_TASK" in env  # the scheduler has already divided them
    if own or tasks == 1:
        return list(range(visible))
    if tasks > visible:
        raise ConfigError(f"{tasks} processes on a machine that shows {visible} GPUs; start at most {visible} there")
    each = visible // tasks
    return list(range(local * each, (local + 1) * each))


def _mpi_method() -> str:
    if "OMPI_MCA_orte_hnp_uri" in os.environ:  # Open MPI up to 4 says where it listens
        return "ompi"
    if importlib.util.find_spec("mpi4py") is not None:
        return "mpi4py"
    raise ConfigError(
        "started by MPI that does not name its first host (Open MPI 5, MPICH), and mpi4py is not installed; "
        "start with launch/mpi.sh, or install mpi4py"
    )


def _ask_jax(
    method: str | None, timeout: int, devices: list[int] | None = None
) -> tuple[str, int, int, list[int] | None]:
    """Coordinator, processes, process and local devices by JAX's detection; the port may be $JAX_COORDINATOR_PORT."""
    try:
        found = clusters.ClusterEnv.auto_detect_unset_distributed_params(None, None, None, devices, method, timeout)
    except (RuntimeError, ValueError, OSError, IndexError, KeyError) as error:
        raise LostError(f"JAX cannot read the cluster ({method or 'Kubernetes'}): {one_line(error)}") from error
    if None in found[:3]:
        raise ConfigError(
            f"JAX does not recognise the cluster ({method or 'Kubernetes'}); set VISIONFM_COORDINATOR, _PROCESSES and "
            "_PROCESS"
        )
    return found


def _join(
    timeout: int, coordinator: str, processes: int, process: int, devices: list[int] | None = None
) -> tuple[int, int]:
    """Meet the others, then `jax.distributed.initialize`; its service listens where the processes have met."""
    global _peers
    if processes == 1:
        return 0, 1
    _peers = Peers(coordinator, process, processes, timeout)
    atexit.register(_peers.close)  # before JAX's own end, which waits for the others without watching them
    jax.config.update("jax_enable_preemption_service", False)  # until `listen_for_preemption`
    try:
        jax.distributed.initialize(
            coordinator_address=_peers.address,
            coordinator_bind_address=_peers.bind_address,
            num_processes=processes,
            process_id=process,
            local_device_ids=devices,
            cluster_detection_method="deactivate",  # nothing is left to detect
            initialization_timeout=timeout,
            heartbeat_timeout_seconds=int(6 * SILENCE),  # `peers` notices first, and says who
        )
    except (RuntimeError, ValueError, OSError) as error:
        _peers.fail(LostError.exit_code, f"the processes cannot meet at {coordinator}: {one_line(error)}")
    return process, processes


def run_together(work: Callable[[], int]) -> int:
    """`work()`, of which a failure ends all processes of the run; alone it is just `work()`.

    An ordinary end would wait minutes for the other processes, which wait in a collective for this one.
    """
    if _peers is None:
        return work()
    try:
        return work()
    except UserError as error:
        text, code = str(error), error.exit_code
    except KeyboardInterrupt:
        text, code = "interrupted", INTERRUPTED
    except Exception as error:
        # So come lost connections, but also memory that is too small, and would be at the next start.
        lost = isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(error)
        text, code = (one_line(error), LostError.exit_code) if lost else (traceback.format_exc(), 1)
    time.sleep(NEWS)  # if another process is the cause, this one ends here
    _peers.fail(code, text)


def end_all(code: int, text: str) -> NoReturn:
    """End this process at once, whatever its main thread does, and with it the others; it has said why itself."""
    if _peers is not None:
        _peers.end(code, text)
    exit_now(code)


def end_alone() -> None:
    """From now on, what happens to the others does not end this process; it is about to end by itself."""
    if _peers is not None:
        _peers.ending = True


def listen_for_preemption() -> None:
    """From now on SIGTERM is what `multihost_utils.reached_preemption_sync_point` agrees on.

    Not before: the service only tells those who ask at every step, and a run that has not begun should end at once.
    """
    if not jax.config.jax_enable_preemption_service:
        jax.config.update("jax_enable_preemption_service", True)
        distributed.global_state.initialize_preemption_sync_manager()


def store() -> Any:
    """The key-value store of the processes; None in a run of one."""
    return distributed.global_state.client
