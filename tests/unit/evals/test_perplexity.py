"""Perplexity of masked words against a loop, over hosts, damaged records and numbers that are not finite."""

import math
import warnings

import numpy as np
import pytest
from multimodal_fakes import Tables, make, multimodal_run
from pair_fakes import BATCH, CONTEXT, SIDE, Numbered, on_hosts

from visionfm_jax.config import PreprocessConfig
from visionfm_jax.errors import ConfigError, DataError
from visionfm_jax.evals.eval import check_best_metric
from visionfm_jax.evals.kinds import CaptioningConfig, PerplexityConfig, ReconstructionConfig
from visionfm_jax.tasks.classification import ClassificationConfig

COUNT = 19
TEXTS = [f"cat {i}" for i in range(COUNT)]


def known(seed=0):
    rng = np.random.default_rng(seed)
    words = rng.integers(1, 9, COUNT)
    nll = (words * rng.uniform(0.5, 1.5, COUNT)).astype(np.float32)
    return Tables(nll=nll, nll_without_image=nll + words.astype(np.float32), words=words.astype(np.int32))


def by_hand(model, rows):
    nll, without, words = (sum(float(model.tables[k][i]) for i in rows) for k in ("nll", "nll_without_image", "words"))
    return math.exp(nll / words), math.exp(without / words), words


def test_numbers_are_those_of_a_loop(monkeypatch):
    (evaluation,) = make(monkeypatch, Numbered(TEXTS), kind=PerplexityConfig)
    model = known()
    got = evaluation.run(model)
    perplexity, without, words = by_hand(model, range(COUNT))
    assert got["perplexity"] == pytest.approx(perplexity)
    assert got["perplexity_without_image"] == pytest.approx(without)
    assert got["image_gain"] == pytest.approx(without / perplexity) == pytest.approx(math.e)  # one nat a word
    assert (got["words"], got["texts"]) == (words, COUNT)
    assert evaluation.config.metrics == ("image_gain",)
    shapes = {"image": (BATCH, SIDE, SIDE, 3), "text": (BATCH, CONTEXT), "record": (BATCH,), "mask": (BATCH,)}
    for what, seen in model.asked:
        assert what == "masked_language"
        assert seen.items() >= shapes.items()


def test_two_hosts_agree_with_one(monkeypatch):
    model = known()
    (alone,) = make(monkeypatch, Numbered(TEXTS), kind=PerplexityConfig)
    wanted = alone.run(model)
    two = make(monkeypatch, Numbered(TEXTS), 2, kind=PerplexityConfig)
    assert on_hosts(two, model) == [wanted, wanted]
    assert two[0].details == two[1].details == alone.details


def test_damaged_records_and_captions_are_left_out(monkeypatch):
    captions = [*TEXTS]
    captions[5], captions[7] = " ", (b"cat 7", "another")
    (evaluation,) = make(monkeypatch, Numbered(captions, damaged={2}), kind=PerplexityConfig)
    model = known()
    got = evaluation.run(model)
    perplexity, _, words = by_hand(model, set(range(COUNT)) - {2, 5})
    assert got["perplexity"] == pytest.approx(perplexity)
    assert (got["words"], got["texts"]) == (words, COUNT - 2)


def test_numbers_that_are_not_finite_show(monkeypatch):
    (evaluation,) = make(monkeypatch, Numbered(TEXTS), kind=PerplexityConfig)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = known()
        model.tables["nll"][3] = np.nan
        got = evaluation.run(model)
        assert math.isnan(got["perplexity"])
        assert math.isnan(got["image_gain"])
        assert math.isfinite(got["perplexity_without_image"])
        model = known()
        for name in ("nll", "nll_without_image"):
            model.tables[name] += 1000 * model.tables["words"]
        got = evaluation.run(model)
        assert got["perplexity"] == got["perplexity_without_image"] == math.inf
        assert got["image_gain"] == pytest.approx(math.e, rel=1e-3)  # of inf and inf, as the sums are finite
        none = evaluation.run(Tables(nll=[0.0], nll_without_image=[0.0], words=[0]))
        assert math.isnan(none["perplexity"])
        assert math.isnan(none["image_gain"])


def test_protocol_tells_what_was_measured(monkeypatch):
    (one,) = make(monkeypatch, Numbered(TEXTS), kind=PerplexityConfig)
    (again,) = make(monkeypatch, Numbered(TEXTS), kind=PerplexityConfig, batch_size=16)
    (other,) = make(monkeypatch, Numbered(TEXTS[1:]), kind=PerplexityConfig)
    int(one.protocol, 16)
    assert one.protocol == again.protocol != other.protocol
    for other in ({"crop": 1.0}, {"resize": "squash"}, {"interpolation": "bilinear"}):
        (seen,) = make(monkeypatch, Numbered(TEXTS), kind=PerplexityConfig, preprocess=PreprocessConfig(**other))
        assert seen.protocol != one.protocol
    assert one.settings["tokenizer"] == "emoji"


@pytest.mark.parametrize("kind", [PerplexityConfig, CaptioningConfig])
def test_sources_without_captions_are_refused(monkeypatch, kind):
    with pytest.raises(
        DataError, match=rf"config.evals\[0\]: numbers from 0 has no captions, which {kind.kind}.*set caption_key"
    ):
        make(monkeypatch, Numbered(None, labels=[0, 1]), kind=kind)


@pytest.mark.parametrize("kind", [PerplexityConfig, CaptioningConfig, ReconstructionConfig])
def test_a_run_of_another_task_is_refused(kind):
    run = multimodal_run(kind=kind)
    run.task = ClassificationConfig()
    line = rf"config.evals\[0\] = '{kind.kind}': measures the {kind.measures} of a task, and Classification"
    with pytest.raises(ConfigError, match=line):
        run.validate()


def test_best_metric_is_one_of_which_higher_is_better():
    run = multimodal_run(kind=PerplexityConfig)
    run.checkpoint.keep_best, run.checkpoint.best_metric = 1, "held_out/image_gain"
    check_best_metric(run)
    run.checkpoint.best_metric = "held_out/perplexity"
    with pytest.raises(ConfigError, match="set held_out/image_gain"):
        check_best_metric(run)
