"""What tests hand to a Ray cluster, in a process of its own: `python ray_work.py ADDRESS FOLDER NAME ...`."""

import functools
import sys
from pathlib import Path

import ray
from shard_work import dies, fails, fails_oddly, squared_slowly, waits

from visionfm_jax.data.shards import Ray, map_shards
from visionfm_jax.errors import UserError

WORK = {"squared": squared_slowly, "fails": fails, "fails oddly": fails_oddly}
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
