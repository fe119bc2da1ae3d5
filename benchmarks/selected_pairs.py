"""Whether scores tell wrong captions from right ones, and what choosing by them gives: trains small CLIPs on CPUs.

python benchmarks/selected_pairs.py --out=FOLDER            # some minutes for each of the seven runs

A crawl has a quarter of its captions at other pictures (`tools/make_crawl.py`). A CLIP that was trained on pairs that
are trusted, of another crawl, scores it; the best of its pairs are selected, as many as fit together. Then models are
trained on all pairs and on the selected ones, with the same steps and seeds, and find held-out pictures by their
captions.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from sklearn.metrics import roc_auc_score

from visionfm_jax.telemetry.writers import read_metrics

ROOT = Path(__file__).parents[1]
FOUND = ("image_to_text_r10", "text_to_image_r10")
RECIPE = [
    "--config=swinv2_g_clip:tiny",
    "--config.data.train[0].kind=tars",
    "--config.evals[0].gallery=()",
    "--config.evals[0].source.split=train",  # the default, as tars have none
    "--config.evals[0].source.kind=tars",
    "--config.evals[0].every_steps=0",
    "--config.train.precision=fp32",
]


def visionfm(*words: str) -> None:
    """Run a command; it prints to stderr, so that what is printed here are the results."""
    subprocess.run([sys.executable, "-m", "visionfm_jax", *words], cwd=ROOT, check=True, stdout=sys.stderr)


def train(folder: Path, tars: Path, heldout: Path, *, steps: int, seed: int, selection: Path | None) -> list[float]:
    """Train a model, unless it is there; how often it finds a held-out picture or caption among the first ten."""
    chosen = [f"--config.data.train[0].selection={selection}"] if selection else []
    visionfm(
        "train", *RECIPE, f"--config.data.train[0].path={tars}", *chosen, f"--config.train.steps={steps}",
        f"--config.evals[0].source.path={heldout}", f"--config.seed={seed}", f"--config.workdir={folder}",
        f"--config.checkpoint.every_steps={steps}",
    )  # fmt: skip
    last = {key: value for row in read_metrics(folder) for key, value in row.items()}
    return [last[f"unseen/{name}"] for name in FOUND]


def separation(crawl: Path, scores: Path) -> tuple[float, int, int]:
    """Area under the ROC curve of right captions against wrong ones by score, and how many there are of each."""
    truth = {
        (row["tar"], row["key"]): not row["mislabelled"] for row in pq.read_table(crawl / "truth.parquet").to_pylist()
    }
    rows = [(file.stem, row) for file in sorted(scores.glob("*.parquet")) for row in pq.read_table(file).to_pylist()]
    known = [(truth[tar, row["key"]], row["similarity"]) for tar, row in rows if row["similarity"] is not None]
    right, score = map(np.array, zip(*known, strict=True))
    return float(roc_auc_score(right, score)), int(right.sum()), int((~right).sum())


def main(argv: Sequence[str] | None = None) -> None:
    """Make the crawls, train, score, select, train again, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for crawls and runs; what is there is kept")
    parser.add_argument("--steps", type=int, default=400, help="of each run")
    parser.add_argument("--seeds", type=int, default=3, help="number of runs of each kind")
    out = (arguments := parser.parse_args(argv)).out.resolve()
    for name, wrong, seed in (("trusted", 0, 1), ("crawl", 0.25, 0)):
        if not (out / name).exists():
            words = [f"--out={out / name / 'pairs'}", f"--mislabelled={wrong}", f"--seed={seed}"]
            subprocess.run([sys.executable, "tools/make_crawl.py", *words], cwd=ROOT, check=True, stdout=sys.stderr)
    trusted, crawl, heldout = out / "trusted/pairs", out / "crawl/pairs", out / "crawl/heldout_pairs"
    scorer = out / "scorer"
    train(scorer, trusted, heldout, steps=arguments.steps, seed=100, selection=None)
    scores = out / "scores"
    visionfm("data", "score", f"--path={crawl}", f"--model={scorer}", f"--out={scores}")
    area, right, wrong = separation(crawl, scores)
    print(json.dumps({"right": right, "wrong": wrong, "area_under_curve": round(area, 4)}), flush=True)
    good = out / "good.pairs"
    visionfm("data", "select", f"--path={crawl}", f"--columns={scores}", f"--keep={right}", f"--out={good}")
    found: dict[str, list[list[float]]] = {"all": [], "selected": []}
    for seed in range(arguments.seeds):
        for name, selection in (("all", None), ("selected", good)):
            folder = out / f"{name}{seed}"
            recalls = train(folder, crawl, heldout, steps=arguments.steps, seed=seed, selection=selection)
            found[name].append(recalls)
            print(json.dumps({"pairs": name, "seed": seed, **dict(zip(FOUND, recalls, strict=True))}), flush=True)
    ratio = np.mean(found["selected"], axis=0) / np.mean(found["all"], axis=0)
    print(json.dumps({f"{name}, selected / all": round(float(r), 3) for name, r in zip(FOUND, ratio, strict=True)}))


if __name__ == "__main__":
    main()
