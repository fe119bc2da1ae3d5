"""Host batches whose every pixel depends on (seed, sample index) only: not on hosts, workers, threads or restarts.

    record ids of each source -> shuffled by (seed, source, epoch) -> mixed by weight         sample i of the run
    -> read, decoded and transformed by the random numbers of (seed, i) -> rows of this host  batch of step s

A task of pairs and bare images takes p samples in turn from the mixture of the sources with captions, then q from the
mixture of the others.

Grain does the order, the mixture and the random numbers by index arithmetic; nothing is materialised, and the
position in the data is the step, nothing else. `data.batches` fills the batches and holds them ready.

Shapes: B rows of this host in a batch; H W image; V views.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import grain
import numpy as np
from absl import logging

from visionfm_jax import machine
from visionfm_jax.config.limits import ImageSize
from visionfm_jax.config.schema import DataConfig
from visionfm_jax.data.batches import Batch, HostBatches, Loader, choose_workers
from visionfm_jax.data.chain import Chain, EvalTransform
from visionfm_jax.data.fields import Fields, Row
from visionfm_jax.data.images import DamagedImage
from visionfm_jax.data.sources import Source, read_record
from visionfm_jax.data.sources.record import DamagedRecord
from visionfm_jax.errors import DataError
from visionfm_jax.machine import Room

DAMAGED = (DamagedImage, DamagedRecord)
# One of Grain's shuffles, 4 rounds of a block cipher, leaves records correlated over hundreds of samples; two leave
# traces; after three nothing was found. benchmarks/shuffle.py prints the statistics.
SHUFFLES = 3
NAMED = 1000  # damaged records of a start that are kept by name
STEP_OVER = 16  # unreadable records in a row after which the data, not an image, is taken for damaged


def train_loader(
    data: DataConfig,
    *,
    image_size: ImageSize,
    batch_size: int,
    seed: int,
    start_step: int,
    host: int,
    hosts: int,
    sources: Sequence[Source],
    fields: Fields,
    pair_ratio: tuple[int, int] = (0, 0),
    demand: float = 0.0,
    room: Room | None = None,
) -> Loader:
    """Endless batches of this host, from step `start_step` on; close it, or use it in a `with`.

    Args:
      data: mixture, transforms, threads or processes; `data.train[i]` describes `sources[i]`.
      image_size: (H, W) of what the model is given, or the side of a square.
      batch_size: rows over all hosts; row r of step s is sample s * batch_size + r.
      seed: of order and crops.
      start_step: the first batch is that of this step.
      host, hosts: this process and their number; host p gets rows [p B, (p + 1) B) with B = batch_size / hosts.
      sources: opened datasets.
      fields: what a row holds beside its image.
      pair_ratio: (p, q): sample i has a caption if i % (p + q) < p, else it has none; (0, 0): one mixture of all.
      demand: images/s of this process that `data.workers = -1` provides for; 0: threads of this process.
      room: what those processes may take of the machine; None: all that this process may use.

    Returns:
      An iterator of {"image": uint8 (B, H, W, 3), or each array of views, (B, V, H, W, 3); the fields' own, "source":
      int32 (B,), "record": int64 (B,), "damaged": int32 (B,)}: `record` of `source` is what the row asked for,
      `damaged` how many unreadable records had to be stepped over (the next ones of the same source) until one could
      be read.

    Raises:
      ConfigError: what leaves the transforms is not of the model's size.
      DataError: the sources do not fit the configuration or the ratio; while iterating: a dataset that cannot be read.
    """
    _check(data, batch_size, hosts, sources)
    check_pair_ratio(sources, pair_ratio)
    if not data.shuffle and host == 0:
        logging.warning(
            "data.shuffle is False: the records come in the order of the files, which is often sorted by class; "
            "set data.shuffle to True to train"
        )
    order = run_order(data, seed, sources, pair_ratio)
    chain = Chain(data.transforms, image_size, data.max_pixels)
    chain.check()
    row = _TrainRow(tuple(sources), fields, chain, derive_seed(seed, "crop"))
    spec = {**chain.spec, **fields.spec}
    spec |= {"source": ((), np.int32), "record": ((), np.int64), "damaged": ((), np.int32)}
    batches = HostBatches(
        order, row, spec, batch_size=batch_size, host=host, hosts=hosts, start=start_step, threads=data.threads
    )
    workers, choice = data.workers, ""
    if workers < 0:
        workers, choice = choose_workers(batches, demand, room or machine.room([machine.place()], 0), data.prefetch)
    return Loader(batches, workers=workers, prefetch=data.prefetch, choice=choice)


def eval_loader(
    source: Source,
    fields: Fields,
    transform: EvalTransform,
    *,
    batch_size: int,
    host: int,
    hosts: int,
    threads: int,
) -> Iterator[Batch]:
    """Every record once, in order, in equally many batches on every host.

    Args:
      source: the dataset.
      fields: what a row holds beside its image.
      transform: what becomes of an image.
      batch_size: rows over all hosts; host p gets rows [p B, (p + 1) B) of each batch, B = batch_size / hosts.
      host, hosts: this process and their number.
      threads: that read and decode.

    Yields:
      {"image": uint8 (B, H, W, 3), the fields' own, "mask": float32 (B,)}; mask is 0 on the padding of the last
      batch and on unreadable records, which are logged.

    Raises:
      DataError: not one record could be read.
    """
    order, row = grain.MapDataset.range(len(source)), _EvalRow(source, fields, transform)
    spec = {**transform.spec, **fields.spec, "mask": ((), np.float32)}
    batches = HostBatches(order, row, spec, batch_size=batch_size, host=host, hosts=hosts, start=0, threads=threads)
    asked = read = 0
    with Loader(batches, workers=0, prefetch=2) as loader:
        for step, batch in enumerate(loader):
            first = step * batch_size + host * (batch_size // hosts)
            asked += min(max(len(source) - first, 0), batch_size // hosts)
            read += int(batch["mask"].sum())
            yield batch
    if asked and not read:
        raise DataError(f"{source.name}: none of its {asked} records could be read; see the log for the reasons")


def run_order(
    data: DataConfig, seed: int, sources: Sequence[Source], pair_ratio: tuple[int, int] = (0, 0)
) -> grain.MapDataset:
    """The endless sequence of (source, record) of a run; arguments as of `train_loader`."""
    lengths, weights = [len(s) for s in sources], [s.weight for s in data.train]
    if not any(pair_ratio):
        return sample_order(lengths, weights, seed, data.shuffle)
    pools = [
        [w * (s.has_captions == captions) for w, s in zip(weights, sources, strict=True)] for captions in (True, False)
    ]
    return InTurn(*(sample_order(lengths, pool, seed, data.shuffle) for pool in pools), pair_ratio)


def sample_order(lengths: Sequence[int], weights: Sequence[float], seed: int, shuffle: bool) -> grain.MapDataset:
    """The endless sequence of (source, record): every source reshuffled each epoch, mixed by weight.

    Grain rounds the weights to integers: shares are right to 1 % of themselves.
    """
    parts, shares = [], []
    for i, (length, weight) in enumerate(zip(lengths, weights, strict=True)):
        if weight > 0:
            part = grain.MapDataset.range(length)
            for k in range(SHUFFLES if shuffle else 0):
                part = part.shuffle(seed=derive_seed(seed, f"order {i} shuffle {k}"))
            parts.append(part.repeat().map(functools.partial(_pair, i)))
            shares.append(weight)
    return parts[0] if len(parts) == 1 else grain.MapDataset.mix(parts, weights=shares)


class InTurn(grain.MapDataset):
    """Endless: p elements of one sequence, q of another, p of the first again, and so on."""

    def __init__(self, first: grain.MapDataset, second: grain.MapDataset, pair_ratio: tuple[int, int]):
        super().__init__([first, second])
        self._ratio = pair_ratio

    def __len__(self) -> int:
        turns = min(len(parent) // share for parent, share in zip(self._parents, self._ratio, strict=True))
        return min(sys.maxsize, turns * sum(self._ratio))

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return self.slice(index)
        p, q = self._ratio
        turn, place = divmod(index, p + q)
        first, second = self._parents
        return first[turn * p + place] if place < p else second[turn * q + place - p]


class DamageLog:
    """Counts damaged records and cut captions that the training loop meets; stops it when too many are damaged.

    Samples are counted from the beginning of the run, records and captions from this start on.

    Args:
      sources: as given to `train_loader`.
      max_damaged: share of damaged among the samples seen past which the run stops; 0: at the first.
      batch_size, start_step, host, hosts: as given to `train_loader`.
      counts: `counts` of every host when the run was saved; if there were more or fewer, they are shared out.
      keep: is told of each of the first `NAMED` damaged records: its source, number and key, and the sample.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        max_damaged: float,
        *,
        batch_size: int,
        start_step: int = 0,
        host: int = 0,
        hosts: int = 1,
        counts: Sequence[Sequence[int]] = (),
        keep: Callable[[dict[str, Any]], None] = lambda record: None,
    ):
        self._sources, self._max, self._keep = sources, max_damaged, keep
        self._global = batch_size
        self._next = start_step * batch_size + host * (batch_size // hosts)
        self._known: set[tuple[int, int]] = set()
        kept = counts[host] if len(counts) == hosts else [(sum(c[k] for c in counts) + host) // hosts for k in (0, 1)]
        self.seen, self.damaged = kept  # samples, and those of them whose record was unreadable
        self.captions = 0
        self.truncated = 0  # captions that were longer than the text tower reads
        self._tell = 1  # truncated captions, from which on the next line is due

    @property
    def records(self) -> int:
        """Different damaged records met since this start."""
        return len(self._known)

    @property
    def counts(self) -> tuple[int, int]:
        """Samples seen and damaged on this host since the run began."""
        return self.seen, self.damaged

    def see(self, batch: Mapping[str, np.ndarray]) -> None:
        """Count the next host batch; to be called on each, in order.

        Raises:
          DataError: the share of damaged samples exceeds `max_damaged`.
        """
        damaged = np.flatnonzero(batch["damaged"])
        for row in damaged.tolist():
            self._log(
                int(batch["source"][row]), int(batch["record"][row]), int(batch["damaged"][row]), self._next + row
            )
        self._next += self._global
        self.seen += len(batch["damaged"])
        self.damaged += len(damaged)
        if "truncated" in batch:
            self._see_captions(batch["text"], batch["truncated"])
        # A clear excess stops the run, not chance: one and four standard deviations above what is allowed.
        allowed = self._max * self.seen
        if self.damaged > allowed + (4 * allowed**0.5 + 1 if self._max else 0):
            raise DataError(
                f"{self.damaged} of {self.seen} samples ({self.damaged / self.seen:.2%}) are of damaged records, more "
                f"than config.data.max_damaged = {self._max:g} allows; the log names these, {self.records} since this "
                "start, and why: repair or remove them, or raise the limit"
            )

    def _see_captions(self, text: np.ndarray, truncated: np.ndarray) -> None:
        self.captions += int(text.any(axis=1).sum())
        self.truncated += int(truncated.sum())
        if self.truncated >= self._tell:
            self._tell = 10 ** len(str(self.truncated))
            logging.warning(
                "%d of %d captions so far were longer than %d tokens and were truncated; model.text.context sets the "
                "limit",
                self.truncated, self.captions, text.shape[1],
            )  # fmt: skip

    def _log(self, source: int, record: int, count: int, sample: int) -> None:
        dataset = self._sources[source]
        for step in range(count):
            damaged = (record + step) % len(dataset)
            if (source, damaged) not in self._known:
                self._known.add((source, damaged))
                logging.warning(
                    "%s: record %s is damaged (sample %d of the run)%s; the next readable record replaces it",
                    dataset.name, dataset.key(damaged), sample, _why(dataset, damaged),
                )  # fmt: skip
                if len(self._known) <= NAMED:
                    key = dataset.key(damaged)
                    self._keep({"source": dataset.name, "record": damaged, "key": key, "sample": sample})


def _why(source: Source, record: int) -> str:
    """Why a record is damaged, behind a colon, by reading it once more; "": now it could be read."""
    try:
        Chain((), 1)(read_record(source, record), np.random.default_rng(0))
    except DAMAGED as error:
        return f": {error}"
    return ""


class _TrainRow:
    """(source, record) -> a row, by the random numbers of (seed, sample); steps over damaged records."""

    def __init__(self, sources: tuple[Source, ...], fields: Fields, chain: Chain, seed: int):
        self._sources, self._fields, self._chain = sources, fields, chain
        self._views = tuple(chain.spec)
        self._rngs = grain.experimental.RngPool(seed)

    def __call__(self, asked: tuple[int, int], sample: int) -> Row:
        rng = self._rngs.acquire_rng(sample)
        row = self._row(*asked, rng)
        self._rngs.release_rng(rng)
        return row

    def _row(self, number: int, record: int, rng: np.random.Generator) -> Row:
        source = self._sources[number]
        for damaged in range(STEP_OVER + 1):
            try:
                sample = self._chain(read_record(source, (record + damaged) % len(source)), rng)
                row = self._fields(sample, rng)
            except DAMAGED as error:
                reason = error
                continue
            pixels = {name: sample[name] for name in self._views}
            return {**pixels, **row, "source": number, "record": record, "damaged": damaged}
        raise DataError(
            f"{source.name}: {STEP_OVER + 1} records in a row cannot be decoded, from {source.key(record)} on; "
            f"the last: {reason}; check that these files are what the source says"
        )


class _EvalRow:
    """Record -> its row, or an empty one where it is damaged."""

    def __init__(self, source: Source, fields: Fields, transform: EvalTransform):
        self._source, self._fields, self._transform = source, fields, transform

    def __call__(self, record: int, _: int) -> Row:
        try:
            sample = self._transform.record(read_record(self._source, record))
            row = self._fields(sample)
        except DAMAGED as error:
            key = self._source.key(record)
            logging.warning("%s: record %s is damaged and left out: %s", self._source.name, key, error)
            return {}
        return {"image": sample["image"], **row, "mask": 1.0}


def _pair(source: int, record: int) -> tuple[int, int]:
    return source, record


def derive_seed(seed: int, use: str) -> int:
    """A 32-bit seed of its own for every use of the run's seed; Grain adds the epoch to it."""
    return int(np.random.SeedSequence([seed, *use.encode()]).generate_state(1)[0])


def check_pair_ratio(sources: Sequence[Source], pair_ratio: tuple[int, int]) -> None:
    """Refuse sources from which samples in that ratio cannot be drawn.

    Raises:
      DataError: all of them have captions, or none has.
    """
    kinds = {source.has_captions for source in sources} if any(pair_ratio) else {True, False}
    share = "{} of " + f"{sum(pair_ratio)} samples of task.pair_ratio = {pair_ratio}"
    if True not in kinds:
        raise DataError(
            f"data.train has no source with captions, from which {share.format(pair_ratio[0])} come; add one, or set "
            "the caption_key of a source whose captions are not used"
        )
    if False not in kinds:
        raise DataError(
            f"data.train has no source without captions, from which {share.format(pair_ratio[1])} come; add one, or "
            "set caption_key='' for a source whose captions are not to be used"
        )


def _check(data: DataConfig, batch_size: int, hosts: int, sources: Sequence[Source]) -> None:
    if len(sources) != len(data.train) or not sources:
        raise DataError(f"data.train names {len(data.train)} sources, but {len(sources)} were opened; open each once")
    if batch_size % hosts:
        near = max(1, round(batch_size / hosts)) * hosts
        raise DataError(f"train.batch_size = {batch_size} does not divide over {hosts} hosts; the nearest is {near}")
    for source in sources:
        if not len(source):
            raise DataError(f"{source.name}: holds no record; set another path or split")
