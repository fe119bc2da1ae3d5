"""Measure trained models on the sets of image benchmarks that are on disk.

    visionfm board runs/swinv2_g_clip --data=/data/benchmarks --out=board/
    visionfm board runs/a runs/b exported/c --data=/data/benchmarks --sets=cifar10,imagenet1k --out=board/
    visionfm board runs/vit_huge --data=/data/benchmarks --probe --out=board/

--data is a folder of sets. A set is a folder as CLIP_benchmark publishes it (wds_cifar10/, with classnames.txt,
zeroshot_classification_templates.txt and test/0.tar), or one of class folders (cifar10/test/CLASS/FILE). Its images are
those of test, val or validation. A set of pairs (flickr30k) has tars of KEY.jpg and KEY.txt, a caption on each line.

A model of images and texts is measured by zero-shot classification, or by retrieval; with --probe, and other models
always, by k-NN and a linear probe on frozen features, of sets that have a part train. Class names are those of
classnames.txt; without it WordNet ids and numbers stand for the published names, other folders for themselves. Prompts
are those of the set's file, else the published ones of the set, else "a photo of a {}.".

--out holds board.json, board.md and board.html, of all that was ever measured into it. Beside each number stands its
protocol: equal digits mean that images, class names, prompts, preprocessing and tokenizer were equal. What board.json
has of the same weights, network and protocol is not measured again.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import fcntl
import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from visionfm_jax import parts
from visionfm_jax.api import Model, load
from visionfm_jax.config import EvalConfig
from visionfm_jax.config.arguments import Parser
from visionfm_jax.data.sources.benchmark import NAMES, SPLITS, set_name
from visionfm_jax.data.sources.kinds import BenchmarkConfig
from visionfm_jax.data.text_lists import benchmarks
from visionfm_jax.errors import ConfigError, DataError, OutputError, UserError, complain, entry_point, printable
from visionfm_jax.evals.kinds import KnnConfig, LinearProbeConfig, RetrievalConfig, ZeroShotConfig
from visionfm_jax.evals.protocol import digest_of
from visionfm_jax.evals.run import measure
from visionfm_jax.logs import quiet_logs
from visionfm_jax.storage import write_text
from visionfm_jax.telemetry.page import document, section, table

TEMPLATES = "zeroshot_classification_templates.txt"
GROUPS = ("vtab", "wds")  # folders of sets within --data
RETRIEVAL = ("flickr30k", "flickr8k", "mscoco_captions")
MAIN = {"zero_shot": "top1", "retrieval": "text_to_image_r1", "knn": "top1", "linear_probe": "top1"}
SHOWN = {  # of each kind, beside the main one
    "zero_shot": ("top5", "balanced_accuracy"),
    "retrieval": ("text_to_image_r5", "image_to_text_r1", "image_to_text_r5"),
    "knn": (),
    "linear_probe": ("balanced_accuracy",),
}
TITLES = {
    "zero_shot": "Zero-shot classification",
    "retrieval": "Zero-shot retrieval",
    "knn": "k nearest neighbours on frozen features",
    "linear_probe": "Linear probe on frozen features",
}


@dataclasses.dataclass(frozen=True)
class Set:
    """A set on disk."""

    name: str
    path: Path
    split: str  # of the held-out images
    train: bool  # whether there is a part to learn from
    captions: bool  # in place of labels

    def source(self, split: str = "") -> BenchmarkConfig:
        return BenchmarkConfig(path=str(self.path), split=split or self.split)

    def prompts(self) -> str:
        """As `ZeroShotConfig.prompts` has them."""
        if (self.path / TEMPLATES).is_file():
            return str(self.path / TEMPLATES)
        if self.name.startswith("imagenet"):
            return "imagenet_prompts"
        return f"{self.name}_prompts" if self.name in benchmarks() else "a photo of a {}."


def find_sets(data: Path, wanted: Sequence[str] = ()) -> list[Set]:
    """The sets below a folder, by name.

    Args:
      data: the folder.
      wanted: names of sets; (): all that are there.

    Raises:
      DataError: there is none, or one that is wanted is not there.
    """
    if not data.is_dir():
        raise DataError(f"--data={printable(str(data))}: is no folder; name the one that holds the sets")
    folders = [data, *(data / group for group in GROUPS if (data / group).is_dir())]
    found: dict[str, Set] = {}
    for path in sorted(path for folder in folders for path in folder.iterdir() if path.is_dir()):
        split = next((split for split in SPLITS if (path / split).is_dir()), "")
        if not split:
            continue
        tars = any((path / split).glob("*.tar"))
        one = Set(set_name(path), path, split, (path / "train").is_dir(), tars and not (path / NAMES).is_file())
        if other := found.get(one.name):
            raise DataError(f"{path} and {other.path} are both the set {one.name}; rename one")
        found[one.name] = one
    if not found:
        raise DataError(
            f"--data={printable(str(data))}: holds no set; a set is a folder such as cifar10/test/CLASS/FILE, or "
            f"wds_cifar10/ with {NAMES} and test/0.tar"
        )
    if missing := [name for name in wanted if name not in found]:
        raise DataError(f"--sets={','.join(missing)}: not in {data}; there are {', '.join(sorted(found))}")
    return [found[name] for name in wanted or sorted(found)]


def evals_of(one: Set, model: Model, probe: bool) -> list[EvalConfig]:
    """What is measured on a set; []: nothing can be."""
    size = getattr(model.transform, "size", 0)
    how: dict[str, Any] = {"source": one.source(), "preprocess": model.transform.preprocess, "image_size": size}
    found: list[EvalConfig] = []
    if "embeddings" in model.config.task.predictions:
        if one.captions:
            found.append(RetrievalConfig(name="retrieval", **how))
        else:
            found.append(ZeroShotConfig(name="zero_shot", prompts=one.prompts(), **how))
    if (probe or not found) and one.train and not one.captions and "features" in model.config.task.predictions:
        gallery = (one.source("train"),)
        found.append(KnnConfig(name="knn", gallery=gallery, **how))
        found.append(LinearProbeConfig(name="linear_probe", gallery=gallery, **how))
    return found


def board(
    models: dict[str, str | Path | Model], sets: Sequence[Set], known: Sequence[dict] = (), *, probe: bool = False
) -> Iterator[dict[str, Any]]:
    """Each measurement as soon as it is there: model, weights (`digest_of`), set, kind, protocol, metrics.

    Args:
      models: by the names that they have in the table: what `load` takes, or loaded models.
      sets: to measure on.
      known: measurements of before, which are given again where weights and protocol are the same.
      probe: also measure models of images and texts by their features.

    Raises:
      UserError: a model cannot be loaded, or can be measured on none of the sets.
    """
    before = {(row["weights"], row["set"], row["protocol"]): row for row in known}
    for name, given in models.items():
        model = given if isinstance(given, Model) else load(given)
        if "embeddings" in model.config.task.predictions:
            model.tokenizer  # noqa: B018 -- texts that are read otherwise are refused
        weights, count, run = digest_of(model.params, model.config), 0, copy.copy(model.config)
        for one in sets:
            for config in evals_of(one, model, probe):
                count += 1
                run.evals = (config,)
                try:
                    made = config.make(run, 0, 1)
                except DataError as error:
                    complain(f"{one.name} is left out: {error}")
                    continue
                row = {"model": name, "weights": weights, "step": model.step, "set": one.name, "kind": config.kind}
                row |= {"protocol": made.protocol, "records": len(made.source)}
                if (old := before.get((weights, one.name, made.protocol))) and old["kind"] == config.kind:
                    yield {**old, "model": name}
                    continue
                batches = sum(-(-len(source) // made.batch_size) for source in made.sources)
                what = f"{name}: {one.name}, {config.kind}"
                with tqdm(desc=what, total=batches, unit=" batches", leave=False) as bar:
                    scores = measure(model.trainer, {config.name: made}, model.params, {}, bar.update)
                assert scores is not None
                metrics = {key.partition("/")[2]: value for key, value in scores.items()}
                yield {**row, "metrics": metrics, "settings": made.settings}
        if not count:
            what = "has no text tower" if "features" in model.config.task.predictions else "makes no features"
            raise UserError(f"{name}: this model {what}, and no set has a part train to learn from; add one")
        del model  # else both are in memory while the next one is loaded


def means(rows: Sequence[dict], kind: str, names: Sequence[str]) -> list[float | None]:
    """Of the main metric of each model over the sets that all have; None where there are no such sets."""
    by = {(row["model"], row["set"]): row["metrics"][MAIN[kind]] for row in rows if row["kind"] == kind}
    common = {one for _, one in by if all((name, one) in by for name in names)}
    return [float(np.mean([by[name, one] for one in common])) if common else None for name in names]


def tables(rows: Sequence[dict]) -> list[tuple[str, list[str], list[list[str]]]]:
    """Title, head and rows of a table for each kind of measurement."""
    rows, out = _named(rows), []
    for kind, title in TITLES.items():
        of_kind = [row for row in rows if row["kind"] == kind]
        if not of_kind:
            continue
        names = list(dict.fromkeys(row["model"] for row in of_kind))
        columns = [MAIN[kind], *SHOWN[kind]] if len(names) == 1 else [MAIN[kind]]
        head = ["set", "images", *(columns if len(names) == 1 else names), "protocol"]
        body = []
        for one in dict.fromkeys(row["set"] for row in of_kind):
            found = {row["model"]: row for row in of_kind if row["set"] == one}
            some = next(iter(found.values()))
            cells = [_percent(found[n]["metrics"].get(c) if n in found else None) for n in names for c in columns]
            protocols = list(dict.fromkeys(row["protocol"] for row in found.values()))
            body.append([one, f"{some['records']:,}", *cells, " ".join(protocols)])
        if len(body) > 1:
            means_of = [_percent(value) for value in means(of_kind, kind, names)]
            body.append(["mean", "", *means_of, *[""] * (len(columns) - 1 if len(names) == 1 else 0), ""])
        out.append((f"{title}, {columns[0]} in %" if len(names) > 1 else f"{title}, {names[0]}, in %", head, body))
    return out


def _named(rows: Sequence[dict]) -> list[dict]:
    """The measurements, with the first digits of the weights behind a name that several models have."""
    models = Counter(name for name, _ in {(row["model"], row["weights"]) for row in rows})
    return [
        row if models[row["model"]] == 1 else {**row, "model": f"{row['model']} {row['weights'][:8]}"} for row in rows
    ]


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"


def markdown(rows: Sequence[dict]) -> str:
    """The tables, for people."""
    lines = ["# Board", ""]
    for title, head, body in tables(rows):
        lines += [f"## {title}", "", _line(head), "|---|" + "--:|" * (len(head) - 2) + "---|"]
        lines += [*map(_line, body), ""]
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(printable(cell).replace("|", "\\|") for cell in cells) + " |"


def page(rows: Sequence[dict]) -> str:
    """The tables as HTML."""
    models = {row["model"]: [row["model"], row["weights"], f"{row['step']:,}"] for row in _named(rows)}
    parts = ["<h1>Board</h1>", table(["model", "weights", "step"], list(models.values()), "--n")]
    for title, head, body in tables(rows):
        parts.append(section(title, table(head, body, "-" + "n" * (len(head) - 2) + "-")))
    about = "Equal protocols mean equal images, class names, prompts, preprocessing and tokenizer."
    return document("Board", [*parts, f'<p class="soft">{about}</p>'])


def main(argv: Sequence[str], program: str = "python -m visionfm_jax.board") -> None:
    """Measure, write after each measurement, print."""
    parser = Parser(program, __doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run, or of timm, Hugging Face or OpenCLIP")
    parser.add_argument("--data", required=True, help="folder of the sets")
    parser.add_argument("--sets", default="", help="names of sets, with commas between; default: all that are there")
    parser.add_argument("--probe", action="store_true", help="also k-NN and a linear probe, for models with texts")
    parser.add_argument("--out", required=True, help="folder to write")
    arguments = parser.parse_args(argv)
    quiet_logs()
    parts.check_out(arguments.out, ())
    parts.check_writable(Path(arguments.out))
    sets = find_sets(Path(arguments.data), [name for name in arguments.sets.split(",") if name])
    out = Path(arguments.out)
    file = out / "board.json"
    names = [Path(run).name or run for run in arguments.runs]
    models = dict(zip(names if len(set(names)) == len(names) else arguments.runs, arguments.runs, strict=True))
    rows: list[dict] = []
    for row in board(models, sets, _read(file), probe=arguments.probe):
        rows.append(row)
        score = _percent(row["metrics"][MAIN[row["kind"]]])
        what = f"{MAIN[row['kind']]} {score:>5} %"
        print(f"{printable(row['model'])}: {row['set']:24} {row['kind']:13} {what}  [{row['protocol']}]", flush=True)
        try:
            _add(row, file)
        except OSError as error:
            raise OutputError(f"--out={arguments.out}: {error.strerror or error}; name another folder") from error
    if not rows:
        raise DataError(f"--data={arguments.data}: nothing could be measured; the lines above say why")
    print(f"\n{markdown(rows).partition(chr(10))[2].strip()}\n\n{out / 'board.html'}")


def _add(row: dict, file: Path) -> None:
    """A measurement, to the file and the tables beside it, in place of that of the same model, set and kind.

    Others may write to the same folder at the same time.

    Raises:
      OSError: they cannot be written.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file.with_name(".board.lock"), "ab") as lock:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        keys = ("model", "weights", "set", "kind")
        rows = {tuple(one[key] for key in keys): one for one in (*_read(file), row)}
        write_text(file, json.dumps({"measurements": [*rows.values()]}, indent=1) + "\n")
        write_text(file.with_suffix(".md"), markdown([*rows.values()]))
        write_text(file.with_suffix(".html"), page([*rows.values()]))


def _read(file: Path) -> list[dict]:
    """What was measured before.

    Raises:
      ConfigError: the file is another's.
    """
    if not file.exists():
        return []
    try:
        rows = json.loads(file.read_text())["measurements"]
        needed = ("model", "weights", "step", "set", "protocol", "records")
        for row in rows:
            float(row["metrics"][MAIN[row["kind"]]])
            if not all(isinstance(row[name], int if name in ("step", "records") else str) for name in needed):
                raise TypeError(f"a measurement of {row['set']!r:.60}")
        return rows
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise ConfigError(f"{file}: cannot be read as a board ({error!r}); move it away") from None


if __name__ == "__main__":
    sys.exit(entry_point(main)(sys.argv[1:]))
