"""The machine that a process runs on, and what of it is that process's."""

from __future__ import annotations

import math
import os
import socket
import sys
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

Place = list  # of a process, as JSON: the name of its machine, and the cores that it may run on


class Room(NamedTuple):
    """What one process may take, where others of the same run do alike."""

    cores: float
    shared_memory: float  # bytes of /dev/shm; infinite where the system has none


def place() -> Place:
    """Where this process runs: a container or a job may have fewer cores than its machine."""
    known = hasattr(os, "sched_getaffinity")
    return [socket.gethostname(), sorted(os.sched_getaffinity(0)) if known else list(range(os.cpu_count() or 1))]


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(place()[1])


def room(places: Sequence[Place], process: int) -> Room:
    """An equal share of each core, and of the shared memory that is free now, for all that are on it.

    Args:
      places: of all processes of the run, in order.
      process: this one.
    """
    host, cores = places[process]
    here = [others for name, others in places if name == host]
    users = Counter(core for others in here for core in others)
    free = math.inf if sys.platform != "linux" else 0
    if os.access("/dev/shm", os.W_OK):
        stat = os.statvfs("/dev/shm")
        free = stat.f_bavail * stat.f_frsize
    return Room(sum(1 / users[core] for core in cores), free / len(here))
