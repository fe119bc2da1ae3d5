"""One step of a run again."""

from __future__ import annotations

import itertools
from pathlib import Path

import jax
from tqdm import tqdm

from visionfm_jax.cli.data import open_data, open_loader
from visionfm_jax.config import Config
from visionfm_jax.errors import ConfigError
from visionfm_jax.parallel.agreement import require_same
from visionfm_jax.parallel.mesh import make_mesh
from visionfm_jax.storage import read
from visionfm_jax.telemetry.console import describe, describe_start, say
from visionfm_jax.telemetry.replay import write as write_replay
from visionfm_jax.telemetry.watchdog import Watchdog
from visionfm_jax.train.checkpoint import SUBFOLDER, Checkpoints
from visionfm_jax.train.folder import refuse_links, refuse_other_weights
from visionfm_jax.train.initialise import starting_state
from visionfm_jax.train.provenance import changes, provenance_of, read_provenance, settings_files, with_settings
from visionfm_jax.train.replay import PASSES, run_again
from visionfm_jax.train.step import Trainer, check_card


def replay(config: Config, step: int, watchdog: Watchdog) -> int:
    """Run `step` of the run in `config.folder` again, from the checkpoint before it; changes nothing but RUN/replay.

    What the step follows from is taken from the run folder, whatever the command says.
    """
    host, hosts = jax.process_index(), jax.process_count()
    folder = Path(config.folder)
    if not read((folder / SUBFOLDER).is_dir, lambda: "config.workdir"):
        raise ConfigError(f"config.workdir = {config.folder!r}: contains no run; name the folder of the run")
    refuse_links(folder)
    settings = settings_files(folder, 0, max(step, 0))[-1]
    config, taken = with_settings(config, folder, settings)
    require_same(taken, "workdir")
    if not 0 <= step < config.total_steps:
        raise ConfigError(f"--step={step}: the run has the steps 0 to {config.total_steps - 1}; name one of them")
    config.validate_devices(jax.device_count(), hosts)
    trainer = Trainer(config, make_mesh(config.parallel.replicas))
    check_card(config, trainer.mesh)
    with watchdog.suspended():
        sources, fields = open_data(config, trainer.task)
    say(describe(trainer))
    with Checkpoints(folder, config.checkpoint, read_only=True, until=step) as stored:
        state, _, origin, weights = starting_state(trainer, stored)
    refuse_other_weights(folder, weights)
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
        open_loader(trainer, sources, fields, start) as batches,
        tqdm(total=step - start + PASSES, unit=" passes", disable=host > 0 or not config.telemetry.progress) as bar,
    ):
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
