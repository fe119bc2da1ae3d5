"""The commands and lines of Python by which the documents use a trained model do what they say."""

from __future__ import annotations

import re
import shlex
import shutil
import tarfile
from pathlib import Path

import pytest
from documents import OURS, RUNS, commands, python_of, run_python
from PIL import Image
from runs import finish, start

from visionfm_jax.__main__ import main
from visionfm_jax.data.images import decode
from visionfm_jax.data.sources import open_source
from visionfm_jax.data.sources.kinds import BundledConfig

pytestmark = pytest.mark.usefixtures("quick_compiles")
PAGES = ("docs/use.md", "docs/board.md", "docs/export.md", "docs/tour.md", "docs/fine_tune.md")
SHORT = ["--config.train.steps=2", "--config.optim.warmup_steps=1", "--config.telemetry.progress=false"]
BARE = ["--config.evals=()", "--config.checkpoint.weights=", "--config.checkpoint.skip=()"]
MEASURED = ("quickstart", "vit_huge", "swinv2_g_clip_tiny", "clip")  # whose own evals are run
SAME = {"vit_huge_tiny": "vit_huge", "vit_huge_longer": "vit_huge", "swinv2_g_clip": "swinv2_g_clip_tiny"}
CLIP = """  # of ViTs, which OpenCLIP has, too
from visionfm_jax.config.load import load_file
from visionfm_jax.models.backbones.vit import ViTConfig


def get_config(variant=""):
    config = load_file("swinv2_g_clip:tiny")
    config.model.image = ViTConfig(
        width=32, depth=2, heads=2, mlp=64, patch_size=16, image_size=64,
        pool="cls", patch_bias=False, norm_eps=1e-5, pre_norm=True,
    )
    config.evals = config.evals[1:]
    return config
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A working folder with the runs and the data that the commands name."""
    base = tmp_path_factory.mktemp("use")
    source = open_source(BundledConfig(path="twemoji", split="test"))
    pictures = [Image.fromarray(decode(source[i]["image"])) for i in range(40)]
    (base / "photos").mkdir()
    for i in range(6):
        pictures[i].save(base / f"photos/{i}.png")
    for name in ("cat.jpg", "dog.png"):
        pictures[7].convert("RGB").save(base / name)
    (base / "clip.py").write_text(CLIP)
    (base / "captions.txt").write_text("a cat\na dog\n")
    (base / "birds.txt").write_text("robin\nwren\n")
    (base / "data/laion").mkdir(parents=True)
    with tarfile.open(base / "data/laion/00000.tar", "w") as tar:
        tar.add(base / "photos/0.png", "0.png")
    for folder in ("birds", "pets", "wds_pets", "benchmarks/cifar10", "benchmarks/imagenet1k"):
        for i, picture in enumerate(pictures):
            path = base / f"data/{folder}/{'test' if i % 4 else 'train'}/{'robin' if i % 2 else 'wren'}/{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            picture.save(path)
    return base


def train(base: Path, name: str) -> None:
    """Two steps, of the tiny configuration whose run the documents call `name`."""
    folder = base / "runs" / name
    if name in SAME:
        train(base, SAME[name])
        folder.exists() or shutil.copytree(base / "runs" / SAME[name], folder)
    elif not folder.exists():
        folder.parent.mkdir(exist_ok=True)
        more = [] if name in MEASURED else BARE
        config = base / "clip.py" if name == "clip" else RUNS[name]
        finish(start(folder, *SHORT, *more, base=[f"--config={config}"], devices=1), folder)


def line_of(base: Path, words: str) -> list[str]:
    """A command's words, with data where it is here."""
    return [
        re.sub(r"^((?:--[\w.\[\]]+=)?(?:\w+:)?)/data/", rf"\1{base}/data/", word)
        for word in shlex.split(words, comments=True)
    ]


@pytest.mark.parametrize("page", PAGES)
def test_the_commands_of_a_page(page, place, monkeypatch):
    monkeypatch.chdir(place)
    # `.ci/run` exports to ONNX, in the environment that this needs.
    lines = [line for where, line in commands() if where == page and OURS.match(line) and "--to=onnx" not in line]
    lines = [line for line in lines if not line.endswith("train --config=swinv2_g_clip:tiny")]  # which `train` shortens
    assert len(lines) > 1
    for number, line in enumerate(lines):
        program, *words = line_of(place, line)
        assert program == "visionfm"
        for name in re.findall(r"runs/(\w+)", line):
            train(place, name)
        shutil.rmtree("exported", ignore_errors=True)
        if " clip " in line and not Path("clip").exists():  # stands for a folder of the hub
            train(place, "clip")
            assert main(["export", "runs/clip", "--to=open_clip", "--out=clip"]) == 0
        if words[0] == "train":
            folder, words = place / f"trained_{number}", [w.replace("=runs/", f"={place}/runs/") for w in words[1:]]
            finish(start(folder, *words, *SHORT, base=[], devices=1), folder)
            continue
        assert main(words) == 0, line
        for file in re.findall(r"--(?:out|picture)=(\S+)", line):
            assert Path(file).exists(), line


def test_the_python_of_docs_use(place, monkeypatch):
    monkeypatch.chdir(place)
    for name in ("quickstart", "swinv2_g_clip_tiny", "aurora_xl_tiny", "vit_huge_coco_tiny", "vit_huge_ade20k_tiny"):
        train(place, name)
    names: dict = {}
    assert sum(run_python(block, names) for block in python_of("docs/use.md")) > 6
