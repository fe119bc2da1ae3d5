"""The code of docs/extending.md: a dataset, a metric, a backbone and an objective of a user's own, in one file."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from runs import ROOT, finish, start

from visionfm_jax.config import load
from visionfm_jax.data.sources.kinds import KINDS
from visionfm_jax.errors import ConfigError
from visionfm_jax.telemetry.writers import read_metrics

PAGE = ROOT / "docs" / "extending.md"


def write_table(path: Path, count: int, seed: int) -> Path:
    """Images that are bright at their upper end, so that a rotation shows."""
    rng = np.random.default_rng(seed)
    with open(path, "w", newline="") as file:
        table = csv.DictWriter(file, ("file", "label"))
        table.writeheader()
        for i in range(count):
            pixels = rng.integers(0, 80, (28, 28, 3))
            pixels[:9] += 120
            Image.fromarray(pixels.astype(np.uint8)).save(path.with_name(f"{path.stem}-{i}.png"))
            table.writerow({"file": f"{path.stem}-{i}.png", "label": i % 3})
    return path


@pytest.fixture
def own(tmp_path) -> Iterator[Path]:
    file = tmp_path / "own.py"
    file.write_text("\n".join(re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)))
    yield file
    KINDS.pop("list", None)  # which the page adds, for this process


def test_the_configuration_of_the_page_trains(own, tmp_path):
    train, held_out = write_table(tmp_path / "train.csv", 64, 0), write_table(tmp_path / "held_out.csv", 64, 1)
    arguments = [f"--config={own}", f"--config.data.train[0].path={train}"]
    arguments += [f"--config.evals[{i}].source.path={held_out}" for i in (0, 1)]
    short = ["--config.train.steps=20", "--config.evals[0].every_steps=10", "--config.telemetry.log_every=1"]
    process = start(tmp_path / "run", *arguments, *short, base=())
    finish(process, tmp_path / "run")
    lines = read_metrics(tmp_path / "run")
    accuracy = [line["accuracy"] for line in lines if "accuracy" in line]
    assert accuracy[0] < 0.5 < 0.9 < np.mean(accuracy[-10:])
    ranks = {line["step"]: line["held_out/rank"] for line in lines if "held_out/rank" in line}
    assert list(ranks) == [10, 20]
    assert all(1 < rank < 64 for rank in ranks.values())
    [between] = [line["classes/between_classes"] for line in lines if "classes/between_classes" in line]
    assert 0 < between < 0.3  # the labels have nothing to do with the images


def test_its_fields_are_flags_with_bounds_and_rules(own):
    config, _ = load.from_arguments([f"--config={own}", "--config.model.depth=3", "--config.task.label_smoothing=0.1"])
    assert (config.model.depth, config.task.label_smoothing) == (3, 0.1)
    with pytest.raises(ConfigError, match=r"config.model.kernel = 32: must lie in \[1, 31\]"):
        load.from_arguments([f"--config={own}", "--config.model.kernel=32"])
    with pytest.raises(ConfigError, match=r"config.model.image_size = 30: is not a multiple of model.patch_size = 7"):
        load.from_arguments([f"--config={own}", "--config.model.image_size=30"])


def test_its_dataset_is_a_kind_for_the_command_line(own, tmp_path):
    table = write_table(tmp_path / "other.csv", 1, 0)
    flags = [f"--config={own}", "--config.data.train[0].kind=folder", "--config.data.train[0].kind=list"]
    config, _ = load.from_arguments([flags[0], flags[2], f"--config.data.train[0].path={table}"])
    assert config.data.train[0].kind == "list"
    source = config.data.train[0].make()
    assert (len(source), source.num_classes, source.key(0)) == (1, 1, "other-0.png")
