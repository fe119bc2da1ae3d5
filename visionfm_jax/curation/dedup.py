"""Find copies among image-text pairs of a folder of tars, and pairs that show images held out for evaluation.

    visionfm data dedup --path=FOLDER --out=FOLDER/copies --columns=FOLDER/scores --against=folder:/data/pets@test
    visionfm data select --path=FOLDER --columns=FOLDER/copies --where='not duplicate and not contaminated' --out=…

Pictures are copies if they look the same: compressed again, resized, brightened by a tenth, or cut by a little. Mirror
images, and the same drawing in other colours, are no copies. --by says what makes a pair a duplicate:

    image     its picture is a copy, whatever the captions say (the usual meaning)
    pair      its picture is a copy, and the captions are equal but for case, punctuation and white space
    caption   the captions are equal, whatever the pictures show: "a photo" is then kept once

With --similar=0.95 pictures are copies, too, whose embeddings have a cosine of at least that: mirror images, other
colours, larger cuts, and with a lower one other photos of the same thing. --columns is then of visionfm data score
--embeddings. Pairs are compared within clusters of like ones, so that a few near ones are missed.

Of copies the one with the highest score is kept (`similarity` in --columns, of visionfm data score), then the one with
the most pixels, then the first; every dropped pair is a copy of the kept one that it names. --out gets for each tar a
file of columns, a row for each pair: `duplicate`; `duplicate_of`, TAR/KEY of the kept one; `why`, image, caption or
pair (both), or similar, where the embeddings alone are near. They are empty for pairs whose picture cannot be read.

With --against=KIND:PATH or KIND:PATH@SPLIT, a dataset as training reads them, such as folder:/data/pets@ of class
folders without a split, and as often as there are such sets: `contaminated`, whether the picture is a copy of a
held-out image or of its mirror image, and `contaminated_by`, KIND:PATH#RECORD KEY. These pairs may be duplicates, too.

report.json and report.html, with pictures, lie beside the columns. When the command is stopped and started again, what
is finished stands. The exit code is 3 if all is written, and some pictures could not be read: they are named.
"""

from __future__ import annotations

import base64
import collections
import functools
import html
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from rich.console import Console
from rich.table import Table

from visionfm_jax.config.arguments import Parser
from visionfm_jax.data import column_folder, duplicates, held_out, signatures
from visionfm_jax.data.column_folder import ColumnFolder
from visionfm_jax.data.images import DamagedImage, decode, resize
from visionfm_jax.data.shards import Engine, Local, add_arguments, engine_of
from visionfm_jax.data.similar import COLUMN
from visionfm_jax.data.sources import read_record
from visionfm_jax.data.sources.record import DamagedRecord
from visionfm_jax.data.sources.tars import TarPairs, add_keys, caption_suffix
from visionfm_jax.errors import LEFT_OUT, ConfigError, DataError, complain, count, entry_point, printable, shortened
from visionfm_jax.logs import quiet_logs
from visionfm_jax.storage import remove_unfinished, write_text, writing
from visionfm_jax.telemetry.page import document, section, table

NAMED = 5  # pairs that cannot be read, in the report
GROUPS, COPIES, SHOWN = 12, 5, 24  # groups in the page, dropped pairs of each, and contaminated pairs
SIDE = 160  # pixels of a picture in the page
CUT = 160  # characters of a caption in the page


def dedup(
    path: str,
    out: Path,
    *,
    by: str = "image",
    similar: float | None = None,
    scores: Path | None = None,
    against: Sequence[str] = (),
    caption_key: str = "txt",
    image_key: str = "",
    engine: Engine | None = None,
) -> dict[str, Any]:
    """Write the columns, the report and the page.

    Args:
      path: folder or URL with NNNNN.tar.
      out: folder to write.
      by: one of `duplicates.BY`.
      similar: the least cosine of the embeddings of copies, `image_embedding` in `scores`; None: they are not compared.
      scores: folder of `visionfm data score`; of copies, the best-scored is kept.
      against: datasets of held-out images, KIND:PATH or KIND:PATH@SPLIT.
      caption_key: suffix of the members with captions, as for `TarPairs`.
      image_key: suffix of the pictures; empty: any of an image.
      engine: that does the work; None: a process for each core.

    Returns:
      The report.

    Raises:
      UserError: one line: an argument, tar or dataset is wrong, nothing can be read, or `out` cannot be written.
    """
    caption_key = caption_suffix(caption_key)
    if not caption_key:
        raise ConfigError("--caption_key: is empty, but captions are compared; name the suffix of their files")
    if similar is not None:
        _check_similar(similar, by, scores)
    engine = engine or Local()
    source = TarPairs(path, caption_key=caption_key, image_key=image_key)
    if not len(source):
        raise DataError(f"{source.name}: holds no pair; set --path, --caption_key or --image_key")
    best = column_folder.open_folder(scores) if scores else None
    there = column_folder.columns_of(best, source.index.tars[0]) if best else []
    if best and "similarity" not in there:
        raise ConfigError(f"--columns={printable(str(scores))}: has no column similarity; visionfm data score makes it")
    if similar is not None and COLUMN not in there:
        raise ConfigError(
            f"--columns={printable(str(scores))}: has no column {COLUMN}, which --similar compares; visionfm "
            "data score --embeddings makes it"
        )
    for word in against:
        held_out.opened(word)  # what would stop the work after hours comes first
    about = {"command": "data dedup", "by": by, "columns": best.about if best else None, "against": list(against)}
    about |= {"caption_key": caption_key} | ({} if similar is None else {"similar": similar})
    columns = column_folder.create(out, about | {"tars": f"{source.index.crc:08x}"})
    files = [out / f"held-out-{i:02d}" for i in range(len(against))]
    sets = [held_out.write_signatures(word, file, engine) for word, file in zip(against, files, strict=True)]
    part = caption_key.partition(":")[2]
    made = duplicates.find_duplicates(source.index, source.store, columns, by, best, files, engine, similar, part)
    found = _Found(source, columns, best, files)
    report = found.added_up(made, by, similar, sets)
    with writing(f"--out={printable(str(out))}"):
        for name, text in (
            ("report.json", json.dumps(report, indent=1, ensure_ascii=False) + "\n"),
            ("report.html", found.page(report)),
        ):
            remove_unfinished(out / name)
            write_text(out / name, text)
    return report


def _check_similar(similar: float, by: str, scores: Path | None) -> None:
    flag = f"--similar={similar}"
    if not 0 < similar <= 1:
        raise ConfigError(f"{flag}: must lie in (0, 1], as a cosine; 0.95 is a usual one")
    if by == "caption":
        raise ConfigError(f"{flag}: compares pictures, but --by=caption goes by captions alone; leave one of them out")
    if scores is None:
        raise ConfigError(f"{flag}: needs embeddings; add --columns=FOLDER of visionfm data score --embeddings")


class _Found:
    """What was found, for people."""

    def __init__(self, source: TarPairs, columns: ColumnFolder, scores: ColumnFolder | None, held: Sequence[Path]):
        self._source, self._columns, self._scores, self._held = source, columns, scores, held
        self._signs = duplicates.signatures_in(columns.path)
        self._shown: list[int] = []  # contaminated pairs

    def added_up(
        self, made: Iterable[dict[str, Any]], by: str, similar: float | None, sets: Sequence[dict[str, Any]]
    ) -> dict[str, Any]:
        """The report."""
        reasons = duplicates.BY if similar is None else duplicates.WHY
        totals: collections.Counter[str] = collections.Counter()
        damage: list[str] = []
        for part, first in zip(made, self._source.index.starts.tolist(), strict=False):
            self._shown += [first + i for i in part["shown"]][: SHOWN - len(self._shown)]
            damage += [f"{self._source.key(first + i)}: {why}" for i, why in part["damage"][: NAMED - len(damage)]]
            totals.update({name: part[name] for name in ("pairs", "contaminated", *reasons)})
            totals["unreadable"] += len(part["damage"])
        if totals["unreadable"] == totals["pairs"]:
            raise DataError(f"{self._source.name}: no picture can be read; the first: {damage[0]}; check the tars")
        _, captions = duplicates.read_groups(self._columns.path)
        return {
            "path": self._source.store.url,
            "by": by,
            **({} if similar is None else {"similar": similar}),
            "tars": len(self._source.index.tars),
            "pairs": totals["pairs"],
            "unreadable": {"count": totals["unreadable"], "first": damage},
            "duplicates": {reason: totals[reason] for reason in reasons},
            "kept": totals["pairs"] - totals["unreadable"] - sum(totals[reason] for reason in reasons),
            "captions": {
                "repeated": captions["repeated"],
                "top": [{"pairs": pairs, "caption": self._caption(row)} for pairs, row in captions["top"]],
            },
            "contaminated": totals["contaminated"],
            "against": [
                {"images": one["word"], "records": one["records"], "unreadable": one["unreadable"][:NAMED]}
                | {"unreadable_count": len(one["unreadable"])}
                for one in sets
            ],
            "source": self._source.report(),
        }

    def page(self, report: dict[str, Any]) -> str:
        """HTML with pictures of the largest groups, and of contaminated pairs."""
        pairs, _ = duplicates.read_groups(self._columns.path)
        kept, counts = np.unique(pairs["kept"], return_counts=True)
        largest = np.lexsort((kept, -counts))[:GROUPS]
        groups = [
            self._group(int(kept[i]), pairs["row"][pairs["kept"] == kept[i]][:COPIES].tolist(), int(counts[i]))
            for i in largest
        ]
        frequent = [[f"{one['pairs']:,}", one["caption"]] for one in report["captions"]["top"]]
        body = [
            f"<h1>Copies in {_e(report['path'])}</h1>",
            f"<style>.group{{display:flex;flex-wrap:wrap;gap:10px;margin:.3em 0 1.4em}}"
            f".group figure{{width:{SIDE}px}}.group figcaption{{white-space:pre-line}}</style>",
            table(["pairs", "", "of all"], list(_lines(report)), " nn"),
            section("Pairs whose picture cannot be read", table(["pair"], [[one] for one in _unreadable(report)])),
            section("Largest groups: the kept pair, then dropped ones", *groups),
            section("Pairs that show held-out images", *map(self._contaminated, self._shown)),
            section("Captions of most pairs", table(["pairs", "caption"], frequent, "nw")),
        ]
        return document("Copies", body)

    def _group(self, kept: int, dropped: Sequence[int], size: int) -> str:
        mine = self._signature(kept)
        figures = [self._figure(kept, "kept")]
        for row in dropped:
            why = self._row(self._columns, row, "why")
            far = f"{int(signatures.distances(mine['hash'], self._signature(row)['hash']))} bits"
            if why == "similar":
                far = (
                    f"cosine {np.dot(self._row(self._scores, row, COLUMN), self._row(self._scores, kept, COLUMN)):.3f}"
                )
            figures.append(self._figure(row, f"dropped by {why}, {far}"))
        more = f", of which {len(dropped)} are shown" if size > len(dropped) else ""
        return f"<h3>{size:,} dropped{more}</h3>" + _side_by_side(figures)

    def _contaminated(self, row: int) -> str:
        [match] = self._held_out.matches(self._signature(row)[None])
        assert match is not None
        try:
            image = _picture(read_record(held_out.opened(match.word), match.record)["image"])
        except (DamagedImage, DamagedRecord):
            image = ""
        what = "held out" + ", mirrored in the pair" * match.mirrored
        return _side_by_side([self._figure(row, "pair"), f"<figure>{image}{_text(what, match.name)}</figure>"])

    @functools.cached_property
    def _held_out(self) -> held_out.HeldOut:
        return held_out.HeldOut(self._held)

    def _figure(self, row: int, what: str) -> str:
        score = self._row(self._scores, row, "similarity") if self._scores else None
        what += f", score {score:.3f}" if score is not None else ""
        try:
            record = read_record(self._source, row)
        except DamagedRecord:
            return f"<figure>{_text(what, self._source.key(row))}</figure>"
        return f"<figure>{_picture(record['image'])}{_text(what, self._source.key(row), record['caption'])}</figure>"

    def _caption(self, row: int) -> str:
        try:
            captions = read_record(self._source, row)["caption"]
            return shortened(captions if isinstance(captions, str) else "; ".join(captions))
        except DamagedRecord:
            return ""

    def _place(self, row: int) -> tuple[dict[str, Any], int]:
        t = int(np.searchsorted(self._source.index.starts, row, side="right")) - 1
        return self._source.index.tars[t], row - int(self._source.index.starts[t])

    def _row(self, folder: ColumnFolder, row: int, column: str) -> Any:
        tar, place = self._place(row)
        return folder.read(tar, [column])[column][place].as_py()

    def _signature(self, row: int) -> np.ndarray:
        tar, place = self._place(row)
        return duplicates.rows_of(self._signs.read(tar))[place]


def _picture(image: bytes | np.ndarray) -> str:
    """An image as HTML; empty where it cannot be decoded."""
    try:
        pixels = decode(image)
    except DamagedImage:
        return ""
    scale = SIDE / max(pixels.shape[:2])
    pixels = resize(pixels, (max(1, round(pixels.shape[0] * scale)), max(1, round(pixels.shape[1] * scale))))
    data = base64.b64encode(cv2.imencode(".jpg", pixels[..., ::-1])[1].tobytes()).decode()
    return f'<img alt="" src="data:image/jpeg;base64,{data}"/>'


def _text(*lines: str) -> str:
    shown = (line if len(line) <= CUT else f"{line[:CUT]} …" for line in lines)
    first, *others = map(_e, shown)
    return f"<figcaption><b>{first}</b>\n" + "\n".join(others) + "</figcaption>"


def _side_by_side(figures: Sequence[str]) -> str:
    return f'<div class="group">{"".join(figures)}</div>'


def _e(text: str) -> str:
    return html.escape(printable(shortened(text)))


def _lines(report: dict[str, Any]) -> Iterable[list[str]]:
    """The numbers of the report: what, how many, and their share."""
    lines = {"all": report["pairs"], "whose picture cannot be read": report["unreadable"]["count"]}
    lines |= {f"duplicates by {reason}": number for reason, number in report["duplicates"].items() if number}
    lines |= {"kept": report["kept"], "whose caption others have, too": report["captions"]["repeated"]}
    lines |= {"that show held-out images": report["contaminated"]} if report["against"] else {}
    for what, number in lines.items():
        yield [what, f"{number:,}", f"{number / report['pairs']:.1%}"]


def _unreadable(report: dict[str, Any]) -> list[str]:
    found = report["unreadable"]
    more = found["count"] - len(found["first"])
    return [*found["first"], *([f"and {more:,} more, which signatures/ names"] if more else [])]


def print_report(console: Console, report: dict[str, Any], out: Path) -> None:
    """The report for people."""
    shown = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for i, name in enumerate(("pairs", "", "of all")):
        shown.add_column(name, justify="right" if i else "left")
    for line in _lines(report):
        shown.add_row(*line)
    console.print(shown)
    for one in report["against"]:
        console.print(printable(f"compared with {count(one['records'], 'image')} of {one['images']}"), markup=False)
    console.print(f"\n{out}, {out / 'report.html'}", highlight=False, markup=False)


def main(argv: Sequence[str], program: str = "python -m visionfm_jax.curation.dedup") -> int:
    """Parse, find, print."""
    parser = Parser(program, __doc__)
    parser.add_argument("--path", required=True, help="folder or URL with NNNNN.tar")
    parser.add_argument("--out", required=True, type=Path, help="folder to write")
    parser.add_argument("--by", choices=duplicates.BY, default="image", help="what makes a duplicate (%(default)s)")
    parser.add_argument("--similar", type=float, metavar="COSINE", help="least cosine of embeddings of copies, as 0.95")
    parser.add_argument("--columns", type=Path, metavar="FOLDER", help="that visionfm data score has written")
    parser.add_argument("--against", action="append", default=[], metavar="KIND:PATH", help="held-out images")
    add_keys(parser)
    add_arguments(parser)
    arguments = parser.parse_args(argv)
    quiet_logs()
    out = arguments.out.expanduser()
    report = dedup(
        arguments.path,
        out,
        by=arguments.by,
        similar=arguments.similar,
        scores=arguments.columns and arguments.columns.expanduser(),
        against=arguments.against,
        caption_key=arguments.caption_key,
        image_key=arguments.image_key,
        engine=engine_of(arguments),
    )
    print_report(Console(soft_wrap=False), report, out)
    held = [name for one in report["against"] for name in one["unreadable"]]
    for what, lines in (("pairs", _unreadable(report)), ("held-out images", held)):
        if lines:
            complain(f"{what} whose picture cannot be read: {'; '.join(lines)}")
    return LEFT_OUT if report["unreadable"]["count"] or held else 0


if __name__ == "__main__":
    sys.exit(entry_point(main)(sys.argv[1:]))
