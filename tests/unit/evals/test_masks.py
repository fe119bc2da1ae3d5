"""Evals of masks: the truth itself, pycocotools, hosts, damaged records, numbers that are not finite, segments."""

import contextlib
import io
import json
import math
import threading

import numpy as np
import pytest
from dense_fakes import SIDE, DenseConfig, make
from hotcoco import mask as rle
from pair_fakes import on_hosts
from PIL import Image
from pycocotools import mask as coco_rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from visionfm_jax.config import Config, DataConfig, TrainConfig
from visionfm_jax.data.images import Picture
from visionfm_jax.data.sample import Placement, Sample
from visionfm_jax.data.sources.kinds import CocoConfig, CocoPanopticConfig
from visionfm_jax.errors import DataError
from visionfm_jax.evals import segments
from visionfm_jax.evals.coco import METRICS, Found, Truth, coco, match
from visionfm_jax.evals.kinds import InstancesConfig, PanopticConfig
from visionfm_jax.evals.masks import known_of, layers, on_image
from visionfm_jax.evals.segments import segments_of
from visionfm_jax.models.backbones.vit import ViTConfig

CLASSES = ("ant", "bee", "cow", "none of these")
QUERIES = 9
SIZES = [(32, 32), (16, 32), (32, 20)]  # which the canvas shows pixel by pixel


def scenes(count=11, seed=0):
    """Images with 0 to 6 rectangles, one before another, some of them crowds."""
    rng, out = np.random.default_rng(seed), []
    for i in range(count):
        height, width = SIZES[i % 3]
        number = np.zeros((height, width), int)
        for n in range(1, 1 + i % 7):
            top, left = rng.integers(0, height - 8), rng.integers(0, width - 8)
            number[top : top + rng.integers(5, 12), left : left + rng.integers(5, 12)] = n
        masks = np.stack([number == n for n in range(1, 8) if (number == n).any()] or [number[:0]])
        masks = masks.reshape(-1, height, width)
        boxes = [[c.min(), r.min(), c.max() + 1, r.max() + 1] for r, c in (np.nonzero(m) for m in masks)]
        out.append(
            {
                "image": np.full((height, width, 3), i, np.uint8),
                "boxes": np.array(boxes, float).reshape(-1, 4),
                "box_labels": rng.integers(0, 3, len(masks)),
                "box_crowd": rng.random(len(masks)) < 0.2,
                "box_areas": masks.sum((1, 2)).astype(float),
                "masks": masks,
            }
        )
    return out


def knowing(records, score=1.0, spoil=lambda record, out: None):
    """Predicts the objects themselves, then masks of score 0."""

    def predict(batch, what):
        assert what in ("masks", "segments")
        rows = len(batch["image"])
        assert "masks" not in batch  # the truth does not go to the device
        out = {"masks": np.full((rows, QUERIES, SIDE, SIDE), -9, np.float16)}
        out |= {"scores": np.zeros((rows, QUERIES), np.float32), "mask_labels": np.zeros((rows, QUERIES), np.int32)}
        for row in np.flatnonzero(batch["mask"]):
            number = int(batch["record"][row])
            record, one = records[number], {k: v[row] for k, v in out.items()}
            for i, mask in enumerate(record["masks"]):
                one["masks"][i, : mask.shape[0], : mask.shape[1]][mask] = 9
                one["scores"][i], one["mask_labels"][i] = score, record["box_labels"][i]
            spoil(number, one)
        return {k: batch[k] for k in ("record", "mask")} | out

    return predict


def test_the_truth_itself_has_ap_1_on_one_host_or_two(monkeypatch):
    records = scenes()
    (alone,) = make(monkeypatch, InstancesConfig, records, CLASSES)
    got = alone.run(knowing(records))
    for name in METRICS:
        assert got[name] == pytest.approx(1.0) or math.isnan(got[name]) or name in ("ar1", "ar10"), name
    assert got["images"] == 11
    assert got["objects"] == sum((~r["box_crowd"]).sum() for r in records)
    assert got["not_finite"] == 0
    json.dumps(alone.details, allow_nan=False)
    shown = alone.pictured["segments"]
    assert [e["key"] for e in shown] == [f"image {i}" for i in range(11)]
    for entry, record in zip(shown, records, strict=True):
        drawn = np.maximum.reduce([m * i for i, m in enumerate(record["masks"], 1)], initial=0)
        np.testing.assert_array_equal(entry["truth"]["map"], np.broadcast_to(drawn, record["image"].shape[:2]))
        assert (entry["found"]["map"] > 0).sum() == (drawn > 0).sum()
    two = make(monkeypatch, InstancesConfig, records, CLASSES, hosts=2)

    two[1]._count_all = lambda made: got  # as `from_first` gives it to the other process
    assert json.dumps(on_hosts(two, knowing(records))) == json.dumps([got, got])
    assert two[1].pictured == {}


def test_objects_without_an_area_have_that_of_their_mask(monkeypatch):
    records = scenes()
    for record in records:
        del record["box_areas"]
    (evaluation,) = make(monkeypatch, InstancesConfig, records, CLASSES)
    for i, record in enumerate(records):
        assert known_of(evaluation, i).areas.tolist() == record["masks"].sum((1, 2)).tolist()


def test_masks_that_are_not_finite_and_damaged_records(monkeypatch, caplog):
    records = scenes()

    def spoil(number, out):
        if number % 2:
            out["scores"][:2], out["masks"][2, 3, 3] = np.nan, np.inf

    (evaluation,) = make(monkeypatch, InstancesConfig, records, CLASSES)
    got = evaluation.run(knowing(records, spoil=spoil))
    assert got["not_finite"] == 3 * 5
    assert 0 < got["ap"] < 1
    intact = knowing(records)
    broken = [dict(r) for r in records]
    del broken[4]["masks"]
    broken[5]["masks"] = np.zeros((len(broken[5]["boxes"]), 3, 3), bool)
    broken[6]["box_labels"] = broken[6]["box_labels"] + len(CLASSES)
    for kind, metric in ((InstancesConfig, "ap"), (PanopticConfig, "pq")):
        (evaluation,) = make(monkeypatch, kind, broken, CLASSES)
        got = evaluation.run(intact)
        assert (got["images"], got[metric]) == (8, pytest.approx(1))
    (evaluation,) = make(monkeypatch, InstancesConfig, [{"image": records[0]["image"]}], CLASSES)
    with pytest.raises(DataError, match="none of its records"):
        evaluation.run(intact)


def jittered(seed, count=40, side=160):
    """Ellipses and boxes of masks near them: missed, doubled, confused ones, some on crowds, with tied scores."""
    rng, truths, found = np.random.default_rng(seed), [], []
    y, x = np.mgrid[:side, :side]

    def ellipse(centre, radii):
        return ((x - centre[0]) / radii[0]) ** 2 + ((y - centre[1]) / radii[1]) ** 2 < 1

    for _ in range(count):
        objects = rng.integers(0, 9)
        centre, radii = rng.uniform(10, side - 10, (objects, 2)), np.exp(rng.uniform(1.5, 4.5, (objects, 2)))
        masks = [rle.encode(ellipse(*one)) for one in zip(centre, radii, strict=True)]
        labels, crowd = rng.integers(0, 5, objects), rng.random(objects) < 0.15
        area = np.array([rle.area(m) for m in masks], float)
        truths.append(Truth(np.zeros((objects, 4)), labels, crowd, area, masks))
        chosen = rng.integers(0, objects, rng.integers(0, 30)) if objects else np.zeros(0, int)
        near = [ellipse(centre[i] + rng.normal(0, 1.5, 2), radii[i] * rng.uniform(0.9, 1.1, 2)) for i in chosen]
        guess = np.where(rng.random(len(chosen)) < 0.8, labels[chosen], rng.integers(0, 5, len(chosen)))
        scores = np.round(rng.random(len(chosen)), 1)
        found.append(Found(np.zeros((len(chosen), 4)), guess, scores, [rle.encode(m) for m in near]))
    return truths, found


@pytest.mark.parametrize("seed", [0, 1])
def test_the_numbers_are_those_of_pycocotools(seed):
    truths, found = jittered(seed)
    annotations, results = [], []
    for i, (truth, one) in enumerate(zip(truths, found, strict=True)):
        for mask, label, crowd, area in zip(truth.masks, truth.labels, truth.crowd, truth.areas, strict=True):
            more = {"id": len(annotations) + 1, "image_id": i, "area": area, "bbox": coco_rle.toBbox(mask).tolist()}
            annotations.append({"segmentation": mask, "category_id": int(label), "iscrowd": int(crowd)} | more)
        for mask, label, score in zip(one.masks, one.labels, one.scores, strict=True):
            more = {"image_id": i, "category_id": int(label), "score": float(score)}
            results.append({"segmentation": mask} | more)
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = {
            "images": [{"id": i, "height": 160, "width": 160} for i in range(len(truths))],
            "annotations": annotations,
            "categories": [{"id": c, "name": str(c)} for c in range(5)],
        }
        truth.createIndex()
        counted = COCOeval(truth, truth.loadRes(results), "segm")
        counted.evaluate()
        counted.accumulate()
        counted.summarize()
    got = coco(truths, found, 5)
    np.testing.assert_allclose([got.metrics[name] for name in METRICS], counted.stats, rtol=0, atol=1e-12)
    assert 0.05 < got.metrics["ap"] < 0.95
    matched = [match(t, f)[0] for t, f in zip(truths, found, strict=True)]
    assert 0.1 < (np.concatenate(matched) >= 0).mean() < 0.9


def test_masks_lie_where_the_image_does():
    """Of an image that is mirrored and lies on a part of the canvas: as the pixels of the canvas, moved back."""
    rng = np.random.default_rng(0)
    drawn = rng.random((24, 40)) < 0.5
    image = np.repeat(np.repeat(drawn, 2, 0), 2, 1)  # 48 x 80 pixels
    picture = Picture.of(np.zeros((48, 80, 3), np.uint8))
    sample = Sample.of({}, picture, (32, 64)).resize((24, 40)).flip().crop(-4, -8, 32, 64)
    places = np.zeros((1, 32, 64), np.float16)
    places[0, 4:28, 8:48] = np.where(drawn[:, ::-1], 3, -3)
    (made,) = on_image(places, sample.placement, (48, 80))
    assert made.shape == (48, 80)
    inner = np.s_[2:-2, 2:-2]
    agree = (made > 0)[inner] == image[inner]
    assert agree.mean() > 0.95
    cropped = Sample.of({}, picture, (32, 64)).crop(0, 20, 48, 60)
    (made,) = on_image(np.ones((1, 4, 4)), cropped.placement, (48, 80))
    assert np.isneginf(made[:, :20]).all()
    np.testing.assert_allclose(made[:, 20:], 1, rtol=1e-6)
    assert isinstance(Placement.whole((3, 4)), Placement)


def test_the_truth_itself_has_quality_1_on_one_host_or_two(monkeypatch):
    records = scenes()
    (alone,) = make(monkeypatch, PanopticConfig, records, CLASSES)
    got = alone.run(knowing(records))
    assert (got["pq"], got["sq"], got["rq"]) == (1, 1, 1)
    assert got["images"] == 11
    assert got["not_finite"] == 0
    assert "pq_stuff" not in got
    classes = alone.details["classes"]
    assert [c["pq"] for c in classes] == [1, 1, 1, None]
    assert sum(c["segments"] for c in classes) == sum((~r["box_crowd"]).sum() for r in records)
    json.dumps(alone.details, allow_nan=False)
    assert len(alone.pictured["segments"]) == len(alone.pictured["worst_segments"]) == 8
    assert alone.run(knowing(records, score=0.7))["rq"] == 0  # none is sure enough

    def spoil(number, out):
        if number % 2:
            out["masks"][0, 3, 3] = np.nan

    worse = alone.run(knowing(records, spoil=spoil))
    assert worse["not_finite"] == 5
    assert 0 < worse["pq"] < 1

    two, lock, shared = make(monkeypatch, PanopticConfig, records, CLASSES, hosts=2), threading.Barrier(2), {}

    def of_all_hosts(numbers):
        shared[threading.current_thread().name] = [*numbers]
        lock.wait()
        everyone = [shared[name] for name in sorted(shared)]
        lock.wait()
        return everyone

    monkeypatch.setattr(segments, "of_all_hosts", of_all_hosts)
    assert json.dumps(on_hosts(two, knowing(records))) == json.dumps([got, got])
    assert two[1].pictured == {}


def test_things_and_stuff_have_numbers_of_their_own(monkeypatch):
    records = scenes()
    (evaluation,) = make(monkeypatch, PanopticConfig, records, CLASSES)
    evaluation.things = np.array([True, False, True, True])
    got = evaluation.run(knowing(records))
    assert got["pq_things"] == 1
    assert got["pq_stuff"] < 1  # several segments of a class of stuff become one


def on_disk(folder, numbers):
    """The same picture of 32 x 32 pixels in COCO's panoptic format, and its things in that of objects."""
    drawn = np.stack([numbers, 0 * numbers, 0 * numbers], -1).astype(np.uint8)
    for part in ("annotations/panoptic_val", "val"):
        (folder / part).mkdir(parents=True)
        Image.fromarray(drawn).save(folder / part / "0.png")
    categories = [{"id": 7, "name": "sky", "isthing": 0}, {"id": 2, "name": "car", "isthing": 1}]
    notes, info = [], []
    for number in np.setdiff1d(numbers, [0]).tolist():
        rows, columns = np.nonzero(numbers == number)
        left, top, width, height = columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1
        box = [int(v) for v in (left, top, width, height)]
        info.append({"id": number, "category_id": 7 if number == 1 else 2, "bbox": box, "iscrowd": 0})
        edges = [box[0], box[1], box[0] + box[2], box[1], box[0] + box[2], box[1] + box[3], box[0], box[1] + box[3]]
        if number > 1:
            notes.append({**info[-1], "image_id": 4, "segmentation": [edges], "area": box[2] * box[3]})
    shared = {"images": [{"id": 4, "file_name": "0.png", "height": 32, "width": 32}], "categories": categories}
    panoptic = {"annotations": [{"image_id": 4, "file_name": "0.png", "segments_info": info}]}
    for name, content in (("panoptic", panoptic), ("instances", {"annotations": notes})):
        (folder / f"annotations/{name}_val.json").write_text(json.dumps(shared | content))


def test_the_truth_is_right_in_cocos_formats(tmp_path):
    numbers = np.ones((SIDE, SIDE), int)
    numbers[4:12, 3:20], numbers[20:30, 10:31], numbers[0] = 2, 3, 0
    on_disk(tmp_path, numbers)
    sources = (
        (InstancesConfig, CocoConfig(path=str(tmp_path), split="val", masks=True), ("ap", "ar100")),
        (PanopticConfig, CocoPanopticConfig(path=str(tmp_path), split="val", truth="masks"), ("pq", "pq_stuff")),
    )
    for kind, source, metrics in sources:
        config = kind(name="own", source=source)
        run = Config(
            name="own", model=ViTConfig(image_size=SIDE, patch_size=16), task=DenseConfig(num_classes=2),
            data=DataConfig(threads=1), train=TrainConfig(batch_size=2), evals=(config,),
        )  # fmt: skip
        evaluation = config.make(run, 0, 1)
        got = evaluation.run(knowing(list(evaluation.source)))
        assert [got[name] for name in metrics] == [pytest.approx(1)] * 2, got


def test_masks_are_cut_into_segments_by_hand():
    logits = np.full((5, 1, 12), -4.0)
    logits[0, 0, :6] = 4  # whole
    logits[1, 0, 4:8] = 4  # half below the first, and so dropped
    logits[2, 0, 8:10] = 4
    logits[3, 0, 10:] = 4
    logits[4, 0, 11] = -3  # nowhere likelier than not
    labels, scores = np.array([0, 1, 2, 2, 1]), np.array([0.95, 0.9, 0.9, 0.9, 0.99])
    things = np.array([True, True, False])
    got = segments_of(logits, scores, labels, things, (1, 12), 0.8)
    assert got.map.tolist() == [[1] * 6 + [0, 0] + [2] * 4]  # stuff is one segment
    assert got.labels.tolist() == [0, 2]
    got = segments_of(logits, scores, labels, ~things, (1, 12), 0.4)
    assert got.map.tolist() == [[1] * 6 + [2, 2, 3, 3, 4, 4]]
    assert got.labels.tolist() == [0, 1, 2, 2]
    none = segments_of(logits[:0], scores[:0], labels[:0], things, (1, 12), 0.8)
    assert not none.map.any()
    assert len(none.labels) == 0


def test_the_last_mask_is_drawn_on_top():
    masks = np.zeros((2, 8, 8), bool)
    masks[0], masks[1, :4] = True, True
    got = layers(masks, np.array([5, 3]), (4, 2))
    assert got["map"].tolist() == [[2, 2], [2, 2], [1, 1], [1, 1]]
    assert got["labels"].tolist() == [5, 3]
