"""Functions over shards, for tests of who calls them."""

import os
import signal
import time

from visionfm_jax.errors import DataError


def squared_slowly(shard):
    time.sleep(0.02 * (shard % 3))  # so that they end out of order
    return shard * shard


def fails(shard):
    if shard == 7:
        raise DataError("shard 7 is damaged")
    return shard


class OddError(Exception):
    def __init__(self, code, text):
        super().__init__(f"{code}: {text}")  # which does not unpickle


def fails_oddly(shard):
    raise OddError(404, f"no shard {shard}")


def dies(folder, shard, often):
    """As `squared_slowly`, but its process is killed `often` times at shard 5."""
    if shard == 5:
        deaths = len(os.listdir(folder))
        if deaths < often:
            (folder / str(deaths)).touch()
            os.kill(os.getpid(), signal.SIGKILL)
    return shard * shard


def waits(folder, shard):
    """As `squared_slowly`, slowly; leaves a file, so that it is known that the work has begun."""
    (folder / str(shard)).touch()
    time.sleep(0.2)
    return shard * shard
