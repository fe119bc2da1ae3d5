"""The commands and lines of Python of the documents do what they say, on small data and in few steps."""

from __future__ import annotations

import csv
import json
import re
import shlex
import shutil
import tarfile
from pathlib import Path

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from documents import OURS, OWN_RUNS, PAGES, ROOT, RUNS, commands, files_of, is_run, python_of, run_python
from PIL import Image
from runs import finish, start

import visionfm_jax as vfm
from visionfm_jax.__main__ import main
from visionfm_jax.cli.data import open_data, open_loader
from visionfm_jax.config import load
from visionfm_jax.data.fields import class_names
from visionfm_jax.data.images import decode
from visionfm_jax.data.sources import open_source
from visionfm_jax.data.sources.kinds import BundledConfig
from visionfm_jax.evals.run import check_labels, open_evals
from visionfm_jax.export import export
from visionfm_jax.parallel.mesh import make_mesh
from visionfm_jax.train.step import Trainer

pytestmark = pytest.mark.usefixtures("quick_compiles")
NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]
COMMANDS: dict[str, list[str]] = {}
for _page, _line in commands():
    if OURS.match(_line) and is_run(_line):
        COMMANDS.setdefault(_page, []).append(_line)
FILES = {name: text for page in NAMES for name, text in files_of(page).items()}
PYTHON = [page for page in NAMES if set(python_of(page)) - set(files_of(page).values())]
SHORT = ["--config.train.steps=2", "--config.optim.warmup_steps=1", "--config.telemetry.progress=false"]
BARE = ["--config.evals=()", "--config.checkpoint.weights=", "--config.checkpoint.skip=()"]
MEASURED = ("quickstart", "vit_huge", "swinv2_g_clip_tiny", "clip")  # whose own evals are run
SAME = {"vit_huge_tiny": "vit_huge", "vit_huge_longer": "vit_huge", "swinv2_g_clip": "swinv2_g_clip_tiny"}
SHALLOW = {  # compiled in a third of the time
    name: ["--config.model.image.depths=(1, 1, 1, 1)", "--config.train.batch_size=16"]
    for name in ("swinv2_g_clip:tiny", "aurora_xl:tiny")
}
SMALLER = {  # commands on what takes seconds: what is replaced, and added
    "bench": (r"(--config=\w+)$", r"\1:tiny", ["--config.train.batch_size=16", "--steps=1"]),
    "tokenizer": (r"(--config=\w+)$", r"\1:tiny", ["--vocab_size=400", "--out=tokenizer.model"]),
}
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
    """A working folder with the files and the data that the pages name; /data/ is its folder disk/."""
    base = tmp_path_factory.mktemp("use")
    source = open_source(BundledConfig(path="twemoji", split="test"))
    pictures = [Image.fromarray(decode(source[i]["image"])) for i in range(40)]

    def put(number: int, path: str) -> None:
        (base / path).parent.mkdir(parents=True, exist_ok=True)
        pictures[number].convert("RGB").save(base / path)

    for i in range(6):
        put(i, f"photos/{i}.png")
    for name in ("cat.jpg", "dog.png"):
        put(7, name)
    (base / "clip.py").write_text(CLIP)
    for name, text in FILES.items():
        (base / name).write_text(text)
    (base / "captions.txt").write_text("a cat\na dog\n")
    (base / "birds.txt").write_text("robin\nwren\n")
    for name in ("laion", "laion5b"):
        with tarfile.open(ROOT / "tests/fixtures/img2dataset.tar.xz") as tar:
            tar.extractall(base / "disk" / name, [m for m in tar.getmembers() if m.name.startswith("00000")])
        table = pq.read_table(file := base / "disk" / name / "00000.parquet")
        wide = pa.array([300] * len(table), pa.int64())  # its pictures are smaller than a page asks for
        pq.write_table(table.set_column(table.schema.get_field_index("width"), "width", wide), file)
    for i in range(40):
        for folder in ("birds", "pets", "wds_pets", "benchmarks/cifar10", "benchmarks/imagenet1k"):
            put(i, f"disk/{folder}/{'test' if i % 4 else 'train'}/{'robin' if i % 2 else 'wren'}/{i}.png")
        put(i, f"all/{'cat' if i % 2 else 'dog'}/{i}.png")
        put(i, f"data/{'train' if i % 4 else 'held_out'}/{('ant', 'bee', 'cow')[i % 3]}/{i}.png")
        put(i, f"coco/train/{i}.png")
    for name, count in (("pairs.csv", 40), ("captions.csv", 80)):
        with open(base / name, "w", newline="") as file:
            table = csv.writer(file)
            table.writerow(("file", "caption"))
            folder = "" if name == "captions.csv" else "coco/train/"
            table.writerows((f"{folder}{i % 40}.png", f"picture {i}, of “{i % 7}”") for i in range(count))
    for split in ("train", "val"):
        for i in range(4):
            put(i, f"objects/{split}/{i}.png")
            put(i, f"scenes/images/{split}/{i}.jpg")
            (base / f"scenes/annotations/{split}").mkdir(parents=True, exist_ok=True)
            values = np.full((pictures[i].height, pictures[i].width), i, np.uint8)
            Image.fromarray(values).save(base / f"scenes/annotations/{split}/{i}.png")
        (base / "objects/annotations").mkdir(exist_ok=True)
        content = {
            "images": [
                {"id": i, "file_name": f"{i}.png", "width": pictures[i].width, "height": pictures[i].height}
                for i in range(4)
            ],
            "annotations": [
                {"id": i, "image_id": i, "category_id": 1 + i % 3, "bbox": [2, 3, 20, 15], "area": 300, "iscrowd": 0}
                for i in range(4)
            ],
            "categories": [{"id": i, "name": name} for i, name in ((1, "ant"), (2, "bee"), (3, "cow"))],
        }
        (base / f"objects/annotations/{split}.json").write_text(json.dumps(content))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(base)
        for name in ("split.py", "make_tars.py", "make_coco.py"):
            exec(FILES[name], {})
    return base


def train(base: Path, name: str) -> None:
    """Two steps, of the tiny configuration whose run the documents call `name`, or of a configuration of theirs."""
    folder = base / "runs" / name
    if name in SAME:
        train(base, SAME[name])
        folder.exists() or shutil.copytree(base / "runs" / SAME[name], folder)
    elif not folder.exists():
        folder.parent.mkdir(exist_ok=True)
        provide(base, FILES.get(f"{name}.py", ""))
        more = [] if name in MEASURED else ["--config.train.batch_size=8"] if name in OWN_RUNS else BARE
        config = f"{name}.py" if name in {"clip", *OWN_RUNS} else RUNS[name]
        more = [*more, *SHALLOW.get(config, ())]
        finish(start(folder, *SHORT, *more, base=[f"--config={config}"], devices=1, cwd=base), folder, seconds=500)


def provide(base: Path, text: str) -> None:
    """What stands in the working folder for the downloads that a command or a file names."""
    if re.search(r"weights/vit_tiny\b", text) and not (base / "weights/vit_tiny").exists():
        export(vfm.create("vit_tiny_patch16_224", num_classes=5), "timm", base / "weights/vit_tiny")
    if re.search(r" clip |\"clip\"", text) and not (base / "clip").exists():
        train(base, "clip")
        export(base / "runs/clip", "open_clip", base / "clip")


def words_of(base: Path, line: str) -> list[str]:
    """A command's words, without the program, with data where it is here."""
    program, *words = shlex.split(line, comments=True)
    assert program.removeprefix(".venv/bin/") == "visionfm"
    return [re.sub(r"^((?:--[\w.\[\]]+=)?(?:\w+:)?)/data/", rf"\1{base}/disk/", word) for word in words]


def is_full_size(words: list[str]) -> bool:
    """Training by a recipe as it is shipped, whose data are not here."""
    return words[0] == "train" and words[1].removeprefix("--config=") in {*load.shipped()} - {"quickstart"}


def execute(base: Path, line: str, number: int, capfd) -> None:
    """One command, as it is but for its size."""
    words = words_of(base, line)
    command = words[0]
    for name in re.findall(r"runs/(\w+)", line):
        if name in RUNS or name in OWN_RUNS:
            train(base, name)
    provide(base, line)
    if command in SMALLER:
        old, new, more = SMALLER[command]
        words = [*(re.sub(old, new, word) for word in words), *more]
    if command == "train" and len(words) == 2 and (name := run_of(words[1])):
        train(base, name)
        return
    if is_full_size(words):
        capfd.readouterr()
        assert main(words) == 2, line
        error = capfd.readouterr().err
        assert error.count("\n") == 1, error
        assert "the path does not exist" in error
        return
    if command == "train":
        folder = base / f"trained_{number}"
        more = SHORT if "evals" in line else [*SHORT, "--config.evals=()"]
        finish(start(folder, *words[1:], *more, base=[], devices=1, cwd=base), folder, seconds=500)
        return
    assert main(words) == 0, line
    for file in re.findall(r"--(?:out|picture)=(\S+)", " ".join(words)):
        assert Path(file).exists(), line


def run_of(flag: str) -> str | None:
    """The run of `--config=NAME:tiny`, or of a file that a page shows."""
    name = flag.removeprefix("--config=").removesuffix(".py").replace(":", "_")
    return name if name in {*RUNS, *OWN_RUNS} and name not in load.shipped() else None


DONE: set[str] = set()  # commands that several pages show


@pytest.mark.parametrize("page", COMMANDS)
def test_the_commands_of_a_page(page, place, monkeypatch, capfd):
    monkeypatch.chdir(place)
    for number, line in enumerate(COMMANDS[page]):
        same = " ".join(shlex.split(line, comments=True)).removeprefix(".venv/bin/")
        if same in DONE:
            continue
        DONE.add(same)
        if "--out=exported/" in line:
            shutil.rmtree("exported", ignore_errors=True)
        execute(place, line, number, capfd)


@pytest.mark.parametrize("page", PYTHON)
def test_the_python_of_a_page(page, place, monkeypatch):
    monkeypatch.chdir(place)
    names: dict = {}
    checked = 0
    for block in python_of(page):
        if block in FILES.values():
            continue
        for name in re.findall(r"load\(\"runs/(\w+)", block):
            train(place, name)
        checked += run_python(block, names)
    assert checked > (6 if page == "docs/use.md" else -1)


@pytest.mark.parametrize("name", [n for n in FILES if "def get_config" in FILES[n] and n[:-3] not in OWN_RUNS])
def test_a_configuration_of_a_page_reads_its_data_and_makes_its_step(name, place, monkeypatch):
    monkeypatch.chdir(place)
    provide(place, FILES[name])
    batch = "--config.train.batch_size=16"
    config, _ = load.from_arguments([f"--config={name}", batch, *SHORT])
    config.validate_devices(jax.device_count(), 1)
    trainer = Trainer(config, make_mesh(1))
    sources, fields = open_data(config, trainer.task)
    check_labels(config, open_evals(config, 0, 1), class_names(sources))
    with open_loader(trainer, sources, fields, 0) as batches:
        rows = next(iter(batches))
    jax.eval_shape(trainer.step, trainer.shapes, rows)
    assert f"{config.name}.py" == name


def test_captions_in_cocos_form_are_read(place):
    from visionfm_jax.data.sources.kinds import CocoCaptionsConfig

    source = open_source(CocoCaptionsConfig(path=str(place / "coco"), split="train"))
    assert (len(source), source.most_captions) == (40, 2)
