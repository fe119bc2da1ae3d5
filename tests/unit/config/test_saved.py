"""A configuration from what a run has saved."""

import copy
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
