"""The attack of `tools/attack/configuration.py`, small; and that it finds what is wrong."""

import importlib.util
import sys
from pathlib import Path

import pytest

from visionfm_jax.config import Config

PATH = Path(__file__).parents[3] / "tools" / "attack" / "configuration.py"


@pytest.fixture(scope="module")
def attack():
    spec = importlib.util.spec_from_file_location("attack_configuration", PATH)
    module = sys.modules["attack_configuration"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_wild_values_are_refused_in_words_or_can_be_worked_with(attack):
    outcomes, findings = attack.attack_values(400, seed=2, shapes=1)
    assert not findings
    assert outcomes["refused"] > 200
    assert outcomes["accepted"] > 20
    assert outcomes["networks"] == 1


def test_without_rules_the_attack_finds_nonsense(attack, monkeypatch):
    monkeypatch.setattr(Config, "validate", lambda config: None)
    _, findings = attack.attack_values(100, seed=2, shapes=0)
    assert len(findings) > 30


def test_command_lines_are_wrong_in_more_than_one_way(attack):
    lines = attack.command_lines(130, seed=0)
    assert len({tuple(words) for _, words in lines}) > 110
    assert {program for program, _ in lines} == {
        "main",
        "bench",
        "plan",
        "data.tokenizer",
        "data.select",
    }
