import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

import visionfm_jax

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = [*sorted((ROOT / "launch").glob("*.sh")), ROOT / "launch/slurm.sbatch", ROOT / ".ci/run"]
RUNNERS = ("VISIONFM_", "SLURM_", "OMPI_", "PMI_", "CUDA_VISIBLE", "VIRTUAL_ENV", "XLA_FLAGS")


def environment(**more):
    clean = {k: v for k, v in os.environ.items() if not k.startswith(RUNNERS)}
    return clean | {"PYTHON": sys.executable, "JAX_PLATFORMS": "cpu"} | more


def bash(*args, timeout=30, **env):
    return subprocess.run(
        ["bash", *map(str, args)], capture_output=True, text=True, timeout=timeout, env=environment(**env), check=False
    )


def put(folder, name, text):
    """An executable of this name in `folder`, which tests put on the PATH."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("#!/usr/bin/env bash\nset -eu\n" + text)
    (folder / name).chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_parse_and_explain_themselves(script):
    assert bash("-n", script).returncode == 0
    result = bash(script, "--help")
    assert result.returncode == 0, result.stderr
    assert len(result.stdout) > 20
    assert "set -euo pipefail" in script.read_text()
    assert os.access(script, os.X_OK)


LOCAL = ROOT / "launch/local.sh"


def test_local_numbers_the_processes():
    code = 'echo "$VISIONFM_PROCESS of $VISIONFM_PROCESSES at $VISIONFM_COORDINATOR"'
    result = bash(LOCAL, 3, "--", "bash", "-c", code)
    assert result.returncode == 0, result.stderr
    lines = sorted(result.stdout.splitlines())
    assert [line[:6] for line in lines] == ["0 of 3", "1 of 3", "2 of 3"]
    assert len({line.split(" at ")[1] for line in lines}) == 1


def test_local_ends_all_when_one_fails():
    code = 'if [ "$VISIONFM_PROCESS" = 1 ]; then exit 7; fi; exec sleep 60'
    start = time.monotonic()
    result = bash(LOCAL, 2, "--", "bash", "-c", code)
    assert result.returncode == 7
    assert "code 7" in result.stderr
    assert time.monotonic() - start < 10


def test_local_lets_the_others_save_after_75():
    code = 'if [ "$VISIONFM_PROCESS" = 1 ]; then exit 75; fi; sleep 1; echo saved; exit 75'
    result = bash(LOCAL, 2, "--", "bash", "-c", code)
    assert (result.returncode, result.stdout) == (75, "saved\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_local_hands_signals_to_all(number):
    code = (
        "import os, signal, sys, time\n"
        "def stop(n, _): os.write(1, b'stopped by %d\\n' % n); sys.exit(75)\n"
        "for n in (signal.SIGINT, signal.SIGTERM): signal.signal(n, stop)\n"
        "os.write(1, b'ready\\n'); time.sleep(60)"  # one write: lines of two processes do not mix
    )
    launcher = subprocess.Popen(
        ["bash", LOCAL, "2", "--", sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment()
    )
    assert [launcher.stdout.readline() for _ in range(2)] == ["ready\n"] * 2
    launcher.send_signal(number)
    out, _ = launcher.communicate(timeout=30)
    assert out.splitlines() == [f"stopped by {int(number)}"] * 2
    assert launcher.returncode == 75


def test_local_that_is_killed_leaves_nothing_behind(tmp_path):
    """Neither the processes, which save first, nor what they have started."""
    code = "trap 'echo saved; kill $!; exit 75' TERM; sleep 60 & echo ready; while :; do sleep 0.1; done"
    with open(tmp_path / "out", "w") as out:
        launcher = subprocess.Popen(
            ["bash", LOCAL, "2", "--", "bash", "-c", code], stdout=out, env=environment(), start_new_session=True
        )

    def said(what):
        return (tmp_path / "out").read_text().count(what)

    def left():
        listed = subprocess.run(["ps", "-s", str(launcher.pid), "-o", "pid="], capture_output=True, text=True)
        return listed.stdout.split()

    try:
        wait_for(lambda: said("ready") == 2)
        os.killpg(launcher.pid, signal.SIGKILL)
        launcher.wait()
        wait_for(lambda: not left())
        assert said("saved") == 2
    finally:
        for pid in left():
            os.kill(int(pid), signal.SIGKILL)


def wait_for(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "did not happen in time"
        time.sleep(0.05)


def test_local_gives_one_gpu_each(tmp_path):
    path = put(tmp_path, "nvidia-smi", "printf '0\\n1\\n2\\n'\n")
    code = 'echo "$VISIONFM_PROCESS $CUDA_VISIBLE_DEVICES $NCCL_DEBUG"'
    result = bash(LOCAL, 2, "--", "bash", "-c", code, PATH=path)
    assert sorted(result.stdout.splitlines()) == ["0 0 WARN", "1 1 WARN"]
    result = bash(LOCAL, 2, "--", "bash", "-c", code, PATH=path, CUDA_VISIBLE_DEVICES="5,7")
    assert sorted(result.stdout.splitlines()) == ["0 5 WARN", "1 7 WARN"]
    result = bash(LOCAL, 4, "--", "true", PATH=path)
    assert result.returncode == 2
    assert "4 processes, but 3 GPUs" in result.stderr


@pytest.mark.parametrize("count", ["", "0", "two"])
def test_local_wants_a_number(count):
    result = bash(LOCAL, count)
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1


def test_two_processes_train_together_under_local():
    code = (
        "from visionfm_jax.parallel import cluster; me = cluster.initialize(timeout=60)\n"
        "import jax, os; os.write(1, f'{me} {jax.process_count()}\\n'.encode())"
    )
    result = bash(LOCAL, 2, "--", sys.executable, "-c", code, timeout=60)
    assert result.returncode == 0, result.stderr
    assert sorted(result.stdout.splitlines()) == ["(0, 2) 2", "(1, 2) 2"]


def submit(tmp_path, task_exit):
    """Run the SLURM script where srun ends with `task_exit`; returns the result and what was called."""
    log = tmp_path / "calls"
    path = put(tmp_path / "bin", "srun", f'echo "srun $*" >>{log}; exit {task_exit}\n')
    put(tmp_path / "bin", "scontrol", f'echo "scontrol $*" >>{log}\n')
    script = tmp_path / "spooled"  # SLURM runs a copy
    shutil.copy(ROOT / "launch/slurm.sbatch", script)
    submitted = tmp_path / "submitted"
    (submitted / "launch").mkdir(parents=True, exist_ok=True)
    shutil.copy(ROOT / "launch/env.sh", submitted / "launch")
    result = bash(script, "--config=x.py", PATH=path, SLURM_JOB_ID="42", SLURM_SUBMIT_DIR=str(submitted))
    return result, log.read_text().splitlines()


def test_slurm_queues_again_after_75(tmp_path):
    result, calls = submit(tmp_path, 75)
    assert result.returncode == 75
    assert calls[0].startswith("srun ")
    assert calls[0].endswith("-m visionfm_jax.main --config=x.py")
    assert calls[1:] == ["scontrol requeue 42"]


def test_slurm_queues_again_three_times_after_a_lost_process(tmp_path):
    """Three times in a row: with a saved state in between it counts anew."""
    codes = [71, 137, 75, 71, 134, 71, 71]
    for attempt, code in enumerate(codes):
        result, calls = submit(tmp_path, code)
        assert result.returncode == code
        queued = attempt < len(codes) - 1
        assert calls[-1].startswith("scontrol requeue" if queued else "srun")
    assert "a process was lost again (code 71) after 3 restarts" in result.stderr
    assert not list(tmp_path.glob("submitted/slurm-*"))


@pytest.mark.parametrize("code", [0, 1, 2, 4, 74, 130])
def test_slurm_ends_otherwise(tmp_path, code):
    result, calls = submit(tmp_path, code)
    assert result.returncode == code
    assert len(calls) == 1


def test_slurm_asks_for_a_warning_and_for_the_repository(tmp_path):
    text = (ROOT / "launch/slurm.sbatch").read_text()
    assert "#SBATCH --signal=TERM@120" in text
    assert "#SBATCH --requeue" in text
    result = bash(ROOT / "launch/slurm.sbatch", SLURM_JOB_ID="1", SLURM_SUBMIT_DIR=str(tmp_path))
    assert result.returncode == 2
    assert "has no launch/env.sh; submit from the folder" in result.stderr


FAKE_MPIRUN = """
[ "$1 $2" = "-np 2" ]; shift 2
for rank in 0 1; do
  OMPI_COMM_WORLD_RANK=$rank OMPI_COMM_WORLD_SIZE=2 OMPI_COMM_WORLD_LOCAL_RANK=$rank OMPI_COMM_WORLD_LOCAL_SIZE=2 "$@"
done
"""


def test_mpi_ranks_get_numbers_and_one_address(tmp_path):
    path = put(tmp_path, "mpirun", FAKE_MPIRUN)
    put(tmp_path, "nvidia-smi", "true\n")
    put(
        tmp_path,
        "fakepython",
        f'[ "$1" = -m ] || exec {sys.executable} "$@"\n'
        'echo "$VISIONFM_PROCESS/$VISIONFM_PROCESSES $VISIONFM_COORDINATOR $CUDA_VISIBLE_DEVICES $*"\n',
    )
    result = bash(
        ROOT / "launch/mpi.sh", "-np", 2, "--", "--config=x.py", PATH=path, PYTHON=str(tmp_path / "fakepython")
    )
    assert result.returncode == 0, result.stderr
    rows = [line.split() for line in result.stdout.splitlines()]
    assert [(row[0], row[2]) for row in rows] == [("0/2", "0"), ("1/2", "1")]
    assert rows[0][1] == rows[1][1]
    assert int(rows[0][1].rpartition(":")[2]) > 0
    assert rows[0][3:] == ["-m", "visionfm_jax.main", "--config=x.py"]


def test_mpi_says_what_is_missing():
    result = bash(ROOT / "launch/mpi.sh", "-np", 2)
    assert result.returncode == 2
    assert "no --" in result.stderr
    result = bash(ROOT / "launch/mpi.sh", "--rank", "h:1", sys.executable)
    assert result.returncode == 2
    assert "PMI_RANK" in result.stderr


def test_the_flags_of_env_are_known_to_this_xla():
    script = f"source {ROOT}/launch/env.sh; exec {sys.executable} -c 'import jax; print(jax.jit(lambda x: x + 1)(1))'"
    result = bash("-c", script, XLA_FLAGS="--xla_gpu_all_reduce_combine_threshold_bytes=1")
    assert result.returncode == 0, result.stderr  # XLA aborts on a flag it does not know
    assert result.stdout == "2\n"
    shown = bash(ROOT / "launch/env.sh", XLA_FLAGS="--mine=1", NCCL_DEBUG="INFO").stdout
    assert "--mine=1\n" in shown  # last: XLA takes the last of equal flags
    assert "NCCL_DEBUG=INFO" in shown


def test_env_leaves_the_variables_of_its_caller():
    result = bash(
        "-c", f"python=mine flags=too; source {ROOT}/launch/env.sh; echo $python $flags; compgen -v visionfm_"
    )
    assert result.stdout == "mine too\n"


def test_the_jobset_is_consistent():
    jobset = yaml.safe_load((ROOT / "launch/k8s-jobset.yaml").read_text())
    assert jobset["kind"] == "JobSet"
    (replicated,) = jobset["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    assert job["completionMode"] == "Indexed"
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    env = {entry["name"]: entry for entry in container["env"]}
    assert int(env["VISIONFM_PROCESSES"]["value"]) == job["completions"] == job["parallelism"]
    host, port = env["VISIONFM_COORDINATOR"]["value"].split(":")
    name = jobset["metadata"]["name"]
    assert host == f"{name}-{replicated['name']}-0-0.{name}"
    assert int(port) == container["ports"][0]["containerPort"]
    rules = {
        rule["onExitCodes"]["values"][0]: rule["action"]
        for rule in job["podFailurePolicy"]["rules"]
        if "onExitCodes" in rule
    }
    assert rules == {75: "Ignore", 1: "FailJob"}
    assert pod["restartPolicy"] == "Never"


def test_a_pod_asks_its_own_python_for_the_settings_and_does_not_run_without_them(tmp_path):
    jobset = yaml.safe_load((ROOT / "launch/k8s-jobset.yaml").read_text())
    pod = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    (script,) = pod["containers"][0]["args"]
    put(tmp_path / "launch", "env.sh", "")
    path = put(tmp_path / "bin", "python", 'echo "$@"\n')

    def start(env):
        (tmp_path / "launch/env.sh").write_text(env)
        return bash("-c", f"cd {tmp_path}; {script}", PATH=path, PYTHON="")

    done = start("echo asks $PYTHON")
    assert done.stdout.startswith("asks python\n-m visionfm_jax.main --config=configs/vit_huge.py ")
    done = start("return 2")
    assert (done.returncode, done.stdout) == (2, "")


def test_quickstart_installs_once_and_again_when_pyproject_changes(tmp_path):
    """On a copy with a pip that only notes its calls."""
    (tmp_path / "launch").mkdir()
    for name in ("quickstart.sh", "test.sh", "venv.sh"):
        shutil.copy(ROOT / "launch" / name, tmp_path / "launch")
    (tmp_path / "pyproject.toml").write_text("one")
    log = tmp_path / "calls"
    put(
        tmp_path / "base",
        "python3",
        f'if [ "$*" = "-m venv .venv" ]; then mkdir -p .venv/bin; cp "$0" .venv/bin/python; exit; fi\n'
        f'[ "$1" != -m ] && exec {sys.executable} "$@"\n'
        f'echo "$*" >>{log}\n',
    )
    env = {"PYTHON": str(tmp_path / "base" / "python3")}
    quickstart, test = tmp_path / "launch/quickstart.sh", tmp_path / "launch/test.sh"

    def calls(script, *args):
        log.write_text("")
        result = bash(script, *args, **env)
        assert result.returncode == 0, result.stderr
        return [line for line in log.read_text().splitlines() if line != "-m pip --version"]

    main = "-m visionfm_jax.main --config=configs/quickstart.py"
    first = calls(quickstart, "--config.seed=1")
    assert first[0].startswith("-m pip install")
    assert first[1:] == [f"{main} --config.seed=1"]
    assert calls(quickstart) == [main]
    assert [line.split()[1] for line in calls(test, "-x")] == ["pip", "pytest"]
    assert calls(test, "-x") == ["-m pytest -n 2 --dist loadfile --no-loadscope-reorder -x"]
    assert calls(test, "--quick", "-x") == ["-m pytest -n 2 --dist loadfile --no-loadscope-reorder -m not slow -x"]
    (tmp_path / "pyproject.toml").write_text("two")
    assert len(calls(quickstart)) == 2


def test_an_old_python_is_refused_in_one_line(tmp_path):
    put(tmp_path, "python-old", "exit 1\n")
    result = bash("-c", f"source {ROOT}/launch/venv.sh; find_python", PYTHON=str(tmp_path / "python-old"))
    assert result.returncode == 2
    assert "is not a Python >= 3.11" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_programs_that_need_torch_give_help_without_it():
    programs = [*(ROOT / "tests" / "parity").glob("make_*.py"), *(ROOT / "tools").glob("*architectures.py")]
    assert len(programs) > 8
    for program in programs:
        done = subprocess.run([sys.executable, "-IS", program, "--help"], capture_output=True, text=True)
        assert (done.returncode, done.stdout[:6]) == (0, "usage:"), done.stderr


def test_the_image_is_installed_with_its_version_before_its_code_is_there(tmp_path):
    """By the files that the Dockerfile copies before it installs."""
    before, install, after = (ROOT / "launch/Dockerfile").read_text().partition("pip install")
    assert install
    for line in before.splitlines():
        if line.startswith("COPY "):
            *names, folder = line.split()[1:]
            (tmp_path / folder).mkdir(exist_ok=True)
            for name in names:
                shutil.copy(ROOT / name, tmp_path / folder)
    code = [sys.executable, "-m", "hatchling", "metadata", "version"]
    found = subprocess.run(code, cwd=tmp_path, capture_output=True, text=True, check=True).stdout.strip()
    assert found == visionfm_jax.__version__
    assert "chown -R" not in after  # which would hold every file twice
    ignored = set((ROOT / ".dockerignore").read_text().split())
    assert {".git", ".venv", "data", "weights", "runs", "exported", "site"} <= ignored
