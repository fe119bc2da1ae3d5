"""Look at the data that a configuration names, before a run.

    visionfm data doctor --config=FILE.py [--config.FIELD=VALUE …] [--cluster=h100:16x8] [--out=FOLDER]

Opens all datasets of `data.train` and of the evals, reads a sample of each, and lists what would stop the training,
spoil it or slow it down: errors, warnings and notes, each with a remedy. Nothing is trained and no accelerator is used.
The sample is the same at every call: one record of each of --samples equal parts of a dataset; of all records
(--samples=0), 300 bytes each are held in memory. --cluster compares how fast this machine reads with what a step there
takes. --out writes doctor.json, and doctor.html, a page with histograms and pictures.

Exit codes: 0 nothing, or notes only · 3 warnings · 2 errors.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.table import Table
from rich.text import Text

from visionfm_jax.config import Config
from visionfm_jax.config.arguments import Parser
from visionfm_jax.curation import doctor_page
from visionfm_jax.curation.checks import Finding, Study, as_json, findings, missing_paths, named_sources, remarks
from visionfm_jax.curation.survey import Part, Reader, survey, warnings_kept
from visionfm_jax.data.chain import Chain
from visionfm_jax.data.loader import check_pair_ratio, train_loader
from visionfm_jax.data.shards import Engine, Threads, add_arguments, engine_of
from visionfm_jax.data.sources import open_source
from visionfm_jax.errors import ConfigError, DataError, StorageError, entry_point, printable
from visionfm_jax.machine import usable_cores
from visionfm_jax.parallel.targets import TARGETS, Cluster, find_cluster
from visionfm_jax.storage import write_text, writing
from visionfm_jax.tasks.task import make_task

SAMPLES = 2000  # records of a dataset
SECONDS = 2.0  # of measuring the loader
BATCH = 64  # rows of a batch that it makes then, at most
WARNINGS, ERRORS = 3, 2  # exit codes
STYLES = {"error": "bold red", "warning": "yellow", "note": "cyan"}


def examine(
    config: Config, samples: int = SAMPLES, engine: Engine | None = None, cluster: Cluster | None = None
) -> Study:
    """What there is to know of the data of a configuration.

    Args:
      config: checked.
      samples: records to read of each dataset; 0: all of them.
      engine: that reads them; None: threads.
      cluster: that training is planned for; None: not known.

    Raises:
      StorageError: the storage fails.
    """
    study = Study(config, _parts(config), cluster=cluster)
    lacking = missing_paths(config)
    for part in study.parts:
        if part.config.path not in lacking and getattr(part.config, "selection", "") not in lacking:
            _open(part)
    _agree(study)
    chain = Chain((), config.model.image_size, config.data.max_pixels)
    for part in study.opened:
        texts = study.texts if part.source.has_captions else None
        fields = study.fields if part.trained else None
        engine = engine or Threads(usable_cores())
        part.survey = survey(Reader(part.source, chain, fields, texts), samples, engine, part.source.name)
    study.flops, study.parameters = _model(config)
    study.rate = _rate(study)
    return study


def _parts(config: Config) -> list[Part]:
    """The datasets, each once."""
    parts: dict[str, Part] = {}

    for name, source in named_sources(config):
        part = parts.setdefault(repr(dataclasses.replace(source, weight=1.0)), Part(source, []))
        part.fields.append(f"config.{name}")
        part.trained |= name.startswith("data.")
        part.held_out |= name.endswith(".source")
    return list(parts.values())


def _open(part: Part) -> None:
    with warnings_kept() as said:
        try:
            part.source = open_source(part.config)
        except (DataError, ConfigError, StorageError) as error:
            part.problem = printable(str(error))
    part.said = [printable(line) for line in said]


def _agree(study: Study) -> None:
    """Ask the task, the transforms and the evals whether they can work with the data."""
    config = study.config

    def refusal(where: str, act: Any) -> Any:
        try:
            with warnings_kept():
                return act()
        except (ConfigError, DataError) as error:
            study.refused.append((where, printable(str(error)).removeprefix(f"{where}: ")))
            return None

    study.fields = refusal("config.task", lambda: config.task.fields(config))
    chain = Chain(config.data.transforms, config.model.image_size, config.data.max_pixels)
    refusal("config.data.transforms", chain.check)
    for part in study.trained if study.fields else ():
        refusal(part.where, lambda source=part.source: study.fields.check(source))
    if len(study.opened) == len(study.parts):
        sources = [part.source for part in study.trained]
        refusal("config.data.train", lambda: check_pair_ratio(sources, config.task.pair_ratio))
        for i, e in enumerate(config.evals):
            refusal(f"config.evals[{i}]", lambda e=e: e.make(config, 0, 1))


def _model(config: Config) -> tuple[float, int]:
    """FLOPs of a step, and the number of parameters: of shapes alone, nothing is computed."""
    task = make_task(config, lambda params: params)
    shapes = jax.eval_shape(task.init, jax.eval_shape(lambda: jax.random.key(0)))
    return task.step_flops, sum(x.size for x in jax.tree.leaves(shapes))


def _rate(study: Study) -> tuple[float, int] | None:
    """Images/s that the loader makes here, in threads, and on how many cores; None where the data are not usable."""
    config = study.config
    named = {name: part.source for part in study.parts for name in part.fields}
    sources = [named[f"config.data.train[{i}]"] for i in range(len(config.data.train))]
    if study.refused or None in sources:
        return None
    cores, rows = usable_cores(), min(config.train.batch_size, BATCH)
    loader = functools.partial(
        train_loader, dataclasses.replace(config.data, workers=0, threads=cores), image_size=config.model.image_size,
        batch_size=rows, seed=config.seed, start_step=0, host=0, hosts=1, sources=sources, fields=study.fields,
        pair_ratio=config.task.pair_ratio,
    )  # fmt: skip
    try:
        with warnings_kept(), loader() as batches:
            next(batches)
            start, made = time.monotonic(), 0
            while made == 0 or time.monotonic() - start < SECONDS:
                made += len(next(batches)["record"])
            return made / (time.monotonic() - start), cores
    except DataError:  # more damaged records in a row than are stepped over, which is found already
        return None


def print_report(console: Console, study: Study, found: Sequence[Finding]) -> None:
    """What was read, and what was found, for people."""
    table = _table("dataset", "in", "records", "read", "damaged")
    for part in study.parts:
        name = part.source.name if part.source else f"{part.config.kind} {part.config.path}"
        numbers = ("cannot be opened", "", "")
        if part.source:
            numbers = (f"{n:,}" for n in (len(part.source), len(part.survey.rows), len(part.survey.reasons)))
        table.add_row(Text(printable(name)), part.where, *numbers)
    console.print(table)
    for remark in remarks(study):
        console.print(remark, highlight=False)
    console.print()
    if not found:
        console.print("Nothing was found.")
        return
    table = _table("", "")
    for one in found:
        what = Text(f"{one.where}: ", "bold").append(printable(one.what), "not bold")
        for example in one.examples:
            what.append(f"\n  {printable(example)}", "dim not bold")
        what.append(f"\nremedy: {printable(one.remedy)}\n", "italic not bold")
        table.add_row(Text(one.severity, STYLES[one.severity]), what)
    console.print(table)


def _table(*names: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in names:
        table.add_column(name, overflow="fold")
    return table


def summary(study: Study, found: Sequence[Finding]) -> dict[str, Any]:
    """All of it, for other programs."""
    datasets = [
        {
            "fields": part.fields, "kind": part.config.kind, "path": part.config.path, "split": part.config.split,
            "records": len(part.source) if part.source else None, "read": len(part.survey.rows),
            "damaged": len(part.survey.reasons),
        }
        for part in study.parts
    ]  # fmt: skip
    rate, cores = study.rate or (None, None)
    return {
        "config": study.config.name, "datasets": datasets, "images_per_s": rate, "cores": cores,
        "findings": as_json(found),
    }  # fmt: skip


def write(study: Study, found: Sequence[Finding], out: Path) -> None:
    """doctor.json and doctor.html in a folder, which is made.

    Raises:
      UserError: they cannot be written.
    """
    with writing(f"--out={printable(str(out))}"):
        out.mkdir(parents=True, exist_ok=True)
        write_text(out / "doctor.json", json.dumps(summary(study, found), indent=1, ensure_ascii=False) + "\n")
        write_text(out / "doctor.html", doctor_page.page(study, found))


def main(argv: Sequence[str], program: str = "python -m visionfm_jax.curation.doctor") -> int:
    """Parse, look, print."""
    parser = Parser(program, __doc__)
    parser.add_argument("--samples", type=int, default=SAMPLES, help="records of each dataset; 0: all (%(default)s)")
    parser.add_argument("--cluster", metavar="GPU:HOSTSxGPUS", help=f"such as h100:16x8; GPUs: {', '.join(TARGETS)}")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write doctor.json and doctor.html there")
    add_arguments(parser)
    config, arguments = parser.parse_with_config(argv)
    if arguments.samples < 0:
        raise ConfigError(f"--samples={arguments.samples}: must be at least 1, or 0 for all records")
    cluster = find_cluster(arguments.cluster) if arguments.cluster else None
    jax.config.update("jax_platforms", "cpu")  # evals may make small arrays, and accelerators are others'
    study = examine(config, arguments.samples, engine_of(arguments), cluster)
    found = findings(study)
    print_report(Console(soft_wrap=False), study, found)
    if arguments.out:
        out = arguments.out.expanduser()
        write(study, found, out)
        print(f"\nwritten: {out / 'doctor.html'}, {out / 'doctor.json'}")
    worst = {finding.severity for finding in found}
    return ERRORS if "error" in worst else WARNINGS if "warning" in worst else 0


if __name__ == "__main__":
    sys.exit(entry_point(main)(sys.argv[1:]))
