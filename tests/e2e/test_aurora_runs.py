"""Aurora-Vision-XL's tiny run, made smaller: continued on another number of devices, evaluated, pictured."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
from runs import copy, finish, losses, once, start, steps

import visionfm_jax
from visionfm_jax.data.images import decode
from visionfm_jax.data.sources import open_source
from visionfm_jax.telemetry.writers import read_metrics

STEPS, EVERY = 8, 2
PARTS = ("masked_image", "contrastive", "captioning", "masked_language")
SMALL = [
    "--config=configs/aurora_xl.py:tiny",
    "--config.model.image.image_size=32",
    "--config.model.image.window=4",
    "--config.model.image.depths=(1, 1, 1, 1)",
    "--config.train.batch_size=16",
    f"--config.train.steps={STEPS}",
    "--config.optim.warmup_steps=2",
    "--config.optim.lr=1e-5",  # Adam multiplies rounding by the rate; a loss shall tell of its batch
    f"--config.checkpoint.every_steps={EVERY}",
    "--config.checkpoint.keep_last=4",
    *(f"--config.evals[{i}].every_steps=0" for i in range(4)),
    *(f"--config.evals[{i}].batch_size=128" for i in range(4)),
    "--config.telemetry.log_every=1",
    "--config.telemetry.tensorboard=false",
]


def run_aurora(folder: Path, *arguments: str, devices: int = 2) -> tuple[str, str]:
    process = start(folder, *arguments, devices=devices, base=SMALL)
    return finish(process, folder, seconds=500)


@pytest.fixture(scope="session")
def aurora(shared) -> Path:
    """The folder of a run that nothing disturbed; not to be changed."""
    return once(shared / "aurora", run_aurora)


def test_continued_on_other_devices_it_sees_the_same_samples(tmp_path, aurora):
    saved = random.choice(steps(aurora)[:-1])
    folder = copy(aurora, tmp_path / "run", saved)  # what a kill leaves; test_interruption.py kills
    out, _ = run_aurora(folder, "--config.evals=()", devices=1)
    assert f"starts from      step {saved} of its own folder" in out
    expected, got = losses(aurora), losses(folder)
    assert list(got) == list(expected) == list(range(1, STEPS + 1))
    np.testing.assert_allclose(list(got.values()), list(expected.values()), rtol=2e-5)
    assert np.ptp(list(got.values())) > 1e-2  # so other samples would show


def test_every_loss_is_logged_apart_and_their_weighted_sum_is_the_loss(aurora):
    rows = [row for row in read_metrics(aurora) if "loss" in row]
    assert len(rows) == STEPS
    for row in rows:
        assert all(np.isfinite(row[part]) and row[part] > 0 for part in PARTS)
        weighted = 2 * row["masked_image"] + row["contrastive"] + 2 * row["captioning"] + row["masked_language"]
        np.testing.assert_allclose(row["loss"], weighted, rtol=1e-5)
    assert abs(rows[0]["contrastive"] - np.log(12)) < 0.7  # of 12 pairs in 16 samples, in two micro-batches
    assert abs(rows[0]["captioning"] - np.log(1024)) < 0.7


def test_all_evals_report_and_leave_pictures(aurora):
    out = Path(f"{aurora}.out").read_text()
    scores = {k: v for row in read_metrics(aurora) for k, v in row.items()}
    assert scores["unseen/candidates"] == 3949
    assert 300 < scores["words/perplexity"] < 2000  # it has learnt nothing: near the 1,024 of the vocabulary
    assert 300 < scores["words/perplexity_without_image"] < 2000
    assert 0 <= scores["captions/exact"] <= scores["captions/bleu4"] + 1
    assert scores["pixels/pixel_error"] > 0
    for name in ("retrieval_unseen.png", "captions_captions.png", "reconstructions_pixels.png"):
        assert (aurora / name).stat().st_size > 10_000
        assert name in out
    kept = json.loads((aurora / "eval_captions.json").read_text())
    assert f"captions is measured by protocol {kept['protocol']}" in out


def test_loaded_it_writes_the_captions_of_its_eval(aurora):
    model = visionfm_jax.load(aurora)
    kept = json.loads((aurora / "eval_captions.json").read_text())["captions"]
    source = open_source(next(e.source for e in model.config.evals if e.name == "captions"))
    written = model.caption([source[i]["image"] for i in range(20)])
    assert sum(a == b["generated"] for a, b in zip(written, kept, strict=False)) >= 18  # a tie may fall otherwise
    network, params = model.backbone
    images = [decode(source[i]["image"]) for i in range(2)]
    pixels = model.normalize(np.stack([model.transform(image) for image in images]))
    maps = network.apply({"params": params}, pixels).maps
    for stage, found in zip((3, 0), model.features(images, [-1, 0], pooled=False), strict=True):
        np.testing.assert_allclose(found, maps[stage], rtol=1e-3, atol=1e-4)
    hidden = model.reconstruct([source[i]["image"] for i in range(2)])
    assert hidden.shape == (2, 32, 32, 3)
    assert hidden.dtype == np.uint8
