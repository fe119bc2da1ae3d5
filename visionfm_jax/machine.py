"""The machine that a process runs on."""

import os


def usable_cores() -> int:
    """Cores that this process may run on: a container or a job may have fewer than its machine."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
