"""What tells measurements and weights apart."""

import dataclasses
import shutil
from importlib import resources

import jax.numpy as jnp
import pytest

from visionfm_jax.config.load import load_file
from visionfm_jax.data.tokenizer import open_tokenizer
from visionfm_jax.evals.protocol import digest_of, texts_of


def test_a_tokenizer_counts_by_its_content_wherever_it_lies(tmp_path):
    emoji = str(resources.files("visionfm_jax.data.text") / "emoji.model")
    places = [tmp_path / "captions.model", tmp_path / "run" / "tokenizer.model", tmp_path / "other" / "tokenizer.model"]
    for place in places:
        place.parent.mkdir(exist_ok=True)
        shutil.copy(emoji, place)
    with open(places[2], "ab") as file:
        file.write(b"\x9a\x06\x01\x00")  # a field that SentencePiece does not know, and skips
    one, same, other = (texts_of(open_tokenizer(str(place)), 77) for place in places)
    assert one == same != other
    assert texts_of(open_tokenizer("clip"), 77) == {"tokenizer": "clip", "context": 77}


@pytest.mark.parametrize(
    "change",
    [
        lambda config: setattr(config.model.text, "activation", "quick_gelu"),
        lambda config: setattr(config.train, "precision", "fp32"),
        lambda config: setattr(config.data.augment, "std", (0.5, 0.5, 0.5)),
        lambda config: setattr(config.task, "loss", "sigmoid"),
    ],
)
def test_weights_in_another_network_are_another_model(change):
    params = {"a": jnp.ones(3), "b": {"c": jnp.zeros((2, 2))}}
    config, other = (load_file("configs/swinv2_g_clip.py:tiny") for _ in range(2))
    assert digest_of(params, config) == digest_of({**params}, other)
    assert digest_of(params, config) != digest_of({**params, "a": jnp.zeros(3)}, config)
    change(other)
    assert digest_of(params, config) != digest_of(params, other)


def test_the_place_of_a_tokenizer_is_no_part_of_a_model(tmp_path):
    config = load_file("configs/swinv2_g_clip.py:tiny")
    digests = set()
    for name in ("a.model", "tokenizer.model"):
        shutil.copy(resources.files("visionfm_jax.data.text") / "emoji.model", tmp_path / name)
        task = dataclasses.replace(config.task, tokenizer=str(tmp_path / name))
        digests.add(digest_of({"a": jnp.ones(3)}, dataclasses.replace(config, task=task)))
    assert len(digests) == 1
