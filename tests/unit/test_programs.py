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
from safetensors.numpy import load_file

from visionfm_jax.api import Model
from visionfm_jax.errors import UserError
from visionfm_jax.export import export
from visionfm_jax.parallel.mesh import make_mesh
from visionfm_jax.programs import NEEDED
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
    task = model.trainer.task
    what = {"vit_cls": "probabilities", "swin": "probabilities", "clip": "embeddings"}[name]
    expected = {**task.predict(model.params, batch, what), **task.predict(model.params, batch, "features")}
    for rows in (1, 3):
        with np.load(tmp_path / f"found_{rows}.npz") as found:
            assert set(found) == set(expected)
            for key, value in expected.items():
                ours = np.asarray(value)[:rows]
                assert found[key].shape == ours.shape
                assert np.abs(found[key] - ours).max() <= GATE * np.abs(ours).max(), (key, rows)


@pytest.mark.parametrize("name", ["vit_cls", "clip"])
def test_what_was_trained_in_fp16_is_computed_in_fp32(tmp_path, name):
    """fp16 of CPUs and of GPUs are different programs."""
    model = model_of(name)
    expected = model.trainer.task.predict(model.params, {"image": np.full((2, 32, 32, 3), 90, np.uint8)}, "features")
    model.config.train.precision = "fp16"
    notes = export(model, "stablehlo", tmp_path / "out")
    assert "The run was trained in fp16; the programs compute in fp32" in notes
    program = jax.export.deserialize(bytearray((tmp_path / "out/images.stablehlo").read_bytes()))
    found = program.call(load_file(tmp_path / "out/model.safetensors"), np.full((2, 32, 32, 3), 90, np.uint8))
    ours = np.asarray(expected["features"])
    assert np.abs(found["features"] - ours).max() <= GATE * np.abs(ours).max()


def test_onnx_says_what_it_needs_and_for_what_it_is(tmp_path):
    """tests/parity/check_onnx.py runs what is written, in an environment that has jax2onnx."""
    with pytest.raises(UserError, match=r"--to=onnx: needs jax2onnx .*; pip install --no-deps jax2onnx, then pip"):
        export(model_of("vit_cls"), "onnx", tmp_path / "out")
    with pytest.raises(
        UserError, match="is for ViTs, and CLIPs of them, and this is a SwinV2Config; --to=stablehlo works"
    ):
        export(model_of("swin"), "onnx", tmp_path / "out")
    assert not list(tmp_path.iterdir())
    page = Path(__file__).parents[2] / "docs/export.md"
    assert f"    pip install --no-deps jax2onnx\n    pip install {NEEDED}\n" in page.read_text()


def test_a_model_without_features_is_refused(tmp_path, monkeypatch):
    model = model_of("vit_cls")
    monkeypatch.setattr(type(model.config.task), "predictions", frozenset({"labels"}))
    with pytest.raises(UserError, match="--to=stablehlo: quickstart: ClassificationConfig has no features of images"):
        export(model, "stablehlo", tmp_path / "out")
    assert not list(tmp_path.iterdir())
