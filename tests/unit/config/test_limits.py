"""Every field by itself: a bound for each number, and types as they are declared."""

import dataclasses
import math
import typing

import pytest
from test_schema import aurora, good, pairs

from visionfm_jax.config import rules, schema
from visionfm_jax.config.limits import OneOf, Range, limits_of, types_of
from visionfm_jax.data import transforms
from visionfm_jax.data.sources import kinds
from visionfm_jax.data.sources.kinds import TfdsConfig
from visionfm_jax.errors import ConfigError
from visionfm_jax.evals import kinds as eval_kinds
from visionfm_jax.models import aurora as aurora_model
from visionfm_jax.models import clip, decoder, text
from visionfm_jax.models.backbones import swin_v2, vit
from visionfm_jax.tasks import classification, contrastive, multimodal, self_distillation

MODULES = (
    schema,
    kinds,
    eval_kinds,
    vit,
    swin_v2,
    text,
    decoder,
    clip,
    aurora_model,
    classification,
    contrastive,
    multimodal,
    self_distillation,
    transforms,
)
CLASSES = list(
    dict.fromkeys(
        c
        for m in MODULES
        for c in vars(m).values()
        if isinstance(c, type) and dataclasses.is_dataclass(c) and hasattr(c, "limits")
    )
)


@pytest.mark.parametrize("kind", CLASSES, ids=lambda c: c.__name__)
def test_every_number_has_bounds(kind):
    limits = limits_of(kind)
    for field in dataclasses.fields(kind):
        kinds = typing.get_args(types_of(kind)[field.name]) or (types_of(kind)[field.name],)
        if {int, float} & set(kinds):
            limit = limits[field.name]  # add a line to the class's limits
            for one in limit if type(limit) is tuple else [limit]:
                assert isinstance(one, OneOf) or (math.isfinite(one.low) and math.isfinite(one.high))
            assert type(limit) is not tuple or len(limit) == len(kinds)
    assert limits.keys() <= {f.name for f in dataclasses.fields(kind)}


def refusal(config, name, value):
    *parents, leaf = name.split(".")
    holder = config
    for part in parents:
        holder = holder[int(part)] if part.isdigit() else getattr(holder, part)
    setattr(holder, leaf, value)
    with pytest.raises(ConfigError) as error:
        config.validate()
    return str(error.value)


INF, NAN = math.inf, math.nan


@pytest.mark.parametrize(
    ("make", "name", "value"),
    [
        (good, "data.augment.std", (INF, 0.2, 0.2)),
        (good, "data.augment.mean", (INF, 0.2, 0.2)),
        (good, "data.augment.jitter", (NAN, 0.0, 0.0, 0.0)),
        (good, "data.augment.jitter", (0.0, 0.0, 0.0, 0.6)),
        (good, "data.transforms", (1.9,)),
        (good, "data.transforms.0.size", (1.9, 9)),
        (good, "data.transforms.0.scale", "ab"),
        (good, "data.transforms.0.scale", {0.1, 0.2}),
        (good, "data.transforms.0.scale", {0.1: 1, 0.2: 2}),
        (good, "data.transforms.0.scale", (0.1, 0.2, 0.3)),
        (good, "data.transforms.0.scale", (0.0, 1.0)),
        (good, "data.train.0.weight", NAN),
        (good, "data.train.0.weight", INF),
        (good, "data.prefetch", 1_000_000),
        (good, "data.threads", 1_000_000),
        (good, "data.workers", 1_000_000),
        (good, "data.num_examples", 10**20),
        (good, "data.shuffle", 1),
        (good, "data.train", "ab"),
        (good, "data.train", [TfdsConfig(path="x")]),
        (good, "optim.lr", INF),
        (good, "optim.eps", INF),
        (good, "optim.eps", 0.0),
        (good, "optim.weight_decay", INF),
        (good, "optim.b2", 1 - 1e-12),
        (good, "optim", None),
        (good, "train.steps", 2**31),
        (good, "train.epochs", 1e308),
        (good, "train.epochs", 10**400),
        (good, "train.batch_size", True),
        (good, "train.batch_size", "64"),
        (good, "seed", 10**20),
        (good, "seed", 10**5000),
        (good, "seed", 1.0),
        (good, "name", "a/../../b"),
        (good, "name", ".."),
        (good, "name", "a\0b"),
        (good, "workdir", "a\0b"),
        (good, "workdir", "x" * 5000),
        (good, "evals.0.name", "a/b"),
        (good, "evals.0.name", ".."),
        (good, "data.train.0.selection", "good.pairs"),
        (good, "telemetry.stuck_minutes", 1e-12),
        (aurora, "task.mask_ratio", 0.0),
        (good, "evals.0.top_p", 0.5),
        (aurora, "evals.0.top_p", 0.0),
        (good, "model.image_size", 14 * 10**18),
        (good, "model.patch_size", -14),
        (good, "model.size", "h"),
        (good, "task.num_classes", 10**20),
        (good, "task.num_clases", 5),
        (pairs, "task.mixup", INF),
        (pairs, "model.text.context", 10**20),
        (pairs, "model.text.vocab_size", 10**20),
        (pairs, "model.embed_dim", 10**20),
        (pairs, "model.image.window", 10**20),
        (aurora, "task.pair_ratio", (1.5, 1)),
        (aurora, "task.captioning", INF),
    ],
    ids=lambda v: "int" if isinstance(v, int) else None,
)
def test_what_is_no_value_of_a_field_is_refused_in_one_short_line(make, name, value):
    (line,) = refusal(make(), name, value).splitlines()
    leaf = name.rpartition(".")[2]
    assert line.startswith("config.")
    assert leaf in line
    assert ";" in line
    assert len(line) < 300
    assert "\0" not in line


def test_the_run_s_steps_fit_their_counter():
    config = good()
    config.data.num_examples, config.train.batch_size = 10**12, 2
    line = refusal(config, "train.epochs", 1000)
    assert "gives 500000000000000 steps, more than 1073741824 (steps are counted in int32)" in line


def test_cudnn_has_no_attention_in_fp32():
    config = pairs()
    config.train.precision = "fp32"
    config.validate()
    assert refusal(config, "model.text.attention", "cudnn").startswith(
        "config.model.text.attention = 'cudnn': needs train.precision = bf16 or fp16"
    )


def test_fp8_needs_16_bit_around_it_and_a_card_that_has_it():
    config = pairs()
    config.train.precision = "fp32"
    assert refusal(config, "model.text.mlp_matmuls", "fp8").startswith(
        "config.model.text.mlp_matmuls = 'fp8': needs train.precision = bf16 or fp16"
    )
    for capability, count in [("8.0", 1), ("8.9", 0), ("9.0", 0), ("10.0", 0), ("", 0), ("gfx942", 0)]:
        found = rules.card_problems(config, "NVIDIA A100-SXM4-80GB", capability)
        assert len(found) == count
    (problem,) = rules.card_problems(config, "NVIDIA A100-SXM4-80GB", "8.0")
    assert problem[0] == "model.text.mlp_matmuls"
    assert "NVIDIA A100-SXM4-80GB has 8.0" in problem[2]


def test_rules_between_fields_that_are_right_are_reported_beside_wrong_fields():
    config = good()
    config.optim.b1, config.train.accumulate, config.checkpoint.keep_best = INF, 3, 1
    lines = refusal(config, "data.augment.std", (0.0, 1.0, 1.0)).splitlines()
    assert [line.partition(" ")[0] for line in lines] == [
        "config.data.augment.std[0]",
        "config.optim.b1",
        "config.train.batch_size",
        "config.checkpoint.best_metric",
    ]


def test_ranges_are_written_as_they_are_kept():
    for limit, inside, outside, words in (
        (Range(0, 1, below=True), (0, 0.999), (1, -1e-9), "[0, 1)"),
        (Range(0, 1, above=True), (1, 1e-9), (0, 1.1), "(0, 1]"),
        (Range(0.001, 2**30, off=True), (0, 2**30), (1e-4, 2**30 + 1), "0 or [0.001, 1073741824]"),
    ):
        assert str(limit) == words
        assert not any(map(limit.problem, inside))
        assert all(map(limit.problem, outside))


def test_long_values_are_shown_by_their_beginning():
    assert rules.shown("x" * 1000) == f"'{'x' * 59} … (1,002 characters)"
