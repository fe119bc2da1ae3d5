"""Lines that a run prints for people."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from visionfm_jax.config import Config, load
from visionfm_jax.data.chain import Chain
from visionfm_jax.data.sources import Source
from visionfm_jax.evals.eval import Eval
from visionfm_jax.telemetry.pictures import KINDS, draw
from visionfm_jax.telemetry.report import learning_curves
from visionfm_jax.telemetry.writers import keep_details, write_details
from visionfm_jax.train.spikes import used_record
from visionfm_jax.train.step import Trainer


def say(text: str) -> None:
    """Print on the first process."""
    if jax.process_index() == 0 and text:
        print(text, flush=True)


def describe(trainer: Trainer) -> str:
    """What is about to run, for people."""
    config, mesh = trainer.config, trainer.mesh
    count = sum(p.size for p in jax.tree.leaves(trainer.shapes.params))
    kind = jax.devices()[0].device_kind
    return "\n".join(
        [
            f"{config.name}: {count:,} parameters on {mesh.size} x {kind}, mesh {dict(mesh.shape)}, "
            f"ZeRO stage {config.parallel.stage}, {config.train.precision}",
            load.describe(config),
            f"  images           {Chain(config.data.transforms, config.model.image_size)}",
            f"  run folder       {config.folder}",
        ]
    )


def describe_start(origin: str, changed: list[str]) -> str:
    """Where it begins, for people; `changed` are the settings that differ from the run's last start."""
    return "\n".join([f"  starts from      {origin}", *(f"  changed          {change}" for change in changed)])


def describe_rows(sources: Sequence[Source], first: int, batch: dict[str, np.ndarray], rows: np.ndarray) -> str:
    """Which samples the rows of a global batch, whose row 0 is sample `first`, are; with the keys of this host's."""
    local, offset = len(batch["record"]), len(batch["record"]) * jax.process_index()
    names = []
    for row in rows[:8].tolist():
        at = row - offset
        key = ""
        if 0 <= at < local:
            source, record = used_record(sources, batch, at)
            key = f" = {source.name} {source.key(record)}"
        names.append(f"{first + row}{key}")
    more = f" and {len(rows) - 8} more" if len(rows) > 8 else ""
    return ("samples " if len(rows) > 1 else "sample ") + ", ".join(names) + more


def summary(
    folder: Path,
    config: Config,
    evals: dict[str, Eval],
    scores: dict[str, tuple[float, int]],
    step: int,
    metrics: list[dict[str, Any]] | None = None,
) -> str:
    """Draw the pictures and keep the details; the scores of the evals and where everything lies, for people.

    Args:
      folder: the run folder.
      config: of the run.
      evals: by name.
      scores: values by name, and the steps after which they were measured.
      step: that the run has reached; scores of others are printed with theirs.
      metrics: of the run, to draw curves of; None: none are drawn.
    """
    files, kept, failed = [], [], ""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if metrics is not None:
            files.append(folder / "learning_curves.png")
            shares = [f"{e.name}/{metric}" for e in config.evals for metric in e.metrics]
            learning_curves(metrics, files[-1], shares=shares)
        for name, eval_ in evals.items():
            if eval_.details and (former := keep_details(folder, name, eval_.protocol, KINDS)):
                kept.append(f"  results of another protocol are kept: {former}")
            files += draw(eval_.pictured, folder, name, f"{config.name}: {name}")
            if eval_.details:
                files.append(write_details(folder, name, eval_.details))
    except OSError as error:  # the run itself is complete and saved
        failed = f"  cannot write {error.filename or folder}: {error.strerror}; free space there, run again"
    loss = {"training loss": scores["loss"]} if metrics is not None and "loss" in scores else {}
    scores = {k: v for k, v in scores.items() if k.partition("/")[0] in evals}
    width = max([20, *map(len, scores)])
    lines = [
        f"  {k:{width}} {v:.4f}" + (f"  after step {at}" if at != step else "")
        for k, (v, at) in (loss | scores).items()
    ]
    lines += [f"  {name} is measured by protocol {e.protocol}" for name, e in evals.items() if e.protocol]
    lines += kept
    return "\n".join([*lines, failed] if failed else [*lines, *(f"  {file}" for file in files)])
