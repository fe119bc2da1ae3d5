"""Our CLIP tokenizer against OpenCLIP's, frozen by `make_tokens.py`."""

import json
from pathlib import Path

import numpy as np

from visionfm_jax.data.tokenizer import open_tokenizer

REFERENCE = json.loads((Path(__file__).parent / "clip_tokens.json").read_text())
SPECIAL = "<start_of_text> a <end_of_text"  # the one difference, see below


def test_ids_equal_open_clips():
    tokenizer = open_tokenizer("clip")
    assert (tokenizer.vocab_size, tokenizer.begin, tokenizer.end) == (49408, 49406, 49407)
    assert len(REFERENCE["ids"]) > 100
    for text, ids in REFERENCE["ids"].items():
        if text != SPECIAL:
            row = tokenizer(text, 77)
            assert row.dtype == np.int32
            np.testing.assert_array_equal(row, ids + [0] * (77 - len(ids)), err_msg=repr(text))


def test_special_tokens_in_a_caption_are_text():
    """There they are the tokens of begin and end, in the middle of the text."""
    tokenizer = open_tokenizer("clip")
    assert REFERENCE["ids"][SPECIAL].count(tokenizer.begin) == 2
    row = tokenizer(f"{SPECIAL}> b", 77)
    assert np.flatnonzero(row == tokenizer.begin).tolist() == [0]
    assert np.flatnonzero(row == tokenizer.end).tolist() == [np.flatnonzero(row)[-1]]
