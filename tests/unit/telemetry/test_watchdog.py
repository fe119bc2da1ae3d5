import os
import socket
import subprocess
import sys
import threading
import time

from visionfm_jax.telemetry.watchdog import Watchdog, verdict

START = "import sys, time\nfrom visionfm_jax.telemetry.watchdog import Watchdog\n"


def start(code, *args):
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, args)],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def error_line(err):
    return next(line for line in err.splitlines() if line.startswith("visionfm_jax: error: "))


def test_a_stuck_loop_ends_with_stacks_and_one_line(tmp_path):
    code = START + (
        "def reading_for_ever():\n    time.sleep(60)\n"
        "dog = Watchdog(0.005, folder=sys.argv[1])\n"  # 0.3 s
        "for step in range(1, 8):\n    time.sleep(0.1); dog.beat(step)\n"
        "reading_for_ever()\n"
    )
    process = start(code, tmp_path / "run")
    _, err = process.communicate(timeout=30)
    assert process.returncode == 71
    assert "the last was step 7;" in error_line(err)  # the beats kept it quiet for longer than the limit
    assert "reading_for_ever" in error_line(err)
    assert "stuck_minutes" in error_line(err)
    assert "in reading_for_ever" in (tmp_path / "run" / "stacks-0.txt").read_text()
    assert "in reading_for_ever" in err.replace(error_line(err), "")


def test_two_stuck_processes_name_the_one_that_lags(tmp_path):
    code = START + (
        "from visionfm_jax.parallel import cluster\n"
        "me = int(sys.argv[2]); cluster.initialize(sys.argv[3], 2, me, timeout=30)\n"
        "dog = Watchdog(0.02, folder=sys.argv[1], process=me, processes=2)\n"  # 1.2 s
        "dog.beat(5 - me); time.sleep(60)\n"
    )
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        where = f"127.0.0.1:{s.getsockname()[1]}"
    two = [start(code, tmp_path, p, where) for p in range(2)]
    said = [process.communicate(timeout=60)[1] for process in two]
    assert [process.returncode for process in two] == [71, 71]
    for p in range(2):
        assert f"process {p} of 2: no step finished for 0.02 minutes" in error_line(said[p])
        assert "process 1 lags behind at step 4, <string>:6 in <module>" in error_line(said[p])
        assert (tmp_path / f"stacks-{p}.txt").exists()


def test_zero_minutes_is_off_and_close_ends_the_watch(tmp_path):
    off = Watchdog(0, folder=tmp_path)
    off.beat(1)
    off.close()
    with Watchdog(0.002, folder=tmp_path) as dog:
        dog.beat(1)
    dog.close()
    time.sleep(0.3)
    assert list(tmp_path.iterdir()) == []


def test_no_alarm_while_suspended(tmp_path, monkeypatch):
    alarm = threading.Event()
    monkeypatch.setattr(Watchdog, "_alarm", lambda self: alarm.set())
    with Watchdog(0.005, folder=tmp_path) as dog:  # 0.3 s
        with dog.suspended():
            alarm.clear()
            assert not alarm.wait(0.6)
        assert alarm.wait(30)


def test_the_verdict_names_who_is_behind():
    at = "loop.py:9 in run"
    assert verdict({0: (3, at)}, 1) == f"it stands at {at}"
    assert verdict({0: (3, at), 2: (3, at)}, 3) == "process 1 never reported a step"
    assert verdict({0: (3, at), 1: (2, "")}, 2) == "process 1 lags behind at step 2, silent"
    assert verdict({0: (3, at), 1: (3, "")}, 2) == "process 1 did not answer the alarm"
    assert verdict({0: (3, at), 1: (3, at), 2: (3, "loader.py:4 in get")}, 3) == (
        f"all are at the same step, but process 2 stands at loader.py:4 in get and the others at {at}"
    )
    assert verdict({0: (3, at), 1: (3, at)}, 2) == f"all 2 processes are at the same step and stand at {at}"
