"""Export tiny ViTs and CLIPs of them with random weights to ONNX, run the lines of their model cards, and compare.

    onnx/bin/python tests/parity/check_onnx.py

needs this project and jax2onnx in one environment, as docs/export.md says. The networks are those of check_exports.py.
Outputs of 1 and 3 rows are compared with the model's, in fp32: a difference of more than 3e-6 of the largest value is a
failure. Prints a line for each network.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
from pathlib import Path

if __name__ == "__main__":  # before jax, which takes seconds to import, where it is installed
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np
from check_exports import cases, made, random_like

from visionfm_jax.api import Model
from visionfm_jax.errors import UserError
from visionfm_jax.export import export
from visionfm_jax.models.backbones.vit import ViTConfig
from visionfm_jax.parallel.mesh import make_mesh
from visionfm_jax.train.step import Trainer

GATE = 3e-6
REFUSED = ["vit_evaluated_larger"]  # jax2onnx has no resizing with antialiasing, here of the position table


def largest_difference(model: Model, folder: Path) -> float:
    """Of the outputs of what the model card runs, relative to the largest value of each."""
    export(model, "onnx", folder)
    code = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)[1]
    code = re.sub(r"^(images|tokens) = .*$", r"\1 = given_\1", code.replace("FOLDER", str(folder)), flags=re.MULTILINE)
    random, size, worst = np.random.default_rng(0), model.transform.size, 0.0
    shape = size if isinstance(size, tuple) else (size, size)
    images = random.integers(0, 256, (3, *shape, 3), np.uint8)
    two_towers = hasattr(model.config.model, "text")
    tokens = random.integers(3, 39, (3, model.config.model.text.context), np.int32) if two_towers else images
    batch = {"image": images} | ({"text": tokens} if two_towers else {})
    predictions = model.config.task.predictions
    what = ["features", *(one for one in ("embeddings",) if one in predictions)]
    what += ["probabilities"] if "labels" in predictions else []
    expected = {k: v for one in what for k, v in model.trainer.task.predict(model.params, batch, one).items()}
    for rows in (1, 3):
        names = {"given_images": images[:rows], "given_tokens": tokens[:rows]}
        exec(code, names)
        found = names["out"] | ({"text_embedding": names["text"]} if two_towers else {})
        assert set(found) <= set(expected), (set(found), set(expected))
        for name, value in found.items():
            ours = np.asarray(expected[name])[:rows]
            assert value.shape == ours.shape, (name, value.shape)
            worst = max(worst, float(np.abs(value - ours).max() / np.abs(ours).max()))
    return worst


def main() -> int:
    """Compare all; 1: a difference is too large."""
    found, refused = {}, []
    for name, task, network, more in cases():
        if isinstance(network, ViTConfig):
            trainer = Trainer(made(task, network, more), make_mesh(1, jax.devices()[:1]))
            model = Model(trainer, random_like(trainer.shapes.params), tuple("abcde") if task == "classes" else ())
            try:
                with tempfile.TemporaryDirectory() as folder:
                    found[name] = largest_difference(model, Path(folder) / "out")
            except UserError as error:
                refused.append(name)
                print(f"{name:24} {error}")
                continue
            print(f"{name:24} {found[name]:.1e}{'  too large' * (found[name] > GATE)}", flush=True)
    print(f"{len(found)} networks, largest difference {max(found.values()):.1e} (gate {GATE:.0e})")
    return int(max(found.values()) > GATE or refused != REFUSED)


if __name__ == "__main__":
    sys.exit(main())
