"""The run folder: one owner, and the exact configuration."""

from __future__ import annotations

import json

import pytest

from visionfm_jax.config import Config
from visionfm_jax.errors import UserError
from visionfm_jax.train.folder import RunFolder


def config_in(folder) -> Config:
    config = Config(name="folder", workdir=str(folder))
    config.train.steps = 20_000
    return config


def test_one_owner_at_a_time(tmp_path):
    config = config_in(tmp_path / "deep" / "run")
    with RunFolder(config, owner=True) as folder:
        with pytest.raises(UserError, match=r"another run is in .*; wait for it, or set config\.workdir"):
            RunFolder(config, owner=True)
        RunFolder(config, owner=False).close()  # the other processes of the same run
        assert folder.path.is_dir()
    RunFolder(config, owner=True).close()


def test_the_configuration_is_kept_once_it_fits(tmp_path):
    config = config_in(tmp_path)
    kept = tmp_path / "config.json"
    with RunFolder(config, owner=True) as folder:
        assert not kept.exists()
        folder.record(config)
    record = json.loads(kept.read_text())
    assert record["config"]["train"]["steps"] == 20_000
    assert record["derived"]["examples_seen"] == 20_000 * 2048
    kept.unlink()
    with RunFolder(config, owner=False) as folder:
        folder.record(config)
    assert not kept.exists()


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"config\.workdir = .*name a folder that can be written"):
        RunFolder(config_in(tmp_path / "file" / "run"), owner=True)
