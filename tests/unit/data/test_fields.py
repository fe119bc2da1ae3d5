"""What a task wants of a record: labels and captions, and what it says of records and sources without them."""

import pickle
from types import SimpleNamespace

import numpy as np
import pytest

from visionfm_jax.config import (
    ClassificationConfig,
    ClipConfig,
    Config,
    ContrastiveConfig,
    SourceConfig,
    TextConfig,
)
from visionfm_jax.data.fields import DamagedCaption, Labels, Texts, fields_of
from visionfm_jax.data.sources import open_source
from visionfm_jax.data.tokenizer import open_tokenizer
from visionfm_jax.errors import ConfigError, DataError

DIGITS = SourceConfig(kind="bundled", path="digits")
EMOJI = SourceConfig(kind="bundled", path="twemoji")


def pairs(**text) -> Config:
    return Config(name="t", model=ClipConfig(text=TextConfig(**text)), task=ContrastiveConfig())


def test_the_task_decides():
    labels = fields_of(Config(name="t", task=ClassificationConfig(num_classes=10)))
    assert isinstance(labels, Labels)
    assert labels({"image": b"", "label": 3}) == {"label": 3}
    texts = fields_of(pairs(context=8))
    assert isinstance(texts, Texts)
    assert texts.spec == {"text": ((8,), np.int32)}
    row = texts({"image": b"", "caption": " a cat "})
    assert row["text"].tolist() == [49406, 320, 2368, 49407, 0, 0, 0, 0]
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(texts))({"caption": b"a cat"})["text"], row["text"])


@pytest.mark.parametrize(
    ("caption", "words"), [("", "empty"), (" \n", "empty"), (b"", "empty"), (b"caf\xe9", "not UTF-8")]
)
def test_captions_that_cannot_serve(caption, words):
    with pytest.raises(DamagedCaption, match=words):
        Texts(open_tokenizer("clip"), 8)({"caption": caption})


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
