"""Train: `python -m visionfm_jax.main --config=configs/NAME.py[:VARIANT] [--config.FIELD=VALUE …]`.

If the run folder has a checkpoint, training continues from it.
--mode=evaluate: run the evals on the newest checkpoint of the run, or on `config.checkpoint.weights`. The folder of a
run is enough: --mode=evaluate --config=runs/NAME --eval=zero_shot --data=/data/pets; further settings of that eval are
--config.evals[0].FIELD=VALUE.
--mode=replay --step=N: run step N again and write statistics of every layer to RUN/replay.

Exit codes: 0 the run is complete · 2 the configuration or the data is wrong · 4 a loss or gradient is not finite · 71 a
process hangs or was lost, or storage failed for too long · 74 a checkpoint or the run folder cannot be written or read
· 75 stopped by SIGTERM, state saved if there was one: run the same command again · 130 the same, by Ctrl-C.
"""

from __future__ import annotations

import faulthandler
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from visionfm_jax.cli.evaluate import add_arguments, evaluate, with_eval
from visionfm_jax.cli.replay import replay
from visionfm_jax.cli.train import run
from visionfm_jax.config.arguments import Parser
from visionfm_jax.errors import ConfigError, entry_point
from visionfm_jax.logs import quiet_logs
from visionfm_jax.parallel import cluster
from visionfm_jax.telemetry.watchdog import Watchdog
from visionfm_jax.train.timing import StopSignal

ABOUT = {
    "train": "Train the model of a configuration, or continue a run from its newest checkpoint.",
    "evaluate": "Run the evals on the newest checkpoint of a run, or on `config.checkpoint.weights`.\n\n"
    "    visionfm evaluate --run=runs/swinv2_g_clip --eval=zero_shot --data=/data/pets \\\n"
    "        --split=test --classes=names.txt --prompts=pets_prompts\n\n"
    "--run=FOLDER is the same as --config=FOLDER.",
    "replay": "Run one step of a run again and write statistics of every layer to RUN/replay.",
}


def main(argv: Sequence[str], program: str = "python -m visionfm_jax.main", mode: str = "") -> int:
    """Read the command line, join the other processes, then work.

    Args:
      argv: the arguments.
      program: as it was called.
      mode: one of ABOUT; empty: --mode says.
    """
    exit_codes = __doc__[__doc__.index("Exit codes") :]
    parser = Parser(program, f"{ABOUT[mode]}\n\n{exit_codes}" if mode else __doc__)
    if not mode:
        parser.add_argument("--mode", choices=ABOUT, default="train", help="what to do (train)")
    if mode in ("", "replay"):
        which = "the step to run again" + ("" if mode else ", with --mode=replay")
        parser.add_argument("--step", type=int, metavar="N", required=bool(mode), help=which)
    parser.add_argument("--coordinator", metavar="HOST:PORT", help="address of process 0, if no scheduler provides it")
    parser.add_argument("--processes", type=int, metavar="N", help="number of processes, with --coordinator")
    parser.add_argument("--process", type=int, metavar="I", help="index of this process, from 0, with --coordinator")
    if mode in ("", "evaluate"):
        add_arguments(parser)
    if mode == "evaluate":
        for word in argv:
            if word.startswith("--run=") and not Path(word.removeprefix("--run=")).is_dir():
                raise ConfigError(f"{word}: there is no such folder; name that of a run")
        argv = [re.sub(r"^--run(?==|$)", "--config", word) for word in argv]
    config, arguments = parser.parse_with_config(argv, with_eval)
    if not mode:
        mode = arguments.mode
        if mode == "replay" and arguments.step is None:
            parser.error("--mode=replay needs a step; add --step=N")
        if mode != "replay" and arguments.step is not None:
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
        return cluster.run_together(work[mode])


if __name__ == "__main__":
    sys.exit(entry_point(main)(sys.argv[1:]))
