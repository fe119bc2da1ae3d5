"""A function over the shards of a dataset: in this process, in processes of this machine, or on a Ray cluster.

A shard's results do not depend on who makes them, so that every engine gives the same. Functions that write do so by
rename, whole or not at all: work that was stopped is started again, and finds what was finished.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import multiprocessing
import sys
import types
from argparse import ArgumentParser, Namespace
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from tqdm import tqdm

from visionfm_jax.data.children import end_with_parent
from visionfm_jax.errors import ConfigError, LostError, UserError, complain, one_line
from visionfm_jax.machine import usable_cores

AHEAD = 4  # shards to a worker that are handed out before the first of them is done: bounds what waits in memory
TRIES = 3  # times that a worker may die, or a node be lost, on the same shard
MOST = 1024  # processes
_S = TypeVar("_S")
_R = TypeVar("_R")


class Engine(Protocol):
    """Who does the work."""

    def map(self, function: Callable[[_S], _R], shards: Sequence[_S]) -> Iterator[_R]:
        """`function` of each shard, in order; see `map_shards`."""
        ...


def map_shards(
    function: Callable[[_S], _R], shards: Sequence[_S], engine: Engine, *, title: str, unit: str = " shards"
) -> Iterator[_R]:
    """`function` of each shard, in order of the shards, with a progress bar.

    Args:
      function: can be pickled, as its results can; gives the same for a shard whenever and wherever it is called, and
        is called again where a worker died.
      shards: what it is called with.
      engine: who calls it.
      title: of the work, for the bar.
      unit: that the bar counts.

    Raises:
      What the function raises, of the first shard of which it does.
      LostError: workers die again and again.
    """
    bar = tqdm(total=len(shards), desc=title, unit=unit, delay=2, leave=False, disable=not sys.stderr.isatty())
    with bar, contextlib.closing(engine.map(function, shards)) as results:
        for result in results:
            bar.update()
            yield result


@dataclass(frozen=True)
class Here:
    """This process, one shard after the other: for work that takes the whole machine, or an accelerator."""

    def map(self, function: Callable[[_S], _R], shards: Sequence[_S]) -> Iterator[_R]:
        """As `Engine.map`."""
        yield from map(function, shards)


@dataclass(frozen=True)
class Threads:
    """Threads of this process, for work that waits for a store."""

    count: int

    def map(self, function: Callable[[_S], _R], shards: Sequence[_S]) -> Iterator[_R]:
        """As `Engine.map`."""
        pool = concurrent.futures.ThreadPoolExecutor(self.count)
        try:
            for job in _ahead(lambda shard: pool.submit(function, shard), shards, self.count):
                yield job.result()
        finally:
            pool.shutdown(cancel_futures=True)


@dataclass(frozen=True)
class Local:
    """Processes of this machine; None: one for each core. They are started again where one dies."""

    jobs: int | None = None

    def map(self, function: Callable[[_S], _R], shards: Sequence[_S]) -> Iterator[_R]:
        """As `Engine.map`."""
        jobs = min(self.jobs or usable_cores(), len(shards))
        if jobs <= 1:
            yield from map(function, shards)
            return
        left, died = deque(shards), 0
        while left:
            try:
                for result in self._until_death(function, left, jobs):
                    left.popleft()
                    died = 0
                    yield result
            except BrokenProcessPool as error:
                died += 1
                if died == TRIES:
                    raise LostError(
                        f"a process died {TRIES} times at one of {_shown(list(left)[:jobs])}; memory may be short: use "
                        "fewer --jobs, then start the same command again"
                    ) from error
                complain(f"a process died at one of {_shown(list(left)[:jobs])}; its work is done again")

    def _until_death(self, function: Callable[[_S], _R], shards: deque[_S], jobs: int) -> Iterator[_R]:
        """Results in order, until a process dies."""
        context = multiprocessing.get_context("spawn")
        pool = concurrent.futures.ProcessPoolExecutor(jobs, context, initializer=end_with_parent)

        def submit(shard: _S) -> concurrent.futures.Future[_R]:
            with _no_main():
                return pool.submit(function, shard)

        try:
            for job in _ahead(submit, list(shards), jobs):
                yield job.result()
        finally:
            pool.shutdown(cancel_futures=True)


@dataclass(frozen=True)
class Ray:
    """A Ray cluster (Moritz et al. 2018, https://arxiv.org/abs/1712.05889): the package runs on its nodes, and sees
    the same paths there.

    Attributes:
      address: of the cluster; empty: RAY_ADDRESS, else one of this machine alone, which ends with the work.
      gpus: whether a worker takes a GPU, where the cluster has some.
    """

    address: str = ""
    gpus: bool = False

    def map(self, function: Callable[[_S], _R], shards: Sequence[_S]) -> Iterator[_R]:
        """As `Engine.map`."""
        try:
            import ray
        except ImportError as error:
            raise UserError("--engine=ray: Ray is not installed; pip install 'visionfm_jax[ray]'") from error
        joined = ray.is_initialized()  # by who calls this
        if not joined:
            try:
                ray.init(self.address or None, log_to_driver=False, logging_level="ERROR", include_dashboard=False)
            except (ConnectionError, RuntimeError, ValueError) as error:
                raise UserError(f"--address={self.address}: no Ray cluster there ({one_line(error)})") from error
        try:
            yield from self._map(ray, function, shards)
        finally:
            if not joined:
                ray.shutdown()

    def _map(self, ray: Any, function: Callable[[_S], _R], shards: Sequence[_S]) -> Iterator[_R]:
        kept = ray.put(function)  # once, not with each shard
        there = ray.cluster_resources()
        gpus = self.gpus and there.get("GPU", 0)
        task = ray.remote(num_cpus=1, num_gpus=1 if gpus else 0, max_retries=TRIES - 1)(_called)
        workers = int(gpus or there.get("CPU", 1))
        started: list[Any] = []

        def submit(shard: _S) -> tuple[_S, Any]:
            started.append(task.remote(kept, shard))
            return shard, started[-1]

        try:
            for shard, job in _ahead(submit, shards, workers):
                yield self._result(ray, shard, job)
                started.remove(job)
        finally:
            for job in started:  # whose results nobody wants any more
                ray.cancel(job)

    def _result(self, ray: Any, shard: Any, found: Any) -> Any:
        try:
            return ray.get(found)
        except ray.exceptions.RayTaskError as error:
            raise error.cause from error  # what the function raised
        except ray.exceptions.RayError as error:
            raise LostError(
                f"the worker died {TRIES} times at {_shown([shard])} ({one_line(error)}); start the same command again"
            ) from error


def _ahead(submit: Callable[[_S], _R], shards: Sequence[_S], workers: int) -> Iterator[_R]:
    """What `submit` gives for each shard, in order, `AHEAD` of them to a worker submitted before the first is used."""
    waiting: deque[_R] = deque()
    for shard in shards:
        waiting.append(submit(shard))
        if len(waiting) == workers * AHEAD:
            yield waiting.popleft()
    yield from waiting


def _called(function: Callable[[_S], _R], shard: _S) -> _R:
    return function(shard)


def add_arguments(parser: ArgumentParser) -> None:
    """The arguments that choose an engine."""
    parser.add_argument("--engine", choices=("local", "ray"), default="local", help="processes of this machine, or Ray")
    parser.add_argument("--jobs", type=int, metavar="N", help="number of processes of this machine (one for each core)")
    parser.add_argument("--address", default="", metavar="HOST:PORT", help="of the Ray cluster (RAY_ADDRESS)")


def engine_of(arguments: Namespace, gpus: bool = False) -> Engine | None:
    """The engine that `add_arguments` asks for; None: none is named, and each work has its own.

    Args:
      arguments: as they were parsed.
      gpus: as of `Ray`.

    Raises:
      ConfigError: arguments that do not go together, or a number that is no number of processes.
    """
    jobs, by_ray = arguments.jobs, arguments.engine == "ray"
    if jobs is not None and not 1 <= jobs <= MOST:
        raise ConfigError(f"--jobs={jobs}: must lie in [1, {MOST}]; leave it out for one for each core")
    if by_ray and jobs is not None:
        raise ConfigError(f"--jobs={jobs}: is for --engine=local; the nodes of a cluster say what they have")
    if arguments.address and not by_ray:
        raise ConfigError(f"--address={arguments.address}: is for --engine=ray; add that, or leave --address out")
    return Ray(arguments.address, gpus) if by_ray else Local(jobs) if jobs else None


def _shown(shards: Sequence[Any]) -> str:
    names = [str(shard[0] if type(shard) is tuple else shard) for shard in shards]  # or of a class with a name
    return ", ".join(name if len(name) < 60 else name[:60] + "…" for name in names)


@contextlib.contextmanager
def _no_main() -> Iterator[None]:
    """Spawned processes would import `__main__`: the whole trainer."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
