"""Programs of StableHLO: the lines of their README run where this package cannot be imported."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from visionfm_jax.api import Model
from visionfm_jax.errors import UserError
from visionfm_jax.export import export
from visionfm_jax.parallel.mesh import make_mesh
from visionfm_jax.train.step import Trainer

CHECK = runpy.run_path(f"{Path(__file__).parents[2]}/tests/parity/check_exports.py")
CASES = {name: (task, network, more) for name, task, network, more in CHECK["cases"]()}
GATE = 3e-6
ALONE = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("visionfm_jax", "flax", "torch"):
            raise ImportError(name + " is blocked")
sys.meta_path.insert(0, Blocked())
"""


def model_of(name: str) -> Model:
    task, network, more = CASES[name]
    trainer = Trainer(CHECK["made"](task, network, more), make_mesh(1, jax.devices()[:1]))
    return Model(trainer, CHECK["random_like"](trainer.shapes.params), tuple("abcde") if task == "classes" else ())


@pytest.mark.parametrize("name", ["vit_cls", "swin", "clip"])
def test_the_lines_of_the_readme_run_without_this_package(tmp_path, name):
    model = model_of(name)
    export(model, "stablehlo", tmp_path / "out")
    code = re.search(r"```python\n(.*?)```", (tmp_path / "out/README.md").read_text(), re.DOTALL)[1]
    size = model.transform.size
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (3, size, size, 3), np.uint8)
    batch = {"image": images}
    given = {"images": images}
    if name == "clip":
        batch["text"] = given["tokens"] = random.integers(3, 39, (3, model.config.model.text.context), np.int32)
    np.savez(tmp_path / "given.npz", **given)
    code = code.replace("FOLDER", str(tmp_path / "out"))
    code = re.sub(r"^(images|tokens) = .*$", r'\1 = np.load("given.npz")["\1"][:ROWS]', code, flags=re.MULTILINE)
    keep = "np.savez('found_ROWS.npz', **out" + (", text_embedding=text)" if name == "clip" else ")")
    program = ALONE + "".join(f"{code}\n{keep}\n".replace("ROWS", str(rows)) for rows in (1, 3))
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    task = model._trainer.task
    what = {"vit_cls": "probabilities", "swin": "probabilities", "clip": "embeddings"}[name]
    expected = {**task.predict(model.params, batch, what), **task.predict(model.params, batch, "features")}
    for rows in (1, 3):
        with np.load(tmp_path / f"found_{rows}.npz") as found:
            assert set(found) == set(expected)
            for key, value in expected.items():
                ours = np.asarray(value)[:rows]
                assert found[key].shape == ours.shape
                assert np.abs(found[key] - ours).max() <= GATE * np.abs(ours).max(), (key, rows)


def test_a_model_without_features_is_refused(tmp_path, monkeypatch):
    model = model_of("vit_cls")
    monkeypatch.setattr(type(model.config.task), "predictions", frozenset({"labels"}))
    with pytest.raises(UserError, match="--to=stablehlo: ClassificationConfig makes no features of images"):
        export(model, "stablehlo", tmp_path / "out")
    assert not list(tmp_path.iterdir())
