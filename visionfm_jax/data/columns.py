"""The parquet that img2dataset writes beside each tar: its columns joined to the pairs, and conditions on them."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from visionfm_jax.data.conditions import Condition
from visionfm_jax.data.sources import tar_index
from visionfm_jax.data.sources.store import Store
from visionfm_jax.errors import ConfigError, DataError, one_line

KEY, STATUS, SUCCESS = "key", "status", "success"
_SHOWN = 30  # names of columns in a message


@dataclass(frozen=True)
class Chosen:
    """The pairs of one tar that fulfil the conditions.

    Attributes:
      name: of the tar.
      chosen: bool (pairs,).
      rows: of the parquet; `success`: those with a picture; `known`: pairs of the tar that are among these.
      drops: int64 (C,); known pairs that condition c does not hold for; `empty`: those for want of a value; `only`:
        those for which every other condition holds.
    """

    name: str
    chosen: np.ndarray
    rows: int
    success: int
    known: int
    drops: np.ndarray
    empty: np.ndarray
    only: np.ndarray

    @property
    def selected(self) -> int:
        """Number of chosen pairs."""
        return int(self.chosen.sum())


def parquet_of(tar: str) -> str:
    """NNNNN.tar -> NNNNN.parquet."""
    return tar.removesuffix(".tar") + ".parquet"


def check_columns(where: str, names: Sequence[str], wanted: Sequence[str]) -> None:
    """Complain about the first wanted column that is not among `names`.

    Raises:
      DataError: with the names that there are, and near ones first.
    """
    for column in wanted:
        if column not in names:
            lower = {name.lower(): name for name in names}
            near = [lower[n] for n in difflib.get_close_matches(column.lower(), lower, n=3)]
            hint = f"did you mean {' or '.join(near)}? " if near else ""
            there = ", ".join(names[:_SHOWN]) + (" …" if len(names) > _SHOWN else "")
            raise DataError(f"{where}: no column {column!r}; {hint}the columns are {there}")


def choose(store: Store, conditions: Sequence[Condition], tar: tuple[str, np.ndarray]) -> Chosen:
    """Evaluate the conditions on a tar's pairs; only the columns that they need are read.

    Args:
      store: the folder.
      conditions: all of which have to hold.
      tar: its name, and the pairs as in `tar_index.Index.records`.

    Raises:
      DataError: the parquet, or the tar, cannot be read, or a column is missing.
      ConfigError: a condition does not fit the type of its column.
    """
    name, records = tar
    table = _read(store, parquet_of(name), conditions)
    rows, table = len(table), table.filter(pc.equal(table[STATUS], SUCCESS))
    try:
        keys = pa.array(tar_index.keys(store, name, records), pa.string())
        kind = table[KEY].type
        kind = kind if pa.types.is_integer(kind) else pa.string()  # img2dataset's first versions counted
        place = pc.index_in(keys.cast(kind), value_set=table[KEY].cast(kind).combine_chunks())
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError(
            f"{store.path(name)}: its keys do not fit {parquet_of(name)} ({one_line(error)}); download both again"
        ) from error
    known = np.flatnonzero(place.is_valid().to_numpy(zero_copy_only=False))
    held, empty = _evaluate(table.take(place.drop_null()), conditions)
    failed = (~held).sum(axis=0)  # conditions that fail, by pair
    chosen = np.zeros(len(records), bool)
    chosen[known[failed == 0]] = True
    return Chosen(
        name=name,
        chosen=chosen,
        rows=rows,
        success=len(table),
        known=len(known),
        drops=(~held).sum(axis=1),
        empty=empty.sum(axis=1),
        only=(~held & (failed == 1)).sum(axis=1),
    )


def _read(store: Store, name: str, conditions: Sequence[Condition]) -> pa.Table:
    """The columns that are needed."""
    wanted = list(dict.fromkeys([KEY, STATUS, *(c for condition in conditions for c in condition.columns)]))
    try:
        with pq.ParquetFile(store.path(name) if store.local else store.open(name)) as file:
            check_columns(store.path(name), file.schema_arrow.names, wanted)
            return file.read(columns=wanted)
    except DataError:
        raise
    except Exception as error:  # Arrow's, and every store has its own
        raise DataError(f"{store.path(name)}: cannot be read ({one_line(error)}); download the shard again") from error


def _evaluate(table: pa.Table, conditions: Sequence[Condition]) -> tuple[np.ndarray, np.ndarray]:
    """Whether each condition holds, and whether it lacks a value: bool (C, rows)."""
    held, empty = np.zeros((2, len(conditions), len(table)), bool)
    for c, condition in enumerate(conditions):
        try:
            column = ds.dataset(table).to_table(columns={"it": condition.expression(table.schema)})["it"]
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowTypeError) as error:
            kinds = ", ".join(f"{name} is {table.schema.field(name).type}" for name in condition.columns)
            raise ConfigError(
                f"--where: {condition.text!r} cannot be evaluated: {kinds} ({one_line(error)}); compare columns with "
                "values of their types"
            ) from error
        held[c] = column.fill_null(False).to_numpy()
        empty[c] = column.is_null().to_numpy()
    return held, empty
