"""Columns of pairs: of the parquets that img2dataset writes beside the tars, and of folders of computed columns.

Those of a folder are joined by position, those of a parquet by key. Conditions are evaluated on both.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from visionfm_jax.data import best
from visionfm_jax.data.best import Boundary, Counts
from visionfm_jax.data.column_folder import ColumnFolder, columns_of, open_folder
from visionfm_jax.data.conditions import Condition
from visionfm_jax.data.sources import tar_index
from visionfm_jax.data.sources.store import Store
from visionfm_jax.data.sources.tar_index import Shard
from visionfm_jax.errors import ConfigError, DataError, one_line, printable

KEY, STATUS, SUCCESS = "key", "status", "success"
_SHOWN = 30  # names of columns in a message
_T = TypeVar("_T")


@dataclass(frozen=True)
class Columns:
    """Where columns of the pairs of a folder of tars are.

    Attributes:
      store: the folder.
      beside: those in the parquets beside the tars; empty: these are not read.
      computed: folders of computed columns, and what is read of each.
    """

    store: Store
    beside: tuple[str, ...]
    computed: tuple[tuple[ColumnFolder, tuple[str, ...]], ...]

    @property
    def places(self) -> dict[str, str]:
        """Column -> where it is, for people."""
        beside = dict.fromkeys(self.beside, "the parquets beside the tars")
        return beside | {name: str(folder.path) for folder, names in self.computed for name in names}

    def read(self, shard: Shard) -> Rows:
        """What there is of the pairs of a tar.

        Raises:
          DataError: a file is missing, damaged, of another crawl, or lacks a column.
        """
        (tar, records), name = shard, str(shard)
        columns: dict[str, pa.ChunkedArray] = {}
        known, rows, success = np.arange(len(records)), None, None
        if self.beside:
            table = _read(self.store, parquet_of(name), list(dict.fromkeys([KEY, STATUS, *self.beside])))
            rows, table = len(table), self._successful(name, table)
            success, place = len(table), self._places(name, records, table[KEY])
            known = np.flatnonzero(place.is_valid().to_numpy(zero_copy_only=False))
            table = table.take(place.drop_null())
            columns |= {column: table[column] for column in self.beside}
        for folder, names in self.computed:
            table = folder.read(tar, names).take(known)
            columns |= {column: table[column] for column in names}
        return Rows(pa.table(columns), known, rows, success)

    def _successful(self, name: str, table: pa.Table) -> pa.Table:
        try:
            return table.filter(pc.equal(table[STATUS], SUCCESS))
        except pa.ArrowException as error:
            raise DataError(
                f"{self.store.path(parquet_of(name))}: its column {STATUS!r} is of {table[STATUS].type}, not of text; "
                "download the shard again"
            ) from error

    def _places(self, name: str, records: np.ndarray, column: pa.ChunkedArray) -> pa.Array:
        """Of each pair, its row in a column of keys."""
        try:
            keys = pa.array(tar_index.keys(self.store, name, records), pa.string())
            kind = column.type if pa.types.is_integer(column.type) else pa.string()  # the first img2dataset counted
            return pc.index_in(keys.cast(kind), value_set=column.cast(kind).combine_chunks())
        except (OSError, pa.ArrowException) as error:
            raise DataError(
                f"{self.store.path(name)}: its keys do not fit {parquet_of(name)} ({one_line(error)}); download both "
                "again"
            ) from error


@dataclass(frozen=True)
class Rows:
    """Columns of pairs of a tar.

    Attributes:
      table: a row for each pair that is known.
      known: int64 (R,), which pairs these are: with a parquet those in it that were downloaded, else all.
      rows: of the parquet; `success`: those with a picture; None: it was not read.
    """

    table: pa.Table
    known: np.ndarray
    rows: int | None
    success: int | None


@dataclass(frozen=True)
class Chosen:
    """The pairs of one tar that fulfil the conditions.

    Attributes:
      name: of the tar.
      chosen: bool (pairs,).
      rows, success: as in `Rows`; `known`: the number of known pairs.
      drops: int64 (C,); known pairs that condition c does not hold for; `empty`: those for want of a value; `only`:
        those for which every other condition holds.
      values: float64 (pairs,), of the column that pairs are ranked by; NaN: none, or infinite where it says so. None:
        there is no such column.
      problem: why none is chosen: what is the matter with the tar's columns; empty: nothing.
    """

    name: str
    chosen: np.ndarray
    rows: int | None
    success: int | None
    known: int
    drops: np.ndarray
    empty: np.ndarray
    only: np.ndarray
    values: np.ndarray | None
    problem: str = ""

    @property
    def selected(self) -> int:
        """Number of chosen pairs."""
        return int(self.chosen.sum())


def parquet_of(tar: str) -> str:
    """NNNNN.tar -> NNNNN.parquet."""
    return tar.removesuffix(".tar") + ".parquet"


def find(store: Store, folders: Sequence[Path], tars: Sequence[dict[str, Any]], wanted: Sequence[str]) -> Columns:
    """Where the wanted columns are; a column of a folder goes before one of that name beside the tars.

    Args:
      store: the folder of the tars.
      folders: of computed columns.
      tars: as `tar_index.Index.tars`.
      wanted: names of columns.

    Raises:
      DataError: a column is nowhere, with the names that there are; or a folder holds none of these tars' columns.
      ConfigError: a column is in several folders.
    """
    opened = [open_folder(path) for path in folders]
    there = [_first(tars, lambda tar, folder=folder: columns_of(folder, tar)) for folder in opened]
    for name in wanted:
        if len(places := [folder.path for folder, names in zip(opened, there, strict=True) if name in names]) > 1:
            both = " and ".join(printable(str(path)) for path in places)
            raise ConfigError(f"--columns: {both} both have a column {name!r}; leave one of them out")
    computed = [name for names in there for name in names]
    beside = [name for name in wanted if name not in computed]
    if beside:
        where, names = _beside(store, tars, optional=bool(folders))
        check_columns(where, computed + names, beside)
    found = [
        (folder, tuple(name for name in wanted if name in names)) for folder, names in zip(opened, there, strict=True)
    ]
    return Columns(store, tuple(beside), tuple((folder, names) for folder, names in found if names))


def check_columns(where: str, names: Sequence[str], wanted: Sequence[str]) -> None:
    """Complain about the first wanted column that is not among `names`.

    Raises:
      DataError: with the names that there are, and near ones first.
    """
    for column in wanted:
        if column not in names:
            lower = {name.lower(): name for name in names}
            near = [lower[n] for n in difflib.get_close_matches(column.lower(), lower, n=3)]
            hint = f"did you mean {printable(' or '.join(near))}? " if near else ""
            there = printable(", ".join(names[:_SHOWN])) + (" …" if len(names) > _SHOWN else "")
            raise DataError(f"{where}: no column {column!r}; {hint}the columns are {there}")


def choose(columns: Columns, conditions: Sequence[Condition], by: str | None, shard: Shard) -> Chosen:
    """Evaluate the conditions on a tar's pairs; only the columns that they need are read.

    Args:
      columns: where they are.
      conditions: all of which have to hold.
      by: the column whose values are wanted too.
      shard: the tar.

    Raises:
      DataError: as `Columns.read`.
      ConfigError: a condition does not fit the type of its column, or `by` is no column of numbers.
    """
    rows = columns.read(shard)
    held, empty = _evaluate(rows.table, conditions)
    failed = (~held).sum(axis=0)  # conditions that fail, by pair
    chosen = np.zeros(len(shard.records), bool)
    chosen[rows.known[failed == 0]] = True
    values = None
    if by is not None:
        values = np.full(len(shard.records), np.nan)
        values[rows.known] = _numbers(rows.table[by], by)
    return Chosen(
        name=str(shard),
        chosen=chosen,
        rows=rows.rows,
        success=rows.success,
        known=len(rows.known),
        drops=(~held).sum(axis=1),
        empty=empty.sum(axis=1),
        only=(~held & (failed == 1)).sum(axis=1),
        values=values,
    )


# The passes over the tars; their first arguments are those of `choose`.


def first_pass(
    columns: Columns, conditions: Sequence[Condition], by: str | None, shard: Shard
) -> tuple[Chosen, list[Counts]]:
    """What is chosen; and of a column `by` the values of all pairs, and of those chosen, counted for `best.find`."""
    chosen = _chosen(columns, conditions, by, shard)
    if chosen.values is None:
        return chosen, []
    every, fit = (chosen.values[which & ~np.isnan(chosen.values)] for which in (True, chosen.chosen))
    counts = [best.count(best.keys(values), Boundary()) for values in (every, fit)]
    return replace(chosen, values=None), counts


def next_pass(columns: Columns, conditions: Sequence[Condition], by: str, boundary: Boundary, shard: Shard) -> Counts:
    """The values of chosen pairs that lie on the boundary, counted for `best.find`."""
    chosen = _chosen(columns, conditions, by, shard)
    return best.count(best.keys(chosen.values[chosen.chosen]), boundary)


def taken(
    columns: Columns, conditions: Sequence[Condition], by: str, boundary: Boundary, shard: Shard
) -> tuple[np.ndarray, np.ndarray, float]:
    """Which chosen pairs lie above the boundary, and which on it, bool (pairs,), and the least of their values."""
    chosen = _chosen(columns, conditions, by, shard)
    above, on = np.zeros((2, len(chosen.chosen)), bool)
    above[chosen.chosen], on[chosen.chosen] = boundary.split(best.keys(chosen.values[chosen.chosen]))
    return above, on, float(np.min(chosen.values[above | on], initial=np.inf))


def _chosen(columns: Columns, conditions: Sequence[Condition], by: str | None, shard: Shard) -> Chosen:
    """As `choose`; where a tar's columns cannot be used, none of its pairs."""
    try:
        return choose(columns, conditions, by, shard)
    except DataError as error:
        problem = str(error)
    except ConfigError as error:  # a column of another type than in the first tar
        problem = f"{shard}: {error}"
    none, pairs = np.zeros(len(conditions), np.int64), len(shard.records)
    values = None if by is None else np.full(pairs, np.nan)
    return Chosen(str(shard), np.zeros(pairs, bool), 0, 0, 0, none, none, none, values, problem)


def _first(tars: Sequence[dict[str, Any]], names: Callable[[dict[str, Any]], _T]) -> _T:
    """What is found of the first tar of which it can be read."""
    problem: DataError | None = None
    for tar in tars:
        try:
            return names(tar)
        except DataError as error:
            problem = problem or error
    assert problem is not None
    raise problem


def _beside(store: Store, tars: Sequence[dict[str, Any]], *, optional: bool) -> tuple[str, list[str]]:
    """A parquet beside the tars and its columns; of a folder where there need be none, the folder and no columns."""

    def names(tar: dict[str, Any]) -> tuple[str, list[str]]:
        name = parquet_of(tar["name"])
        return store.path(name), names_of(store, name)

    try:
        return _first(tars, names)
    except DataError:
        if not optional:
            raise
        return f"{store.url} (without parquets that can be read) and --columns", []


def names_of(store: Store, name: str) -> list[str]:
    """The columns of a parquet beside the tars.

    Raises:
      DataError: it is missing, or cannot be read.
    """
    return _opened(store, name, lambda file: file.schema_arrow.names)


def _read(store: Store, name: str, wanted: Sequence[str]) -> pa.Table:
    """Columns of a parquet beside the tars."""

    def read(file: pq.ParquetFile) -> pa.Table:
        names = file.schema_arrow.names
        check_columns(store.path(name), names, wanted)
        for column in wanted:
            if names.count(column) > 1:
                raise DataError(f"{store.path(name)}: has several columns {column!r}; download the shard again")
        return file.read(columns=wanted)

    return _opened(store, name, read)


def _opened(store: Store, name: str, act: Callable[[pq.ParquetFile], _T]) -> _T:
    try:
        with pq.ParquetFile(store.path(name) if store.local else store.open(name)) as file:
            return act(file)
    except DataError:
        raise
    except FileNotFoundError as error:
        raise DataError(f"{store.path(name)}: missing beside the tar; download the shard again, or move it") from error
    except Exception as error:  # Arrow's, and every store has its own
        raise DataError(f"{store.path(name)}: cannot be read ({one_line(error)}); download the shard again") from error


def _evaluate(table: pa.Table, conditions: Sequence[Condition]) -> tuple[np.ndarray, np.ndarray]:
    """Whether each condition holds, and whether it lacks a value: bool (C, rows)."""
    held, empty = np.zeros((2, len(conditions), len(table)), bool)
    for c, condition in enumerate(conditions):
        try:
            column = condition.evaluate(table)
        except pa.ArrowException as error:
            kinds = ", ".join(f"{name} is {table.schema.field(name).type}" for name in condition.columns)
            raise ConfigError(
                f"--where: {condition.text!r} cannot be evaluated: {kinds} ({one_line(error)}); compare columns with "
                "values of their types"
            ) from error
        held[c] = column.fill_null(False).to_numpy()
        empty[c] = column.is_null().to_numpy()
    return held, empty


def _numbers(column: pa.ChunkedArray, name: str) -> np.ndarray:
    """float64 (rows,); NaN where there is none."""
    kind = column.type
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_null(kind)):
        raise ConfigError(f"--by={name}: is a column of {kind}; name one of numbers")
    try:
        return column.cast(pa.float64()).fill_null(np.nan).to_numpy()
    except pa.ArrowInvalid as error:  # whole numbers beyond 2**53
        raise ConfigError(f"--by={name}: {one_line(error)}; name a column of smaller numbers") from error
