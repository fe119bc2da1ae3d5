"""The figures of the README: the quick start and every `:tiny` recipe, trained once for each of several seeds.

    python benchmarks/recipes.py --folder=recipes --seeds=0,1,2

Each run is the command that a person would type, with a seed and a folder of its own, and its output in a log beside
it. A run that is complete already is not repeated, so that the program can be stopped and started again; a folder of
another configuration is refused. Recipes that continue another's weights (`vit_huge_coco`: `vit_huge`'s) need runs of
that one with the same seeds. `NAME_from_scratch` is such a recipe from random weights, without layer-wise decay, which
keeps what layers have learned. Prints a table of what the evals of the last step measured, and those at the start: mean
over the seeds, then the least and the greatest.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

from visionfm_jax.config import load
from visionfm_jax.config.schema import to_dict
from visionfm_jax.errors import UserError, entry_point
from visionfm_jax.telemetry.writers import read_metrics
from visionfm_jax.train.provenance import SETTINGS, leaf_changes

ROOT = Path(__file__).resolve().parents[1]
RECIPES = {  # name -> configuration, and the recipe whose weights it starts from
    "quickstart": ("configs/quickstart.py", ""),
    "vit_huge": ("configs/vit_huge.py:tiny", ""),
    "vit_huge_dino": ("configs/vit_huge_dino.py:tiny", ""),
    "swinv2_g_clip": ("configs/swinv2_g_clip.py:tiny", ""),
    "swinv2_g_clip_640": ("configs/swinv2_g_clip_640.py:tiny", "swinv2_g_clip"),
    "aurora_xl": ("configs/aurora_xl.py:tiny", ""),
    **{
        f"{backbone}_{data}": (f"configs/{backbone}_{data}.py:tiny", before)
        for backbone, before in (("vit_huge", "vit_huge"), ("swinv2_g", "swinv2_g_clip"), ("aurora_xl", "aurora_xl"))
        for data in ("coco", "ade20k")
    },
}
SCRATCH = "_from_scratch"  # behind the name of a recipe that starts from another's weights: without them
NO_WEIGHTS = (
    "--config.checkpoint.weights=",
    "--config.checkpoint.weights_from=",
    "--config.checkpoint.skip=()",
    "--config.optim.layer_decay=1",  # which keeps what layers have learned: random ones have nothing to keep
)
RECIPES |= {name + SCRATCH: (config, "") for name, (config, before) in RECIPES.items() if before}


def words(name: str, seed: int, folder: Path) -> list[str]:
    """The arguments of a recipe's run."""
    config, before = RECIPES[name]
    out = [f"--config={ROOT / config}", f"--config.seed={seed}", f"--config.workdir={folder / f'{name}_{seed}'}"]
    if before:
        out.append(f"--config.checkpoint.weights={folder / f'{before}_{seed}'}")
    return out + (list(NO_WEIGHTS) if name.endswith(SCRATCH) else [])


def check(name: str, seed: int, folder: Path) -> None:
    """Refuse a folder that an earlier version of the recipe was trained in."""
    settings = folder / f"{name}_{seed}" / SETTINGS
    if not settings.exists():
        return
    config = json.loads(json.dumps(to_dict(load.from_arguments(words(name, seed, folder))[0])))
    if changes := leaf_changes(json.loads(settings.read_text())["config"], config):
        raise UserError(f"{settings.parent} is of another configuration ({changes[0]}); remove it, or give --folder")


def train(name: str, seed: int, folder: Path) -> float:
    """Run one recipe to its end; seconds that it took, of a run that was complete before those of the restart."""
    _, before = RECIPES[name]
    if before:
        if not (folder / f"{before}_{seed}").is_dir():
            raise UserError(f"{name} continues {before}, of which there is no run of seed {seed}; run it first")
        check(before, seed, folder)
    check(name, seed, folder)
    began, path = time.monotonic(), folder / f"{name}_{seed}.log"
    with open(path, "a") as log:
        command = [sys.executable, "-m", "visionfm_jax.main", *words(name, seed, folder)]
        if code := subprocess.run(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT).returncode:
            raise UserError(f"{name}, seed {seed}: exit code {code}; its last lines are in {path}")
    return time.monotonic() - began


def scores(folder: Path) -> dict[str, float]:
    """NAME/METRIC of the evals of the last step, and of those before the first, if there were any."""
    rows, out = read_metrics(folder), {}
    for step, when in ((0, " at the start"), (rows[-1]["step"], "")):
        named = {k: v for row in rows if row["step"] == step for k, v in row.items() if "/" in k}
        out |= {k + when: v for k, v in named.items() if not k.startswith(("update_ratio/", "loss/"))}
    return out


def numbers(text: str) -> list[int]:
    """Those that commas separate."""
    return [int(number) for number in text.split(",")]


def main(arguments: list[str]) -> None:
    """Train what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/recipes"), help="where the runs go (%(default)s)")
    parser.add_argument(
        "--seeds",
        type=numbers,
        default="0,1,2",
        help="whole numbers, separated by commas (%(default)s)",
    )
    parser.add_argument(
        "--recipes",
        default=",".join(name for name in RECIPES if not name.endswith(SCRATCH)),
        help="separated by commas (%(default)s)",
    )
    args = parser.parse_args(arguments)
    names, seeds = args.recipes.split(","), args.seeds
    if unknown := set(names) - set(RECIPES):
        parser.error(f"--recipes: no {', '.join(sorted(unknown))}; there are {', '.join(RECIPES)}")
    folder = args.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        for seed in seeds:
            print(f"{name}, seed {seed}: {train(name, seed, folder):.0f} s", file=sys.stderr, flush=True)
    print(f"| recipe | metric | mean of seeds {','.join(map(str, seeds))} | least | greatest |\n|---|---|--:|--:|--:|")
    for name in names:
        found = [scores(folder / f"{name}_{seed}") for seed in seeds]
        for metric in found[0]:
            values = [f[metric] for f in found]
            row = f"{statistics.mean(values):.4g} | {min(values):.4g} | {max(values):.4g}"
            print(f"| {name} | {metric} | {row} |")


if __name__ == "__main__":
    sys.exit(entry_point(main)(sys.argv[1:]))
