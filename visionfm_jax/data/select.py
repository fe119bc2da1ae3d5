"""Select image-text pairs of a folder of tars by columns: conditions, and the best of those that fulfil them.

    visionfm data select --path=FOLDER --out=FOLDER/good.pairs \\
        --where='similarity >= 0.28 and NSFW == "UNLIKELY" and pwatermark < 0.8 and width >= 200'
    visionfm data select --path=FOLDER --columns=SCORES --columns=COPIES --out=FOLDER/good.pairs \\
        --where='not duplicate and not contaminated' --keep=1.2e9 --by=similarity

The columns are those of the folders --columns, which `visionfm data score` and `visionfm data dedup` write, and of the
parquet files next to the tars; where both have a column, that of --columns is meant. Conditions consist of columns,
numbers and quoted text with == != < <= > >=, in (…), and, or, not, + - * /. An empty value satisfies no condition
except `COLUMN is None`. --keep takes the pairs with the largest values of a column, exactly so many; of equal ones
those that come first.

The file --out has one bit for every pair of the folder; set it as `selection` of the source in the configuration. A
report of how many pairs each condition drops is printed, and written to --out with the suffix .json added. --write
copies the selected pairs to the folder --to, as tars or as a TFDS dataset in ArrayRecord files (`kind` "tfds").

Tars whose columns cannot be used are left out; they are named at the end, and the exit code is 3.
"""

from __future__ import annotations

import functools
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from visionfm_jax.config.arguments import Parser
from visionfm_jax.config.rules import shown
from visionfm_jax.data import best
from visionfm_jax.data.best import Boundary, Counts
from visionfm_jax.data.columns import SUCCESS, Chosen, Columns, choose, find, first_pass, next_pass, taken
from visionfm_jax.data.conditions import Condition, parse
from visionfm_jax.data.copies import FORMS, copy_pairs
from visionfm_jax.data.shards import Engine, add_arguments, engine_of, map_shards
from visionfm_jax.data.sources.selection import read_selection, write_selection
from visionfm_jax.data.sources.store import is_table
from visionfm_jax.data.sources.tar_index import Shard, engine_for
from visionfm_jax.data.sources.tars import TarPairs, add_keys, caption_suffix
from visionfm_jax.errors import LEFT_OUT, ConfigError, DataError, UserError, complain, count, entry_point, printable
from visionfm_jax.logs import quiet_logs
from visionfm_jax.storage import write_text

BY = "similarity"
SHOWN = 20  # tars in the printed tables; the JSON has all
_TRIED = 10  # tars whose columns are looked at before the work
_BAR = 30  # characters of the longest bar


def select(
    path: str,
    where: str,
    out: Path,
    *,
    keep: int | None = None,
    by: str | None = None,
    columns: Sequence[Path] = (),
    caption_key: str = "txt",
    image_key: str = "",
    engine: Engine | None = None,
) -> dict[str, Any]:
    """Write the selection and its report.

    Args:
      path: folder or URL with the tars.
      where: conditions; see `data.conditions`. It may be empty if `keep` is given.
      out: file to write; the report goes to the same name with .json behind it.
      keep: how many pairs to take of those that fulfil the conditions; None: all.
      by: the column whose largest values are taken, and whose histogram is in the report; None: `BY` if `keep` is
        given, else no column.
      columns: folders of computed columns (`data.column_folder`).
      caption_key: suffix of the members with captions, as for `TarPairs`.
      image_key: suffix of the pictures; empty: any of an image.
      engine: that evaluates them; None: as `tar_index.engine_for` says.

    Returns:
      The report; its "left_out" names the tars whose columns cannot be used.

    Raises:
      UserError: one line: a condition, column, parquet or tar is wrong, nothing is left, or `out` cannot be written.
    """
    by = by or (BY if keep is not None else None)
    _check_out(out)
    conditions = _conditions(where, keep, by)
    source = TarPairs(path, caption_key=caption_suffix(caption_key), image_key=image_key)
    index = source.index
    shards = index.shards
    wanted = [*(name for condition in conditions for name in condition.columns), *([by] if by else [])]
    found = find(source.store, columns, index.tars[:_TRIED], list(dict.fromkeys(wanted)))
    _try(found, conditions, by, shards[:_TRIED])
    engine = engine_for(source.store, len(shards), engine)

    def over(work: Callable[..., Any], *more: Any, title: str) -> Iterator[Any]:
        called = functools.partial(work, found, conditions, by, *more)
        return map_shards(called, shards, engine, title=title, unit=" tars")

    report = _Report(source, found, where, conditions, by)
    chosen = report.counted(over(first_pass, title="selecting"))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if keep is not None:

            def passes(boundary: Boundary) -> Iterator[Counts]:
                if boundary == Boundary(taken=keep):
                    yield from (counts for _, counts in chosen)
                else:
                    yield from over(next_pass, boundary, title="ranking")

            boundary = best.find(keep, passes)
            kept = report.kept(keep, boundary, over(taken, boundary, title="selecting"))
            write_selection(out, index, f"{where} --keep={keep} --by={by}".strip(), kept)
        else:
            write_selection(out, index, where, (bits for bits, _ in chosen))
        result = report.as_json()
        write_text(report_file(out), json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    except OSError as error:
        raise UserError(f"--out={out}: {error.strerror or error}; name a file that can be written") from error
    return result


def report_file(out: Path) -> Path:
    """Where the report of a selection is."""
    return out.with_name(out.name + ".json")


def _conditions(where: str, keep: int | None, by: str | None) -> list[Condition]:
    if not where.strip() and keep is None:
        raise ConfigError("--where and --keep are both missing; say which pairs to select by one of them, or by both")
    if by is not None and not by.isidentifier():
        raise ConfigError(f"--by={shown(by)}: is no name of a column")
    conditions = parse(where) if where.strip() else []
    return conditions + (parse(f"{by} is not None") if keep is not None else [])


def _try(columns: Columns, conditions: Sequence[Condition], by: str | None, shards: Sequence[Shard]) -> None:
    """What would stop the work after hours is looked for first: columns that none of a few tars has.

    Raises:
      DataError: the columns of none of them can be used.
      ConfigError: a condition does not fit the types of its columns.
    """
    problems = []
    for shard in shards:
        try:
            choose(columns, conditions, by, shard)
            return
        except DataError as error:
            problems.append(error)
    raise problems[0]


class _Report:
    """Adds up what each tar gave."""

    def __init__(self, source: TarPairs, columns: Columns, where: str, conditions: Sequence[Condition], by: str | None):
        self._source, self._columns, self._where, self._conditions = source, columns, where, conditions
        self._tars: list[dict[str, Any]] = []
        self._left_out: list[dict[str, str]] = []
        self._by = by
        self._values = np.zeros((2, 2 ** best.DIGITS[0][1]), np.int64)  # of all pairs and of those that fit, by bits
        self._kept: dict[str, Any] = {}

    def counted(self, found: Iterator[tuple[Chosen, list[Counts]]]) -> Iterator[tuple[np.ndarray, Counts]]:
        """Hands on what was chosen and its values, counts both, and complains at the end if it was nothing."""
        for choice, counts in found:
            if choice.problem:
                self._left_out.append({"name": choice.name, "why": choice.problem})
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
            for total, values in zip(self._values, counts, strict=False):
                total[values.digits] += values.numbers
            yield choice.chosen, counts[-1] if counts else None
        total = self._total()
        if not total["known"]:
            raise DataError(
                f"{self._source.store.url}: none of the {total['pairs']:,} pairs has a row with its key and status "
                f"'{SUCCESS}' in the parquets; use the parquets that were written with the tars"
            )
        if not total["selected"]:
            worst = max(range(len(self._conditions)), key=lambda c: total["drops"][c])
            raise DataError(
                f"--where leaves none of {total['known']:,} pairs; {self._conditions[worst].text!r} alone drops "
                f"{total['drops'][worst]:,}; loosen it"
            )

    def kept(
        self, keep: int, boundary: Boundary, found: Iterator[tuple[np.ndarray, np.ndarray, float]]
    ) -> Iterator[np.ndarray]:
        """Hands on which of the chosen pairs are taken, and counts them."""
        left, threshold, selected = boundary.taken, math.inf, 0
        for tar, (above, on, least) in zip(self._tars, found, strict=True):
            above[np.flatnonzero(on)[:left]] = True
            left -= min(left, int(on.sum()))
            threshold = min(threshold, least)
            tar["fit"], tar["selected"] = tar["selected"], int(above.sum())
            selected += tar["selected"]
            yield above
        if selected != min(keep, sum(tar["fit"] for tar in self._tars)):
            raise DataError(f"{self._source.store.url}: the columns changed while they were read; start again")
        ties = boundary.on - boundary.taken
        written = threshold if math.isfinite(threshold) else str(threshold)  # JSON has no infinite number
        self._kept = {"keep": keep, "threshold": written, "ties": ties}

    def as_json(self) -> dict[str, Any]:
        """All counts; `conditions` in the order of the tars' lists."""
        total = self._total()
        lists = {key: total.pop(key) for key in ("drops", "empty", "only")}
        conditions = [
            {"condition": condition.text} | {key: lists[key][c] for key in lists}
            for c, condition in enumerate(self._conditions)
        ]
        places = self._columns.places
        head: dict[str, Any] = {"path": self._source.store.url, "where": self._where, "columns": places}
        if self._by is not None:
            bounds, places = best.histogram(self._values[0])
            every, fit = (np.add.reduceat(v, places[:-1]).tolist() if len(places) else [] for v in self._values)
            values = {"bounds": bounds.tolist(), "pairs": every, "fit": fit}
            head |= {"by": self._by, **self._kept, "histogram": values}
        ends = {"source": self._source.report(), "left_out": self._left_out, "tars": self._tars}
        return head | total | {"conditions": conditions} | ends

    def _total(self) -> dict[str, Any]:
        names = ["pairs", "known", "selected"]
        numbers = dict.fromkeys(("rows", "success")) | {key: sum(t[key] for t in self._tars) for key in names}
        if self._columns.beside:
            numbers |= {key: sum(t[key] for t in self._tars) for key in ("rows", "success")}
        lists = {key: np.sum([t[key] for t in self._tars], axis=0).tolist() for key in ("drops", "empty", "only")}
        return numbers | lists


def print_report(console: Console, report: dict[str, Any], out: Path) -> None:
    """The report for people."""
    known, selected = report["known"], report["selected"]
    if report["rows"] is not None:
        console.print(f"{report['rows']:,} rows in the parquets, {report['success']:,} with a picture", highlight=False)
    unknown = report["pairs"] - known
    left_out = f"; {unknown:,} without such a row are left out" if unknown else ""
    console.print(f"{report['pairs']:,} pairs in {count(len(report['tars']), 'tar')}{left_out}", highlight=False)
    for name, place in report["columns"].items():
        console.print(f"{name}: of {printable(place)}", highlight=False, markup=False)
    console.print()
    table = _table("condition", "drops", "of pairs", "for want of a value", "it alone")
    for c in report["conditions"]:
        table.add_row(
            Text(printable(c["condition"])),
            f"{c['drops']:,}",
            f"{c['drops'] / known:.1%}",
            f"{c['empty']:,}",
            f"{c['only']:,}",
        )
    console.print(table)
    console.print()
    if "histogram" in report:
        console.print(_histogram(report))
        console.print()
    if "keep" in report:
        console.print(_kept(report), highlight=False, markup=False)
        console.print()
    table = _table("tar", "pairs", "selected", "of pairs")
    for tar in report["tars"][:SHOWN]:
        share = f"{tar['selected'] / tar['pairs']:.1%}" if tar["pairs"] else ""
        table.add_row(Text(printable(tar["name"])), f"{tar['pairs']:,}", f"{tar['selected']:,}", share)
    if len(report["tars"]) > SHOWN:
        table.add_row(f"… {len(report['tars']) - SHOWN:,} more, see the JSON", "", "", "")
    table.add_row("all", f"{report['pairs']:,}", f"{selected:,}", f"{selected / report['pairs']:.1%}")
    console.print(table)
    size = out.stat().st_size
    files = printable(f"{out} ({size:,} bytes), {report_file(out)}")
    console.print(f"\n{selected:,} pairs selected: {files}", highlight=False, markup=False, soft_wrap=True)


def _histogram(report: dict[str, Any]) -> Table:
    """Of the column that pairs are ranked by."""
    values = report["histogram"]
    table = _table(f"{report['by']} from", "pairs", "that fit", "")
    longest = max(values["pairs"], default=1)
    for low, pairs, fit in zip(values["bounds"], values["pairs"], values["fit"], strict=False):
        bar = "█" * round(fit / longest * _BAR)
        table.add_row(f"{low:.4g}", f"{pairs:,}", f"{fit:,}", bar + "░" * (round(pairs / longest * _BAR) - len(bar)))
    table.columns[-1].justify = "left"
    return table


def _kept(report: dict[str, Any]) -> str:
    """What --keep meant."""
    fit, by = sum(tar["fit"] for tar in report["tars"]), report["by"]
    threshold = f"{float(report['threshold']):.9g}"
    if fit <= report["keep"]:
        return f"--keep={report['keep']:,}: all {fit:,} pairs that fit are taken, {by} >= {threshold}"
    ties = f"; {report['ties']:,} more have that very value, and come later" if report["ties"] else ""
    return f"--keep={report['keep']:,} of {fit:,} pairs that fit: {by} >= {threshold}{ties}"


def _table(*names: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for i, name in enumerate(names):
        table.add_column(name, justify="right" if i else "left", overflow="fold")
    return table


def _number(text: str) -> int:
    """A whole number of pairs, such as 1.2e9.

    Raises:
      ConfigError: it is none.
    """
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not (1 <= number < 2**53 and number.is_integer()):
        raise ConfigError(f"--keep={shown(text)}: must be a whole number of pairs, at least 1, such as 1.2e9")
    return int(number)


def _check_out(out: Path) -> None:
    """Nothing but an earlier selection is replaced: a name too few, and it would be a tar."""
    there = [path for path in (out, report_file(out)) if path.is_file()]
    if there and (there[0] != out or not is_table(out)):
        raise UserError(
            f"--out={printable(str(out))}: {printable(str(there[0]))} is there, and is no selection; name another file"
        )


def main(argv: Sequence[str], program: str = "python -m visionfm_jax.data.select") -> int:
    """Parse, select, print, copy; returns the exit code."""
    parser = Parser(program, __doc__)
    parser.add_argument("--path", required=True, help="folder or URL with NNNNN.tar (and NNNNN.parquet)")
    parser.add_argument("--where", default="", help="conditions, see above")
    parser.add_argument("--keep", metavar="N", help="take the N best of the pairs that fulfil --where, such as 1.2e9")
    parser.add_argument("--by", metavar="COLUMN", help=f"what is best, and shown as a histogram ({BY})")
    parser.add_argument(
        "--columns", type=Path, action="append", default=[], metavar="DIR",
        help="folder of visionfm data score or data dedup; may be given several times",
    )  # fmt: skip
    parser.add_argument("--out", required=True, type=Path, help="selection file to write")
    add_keys(parser)
    parser.add_argument("--write", choices=FORMS, help="copy the selected pairs in this form, to --to")
    parser.add_argument("--to", type=Path, metavar="DIR", help="folder for the copies")
    add_arguments(parser)
    arguments = parser.parse_args(argv)
    if (arguments.write is None) != (arguments.to is None):
        raise ConfigError("--write and --to belong together: the form of the copies and their folder; give both")
    quiet_logs()
    out, engine = arguments.out.expanduser(), engine_of(arguments)
    columns = [path.expanduser() for path in arguments.columns]
    report = select(
        arguments.path,
        arguments.where,
        out,
        keep=_number(arguments.keep) if arguments.keep is not None else None,
        by=arguments.by,
        columns=columns,
        caption_key=arguments.caption_key,
        image_key=arguments.image_key,
        engine=engine,
    )
    console = Console(soft_wrap=False)
    print_report(console, report, out)
    if arguments.write:
        caption_key = caption_suffix(arguments.caption_key)
        source = TarPairs(arguments.path, caption_key=caption_key, image_key=arguments.image_key)
        chosen = read_selection(str(out), source.index)
        to, more = arguments.to.expanduser(), {"caption_key": caption_key, "columns": columns}
        copy_pairs(source, chosen, to, arguments.write, engine=engine, **more)
        console.print(f"{count(report['selected'], 'pair')} copied: {to}", highlight=False, markup=False)
    if left_out := report["left_out"]:
        more = f", and {len(left_out) - 1:,} more in {report_file(out)}" if len(left_out) > 1 else ""
        complain(
            f"{len(left_out):,} of {count(len(report['tars']), 'tar')} left out, the selection has the others: "
            f"{left_out[0]['why']}{more}"
        )
    return LEFT_OUT if left_out else 0


if __name__ == "__main__":
    sys.exit(entry_point(main)(sys.argv[1:]))
