"""Write visionfm_jax/data/text/benchmarks.json: class names and prompts of the sets that `visionfm board` knows.

    git clone https://github.com/LAION-AI/CLIP_benchmark
    python tools/benchmark_texts.py CLIP_benchmark

They are those of CLIP_benchmark, in English; ImageNet's are lists of their own in the same folder. Class names are kept
where folders or labels are only numbers.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

TEXTS = Path(__file__).parents[1] / "visionfm_jax/data/text"
SETS = (
    "caltech101", "cars", "cifar10", "cifar100", "country211", "dtd", "eurosat", "fer2013", "fgvc_aircraft", "flowers",
    "food101", "gtsrb", "mnist", "pcam", "pets", "renderedsst2", "resisc45", "stl10", "sun397", "svhn", "voc2007",
)  # fmt: skip
NUMBERED = ("country211", "fer2013", "flowers", "gtsrb", "mnist", "pcam", "svhn")


def main() -> None:
    """Read the two files of a checkout, write ours."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, help="a clone of CLIP_benchmark")
    folder = parser.parse_args().checkout / "clip_benchmark/datasets"
    names = json.loads((folder / "en_classnames.json").read_text())
    prompts = json.loads((folder / "en_zeroshot_classification_templates.json").read_text())
    out = {}
    for name in SETS:
        out[name] = {"prompts": [prompt.replace("{c}", "{}") for prompt in prompts[name]]}
        if name in NUMBERED:
            out[name]["classes"] = names[name]
    (TEXTS / "benchmarks.json").write_text(json.dumps(out, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
