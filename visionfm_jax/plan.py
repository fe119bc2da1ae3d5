"""Plan a run: `python -m visionfm_jax.plan --config=FILE.py[:VARIANT] --cluster=h100:4x8 [--search] [--json=FILE]`.

Compiles the training step of a configuration for a cluster of GPUs, on a machine without GPUs, and prints its memory,
collectives and estimated time. Exit codes: 0 the step fits into memory · 2 the input is wrong · 3 it does not fit; the
nearest setting that fits is printed.
"""

from __future__ import annotations

import contextlib
import copy
import json
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from tqdm import tqdm

from visionfm_jax.config import Config, rules
from visionfm_jax.config.arguments import Parser, file_name
from visionfm_jax.errors import ConfigError, UserError, entry_point
from visionfm_jax.parallel.targets import TARGETS, Cluster, find_cluster, read_targets
from visionfm_jax.planning import report, settings
from visionfm_jax.planning.calibration import Calibration, read_calibration
from visionfm_jax.planning.compiled import CPU, GPU, compile_step, missing_packages
from visionfm_jax.planning.estimate import estimate
from visionfm_jax.storage import check_writable

DOES_NOT_FIT = 3


def main(argv: Sequence[str], program: str = "python -m visionfm_jax.plan") -> int:
    """Parse, compile, print."""
    parser = Parser(program, __doc__)
    parser.add_argument("--cluster", metavar="GPU:HOSTSxGPUS", help=f"such as h100:4x8; GPUs: {', '.join(TARGETS)}")
    parser.add_argument("--search", action="store_true", help="rank other settings with the same global batch")
    parser.add_argument(
        "--advice",
        choices=("yes", "no"),
        help="no: only the step as it is, no other settings (yes)",
    )
    parser.add_argument("--json", metavar="FILE", type=file_name, help="also write the plan to this file")
    parser.add_argument(
        "--targets", metavar="FILE.toml", type=file_name, help="more GPUs and networks; see docs/plan.md"
    )
    parser.add_argument(
        "--calibration", metavar="FILE", type=file_name, help="steps measured by bench --compare-plan; see docs/plan.md"
    )
    config, arguments = parser.parse_with_config(argv)
    if arguments.search and arguments.advice:
        raise UserError(f"--search and --advice={arguments.advice} do not go together; leave one of them out")
    targets = read_targets(arguments.targets) if arguments.targets else TARGETS
    if not arguments.cluster:
        raise UserError(f"--cluster is missing; name one, such as --cluster=h100:4x8; GPUs: {', '.join(targets)}")
    cluster = find_cluster(arguments.cluster, targets)
    config.validate_devices(cluster.devices, cluster.hosts)
    target = cluster.target
    rules.check(rules.card_problems(config, target.description, ".".join(map(str, target.capability))))
    calibration = None
    if arguments.calibration:
        fp8 = any(network.mlp_matmuls == "fp8" for network in config.model.networks().values())
        calibration = read_calibration(arguments.calibration, target, fp8=fp8)
    if arguments.json:
        check_writable(arguments.json, "--json")

    console = Console(soft_wrap=False)
    if missing := missing_packages():
        if arguments.search:
            raise UserError(f"--search needs {' and '.join(missing)} for GPUs: pip install 'visionfm_jax[plan]'")
        plan, code = plan_without_gpus(console, config, cluster, missing), 0
    else:
        others = "search" if arguments.search else "none" if arguments.advice == "no" else "advice"
        plan, code = plan_for_gpus(console, config, cluster, calibration, others)
    if arguments.json:
        try:
            Path(arguments.json).write_text(json.dumps(plan, indent=1) + "\n")
        except OSError as error:
            raise UserError(f"--json={arguments.json}: {error.strerror}; the plan that is printed is whole") from error
    return code


def plan_without_gpus(console: Console, config: Config, cluster: Cluster, missing: list[str]) -> dict[str, Any]:
    """Print and return what a compile for CPUs can tell."""
    changed = copy.deepcopy(config)
    for network in changed.model.networks().values():
        network.attention = "xla"  # the only kind that CPUs have; no figure below depends on it
    compiled = compile_step(changed, cluster, CPU)
    report.print_without_gpus(console, config, compiled, cluster, missing)
    return report.json_without_gpus(config, compiled, cluster)


def plan_for_gpus(
    console: Console, config: Config, cluster: Cluster, calibration: Calibration | None, others: str
) -> tuple[dict[str, Any], int]:
    """Print and return the plan, and the exit code; `others`: which other settings are compared, if any."""
    base = settings.setting_of(config)
    with _progress() as on_progress, settings.Planner(config, cluster, calibration, on_progress) as planner:
        on_progress(0, 1)
        now = estimate(compile_step(config, cluster, GPU), cluster, calibration)
        planner.know(base, now)
        with tqdm.external_write_mode():
            report.print_plan(console, config, now)
        plan, code = report.as_json(config, now), 0 if now.fits else DOES_NOT_FIT
        if others == "none":
            return plan, code
        if others == "search":
            title, key, found = "Settings that fit, fastest first", "search", settings.search(planner)
        elif now.fits:
            title, key, found = "What would help most", "advice", settings.advice(planner, base, now)
        else:
            nearest = settings.nearest_that_fits(planner, base)
            title, key, found = "The nearest setting that fits", "nearest", [nearest] if nearest else []
        plan[key] = [report.setting_json(setting, base, e) for setting, e in found]
        with tqdm.external_write_mode():
            if found:
                report.print_settings(console, title, base, found)
            console.print(_ending(planner, key, found), highlight=False)
            if key != "nearest" and (remark := _fp8_remark(config, cluster)):
                console.print(remark, highlight=False)
    return plan, code


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[int, int], None]]:
    """A bar to be told (settings compiled, of how many), whose seconds run on while one compiles for minutes.

    In a log it is a line for each setting.
    """
    # nrows: of a terminal that does not tell its size, tqdm would print nothing.
    with tqdm(desc="compiling", unit=" settings", leave=False, disable=not sys.stderr.isatty(), nrows=20) as bar:
        if bar.disable:
            print("compiling the step, minutes for a large model that is not cached …", file=sys.stderr, flush=True)

        def on_progress(done: int, of: int) -> None:
            if bar.disable and done > bar.n:
                print(f"compiled {done} of the {of} settings to compare so far …", file=sys.stderr, flush=True)
            bar.n, bar.total = done, of
            bar.refresh()

        def run_on() -> None:
            while not finished.wait(1):
                bar.refresh()

        finished = threading.Event()
        ticker = threading.Thread(target=run_on, daemon=True)
        ticker.start()
        try:
            yield on_progress
        finally:
            finished.set()
            ticker.join()


def _fp8_remark(config: Config, cluster: Cluster) -> str:
    """What no search tries, where the rules and the card allow it."""
    changed, target = copy.deepcopy(config), cluster.target
    flags = []
    for name, network in changed.model.networks().items():
        if network.mlp_matmuls != "fp8":
            flags.append(f"--config.{name}.mlp_matmuls=fp8")
            network.mlp_matmuls = "fp8"
    try:
        changed.validate()
        rules.check(rules.card_problems(changed, target.description, ".".join(map(str, target.capability))))
    except ConfigError:
        return ""
    return f"Not compared, as it rounds more: {' '.join(flags)} (docs/precision.md)" if flags else ""


def _ending(planner: settings.Planner, key: str, found: list) -> str:
    tried = f"{planner.compiled} settings were compared"
    if found:
        return f"({tried})"
    nothing = {
        "search": "No setting fits: take more or larger GPUs.",
        "advice": "No such change would make it faster.",
        "nearest": "No setting of this batch fits: take more or larger GPUs.",
    }
    return f"{nothing[key]} ({tried})"


if __name__ == "__main__":
    sys.exit(entry_point(main)(sys.argv[1:]))
