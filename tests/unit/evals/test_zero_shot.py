"""The zero-shot eval: prompts, names, hosts, against embeddings from a table."""

import json
import math

import numpy as np
import pytest
from pair_fakes import BATCH, CONTEXT, Model, Numbered, contrastive_run, on_hosts, unit

from visionfm_jax.config import PreprocessConfig
from visionfm_jax.data.sources.kinds import TfdsConfig
from visionfm_jax.errors import ConfigError, DataError
from visionfm_jax.evals import base
from visionfm_jax.evals.eval import make_evals
from visionfm_jax.evals.kinds import ZeroShotConfig
from visionfm_jax.tasks.classification import ClassificationConfig

NAMES = ("ant", "bee", "cat", "dog {}", "eel", "fox", "gnu")
PROMPTS = ("a {}.", "two {}s", "{}")
COUNT, DIM = 30, 6
LABELS = [i % 7 for i in range(COUNT)]


@pytest.fixture
def files(tmp_path):
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    (tmp_path / "classes.txt").write_text("\n".join(NAMES) + "\n")
    return {"prompts": str(tmp_path / "prompts.txt"), "classes": str(tmp_path / "classes.txt")}


def make(monkeypatch, data=None, hosts=1, **settings):
    """The eval, one per host."""
    data = Numbered(None, LABELS) if data is None else data
    monkeypatch.setattr(base, "open_source", lambda config: data)
    run = contrastive_run(kind=ZeroShotConfig, **settings)
    return [make_evals(run, host, hosts)["pairs"] for host in range(hosts)]


def known(seed=0, noise=1.5):
    """Texts of random length-1 embeddings, and images near their classes."""
    rng = np.random.default_rng(seed)
    texts = {prompt.replace("{}", name, 1): unit(rng.normal(size=DIM)) for prompt in PROMPTS for name in NAMES}
    classes = unit([np.mean([texts[p.replace("{}", n, 1)] for p in PROMPTS], 0) for n in NAMES])
    images = unit(classes[LABELS] + noise * unit(rng.normal(size=(COUNT, DIM))))
    return Model(images, texts), classes


def test_numbers_are_those_of_a_naive_loop(monkeypatch, files):
    (evaluation,) = make(monkeypatch, **files)
    model, classes = known()
    got = evaluation.run(model)
    orders = [sorted(range(7), key=lambda c: -float(image @ classes[c])) for image in model.images]
    right = np.array([o[0] == label for o, label in zip(orders, LABELS, strict=True)])
    assert got["top1"] == pytest.approx(right.mean())
    assert got["top5"] == pytest.approx(np.mean([la in o[:5] for o, la in zip(orders, LABELS, strict=True)]))
    assert got["balanced_accuracy"] == pytest.approx(np.mean([right[np.array(LABELS) == c].mean() for c in range(7)]))
    assert got["majority"] == pytest.approx(5 / 30)
    assert got["images"] == COUNT
    assert 0 < got["top1"] < 1
    assert set(ZeroShotConfig.metrics) < set(got)
    texts = [shapes for shapes in model.seen if "image" not in shapes]
    assert texts == [{"text": (BATCH, CONTEXT), "mask": (BATCH,)}] * math.ceil(21 / BATCH)


def test_two_hosts_agree_with_one(monkeypatch, files):
    model, _ = known()
    (alone,) = make(monkeypatch, **files)
    wanted = alone.run(model)
    two = make(monkeypatch, hosts=2, **files)
    assert on_hosts(two, model) == [wanted, wanted]
    assert two[1].pictured == {}
    np.testing.assert_equal(two[0].pictured, alone.pictured)
    assert two[0].details == two[1].details == alone.details


def test_classes_are_embedded_anew_at_every_evaluation(monkeypatch, files):
    (evaluation,) = make(monkeypatch, **files)
    model, _ = known(noise=0)
    assert evaluation.run(model)["top1"] == 1
    model.texts = {key: -vector for key, vector in model.texts.items()}
    assert evaluation.run(model)["top1"] == 0
    assert (evaluation.pictured["guess"] != evaluation.pictured["label"]).all()


def test_details_and_pictures_say_what_was_taken_for_what(monkeypatch, files):
    (evaluation,) = make(monkeypatch, data=Numbered(None, LABELS, damaged={0, 8}), **files)
    model, classes = known()
    got = evaluation.run(model)
    kept = json.loads(json.dumps(evaluation.details, allow_nan=False))
    guesses = (model.images @ classes.T).argmax(1)
    cells = np.zeros((7, 7), int)
    for i in set(range(COUNT)) - {0, 8}:
        cells[LABELS[i], guesses[i]] += 1
    assert kept["confusion"] == [[c, g, cells[c, g]] for c in range(7) for g in range(7) if cells[c, g]]
    assert [c["name"] for c in kept["classes"]] == list(NAMES)
    assert [c["images"] for c in kept["classes"]] == cells.sum(1).tolist()
    assert got["top1"] == pytest.approx(np.trace(cells) / 28)
    assert kept["protocol"] == evaluation.protocol
    shown = evaluation.pictured
    numbers = shown["image"][:, 0, 0, 0]
    assert set(range(COUNT)) - set(numbers.tolist()) == {0, 8}
    np.testing.assert_array_equal(shown["label"], np.array(LABELS)[numbers])
    np.testing.assert_array_equal(shown["guess"], guesses[numbers])
    assert shown["confusion"].tolist() == kept["confusion"]
    assert shown["class_names"] == NAMES


@pytest.mark.parametrize("bad", [np.nan, 1.0])
def test_broken_and_constant_models_score_nothing(monkeypatch, files, bad):
    (evaluation,) = make(monkeypatch, **files)
    model, _ = known()
    model.images = np.full_like(model.images, bad / DIM**0.5)
    model.texts = {key: np.full(DIM, bad / DIM**0.5, np.float32) for key in model.texts}
    got = evaluation.run(model)
    assert [got[name] for name in ZeroShotConfig.metrics] == [0, 0, 0]
    json.dumps(evaluation.details, allow_nan=False)


def test_names_come_from_the_dataset_and_prompts_from_the_short_list(monkeypatch):
    (evaluation,) = make(monkeypatch, data=Numbered(None, [0, 1], class_names=("ant", "bee")))
    assert evaluation.classes == ("ant", "bee")
    assert len(evaluation.prompts) == 7
    (evaluation,) = make(monkeypatch, data=Numbered(None, [0, 1], class_names=("ant", "bee")), prompts="a {} here")
    assert evaluation.prompts == ("a {} here",)
    many = Numbered(None, list(range(1000)))
    (evaluation,) = make(monkeypatch, data=many, classes="imagenet_classes", prompts="imagenet_prompts")
    assert (len(evaluation.classes), len(evaluation.prompts)) == (1000, 80)


def test_protocol_tells_what_was_measured(monkeypatch, files, tmp_path):
    base = make(monkeypatch, **files)[0].protocol
    assert len(base) == 8
    int(base, 16)
    assert make(monkeypatch, batch_size=16, **files)[0].protocol == base
    assert make(monkeypatch, preprocess=PreprocessConfig(crop=1.0), **files)[0].protocol != base
    (tmp_path / "copy.txt").write_text((tmp_path / "prompts.txt").read_text())
    assert make(monkeypatch, **(files | {"prompts": str(tmp_path / "copy.txt")}))[0].protocol == base
    assert make(monkeypatch, **(files | {"prompts": "{}"}))[0].protocol != base
    assert make(monkeypatch, data=Numbered(None, [*LABELS, 3]), **files)[0].protocol != base
    assert make(monkeypatch, source=TfdsConfig(path="other"), **files)[0].protocol != base
    (tmp_path / "classes.txt").write_text("\n".join(NAMES).replace("ant", "Ant"))
    assert make(monkeypatch, **files)[0].protocol != base


@pytest.mark.parametrize("count", [6, 8])
def test_a_list_of_another_length_than_the_dataset_is_refused(monkeypatch, files, tmp_path, count):
    (tmp_path / "classes.txt").write_text("\n".join(f"name {i}" for i in range(count)))
    with pytest.raises(
        DataError, match=rf"evals\[0\]: classes .* has {count} names.* has 7 classes; give one"
    ) as caught:
        make(monkeypatch, **files)
    assert "\n" not in str(caught.value)


def test_a_dataset_without_names_or_labels_is_refused(monkeypatch):
    with pytest.raises(DataError, match=r"no names of its classes; set classes"):
        make(monkeypatch)
    with pytest.raises(DataError, match=r"no labels, which zero-shot needs"):
        make(monkeypatch, data=Numbered(["a", "b"]))


@pytest.mark.parametrize("line", ["no place", "{} and {}"])
def test_prompts_need_one_place_for_the_name(monkeypatch, files, tmp_path, line):
    (tmp_path / "prompts.txt").write_text(f"a {{}}\n{line}\n")
    with pytest.raises(DataError, match=rf"line 2: '{line}' needs exactly one {{}}"):
        make(monkeypatch, **files)


def test_a_run_of_another_task_is_refused():
    run = contrastive_run(kind=ZeroShotConfig)
    run.task = ClassificationConfig()
    with pytest.raises(ConfigError, match=r"evals\[0\] = 'zero_shot': measures the embeddings of a task, and Cl"):
        run.validate()
