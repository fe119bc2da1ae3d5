"""A function over the shards of a dataset: in this process, in processes of this machine, or on a Ray cluster.

A shard's results do not depend on who makes them, so that every engine gives the same. Functions that write do so by
rename, whole or not at all: work that was stopped is started again, and finds what was finished.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import multiprocessing
import os
import pickle
import queue
import signal
import sys
import threading
import time
import traceback
from argparse import ArgumentParser, Namespace
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Protocol, TypeVar

from tqdm import tqdm

from visionfm_jax.data.children import end_with_parent, no_main, portable
from visionfm_jax.errors import ConfigError, LostError, UserError, complain, one_line
from visionfm_jax.logs import quiet_logs
from visionfm_jax.machine import usable_cores

AHEAD = 4  # shards to a worker that are handed out before the first of them is done: bounds what waits in memory
TRIES = 3  # times that a worker may die, or a node be lost, on the same shard
MOST = 1024  # processes
GRACE = 5.0  # seconds for processes to end in
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
            for job in _ahead(lambda shard: pool.submit(function, shard), shards, lambda: self.count):
                yield job.result()
        finally:
            pool.shutdown(cancel_futures=True)


@dataclass(frozen=True)
class Local:
    """Processes of this machine; None: one for each core. Where one dies, another does its shard again."""

    jobs: int | None = None

    def map(self, function: Callable[[_S], _R], shards: Sequence[_S]) -> Iterator[_R]:
        """As `Engine.map`."""
        jobs = min(self.jobs or usable_cores(), len(shards))
        if jobs <= 1:
            yield from map(function, shards)
            return
        workers: list[_Worker] = []
        idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        pool = concurrent.futures.ThreadPoolExecutor(jobs)

        def call(shard: _S) -> _R:
            worker = idle.get()
            try:
                return worker.call(shard)
            finally:
                idle.put(worker)

        try:
            for _ in range(jobs):
                workers.append(_Worker(function))
                idle.put(workers[-1])
            for job in _ahead(lambda shard: pool.submit(call, shard), shards, lambda: jobs):
                yield job.result()
        finally:
            for worker in workers:
                worker.end()
            deadline = time.monotonic() + GRACE
            for worker in workers:
                worker.join(deadline)
            pool.shutdown(cancel_futures=True)


class _Worker:
    """A process that calls a function, for one thread at a time; where it dies, another takes its place.

    It has a pipe of its own. The processes of `concurrent.futures` share theirs and its locks: one that dies while it
    answers leaves all others, and who waits for them, waiting for ever.

    Args:
      function: as for `map_shards`.
    """

    def __init__(self, function: Callable[[Any], Any]):
        self._function = pickle.dumps(function)
        self._changing = threading.Lock()
        self._busy = self._ended = False
        self._start()

    def call(self, shard: Any) -> Any:
        """The function's result of a shard.

        Raises:
          What the function raises.
          LostError: the process has died `TRIES` times.
          CancelledError: nobody wants the result any more.
        """
        question = pickle.dumps(shard)
        with self._changing:
            if self._ended:
                raise concurrent.futures.CancelledError
            self._busy = True
        for died in range(1, TRIES + 1):
            try:
                self._pipe.send_bytes(question)
                answer = self._pipe.recv_bytes()
                break
            except (EOFError, OSError):  # the other end of the pipe is gone
                self._replace(shard, died)
        self._busy = False
        result, error = pickle.loads(answer)
        if error is not None:
            raise error
        return result

    def end(self) -> None:
        """Have the process end: at once, whatever it does, for what it writes is whole or not there."""
        with self._changing:
            self._ended = True
            if self._busy:
                self._process.terminate()
            else:
                self._pipe.close()

    def join(self, deadline: float) -> None:
        """Wait for its end until a moment of `time.monotonic`, when it is killed."""
        self._process.join(max(0.0, deadline - time.monotonic()))
        self._process.kill()
        self._process.join()

    def _start(self) -> None:
        pipe, other = multiprocessing.Pipe()
        process = multiprocessing.get_context("spawn").Process(target=_serve, args=(other,))
        with no_main():
            process.start()
        other.close()  # so that the pipe ends with the process
        self._process, self._pipe = process, pipe
        with contextlib.suppress(OSError):  # it has died, which `call` finds out
            pipe.send_bytes(self._function)

    def _replace(self, shard: Any, died: int) -> None:
        """Start another process, after this one has died for the `died`-th time at a shard."""
        with self._changing:
            if self._ended:
                raise concurrent.futures.CancelledError
            self._process.kill()
            self._process.join()
            code = self._process.exitcode or 0
            where = f"at {_shown(shard)} (" + (f"signal {-code})" if code < 0 else f"exit code {code})")
            if died == TRIES:
                raise LostError(
                    f"a process died {TRIES} times {where}; memory may be short: use fewer --jobs, then start the same "
                    "command again"
                )
            complain(f"a process died {where}; its work is done again")
            self._start()


def _serve(pipe: Connection) -> None:
    """In a process: answers each shard with the result of a function, which comes first, and None, or with None and
    what it has raised.
    """
    end_with_parent()
    quiet_logs()  # as those of the command that has started this process
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before numpy is there: the other cores have work of their own
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of Ctrl-C: the process that has started this one ends it
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that nothing unfinished is left
    with contextlib.suppress(EOFError, OSError):  # nobody asks any more
        pickled, function = pipe.recv_bytes(), None
        while True:
            question = pipe.recv_bytes()
            try:
                if function is None:  # here, as its data may be gone
                    function = pickle.loads(pickled)
                answer = pickle.dumps((function(pickle.loads(question)), None))
            except Exception as error:
                if (sent := portable(error)) is error:
                    error.add_note("".join(traceback.format_exception(error)))
                answer = pickle.dumps((None, sent))
            pipe.send_bytes(answer)


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
                named = (
                    f"--address={self.address}" if self.address else f"RAY_ADDRESS={os.environ.get('RAY_ADDRESS', '')}"
                )
                raise UserError(f"{named}: no Ray cluster there ({one_line(error)})") from error
        try:
            yield from self._map(ray, function, shards)
        finally:
            if not joined:
                ray.shutdown()

    def _map(self, ray: Any, function: Callable[[_S], _R], shards: Sequence[_S]) -> Iterator[_R]:
        kept = ray.put(function)  # once, not with each shard
        gpus = self.gpus and "GPU" in ray.cluster_resources()
        task = ray.remote(num_cpus=1, num_gpus=1 if gpus else 0, max_retries=TRIES - 1)(_called)

        def workers() -> int:
            """Of the nodes that are there now: others join."""
            return int(ray.cluster_resources().get("GPU" if gpus else "CPU", 0))

        if not workers():  # Ray waits for them in silence
            complain("the Ray cluster has no CPU; waiting until a node joins that has one")

        def submit(shard: _S) -> tuple[_S, Any]:
            return shard, task.remote(kept, shard)

        # After an error, what was submitted ahead runs on, or ends with the connection. It is not cancelled: if a task
        # ends at that moment, Ray aborts this process ("Tried to complete task that was not pending", Ray 2.60).
        for shard, job in _ahead(submit, shards, workers):
            yield self._result(ray, shard, job)

    def _result(self, ray: Any, shard: Any, found: Any) -> Any:
        try:
            return ray.get(found)
        except ray.exceptions.RayTaskError as error:
            raise error.cause from error  # what the function raised
        except ray.exceptions.RayError as error:
            raise LostError(
                f"the worker died {TRIES} times at {_shown(shard)} ({one_line(error)}); start the same command again"
            ) from error


def _ahead(submit: Callable[[_S], _R], shards: Sequence[_S], workers: Callable[[], int]) -> Iterator[_R]:
    """What `submit` gives for each shard, in order, `AHEAD` of them to a worker submitted before the first is used."""
    waiting: deque[_R] = deque()
    for shard in shards:
        waiting.append(submit(shard))
        while waiting and len(waiting) >= max(1, workers()) * AHEAD:
            yield waiting.popleft()
    yield from waiting


def _called(function: Callable[[_S], _R], shard: _S) -> _R:
    try:
        return function(shard)
    except Exception as error:
        if (sent := portable(error)) is error:
            raise
        raise sent from None


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


def _shown(shard: Any) -> str:
    name = str(shard[0] if type(shard) is tuple else shard)  # or of a class with a name
    return name if len(name) < 60 else name[:60] + "…"
