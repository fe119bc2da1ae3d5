"""Class maps: counts by hand, windows, scales and mirrored views, hosts, damaged records, non-finite logits."""

import json
import threading

import cv2
import hotcoco
import numpy as np
import pytest
from dense_fakes import BATCH, SIDE, make
from pair_fakes import on_hosts

from visionfm_jax.data.sample import Axis
from visionfm_jax.data.transforms import Resize
from visionfm_jax.errors import ConfigError, DataError
from visionfm_jax.evals import segmentation
from visionfm_jax.evals.kinds import MeanIouConfig
from visionfm_jax.evals.segmentation import Grid, by_class, confusion_of, guess_of, score, windows

CLASSES = ("sky", "sea", "sand", "ship")
TONES = np.array([10, 90, 170, 250], np.uint8)  # of which an image is painted, by class
NONE = 255


def scenes(sizes, seed=0):
    """Images whose grey level says the class of each pixel; some pixels have none."""
    rng, out = np.random.default_rng(seed), []
    for height, width in sizes:
        blocks = rng.integers(0, 4, (-(-height // 8), -(-width // 8)), np.uint8)
        truth = np.kron(blocks, np.ones((8, 8), np.uint8))[:height, :width]
        image = np.repeat(TONES[truth][..., None], 3, 2)
        out.append({"image": image, "class_map": np.where(rng.random(truth.shape) < 0.1, NONE, truth).astype(np.uint8)})
    return out


def reading(calls=None, spoil=None):
    """Logits of 1 for the class that a pixel's grey level says, at every pixel."""

    def predict(batch, what):
        assert what == "logits"
        if calls is not None:
            calls.append(int(batch["mask"].sum()))
        assert batch["image"].shape[1:] == (SIDE, SIDE, 3)
        nearest = np.abs(batch["image"][..., :1].astype(int) - TONES).argmin(-1)
        logits = np.eye(4, dtype=np.float32)[nearest]
        if spoil is not None:
            logits[batch["record"] == spoil, 3, 3] = np.nan
        return {k: batch[k] for k in ("record", "mask")} | {"logits": logits}

    return predict


SIZES = [(32, 32), (32, 75), (50, 32), (32, 33), (32, 32), (32, 64), (32, 40), (32, 32), (32, 32), (90, 32), (32, 32)]


def test_an_image_of_more_windows_than_memory_is_left_out(monkeypatch, caplog):
    monkeypatch.setattr(segmentation, "MOST_VIEWS", 4)
    (evaluation,) = make(monkeypatch, MeanIouConfig, scenes(SIZES), CLASSES, inference="slide", stride=0.6)
    assert evaluation.run(reading())["images"] == len(SIZES) - 1
    assert "record image 9 is damaged and left out: its 5 windows are more than 4" in caplog.text


def test_no_scale_is_refused(monkeypatch):
    with pytest.raises(ConfigError, match=r"config.evals\[name=held_out\].scales = \(\): names no scale; set \(1.0,\)"):
        make(monkeypatch, MeanIouConfig, scenes([(32, 32)]), CLASSES, scales=())


@pytest.mark.parametrize("flip", [False, True])
def test_the_truth_itself_is_right_in_windows_mirrored_or_not(monkeypatch, flip):
    (evaluation,) = make(monkeypatch, MeanIouConfig, scenes(SIZES), CLASSES, inference="slide", stride=0.6, flip=flip)
    calls = []
    got = evaluation.run(reading(calls))
    assert {k: got[k] for k in evaluation.config.metrics} == {"miou": 1, "mean_accuracy": 1, "pixel_accuracy": 1}
    assert (got["images"], got["not_finite"]) == (len(SIZES), 0)
    # 75 pixels take windows at 0, 19, 38 and 43.
    views = [1, 4, 2, 2, 1, 3, 2, 1, 1, 5, 1]
    assert sum(calls) == sum(views) * (1 + flip)
    assert max(calls) == BATCH
    json.dumps(evaluation.details, allow_nan=False)
    assert len(evaluation.pictured["maps"]) == 8
    assert evaluation.pictured["maps"][0]["truth"].min() == -1


def test_whole_images_and_other_scales_are_right_but_for_edges(monkeypatch):
    records = scenes([(64, 64), (60, 48), (16, 16)])
    for settings in ({}, {"scales": (1.0, 2.0), "flip": True}, {"preprocess": Resize()}):
        (evaluation,) = make(monkeypatch, MeanIouConfig, records, CLASSES, **settings)
        assert 0.75 < evaluation.run(reading())["miou"] < 1, settings


def test_each_image_counts_once_over_two_hosts(monkeypatch):
    records = scenes(SIZES)
    for record in records[::3]:
        record["class_map"] = np.roll(record["class_map"], 5, 1)
    (alone,) = make(monkeypatch, MeanIouConfig, records, CLASSES, inference="slide")
    wanted = alone.run(reading())
    assert 0 < wanted["miou"] < 1
    barrier, given = threading.Barrier(2, timeout=60), {}

    def of_both(numbers):
        given[threading.get_ident()] = numbers
        barrier.wait()
        out = list(given.values())
        if barrier.wait() == 0:
            given.clear()
        barrier.wait()
        return out

    monkeypatch.setattr(segmentation, "of_all_hosts", of_both)
    two = make(monkeypatch, MeanIouConfig, records, CLASSES, hosts=2, inference="slide")
    assert on_hosts(two, reading()) == [wanted, wanted]
    assert two[0].details == two[1].details == alone.details
    assert two[1].pictured == {}


def test_damaged_records_are_left_out_and_logits_that_are_not_finite_never_right(monkeypatch):
    records = scenes([(32, 32)] * 4)
    records[1]["image"] = b"?"
    records[2]["class_map"] = np.full((32, 32), 4, np.uint8)
    (evaluation,) = make(monkeypatch, MeanIouConfig, records, CLASSES)
    right = dict.fromkeys(evaluation.config.metrics, 1)
    assert evaluation.run(reading()) == right | {"images": 2, "not_finite": 0}
    got = evaluation.run(reading(spoil=3))
    labelled = [(records[i]["class_map"] != NONE).sum() for i in (0, 3)]
    assert got["pixel_accuracy"] == pytest.approx(labelled[0] / sum(labelled))
    assert got["not_finite"] == 1
    assert [e["key"] for e in evaluation.pictured["worst_maps"]] == ["image 3", "image 0"]
    (none,) = make(monkeypatch, MeanIouConfig, records[1:3], CLASSES)
    with pytest.raises(DataError, match="none of its records could be read"):
        none.run(reading())


def test_counts_are_those_by_hand_and_those_of_hotcoco():
    rng = np.random.default_rng(0)
    pairs = [(rng.integers(0, 3, (9, 7), np.uint8), rng.choice([0, 1, 2, 4], (9, 7))) for _ in range(3)]
    for truth, _ in pairs:
        truth[rng.random(truth.shape) < 0.2] = NONE
    total = sum(confusion_of(truth, guess, 6) for truth, guess in pairs)  # 3 and 5 neither occur nor are guessed
    ious, accuracies = [], []
    for c in (0, 1, 2, 4):
        both = either = there = 0
        for truth, guess in pairs:
            for t, g in zip(truth.ravel(), guess.ravel(), strict=True):
                if t != NONE:
                    both, either, there = both + (t == g == c), either + (c in (t, g)), there + (t == c)
        ious.append(both / either)
        accuracies += [both / there] if there else []
    right = sum(((t == g) & (t != NONE)).sum() for t, g in pairs)
    got = score(total)
    assert got["miou"] == pytest.approx(np.mean(ious), abs=1e-15)
    assert got["mean_accuracy"] == pytest.approx(np.mean(accuracies), abs=1e-15)
    assert got["pixel_accuracy"] == right / sum((t != NONE).sum() for t, _ in pairs)
    theirs = hotcoco.semantic.SemanticEval(6, ignore_index=NONE)
    for truth, guess in pairs:
        theirs.update(truth, guess.astype(np.uint8))
    np.testing.assert_array_equal(theirs.confusion(), total[:, :6])
    assert np.isnan(by_class(total)["iou"][[3, 5]]).all()
    assert all(np.isnan(v) for v in score(np.zeros((6, 7), int)).values())


@pytest.mark.parametrize(("length", "begins"), [(512, [0]), (300, [0]), (1000, [0, 341, 488]), (1194, [0, 341, 682])])
def test_windows_lie_as_mmsegmentation_lays_them(length, begins):
    got = windows(Axis(1200, (0, length), (0, length)), 512, 2 / 3)
    assert [axis.seen[0] for axis in got] == begins
    assert got[-1].seen[1] == length
    assert all(axis.length == 512 for axis in got)


def test_logits_are_interpolated_as_images_are_and_windows_averaged(monkeypatch):
    monkeypatch.setattr(segmentation, "BLOCK", 500)  # a few lines at a time
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(1, 5, 7, 6)).astype(np.float32)
    whole = Grid([Axis(10, (0, 23), (0, 10))], [Axis(14, (0, 40), (0, 14))])
    smooth = cv2.resize(logits[0], (40, 23), interpolation=cv2.INTER_LINEAR)
    np.testing.assert_array_equal(guess_of([whole], logits, (23, 40)), smooth.argmax(-1))
    mirrored = Grid([Axis(10, (0, 23), (0, 10))], [Axis(14, (0, 40), (0, 14), True)])
    np.testing.assert_array_equal(guess_of([mirrored], logits, (23, 40)), smooth[:, ::-1].argmax(-1))
    both = guess_of([whole, mirrored], logits.repeat(2, 0), (23, 40))
    np.testing.assert_array_equal(both, (smooth + smooth[:, ::-1]).argmax(-1))
    # Two windows that share half of their pixels: there their mean, as a third view at the same scale weighs as much.
    columns = windows(Axis(6, (0, 6), (0, 6)), 4, 0.5)
    one_hot = np.eye(3, dtype=np.float32)
    left, right = np.tile(1.0 * one_hot[0], (1, 4, 1)), np.tile(0.6 * one_hot[1], (1, 4, 1))
    other = np.tile(0.55 * one_hot[2], (1, 4, 1))
    row = [Axis(1, (0, 1), (0, 1))]
    grids = [Grid(row, columns), Grid(row, [Axis(4, (0, 6), (0, 4))])]
    assert guess_of(grids, np.stack([left, right, other]), (1, 6)).tolist() == [[0, 0, 2, 2, 1, 1]]
    assert guess_of([Grid(row, columns[:1])], left[None], (1, 6)).tolist() == [[0, 0, 0, 0, 3, 3]]  # 3: not seen
