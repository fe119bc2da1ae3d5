"""What a task wants of a record: labels and captions, and what it says of records and sources without them."""

import pickle
from types import SimpleNamespace

import numpy as np
import pytest

from visionfm_jax.config import Config
from visionfm_jax.data.fields import Labels, Objects, OptionalTexts, Texts
from visionfm_jax.data.sources import open_source
from visionfm_jax.data.sources.kinds import BundledConfig
from visionfm_jax.data.sources.record import DamagedRecord
from visionfm_jax.data.tokenizer import open_tokenizer
from visionfm_jax.errors import ConfigError, DataError
from visionfm_jax.models.aurora import AuroraConfig
from visionfm_jax.models.backbones.vit import ViTConfig
from visionfm_jax.models.clip import ClipConfig
from visionfm_jax.models.decoder import DecoderConfig
from visionfm_jax.models.text import TextConfig
from visionfm_jax.tasks import multimodal as multimodal_task
from visionfm_jax.tasks.classification import ClassificationConfig
from visionfm_jax.tasks.contrastive import ContrastiveConfig
from visionfm_jax.tasks.multimodal import MultimodalConfig

DIGITS = BundledConfig(path="digits")
EMOJI = BundledConfig(path="twemoji")


def pairs(**text) -> Config:
    return Config(name="t", model=ClipConfig(text=TextConfig(**text)), task=ContrastiveConfig())


def fields_of(config: Config):
    return config.task.fields(config)


def test_the_task_decides():
    labels = fields_of(Config(name="t", model=ViTConfig(), task=ClassificationConfig(num_classes=10)))
    assert isinstance(labels, Labels)
    assert labels({"image": b"", "label": 3}) == {"label": 3}
    texts = fields_of(pairs(context=8))
    assert isinstance(texts, Texts)
    assert texts.spec == {"text": ((8,), np.int32), "truncated": ((), np.int32)}
    row = texts({"image": b"", "caption": " a cat "})
    assert row["text"].tolist() == [49406, 320, 2368, 49407, 0, 0, 0, 0]
    assert row["truncated"] == 0
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(texts))({"caption": b"a cat"})["text"], row["text"])


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({}, "it has no box_labels and no boxes"),
        ({"boxes": np.zeros((1, 4)), "box_labels": ["cat"]}, r"are \['cat'\], not integers from 0 to 2"),
        ({"boxes": np.zeros((1, 4)), "box_labels": [[1]]}, r"are \[\[1\]\], not integers"),
        ({"boxes": np.zeros((1, 4)), "box_labels": [0.5]}, "not integers"),
        ({"boxes": np.zeros((1, 4)), "box_labels": [2**40]}, "not integers"),
    ],
)
def test_objects_that_are_none(record, words):
    with pytest.raises(DamagedRecord, match=words):
        Objects(3, 2)(record)


@pytest.mark.parametrize(
    ("caption", "words"),
    [
        (None, "the caption is of type NoneType, and must be str or bytes"),
        (["a cat"], "the caption is of type list"),
        ((3,), "the caption is of type int"),
        ("", "empty"),
        (" \n", "empty"),
        (b"", "empty"),
        (bytes(4), "empty"),
        ("\0\u200b\u2028", "empty"),
        (b"caf\xe9", "not UTF-8"),
    ],
)
def test_captions_that_cannot_serve(caption, words):
    with pytest.raises(DamagedRecord, match=words):
        Texts(open_tokenizer("clip"), 8)({"caption": caption})


@pytest.mark.parametrize(("caption", "truncated"), [("a b c d e", 0), ("a b c d e f", 0), ("a b c d e f g", 1)])
def test_captions_that_do_not_fit_are_marked(caption, truncated):
    assert Texts(open_tokenizer("clip"), 8)({"caption": caption})["truncated"] == truncated


@pytest.mark.parametrize("label", [-1, 3, 2**40, 1.0, np.float32(1), "1", None])
def test_labels_that_are_no_class_are_damaged(label):
    with pytest.raises(DamagedRecord, match=r"its label is .*, which is no integer from 0 to 2"):
        Labels(3)({"image": b"", "label": label})
    assert Labels(3)({"image": b"", "label": np.int64(2)}) == {"label": 2}


def test_one_of_several_captions_is_drawn():
    tokenizer = open_tokenizer("clip")
    texts, captions = Texts(tokenizer, 8), ("one", b"two", "three")
    own = [tokenizer(text, 8).tolist() for text in ("one", "two", "three")]
    assert texts({"caption": captions})["text"].tolist() == own[0]
    drawn = [texts({"caption": captions}, np.random.default_rng(i))["text"].tolist() for i in range(60)]
    counts = [drawn.count(text) for text in own]
    assert sum(counts) == 60
    assert min(counts) > 8
    assert texts({"caption": captions}, np.random.default_rng(7))["text"].tolist() == drawn[7]
    with pytest.raises(DamagedRecord, match="no caption"):
        texts({"caption": ()})


def test_captions_may_be_optional():
    texts = OptionalTexts(open_tokenizer("clip"), 8)
    assert texts.spec == Texts(texts.tokenizer, 8).spec
    row = texts({"image": b""}, np.random.default_rng(0))
    assert (row["text"].tolist(), row["truncated"]) == ([0] * 8, 0)
    assert texts({"caption": "a cat"})["text"].tolist() == [49406, 320, 2368, 49407, 0, 0, 0, 0]
    texts.check(open_source(DIGITS))
    texts.check(open_source(EMOJI))


def multimodal(monkeypatch, mask: int | None = 4, **text) -> Config:
    """A run whose tokenizer has 100 entries, and 1, 2 and `mask` for begin, end and mask."""
    found = SimpleNamespace(name="words.model", vocab_size=100, begin=1, end=2, mask=mask)
    monkeypatch.setattr(multimodal_task, "open_tokenizer", {"words.model": found}.__getitem__)
    return Config(
        name="t",
        model=AuroraConfig(text=DecoderConfig(**{"vocab_size": 100, "context": 8, **text})),
        task=MultimodalConfig(tokenizer="words.model"),
    )


def test_a_multimodal_task_takes_captions_where_there_are_any(monkeypatch):
    texts = fields_of(multimodal(monkeypatch))
    assert isinstance(texts, OptionalTexts)
    assert texts.length == 8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mask": None}, "config.task.tokenizer = 'words.model': has no mask token.*data.tokenizer train`"),
        ({"vocab_size": 101}, "vocab_size = 101: words.model has 100 entries; set it to 100$"),
        ({"vocab_size": 99}, "vocab_size = 99: words.model has 100 entries; set it to 100$"),
        ({"begin_token": 5}, "begin_token = 5: words.model begins a text by 1; set it to 1"),
        ({"end_token": 5}, "end_token = 5: words.model ends a text by 2; set it to 2"),
        ({"mask": 5}, "mask_token = 4: words.model masks a word by 5; set it to 5"),
    ],
)
def test_a_tokenizer_that_is_not_the_decoders(monkeypatch, change, message):
    with pytest.raises(ConfigError, match=message):
        fields_of(multimodal(monkeypatch, **change))


def test_sources_without_what_the_task_learns_from():
    texts = Texts(open_tokenizer("clip"), 8)
    texts.check(open_source(EMOJI))
    with pytest.raises(DataError, match=r"bundled digits/train has no captions.*set caption_key, or another source"):
        texts.check(open_source(DIGITS))
    Labels(10).check(open_source(DIGITS))
    with pytest.raises(DataError, match=r"labels up to 9, but config.task.num_classes = 9; set it to 10"):
        Labels(9).check(open_source(DIGITS))
    with pytest.raises(DataError, match=r"tars has no labels.*set label_key, or another source"):
        Labels(9).check(SimpleNamespace(name="tars", num_classes=0))


def test_a_tokenizer_that_is_not_the_text_towers():
    with pytest.raises(ConfigError, match=r"vocab_size = 49000: .* has 49408 entries; set it to 49408 or more"):
        fields_of(pairs(vocab_size=49_000, end_token=48_999))
    with pytest.raises(ConfigError, match=r"end_token = 5: .* ends a text by 49407; set it to 49407"):
        fields_of(pairs(end_token=5))
