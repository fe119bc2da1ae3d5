"""The retrieval eval over several sources, hosts and damaged records, against embeddings from a table."""

import json

import numpy as np
import pytest
from pair_fakes import BATCH, CONTEXT, Model, Numbered, contrastive_run, on_hosts, unit
from test_metrics import naive_ranks

from visionfm_jax.config import PreprocessConfig
from visionfm_jax.data.sources.kinds import BundledConfig, TfdsConfig
from visionfm_jax.data.tokenizer import open_tokenizer
from visionfm_jax.errors import ConfigError, DataError
from visionfm_jax.evals import base
from visionfm_jax.evals.eval import check_best_metric, make_evals
from visionfm_jax.evals.kinds import RetrievalConfig
from visionfm_jax.models.aurora import AuroraConfig
from visionfm_jax.models.decoder import DecoderConfig
from visionfm_jax.tasks.classification import ClassificationConfig
from visionfm_jax.tasks.multimodal import MultimodalConfig

COUNT, MORE, DIM = 19, 14, 5
TEXTS = [f"picture of {i}" for i in range(COUNT + MORE)]
LONG = " ".join(["very"] * CONTEXT)


def make(monkeypatch, sources, hosts=1, **settings):
    """The eval, one per host, of `sources` by path."""
    monkeypatch.setattr(base, "open_source", lambda config: sources[config.path])
    gallery = tuple(TfdsConfig(path=path, split="train") for path in list(sources)[1:])
    run = contrastive_run(kind=RetrievalConfig, gallery=gallery, **settings)
    return [make_evals(run, host, hosts)["pairs"] for host in range(hosts)]


def known(texts=TEXTS, seed=0):
    """A model that has learned a little: images near their captions."""
    rng = np.random.default_rng(seed)
    vectors = {text: unit(rng.normal(size=DIM)) for text in dict.fromkeys(texts)}
    table = np.stack([vectors[text] for text in texts])
    return Model(unit(table + 1.2 * unit(rng.normal(size=table.shape))), vectors), table


def two_sources():
    return {"numbers": Numbered(TEXTS[:COUNT]), "more": Numbered(TEXTS[COUNT:], first=COUNT)}


def test_numbers_are_those_of_naive_loops(monkeypatch):
    (evaluation,) = make(monkeypatch, two_sources())
    model, texts = known()
    got = evaluation.run(model)
    ids = np.arange(COUNT + MORE)
    for way, queries, candidates in (
        ("image_to_text", model.images, texts),
        ("text_to_image", texts, model.images),
    ):
        ranks = np.array(naive_ranks(queries[:COUNT], candidates, ids[:COUNT], ids))
        for k in (1, 5, 10):
            assert got[f"{way}_r{k}"] == pytest.approx((ranks <= k).mean())
        assert got[f"{way}_median_rank"] == np.median(ranks)
        assert 0 < got[f"{way}_r1"] < got[f"{way}_r10"]
    assert (got["queries"], got["candidates"]) == (COUNT, COUNT + MORE)
    assert set(RetrievalConfig.metrics) < set(got)
    assert all(shapes["text"] == (BATCH, CONTEXT) for shapes in model.seen)  # one shape: compiled once
    assert {tuple(sorted(shapes)) for shapes in model.seen} == {
        ("caption", "captions", "image", "mask", "record", "text")
    }


def test_two_hosts_agree_with_one(monkeypatch):
    model, _ = known()
    (alone,) = make(monkeypatch, two_sources())
    wanted = alone.run(model)
    two = make(monkeypatch, two_sources(), hosts=2)
    assert on_hosts(two, model) == [wanted, wanted]
    assert two[1].pictured == {}
    np.testing.assert_equal(two[0].pictured, alone.pictured)
    assert two[0].protocol == two[1].protocol == alone.protocol
    assert two[0].details == two[1].details == alone.details


def test_damaged_records_and_captions_are_no_queries_and_no_candidates(monkeypatch):
    captions = [*TEXTS[:COUNT]]
    captions[5] = " "
    sources = {"numbers": Numbered(captions, damaged={2}), "more": Numbered(TEXTS[COUNT:], first=COUNT, damaged={0})}
    (evaluation,) = make(monkeypatch, sources)
    rng = np.random.default_rng(0)
    table = unit(rng.normal(size=(COUNT + MORE, 30)))
    got = evaluation.run(Model(table, dict(zip(TEXTS, table, strict=True))))
    assert (got["queries"], got["candidates"]) == (COUNT - 2, COUNT + MORE - 3)
    assert got["image_to_text_r1"] == got["text_to_image_r1"] == 1
    for query in evaluation.pictured["captions"]:  # each picture stands beside its own caption
        assert query["own"] == captions[query["query"][0, 0, 0]]
        assert query["rank"] == 1
        assert query["answers"][0] == query["own"]


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1.0])
def test_broken_and_constant_models_score_nothing(monkeypatch, bad):
    (evaluation,) = make(monkeypatch, two_sources())
    same = np.full((COUNT + MORE, DIM), bad / DIM**0.5)
    got = evaluation.run(Model(same, dict(zip(TEXTS, same, strict=True))))
    assert [got[name] for name in RetrievalConfig.metrics] == [0] * 6
    assert got["text_to_image_median_rank"] == (COUNT + MORE if bad == 1 else np.inf)
    json.dumps(evaluation.details, allow_nan=False)


def test_equal_captions_are_right_for_each_other_and_no_others(monkeypatch):
    texts = ["a cat", "a cat", b"a cat", "A cat", f"{LONG} one", f"{LONG} two"]
    (evaluation,) = make(monkeypatch, {"numbers": Numbered(texts)})
    eye = np.eye(4)
    shared = {"a cat": eye[0], "A cat": eye[0], f"{LONG} one": eye[1], f"{LONG} two": eye[1]}
    got = evaluation.run(Model(eye[[0, 0, 0, 0, 1, 1]], shared))
    # "A cat" has the same tokens as "a cat", and the long ones too: to the model they are one, but not to us
    (cats,) = [q["rank"] for q in evaluation.pictured["captions"] if q["query"][0, 0, 0] == 0]
    assert cats == 2
    assert got["image_to_text_r1"] == got["text_to_image_r1"] == 0
    assert [q["rank"] for q in evaluation.pictured["images"]] == [2, 2, 2, 4, 2, 2]
    assert evaluation.pictured["images"][0]["right"].sum() == 3
    assert evaluation.pictured["images"][2]["query"] == "a cat"


SEVERAL = (  # of record i; one caption is of two records, one is damaged, some are empty
    ("a cat", "a red cat", "an animal"),
    ("a dog", b"an animal"),
    "a bird",
    (b"\xff", "  ", "a fish", "it swims"),
    ("", " "),
    ("a car", "it rolls", "a car"),
)
TEXT_OF = ("a cat", "a red cat", "an animal", "a dog", "an animal", "a bird", "a fish", "it swims", "a car", "it rolls")


def several(seed):
    """Random embeddings of two sources that hold `SEVERAL`, and of each of their captions."""
    rng = np.random.default_rng(seed)
    texts = {text: unit(rng.normal(size=DIM)) for text in dict.fromkeys((*TEXT_OF, "far away", "farther"))}
    return Model(unit(rng.normal(size=(8, DIM))), texts), texts


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("hosts", [1, 2])
def test_every_caption_is_a_query_and_a_candidate(monkeypatch, seed, hosts):
    sources = {"numbers": Numbered(SEVERAL), "more": Numbered(("far away", "farther"), first=6)}
    evals = make(monkeypatch, sources, hosts=hosts)
    model, texts = several(seed)
    results = on_hosts(evals, model)
    got = results[0]
    assert all(result == got for result in results)
    captions = [(0, 1, 2), (3, 4), (5,), (6, 7), (8, 9, 8)]  # in TEXT_OF, of the readable records
    queries = [TEXT_OF[i] for own in captions for i in own]
    owners = [i for i, own in enumerate(captions) for _ in own]
    own = [{TEXT_OF[i] for i in c} for c in captions] + [{"far away"}, {"farther"}]
    images = model.images[[0, 1, 2, 3, 5, 6, 7]]

    def rank(scores, right):
        best = max(s for s, r in zip(scores, right, strict=True) if r)
        return 1 + sum(s >= best for s, r in zip(scores, right, strict=True) if not r)

    candidates = [*queries, "far away", "farther"]
    table = np.stack([texts[c] for c in candidates])
    to_text = [rank(table @ images[i], [c in own[i] for c in candidates]) for i in range(len(captions))]
    to_image = [rank(images @ texts[c], [c in o for o in own]) for c in queries]
    for way, places in (("image_to_text", to_text), ("text_to_image", to_image)):
        for k in (1, 5, 10):
            assert got[f"{way}_r{k}"] == pytest.approx(np.mean(np.array(places) <= k))
        assert got[f"{way}_median_rank"] == np.median(places)
    assert (got["queries"], got["candidates"]) == (5, 7)
    assert (got["caption_queries"], got["caption_candidates"]) == (11, 13)
    assert all(shapes["text"] == (BATCH, CONTEXT) for shapes in model.seen)
    asked = [int(q["query"][0, 0, 0]) for q in evals[0].pictured["captions"]]
    assert asked == [0, 1, 2, 3, 5]
    assert [q["own"] for q in evals[0].pictured["captions"]] == [TEXT_OF[c[0]] for c in captions]
    assert [q["rank"] for q in evals[0].pictured["captions"]] == to_text
    for query, right in zip(evals[0].pictured["captions"], own, strict=False):
        assert query["right"].tolist() == [answer in right for answer in query["answers"]]
    shown = np.linspace(0, len(queries) - 1, 6).astype(int)
    for query, i in zip(evals[0].pictured["images"], shown, strict=True):
        assert (query["query"], query["rank"]) == (queries[i], to_image[i])
        assert query["own"][0, 0, 0] == (0, 1, 2, 3, 5)[owners[i]]
        numbers = [(0, 1, 2, 3, 5, 6, 7).index(answer[0, 0, 0]) for answer in query["answers"]]
        assert query["right"].tolist() == [queries[i] in own[n] for n in numbers]


def test_any_caption_of_an_image_is_right_for_it(monkeypatch):
    (evaluation,) = make(monkeypatch, {"numbers": Numbered((("near", "off"), ("other", "far")))})
    eye = np.eye(3)
    model = Model(eye[:2], {"near": eye[0], "off": eye[2], "other": eye[0] + eye[1], "far": eye[2]})
    got = evaluation.run(model)
    # the first image finds "near" tied with "other", the second "other" alone; "off" and "far" are near no image
    assert [q["rank"] for q in evaluation.pictured["captions"]] == [2, 1]
    assert (got["image_to_text_r1"], got["text_to_image_r1"]) == (0.5, 0.25)
    assert evaluation.settings["captions"] == 2
    with np.errstate(invalid="ignore"):
        nothing = evaluation.run(Model(eye[:2] * np.nan, {}))
    assert [nothing[name] for name in RetrievalConfig.metrics] == [0] * 6


def test_runs_of_the_multimodal_task_are_measured(monkeypatch):
    monkeypatch.setattr(base, "open_source", lambda config: Numbered(TEXTS))
    run = contrastive_run(kind=RetrievalConfig)
    run.task = MultimodalConfig(tokenizer="emoji")
    run.model = AuroraConfig(image=run.model.image, text=DecoderConfig(context=9))
    (evaluation,) = make_evals(run, 0, 1).values()
    assert (evaluation.settings["tokenizer"], evaluation.settings["context"]) == ("emoji", 9)


def test_pictured_are_queries_spread_over_the_source_with_their_best(monkeypatch):
    (evaluation,) = make(monkeypatch, two_sources())
    model, texts = known()
    evaluation.run(model)
    asked = [int(q["query"][0, 0, 0]) for q in evaluation.pictured["captions"]]
    assert (asked[0], asked[-1], len(asked)) == (0, COUNT - 1, 6)
    for query, number in zip(evaluation.pictured["captions"], asked, strict=True):
        scores = texts @ model.images[number]
        assert query["answers"] == [TEXTS[i] for i in np.argsort(-scores)[:5]]
        np.testing.assert_allclose(query["scores"], -np.sort(-scores)[:5], rtol=1e-5)
        assert query["right"].tolist() == [text == TEXTS[number] for text in query["answers"]]
        assert query["own"] == TEXTS[number]
    for query in evaluation.pictured["images"]:
        scores = model.images @ texts[TEXTS.index(query["query"])]
        assert [int(a[0, 0, 0]) for a in query["answers"]] == np.argsort(-scores)[:5].tolist()


def test_protocol_tells_what_was_measured(monkeypatch):
    (one,) = make(monkeypatch, two_sources())
    (other,) = make(monkeypatch, {"numbers": Numbered(TEXTS[:COUNT])})
    (again,) = make(monkeypatch, two_sources(), batch_size=16)
    assert len(one.protocol) == 8
    int(one.protocol, 16)
    assert one.protocol == again.protocol != other.protocol
    assert make(monkeypatch, two_sources(), preprocess=PreprocessConfig(crop=1.0))[0].protocol != one.protocol
    one.run(known()[0])
    kept = json.loads(json.dumps(one.details, allow_nan=False))
    assert kept["protocol"] == one.protocol
    content = kept["settings"]["sources"][1].pop("content")
    assert kept["settings"]["sources"][1] == {"dataset": "more", "split": "train", "records": MORE}
    changed = two_sources()
    changed["more"].captions = ["another caption", *changed["more"].captions[1:]]
    (changed,) = make(monkeypatch, changed)
    assert changed.settings["sources"][1]["content"] != content  # of the same name and length
    assert changed.protocol != one.protocol


def test_sources_without_captions_are_refused(monkeypatch):
    sources = two_sources()
    sources["more"] = Numbered(None, labels=[0, 1])
    with pytest.raises(DataError, match=r"evals\[0\]: numbers from 0 has no captions.*set caption_key") as caught:
        make(monkeypatch, sources)
    assert "\n" not in str(caught.value)


def test_a_run_of_another_task_is_refused():
    run = contrastive_run(kind=RetrievalConfig)
    run.task = ClassificationConfig()
    with pytest.raises(ConfigError, match=r"evals\[0\] = 'retrieval': measures the embeddings of a task, and Cl"):
        run.validate()


def test_best_metric_may_be_a_recall():
    run = contrastive_run(kind=RetrievalConfig)
    run.checkpoint.keep_best, run.checkpoint.best_metric = 1, "pairs/image_to_text_r1"
    check_best_metric(run)
    run.checkpoint.best_metric = "pairs/image_to_text_median_rank"
    with pytest.raises(ConfigError, match="pairs/image_to_text_r1"):
        check_best_metric(run)


def test_bundled_emoji_have_what_it_takes():
    source = BundledConfig(path="twemoji", split="combinations")
    run = contrastive_run(kind=RetrievalConfig, source=source, batch_size=128)
    run.model.text.context = 32  # some names are told apart by their last words
    (evaluation,) = make_evals(run, 0, 1).values()
    tokenizer, names = open_tokenizer("clip"), [evaluation.source[i]["caption"] for i in range(364)]
    numbers = {tokenizer(name, 32).tobytes(): i for i, name in enumerate(names)}

    def predict(batch):
        rows = np.eye(len(names), dtype=np.float32)[[numbers.get(t.tobytes(), 0) for t in batch["text"]]]
        return {k: v for k, v in batch.items() if k not in ("image", "text")} | {
            "image_embedding": rows,
            "text_embedding": rows,
        }

    got = evaluation.run(predict)
    assert got["image_to_text_r1"] == got["text_to_image_r1"] == 1
    assert got["queries"] == 364
