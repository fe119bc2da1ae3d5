"""A configuration from what a run has saved."""

import json

import pytest

from tests.golden.dump import CONFIGS, SHIPPED
from visionfm_jax.config import load
from visionfm_jax.config.saved import from_dict
from visionfm_jax.config.schema import to_dict
from visionfm_jax.errors import ConfigError


def shipped(name: str):
    stem, _, variant = name.partition(":")
    return load.load_file(f"{CONFIGS / stem}.py:{variant}")


@pytest.mark.parametrize("name", SHIPPED)
def test_round_trip(name):
    config = shipped(name)
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"newer": 1}, r"config: Config has no newer; a newer version of visionfm_jax may have"),
        ({"optim": 3}, r"config\.optim: is 3, not a group of fields"),
        ({"optim": {"rate": 1}}, r"config\.optim: OptimConfig has no rate"),
        (
            {"task": {"kind": "Mine"}},
            r"config\.task\.kind = 'Mine': no such class is there, but .*ClassificationConfig",
        ),
        ({"task": {"kind": "VisionTask"}}, r"no such class is there"),
        ({"model": {}}, r"config\.model\.kind = None"),
        ({"train": {"batch_size": -1}}, r"train\.batch_size = -1"),
        ({"evals": [{"kind": "classification"}]}, r"config\.evals\[0\]: lacks source"),
    ],
)
def test_what_is_no_configuration(change, message):
    values = json.loads(json.dumps(to_dict(shipped("quickstart")))) | change
    with pytest.raises(ConfigError, match=message):
        from_dict(values)


def test_what_an_older_version_did_not_have_is_as_by_default():
    values = json.loads(json.dumps(to_dict(shipped("quickstart"))))
    del values["optim"]["layer_decay"], values["telemetry"]["stuck_minutes"]
    assert from_dict(values) == shipped("quickstart")
