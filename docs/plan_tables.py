"""Regenerate the tables of docs/plan.md: compiles the full-size steps that are not cached, which takes some minutes.

python docs/plan_tables.py
"""

from __future__ import annotations

import argparse
import sys
from datetime import date
from importlib.metadata import version
from pathlib import Path

from tqdm import tqdm

from visionfm_jax.config import load
from visionfm_jax.errors import UserError, entry_point
from visionfm_jax.parallel.targets import find_cluster
from visionfm_jax.planning.compiled import GPU, compile_step, missing_packages
from visionfm_jax.planning.estimate import estimate

PAGE = Path(__file__).with_name("plan.md")
BEGIN, END = "<!-- tables: written by docs/plan_tables.py -->\n", "<!-- end of tables -->"
CLUSTERS = ("h100:1x8", "h100:4x8", "a100-80gb:8x8", "a100-80gb:16x8")
DENSE = ("h100:4x8", "a100-80gb:8x8")
RUNS = {  # the words of a command, and the clusters to plan it for
    "configs/vit_huge.py": CLUSTERS,
    "configs/vit_huge.py --config.model.attention=cudnn": CLUSTERS,
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


def row(words: str, name: str) -> str:
    """One line of a table."""
    config, _ = load.from_arguments([f"--config={words.split()[0]}", *words.split()[1:]])
    cluster = find_cluster(name)
    config.validate_devices(cluster.devices, cluster.hosts)
    e = estimate(compile_step(config, cluster, GPU), cluster)
    cells = [
        f"{cluster.devices} x {name.partition(':')[0]}" + ("" if e.fits else ", **does not fit**"),
        f"{e.compiled.peak / 2**30:.2f}", f"{e.memory['activations'] / 2**30:.2f}", f"{e.seconds * 1e3:.1f}",
        f"{e.exposed * 1e3:.1f}", f"{e.images_per_s:,.0f}", f"{e.mfu:.1%}", f"{e.days:,.1f}", f"{e.gpu_hours:,.0f}",
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Compile what is not cached and rewrite the page."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter).parse_args()
    if missing := missing_packages():
        raise UserError(f"{' and '.join(missing)} for GPUs are missing: pip install 'visionfm_jax[plan]'")
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
    before, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(before + BEGIN + "\n".join(lines) + END + rest.partition(END)[2])


if __name__ == "__main__":
    sys.exit(entry_point(main)())
