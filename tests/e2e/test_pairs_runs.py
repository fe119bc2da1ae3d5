"""SwinV2-G-CLIP's tiny runs, made smaller: continued, evaluated alone, continued at twice the resolution."""

import json
import tarfile
from pathlib import Path

import jax
import numpy as np
import pytest
from runs import assert_identical, copy, environment, finish, losses, once, start, state

import visionfm_jax
from visionfm_jax import predict
from visionfm_jax.data.fields import NoFields
from visionfm_jax.data.sources import open_source
from visionfm_jax.errors import UserError
from visionfm_jax.evals.eval import make_evals
from visionfm_jax.parallel.mesh import to_global
from visionfm_jax.telemetry.writers import read_metrics

STEPS, EVERY, BATCH = 120, 20, 64
CHANCE = np.log(BATCH)  # the loss of a model that knows nothing
COMMON = [
    "--config.model.image.depths=(1, 1, 1, 1)",
    f"--config.train.batch_size={BATCH}",
    "--config.optim.warmup_steps=3",
    "--config.telemetry.log_every=1",
    "--config.telemetry.tensorboard=false",
]
SMALL = [
    "--config=configs/swinv2_g_clip.py:tiny",
    "--config.data.transforms[0].scale=(0.2, 0.4)",
    f"--config.train.steps={STEPS}",
    f"--config.checkpoint.every_steps={EVERY}",
    "--config.checkpoint.keep_last=4",
    "--config.evals[0].every_steps=0",
    *COMMON,
]
LARGER = [
    "--config=configs/swinv2_g_clip_640.py:tiny",
    "--config.train.precision=fp32",
    "--config.train.steps=4",
    "--config.optim.lr=1e-6",
    "--config.evals=()",
    *COMMON,
]


def run_pairs(folder: Path, *arguments: str, base: list[str] = SMALL, log: Path | None = None) -> tuple[str, str]:
    log = log or folder
    env = {}
    if base is not LARGER:  # its many steps take longer without any optimisation
        flags = f"{environment(2)['XLA_FLAGS']} --xla_backend_optimization_level=1"
        env = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "0", "XLA_FLAGS": flags}
    return finish(start(folder, *arguments, base=base, log=log, env=env), log, seconds=550)


@pytest.fixture(scope="session")
def pairs(shared) -> Path:
    """The folder of a run that nothing disturbed; not to be changed."""
    return once(shared / "pairs", run_pairs)


def printed(folder: Path) -> str:
    return Path(f"{folder}.out").read_text()


def test_continued_is_the_same_run_with_its_loss_scale(tmp_path, pairs):
    saved = STEPS - EVERY
    folder = copy(pairs, tmp_path / "run", saved)  # what a kill leaves; test_interruption.py kills
    out, _ = run_pairs(folder, "--config.evals=()")
    assert f"starts from      step {saved} of its own folder" in out
    mine, theirs = state(folder), state(pairs)
    assert any("loss_scale" in name for name in theirs)
    assert_identical(mine, theirs)
    assert list(losses(folder)) == list(losses(pairs))
    np.testing.assert_array_equal(list(losses(folder).values()), list(losses(pairs).values()))  # NaN of skipped steps


def test_it_learns_and_reports_retrieval_and_groups(pairs):
    out = printed(pairs)
    values = list(losses(pairs).values())
    assert np.nanmean(values[-5:]) < 0.9 * CHANCE
    scores = {k: v for row in read_metrics(pairs) for k, v in row.items()}
    assert scores["unseen/candidates"] == 3949
    assert scores["unseen/image_to_text_r10"] > 4 * 10 / 3949  # four times chance
    assert 0 <= scores["groups/top1"] <= 1
    for name in ("retrieval_unseen.png", "predictions_groups.png", "confusion_groups.png"):
        assert (pairs / name).stat().st_size > 10_000
        assert name in out
    kept = json.loads((pairs / "eval_groups.json").read_text())
    assert f"groups is measured by protocol {kept['protocol']}" in out


def test_evaluated_alone_it_scores_the_same(tmp_path, pairs):
    """By what its folder has saved."""
    alone, _ = run_pairs(pairs, "--mode=evaluate", base=[f"--config={pairs}"], log=tmp_path / "alone")
    assert f"the weights of step {STEPS} of {pairs}" in alone

    def scores(text: str) -> list[str]:
        return [line for line in text.splitlines() if line.strip().startswith(("unseen", "groups"))]

    assert len(scores(alone)) > 10
    assert scores(alone) == scores(printed(pairs))

    (kept,) = map(json.loads, (pairs / "evaluations.jsonl").read_text().splitlines())
    trained = {k: v for row in read_metrics(pairs) for k, v in row.items() if k.startswith(("unseen/", "groups/"))}
    assert {k: v for k, v in kept.items() if k in trained} == trained
    assert (kept["step"], kept["weights"]) == (STEPS, str(pairs))
    details = json.loads((pairs / "eval_groups.json").read_text())
    assert (details["step"], details["weights"]) == (STEPS, str(pairs))
    assert details["protocol"] == kept["protocols"]["groups"]
    assert details["metrics"]["majority"] == kept["groups/majority"]
    page = (pairs / "report.html").read_text()
    assert "Results of visionfm evaluate" in page
    assert "captions cut to the length of the text tower" in page


def test_loaded_it_says_what_its_evals_say(tmp_path, pairs, capsys, caplog):
    """`visionfm_jax.load` and the commands, in this process, whose devices are others."""
    model = visionfm_jax.load(pairs)
    assert not caplog.records
    source = open_source(model.config.evals[1].source)
    labels = np.array([source[i]["label"] for i in range(len(source))])
    found = model.classify([source[i]["image"] for i in range(len(source))], source.class_names, "{}")
    top1 = (found.probability.argmax(1) == labels).mean()
    scores = {k: v for row in read_metrics(pairs) for k, v in row.items()}
    assert top1 == pytest.approx(scores["groups/top1"], abs=1.1 / len(labels))

    measured = make_evals(model.config, 0, 1)["groups"]  # as training and `evaluate` read and embed its images
    trainer, batch = model.trainer, next(iter(measured.batches(measured.source, NoFields())))
    evaluated = jax.device_get(trainer.predict(model.params, to_global(trainer.mesh, batch), "embeddings"))

    texts = ["grinning face", "cat face", "red heart"]
    images, rows = model.embed_images([source[i]["image"] for i in range(40)]), model.embed_texts(texts)
    np.testing.assert_allclose(np.linalg.norm(images, axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(images, evaluated["image_embedding"][:40], atol=2e-3)  # other batches, in float16
    ranked = model.search([source[i]["image"] for i in range(40)], texts, count=3)
    np.testing.assert_array_equal(ranked.index[:, 0], (rows @ images.T).argmax(1))
    np.testing.assert_allclose(ranked.score[:, 0], (rows @ images.T).max(1), rtol=1e-5)

    for i in range(40):
        (tmp_path / f"{i:02}.png").write_bytes(source[i]["image"])
    index, sheet = str(tmp_path / "a/index.npz"), tmp_path / "found.png"
    predict.main([str(pairs), str(tmp_path), f"--out={index}"], mode="embed")
    with np.load(index) as kept:
        np.testing.assert_allclose(kept["embedding"], images, atol=2e-3)
        assert kept["name"].tolist() == [str(tmp_path / f"{i:02}.png") for i in range(40)]
    check_datasets(tmp_path, pairs, images, capsys)
    capsys.readouterr()
    predict.main([str(pairs), f"--index={index}", "--text=cat face", f"--picture={sheet}"], mode="search")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["1", f"{ranked.score[1, 0]:.3f}", str(tmp_path / f"{ranked.index[1, 0]:02}.png")]
    assert sheet.stat().st_size > 5000
    predict.main([str(pairs), str(tmp_path / "0*.png"), f"--image={tmp_path / '03.png'}", "--count=1"], mode="search")
    assert capsys.readouterr().out.split() == ["1", "1.000", str(tmp_path / "03.png")]
    predict.main([str(pairs), str(tmp_path / "07.png"), "--names=face, flag", "--count=2"], mode="classify")
    assert " %, " in capsys.readouterr().out
    for words, mode, message in (
        ([str(tmp_path / "none")], "embed", "--out=: name a file .npz or .parquet, or a folder"),
        ([str(tmp_path / "none"), "--out=a.npz"], "embed", "there is no such file or folder"),
        (["coco:/none", "--out=a.npz"], "embed", r"coco /none \[train2017\]: the path does not exist"),
        (["scenes:noto", "--split=other", "--out=a.npz"], "embed", "other"),
        (["--texts=a.txt", "--features", "--out=a.npz"], "embed", "leave images and --features out"),
        (["--text=a"], "search", "needs images, or --index"),
        ([str(tmp_path), "--text=a", "--image=b"], "search", "give one of them"),
        ([f"--index={sheet}", "--text=a"], "search", "is no index of visionfm embed"),
        ([str(tmp_path)], "caption", "writes no captions"),
        ([str(tmp_path)], "classify", "give their names"),
    ):
        with pytest.raises(UserError, match=message):
            predict.main([str(pairs), *words], mode=mode)


def check_datasets(folder, pairs, images, capsys):
    """Images of datasets, and texts, by the names that an index gives them."""
    tars, index, sheet = folder / "tars", folder / "b/datasets.npz", folder / "b/found.png"
    tars.mkdir()
    with tarfile.open(tars / "00.tar", "w") as tar:
        for i in range(3):
            tar.add(folder / f"0{i}.png", f"0{i}.png")
    predict.main([str(pairs), str(tars), f"--out={index}"], mode="embed")
    with np.load(index) as kept:
        np.testing.assert_allclose(kept["embedding"], images[:3], atol=2e-3)
        assert kept["name"].tolist() == [f"tars:{tars}#{i} 00/0{i}" for i in range(3)]
    predict.main([str(pairs), "bundled:twemoji", "--split=test", f"--out={index}"], mode="embed")
    with np.load(index) as kept:
        np.testing.assert_allclose(kept["embedding"][:40], images, atol=2e-3)
        name = str(kept["name"][7])
    assert name.startswith("bundled:twemoji@test#7 ")
    capsys.readouterr()
    words = [f"--index={index}", f"--image={folder / '07.png'}", "--count=1", f"--picture={sheet}"]
    predict.main([str(pairs), *words], mode="search")
    assert capsys.readouterr().out.splitlines()[0] == f"   1   1.000  {name}"
    assert sheet.stat().st_size > 3000

    (folder / "texts.txt").write_text("cat face\nred heart\n")
    predict.main([str(pairs), f"--texts={folder / 'texts.txt'}", f"--out={folder / 'b/texts'}"], mode="embed")
    predict.main([str(pairs), f"--index={folder / 'b/texts'}", f"--image={folder / '07.png'}"], mode="search")
    assert sorted(line[14:] for line in capsys.readouterr().out.splitlines()[-2:]) == ["cat face", "red heart"]


def test_at_twice_the_resolution_the_loss_does_not_jump(tmp_path, pairs):
    """Whole pictures at twice the size show things as large as the crops did from which the model has learnt.

    Touvron et al. 2019, "Fixing the train-test resolution discrepancy".
    """
    before = np.mean(list(losses(pairs).values())[-10:])
    folder = tmp_path / "larger"
    out, _ = run_pairs(folder, f"--config.checkpoint.weights={pairs}", base=LARGER)
    assert f"starts from      the weights of {pairs}" in out
    after = np.mean(list(losses(folder).values()))
    assert after < before + 0.5 * (CHANCE - before)
