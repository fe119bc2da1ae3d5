"""Compare features of image files with the pipeline of transformers: the same ViT-B/16, in one run. See README.md.

    peers/bin/python benchmarks/embed.py

needs torch, torchvision and transformers beside this project. Both sides read, resize and encode the same JPEG files of
500 x 375 pixels on the CPU in fp32, with the same random weights, in processes of their own that alternate. The other
side is tried at several batch sizes, and its fastest counts. The last line printed is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path

import numpy as np
from PIL import Image

BATCHES = (1, 8, 16)


def write(folder: Path, images: int) -> None:
    """The model as transformers writes it, and the files."""
    import torch
    from transformers import ViTConfig, ViTImageProcessor, ViTModel

    torch.manual_seed(0)
    ViTModel(ViTConfig()).save_pretrained(folder / "vit")
    ViTImageProcessor().save_pretrained(folder / "vit")
    (folder / "images").mkdir()
    random = np.random.default_rng(0)
    for i in range(images):
        small = Image.fromarray(random.integers(0, 256, (12, 16, 3), np.uint8))
        small.resize((500, 375), Image.Resampling.BICUBIC).save(folder / f"images/{i:04}.jpg", quality=90)


def ours(folder: Path, files: list[str]) -> tuple[dict[str, float], np.ndarray]:
    """Images a second of `Model.features`, and the last token's map."""
    import visionfm_jax

    model = visionfm_jax.load(folder / "vit")
    model.features(files[:33])  # compiles
    began = time.perf_counter()
    model.features(files)
    return {"": len(files) / (time.perf_counter() - began)}, model.features(files[:4], pooled=False).mean((1, 2))


def theirs(folder: Path, files: list[str]) -> tuple[dict[str, float], np.ndarray]:
    """Images a second of the pipeline, by batch size."""
    import torch
    from transformers import pipeline

    torch.set_num_threads(os.cpu_count() or 1)
    speeds, first = {}, np.zeros(0)
    for batch in BATCHES:
        run = pipeline("image-feature-extraction", model=str(folder / "vit"), batch_size=batch)
        with torch.inference_mode():
            first = np.array([np.asarray(out)[0, 1:].mean(0) for out in run(files[:16])])[:4]
            began = time.perf_counter()
            run(files)
        speeds[str(batch)] = len(files) / (time.perf_counter() - began)
    return speeds, first


def main() -> None:
    """Alternate, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=96, help="files (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="that alternate (%(default)s)")
    parser.add_argument("--half", choices=("ours", "theirs"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.half:
        half = {"ours": ours, "theirs": theirs}[arguments.half]
        speeds, first = half(arguments.folder, sorted(map(str, (arguments.folder / "images").iterdir())))
        print(json.dumps({"speeds": speeds, "first": first.tolist()}))
        return
    rounds = []
    with tempfile.TemporaryDirectory() as temporary:
        write(Path(temporary), arguments.images)
        for number in range(arguments.rounds):
            found = {}
            for half in ("ours", "theirs"):
                command = [sys.executable, __file__, f"--half={half}", f"--folder={temporary}"]
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode:
                    sys.exit(f"{half} failed:\n{done.stderr[-2000:]}")
                found[half] = json.loads(done.stdout.splitlines()[-1])
            a, b = (np.array(found[half]["first"]) for half in ("ours", "theirs"))
            if np.abs(a - b).max() > 0.05 * np.abs(b).max():
                sys.exit(
                    f"the features differ by {np.abs(a - b).max():.3g} of {np.abs(b).max():.3g}: not the same work"
                )
            mine, best = found["ours"]["speeds"][""], max(found["theirs"]["speeds"].values())
            rounds.append({"ours": mine, "theirs": found["theirs"]["speeds"], "ratio": mine / best})
            print(f"round {number + 1}: {mine:.2f} against {best:.2f} images/s: {mine / best:.2f}", flush=True)
    ratio = statistics.median(r["ratio"] for r in rounds)
    print(f"ours / transformers: {ratio:.2f}")
    versions = {name: version(name) for name in ("visionfm_jax", "jax", "torch", "transformers")}
    print(json.dumps({"ratio": ratio, "rounds": rounds, "versions": versions, "date": str(date.today())}))


if __name__ == "__main__":
    main()
