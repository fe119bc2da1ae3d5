"""Select image-text pairs of a folder of tars by the columns of the parquet files next to them.

    visionfm data select --path=FOLDER --out=FOLDER/good.pairs \\
        --where='similarity >= 0.28 and NSFW == "UNLIKELY" and pwatermark < 0.8 and width >= 200'

Conditions consist of columns, numbers and quoted text with == != < <= > >=, in (…), and, or, not, + - * /. An empty
value satisfies no condition except `COLUMN is None`. The file --out has one bit for every pair of the folder; set it as
`selection` of the source in the configuration. A report of how many pairs each condition drops is printed, and written
to --out with the suffix .json added.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from visionfm_jax.config.arguments import Parser
from visionfm_jax.data import columns
from visionfm_jax.data.columns import Chosen
from visionfm_jax.data.conditions import Condition, parse
from visionfm_jax.data.shards import Engine, add_arguments, engine_of, map_shards
from visionfm_jax.data.sources.selection import write_selection
from visionfm_jax.data.sources.tar_index import engine_for
from visionfm_jax.data.sources.tars import TarPairs
from visionfm_jax.errors import DataError, UserError, entry_point
from visionfm_jax.storage import read, write_text

SHOWN = 20  # tars in the printed table; the JSON has all


def select(
    path: str, where: str, out: Path, *, caption_key: str = "txt", engine: Engine | None = None
) -> dict[str, Any]:
    """Write the selection and its report.

    Args:
      path: folder or URL with NNNNN.tar and NNNNN.parquet.
      where: conditions; see `data.conditions`.
      out: file to write; the report goes to the same name with .json behind it.
      caption_key: suffix of the members with captions, as for `TarPairs`.
      engine: that evaluates them; None: as `tar_index.engine_for` says.

    Returns:
      The report.

    Raises:
      UserError: one line: a condition, column, parquet or tar is wrong, nothing is left, or `out` cannot be written.
    """
    conditions = parse(where)
    source = TarPairs(path, caption_key=caption_key)
    _check(source, conditions)
    index = source.index
    tars = [
        (t["name"], index.records[a:b]) for t, a, b in zip(index.tars, index.starts, index.starts[1:], strict=False)
    ]
    work = functools.partial(columns.choose, source.store, conditions)
    engine = engine_for(source.store, len(tars), engine)
    found = map_shards(work, tars, engine, title="selecting", unit=" tars")
    report = _Report(source, where, conditions)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_selection(out, index, where, report.counted(found))
        result = report.as_json()
        write_text(out.with_name(out.name + ".json"), json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    except OSError as error:
        raise UserError(f"--out={out}: {error.strerror or error}; name a file that can be written") from error
    return result


class _Report:
    """Adds up what each tar gave."""

    def __init__(self, source: TarPairs, where: str, conditions: Sequence[Condition]):
        self._source, self._where, self._conditions = source, where, conditions
        self._tars: list[dict[str, Any]] = []

    def counted(self, choices: Iterator[Chosen]) -> Iterator[np.ndarray]:
        """Hands on what was chosen, counts it, and complains at the end if it was nothing."""
        self._tars.clear()
        for choice in choices:
            self._tars.append(
                {
                    "name": choice.name,
                    "rows": choice.rows,
                    "success": choice.success,
                    "pairs": len(choice.chosen),
                    "known": choice.known,
                    "drops": choice.drops.tolist(),
                    "empty": choice.empty.tolist(),
                    "only": choice.only.tolist(),
                    "selected": choice.selected,
                }
            )
            yield choice.chosen
        total = self._total()
        if not total["known"]:
            raise DataError(
                f"{self._source.store.url}: none of the {total['pairs']:,} pairs has a row with its key and status "
                f"'{columns.SUCCESS}' in the parquets; use the parquets that were written with the tars"
            )
        if not total["selected"]:
            worst = max(range(len(self._conditions)), key=lambda c: total["drops"][c])
            raise DataError(
                f"--where leaves none of {total['known']:,} pairs; {self._conditions[worst].text!r} alone drops "
                f"{total['drops'][worst]:,}; loosen it"
            )

    def as_json(self) -> dict[str, Any]:
        """All counts; `conditions` in the order of the tars' lists."""
        total = self._total()
        lists = {key: total.pop(key) for key in ("drops", "empty", "only")}
        conditions = [
            {"condition": condition.text} | {key: lists[key][c] for key in lists}
            for c, condition in enumerate(self._conditions)
        ]
        head = {"path": self._source.store.url, "where": self._where}
        return head | total | {"conditions": conditions, "source": self._source.report(), "tars": self._tars}

    def _total(self) -> dict[str, Any]:
        numbers = {key: sum(t[key] for t in self._tars) for key in ("rows", "success", "pairs", "known", "selected")}
        lists = {key: np.sum([t[key] for t in self._tars], axis=0).tolist() for key in ("drops", "empty", "only")}
        return numbers | lists


def _check(source: TarPairs, conditions: Sequence[Condition]) -> None:
    """What would stop the work after hours is looked for first."""
    store = source.store
    files = read(store.files, lambda: store.url)
    names = [columns.parquet_of(tar["name"]) for tar in source.index.tars]
    if missing := [name for name in names if name not in files]:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise DataError(f"{store.path(missing[0])}{more}: missing beside the tar; download the shard again, or move it")
    columns.choose(store, conditions, (source.index.tars[0]["name"], source.index.records[: source.index.starts[1]]))


def print_report(console: Console, report: dict[str, Any], out: Path) -> None:
    """The report for people."""
    known, selected = report["known"], report["selected"]
    console.print(f"{report['rows']:,} rows in the parquets, {report['success']:,} with a picture", highlight=False)
    unknown = report["pairs"] - known
    left_out = f"; {unknown:,} without such a row are left out" if unknown else ""
    console.print(f"{report['pairs']:,} pairs in {len(report['tars']):,} tars{left_out}\n", highlight=False)
    table = _table("condition", "drops", "of pairs", "for want of a value", "it alone")
    for c in report["conditions"]:
        table.add_row(
            c["condition"], f"{c['drops']:,}", f"{c['drops'] / known:.1%}", f"{c['empty']:,}", f"{c['only']:,}"
        )
    console.print(table)
    console.print()
    table = _table("tar", "pairs", "selected", "of pairs")
    for tar in report["tars"][:SHOWN]:
        share = f"{tar['selected'] / tar['pairs']:.1%}" if tar["pairs"] else ""
        table.add_row(tar["name"], f"{tar['pairs']:,}", f"{tar['selected']:,}", share)
    if len(report["tars"]) > SHOWN:
        table.add_row(f"… {len(report['tars']) - SHOWN:,} more, see the JSON", "", "", "")
    table.add_row("all", f"{report['pairs']:,}", f"{selected:,}", f"{selected / report['pairs']:.1%}")
    console.print(table)
    console.print(f"\n{selected:,} pairs selected: {out} ({out.stat().st_size:,} bytes), {out}.json", highlight=False)


def _table(*names: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for i, name in enumerate(names):
        table.add_column(name, justify="right" if i else "left", overflow="fold")
    return table


def main(argv: Sequence[str], program: str = "python -m visionfm_jax.data.select") -> None:
    """Parse, select, print."""
    parser = Parser(program, __doc__)
    parser.add_argument("--path", required=True, help="folder or URL with NNNNN.tar and NNNNN.parquet")
    parser.add_argument("--where", required=True, help="conditions, see above")
    parser.add_argument("--out", required=True, type=Path, help="selection file to write")
    parser.add_argument("--caption_key", default="txt", help="suffix of the caption files in the tars (%(default)s)")
    add_arguments(parser)
    arguments = parser.parse_args(argv)
    out = arguments.out.expanduser()
    report = select(
        arguments.path, arguments.where, out, caption_key=arguments.caption_key, engine=engine_of(arguments)
    )
    print_report(Console(soft_wrap=False), report, out)


if __name__ == "__main__":
    sys.exit(entry_point(main)(sys.argv[1:]))
