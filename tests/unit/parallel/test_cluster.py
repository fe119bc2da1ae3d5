import os
import socket
import subprocess
import sys
import time
import types

import jax
import pytest

from visionfm_jax.errors import ConfigError
from visionfm_jax.parallel import cluster

PREFIXES = ("VISIONFM_", "SLURM_", "OMPI_", "PMI_", "KUBERNETES_", "JOB_COMPLETION", "CUDA_VISIBLE")


@pytest.fixture(autouse=True)
def _bare_environment(monkeypatch):
    for name in [name for name in os.environ if name.startswith(PREFIXES)]:
        monkeypatch.delenv(name)


@pytest.fixture
def joined(monkeypatch):
    """Record what would be joined; no network."""
    calls = []

    def join(timeout, coordinator, processes, process, devices=None):
        calls.append((coordinator, processes, process, devices))
        return process, processes

    monkeypatch.setattr(cluster, "_join", join)
    return calls


@pytest.fixture
def asked(monkeypatch):
    """Record what JAX would be asked to detect."""
    methods = []

    def ask(method, timeout, devices=None):
        methods.append(method)
        return "host:1", 2, 0, devices

    monkeypatch.setattr(cluster, "_ask_jax", ask)
    return methods


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def run(code, **env):
    clean = {k: v for k, v in os.environ.items() if not k.startswith(PREFIXES)}
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env=clean | {"JAX_PLATFORMS": "cpu"} | {k: str(v) for k, v in env.items()},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_alone_by_default(joined):
    assert cluster.initialize() == (0, 1)
    assert joined == []
    assert jax.config.jax_cpu_collectives_implementation == "gloo"


def test_arguments_win_over_the_environment(joined, monkeypatch):
    monkeypatch.setenv("VISIONFM_COORDINATOR", "a:1")
    monkeypatch.setenv("VISIONFM_PROCESSES", "2")
    monkeypatch.setenv("VISIONFM_PROCESS", "1")
    assert cluster.initialize() == (1, 2)
    assert cluster.initialize("b:2", 4, 3, timeout=7) == (3, 4)
    assert joined == [("a:1", 2, 1, None), ("b:2", 4, 3, None)]


def test_one_process_needs_no_coordinator(joined):
    assert cluster.initialize(processes=1) == (0, 1)
    assert cluster.initialize("host:1", 1, 0) == (0, 1)
    assert joined == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"processes": 2}, ["processes = 2", "VISIONFM_COORDINATOR and VISIONFM_PROCESS"]),
        ({"coordinator": "h:1"}, ["coordinator = 'h:1'", "VISIONFM_PROCESSES and VISIONFM_PROCESS"]),
        ({"process": 0}, ["process = 0", "VISIONFM_COORDINATOR"]),
        ({"coordinator": "h:1", "processes": 2, "process": 2}, ["process = 2", "0 .. 1"]),
        ({"coordinator": "h:1", "processes": 2, "process": -1}, ["process = -1", "0 .. 1"]),
        ({"processes": 0}, ["processes = 0", "at least 1"]),
        ({"processes": 1, "process": 1}, ["process = 1", "0 .. 0"]),
        ({"coordinator": "h", "processes": 2, "process": 1}, ["'h'", "HOST:PORT"]),
        ({"coordinator": "h:99999", "processes": 2, "process": 1}, ["'h:99999'", "HOST:PORT"]),
        ({"coordinator": "h:" + "9" * 5000, "processes": 2, "process": 1}, ["HOST:PORT"]),
        ({"coordinator": "a..b:80", "processes": 2, "process": 1}, ["'a..b:80'", "HOST:PORT"]),
    ],
)
def test_a_half_given_or_wrong_set_is_one_line(joined, arguments, words):
    with pytest.raises(ConfigError) as caught:
        cluster.initialize(**arguments)
    assert all(word in str(caught.value) for word in words)
    assert "\n" not in str(caught.value)
    assert joined == []


def test_a_word_for_a_number_names_the_variable(monkeypatch):
    monkeypatch.setenv("VISIONFM_PROCESSES", "two")
    with pytest.raises(ConfigError, match="VISIONFM_PROCESSES = 'two'"):
        cluster.initialize()


def test_a_taken_port_is_named():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port {port}.*choose another port"):
            cluster.initialize(f"127.0.0.1:{port}", 2, 0)


SLURM = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_NODELIST": "node[01-02]",
    "SLURM_NTASKS": "16",
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_STEP_TASKS_PER_NODE": "8(x2)",
    "SLURM_PROCID": "11",
    "SLURM_LOCALID": "3",
}


def test_slurm_is_detected_by_jax(joined, monkeypatch):
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    assert cluster.initialize() == (11, 16)
    ((coordinator, *rest),) = joined
    assert (coordinator.split(":")[0], *rest) == ("node01", 16, 11, [3])


@pytest.mark.parametrize(
    "changes",
    [
        {"SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},  # srun -n 1
        {"SLURM_STEP_NUM_TASKS": "1"},  # an interactive step of a large allocation
        {"SLURM_STEP_NODELIST": None, "SLURM_STEP_NUM_TASKS": None},  # the batch script itself
    ],
)
def test_a_lone_slurm_task_does_not_wait(joined, monkeypatch, changes):
    for name, value in (SLURM | changes).items():
        if value is not None:
            monkeypatch.setenv(name, value)
    assert cluster.initialize() == (0, 1)
    assert joined == []


@pytest.mark.usefixtures("joined")
def test_open_mpi_4_is_left_to_jax_and_5_needs_mpi4py(asked, monkeypatch):
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    monkeypatch.setattr(cluster.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"launch/mpi\.sh"):
        cluster.initialize()
    monkeypatch.setattr(cluster.importlib.util, "find_spec", lambda name: object())
    cluster.initialize()
    monkeypatch.setenv("OMPI_MCA_orte_hnp_uri", "1531576320.0;tcp://10.96.0.1:34911")
    cluster.initialize()
    assert asked == ["mpi4py", "ompi"]


def test_an_indexed_kubernetes_job_without_its_package_is_refused(joined, asked, monkeypatch):
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    assert cluster.initialize() == (0, 1)  # a plain pod
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "0")
    monkeypatch.setattr(cluster.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="VISIONFM_COORDINATOR"):
        cluster.initialize()
    monkeypatch.setenv("VISIONFM_PROCESSES", "1")
    assert cluster.initialize() == (0, 1)
    monkeypatch.delenv("VISIONFM_PROCESSES")
    monkeypatch.setattr(cluster.importlib.util, "find_spec", lambda name: object())
    cluster.initialize()
    assert (asked, joined) == ([None], [("host:1", 2, 0, None)])


@pytest.mark.parametrize(
    ("local", "tasks", "env", "ids"),
    [
        (3, 8, {}, None),  # unknown: JAX takes GPU `local`
        (3, 8, {"CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7"}, [3]),
        (0, 1, {"CUDA_VISIBLE_DEVICES": "0,1,2,3"}, [0, 1, 2, 3]),  # one task per node drives them all
        (0, 1, {"SLURM_GPUS_ON_NODE": "4"}, [0, 1, 2, 3]),
        (5, 8, {"CUDA_VISIBLE_DEVICES": "GPU-5"}, [0]),  # divided by the scheduler
        (1, 2, {"CUDA_VISIBLE_DEVICES": "0,1", "SLURM_GPUS_PER_TASK": "2"}, [0, 1]),
        (1, 2, {"CUDA_VISIBLE_DEVICES": "0,1,2,3"}, [2, 3]),
        (0, 4, {"CUDA_VISIBLE_DEVICES": ""}, None),  # CPU on purpose
    ],
)
def test_which_gpus_a_process_takes(local, tasks, env, ids):
    assert cluster.local_devices(local, tasks, env) == ids


def test_more_tasks_than_gpus_is_refused():
    with pytest.raises(ConfigError, match="4 processes on a machine that shows 2 GPUs"):
        cluster.local_devices(3, 4, {"CUDA_VISIBLE_DEVICES": "0,1"})


# The addresses at which this process listens, from the kernel.
LISTENING = """
import glob, os, socket
own = set()
for path in glob.glob('/proc/self/fd/*'):
    try: own.add(os.readlink(path))
    except OSError: pass
where = []
for name, family in (('tcp', socket.AF_INET), ('tcp6', socket.AF_INET6)):
    for line in open('/proc/net/' + name).read().splitlines()[1:]:
        fields = line.split()
        address, _, port = fields[1].partition(':')
        words = [bytes.fromhex(address[i : i + 8])[::-1] for i in range(0, len(address), 8)]
        if fields[3] == '0A' and 'socket:[' + fields[9] + ']' in own:
            where.append(socket.inet_ntop(family, b''.join(words)) + ':' + str(int(port, 16)))
print(*where)
"""


def test_two_processes_meet_and_sum():
    code = (
        "from visionfm_jax.parallel import cluster; me = cluster.initialize(timeout=60)\n"
        "import jax, numpy as np; from jax.experimental import multihost_utils as m\n"
        "print(me, len(jax.devices()), m.process_allgather(np.array([me[0] + 1])).ravel().tolist())\n" + LISTENING
    )
    env = {"VISIONFM_COORDINATOR": f"127.0.0.1:{free_port()}", "VISIONFM_PROCESSES": 2, "XLA_FLAGS": ""}
    two = [run(code, VISIONFM_PROCESS=p, **env) for p in range(2)]
    said = [process.communicate(timeout=60) for process in two]
    assert [process.returncode for process in two] == [0, 0], said
    last = [out.splitlines()[-2:] for out, _ in said]  # gloo says a line of its own before
    assert [line for line, _ in last] == ["(0, 2) 2 [1, 2]", "(1, 2) 2 [1, 2]"]
    listening = [set(line.replace("::ffff:", "").split()) for _, line in last]
    assert env["VISIONFM_COORDINATOR"] in listening[0]
    assert not [where for where in listening[0] | listening[1] if where.startswith(("0.0.0.0:", ":::"))]


def test_a_notice_to_one_stops_both_at_the_same_question():
    """JAX asks its service with Python's lock held: what lies between must not need it."""
    code = (
        "import os, signal, sys, time; from visionfm_jax.train.timing import StopSignal; stop = StopSignal()\n"
        "from visionfm_jax.parallel import cluster; me, _ = cluster.initialize(timeout=60)\n"
        "def work():\n"
        "    for i in range(1000):\n"
        "        if stop(): print(i); return 75\n"
        "        if i == 5 and me == 1: os.kill(os.getpid(), signal.SIGTERM)\n"
        "        time.sleep(0.03)\n"
        "sys.exit(cluster.run_together(work))"
    )
    env = {"VISIONFM_COORDINATOR": f"127.0.0.1:{free_port()}", "VISIONFM_PROCESSES": 2, "XLA_FLAGS": ""}
    two = [run(code, VISIONFM_PROCESS=p, **env) for p in range(2)]
    try:
        said = [process.communicate(timeout=60)[0] for process in two]
    finally:
        for process in two:
            process.kill()
    assert [process.returncode for process in two] == [75, 75]
    assert said[0] == said[1]


@pytest.mark.parametrize(("process", "words"), [(1, "does not answer"), (0, "process 1 of 2 did not come")])
def test_absent_processes_end_the_wait_with_one_line(process, words):
    code = (
        "import sys; from visionfm_jax.errors import entry_point; from visionfm_jax.parallel import cluster\n"
        "sys.exit(entry_point(cluster.initialize)(timeout=1))"
    )
    where = f"127.0.0.1:{free_port()}"
    start = time.monotonic()
    lone = run(code, VISIONFM_COORDINATOR=where, VISIONFM_PROCESSES=2, VISIONFM_PROCESS=process)
    _, err = lone.communicate(timeout=60)
    assert lone.returncode == 71
    assert time.monotonic() - start < 30
    (line,) = err.splitlines()
    assert line.startswith("visionfm_jax: error: ")
    assert where in line
    assert words in line


@pytest.mark.parametrize(
    ("message", "code"), [("UNKNOWN: Connection reset by peer", 71), ("RESOURCE_EXHAUSTED: Out of memory", 1)]
)
def test_memory_that_is_too_small_is_no_lost_process(monkeypatch, message, code):
    ended = []
    monkeypatch.setattr(cluster, "NEWS", 0)
    monkeypatch.setattr(cluster, "_peers", types.SimpleNamespace(fail=lambda *what: ended.append(what)))

    def work():
        raise jax.errors.JaxRuntimeError(message)

    cluster.run_together(work)
    assert ended[0][0] == code
    assert message in ended[0][1]
    assert ("in work" in ended[0][1]) == (code == 1)  # a traceback says what has taken the memory


@pytest.mark.parametrize(("driver", "taken"), [(True, []), (False, [("jax_platforms", "cpu")])])
def test_a_plugin_without_a_driver_is_left_alone(monkeypatch, driver, taken):
    """JAX would print a traceback of it."""
    updates = []
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setattr(cluster, "is_installed", lambda _: True)
    monkeypatch.setattr(cluster.ctypes, "CDLL", lambda _: 1 if driver else os.open("/no/libcuda", os.O_RDONLY))
    monkeypatch.setattr(jax.config, "update", lambda *words: updates.append(words))
    cluster.take_cpu_without_driver()
    assert updates == taken
