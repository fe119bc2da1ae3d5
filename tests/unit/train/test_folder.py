"""The run folder: one owner, and the exact configuration."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

from visionfm_jax.config import Config, SourceConfig
from visionfm_jax.errors import ConfigError, OutputError, UserError
from visionfm_jax.train.folder import RunFolder


def config_in(folder) -> Config:
    config = Config(name="folder", workdir=str(folder))
    config.train.steps = 20_000
    config.data.train = (SourceConfig(path="/data"),)
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
        folder.record(config, 0, 2)
    record = json.loads(kept.read_text())
    assert record["config"]["train"]["steps"] == 20_000
    assert record["derived"]["examples_seen"] == 20_000 * 2048
    kept.unlink()
    with RunFolder(config, owner=False) as folder:
        folder.record(config, 0, 2)
    assert not kept.exists()


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"config\.workdir = .*name a folder that can be written"):
        RunFolder(config_in(tmp_path / "file" / "run"), owner=True)


def test_changes_of_settings_are_told_and_the_former_file_kept(tmp_path):
    config = config_in(tmp_path)
    with RunFolder(config, owner=True) as folder:
        assert folder.record(config, 0, 2) == []
        config.optim.lr = 5e-4
        assert folder.record(config, 40, 2) == ["optim.lr: 0.001 -> 0.0005"]
        kept = json.loads((tmp_path / "config-until-40.json").read_text())
        assert kept["config"]["optim"]["lr"] == 1e-3
        assert folder.record(config, 50, 2) == []


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("seed", lambda c: setattr(c, "seed", 7)),
        ("train.batch_size", lambda c: setattr(c.train, "batch_size", 8)),
        ("data.train[0].split", lambda c: setattr(c.data.train[0], "split", "test")),
        ("data.train", lambda c: setattr(c.data, "train", c.data.train * 2)),
    ],
)
def test_a_run_that_continues_keeps_the_order_of_its_samples(tmp_path, name, change):
    config = config_in(tmp_path)
    with RunFolder(config, owner=True) as folder:
        folder.record(config, 0, 2)
        before = (tmp_path / "config.json").read_text()
        config.data.train[0].path = "/moved"
        change(config)
        with pytest.raises(ConfigError, match=re.escape(f"config.{name} differs")):
            folder.record(config, 10, 2)
        assert (tmp_path / "config.json").read_text() == before


def test_a_run_of_the_former_order_of_samples_is_not_continued(tmp_path):
    config, kept = config_in(tmp_path), tmp_path / "config.json"
    with RunFolder(config, owner=True) as folder:
        folder.record(config, 0, 2)
        record = json.loads(kept.read_text())
        assert record.pop("order_version") == 2
        kept.write_text(json.dumps(record))  # as releases before the version wrote it
        with pytest.raises(ConfigError, match=r"version 1 of the order.*version 2.*another config\.workdir"):
            folder.record(config, 10, 2)
        config.data.shuffle = False  # the order of the files is that of every version
        record["config"]["data"]["shuffle"] = False
        kept.write_text(json.dumps(record))
        folder.record(config, 10, 2)
    assert json.loads(kept.read_text())["order_version"] == 2


@pytest.mark.parametrize(
    "content",
    [b"", b'{"config": {"name": "fo', b"[1, 2]", b'{"other": 1}', b"\x00\xff\xfe" * 20, b"[" * 100_000, b'"\xc3("'],
)
def test_a_damaged_configuration_is_one_line(tmp_path, content):
    config = config_in(tmp_path)
    with RunFolder(config, owner=True) as folder:
        folder.record(config, 0, 1)
        (tmp_path / "config.json").write_bytes(content)
        with pytest.raises(ConfigError, match=r"config\.json is damaged: .*; move it away") as caught:
            folder.record(config, 10, 1)
        assert "\n" not in str(caught.value)
        assert (tmp_path / "config.json").read_bytes() == content
        folder.record(config, 0, 1)  # a run from the beginning writes its own


@pytest.mark.parametrize(
    "name",
    ["metrics.jsonl", "config.json", "config.tmp", ".lock", "stacks-3.txt", "tensorboard", "learning_curves.png.tmp",
     "checkpoints", "checkpoints/40/scores.tmp", "tensorboard/events.1"],
)  # fmt: skip
def test_nothing_is_written_through_a_link(tmp_path, name):
    """A run folder from somebody else: what its links point to stays as it is."""
    outside, folder = tmp_path / "outside", tmp_path / "run"
    outside.write_text("mine")
    (folder / name).parent.mkdir(parents=True)
    (folder / name).symlink_to(outside)
    with pytest.raises(UserError, match=rf"{name}: is a link to '.*outside', which .*; remove it") as caught:
        RunFolder(config_in(folder), owner=True)
    assert "\n" not in str(caught.value)
    assert outside.read_text() == "mine"
    (folder / name).unlink()
    (tmp_path / "link").symlink_to(folder)  # the folder itself may be reached by one
    RunFolder(config_in(tmp_path / "link"), owner=True).close()


def test_a_pipe_in_the_run_folder_is_refused(tmp_path):
    os.mkfifo(tmp_path / "metrics.jsonl")  # to open it would wait for ever
    with pytest.raises(UserError, match="is no ordinary file"):
        RunFolder(config_in(tmp_path), owner=True)


def test_a_full_disk_at_the_configuration(tmp_path, monkeypatch):
    config = config_in(tmp_path)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with RunFolder(config, owner=True) as folder:
        monkeypatch.setattr(Path, "write_text", full)
        with pytest.raises(OutputError, match=r"cannot write .*config\.json: No space left on device; free space"):
            folder.record(config, 0, 1)
    assert OutputError.exit_code == 74
