"""Evals against predictions whose score is known."""

import contextlib
import json
import types
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from visionfm_jax.cli import evaluate, train
from visionfm_jax.cli.data import open_data
from visionfm_jax.config import load
from visionfm_jax.data.chain import EvalTransform
from visionfm_jax.data.sources.kinds import FolderConfig
from visionfm_jax.data.transforms import CenterCrop, MultiCrop, Resize, Views
from visionfm_jax.errors import ConfigError, DataError
from visionfm_jax.evals import kinds
from visionfm_jax.evals.eval import check_best_metric, make_evals
from visionfm_jax.evals.kinds import AccuracyConfig, PixelBaselineConfig
from visionfm_jax.evals.logistic import fit, zeros
from visionfm_jax.evals.pixel_baseline import PENALTY
from visionfm_jax.evals.run import check_labels
from visionfm_jax.tasks.classification import ClassificationConfig
from visionfm_jax.tasks.contrastive import ContrastiveConfig
from visionfm_jax.tasks.detection import DetectionConfig
from visionfm_jax.tasks.eomt import EomtConfig
from visionfm_jax.tasks.multimodal import MultimodalConfig
from visionfm_jax.tasks.segmentation import SegmentationConfig
from visionfm_jax.tasks.task import make_task
from visionfm_jax.train import initialise

QUICK = str(Path(__file__).parents[3] / "configs" / "quickstart.py")
PAIRS = str(Path(__file__).parents[3] / "configs" / "swinv2_g_clip.py")


def quickstart(*words: str):
    return load.from_arguments([f"--config={QUICK}", "--config.evals[0].batch_size=192", *words])[0]


def knowing(batch, right):
    """Predictions right for the rows that `right(label)` picks, second best for the others."""
    label = batch["label"]
    wrong = (label + 1) % 10
    first, second = np.where(right(label), label, wrong), np.where(right(label), wrong, label)
    others = np.stack([(label + k) % 10 for k in (2, 3, 4)], 1)
    top = np.concatenate([first[:, None], second[:, None], others], 1)
    return {"top": top, "loss": np.ones(len(label)), **{k: batch[k] for k in ("label", "mask", "record")}}


def test_every_record_counts_once_and_padding_not():
    evaluation = make_evals(quickstart(), 0, 1)["digits"]
    seen = []

    def predict(batch):
        seen.append(batch["mask"].sum())
        return knowing(batch, lambda label: label < 3)

    got = evaluation.run(predict)
    shares = {"top1": pytest.approx(0.3), "top5": 1.0, "balanced_accuracy": pytest.approx(0.3), "majority": 0.1}
    assert got == {"loss": 1.0, **shares, "images": 1000.0}
    assert seen == [192, 192, 192, 192, 192, 40]
    assert evaluation.pictured["image"].shape == (64, 28, 28, 3)
    assert (evaluation.pictured["guess"] == evaluation.pictured["label"]).mean() == pytest.approx(
        (evaluation.pictured["label"] < 3).mean()
    )


@pytest.mark.parametrize("number", [0, 1])
def test_images_of_another_size_than_in_training_are_another_protocol(number):
    """The baseline has no protocol, and reads all that it trains on at that size."""
    usual, name = make_evals(quickstart(), 0, 1), ("digits", "pixels")[number]
    other = make_evals(quickstart(f"--config.evals[{number}].image_size=(14, 42)"), 0, 1)[name]
    same = make_evals(quickstart(f"--config.evals[{number}].image_size=(28, 28)"), 0, 1)[name]
    assert same.protocol == usual[name].protocol
    assert other.transform.spec["image"][0] == (14, 42, 3)
    if number == 0:
        assert other.protocol != usual[name].protocol
        assert other.settings["image_size"] == (14, 42)
        seen = []
        other.run(lambda batch: seen.append(batch["image"].shape) or knowing(batch, lambda label: label < 3))
        assert set(seen) == {(192, 14, 42, 3)}
        assert other.pictured["image"].shape == (64, 14, 42, 3)


def test_preprocessing_of_another_size_says_which_field_to_set():
    config = quickstart()
    config.evals[0].preprocess = CenterCrop(size=(21, 35))
    with pytest.raises(
        ConfigError, match=r"digits\].preprocess = CenterCrop: .* \(21, 35\) .* image_size to \(21, 35\)"
    ):
        make_evals(config, 0, 1)
    config.evals[0].image_size = (21, 35)
    assert make_evals(config, 0, 1)["digits"].transform.spec["image"][0] == (21, 35, 3)


def test_preprocessing_must_make_images_of_one_size():
    config = quickstart()
    config.evals[0].preprocess = MultiCrop(views=(Views(name="global", size=28),))
    with pytest.raises(ConfigError, match=r"MultiCrop: makes several views of an image, and an eval sees one"):
        make_evals(config, 0, 1)
    config.evals[0].preprocess = Resize(to="shorter")
    with pytest.raises(ConfigError, match=r"Resize: makes images of \(28, 50\) and \(50, 28\) .*sample.target"):
        make_evals(config, 0, 1)


@pytest.mark.parametrize("name", sorted(path.stem for path in Path(QUICK).parent.glob("*.py")))
def test_the_shipped_preprocessing_fits_the_models(name):
    config = load.load_file(f"{Path(QUICK).parent / name}.py")
    variants = [config] if name == "quickstart" else [config, load.load_file(f"{Path(QUICK).parent / name}.py:tiny")]
    for run in variants:
        assert run.evals
        for evaluation in run.evals:
            EvalTransform.of(evaluation, run)


def test_what_was_taken_for_what_is_kept():
    evaluation = make_evals(quickstart(), 0, 1)["digits"]
    got = evaluation.run(lambda batch: knowing(batch, lambda label: label < 3))
    kept = json.loads(json.dumps(evaluation.details, allow_nan=False))
    assert [c["top1"] for c in kept["classes"]] == [1] * 3 + [0] * 7
    assert [c["images"] for c in kept["classes"]] == [100] * 10
    assert kept["confusion"] == [[c, c if c < 3 else (c + 1) % 10, 100] for c in range(10)]
    assert got["balanced_accuracy"] == pytest.approx(0.3)
    assert kept["protocol"] == evaluation.protocol
    assert evaluation.pictured["confusion"].tolist() == kept["confusion"]


def test_pictures_are_spread_over_the_source_whatever_the_hosts(tmp_path, monkeypatch):
    """A class folder lists one class after another; the picture must not show the first alone."""
    labels = np.repeat(np.arange(10), 30)
    archive = {"image": np.stack([np.full((28, 28, 3), label, np.uint8) for label in labels]), "label": labels}
    np.savez(tmp_path / "sorted.npz", **archive)
    words = ["--config.evals[0].source.kind=numpy", f"--config.evals[0].source.path={tmp_path / 'sorted.npz'}"]
    words.append("--config.evals[0].source.split=")
    one = make_evals(quickstart(*words), 0, 1)["digits"]
    one.run(lambda batch: knowing(batch, lambda label: label < 3))
    shown = one.pictured
    np.testing.assert_array_equal(np.bincount(shown["label"]) >= 6, True)
    np.testing.assert_array_equal(shown["image"][:, 0, 0, 0], shown["label"])

    first = make_evals(quickstart(*words), 0, 2)["digits"]

    def of_both_hosts(batch):
        """As `predict` answers: with the rows of all hosts, of which host 0 has the first half."""
        at = of_both_hosts.seen
        of_both_hosts.seen += 192
        rows = np.arange(at, at + 192)
        assert len(batch["label"]) == 96
        there = {"label": labels[rows % 300], "mask": (rows < 300).astype(np.float32), "record": rows}
        return knowing(there, lambda label: label < 3)

    of_both_hosts.seen = 0
    assert first.run(of_both_hosts) == one.run(lambda batch: knowing(batch, lambda label: label < 3))
    np.testing.assert_equal(first.pictured, shown)


def test_logits_that_are_not_finite_are_never_right():
    evaluation = make_evals(quickstart(), 0, 1)["digits"]
    got = evaluation.run(lambda batch: knowing(batch, lambda label: label >= 0) | {"loss": np.full(192, np.nan)})
    assert (got["top1"], got["top5"], got["balanced_accuracy"]) == (0, 0, 0)
    json.dumps(evaluation.details, allow_nan=False)


def test_pictures_are_those_of_the_last_run():
    evaluation = make_evals(quickstart(), 0, 1)["digits"]
    evaluation.run(lambda batch: knowing(batch, lambda label: label < 0))
    evaluation.run(lambda batch: knowing(batch, lambda label: label >= 0))
    np.testing.assert_array_equal(evaluation.pictured["guess"], evaluation.pictured["label"])


def test_more_classes_than_the_head_are_refused():
    with pytest.raises(DataError, match=r"bundled digits/test has labels up to 9.*num_classes = 9; set it to 10"):
        make_evals(quickstart("--config.task.num_classes=9"), 0, 1)


def class_folders(root, *classes):
    for name in classes:
        (root / name).mkdir(parents=True)
        Image.fromarray(np.zeros((28, 28, 3), np.uint8)).save(root / name / "0.png")


def test_labels_that_mean_other_classes_than_in_training_are_refused(tmp_path, monkeypatch):
    """Before a run begins, and where its folder says which classes it was trained on."""
    class_folders(tmp_path / "train", "ant", "bee", "cow")
    class_folders(tmp_path / "held_out", "ant", "cow")
    words = ["--config.data.train[0].kind=folder", f"--config.data.train[0].path={tmp_path}/train",
             "--config.data.train[0].split=", "--config.data.num_examples=0", "--config.task.num_classes=3",
             "--config.train.epochs=0", "--config.train.steps=100", "--config.evals[0].source.kind=folder",
             f"--config.evals[0].source.path={tmp_path}/held_out", "--config.evals[0].source.split=",
             f"--config.workdir={tmp_path}/run"]  # fmt: skip
    config = quickstart(*words)
    config.evals = config.evals[:1]
    watchdog = types.SimpleNamespace(suspended=contextlib.nullcontext)
    says = r"config\.evals\[0\]\.source: .*/held_out: label 1 is the class 'cow', but 'bee' in data\.train; give both"
    with pytest.raises(DataError, match=says):
        train.run(config, None, watchdog)
    (tmp_path / "run").mkdir()
    kept = {"order": [], "grain": "", "tokenizer": "", "sources": [{"classes": ["ant", "bee", "cow"]}]}
    (tmp_path / "run" / "data.json").write_text(json.dumps(kept))
    weights = initialise.ToEvaluate({}, str(tmp_path / "run"), 1, "")
    monkeypatch.setattr(evaluate, "weights_to_evaluate", lambda trainer: weights)
    with pytest.raises(DataError, match=says):
        evaluate.evaluate(config, watchdog)
    (tmp_path / "held_out" / "bee").mkdir()  # a class of which there are no images
    check_labels(config, make_evals(config, 0, 1), ["ant", "bee", "cow"])
    check_labels(config, make_evals(config, 0, 1), ["ant", "bee"])
    check_labels(config, make_evals(config, 0, 1), ())
    class_folders(tmp_path / "more", "ant", "cow")
    config.data.train += (FolderConfig(path=str(tmp_path / "more"), split=""),)
    with pytest.raises(DataError, match=r"config\.data\.train\[1\]: .*/more: label 1 is the class 'cow', but 'bee'"):
        open_data(config, make_task(config, lambda params: params))


@pytest.mark.parametrize(
    ("metric", "words"),
    [("digits/topp1", r"set digits/top1"), ("digits/loss", r"set digits/top1"), ("pixels/top5", r"set pixels/top1"),
     ("test/top1", r"none of the evals \['digits', 'pixels'\]; set EVAL/METRIC")],
)  # fmt: skip
def test_best_metric_must_be_one_of_which_higher_is_better_where_states_are_kept_by_it(metric, words):
    run = quickstart(f"--config.checkpoint.best_metric={metric}")
    with pytest.raises(ConfigError, match=rf"best_metric = '{metric}'.*{words}, or config.checkpoint.keep_best=0"):
        check_best_metric(run)
    run.checkpoint.keep_best = 0
    check_best_metric(run)


def test_logistic_regression_separates_blobs_and_reaches_a_stationary_point():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 300)
    x = (np.eye(3)[labels] * 2 + rng.normal(size=(300, 3)) * 0.3).astype(np.float32)
    weights = fit(x, labels, PENALTY, zeros(x.shape[1], 3))
    assert (weights(x).argmax(-1) == labels).mean() > 0.99
    residual = jax.nn.softmax(weights(x)) - np.eye(3)[labels]
    np.testing.assert_allclose(residual.sum(0), 0, atol=0.05)  # the gradient of the biases


@pytest.mark.parametrize("kind", [AccuracyConfig, PixelBaselineConfig])
def test_evals_of_classification_refuse_a_contrastive_run(kind):
    config = load.load_file(f"{PAIRS}:tiny")
    config.evals = (kind(source=config.evals[0].source),)
    with pytest.raises(ConfigError, match=rf"evals\[0\] = '{kind.kind}': measures the labels of a task, and Contr"):
        config.validate()


def test_evals_name_what_some_task_predicts():
    tasks = [ClassificationConfig, ContrastiveConfig, DetectionConfig, MultimodalConfig, SegmentationConfig]
    tasks += [EomtConfig(truth=truth) for truth in ("instance", "panoptic")]
    there = frozenset.union(*(task.predictions for task in tasks))
    evals = [*kinds.Measurement.__subclasses__(), kinds.InstancesConfig]
    assert len(evals) == 13
    assert all(cls.measures in there for cls in evals)
