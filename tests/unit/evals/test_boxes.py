"""Average precision: against pycocotools, of the truth itself, of numbers that are not finite, on several hosts."""

import contextlib
import io
import json
import math

import numpy as np
import pytest
from dense_fakes import make, on_canvas
from pair_fakes import on_hosts
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from visionfm_jax.data.images import opened
from visionfm_jax.evals.coco import METRICS, Found, Truth, best_score, coco, match
from visionfm_jax.evals.kinds import BoxesConfig

CLASSES = ("ant", "bee", "cow", "none of these")
QUERIES = 12


def scenes(count=11, seed=0):
    """Images of several sizes, with 0 to 6 objects, some of them crowds."""
    rng, out = np.random.default_rng(seed), []
    for i in range(count):
        height, width, objects = (*rng.integers(40, 400, 2), i % 7)
        corner = rng.uniform(0, 0.6, (objects, 2))
        corners = np.concatenate([corner, corner + rng.uniform(0.1, 0.4, (objects, 2))], 1)
        boxes = corners * np.array([width, height] * 2)
        out.append(
            {
                "image": np.full((height, width, 3), i, np.uint8),
                "boxes": boxes,
                "box_labels": rng.integers(0, 3, objects),
                "box_crowd": rng.random(objects) < 0.2,
                "box_areas": (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]) * 0.7,
            }
        )
    return out


def knowing(records, score=lambda record, objects: np.linspace(0.9, 0.5, objects), spoil=lambda record, out: None):
    """Predicts the objects themselves, in pixels of the canvas; what is left of the queries has the score 0."""

    def predict(batch, what):
        assert what == "boxes"
        rows = len(batch["image"])
        out = {"boxes": np.zeros((rows, QUERIES, 4), np.float32), "scores": np.zeros((rows, QUERIES), np.float32)}
        out["box_labels"] = np.zeros((rows, QUERIES), np.int32)
        for row in np.flatnonzero(batch["mask"]):
            number = int(batch["record"][row])
            record = records[number]
            one = {k: v[row] for k, v in out.items()}
            n = len(record["boxes"])
            one["boxes"][:n] = on_canvas(record["boxes"], record["image"].shape[:2])
            one["scores"][:n], one["box_labels"][:n] = score(number, n), record["box_labels"]
            spoil(number, one)
        return {k: batch[k] for k in ("record", "mask")} | out

    return predict


def test_the_truth_itself_has_ap_1_on_one_host_or_two(monkeypatch):
    records = scenes()
    (alone,) = make(monkeypatch, BoxesConfig, records, CLASSES)
    got = alone.run(knowing(records))
    objects = sum((~r["box_crowd"]).sum() for r in records)
    for name in METRICS:
        assert got[name] == pytest.approx(1.0) or math.isnan(got[name]) or name in ("ar1", "ar10"), name
    assert got["images"] == 11
    assert got["objects"] == objects
    assert got["not_finite"] == 0
    two = make(monkeypatch, BoxesConfig, records, CLASSES, hosts=2)
    assert json.dumps(on_hosts(two, knowing(records))) == json.dumps([got, got])
    assert two[1].pictured == {}
    classes = alone.details["classes"]
    assert [c["ap"] for c in classes] == [pytest.approx(1.0)] * 3 + [None]
    assert sum(c["objects"] for c in classes) == objects
    json.dumps(alone.details, allow_nan=False)
    shown = alone.pictured["boxes"]
    assert [e["key"] for e in shown] == [f"image {i}" for i in range(11)]
    assert all((e["truth"]["found"] | e["truth"]["crowd"]).all() for e in shown)
    assert alone.settings["preprocess" if "preprocess" in alone.settings else "resize"] == "pad"


def test_scores_and_boxes_that_are_not_finite_are_never_right_and_counted(monkeypatch):
    records = scenes()

    def spoil(number, out):
        if number % 2:
            out["scores"][:3], out["boxes"][3] = np.nan, np.inf

    (evaluation,) = make(monkeypatch, BoxesConfig, records, CLASSES)
    got = evaluation.run(knowing(records, spoil=spoil))
    lost = sum(1 for i in range(11) if i % 2) * 4
    assert got["not_finite"] == lost
    assert 0 < got["ap"] < 1
    every = evaluation.run(knowing(records, lambda number, n: np.full(n, np.nan)))
    assert every["ap"] == every["ap50"] == every["ar100"] == 0


def test_boxes_of_turned_images_are_compared_upright(monkeypatch):
    stored = np.zeros((60, 100, 3), np.uint8)
    data, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6  # the stored image is to be turned to the right
    Image.fromarray(stored).save(data, "JPEG", exif=exif)
    box = [10.0, 20.0, 40.0, 30.0]
    record = {"image": data.getvalue(), "boxes": [box], "box_labels": [1]}
    seen = {"image": np.zeros((100, 60, 3)), "boxes": [[60 - 30, 10, 60 - 20, 40]], "box_labels": [1]}
    (evaluation,) = make(monkeypatch, BoxesConfig, [record], CLASSES)
    with opened(record["image"]) as picture:
        assert picture.size == (100, 60)
    assert evaluation.run(knowing([seen]))["ap"] == pytest.approx(1)


def jittered(seed, count=60):
    """Objects, and boxes near them: missed, doubled, confused ones, some on crowds, with tied scores."""
    rng, truths, found = np.random.default_rng(seed), [], []
    for _ in range(count):
        objects = rng.integers(0, 15)
        corner, size = rng.uniform(0, 300, (objects, 2)), np.exp(rng.uniform(2, 5.3, (objects, 2)))
        boxes = np.concatenate([corner, corner + size], 1)
        labels, crowd = rng.integers(0, 5, objects), rng.random(objects) < 0.15
        truths.append(Truth(boxes, labels, crowd, size.prod(1) * rng.uniform(0.5, 1, objects)))
        chosen = rng.integers(0, objects, rng.integers(0, 130)) if objects else np.zeros(0, int)
        near = boxes[chosen] + rng.normal(0, 0.08, (len(chosen), 4)) * np.tile(size[chosen], 2)
        guess = np.where(rng.random(len(chosen)) < 0.8, labels[chosen], rng.integers(0, 5, len(chosen)))
        found.append(Found(near, guess, np.round(rng.random(len(chosen)), 1)))
    return truths, found


def by_pycocotools(truths, found, classes):
    def rows(i, boxes):
        return [{"image_id": i, "bbox": [b[0], b[1], b[2] - b[0], b[3] - b[1]]} for b in boxes.tolist()]

    annotations, results = [], []
    for i, (truth, one) in enumerate(zip(truths, found, strict=True)):
        for row, label, crowd, area in zip(rows(i, truth.boxes), truth.labels, truth.crowd, truth.areas, strict=True):
            more = {"id": len(annotations) + 1, "category_id": int(label), "iscrowd": int(crowd), "area": area}
            annotations.append(row | more)
        for row, label, score in zip(rows(i, one.boxes), one.labels, one.scores, strict=True):
            results.append(row | {"category_id": int(label), "score": float(score)})
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = {
            "images": [{"id": i} for i in range(len(truths))],
            "annotations": annotations,
            "categories": [{"id": c, "name": str(c)} for c in range(classes)],
        }
        truth.createIndex()
        counted = COCOeval(truth, truth.loadRes(results), "bbox")
        counted.evaluate()
        counted.accumulate()
        counted.summarize()
    return counted


@pytest.mark.parametrize("seed", [0, 1])
def test_the_numbers_are_those_of_pycocotools(seed):
    truths, found = jittered(seed)
    got, counted = coco(truths, found, 7), by_pycocotools(truths, found, 7)
    np.testing.assert_allclose([got.metrics[name] for name in METRICS], counted.stats, rtol=0, atol=1e-12)
    assert 0.05 < got.metrics["ap"] < 0.95
    precision = counted.eval["precision"][..., 0, -1]
    np.testing.assert_allclose(got.classes[:5], precision[..., :5].mean((0, 1)), rtol=0, atol=1e-12)
    assert np.isnan(got.classes[5:]).all()
    np.testing.assert_allclose(got.curves, precision[..., :5].mean(-1), rtol=0, atol=1e-12)


def test_sets_without_objects_or_predictions_have_numbers():
    nothing = Found(np.zeros((0, 4)), np.zeros(0, int), np.zeros(0))
    empty = Truth(np.zeros((0, 4)), np.zeros(0, int), np.zeros(0, bool), np.zeros(0))
    one = Truth(np.array([[0.0, 0.0, 50.0, 50.0]]), np.array([1]), np.array([False]), np.array([2500.0]))
    hit = Found(one.boxes, one.labels, np.array([0.4]))
    assert all(math.isnan(v) for v in coco([empty], [hit], 2).metrics.values())
    missed = coco([one, empty], [nothing, nothing], 2).metrics
    assert (missed["ap"], missed["ar100"], missed["ap_medium"]) == (0, 0, 0)
    assert math.isnan(missed["ap_small"])
    assert coco([one, empty], [hit, hit], 2).metrics["ap"] == pytest.approx(1)  # the wrong box comes second
    assert coco([empty, one], [hit, hit], 2).metrics["ap"] == pytest.approx(0.5)


def test_a_box_takes_the_best_free_object_of_its_class():
    truth = Truth(
        np.array([[0, 0, 10, 10], [1, 0, 11, 10], [50, 50, 90, 90]], float),
        np.array([0, 0, 1]), np.array([False, False, True]), np.full(3, 100.0),
    )  # fmt: skip
    boxes = np.array([[1, 0, 11, 10], [1, 0, 11, 10], [0, 0, 10, 10], [55, 55, 60, 60], [0, 0, 10, 10]], float)
    found = Found(boxes, np.array([0, 0, 0, 1, 1]), np.array([0.9, 0.8, 0.7, 0.6, 0.5]))
    of_box, of_object = match(truth, found)
    assert of_box.tolist() == [1, 0, -1, -2, -1]  # a second box takes the other; on the crowd; of another class
    assert of_object.tolist() == [1, 0, -1]
    assert best_score(found.scores, of_box >= 0, 2) == 0.8
    assert best_score(np.zeros(0), np.zeros(0, bool), 3) == 0
