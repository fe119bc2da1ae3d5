"""The run folder: one owner, and what its samples follow from."""

from __future__ import annotations

import errno
import fcntl
import json
import os
from importlib import resources
from pathlib import Path

import pytest
from runs import ROOT

from visionfm_jax import storage
from visionfm_jax.config import Config
from visionfm_jax.config.load import load_file
from visionfm_jax.config.saved import of_run
from visionfm_jax.data.sources import open_source
from visionfm_jax.data.sources.kinds import BundledConfig
from visionfm_jax.data.tokenizer import open_tokenizer
from visionfm_jax.errors import ConfigError, DataError, OutputError, StorageError, UserError
from visionfm_jax.models.backbones.vit import ViTConfig
from visionfm_jax.tasks.classification import ClassificationConfig
from visionfm_jax.train.folder import RunFolder, damage_file, refuse_links, refuse_other_weights
from visionfm_jax.train.provenance import provenance_of, settings_files

DIGITS = BundledConfig(path="digits")
SOURCES = [open_source(DIGITS)]


def config_in(folder) -> Config:
    config = Config(name="folder", model=ViTConfig(), task=ClassificationConfig(), workdir=str(folder))
    config.train.steps = 20_000
    config.data.train = (DIGITS,)
    return config


def test_one_owner_at_a_time(tmp_path):
    config = config_in(tmp_path / "deep" / "run")
    with RunFolder(config, owner=True) as folder:
        with pytest.raises(UserError, match=r"another run is using .*; wait for it, or set config\.workdir"):
            RunFolder(config, owner=True)
        RunFolder(config, owner=False).close()  # the other processes of the same run
        assert folder.path.is_dir()
    RunFolder(config, owner=True).close()


def test_the_provenance_is_kept_once_it_fits(tmp_path):
    config = config_in(tmp_path)
    with RunFolder(config, owner=True) as folder:
        assert not (tmp_path / "config.json").exists()
        folder.keep(provenance_of(config, SOURCES), 0, "")
    kept = json.loads((tmp_path / "config.json").read_text())
    assert kept["config"]["train"]["steps"] == 20_000
    assert kept["derived"]["examples_seen"] == 20_000 * 2048
    assert json.loads((tmp_path / "data.json").read_text())["sources"][0]["records"] == len(SOURCES[0])


def test_the_tokenizer_travels_with_the_folder(tmp_path):
    """A file of captions' tokens may be gone, or be elsewhere, where the model is used."""
    file = tmp_path / "captions.model"
    file.write_bytes((resources.files("visionfm_jax.data.text") / "emoji.model").read_bytes())
    config = load_file(f"{ROOT}/configs/aurora_xl.py:tiny")
    config.workdir, config.task.tokenizer = str(tmp_path / "run"), str(file)
    sources = [open_source(source) for source in config.data.train]
    with RunFolder(config, owner=True) as folder:
        folder.keep(provenance_of(config, sources), 0, "")
    file.rename(tmp_path / "elsewhere.model")
    moved = (tmp_path / "run").rename(tmp_path / "moved")
    again = of_run(moved)
    assert open_tokenizer(again.task.tokenizer).encode("waving hand") == open_tokenizer("emoji").encode("waving hand")
    with RunFolder(again, owner=True) as folder:  # the copy is its own original
        assert folder.keep(provenance_of(again, sources), 40, moved) == [
            f"workdir: {tmp_path / 'run'} -> {moved}",
            f"task.tokenizer: {file} -> {moved / 'tokenizer.model'}",
        ]
    assert (moved / "tokenizer.model").read_bytes() == (tmp_path / "elsewhere.model").read_bytes()


def test_damaged_records_are_kept_by_name_if_they_can_be(tmp_path):
    for host, name in ((0, "damaged.jsonl"), (1, "damaged.process-1.jsonl")):
        keep = damage_file(tmp_path, host)
        keep({"key": "a"})
        keep({"key": "b"})
        assert (tmp_path / name).read_text() == '{"key": "a"}\n{"key": "b"}\n'
    damage_file(tmp_path / "missing", 0)({"key": "a"})


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"config\.workdir = .*name a folder that can be written"):
        RunFolder(config_in(tmp_path / "file" / "run"), owner=True)


def test_changes_of_settings_are_listed_and_the_former_file_kept(tmp_path):
    config = config_in(tmp_path)
    with RunFolder(config, owner=True) as folder:
        assert folder.keep(provenance_of(config, SOURCES), 0, "") == []
        config.optim.lr = 5e-4
        assert folder.keep(provenance_of(config, SOURCES), 40, tmp_path) == ["optim.lr: 0.001 -> 0.0005"]
        kept = json.loads((tmp_path / "config-until-40.json").read_text())
        assert kept["config"]["optim"]["lr"] == 1e-3
        assert folder.keep(provenance_of(config, SOURCES), 50, tmp_path) == []


def test_where_weights_came_from_is_kept_while_the_run_goes_on(tmp_path):
    config, weights = config_in(tmp_path), {"source": "w", "sha256": {"w": "1"}}
    with RunFolder(config, owner=True) as folder:
        for begun_in, came in (("", weights), (tmp_path, None)):
            folder.keep(provenance_of(config, SOURCES), 0, begun_in, came)
            assert json.loads((tmp_path / "weights.json").read_text()) == weights
        refuse_other_weights(tmp_path, weights)
        refuse_other_weights(tmp_path, None)
        with pytest.raises(ConfigError, match=r"weights = 'w': not those that the run in .* began with \(sha256 was"):
            refuse_other_weights(tmp_path, weights | {"sha256": {"w": "2"}})
        folder.keep(provenance_of(config, SOURCES), 0, "")  # from scratch
        assert not (tmp_path / "weights.json").exists()


def test_settings_stay_with_their_steps_where_a_run_goes_back(tmp_path):
    config = config_in(tmp_path)

    def restart(lr, step):
        config.optim.lr = lr
        folder.keep(provenance_of(config, SOURCES), step, tmp_path if step else "")

    def rates(*at):
        files = [settings_files(tmp_path, step, step) for step in at]
        return [json.loads(file.read_text())["config"]["optim"]["lr"] for [file] in files]

    with RunFolder(config, owner=True) as folder:
        restart(1e-3, 0)
        restart(2e-3, 40)
        restart(3e-3, 40)  # nothing was run with the second
        assert rates(0, 39, 40, 50) == [1e-3, 1e-3, 3e-3, 3e-3]
        restart(4e-3, 60)
        assert rates(39, 40, 59, 60) == [1e-3, 3e-3, 3e-3, 4e-3]
        assert [file.name for file in settings_files(tmp_path, 39, 60)] == [
            "config-until-40.json", "config-until-60.json", "config.json"
        ]  # fmt: skip
        restart(4e-3, 20)  # of a checkpoint from before
        assert rates(0, 19, 20, 39, 40, 60) == [1e-3, 1e-3, 4e-3, 4e-3, 4e-3, 4e-3]
        restart(5e-3, 0)  # all are gone
        assert rates(0, 19, 20) == [5e-3, 5e-3, 5e-3]


def test_what_does_not_fit_leaves_the_files_as_they_were(tmp_path):
    config = config_in(tmp_path / "run")
    with RunFolder(config, owner=True) as folder:
        folder.keep(provenance_of(config, SOURCES), 0, "")
        before = {path.name: path.read_bytes() for path in folder.path.iterdir()}
        config.seed = 7
        with pytest.raises(ConfigError, match=r"config\.seed differs"):
            folder.keep(provenance_of(config, SOURCES), 10, folder.path)
        assert {path.name: path.read_bytes() for path in folder.path.iterdir()} == before
        first, config = folder.path, config_in(tmp_path / "second")
        config.seed = 7
    with RunFolder(config, owner=True) as folder, pytest.raises(ConfigError, match=rf"of the run in {first}, and"):
        folder.keep(provenance_of(config, SOURCES), 10, first)  # of another folder, whose state this run goes on from


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


def test_a_folder_whose_names_cannot_be_read_is_refused(tmp_path, monkeypatch):
    """It may be writable: a link in it would be followed unseen."""
    (tmp_path / "tensorboard").mkdir()
    scandir = os.scandir

    def closed(path):
        if Path(path).name == "tensorboard":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return scandir(path)

    refuse_links(tmp_path / "new")
    monkeypatch.setattr(os, "scandir", closed)
    with pytest.raises(DataError, match=r"cannot be read: .*Permission denied: .*tensorboard"):
        refuse_links(tmp_path)


def test_a_run_may_rename_its_files_meanwhile(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "walk", lambda folder, **_: [(str(folder), ["checkpoints"], ["config.tmp"])])
    refuse_links(tmp_path)


@pytest.mark.parametrize(("module", "name"), [(fcntl, "flock"), (os, "fsync"), (os, "mkdir")])
def test_storage_that_fails_for_a_moment_is_tried_again_then_left_to_the_next_start(
    tmp_path, monkeypatch, module, name
):
    """Of the lock, the files, and the folder itself."""
    act, times = getattr(module, name), [0]

    def fails(*arguments, **more):
        times[0] -= 1
        if times[0] >= 0:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return act(*arguments, **more)

    def begin(folder):
        config = config_in(folder)
        with RunFolder(config, owner=True) as folder:
            folder.keep(provenance_of(config, SOURCES), 0, "")

    monkeypatch.setattr(module, name, fails)
    monkeypatch.setattr(storage, "WAITS", (0, 0))
    times[0] = 2
    begin(tmp_path / "a")
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == [".lock", "config.json", "data.json"]
    times[0] = 3
    with pytest.raises(StorageError, match=r"Input/output error, 3 times in 0 s; check the storage, then start"):
        begin(tmp_path / "b")


def test_a_full_disk_at_the_configuration(tmp_path, monkeypatch):
    config = config_in(tmp_path)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with RunFolder(config, owner=True) as folder:
        monkeypatch.setattr(Path, "write_text", full)
        with pytest.raises(OutputError, match=r"cannot write .*data\.json: No space left on device; free space"):
            folder.keep(provenance_of(config, SOURCES), 0, "")
    assert OutputError.exit_code == 74
