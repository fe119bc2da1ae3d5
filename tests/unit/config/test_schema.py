import dataclasses

import pytest

from visionfm_jax.config import (
    BackboneConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    EvalConfig,
    OptimConfig,
    SourceConfig,
    TaskConfig,
    TrainConfig,
    Transform,
)
from visionfm_jax.data.sources.kinds import TfdsConfig
from visionfm_jax.data.transforms import Flip, RandomResizedCrop
from visionfm_jax.errors import ConfigError
from visionfm_jax.evals.kinds import AccuracyConfig, CaptioningConfig, RetrievalConfig
from visionfm_jax.models.aurora import AuroraConfig
from visionfm_jax.models.backbones.vit import ViTConfig
from visionfm_jax.models.clip import ClipConfig
from visionfm_jax.tasks.classification import ClassificationConfig
from visionfm_jax.tasks.contrastive import ContrastiveConfig
from visionfm_jax.tasks.multimodal import MultimodalConfig


def good() -> Config:
    return Config(
        name="t",
        model=ViTConfig(),
        task=ClassificationConfig(),
        data=DataConfig(train=(TfdsConfig(path="x"),), num_examples=1000, transforms=(RandomResizedCrop(), Flip())),
        optim=OptimConfig(warmup_steps=2),
        train=TrainConfig(batch_size=64, accumulate=2, epochs=2),
        evals=(AccuracyConfig(name="val", source=TfdsConfig(path="y")),),
    )


def test_derived_quantities():
    config = good()
    config.validate()
    assert config.steps_per_epoch == 1000 / 64
    assert config.total_steps == 31
    assert config.micro_batch == 32
    assert config.warmup_share == 2 / 31
    assert config.folder == "runs/t"


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("model.image_size", 230, ["multiple of model.patch_size = 14", "nearest is 224"]),
        ("model.image_size", (230, 450), ["multiple of model.patch_size = 14", "nearest is (224, 448)"]),
        ("model.image_size", (224,), ["must be a tuple of 2 numbers"]),
        ("model.image_size", (224, 0), ["image_size[1] = 0", "nearest is 1"]),
        ("model.image_size", 224.0, ["must be one number or (height, width), not float", "(224, 448)"]),
        ("model.image_size", (4088, 4088), ["gives 85264 tokens of model.patch_size = 14", "set a smaller size"]),
        ("model.patch_size", (14, 28), ["must be an int, not tuple"]),
        ("model.pos_image_size", (224, 225), ["multiple of model.patch_size = 14", "nearest is 224"]),
        ("model.pool", "max", ["gap, norm_gap, cls, cls_gap, map"]),
        ("model.pos_image_size", 225, ["multiple of model.patch_size = 14", "nearest is 224"]),
        ("model.pos_embed", "none", ["leaves the patches without positions", "rope_theta to 100"]),
        ("model.pos_embed", "all", ["model.registers = 0", "set it to class"]),
        ("model.rope_theta", 0.5, ["0 or [1, 1e+06]"]),
        (
            "model.remat",
            "some",
            ["none, attention, dots, branches, full, or one of the last 4 and", "full:18"],
        ),
        ("model.remat", "FULL", ["set it to full"]),
        ("model.remat", "full:33", ["at most as many blocks as the network, 32; set it to full for all of them"]),
        ("model.attention", "cuDNN", ["set it to cudnn"]),
        ("parallel.stage", 4, ["3, 2, 1, 0"]),
        ("train.batch_size", 63, ["multiple of train.accumulate = 2", "nearest is 64"]),
        ("train.steps", 5, ["exactly one"]),
        ("train.precision", "fp8", ["bf16, fp16, fp32"]),
        ("optim.lr", 0.0, ["must lie in [1e-12, 100]", "nearest is 1e-12"]),
        ("optim.lr", float("nan"), ["finite", "[1e-12, 100]"]),
        ("optim.final_lr", 1.0, ["must not exceed optim.lr"]),
        ("optim.warmup_steps", 31, ["below the run's 31 steps"]),
        ("optim.layer_decay", 0.0, ["[0.01, 1]"]),
        ("data.num_examples", 0, ["train.epochs = 2"]),
        ("data.train", (), ["at least one source"]),
        ("data.max_damaged", -0.1, ["[0, 1)"]),
        ("checkpoint.keep_best", 1, ["checkpoint.best_metric"]),
        ("task.label_smoothing", 1.0, ["[0, 1)"]),
        ("data.augment.jitter", (0.0, 11.0, 0.0, 0.0), ["jitter[1] = 11.0", "[0, 10]"]),
        ("seed", -1, ["[0, 4294967295]", "nearest is 0"]),
    ],
)
def test_a_broken_rule_names_field_value_rule_and_remedy(name, value, words):
    assert_refused(good(), name, value, words)


def assert_refused(config, name, value, words):
    holder = config
    *parents, leaf = name.split(".")
    for part in parents:
        holder = getattr(holder, part)
    setattr(holder, leaf, value)
    with pytest.raises(ConfigError) as error:
        config.validate()
    text = str(error.value)
    assert f"config.{parents[0] if parents else leaf}" in text
    for word in words:
        assert word in text
    assert ";" in text  # the remedy


def test_a_task_needs_its_model_and_a_gallery_paths():
    config = good()
    config.task = ContrastiveConfig()
    config.evals = (RetrievalConfig(source=TfdsConfig(path="y"), gallery=(TfdsConfig(),)),)
    with pytest.raises(ConfigError) as error:
        config.validate()
    assert "config.model = 'ViTConfig': cannot be trained by task = ContrastiveConfig; set model to a Clip" in str(
        error.value
    )
    assert "config.evals[0].gallery[0].path" in str(error.value)


def pairs() -> Config:
    config = good()
    config.model, config.task = ClipConfig(), ContrastiveConfig(mixup=0.2)
    config.evals = (RetrievalConfig(source=TfdsConfig(path="y")),)
    config.train = TrainConfig(batch_size=64, epochs=2)
    return config


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("model.image.window", 57, ["larger than the map, 56 x 56 tokens", "set it to 56 or less"]),
        ("model.image.image_size", 226, ["multiple of model.image.patch_size = 4", "nearest is 224"]),
        ("model.image.image_size", (96, 226), ["multiple of model.image.patch_size = 4", "nearest is (96, 224)"]),
        ("model.image.image_size", (32, 448), ["window = 14: is larger than the map, 8 x 112", "set it to (8, 14)"]),
        ("model.image.window", (14, 57), ["larger than the map, 56 x 56 tokens", "set it to (14, 56) or less"]),
        ("model.image.drop_path", 1.0, ["[0, 1)"]),
        ("model.image.pretrained_window", 14, ["goes with pretrained_image_size"]),
        ("model.text.remat", "some", ["model.text.remat", "none, attention, dots, branches, full"]),
        ("model.text.end_token", 49_408, ["below vocab_size = 49408", "the tokenizer's end token"]),
        ("model.text.context", 2, ["[3, 16384]"]),
        ("task.loss", "hinge", ["softmax, sigmoid"]),
        ("task.mixup", -1.0, ["0 or [0.001, 100]"]),
        (
            "checkpoint.weights_into",
            "image",
            ["checkpoint.weights; name the weights, or set it to '' to start"],
        ),
        ("checkpoint.skip", ("head",), ["without checkpoint.weights; name the weights, or set it to () to start"]),
    ],
)
def test_a_broken_rule_of_pairs(name, value, words):
    pairs().validate()
    assert_refused(pairs(), name, value, words)


def aurora() -> Config:
    config = good()
    config.model, config.task = AuroraConfig(), MultimodalConfig(tokenizer="x")
    config.evals = (CaptioningConfig(source=TfdsConfig(path="y")),)
    return config


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("task.masked_image", -1.0, ["task.masked_image", "[0, 1e+06]"]),
        ("task.word_mask_ratio", 1.0, ["task.word_mask_ratio", "[0, 1)"]),
        ("task.pair_ratio", (0, 1), ["task.pair_ratio = (0, 1)", "set (3, 1)"]),
        ("task.mask_unit", 30, ["multiple of model.image.patch_size = 4", "image_size = 224"]),
        ("task.mask_unit", 48, ["divide model.image.image_size = 224", "set it to 4"]),
        ("task.tokenizer", "", ["task.tokenizer", "set the path"]),
        ("model.image.image_size", 208, ["multiple of 32", "nearest is 192"]),
        ("model.image.image_size", (192, 208), ["multiple of 32", "nearest is 192"]),
        ("model.text.begin_token", 0, ["model.text.begin_token", "(0, 2, 4)", "0, padding"]),
        ("model.text.mask_token", 32_000, ["(1, 2, 32000)", "below vocab_size = 32000"]),
    ],
)
def test_a_broken_rule_of_pairs_and_bare_images(name, value, words):
    aurora().validate()
    assert_refused(aurora(), name, value, words)


def test_some_loss_has_weight():
    config = aurora()
    config.task.masked_image = config.task.contrastive = config.task.captioning = 0.0
    config.validate()
    config.task.masked_language = 0.0
    with pytest.raises(ConfigError, match="all loss weights are 0; set one"):
        config.validate()


def test_micro_batches_hold_whole_splits():
    config = aurora()
    config.validate_devices(8)
    with pytest.raises(
        ConfigError, match=r"multiple of 128 \(16 devices x 2 micro-batches x 4 samples .*nearest is 128"
    ):
        config.validate_devices(16)
    assert config.task.pair_ratio == (3, 1)
    assert good().task.pair_ratio == pairs().task.pair_ratio == (0, 0)


def test_micro_batches_are_contrasted_with_all_of_the_batch():
    assert [c.task.loss_scope for c in (good(), pairs(), aurora())] == ["sample", "batch", "batch"]
    config = pairs()
    config.train.accumulate, config.task.grad_cache = 2, False
    config.validate()
    assert config.task.loss_scope == "micro_batch"


def test_auroras_evals_take_whole_tokens_and_units():
    config = aurora()
    config.evals[0].image_size = (192, 208)
    with pytest.raises(
        ConfigError, match=r"evals\[0\].image_size = \(192, 208\): must be a multiple of 32, what a token"
    ):
        config.validate()


def test_the_size_of_an_evals_images_is_one_that_the_model_takes():
    config = good()
    config.evals[0].image_size = (224, 448)
    config.validate()
    config.evals[0].image_size = (0, 224)
    with pytest.raises(ConfigError, match=r"evals\[0\].image_size\[0\] = 0: must lie in \[1, 4096\]"):
        config.validate()
    config.evals[0].image_size = 230
    with pytest.raises(ConfigError) as error:
        config.validate()
    rule = "config.evals[0].image_size = 230: must be a multiple of model.patch_size = 14; the nearest is 224"
    assert str(error.value) == rule


def test_networks_and_image_size():
    assert list(good().model.networks()) == ["model"]
    assert list(pairs().model.networks()) == ["model.image", "model.text"]
    assert good().model.image_size == pairs().model.image_size == 224


def test_images_are_mixed_two_by_two_on_a_device():
    config = pairs()
    config.validate_devices(32)
    with pytest.raises(
        ConfigError, match=r"64: must be a multiple of 128 \(64 devices x 1 micro-batches x 2 images to mix\)"
    ):
        config.validate_devices(64)
    config.task.mixup = 0.0
    config.validate_devices(64)


def test_fields_of_a_vit_that_make_no_sense_together():
    config = good()
    config.model.pos_embed, config.model.rope_theta = "none", 100.0
    config.validate()
    assert_refused(config, "model.pos_image_size", 224, ["pos_embed = none has no position table", "set it to 0"])
    config = good()
    config.model.activation = "swiglu"
    config.validate()
    assert_refused(config, "model.pool", "map", ["activation = swiglu needs three", "activation to gelu"])


def test_all_problems_are_told_at_once():
    config = good()
    config.optim.b1, config.model.pool = -1.0, "x"
    with pytest.raises(ConfigError) as error:
        config.validate()
    assert len(str(error.value).splitlines()) == 2


def test_source_without_path_weights_and_twin_evals():
    config = good()
    config.data.train = (TfdsConfig(path="", weight=0.0),)
    config.evals = (config.evals[0], dataclasses.replace(config.evals[0]))
    with pytest.raises(ConfigError) as error:
        config.validate()
    assert "data.train[0].path" in str(error.value)
    assert "data.train[0].weight" in str(error.value)
    assert "must be unique" in str(error.value)


def test_resume_and_weights_exclude_each_other():
    config = good()
    config.checkpoint = CheckpointConfig(resume="a", weights="b")
    with pytest.raises(ConfigError, match="excludes"):
        config.validate()


def test_devices_name_the_nearest_batch_and_mesh():
    config = good()
    config.validate_devices(8)
    with pytest.raises(ConfigError, match=r"multiple of 6 \(3 devices x 2 micro-batches\); the nearest is 66"):
        config.validate_devices(3)
    config.parallel.replicas = 3
    with pytest.raises(ConfigError, match=r"must divide the 8 devices; the nearest is 2"):
        config.validate_devices(8)


@pytest.mark.parametrize(
    ("base", "method"),
    [
        (BackboneConfig, "make"), (TaskConfig, "make"), (TaskConfig, "fields"), (SourceConfig, "make"),
        (EvalConfig, "make"), (Transform, "__call__"),
    ],
)  # fmt: skip
def test_a_class_that_lacks_a_method_cannot_be_instantiated(base, method):
    others = {name: lambda *_: None for name in base.__abstractmethods__ - {method}}
    lacking = dataclasses.dataclass(kw_only=True)(type("Lacking", (base,), others))
    with pytest.raises(TypeError, match=f"abstract class Lacking .*{method}"):
        lacking()
