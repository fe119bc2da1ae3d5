"""Evaluation of what a run has reached."""

from __future__ import annotations

from pathlib import Path

import jax
from tqdm import tqdm

from visionfm_jax.config import Config
from visionfm_jax.errors import ConfigError
from visionfm_jax.evals.run import check_labels, measure, open_evals
from visionfm_jax.parallel.agreement import from_first
from visionfm_jax.parallel.mesh import make_mesh
from visionfm_jax.telemetry.console import describe, describe_start, say, summary
from visionfm_jax.telemetry.watchdog import Watchdog
from visionfm_jax.telemetry.writers import append_evaluation
from visionfm_jax.train.folder import refuse_links
from visionfm_jax.train.initialise import weights_to_evaluate
from visionfm_jax.train.provenance import classes_of
from visionfm_jax.train.step import Trainer


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
            lambda: (bar.set_description_str("evaluating", refresh=False), bar.update(), watchdog.beat(-1)),
        )  # fmt: skip
    if host == 0:
        say(summary(Path(config.folder), config, evals, {k: (v, found.step) for k, v in scores.items()}, found.step))
        line = {"weights": found.name, "protocols": {name: e.protocol for name, e in evals.items()}, **scores}
        say(f"  {append_evaluation(config.folder, found.step, line)}")
    return 0
