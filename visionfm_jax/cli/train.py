"""A run of training, from a configuration to an exit code."""

from __future__ import annotations

import contextlib
from pathlib import Path

import jax

from visionfm_jax.cli.data import open_data, open_loader
from visionfm_jax.config import Config
from visionfm_jax.data.fields import class_names
from visionfm_jax.data.loader import DamageLog
from visionfm_jax.errors import count
from visionfm_jax.evals.eval import check_best_metric
from visionfm_jax.evals.run import check_labels, due_evals, measure, open_evals
from visionfm_jax.parallel.agreement import from_first
from visionfm_jax.parallel.mesh import make_mesh, of_all_hosts
from visionfm_jax.telemetry.console import describe, describe_rows, describe_start, say, summary
from visionfm_jax.telemetry.monitor import RunMonitor
from visionfm_jax.telemetry.page import leave_page
from visionfm_jax.telemetry.watchdog import Watchdog
from visionfm_jax.telemetry.writers import read_metrics
from visionfm_jax.train.checkpoint import Checkpoints
from visionfm_jax.train.folder import RunFolder, damage_file
from visionfm_jax.train.initialise import is_of_others, starting_state
from visionfm_jax.train.loop import Hooks, train
from visionfm_jax.train.provenance import provenance_of, refuse_other_classes
from visionfm_jax.train.sessions import Session
from visionfm_jax.train.spikes import SpikeFolder
from visionfm_jax.train.step import Trainer, check_card
from visionfm_jax.train.timing import SaveTimer, StopSignal


def run(config: Config, stop: StopSignal, watchdog: Watchdog) -> int:
    """Train as `config` says, to the end or to a signal; returns the exit code."""
    host, hosts = jax.process_index(), jax.process_count()
    config.validate_devices(jax.device_count(), hosts)
    check_best_metric(config)
    trainer = Trainer(config, make_mesh(config.parallel.replicas))  # cheap: compiled on first use
    check_card(config, trainer.mesh)
    with watchdog.suspended():
        sources, fields = open_data(config, trainer.task)
        evals = open_evals(config, host, hosts)
    check_labels(config, evals, class_names(sources))

    with (
        RunFolder(config, owner=host == 0) as folder,
        contextlib.ExitStack() as at_end,
        Checkpoints(folder.path, config.checkpoint) as checkpoints,
    ):
        begun_in = folder.path if checkpoints.latest() is not None else config.checkpoint.resume
        say(describe(trainer))  # before the first compilation, which may take minutes
        state, record, origin, weights = starting_state(trainer, checkpoints)
        start = int(state.step)
        if weights is not None and from_first(lambda: not is_of_others(Path(config.checkpoint.weights))):
            names, fresh = class_names(sources), weights["newly_initialised"]
            from_first(lambda: refuse_other_classes(config.checkpoint.weights, names, fresh))
        changed = folder.keep(provenance_of(config, sources), start, begun_in, weights) if host == 0 else []
        if host == 0:
            at_end.callback(lambda: say(leave_page(folder.path)))  # also of a run that fails
        say(describe_start(origin, changed))
        if start >= config.total_steps:
            say(
                f"  nothing to train the run was complete already, with {count(start, 'step')}; to train on, raise "
                "config.train.steps or epochs; for a new run, set config.workdir"
            )
        if start == 0 and checkpoints.latest() is None and due_evals(config, start):
            checkpoints.save(start, state, record)  # to be evaluated, as a saved state whose evaluation was cut off
            checkpoints.failed(wait=True)
        damage = DamageLog(
            sources, config.data.max_damaged,
            batch_size=config.train.batch_size, start_step=start, host=host, hosts=hosts,
            counts=record.get("samples", ()), keep=damage_file(folder.path, host),
        )  # fmt: skip
        with (
            Session(
                folder.path if host == 0 else None,
                start,
                devices=trainer.mesh.size,
                parameters=sum(p.size for p in jax.tree.leaves(trainer.shapes.params)),
                attention=trainer.attention,
            ) as session,
            RunMonitor(config, folder.path, start, watchdog, session) as monitor,
            open_loader(trainer, sources, fields, start) as batches,
        ):
            say(batches.choice and f"  loader           {batches.choice}")
            hooks = Hooks(
                monitor=monitor,
                eval_due=lambda step: bool(due_evals(config, step)),
                evaluate=lambda step, state: measure(
                    trainer,
                    {e.name: evals[e.name] for e in due_evals(config, step)},
                    state.averaged,
                    {"weights": str(folder.path), "step": step},
                    lambda _: monitor.step_done(step),  # a long evaluation is no standstill
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
            captions = {"captions": damage.captions, "truncated": damage.truncated} if damage.captions else {}
            session.ends(int(state.step), "finished" if finished else "stopped", **captions)
            monitor.ends(finished)
        if damage.damaged:
            say(
                f"  damaged          {count(damage.damaged, 'sample')} of the run ({count(damage.records, 'record')} "
                "since this start), replaced by the next readable ones"
            )
        if damage.truncated:
            say(f"  truncated        {damage.truncated} of {count(damage.captions, 'caption')}, which were too long")
        if host == 0 and (metrics := read_metrics(folder.path)):
            last = {k: (v, line["step"]) for line in metrics for k, v in line.items()}
            say(summary(folder.path, config, evals, last, int(state.step), metrics))
    return 0 if finished else stop.exit_code
