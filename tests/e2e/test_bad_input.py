"""What is wrong with a command is said in one line, before anything is compiled, with exit code 2."""

from __future__ import annotations

import numpy as np
import pytest
from runs import ROOT, SMALL, only_error, run

from visionfm_jax.cli.data import open_data
from visionfm_jax.config import load
from visionfm_jax.errors import entry_point
from visionfm_jax.tasks.task import make_task

NUMPY = ["--config.data.train[0].kind=numpy", "--config.data.train[1].kind=numpy"]


def check(arguments: list[str], devices: int) -> int:
    """What a start does before it touches a device, in its order."""
    config, _ = load.from_arguments(arguments)
    config.validate_devices(devices)
    open_data(config, make_task(config, lambda params: params))
    return 0


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (
            ["--config.data.train[0].kind=folder", "--config.data.train[0].path=/no/such"],
            ["config.data.train[0]: folder /no/such", "does not exist"],
        ),
        (["--config.data.train[0].kind=tfds", "--config.data.train[0].path={empty}"], ["{empty}", "empty"]),
        (["--config.data.train[0].kind=tfds", "--config.data.train[0].path={images}"], ["{images}", "folder"]),
        (["--config.data.train[0].kind=jpeg"], ["jpeg", "folder"]),
        (["--config.data.train[0].split=trian"], ["trian", "train"]),
        (["--config.task.num_classes=5"], ["labels up to 8", "num_classes", "9"]),
        (["--config.train.batch_size=18"], ["train.batch_size = 18", "multiple of 16", "nearest is 16"]),
        (["--config.train.batch_size=24", "--config.train.accumulate=2"], ["multiple of 32", "2 micro-batches"]),
        (["--config.model.image_size=30"], ["model.image_size = 30", "patch_size = 8", "nearest is 32"]),
        (["--config.parallel.replicas=3"], ["parallel.replicas = 3", "8 devices", "nearest is"]),
        (["--config.parallel.stage=4"], ["parallel.stage = 4", "3, 2, 1, 0"]),
        (["--config.optim.learning_rate=1"], ["optim.learning_rate", "no such field", "optim.l"]),
        (["--config.trian.steps=9"], ["trian.steps", "did you mean train.steps"]),
        (["--config.train.steps=many"], ["train.steps=many", "int"]),
        (["--config.optim.warmup_steps=60"], ["optim.warmup_steps = 60", "60 steps"]),
        (["--config.checkpoint.resume=a", "--config.checkpoint.weights=b"], ["excludes checkpoint.weights"]),
        (["--config.checkpoint.keep_best=1"], ["checkpoint.best_metric"]),
    ],
)
def test_one_line_names_the_cause_and_the_remedy(tmp_path, monkeypatch, capsys, arguments, parts):
    (tmp_path / "empty").mkdir()
    (tmp_path / "images" / "cat").mkdir(parents=True)
    (tmp_path / "images" / "cat" / "1.jpg").write_bytes(b"-")
    names = {"empty": tmp_path / "empty", "images": tmp_path / "images"}
    monkeypatch.chdir(ROOT)
    code = entry_point(check)([*SMALL, *(a.format(**names) for a in arguments)], devices=8)
    line = only_error(capsys.readouterr().err)
    assert code == 2
    for part in parts:
        assert part.format(**names) in line


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--config.data.train[0].path=digits"], ["bundled digits/train has no captions", "another source"]),
        (["--config.model.image.window=9"], ["model.image.window = 9", "8 x 8 tokens", "set it to 8"]),
        (["--config.model.text.vocab_size=30000", "--config.model.text.end_token=9"], ["49408 entries", "vocab_size"]),
        (["--config.task.tokenizer=/no/tokenizer.json"], ["/no/tokenizer.json"]),
        (["--config.data.train[0].kind=tars", "--config.data.train[0].path={tmp}"], ["{tmp}", "tar"]),
    ],
)
def test_one_line_for_runs_of_pairs(tmp_path, monkeypatch, capsys, arguments, parts):
    monkeypatch.chdir(ROOT)
    (tmp_path / "notes.txt").write_text("-")
    pairs = ["--config=configs/swinv2_g_clip.py:tiny", *(a.format(tmp=tmp_path) for a in arguments)]
    assert entry_point(check)(pairs, devices=1) == 2
    line = only_error(capsys.readouterr().err)
    for part in parts:
        assert part.format(tmp=tmp_path) in line


NO_LOSS = [f"--config.task.{name}=0" for name in ("masked_image", "contrastive", "captioning", "masked_language")]
ALL_PAIRS = [f"--config.data.train[{i}].caption_key=caption" for i in (1, 2)]


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (NO_LOSS, ["config.task = ", "all loss weights are 0", "set one"]),
        (["--config.task.pair_ratio=(3, 0)"], ["task.pair_ratio = (3, 0)", "with captions and without", "set (3, 1)"]),
        (["--config.task.mask_unit=12"], ["task.mask_unit = 12", "patch_size = 4", "image_size = 64", "set it to 4"]),
        (["--config.train.batch_size=4"], ["multiple of 8", "2 micro-batches x 4 samples", "(3, 1)", "nearest is 8"]),
        (["--config.model.text.end_token=1"], ["end_token", "(1, 1, 4)", "differ from each other", "1, 2 and 4"]),
        (["--config.model.text.mask_token=5"], ["model.text.mask_token = 5", "masks a word by 4", "set it to 4"]),
        (["--config.model.text.vocab_size=2048"], ["vocab_size = 2048", "1024 entries", "set it to 1024"]),
        (["--config.task.tokenizer=clip"], ["task.tokenizer", "no mask token", "data.tokenizer train"]),
        (["--config.task.tokenizer="], ["task.tokenizer = ''", "needed for captions"]),
        (["--config.data.train[0].caption_key="], ["no source with captions", "3 of 4 samples", "add one"]),
        (ALL_PAIRS, ["no source without captions", "1 of 4 samples", "caption_key=''"]),
    ],
)
def test_one_line_for_runs_of_pairs_and_bare_images(monkeypatch, capsys, arguments, parts):
    monkeypatch.chdir(ROOT)
    assert entry_point(check)(["--config=configs/aurora_xl.py:tiny", *arguments], devices=1) == 2
    line = only_error(capsys.readouterr().err)
    for part in parts:
        assert part in line


VIEWS = """
from visionfm_jax.config import load
from visionfm_jax.data.transforms import MultiCrop, Views

def get_config(variant=""):
    config = load.load_file("configs/vit_huge.py:tiny")
    config.data.transforms = (MultiCrop(views=(Views(name=variant, size=config.model.image_size),)),)
    return config
"""


@pytest.mark.parametrize("name", ["global", "image"])
def test_views_for_a_task_that_learns_from_images(tmp_path, monkeypatch, capsys, name):
    (tmp_path / "views.py").write_text(VIEWS)
    monkeypatch.chdir(ROOT)
    assert entry_point(check)([f"--config={tmp_path}/views.py:{name}"], devices=1) == 2
    line = only_error(capsys.readouterr().err)
    assert f"config.data.transforms = ['MultiCrop']: a sample is {name} uint8 (2, 48, 48, 3), label int32 ()" in line
    assert "and ClassificationConfig learns from image uint8 (48, 48, 3); set transforms" in line


@pytest.mark.parametrize("spec", ["configs/vit_hug.py", "configs/vit_huge.py:small", "{tmp}/broken.py"])
def test_configuration_files(tmp_path, monkeypatch, capsys, spec):
    (tmp_path / "broken.py").write_text("def get_config(variant):\n    return 1 / 0\n")
    monkeypatch.chdir(ROOT)
    spec = spec.format(tmp=tmp_path)
    assert entry_point(check)([f"--config={spec}"], devices=8) == 2
    assert spec.partition(":")[0] in only_error(capsys.readouterr().err)


def test_the_command_itself(tmp_path):
    np.savez(tmp_path / "train.npz", image=np.zeros((32, 16, 16), np.uint8), label=np.full(32, 9))
    data = [*NUMPY, f"--config.data.train[0].path={tmp_path}", f"--config.data.train[1].path={tmp_path}"]
    for arguments, part in (
        (data, "has labels up to 9, but config.task.num_classes = 9; set it to 10"),
        (["--config.train.batch_size=15"], "2 devices x 1 micro-batches"),
        (["--config.trian.steps=9"], "did you mean"),
    ):
        out, err = run(tmp_path / "run", *arguments, code=2)
        assert part in only_error(err)
        assert not out
        assert not (tmp_path / "run").exists()
