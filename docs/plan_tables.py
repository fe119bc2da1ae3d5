"""Regenerate the tables of docs/plan.md: compiles the full-size steps that are not cached, which takes some minutes.

python docs/plan_tables.py
python docs/plan_tables.py --save=FILE               # instead, add a line a configuration to FILE, of this jax
python docs/plan_tables.py --compare BEFORE AFTER    # instead, write the table of two such files
"""

from __future__ import annotations

import argparse
import json
import sys
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tqdm import tqdm

from visionfm_jax.config import load
from visionfm_jax.errors import UserError, entry_point
from visionfm_jax.parallel.targets import find_cluster
from visionfm_jax.planning.calibration import ELSE
from visionfm_jax.planning.compiled import GPU, compile_step, missing_packages
from visionfm_jax.planning.estimate import Estimate, estimate

PAGE = Path(__file__).with_name("plan.md")
BEGIN, END = "<!-- tables: written by docs/plan_tables.py -->\n", "<!-- end of tables -->"
COMPARED = "<!-- before and after: written by docs/plan_tables.py --compare -->\n", "<!-- end of before and after -->"
CLUSTERS = ("h100:1x8", "h100:4x8", "a100-80gb:8x8", "a100-80gb:16x8")
DENSE = ("h100:4x8",)
RUNS = {  # the words of a command, and the clusters to plan it for
    "configs/vit_huge.py": CLUSTERS,
    "configs/vit_huge.py --config.model.mlp_matmuls=fp8": DENSE,
    "configs/vit_huge.py:tiny": ("h100:1x1", "h100:1x8"),
    "configs/swinv2_g_clip.py": ("a100-80gb:16x8",),
    "configs/swinv2_g_clip_640.py": ("a100-80gb:16x8",),
    "configs/aurora_xl.py": ("a100-80gb:8x8",),
    **{f"configs/{name}.py": DENSE for name in (
        "vit_huge_coco", "swinv2_g_coco", "aurora_xl_coco", "vit_huge_ade20k", "swinv2_g_ade20k", "aurora_xl_ade20k",
    )},
    "configs/vit_huge_ade20k.py:eomt": ("h100:2x8",),
    "configs/vit_huge_coco.py:panoptic": ("h100:2x8",),
    "configs/quickstart.py": ("h100:1x1",),
}  # fmt: skip
HEAD = "| cluster | peak GiB | of it activations | step ms | waits ms | images/s | MFU | days | GPU-hours |"
COMPARED_HEAD = "| configuration | cluster | jax | peak GiB | step ms | MFU | GB but matmuls and attention |"


def planned(words: str, name: str) -> Estimate:
    """The plan of a command's words on a cluster."""
    config, _ = load.from_arguments([f"--config={words.split()[0]}", *words.split()[1:]])
    cluster = find_cluster(name)
    config.validate_devices(cluster.devices, cluster.hosts)
    return estimate(compile_step(config, cluster, GPU), cluster)


def row(words: str, name: str) -> str:
    """One line of a table."""
    e = planned(words, name)
    cells = [
        f"{e.cluster.devices} x {e.cluster.target.name}" + ("" if e.fits else ", **does not fit**"),
        f"{e.compiled.peak / 2**30:.2f}", f"{e.memory.get('activations', 0) / 2**30:.2f}", f"{e.seconds * 1e3:.1f}",
        f"{e.exposed * 1e3:.1f}", f"{e.images_per_s:,.0f}", f"{e.mfu:.1%}", f"{e.days:,.1f}", f"{e.gpu_hours:,.0f}",
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def figures(words: str, name: str) -> dict[str, Any]:
    """What is compared: of each configuration on its first cluster."""
    e = planned(words, name)
    return {
        "configuration": words, "cluster": name, "jax": version("jax"), "peak": f"{e.compiled.peak / 2**30:.1f}",
        "ms": f"{e.seconds * 1e3:.0f}", "mfu": f"{e.mfu:.1%}", "else": f"{e.traffic_by_kind[ELSE] / 1e9:.0f}",
    }  # fmt: skip


def comparison(before: str, after: str) -> list[str]:
    """Lines of the table of two files that `--save` wrote."""

    def read(path: str) -> dict[tuple[str, ...], dict[str, Any]]:
        lines = [json.loads(line) for line in Path(path).read_text().splitlines()]
        return {(line["configuration"], line["cluster"], line["jax"]): line for line in lines}

    old, new = read(before), read(after)
    lines = [COMPARED_HEAD, "|---|---|---" + "|--:" * (COMPARED_HEAD.count("|") - 4) + "|"]
    for key in sorted(old.keys() & new.keys(), key=list(new).index):
        cells = [f"{old[key][name]} → {new[key][name]}" for name in ("peak", "ms", "mfu", "else")]
        lines.append(f"| {' | '.join([f'`{key[0]}`', *key[1:], *cells])} |")
    return lines


def rewrite(begin: str, end: str, lines: list[str]) -> None:
    """Put lines between two marks of the page."""
    before, found, rest = PAGE.read_text().partition(begin)
    PAGE.write_text(before + found + "\n".join(lines) + "\n" + end + rest.partition(end)[2])


def main() -> None:
    """Compile what is not cached and rewrite the page, or do as told."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--save", metavar="FILE")
    parser.add_argument("--compare", metavar=("BEFORE", "AFTER"), nargs=2)
    arguments = parser.parse_args()
    if arguments.compare:
        rewrite(*COMPARED, comparison(*arguments.compare))
        return
    if missing := missing_packages():
        raise UserError(f"{' and '.join(missing)} for GPUs are missing: pip install 'visionfm_jax[plan]'")
    if arguments.save:
        for words, clusters in tqdm(RUNS.items()):
            with Path(arguments.save).open("a") as file:
                file.write(json.dumps(figures(words, clusters[0])) + "\n")
        return
    lines = [
        f"Compiled with jax {version('jax')}, jax-cuda13-plugin {version('jax-cuda13-plugin')}, {date.today()}.",
        "",
    ]
    with tqdm(total=sum(map(len, RUNS.values()))) as bar:
        for words, clusters in RUNS.items():
            lines += [f"`--config={words}`", "", HEAD, "|---" + "|--:" * (HEAD.count("|") - 2) + "|"]
            for name in clusters:
                lines.append(row(words, name))
                bar.update()
            lines.append("")
    rewrite(BEGIN, END, lines[:-1])


if __name__ == "__main__":
    sys.exit(entry_point(main)())
