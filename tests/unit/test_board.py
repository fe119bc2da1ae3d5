"""What a board keeps, and of how many models at a time; its numbers are tested in tests/parity/test_board_parity.py."""

import json
import types
import weakref
from concurrent.futures import ThreadPoolExecutor

import jax.numpy as jnp
import pytest

from visionfm_jax import board
from visionfm_jax.config.load import load_file
from visionfm_jax.errors import ConfigError


def measured(model: str = "a", weights: str = "0" * 16, **changes) -> dict:
    row = {"model": model, "weights": weights, "step": 3, "set": "cifar10", "kind": "knn", "protocol": "0a0a0a0a"}
    return {**row, "records": 60, "metrics": {"top1": 0.5}, **changes}


def test_boards_that_write_to_one_folder_keep_each_others_rows(tmp_path):
    file = tmp_path / "out" / "board.json"
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: board._add(measured(f"model{i}"), file), range(16)))
    rows = json.loads(file.read_text())["measurements"]
    assert sorted(row["model"] for row in rows) == sorted(f"model{i}" for i in range(16))
    for name in ("board.md", "board.html"):
        text = (file.parent / name).read_text()
        assert all(f"model{i}" in text for i in range(16))


def test_a_number_takes_the_place_of_that_of_the_same_model_and_set(tmp_path):
    file = tmp_path / "board.json"
    for row in (measured(), measured(set="dtd"), measured(protocol="1b1b1b1b", metrics={"top1": 0.25})):
        board._add(row, file)
    rows = json.loads(file.read_text())["measurements"]
    assert [(row["set"], row["protocol"]) for row in rows] == [("cifar10", "1b1b1b1b"), ("dtd", "0a0a0a0a")]
    assert "| cifar10 | 60 | 25.0 | 1b1b1b1b |" in (tmp_path / "board.md").read_text()


def test_models_of_one_name_are_told_apart_by_their_weights():
    text = board.markdown([measured(weights="0123456789abcdef"), measured(weights="fedcba9876543210"), measured("b")])
    assert "| set | images | a 01234567 | a fedcba98 | b | protocol |" in text
    assert "a 01234567" in board.page([measured(weights="0123456789abcdef"), measured()])


def test_a_file_that_is_no_board_is_refused(tmp_path):
    row = measured()
    del row["weights"]
    (tmp_path / "board.json").write_text(json.dumps({"measurements": [row]}))
    with pytest.raises(ConfigError, match=r"board.json: cannot be read as a board \(KeyError\('weights'\)\)"):
        board._read(tmp_path / "board.json")


def test_one_model_is_in_memory_at_a_time_and_its_configuration_stays(monkeypatch):
    class Loaded(types.SimpleNamespace):
        """A model."""

    made = types.SimpleNamespace(protocol="0a0a0a0a", source=[1], sources=[[1]], batch_size=1, settings={})
    knn = types.SimpleNamespace(name="knn", kind="knn", make=lambda run, host, hosts: made)
    there, configs = [], []

    def load(path):
        assert not [model for model in there if model()]
        config = load_file("configs/vit_huge.py:tiny")
        configs.append((config, config.evals))
        model = Loaded(config=config, params={"w": jnp.ones(3)}, step=1, trainer=None)
        there.append(weakref.ref(model))
        return model

    monkeypatch.setattr(board, "load", load)
    monkeypatch.setattr(board, "evals_of", lambda *_: [knn])
    monkeypatch.setattr(board, "measure", lambda *_: {"knn/top1": 0.5})
    sets = [types.SimpleNamespace(name="cifar10")]
    assert len(list(board.board({"a": "a", "b": "b"}, sets))) == 2
    assert all(config.evals is evals for config, evals in configs)
    assert len(configs) == 2
