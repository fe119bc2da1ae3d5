"""The notebooks run from the first cell to the last, and what is kept of them is a whole run without errors."""

from __future__ import annotations

import re

import nbformat
import pytest
from nbclient import NotebookClient
from runs import ROOT, environment

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SHORT = ["--config.train.steps=2", "--config.optim.warmup_steps=1", "--config.evals=()"]
SHALLOW = ["--config.model.image.depths=(1, 1, 1, 1)", "--config.train.batch_size=16"]


def outputs(notebook: nbformat.NotebookNode) -> list[dict]:
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def pictures(notebook: nbformat.NotebookNode) -> int:
    return sum("image/png" in output.get("data", {}) for output in outputs(notebook))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path, tmp_path, monkeypatch):
    """With models that have hardly been trained."""
    for name, value in environment(1).items():
        monkeypatch.setenv(name, value)
    kept, notebook = nbformat.read(path, 4), nbformat.read(path, 4)
    [parameters] = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())]
    assert "\nMORE = []" in parameters.source
    parameters.source += f"\nMORE = {SHORT}"
    for cell in notebook.cells:  # SwinV2s of few blocks, which are compiled in a third of the time
        cell.source = re.sub(r"((?:AURORA|, RUN), )MORE\)", rf"\1MORE + {SHALLOW})", cell.source)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert pictures(notebook) == pictures(kept) > 3
    printed = [cell.execution_count for cell in kept.cells if cell.cell_type == "code"]
    assert printed == list(range(1, len(printed) + 1))  # run once, in order


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_is_kept_of_a_notebook_is_for_others(path):
    kept = nbformat.read(path, 4)
    assert not [output for output in outputs(kept) if output.output_type == "error" or output.get("name") == "stderr"]
    text = "".join(output.get("text", "") for output in outputs(kept))
    assert text
    assert "/tmp" not in text
    assert path.stat().st_size < 500_000


def test_there_are_notebooks():
    assert [path.stem for path in NOTEBOOKS] == ["look_inside", "zero_shot"]
