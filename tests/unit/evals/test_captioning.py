"""Captions that a model writes: scores, hosts, several references, what is kept and shown."""

import json

import numpy as np
import pytest
from multimodal_fakes import Tables, make
from pair_fakes import BATCH, CONTEXT, SIDE, Numbered, on_hosts

from visionfm_jax.data.tokenizer import open_tokenizer
from visionfm_jax.evals import captioning
from visionfm_jax.evals.caption_metrics import bleu4, cider, exact
from visionfm_jax.evals.kinds import CaptioningConfig
from visionfm_jax.models.generate import Decoding

COUNT = 19
TRUE = [("red cat", "cat that is red"), b"the blue dog, Animals", "person: dark skin tone"]
CAPTIONS = [TRUE[i % 3] if i % 4 else f"flag: number {i}" for i in range(COUNT)]
WRITTEN = ["cat that is red", "the blue cat, Animals", "person: dark skin tone", "flag"]


def known():
    tokenizer = open_tokenizer("emoji")
    return Tables(generated=np.stack([tokenizer(WRITTEN[i % 4], CONTEXT) for i in range(COUNT)]))


def references(i):
    captions = CAPTIONS[i] if isinstance(CAPTIONS[i], tuple) else (CAPTIONS[i],)
    return tuple(c.decode() if isinstance(c, bytes) else c for c in captions)


def test_scores_are_those_of_the_texts_and_all_their_references(monkeypatch):
    (evaluation,) = make(monkeypatch, Numbered(CAPTIONS), kind=CaptioningConfig)
    model = known()
    got = evaluation.run(model)
    texts, known_ones = [WRITTEN[i % 4] for i in range(COUNT)], [references(i) for i in range(COUNT)]
    assert got == {
        "exact": exact(texts, known_ones),
        "bleu4": bleu4(texts, known_ones),
        "cider": cider(texts, known_ones),
        "images": COUNT,
    }
    assert 0 < got["exact"] < 1
    assert set(CaptioningConfig.metrics) < set(got)
    shapes = {"image": (BATCH, SIDE, SIDE, 3), "mask": (BATCH,), "record": (BATCH,)}
    assert model.asked == [(Decoding("greedy"), shapes)] * 3


def test_two_hosts_agree_with_one(monkeypatch):
    model = known()
    (alone,) = make(monkeypatch, Numbered(CAPTIONS), kind=CaptioningConfig)
    wanted = alone.run(model)
    two = make(monkeypatch, Numbered(CAPTIONS), 2, kind=CaptioningConfig)
    assert on_hosts(two, model) == [wanted, wanted]
    assert two[1].pictured == {}
    np.testing.assert_equal(two[0].pictured, alone.pictured)
    assert two[0].details == two[1].details == alone.details


@pytest.mark.parametrize("decoding", [Decoding("greedy"), Decoding("beam", beams=3), Decoding("nucleus", top_p=0.5)])
def test_the_configured_decoding_is_asked_for_and_part_of_the_protocol(monkeypatch, decoding):
    settings = {"kind": CaptioningConfig, "decoding": decoding.method, "beams": 3, "top_p": 0.5}
    (evaluation,) = make(monkeypatch, Numbered(CAPTIONS), **settings)
    model = known()
    evaluation.run(model)
    assert {what for what, _ in model.asked} == {decoding}
    (other,) = make(monkeypatch, Numbered(CAPTIONS), **(settings | {"beams": 5}))
    assert (other.protocol != evaluation.protocol) == (decoding.method == "beam")


def test_damaged_records_are_left_out_and_captions_that_cannot_be_read_are_no_references(monkeypatch):
    captions = [*CAPTIONS]
    captions[3], captions[4], captions[5] = (" ", b"\xff"), (), ("", b"\xff", "the blue cat, Animals")
    (evaluation,) = make(monkeypatch, Numbered(captions, damaged={2}), kind=CaptioningConfig)
    assert evaluation.run(known())["images"] == COUNT - 3
    kept = {c["record"]: c for c in evaluation.details["captions"]}
    assert set(kept) == {str(i) for i in range(COUNT)} - {"2", "3", "4"}
    assert kept["5"] == {
        "record": "5",
        "generated": "the blue cat, Animals",
        "references": ["the blue cat, Animals"],
    }


def test_first_captions_are_kept_and_spread_ones_shown(monkeypatch):
    monkeypatch.setattr(captioning, "KEPT", 7)
    (evaluation,) = make(monkeypatch, Numbered(CAPTIONS), kind=CaptioningConfig)
    evaluation.run(known())
    kept = json.loads(json.dumps(evaluation.details, allow_nan=False))
    assert [c["record"] for c in kept["captions"]] == [str(i) for i in range(7)]
    assert kept["protocol"] == evaluation.protocol
    shown = evaluation.pictured["generated"]
    numbers = [int(s["image"][0, 0, 0]) for s in shown]
    assert (numbers[0], numbers[-1], len(numbers)) == (0, COUNT - 1, 12)
    for number, one in zip(numbers, shown, strict=True):
        assert one["generated"] == WRITTEN[number % 4]
        assert one["caption"] == references(number)[0]
        assert one["right"] == (one["generated"] in references(number))


def test_a_model_that_says_nothing_scores_nothing(monkeypatch):
    (evaluation,) = make(monkeypatch, Numbered(CAPTIONS), kind=CaptioningConfig)
    got = evaluation.run(Tables(generated=np.array([[1, 2] + [0] * (CONTEXT - 2)], np.int32)))
    assert [got[name] for name in CaptioningConfig.metrics] == [0, 0, 0]
