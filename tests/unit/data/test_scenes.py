"""Scenes of bundled emoji: the same everywhere, and all that is known of them true to the pixel."""

import math
import pickle
import zlib

import numpy as np
import pytest

from visionfm_jax.data.sources import open_source
from visionfm_jax.data.sources.bundled import read_set
from visionfm_jax.data.sources.kinds import ScenesConfig
from visionfm_jax.data.sources.scenes import ANGLES, UNIT, ScenesSource
from visionfm_jax.errors import DataError


def opened(**change) -> ScenesSource:
    return open_source(ScenesConfig(**{"path": "noto", "truth": "masks"} | change))


def test_scenes_are_the_same_everywhere():
    """Of bytes that were computed once: another machine or version that gives others changes every result."""
    crc = [zlib.crc32(opened(path=path, split=split)[7]["image"]) for path, split in KNOWN]
    assert crc == list(KNOWN.values())
    fractions = [f(2 * math.pi * k / ANGLES) * 2**UNIT % 1 for k in range(ANGLES) for f in (math.cos, math.sin)]
    assert min(abs(x - 0.5) for x in fractions) > 1e-3  # so that no rounding depends on the last digit of a cosine


KNOWN = {("noto", "train"): 3823062966, ("noto", "test"): 1852409596, ("twemoji", "train"): 3419411819}


def test_what_is_known_is_true():
    source, maps = opened(scenes=40), opened(scenes=40, truth="class_map")
    labels = []
    for i in range(40):
        record, other = source[i], maps[i]
        np.testing.assert_array_equal(record["image"], other["image"])
        assert record["image"].shape == (128, 128, 3)
        masks = record["masks"]
        assert masks.sum(0).max(initial=0) <= 1  # what is seen of objects does not overlap
        for mask, box, area in zip(masks, record["boxes"], record["box_areas"], strict=True):
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            assert box.tolist() == [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
            assert area == mask.sum() >= 30
        classes = np.full((128, 128), 9)
        for mask, label in zip(masks, record["box_labels"], strict=True):
            classes[mask] = label
        np.testing.assert_array_equal(other["class_map"], classes)
        labels += record["box_labels"].tolist()
    assert len(labels) > 100
    assert set(labels) == set(range(9))
    assert source.class_names == (*maps.class_names[:-1],)
    assert maps.class_names[-1] == "background"


def test_a_scene_depends_on_seed_split_and_number_alone():
    source = opened()
    assert np.array_equal(pickle.loads(pickle.dumps(source))[5]["image"], source[5]["image"])
    assert np.array_equal(opened(scenes=6)[5]["image"], source[5]["image"])
    others = [source[6], opened(seed=1)[5], opened(split="test")[5], opened(path="twemoji")[5]]
    assert not any(np.array_equal(other["image"], source[5]["image"]) for other in others)
    assert opened(seed=1).fingerprint() != source.fingerprint()


@pytest.mark.parametrize("path", ["noto", "twemoji"])
def test_held_out_scenes_show_no_concept_of_training(path):
    arrays, _ = read_set(path)
    shown = [
        {int(arrays["concept"][row]) for rows in opened(path=path, split=split)._rows for row in rows}
        for split in ("train", "test")
    ]
    assert all(shown)
    assert not shown[0] & shown[1]


@pytest.mark.parametrize(
    ("change", "words"),
    [({"path": "digits"}, "noto or twemoji"), ({"split": "val"}, "no such split; the splits are train, test")],
)
def test_scenes_that_there_are_not(change, words):
    with pytest.raises(DataError, match=words):
        opened(**change)
