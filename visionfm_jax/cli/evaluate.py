"""Evaluation of what a run has reached."""

from __future__ import annotations

import dataclasses
from argparse import Namespace
from pathlib import Path

import jax
from tqdm import tqdm

from visionfm_jax.config import Config, SourceConfig
from visionfm_jax.config.arguments import Parser
from visionfm_jax.data.sources.kinds import KINDS
from visionfm_jax.errors import ConfigError
from visionfm_jax.evals.kinds import measurements
from visionfm_jax.evals.run import check_labels, measure, open_evals
from visionfm_jax.parallel.agreement import from_first
from visionfm_jax.parallel.mesh import make_mesh
from visionfm_jax.telemetry.console import describe, describe_start, say, summary
from visionfm_jax.telemetry.facts import is_run
from visionfm_jax.telemetry.page import leave_page
from visionfm_jax.telemetry.watchdog import Watchdog
from visionfm_jax.telemetry.writers import append_evaluation
from visionfm_jax.train.folder import refuse_links
from visionfm_jax.train.initialise import weights_to_evaluate
from visionfm_jax.train.provenance import classes_of
from visionfm_jax.train.step import Trainer

FLAGS = ("eval", "data", "split", "gallery", "gallery_split", "classes", "prompts")


def add_arguments(parser: Parser) -> None:
    """Those of an eval that the run does not have."""
    kinds = ", ".join(measurements())
    parser.add_argument("--eval", metavar="KIND", help=f"instead of the run's evals, one of {kinds}")
    parser.add_argument(
        "--data", metavar="[KIND:]PATH", help="of --eval; KIND as config.data.train[0].kind, by default folder"
    )
    parser.add_argument("--split", help="of --data, such as test; default: that of its kind, mostly train")
    parser.add_argument("--gallery", metavar="[KIND:]PATH", help="of --eval=knn, linear_probe or retrieval, likewise")
    parser.add_argument("--gallery_split", metavar="SPLIT", help="of --gallery, likewise")
    parser.add_argument("--classes", metavar="NAMES", help="of --eval=zero_shot: a shipped list, or a file, of names")
    parser.add_argument(
        "--prompts", metavar="PROMPTS", help="of --eval=zero_shot: a list, a file, or 'a photo of a {}'"
    )


def with_eval(config: Config, values: Namespace) -> None:
    """Replace the evals of `config` by the one that the command line describes, if it does.

    It is named by its kind, and looks at images as the run's first eval does.
    """
    given = {name: value for name in FLAGS if (value := getattr(values, name, None)) is not None}
    if not given:
        return
    word = "--{}={}".format(*next(iter(given.items())))
    if getattr(values, "mode", "evaluate") != "evaluate":
        raise ConfigError(f"{word}: is for --mode=evaluate; add that, or leave it out")
    if not values.eval:
        raise ConfigError(f"{word}: needs --eval=KIND, which says what is measured")
    kinds = measurements()
    if values.eval not in kinds:
        raise ConfigError(f"--eval={values.eval}: no such kind of eval; there is {', '.join(kinds)}")
    if not values.data:
        raise ConfigError(f"--eval={values.eval}: needs data; add --data=PATH, or --data=KIND:PATH")
    kind, settings = kinds[values.eval], {"name": values.eval, "source": _source("data", values.data, values.split)}
    names = {field.name for field in dataclasses.fields(kind)}
    if values.gallery:
        if "gallery" not in names:
            raise ConfigError(f"--gallery={values.gallery}: --eval={values.eval} has none; leave it out")
        settings["gallery"] = (_source("gallery", values.gallery, values.gallery_split),)
    elif values.gallery_split is not None:
        raise ConfigError(f"--gallery_split={values.gallery_split}: is of --gallery; add that, or leave it out")
    for name in ("classes", "prompts"):
        if value := getattr(values, name):
            if name not in names:
                raise ConfigError(f"--{name}={value}: --eval={values.eval} has none; leave it out")
            settings[name] = value
    if config.evals:
        settings["preprocess"] = config.evals[0].preprocess
    config.evals = (kind(**settings),)


def _source(field: str, value: str, split: str | None) -> SourceConfig:
    """Of "PATH" or "KIND:PATH", and a split, or None for that which the kind has by default."""
    kind, colon, path = value.partition(":")
    if not colon or "/" in kind:
        kind, path = "folder", value
    if kind not in KINDS:
        raise ConfigError(f"--{field}={value}: {kind!r} is no kind of data; there is {', '.join(KINDS)}")
    config = KINDS[kind](path=path)
    if split is not None:
        if not config.split:
            raise ConfigError(f"--{field}={value}: {kind} has no splits, and {split!r} is given; leave that out")
        config.split = split
    return config


def evaluate(config: Config, watchdog: Watchdog) -> int:
    """Run all evals on the newest weights of the run, or, where it has none, on `config.checkpoint.weights`."""
    host = jax.process_index()
    config.validate_devices(jax.device_count(), jax.process_count())
    trainer = Trainer(config, make_mesh(config.parallel.replicas))
    with watchdog.suspended():
        evals = open_evals(config, host, jax.process_count())
    if not evals:
        raise ConfigError("config.evals = (): there is nothing to measure; name an eval in the configuration")
    refuse_links(config.folder)  # where pictures and scores will be written
    say(describe(trainer))
    found = weights_to_evaluate(trainer)
    check_labels(config, evals, from_first(lambda: classes_of(Path(found.name))))
    say(describe_start(found.origin, []))
    with tqdm(
        desc="evaluating; compiling comes first", unit=" batches", disable=host > 0 or not config.telemetry.progress
    ) as bar:
        scores = measure(
            trainer, evals, found.params, {"weights": found.name, "step": found.step},
            lambda n: (bar.set_description_str("evaluating", refresh=False), bar.update(n), watchdog.beat(-1)),
        )  # fmt: skip
    if host == 0:
        say(summary(Path(config.folder), config, evals, {k: (v, found.step) for k, v in scores.items()}, found.step))
        line = {"weights": found.name, "protocols": {name: e.protocol for name, e in evals.items()}, **scores}
        say(f"  {append_evaluation(config.folder, found.step, line)}")
        if is_run(Path(config.folder)):
            say(leave_page(Path(config.folder)))
    return 0
