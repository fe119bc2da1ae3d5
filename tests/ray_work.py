"""What tests hand to a Ray cluster, in a process of its own: `python ray_work.py ADDRESS FOLDER NAME ...`."""

import functools
import os
import signal
import sys
import time
from pathlib import Path

import ray

from visionfm_jax.data.shards import Ray, map_shards
from visionfm_jax.errors import DataError, UserError


def squared(shard):
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
    """As `squared`, but its process is killed `often` times at shard 5."""
    if shard == 5:
        deaths = len(os.listdir(folder))
        if deaths < often:
            (folder / str(deaths)).touch()
            os.kill(os.getpid(), signal.SIGKILL)
    return shard * shard


def waits(folder, shard):
    """As `squared`, slowly; leaves a file, so that it is known that the work has begun."""
    (folder / str(shard)).touch()
    time.sleep(0.2)
    return shard * shard


WORK = {"squared": squared, "fails": fails, "fails oddly": fails_oddly}
WITH_FILES = {
    "dies twice": functools.partial(dies, often=2),
    "dies always": functools.partial(dies, often=99),
    "waits": waits,
}


def main(address: str, folder: str, *names: str) -> None:
    """The results of each name, or the error, in a file: Ray prints what happens to its workers."""
    ray.init(address, log_to_driver=False, logging_level="ERROR")  # one connection for all
    for name in names:
        work = WORK.get(name)
        if work is None:
            (Path(folder) / name).mkdir()
            work = functools.partial(WITH_FILES[name], Path(folder) / name)
        try:
            results = " ".join(map(str, map_shards(work, range(40), Ray(address), title=name)))
        except (UserError, RuntimeError) as error:
            results = f"{type(error).__name__}: {error}"
        (Path(folder) / f"{name}.txt").write_text(results)


if __name__ == "__main__":
    main(*sys.argv[1:])
