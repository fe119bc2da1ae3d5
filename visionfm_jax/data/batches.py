"""Filling host batches, and holding them ready: threads, worker processes, and how all of them end.

Grain's element is a whole host batch, filled by threads of our own: less is held in memory than with a batch per
thread, the first batch comes sooner, and Grain's cost per element is paid once per batch.
"""

from __future__ import annotations

import collections
import concurrent.futures
import math
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing import resource_tracker
from typing import Any

import cloudpickle
import grain
import numpy as np
from absl import flags

from visionfm_jax.config.load import MODULE
from visionfm_jax.data.children import end_with_parent, no_main, portable
from visionfm_jax.data.fields import Row, Spec
from visionfm_jax.errors import DataError
from visionfm_jax.machine import Room, place, room

Batch = dict[str, np.ndarray]
Make = Callable[[Any, int], Row]  # the row of a sample: what the order has at an index, and the index

OWN_CORES = 2  # of a process, for the run itself, beside its worker processes
CLOSE_SECONDS = 10.0  # for worker processes to end by themselves


class HostBatches(grain.MapDataset):
    """Element i: the rows of one host in the global batch `start + i`; zeros where the order has ended.

    What a row lacks of the `spec` is zero, too.
    """

    def __init__(
        self,
        order: grain.MapDataset,
        make: Make,
        spec: Spec,
        *,
        batch_size: int,
        host: int,
        hosts: int,
        start: int,
        threads: int,
    ):
        super().__init__(order)
        self._make, self._spec = make, dict(spec)
        self._global, self._local = batch_size, batch_size // hosts
        self._first = start * batch_size + host * self._local
        self._length = -(-len(order) // batch_size) - start
        self._threads = threads
        self._pool: concurrent.futures.ThreadPoolExecutor | None = None
        self._lock = threading.Lock()
        self._closed = False

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_pool": None, "_lock": None}  # threads do not travel to worker processes

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return self.slice(index)
        try:
            return self._fill(self._first + index * self._global)
        except Exception as error:
            if (sent := portable(error)) is error:  # Grain loses one that does not pickle, and waits for ever
                raise
            raise sent from None

    @property
    def nbytes(self) -> int:
        """Bytes of one batch."""
        return sum(self._local * int(np.prod(shape)) * np.dtype(kind).itemsize for shape, kind in self._spec.values())

    def rate(self) -> tuple[float, float]:
        """Images/s that one process makes, and cores that it keeps busy: of the second batch, as the first warms up."""
        self[0]
        wall, busy = time.perf_counter(), time.process_time()
        self[1]
        wall, busy = time.perf_counter() - wall, time.process_time() - busy
        return self._local / wall, busy / wall

    def close(self) -> None:
        """End the threads after the row that each is at; the batches that they leave unfinished are nobody's."""
        self._closed = True
        with self._lock:
            if self._pool is not None:
                self._pool.shutdown(wait=False, cancel_futures=True)

    def _fill(self, first: int) -> Batch:
        batch = {k: np.empty((self._local, *shape), dtype) for k, (shape, dtype) in self._spec.items()}
        # All at once: reads between two decodes push the decoder out of the processor's caches; it then takes twice as
        # long.
        asked = [self._parent[i] for i in range(first, min(first + self._local, len(self._parent)))]
        for array in batch.values():
            array[len(asked) :] = 0
        todo = iter(enumerate(asked))

        def work() -> None:
            for r, what in todo:  # shared: whoever is free takes the next row
                if self._closed:
                    return
                row = self._make(what, first + r)
                for key, array in batch.items():
                    array[r] = row.get(key, 0)

        if self._threads == 1:
            work()
            return batch
        jobs = [self._threads_pool().submit(work) for _ in range(min(self._threads, self._local))]
        try:
            for job in jobs:
                job.result()
        finally:
            for _ in todo:  # one failed: the others have nothing left to do
                pass
        return batch

    def _threads_pool(self) -> concurrent.futures.ThreadPoolExecutor:
        with self._lock:
            if self._pool is None:
                self._pool = concurrent.futures.ThreadPoolExecutor(self._threads, thread_name_prefix="rows")
            return self._pool


class Loader(Iterator[Batch]):
    """Runs `batches` ahead in threads or worker processes; an error or `close` ends all of them.

    Args:
      batches: of this process.
      workers: processes; 0: threads of this one.
      prefetch: batches held ready, per worker.
      choice: why so many workers, for people; "": the configuration says so.
    """

    def __init__(self, batches: HostBatches, *, workers: int, prefetch: int, choice: str = ""):
        self._batches = batches
        self.workers, self.choice = workers, choice
        self._closed = False
        self._turn = 0
        self._iters: list[Any] = []
        self._processes: list[Any] = []
        self._first: collections.deque[concurrent.futures.Future] = collections.deque()  # batch of each worker
        if workers:
            _check_shared_memory(batches.nbytes, workers, prefetch, bool(choice))
            self._iters = [_worker_iterator(batches, i, workers, prefetch) for i in range(workers)]
            self._start()
        else:
            ahead = grain.ReadOptions(num_threads=min(2, prefetch), prefetch_buffer_size=prefetch)
            self._iters = [iter(batches.to_iter_dataset(ahead))]
            self._iters[0].start_prefetch()

    def __iter__(self) -> Loader:
        return self

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if not getattr(self, "_closed", True):
            self.close()

    def __next__(self) -> Batch:
        if self._closed:
            raise StopIteration
        turn, self._turn = self._turn, self._turn + 1
        try:
            if self._first:
                return self._first.popleft().result()
            return next(self._iters[turn % len(self._iters)])
        except BaseException as error:
            died = [p.exitcode for p in self._processes if p.exitcode]
            self.close()
            traceback.clear_frames(error.__traceback__)  # Grain's iterators complain when they outlive the modules
            if died and isinstance(error, RuntimeError):  # Grain's way to say it
                raise DataError(
                    f"a worker process of the input pipeline died with exit code {died[0]}, most often for lack of "
                    "memory; lower data.workers or data.prefetch, or set data.workers to 0"
                ) from error
            raise

    def close(self) -> None:
        """End threads and worker processes; harmless when repeated."""
        if self._closed:
            return
        self._closed = True
        self._batches.close()
        if not self._processes:
            for it in self._iters:
                it.close()
            self._iters = []
            return
        # Grain waits, without limit, for the batch that a worker is at: ask all at once, and kill who does not come.
        closing = [threading.Thread(target=it.close, name="close-loader", daemon=True) for it in self._iters]
        for thread in closing:
            thread.start()
        end = time.monotonic() + CLOSE_SECONDS
        for thread in closing:
            thread.join(max(0.0, end - time.monotonic()))
        for process in self._processes:
            if process.is_alive():
                process.kill()
            process.join()
        self._first.clear()
        self._iters = []

    def _start(self) -> None:
        """Start the worker processes now, and their first batches in the background.

        SIGINT and SIGTERM are blocked while they start: the children inherit that, and so are ended by this process
        alone, in its own time (a scheduler or a terminal signals the whole group, and the training still has to
        save).
        """
        before = set(multiprocessing.active_children())
        resource_tracker.ensure_running()  # unblocks the two signals where it is started
        signals = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
        try:
            with no_main():
                for it in self._iters:
                    self._first.append(concurrent.futures.Future())
                    args = (self._first[-1], it)
                    threading.Thread(target=_resolve, args=args, name="first-batch", daemon=True).start()
                while len(self._processes) < len(self._iters) and not any(f.done() for f in self._first):
                    time.sleep(0.005)
                    self._processes = [p for p in multiprocessing.active_children() if p not in before]
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, signals)


def choose_workers(batches: HostBatches, demand: float, own: Room, prefetch: int) -> tuple[int, str]:
    """The fewest worker processes that keep up with a step, by making two batches in this one; and a line that says so.

    Args:
      batches: of this process.
      demand: images/s of this process; 0: threads of this process are wanted, and nothing is measured.
      own: what this process may take of its machine.
      prefetch: batches held ready, per worker.

    Returns:
      The number, bounded by the cores, without those of the run itself, and by the shared memory; 0 where more than
      one process is not needed, or has no cores. The line is "" where nothing was measured.
    """
    if not demand:
        return 0, ""
    try:
        rate, busy = batches.rate()
    except BaseException:
        batches.close()
        raise
    cores = max(own.cores - OWN_CORES, 0.0)
    most = int(min(cores / max(busy, 0.1), own.shared_memory // _shared_memory(batches.nbytes, prefetch)))
    wanted = demand / rate
    workers = most if wanted > most else math.ceil(wanted)
    workers = 0 if workers < 2 else workers
    reached = rate * max(1, workers)
    wants = f"the step takes at most {demand:.0f}" if math.isfinite(demand) else "what the step takes is not known"
    if reached < demand:
        wants += f"; {cores:.3g} cores and the shared memory allow no more than {reached:.0f}"
    where = f"{workers} processes" if workers else "threads of this process"
    return workers, f"{where}: one process makes {rate:.0f} images/s on {busy:.1f} cores, and {wants}"


def _shared_memory(batch_bytes: int, prefetch: int) -> int:
    """Bytes that a worker process may need in /dev/shm, where it hands its batches over."""
    return batch_bytes * (2 * prefetch + 2)


def _check_shared_memory(batch_bytes: int, workers: int, prefetch: int, chosen: bool) -> None:
    """Shared memory that is too small kills worker processes without a word."""
    free, need = room([place()], 0).shared_memory, _shared_memory(batch_bytes, prefetch)
    if free < need * workers:
        there = f"has {free / 1e6:.0f} MB free" if free else "is full, not there or cannot be written"
        raise DataError(
            f"/dev/shm {there}, but the {workers} processes of data.workers = "
            f"{-1 if chosen else workers} with data.prefetch = {prefetch} need up to {need * workers / 1e6:.0f} MB "
            "there; enlarge it (docker --shm-size, an emptyDir of medium Memory in Kubernetes), lower them, or set "
            "data.workers to 0"
        )


def _worker_iterator(batches: HostBatches, worker: int, workers: int, prefetch: int) -> Iterator[Batch]:
    """Every `workers`-th batch, from `worker` on, made in a process of its own that is not yet started.

    One `mp_prefetch` each, in place of one with many processes: that one loses track of those it has not read from
    when it is closed early.
    """
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # Grain reads flags of its own, and dies where no program has parsed them
    if file := sys.modules.get(MODULE):  # which a worker cannot import: its classes travel whole
        cloudpickle.register_pickle_by_value(file)
    ahead = grain.ReadOptions(num_threads=1, prefetch_buffer_size=1)
    process = grain.MultiprocessingOptions(num_workers=1, per_worker_buffer_size=prefetch)
    dataset = batches[worker::workers].to_iter_dataset(ahead).mp_prefetch(process, worker_init_fn=_init_worker)
    return iter(grain.experimental.ThreadPrefetchIterDataset(dataset.map(_own), prefetch_buffer_size=1))


def _own(batch: Batch) -> Batch:
    """Out of shared memory, which would live as long as anybody, a device too, holds the array."""
    return {k: np.array(v, subok=False) for k, v in batch.items()}


def _resolve(future: concurrent.futures.Future, batches: Iterator[Batch]) -> None:
    try:
        future.set_result(next(batches))
    except BaseException as error:
        future.set_exception(error)


def _init_worker(index: int, count: int) -> None:
    """In a worker process: keep off accelerators, and do not outlive the parent."""
    del index, count
    os.environ["JAX_PLATFORMS"] = "cpu"
    if jax := sys.modules.get("jax"):  # Grain imports it where it is installed; nothing here uses it
        jax.config.update("jax_platforms", "cpu")
    end_with_parent()
