"""The pictures that come with the package: complete, right side up, and split so that no test picture is trained on."""

import io
import pickle
from collections import Counter
from importlib import resources

import curate
import numpy as np
import pytest
from PIL import Image

from visionfm_jax.data.sources import open_source
from visionfm_jax.data.sources.bundled import BundledSource, set_names
from visionfm_jax.data.sources.kinds import BundledConfig
from visionfm_jax.errors import DataError

EMOJI = ("twemoji", "noto")
SIZES = {
    ("digits", "train"): 4000,
    ("digits", "test"): 1000,
    ("twemoji", "train"): 3183,
    ("twemoji", "test"): 402,
    ("twemoji", "combinations"): 364,
    ("noto", "train"): 3045,
    ("noto", "test"): 400,
    ("noto", "combinations"): 331,
}


def opened(name: str, split: str) -> BundledSource:
    return open_source(BundledConfig(path=name, split=split))


def pixels(source: BundledSource, index: int) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(source[index]["image"])).convert("RGB"))


def records(name: str, split: str) -> list[dict]:
    source = opened(name, split)
    return [source.record(i) for i in range(len(source))]


def test_sets_and_sizes():
    assert set_names() == ("digits", "noto", "twemoji")
    assert {key: len(opened(*key)) for key in SIZES} == SIZES


def test_whole_folder_is_at_most_8_mb_and_credits_every_package():
    files = list(resources.files("visionfm_jax.data.bundled").iterdir())
    assert sum(len(f.read_bytes()) for f in files if f.is_file()) <= curate.MAX_BYTES
    text = next(f for f in files if f.name == "CREDITS.md").read_text()
    for package in curate.PACKAGES.values():
        assert f"`{package.name}` {package.version}" in text


@pytest.mark.parametrize(("split", "each"), [("train", 400), ("test", 100)])
def test_digits_have_equally_many_of_every_class(split, each):
    source = opened("digits", split)
    assert Counter(source[i]["label"] for i in range(len(source))) == dict.fromkeys(range(10), each)
    assert source.num_classes == 10
    assert source.class_names == tuple("0123456789")


@pytest.mark.parametrize(("name", "split"), SIZES)
def test_rows_are_not_sorted_by_class(name, split):
    source = opened(name, split)
    labels = np.array([source[i]["label"] for i in range(len(source))])
    if split != "combinations":  # people only
        assert set(labels[:200]) == set(labels)
    assert (
        np.diff([int(source.record(i)["key"].strip(".png").split(":")[-1].split("-")[0], 16) for i in range(50)]) < 0
    ).any()


@pytest.mark.parametrize("name", ["digits", *EMOJI])
def test_no_picture_is_in_two_splits(name):
    seen: dict[bytes, str] = {}
    for split in (s for n, s in SIZES if n == name):
        source = opened(name, split)
        for i in range(len(source)):
            image = pixels(source, i)
            assert image.shape == ((28, 28, 3) if name == "digits" else (64, 64, 3))
            assert image.std() > 0, source.key(i)
            assert seen.setdefault(image.tobytes(), split) == split, source.key(i)


def test_test_concepts_of_either_hand_are_trained_on_by_neither():
    trained = {r["concept"] for name in EMOJI for s in ("train", "combinations") for r in records(name, s)}
    tested = {r["concept"] for name in EMOJI for r in records(name, "test")}
    assert not trained & tested
    assert 150 < len(tested) < 250


@pytest.mark.parametrize("name", EMOJI)
def test_every_group_has_a_tenth_of_its_concepts_in_test(name):
    train = Counter(g for _, g in {(r["concept"], r["group"]) for r in records(name, "train")})
    test = Counter(g for _, g in {(r["concept"], r["group"]) for r in records(name, "test")})
    assert len(train) == opened(name, "train").num_classes == 9
    assert all(0.07 < test[g] / (test[g] + train[g]) < 0.14 for g in train), (train, test)


def test_combinations_have_a_known_concept_and_a_known_tone_but_not_together():
    trained = [r for name in EMOJI for r in records(name, "train")]
    concepts, tones = {r["concept"] for r in trained}, {t for r in trained for t in r["skin_tone"]}
    together = {(r["concept"], t) for r in trained for t in r["skin_tone"][:1]}
    for name in EMOJI:
        for r in records(name, "combinations"):
            assert r["concept"] in concepts
            assert set(r["skin_tone"]) <= tones
            assert (r["concept"], r["skin_tone"][0]) not in together
    assert tones == set(curate.SKIN_TONES)


@pytest.mark.parametrize("name", EMOJI)
def test_every_picture_has_its_own_caption(name):
    every = [r for n, s in SIZES if n == name for r in records(name, s)]
    assert len({r["name"] for r in every}) == len(every)
    assert all(r["keywords"] and all(isinstance(k, str) for k in r["keywords"]) for r in every)


def test_record_of_a_mixed_pair():
    found = [
        r
        for s in ("train", "combinations")
        for r in records("twemoji", s)
        if r["key"].startswith("1faf1-1f3fb-200d-1faf2-1f3ff")
    ]
    (record,) = found
    assert record["name"] == "handshake: light skin tone, dark skin tone"
    assert (record["concept"], record["group"]) == ("handshake", "People & Body")
    assert record["skin_tone"] == ["light skin tone", "dark skin tone"]
    assert "agreement" in record["keywords"]


@pytest.mark.parametrize(("name", "split", "key", "colour"), [
    ("twemoji", "train", "2764.png", (221, 46, 68)),  # red heart
    ("noto", "train", "1f7e6.png", (25, 118, 210)),  # blue square
])  # fmt: skip
def test_colours_and_white_background(name, split, key, colour):
    source = opened(name, split)
    (index,) = [i for i in range(len(source)) if source.key(i) == key]
    image = pixels(source, index).astype(int)
    assert np.abs(image[32, 32] - colour).max() < 25
    assert image[0, 0].min() > 235  # transparent corners are white, not black


@pytest.mark.parametrize("name", EMOJI)
def test_no_black_halos(name):
    source = opened(name, "train")
    borders = np.stack([pixels(source, i)[[0, -1], ::9] for i in range(300)])
    assert (borders.max(axis=-1) < 40).mean() < 0.02


def test_pickled_source_is_small_and_gives_the_same_records():
    source = opened("twemoji", "test")
    assert source[0] == source[0]
    copy = pickle.loads(pickle.dumps(source))
    assert len(pickle.dumps(source)) < 50_000
    assert (copy[17], copy.record(17), copy.name) == (source[17], source.record(17), source.name)


def test_records_end_where_the_split_ends():
    source = opened("digits", "test")
    for index in (-1, 1000):
        with pytest.raises(IndexError, match=r"digits/test: record -?\d+ of 1000"):
            source[index]


@pytest.mark.parametrize(("name", "split", "message"), [
    ("mnist", "train", "bundled set 'mnist' does not exist; the sets are digits, noto, twemoji"),
    ("digits", "val", "bundled digits/val: no such split; the splits are train, test"),
    ("noto", "", "bundled noto/: no such split; the splits are train, test, combinations"),
])  # fmt: skip
def test_errors(name, split, message):
    with pytest.raises(DataError) as error:
        opened(name, split)
    assert str(error.value) == message
