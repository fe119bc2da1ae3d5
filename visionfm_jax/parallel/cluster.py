"""How the processes of a run find each other, before JAX touches a device.

`initialize` is the first call of every door. Explicit values win: arguments, or the variables that the
scripts of `launch/` export,

    VISIONFM_COORDINATOR=HOST:PORT   where process 0 listens
    VISIONFM_PROCESSES=N             how many processes the run has
    VISIONFM_PROCESS=P               which one this is, 0 .. N-1

and otherwise JAX's own detection of SLURM, Open MPI and Kubernetes is asked, but only when the
environment says that there is more than one process: a lone process never waits for others.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import socket
import sys
import threading

import jax

from visionfm_jax.errors import ConfigError, LostError

START_TIMEOUT = 300  # seconds that all processes have to appear


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
      timeout: seconds to wait until all have joined. JAX aborts with a C++ stack then; this says one
        line on stderr and exits with `LostError.exit_code` just before.

    Returns:
      (process, processes); (0, 1) for a run of one process.

    Raises:
      ConfigError: half of the three values, a value out of range, or a cluster that cannot be read.
    """
    if "JAX_PLATFORMS" not in os.environ and _is_plugin_without_driver():
        # Plans are compiled with the plugin alone; here it would print a traceback before JAX takes the CPU.
        jax.config.update("jax_platforms", "cpu")
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
    if process == 0:
        _check_port(coordinator)
    _join(timeout, coordinator, coordinator_address=coordinator, num_processes=processes, process_id=process)
    return process, processes


def is_installed(module: str) -> bool:
    """Whether `import module` would find it; nothing of it is run."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package that it would be in
        return False


def _is_plugin_without_driver() -> bool:
    """A CUDA plugin on a machine without NVIDIA's driver."""
    if not any(is_installed(f"jax_plugins.xla_cuda{n}") for n in (12, 13)):
        return False
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return True
    return False


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
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ConfigError(f"coordinator = {coordinator!r}: must be HOST:PORT; e.g. 10.0.0.1:12345")


def _check_port(coordinator: str) -> None:
    """Refuse a port on which another program listens; JAX 0.10 crashes on one."""
    port = int(coordinator.rpartition(":")[2])
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            reason = error.strerror or str(error)
            raise ConfigError(
                f"coordinator = {coordinator!r}: process 0 cannot listen on port {port} ({reason}); choose another port"
            ) from error


def _detect(timeout: int) -> tuple[int, int]:
    """Ask the environment; single-process unless it names several."""
    env = os.environ
    slurm = _integer("SLURM_STEP_NUM_TASKS") or _integer("SLURM_NTASKS") or 1
    mpi = _integer("OMPI_COMM_WORLD_SIZE") or _integer("PMI_SIZE") or 1
    # SLURM_STEP_NODELIST exists only under srun: a bare shell of an allocation is one process.
    if slurm > 1 and "SLURM_STEP_NODELIST" in env and "SLURM_PROCID" in env:
        per_node = _first_number(env.get("SLURM_STEP_TASKS_PER_NODE", "1"))
        ids = local_devices(_integer("SLURM_LOCALID") or 0, per_node, env)
        _join(timeout, "the first node of the SLURM step", local_device_ids=ids, cluster_detection_method="slurm")
    elif mpi > 1:
        ids = local_devices(
            _integer("OMPI_COMM_WORLD_LOCAL_RANK") or 0, _integer("OMPI_COMM_WORLD_LOCAL_SIZE") or 1, env
        )
        _join(timeout, "rank 0 of mpirun", local_device_ids=ids, cluster_detection_method=_mpi_method())
    elif "KUBERNETES_SERVICE_HOST" in env and "JOB_COMPLETION_INDEX" in env:
        if importlib.util.find_spec("kubernetes") is None:
            raise ConfigError(
                "an indexed Kubernetes job, but the package `kubernetes` is not installed to read its size; "
                "set VISIONFM_COORDINATOR, _PROCESSES and _PROCESS as launch/k8s-jobset.yaml does "
                "(VISIONFM_PROCESSES=1 for a lone pod)"
            )
        _join(timeout, "pod 0 of the job")
    else:
        return 0, 1
    return jax.process_index(), jax.process_count()


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


def _join(timeout: int, where: str, **arguments: object) -> None:
    """`jax.distributed.initialize` that ends with a sentence when the others do not come."""
    if "coordinator_address" in arguments:
        arguments["cluster_detection_method"] = "deactivate"  # nothing is left to detect
    timer = threading.Timer(timeout, _give_up, (timeout, where))
    timer.daemon = True
    timer.start()
    try:
        # Later than the timer: JAX's own timeout aborts the process from C++ without a Python error.
        jax.distributed.initialize(**arguments, initialization_timeout=timeout + 60)
    except (RuntimeError, ValueError, OSError, IndexError, KeyError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise LostError(
            f"the processes cannot meet at {where}: {first}; is the port free, is the host right?"
        ) from error
    finally:
        timer.cancel()


def _give_up(timeout: int, where: str) -> None:
    """Runs in the timer's thread while the main thread waits inside JAX."""
    if _answers(where):
        cause = f"{where} answers, but not all processes have joined it; see which of them did not start"
    else:
        cause = f"{where} does not answer; check that process 0 runs, its address, and the firewall between the hosts"
    print(f"error: no cluster after {timeout} s: {cause}", file=sys.stderr, flush=True)
    os._exit(LostError.exit_code)


def _answers(where: str) -> bool:
    host, _, port = where.rpartition(":")
    if not port.isdigit():
        return False
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=3):
            return True
    except OSError:
        return False
