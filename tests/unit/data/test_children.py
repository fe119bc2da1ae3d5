"""Processes that index tars do not outlive the one that has started them."""

import os
import signal
import subprocess
import sys
import time

PARENT = """
import multiprocessing, os, signal, time
from visionfm_jax.data.shards import Local, map_shards
results = map_shards(time.sleep, [0] + [60] * 99, Local(2), title="")
next(results)
print(*[child.pid for child in multiprocessing.active_children()], flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_killed_process_takes_its_indexers_along():
    done = subprocess.run([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True, timeout=60)
    assert done.returncode == -signal.SIGKILL
    children = [int(pid) for pid in done.stdout.split()]
    assert len(children) == 2
    end = time.monotonic() + 20
    try:
        while any(map(alive, children)):
            assert time.monotonic() < end, "they live on"
            time.sleep(0.05)
    finally:
        for pid in filter(alive, children):
            os.kill(pid, signal.SIGKILL)
