"""Reconstructed images: errors, the flat colour beside them, hosts, what is shown."""

import json
import math
import warnings

import numpy as np
import pytest
from multimodal_fakes import Tables, make
from pair_fakes import BATCH, SIDE, Numbered, on_hosts

from visionfm_jax.evals import reconstruction
from visionfm_jax.evals.kinds import ReconstructionConfig
from visionfm_jax.evals.reconstruction import mean_colour_error, whole_units

COUNT = 19


class Pictures(Numbered):
    """Numbered images of more than one colour."""

    def __init__(self, **settings):
        super().__init__(None, labels=[0] * COUNT, **settings)
        self.images = np.random.default_rng(0).integers(0, 255, (COUNT, SIDE, SIDE, 3), np.uint8)
        self.images[:, 0, 0, 0] = np.arange(COUNT)

    def __getitem__(self, i):
        record = super().__getitem__(i)
        return record if isinstance(record["image"], bytes) else {**record, "image": self.images[i]}


def known(seed=0):
    rng = np.random.default_rng(seed)
    hidden = np.zeros((COUNT, 4), bool)
    hidden[:, :2] = True
    return Tables(
        pixel_error=rng.uniform(0.1, 0.3, COUNT).astype(np.float32),
        hidden=rng.permuted(hidden, axis=1).reshape(COUNT, 2, 2),
        reconstruction=rng.integers(0, 255, (COUNT, SIDE, SIDE, 3), np.uint8),
    )


def flat_by_hand(image, hidden, std):
    seen, rest = [], []
    for y in range(SIDE):
        for x in range(SIDE):
            (rest if hidden[y // 2, x // 2] else seen).append(image[y, x] / 255 / std)
    return np.mean([abs(pixel - np.mean(seen, 0)) for pixel in rest])


def test_errors_are_means_over_all_images_and_flat_colour_is_measured_alike(monkeypatch):
    (evaluation,) = make(monkeypatch, source := Pictures(), kind=ReconstructionConfig)
    model = known()
    got = evaluation.run(model)
    errors = model.tables["pixel_error"].astype(np.float64)
    assert got["pixel_error"] == pytest.approx(errors.mean())
    assert got["images"] == COUNT
    chosen = np.linspace(0, COUNT - 1, BATCH).astype(int)
    std = np.array(evaluation.run_config.data.augment.std)
    flat = np.mean([flat_by_hand(source.images[i], model.tables["hidden"][i], std) for i in chosen])
    assert got["mean_colour_error"] == pytest.approx(flat)
    assert got["colour_gain"] == pytest.approx(flat / errors[chosen].mean())
    assert evaluation.config.metrics == ("colour_gain",)
    shapes = {"image": (BATCH, SIDE, SIDE, 3), "mask": (BATCH,), "record": (BATCH,)}
    small = {k: v for k, v in shapes.items() if k != "mask"}
    assert model.asked == [*[("masked_image", shapes)] * 3, ("reconstruct", small)]
    json.dumps(evaluation.details, allow_nan=False)


def test_two_hosts_agree_with_one(monkeypatch):
    model = known()
    (alone,) = make(monkeypatch, Pictures(), kind=ReconstructionConfig)
    wanted = alone.run(model)
    two = make(monkeypatch, Pictures(), 2, kind=ReconstructionConfig)
    assert on_hosts(two, model) == [wanted, wanted]
    assert two[1].pictured == {}
    np.testing.assert_equal(two[0].pictured, alone.pictured)
    assert two[0].details == two[1].details == alone.details


def test_shown_are_image_what_was_seen_and_what_was_reconstructed(monkeypatch):
    (evaluation,) = make(monkeypatch, source := Pictures(damaged={0, 5}), kind=ReconstructionConfig)
    model = known()
    assert evaluation.run(model)["images"] == COUNT - 2
    shown = evaluation.pictured["reconstructed"]
    records = shown["image"][:, 0, 0, 0]
    assert len(records) == 8
    assert not {0, 5} & set(records.tolist())
    np.testing.assert_array_equal(shown["image"], source.images[records])
    np.testing.assert_array_equal(shown["reconstruction"], model.tables["reconstruction"][records])
    np.testing.assert_array_equal(shown["error"], model.tables["pixel_error"][records])
    hidden = whole_units(model.tables["hidden"][records], SIDE)
    assert (shown["seen"][hidden] == reconstruction.GREY).all()
    np.testing.assert_array_equal(shown["seen"][~hidden], shown["image"][~hidden])


@pytest.mark.parametrize("batch_size", [16, 128])
def test_the_sample_is_one_small_batch_that_all_devices_share(monkeypatch, batch_size):
    (evaluation,) = make(monkeypatch, Pictures(), kind=ReconstructionConfig, batch_size=batch_size)
    model = known()
    got = evaluation.run(model)
    assert model.asked[-1][1]["record"] == (min(batch_size, 64),)  # which 8 devices divide
    assert got["mean_colour_error"] > 0
    assert len(evaluation.pictured["reconstructed"]["image"]) == 8


def test_numbers_that_are_not_finite_show(monkeypatch):
    (evaluation,) = make(monkeypatch, Pictures(), kind=ReconstructionConfig)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = known()
        model.tables["pixel_error"][0] = np.nan
        got = evaluation.run(model)
        assert math.isnan(got["pixel_error"])
        assert math.isnan(got["colour_gain"])
        model = known()
        model.tables["hidden"][:] = False
        assert math.isnan(evaluation.run(model)["mean_colour_error"])
        model = known()
        model.tables["pixel_error"][:] = 0
        assert evaluation.run(model)["colour_gain"] == math.inf
        json.dumps(evaluation.details, allow_nan=False)


def test_a_flat_image_is_filled_rightly_with_its_colour():
    images = np.full((1, 4, 4, 3), 77, np.uint8)
    hidden = np.array([[[True, False], [False, False]]])
    assert mean_colour_error(images, hidden, (0.2, 0.2, 0.2)) == pytest.approx(0)
    images[0, :2, :2] = 77 + 51  # 0.2 of 255: one unit
    assert mean_colour_error(images, hidden, (0.2, 0.2, 0.2)) == pytest.approx(1)
