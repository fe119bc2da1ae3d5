"""A run whose images are in a store that fails now and then."""

from pathlib import Path

import numpy as np
from object_store import object_store, upload
from PIL import Image
from runs import SMALL, compiled_once, losses, start


def images(folder: Path) -> Path:
    """Three images of each of nine classes."""
    rng = np.random.default_rng(0)
    for i in range(27):
        path = folder / f"train/class{i % 9}/{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(path)
    return folder


def test_its_losses_equal_those_of_the_local_run(tmp_path, monkeypatch, tmp_path_factory):
    base = [*SMALL, "--config.train.steps=5", "--config.checkpoint.every_steps=5"]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with object_store(monkeypatch) as proxy, compiled_once(tmp_path_factory):
        proxy.fault = lambda number, path: ("5xx", "cut")[number % 2] if number in (3, 10, 17) else ""
        folder = images(tmp_path / "images")
        for name, path in {"local": str(folder), "remote": upload(folder, "images")}.items():
            sources = [f"--config.data.train[{i}].{field}" for i in (0, 1) for field in ("kind=folder", f"path={path}")]
            process = start(tmp_path / name, *sources, base=base, devices=1)
            assert process.wait(120) == 0, Path(f"{tmp_path / name}.err").read_text()
    assert len(losses(tmp_path / "local")) == 5
    assert losses(tmp_path / "local") == losses(tmp_path / "remote")
    assert len(proxy.faults) == 3
    said = Path(f"{tmp_path / 'remote'}.err").read_text()
    assert said.count("cannot be read: ") == said.count("trying again in 1 s") == 3
