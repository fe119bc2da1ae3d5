"""Train: `python -m visionfm_jax.main --config=configs/NAME.py[:VARIANT] [--config.FIELD=VALUE …]`.

With --mode=evaluate: run the configuration's evals on what the run has reached, or on `config.checkpoint.weights`.
With --mode=replay --step=N: run that step of the run again, with statistics of every layer, into RUN/replay.

Exit codes: 0 the run is complete · 2 the configuration or the data is wrong · 4 training went wrong · 71 a process is
stuck or gone, or storage failed for too long · 74 a checkpoint or the run folder cannot be written or read · 75 stopped
by SIGTERM with the state saved, if there is one: start the same command again · 130 likewise by Ctrl-C.
"""

from __future__ import annotations

import faulthandler
import itertools
import logging as standard_logging
import os
import sys
import warnings
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags, logging
from tqdm import tqdm

from visionfm_jax.config import Config, EvalConfig, load
from visionfm_jax.config.arguments import Parser
from visionfm_jax.data.fields import Fields
from visionfm_jax.data.loader import DamageLog, check_split, train_loader
from visionfm_jax.data.sources import Source, open_sources
from visionfm_jax.errors import ConfigError, DataError, door
from visionfm_jax.evals.contrastive import plain
from visionfm_jax.evals.registry import Eval, check_best_metric, make_evals
from visionfm_jax.parallel import cluster
from visionfm_jax.parallel.agreement import require_same
from visionfm_jax.parallel.mesh import make_mesh, of_all_hosts, to_global
from visionfm_jax.telemetry.monitor import RunMonitor
from visionfm_jax.telemetry.pictures import draw
from visionfm_jax.telemetry.replay import write as write_replay
from visionfm_jax.telemetry.report import learning_curves
from visionfm_jax.telemetry.watchdog import Watchdog
from visionfm_jax.telemetry.writers import append_evaluation, read_metrics, write_details
from visionfm_jax.train.checkpoint import SUBFOLDER, Checkpoints
from visionfm_jax.train.folder import RunFolder, refuse_links
from visionfm_jax.train.initialise import origin_of, run_to_evaluate, starting_state
from visionfm_jax.train.loop import Hooks, train
from visionfm_jax.train.provenance import changes, provenance_of, read_provenance, settings_files, with_settings
from visionfm_jax.train.replay import PASSES, run_again
from visionfm_jax.train.spikes import SpikeFolder, used_record
from visionfm_jax.train.step import Trainer
from visionfm_jax.train.timing import SaveTimer, StopSignal


def run(config: Config, stop: StopSignal, watchdog: Watchdog) -> int:
    """Train as `config` says, to the end or to a signal; returns the exit code."""
    host, hosts = jax.process_index(), jax.process_count()
    config.validate_devices(jax.device_count(), hosts)
    check_best_metric(config)
    trainer = Trainer(config, make_mesh(config.parallel.replicas))  # cheap: compiled on first use
    with watchdog.suspended():
        sources = open_sources(config.data.train, "data.train")
        fields = config.task.fields(config)
        check_sources(config, sources, fields)
        evals = open_evals(config, host, hosts)

    with (
        RunFolder(config, owner=host == 0) as folder,
        Checkpoints(folder.path, config.checkpoint) as checkpoints,
    ):
        begun_in = folder.path if checkpoints.latest() is not None else config.checkpoint.resume
        say(describe(trainer))  # before the first compilation, which may take minutes
        state, record, origin = starting_state(trainer, checkpoints)
        start = int(state.step)
        changed = folder.keep(provenance_of(config, sources), start, begun_in) if host == 0 else []
        say(describe_start(origin, changed))
        damage = DamageLog(
            sources, config.data.max_damaged,
            batch_size=config.train.batch_size, start_step=start, host=host, hosts=hosts,
            counts=record.get("samples", ()),
        )  # fmt: skip
        with (
            RunMonitor(config, folder.path, start, watchdog) as monitor,
            train_loader(
                config.data, image_size=config.model.image_size, batch_size=config.train.batch_size, seed=config.seed,
                start_step=start, host=host, hosts=hosts, sources=sources, fields=fields, split=config.task.split,
            ) as batches,
        ):  # fmt: skip
            hooks = Hooks(
                monitor=monitor,
                eval_due=lambda step: bool(due_evals(config, step)),
                evaluate=lambda step, state: measure(
                    trainer,
                    {e.name: evals[e.name] for e in due_evals(config, step)},
                    state.params if state.ema is None else state.ema,  # the averaged weights if kept
                    {"weights": str(folder.path), "step": step},
                    lambda: monitor.step_done(step),  # a long evaluation is no standstill
                    stop,
                ),
                protocols=lambda step: {e.name: evals[e.name].protocol or "" for e in due_evals(config, step)},
                stop_requested=stop,
                save_due=SaveTimer(config),
                describe=lambda step, batch, rows: describe_rows(sources, step * config.train.batch_size, batch, rows),
                batch_seen=damage.see,
                counts=lambda: {"samples": of_all_hosts(damage.counts)},
                keep=SpikeFolder(folder.path, sources, host, hosts).keep,
            )
            state, finished = train(trainer, state, batches, checkpoints, hooks, record)
        if damage.damaged:
            say(
                f"  {damage.damaged} samples of the run were of damaged records, {damage.records} different ones since "
                "this start; the next ones took their places"
            )
        if damage.truncated:
            say(f"  {damage.truncated} of {damage.captions} captions were too long and cut")
        if host == 0 and (metrics := read_metrics(folder.path)):
            last = {k: (v, line["step"]) for line in metrics for k, v in line.items()}
            say(summary(folder.path, config, evals, last, int(state.step), metrics))
    return 0 if finished else stop.exit_code


def check_sources(config: Config, sources: Sequence[Source], fields: Fields) -> None:
    """Refuse data that lacks what the task learns from, or is not of the size the schedule counts on.

    Raises:
      DataError: with what to set instead.
      StorageError: another process sees other data.
    """
    for source in sources:
        fields.check(source)
    check_split(sources, config.task.split)
    require_same([[len(source), list(source.class_names or ())] for source in sources], "data.train")
    records = sum(map(len, sources))
    if len(sources) == 1 and config.train.epochs and records != config.data.num_examples:
        raise DataError(
            f"{sources[0].name} has {records} records; set config.data.num_examples={records}, or, to continue a run, "
            "put back the data that it began with"
        )


def open_evals(config: Config, host: int, hosts: int) -> dict[str, Eval]:
    """As `make_evals`; all processes see the same data.

    Raises:
      ConfigError, DataError: as `make_evals`.
      StorageError: they do not.
    """
    evals = make_evals(config, host, hosts)
    require_same([[e.protocol, len(e.source)] for e in evals.values()], "evals")
    return evals


def due_evals(config: Config, step: int) -> list[EvalConfig]:
    """Those to run after `step`: at the last step all."""
    last = step == config.total_steps
    return [e for e in config.evals if last or (e.every_steps and step % e.every_steps == 0)]


class _Stopped(Exception):
    """An evaluation was cut off between two batches."""


def measure(
    trainer: Trainer,
    evals: dict[str, Eval],
    weights: Any,
    origin: dict[str, Any],
    batch_done: Callable[[], object],
    stop_requested: Callable[[], bool] = lambda: False,
) -> dict[str, float] | None:
    """The metrics of `evals`, as NAME/METRIC; None if a stop was requested before the end.

    The details of each begin with `origin`, which says what the weights are, and its metrics.
    """

    def predict(batch: dict[str, np.ndarray], *what: Hashable) -> dict[str, np.ndarray]:
        if stop_requested():
            raise _Stopped
        batch_done()
        return jax.device_get(trainer.predict(weights, to_global(trainer.mesh, batch), *what))

    scores: dict[str, float] = {}
    try:
        for name, eval_ in evals.items():
            found = eval_.run(predict)
            eval_.details = {**origin, "metrics": plain(found), **eval_.details}
            scores |= {f"{name}/{k}": v for k, v in found.items()}
    except _Stopped:
        return None
    return scores


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
    folder, stored = run_to_evaluate(config)
    with stored:
        found = stored.restore_weights(trainer.shapes.params, trainer.shardings.params)
    origin = origin_of(found, f"the weights of step {found.step} of {folder}")
    say(describe_start(origin, []))
    with tqdm(
        desc="evaluating; compiling comes first", unit=" batches", disable=host > 0 or not config.telemetry.progress
    ) as bar:
        scores = measure(
            trainer, evals, found.what, {"weights": folder, "step": found.step},
            lambda: (bar.set_description_str("evaluating", refresh=False), bar.update(), watchdog.beat(-1)),
        )  # fmt: skip
    if host == 0:
        say(summary(Path(config.folder), config, evals, {k: (v, found.step) for k, v in scores.items()}, found.step))
        line = {"weights": folder, "protocols": {name: e.protocol for name, e in evals.items()}, **scores}
        say(f"  {append_evaluation(config.folder, found.step, line)}")
    return 0


def replay(config: Config, step: int, watchdog: Watchdog) -> int:
    """Run `step` of the run in `config.folder` again, from the checkpoint before it; changes nothing but RUN/replay.

    What the step follows from is taken from the run folder, whatever the command says.
    """
    host, hosts = jax.process_index(), jax.process_count()
    folder = Path(config.folder)
    if not (folder / SUBFOLDER).is_dir():
        raise ConfigError(f"config.workdir = {config.folder!r}: holds no run; name the folder of the step's run")
    refuse_links(folder)
    settings = settings_files(folder, 0, max(step, 0))[-1]
    config, taken = with_settings(config, folder, settings)
    require_same(taken, "workdir")
    if not 0 <= step < config.total_steps:
        raise ConfigError(f"--step={step}: the run has the steps 0 to {config.total_steps - 1}; name one of them")
    config.validate_devices(jax.device_count(), hosts)
    trainer = Trainer(config, make_mesh(config.parallel.replicas))
    with watchdog.suspended():
        sources = open_sources(config.data.train, "data.train")
        fields = config.task.fields(config)
        check_sources(config, sources, fields)
    say(describe(trainer))
    with Checkpoints(folder, config.checkpoint, read_only=True, until=step) as stored:
        state, _, origin = starting_state(trainer, stored)
    start = int(state.step)
    if start > step:
        raise ConfigError(f"--step={step}: the run begins with {origin}; name that step or a later one")
    for other in settings_files(folder, start, step)[:-1]:
        if changed := with_settings(config, folder, other)[1]:
            raise ConfigError(
                f"--step={step}: no checkpoint between {origin} and it is left, and the settings changed on the way "
                f"({other} has {changed[0]}); name a step that {other.name} or a later checkpoint reaches"
            )
    changed = changes(read_provenance(folder, settings), provenance_of(config, sources), folder) if host == 0 else []
    say(describe_start(origin, changed))
    say("\n".join(f"  as in the run    {change}" for change in taken))
    with (
        train_loader(
            config.data, image_size=config.model.image_size, batch_size=config.train.batch_size, seed=config.seed,
            start_step=start, host=host, hosts=hosts, sources=sources, fields=fields, split=config.task.split,
        ) as batches,
        tqdm(
            total=step - start + PASSES, unit=" passes", disable=host > 0 or not config.telemetry.progress,
        ) as bar,
    ):  # fmt: skip
        done = itertools.count()

        def begins(what: str) -> None:
            bar.n = next(done)
            bar.set_description(what)
            watchdog.beat(-1)

        found = run_again(trainer, state, batches, sources, step, begins)
        bar.update()
    if host == 0:
        say(write_replay(found, folder))
    return 0


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
    files, failed = [], ""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if metrics is not None:
            files.append(folder / "learning_curves.png")
            shares = [f"{name}/{metric}" for name, eval_ in evals.items() for metric in eval_.metrics]
            learning_curves(metrics, files[-1], shares=shares)
        for name, eval_ in evals.items():
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
    return "\n".join([*lines, failed] if failed else [*lines, *(f"  {file}" for file in files)])


def say(text: str) -> None:
    """Print on the first process."""
    if jax.process_index() == 0 and text:
        print(text, flush=True)


def main(argv: Sequence[str]) -> int:
    """Read the command line, join the other processes, then work."""
    parser = Parser("main", __doc__)
    parser.add_argument(
        "--mode",
        choices=("train", "evaluate", "replay"),
        default="train",
        help="train, evaluate what was trained, or replay a step",
    )
    parser.add_argument("--step", type=int, metavar="N", help="which, with --mode=replay")
    parser.add_argument("--coordinator", metavar="HOST:PORT", help="of the first process, where no scheduler tells")
    parser.add_argument("--processes", type=int, metavar="N", help="how many there are, with --coordinator")
    parser.add_argument("--process", type=int, metavar="I", help="which of them this is, from 0, with --coordinator")
    config, arguments = parser.parse_with_config(argv)
    if arguments.mode == "replay" and arguments.step is None:
        parser.error("--mode=replay needs a step; add --step=N")
    if arguments.mode != "replay" and arguments.step is not None:
        parser.error(f"--step={arguments.step} is for --mode=replay; add that, or leave --step out")
    faulthandler.enable()  # a crash of compiled code shows where Python was
    quiet_logs()
    stop = StopSignal()
    process, processes = cluster.initialize(arguments.coordinator, arguments.processes, arguments.process)
    minutes = config.telemetry.stuck_minutes
    with Watchdog(minutes, folder=config.folder, process=process, processes=processes) as watchdog:
        work = {
            "train": lambda: run(config, stop, watchdog),
            "evaluate": lambda: evaluate(config, watchdog),
            "replay": lambda: replay(config, arguments.step, watchdog),
        }
        return cluster.run_together(work[arguments.mode])


def quiet_logs() -> None:
    """Warnings and worse only, and nothing from inside Orbax: what goes wrong there comes as an error, in our words.

    After the first array that it cannot read or write, Orbax abandons those of all other arrays, and each would
    print a page when it is collected. Nobody else here uses asyncio.
    """
    flags.FLAGS.mark_as_parsed()  # else absl complains of it at its first line
    logging.use_absl_handler()
    logging.set_verbosity(logging.WARNING)
    inside = f"{os.sep}orbax{os.sep}", f"{os.sep}asyncio{os.sep}"
    logging.get_absl_logger().addFilter(lambda record: inside[0] not in record.pathname)
    standard_logging.getLogger("asyncio").setLevel(standard_logging.CRITICAL)

    def unraisable(info: sys.UnraisableHookArgs) -> None:
        where = info.exc_traceback.tb_frame.f_code.co_filename if info.exc_traceback else ""
        if not any(part in where for part in inside):
            sys.__unraisablehook__(info)

    sys.unraisablehook = unraisable
    warnings.filterwarnings("ignore", message="coroutine .* was never awaited")


if __name__ == "__main__":
    sys.exit(door(main)(sys.argv[1:]))
