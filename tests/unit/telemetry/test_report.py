import types

import matplotlib.colors
import numpy as np
import pytest
from PIL import Image

from visionfm_jax.config import Config
from visionfm_jax.models.backbones.vit import ViTConfig
from visionfm_jax.tasks.classification import ClassificationConfig
from visionfm_jax.telemetry import report
from visionfm_jax.telemetry.console import summary


def pixels_of(path, colour):
    """How many pixels have exactly this colour."""
    image = np.asarray(Image.open(path).convert("RGB"), int)
    wanted = np.round(np.array(matplotlib.colors.to_rgb(colour)) * 255)
    return int((np.abs(image - wanted).max(-1) <= 1).sum())


def lines(steps=200):
    rng = np.random.default_rng(0)
    out = [
        {"step": s, "loss": 2 + 0.1 * rng.normal(), "lr": s * 1e-5, "grad_norm": 1.0, "update_ratio/head": 0.1}
        for s in range(1, steps + 1)
    ]
    return out + [{"step": s, "val/top1": s / 250, "val/loss": 1.5} for s in range(50, steps + 1, 50)]


def test_curves_draw_every_panel(tmp_path):
    report.learning_curves(lines(), tmp_path / "new" / "curves.png", title="run")
    size = Image.open(tmp_path / "new" / "curves.png").size
    assert size[0] >= 1000
    assert pixels_of(tmp_path / "new" / "curves.png", report.BLUE) > 1000
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["curves.png"]  # no temporary file stays


def test_evaluations_are_shares_with_the_best_first():
    rows = [
        {"step": 1, "val/top1": 0.2, "val/top5": 0.6, "val/loss": 0.3, "val/majority": 0.7, "loss": 0.4, "c/cider": 2}
    ]
    shares = ["val/top1", "val/top5", "val/balanced_accuracy", "c/cider"]
    assert report._best_first(rows, shares) == ["val/top5", "val/top1"]


def test_no_curve_hides_another(tmp_path):
    rows = [{"step": s, "val/top1": s / 10, "val/balanced_accuracy": s / 10 - 0.001} for s in range(1, 9)]
    shares = ["val/top1", "val/balanced_accuracy"]
    report.learning_curves(rows, tmp_path / "curves.png", shares=shares)
    few, many = sorted(pixels_of(tmp_path / "curves.png", colour) for colour in report.SERIES[:2])
    assert few > many / 5 > 50


def test_what_was_measured_once_is_a_point_at_its_step_and_no_legend_covers_it(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(report, "save", lambda figure, path: figures.append(figure))
    report.learning_curves([*lines(), {"step": 200, "base/top1": 0.9}], "x.png", shares=["val/top1", "base/top1"])
    figure = figures[0]
    figure.draw_without_rendering()
    for ax in figure.axes:
        assert not ax.get_legend().get_window_extent().overlaps(ax.bbox)
        assert ax.get_xlim() == figure.axes[0].get_xlim()
    once = next(line for line in figure.axes[3].get_lines() if "base" in line.get_label())
    assert (once.get_xdata().tolist(), once.get_ydata().tolist()) == ([200], [0.9])


def test_only_losses_and_norms_have_a_log_axis(monkeypatch):
    figures = []
    monkeypatch.setattr(report, "save", lambda figure, path: figures.append(figure))
    rows = [{"step": s, "loss": 100 / s, "grad_norm": 100 / s, "lr": 1e-6 * s, "v/top1": s / 100} for s in range(1, 99)]
    report.learning_curves(rows, "x.png", shares=["v/top1"])
    assert [ax.get_yscale() for ax in figures[0].axes] == ["log", "linear", "log", "linear"]


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [{"step": 1, "loss": float("nan"), "lr": 0.0}],
        [{"step": 1, "loss": 2.0}, {"step": 2, "loss": float("inf")}, {"step": 3, "loss": 1.0}],
        [{"step": 5, "val/top1": 0.5}],
    ],
)
def test_odd_runs_still_give_a_picture(tmp_path, rows):
    report.learning_curves(rows, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 5000


def test_losses_that_are_not_finite_are_marked(tmp_path):
    rows = [{"step": s, "loss": 2.0 - s / 100} for s in range(100)]
    report.learning_curves(rows, tmp_path / "a.png", panels={"loss": ["loss"]})
    rows[50]["loss"] = float("nan")
    report.learning_curves(rows, tmp_path / "b.png", panels={"loss": ["loss"]})
    assert pixels_of(tmp_path / "a.png", report.RED) == 0
    assert pixels_of(tmp_path / "b.png", report.RED) > 10


def test_the_running_mean_steps_over_holes():
    values = np.full(90, 3.0)
    values[40] = np.nan
    np.testing.assert_allclose(report.running_mean(values), 3.0)


@pytest.mark.parametrize("channels", [1, 3])
def test_wrong_predictions_are_marked(tmp_path, channels):
    images = np.full((6, 12, 16, channels), 128, np.uint8)
    labels = np.array([0, 1, 0, 1, 0, 1], np.int32)
    report.predictions(images, labels, labels, ["cat", "dog"], tmp_path / "right.png", "test")
    report.predictions(images, labels, [0, 1, 1, 1, 0, 1], ["cat", "dog"], tmp_path / "wrong.png", "test")
    assert pixels_of(tmp_path / "right.png", report.RED) == 0
    assert pixels_of(tmp_path / "right.png", report.GREEN) > 500
    assert pixels_of(tmp_path / "wrong.png", report.RED) > 500


def test_captions_say_what_it_is_and_stay_even():
    assert report._captions([3, 1], [8, 1], None) == ["✗ 8, true: 3", "✓ 1"]
    names = ["tench", "electric ray with a long name"]
    assert report._captions([0, 1], [1, 1], names) == ["✗ electric ray wi…\ntrue: tench", "✓ electric ray wi…\n"]


def test_unequal_counts_are_refused(tmp_path):
    with pytest.raises(ValueError, match="2 images, 1 labels"):
        report.predictions(np.zeros((2, 4, 4, 3), np.uint8), [0], [0, 1], None, tmp_path / "x.png", "")


def test_names_that_are_formulas_or_no_utf8_are_drawn(tmp_path):
    names = ("cost $\\foo$", "\udcff", "$\\frac{$")
    report.predictions(np.zeros((3, 8, 8, 3), np.uint8), [0, 1, 2], [1, 2, 0], names, tmp_path / "p.png", "test")
    assert (tmp_path / "p.png").stat().st_size > 0


def test_a_summary_says_of_which_step_a_score_is(tmp_path):
    config = Config(name="run", model=ViTConfig(), task=ClassificationConfig())
    evals = {"val": types.SimpleNamespace(metrics=("top1",), pictured={}, details={}, protocol="")}
    scores = {"loss": (0.5, 30), "val/top1": (0.25, 20), "lr": (1e-3, 30)}
    text = summary(tmp_path, config, evals, scores, 30, lines())
    assert text.splitlines()[:2] == ["  training loss        0.5000", "  val/top1             0.2500  after step 20"]
    assert summary(tmp_path, config, evals, scores, 20) == "  val/top1             0.2500"


def test_results_of_another_protocol_are_kept(tmp_path):
    config = Config(name="run", model=ViTConfig(), task=ClassificationConfig())
    image = np.zeros((1, 8, 8, 3), np.uint8)
    pictured = {"image": image, "label": [0], "guess": [0], "class_names": ["a"]}

    def measured(protocol):
        details = {"protocol": protocol, "step": 1}
        return {"val": types.SimpleNamespace(metrics=(), pictured=pictured, details=details, protocol=protocol)}

    for protocol in ("0a0a0a0a", "0a0a0a0a", "1b1b1b1b"):
        text = summary(tmp_path, config, measured(protocol), {}, 1)
        assert ("are kept" in text) == (protocol == "1b1b1b1b")
    assert f"results of another protocol are kept: {tmp_path}/eval_val.0a0a0a0a.json" in text
    names = ["eval_val.0a0a0a0a.json", "eval_val.json", "predictions_val.0a0a0a0a.png", "predictions_val.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert '"1b1b1b1b"' in (tmp_path / "eval_val.json").read_text()
    not_measured = types.SimpleNamespace(metrics=(), pictured={}, details={}, protocol="0a0a0a0a")
    assert "are kept" not in summary(tmp_path, config, {"val": not_measured}, {}, 1)
    (tmp_path / "eval_val.json").write_text('{"protocol": "../x"}')
    assert "are kept" not in summary(tmp_path, config, measured("0a0a0a0a"), {}, 1)
