"""Checksums of loose image files: every bit that turns is noticed, and nothing is read that need not be."""

import errno
import os
import pickle
from pathlib import Path

import annotated_sets
import numpy as np
import pytest
from absl import logging
from caption_sets import write_coco, write_visual_genome
from tar_sets import cannot_write, picture

from visionfm_jax import storage
from visionfm_jax.config import Config, SourceConfig
from visionfm_jax.config.limits import types_of
from visionfm_jax.data import checksums as command
from visionfm_jax.data.sources import checksums, open_source
from visionfm_jax.data.sources.kinds import KINDS, BundledConfig, TfdsConfig
from visionfm_jax.data.sources.record import DamagedRecord
from visionfm_jax.errors import ConfigError, DataError
from visionfm_jax.evals.kinds import AccuracyConfig
from visionfm_jax.models.backbones.vit import ViTConfig
from visionfm_jax.tasks.classification import ClassificationConfig
from visionfm_jax.train.provenance import provenance_of


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch, caplog):
    logging.use_python_logging(quiet=True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path) -> Path:
    for i in range(6):
        path = tmp_path / f"data/train/class{i % 2}/{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(i))
    os.rename(path, os.path.join(os.fsencode(path.parent), b"\xff.png"))
    return tmp_path / "data"


def source_config(kind: str, path: Path, split: str = "train") -> SourceConfig:
    cls = KINDS[kind]
    parts = {"split": split} if "split" in types_of(cls) else {}
    return cls(path=str(path), **parts)


def turn_a_bit(path: Path | bytes, byte: int = 20) -> None:
    """Size and times stay, as when a disk rots."""
    times = os.stat(path)
    with open(path, "r+b") as file:
        file.seek(byte)
        value = file.read(1)[0]
        file.seek(byte)
        file.write(bytes([value ^ 4]))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def damaged(config: SourceConfig) -> list[str]:
    """Keys of the records that are refused."""
    source, out = open_source(config), []
    source = pickle.loads(pickle.dumps(source))  # as it reaches a worker
    for i in range(len(source)):
        try:
            source[i]
        except DamagedRecord:
            out.append(source.key(i))
    return out


@pytest.mark.parametrize("kind", [name for name, cls in KINDS.items() if cls.loose_files])
def test_a_turned_bit_is_a_damaged_record(kind, folder, tmp_path):
    if kind == "folder":
        config, file = source_config(kind, folder), os.path.join(os.fsencode(folder), b"train/class1/\xff.png")
    elif kind == "coco_captions":
        config = source_config(kind, write_coco(tmp_path / "coco", [["a"], ["b"], ["c"]]), "train2017")
        file = tmp_path / "coco/train2017/000000000001.jpg"
    elif kind != "visual_genome":
        config = annotated_sets.write(kind, tmp_path / kind)
        (file,) = (tmp_path / kind).rglob("b.jpg")
    else:
        config = source_config(kind, write_visual_genome(tmp_path / "vg", [["a"], ["b"]]), "")
        file = tmp_path / "vg/VG_100K_2/2.jpg"
    turn_a_bit(file)
    assert damaged(config) == []  # nobody can know
    turn_a_bit(file)
    assert command.make(config).endswith(".checksums")
    assert damaged(config) == []
    turn_a_bit(file)
    (key,) = damaged(config)
    assert key.endswith(("ff.png", "1.jpg", "2.jpg", "b.jpg"))
    command.make(config)  # takes what is not new as it was
    assert damaged(config) == [key]


def test_only_new_and_changed_files_are_read_again(folder):
    config = source_config("folder", folder)
    path = folder / "visionfm_train.checksums"
    assert command.make(config) == f"folder {folder} [train]: 6 files, 6 of them read: {path}"
    assert command.make(config) == f"folder {folder} [train]: 6 files, 0 of them read: {path}"
    (folder / "train/class0/0.png").write_bytes(picture(7))
    os.utime(folder / "train/class0/0.png", ns=(1, 1))
    assert damaged(config) == ["class0/0.png"]
    (folder / "train/class0/new.png").write_bytes(picture(8))
    (folder / "train/class0/2.png").unlink()
    assert "6 files, 2 of them read" in command.make(config)
    assert damaged(config) == []


def test_the_log_says_what_has_no_checksum(folder, caplog):
    config = source_config("folder", folder)
    open_source(config)
    command.make(config)
    with caplog.at_level("INFO", logger="absl"):
        open_source(config)
        (folder / "train/class0/1.png").write_bytes(picture(1))
        open_source(config)
    lines = [r.message.partition("[train]: ")[2] for r in caplog.records]
    assert lines[0].startswith("its files have no checksums, so a flipped bit may go unnoticed; visionfm data")
    assert lines[1:] == [
        f"its 6 files are compared with {folder / 'visionfm_train.checksums'}",
        f"1 of 7 files have no checksum in {folder / 'visionfm_train.checksums'}, the first is class0/1.png; run "
        "visionfm data checksums again",
    ]


def test_an_interruption_keeps_what_was_read(folder, monkeypatch):
    monkeypatch.setattr(command, "CHUNK", 2)
    monkeypatch.setattr(command, "KEPT", 0)
    config = source_config("folder", folder)
    record = command._record

    def interrupted(source, index, known):
        if index == 5:
            raise KeyboardInterrupt
        return record(source, index, known)

    monkeypatch.setattr(command, "_record", interrupted)
    with pytest.raises(KeyboardInterrupt):
        command.make(config)
    monkeypatch.setattr(command, "_record", record)
    assert "6 files, 2 of them read" in command.make(config)
    assert sorted(p.name for p in folder.iterdir()) == ["train", "visionfm_train.checksums"]


def test_storage_that_fails_for_a_moment_loses_nothing(folder, monkeypatch, capsys):
    monkeypatch.setattr(storage, "WAITS", (0,))
    write, failures = command.write_table, [OSError(errno.EIO, os.strerror(errno.EIO))]

    def fails_once(*arguments):
        if failures:
            raise failures.pop()
        write(*arguments)

    monkeypatch.setattr(command, "write_table", fails_once)
    assert "6 files, 6 of them read" in command.make(source_config("folder", folder))
    assert "Input/output error; trying again in 0 s" in capsys.readouterr().err


def test_damaged_checksums_are_refused(folder):
    config = source_config("folder", folder)
    command.make(config)
    path = folder / "visionfm_train.checksums"
    for byte in np.random.default_rng(0).integers(path.stat().st_size, size=20).tolist():
        turn_a_bit(path, byte)
        with pytest.raises(
            DataError, match=r"train.checksums: cannot be used \(.*\); delete it, then run visionfm data"
        ):
            open_source(config)
        turn_a_bit(path, byte)
    assert damaged(config) == []


def test_a_run_keeps_the_checksums_that_it_began_with_whatever_becomes_of_the_file(folder):
    config = source_config("folder", folder)
    command.make(config)
    source = open_source(config)
    assert checksums.newest(config).records.flags.owndata  # mapped, the next line would end this process by SIGBUS
    os.truncate(folder / "visionfm_train.checksums", 0)
    assert source[0]["image"] == picture(0)
    turn_a_bit(folder / "train/class0/0.png")
    with pytest.raises(DamagedRecord):
        source[0]


def test_they_go_to_the_cache_where_the_data_cannot_be_written(folder, cache, monkeypatch):
    config = source_config("folder", folder)
    command.make(config)
    cannot_write(monkeypatch, folder)
    (folder / "train/class0/0.png").write_bytes(picture(7))
    os.utime(folder / "train/class0/0.png", ns=(1, 1))
    assert "6 files, 1 of them read: " + str(cache) in command.make(config)
    assert damaged(config) == []


def test_the_fingerprint_of_the_data_does_not_depend_on_them(folder):
    config = Config(name="x", model=ViTConfig(), task=ClassificationConfig())
    config.train.steps, config.data.train = 20_000, (source_config("folder", folder),)
    before = provenance_of(config, [open_source(config.data.train[0])])
    command.make(config.data.train[0])
    assert provenance_of(config, [open_source(config.data.train[0])]) == before


def test_the_command_takes_every_source_of_files_once(folder):
    held_out = TfdsConfig(path="/none")
    files = source_config("folder", folder)
    config = Config(
        name="x",
        model=ViTConfig(),
        task=ClassificationConfig(),
        evals=(AccuracyConfig(source=held_out), AccuracyConfig(source=source_config("folder", folder))),
    )
    config.data.train = (files, BundledConfig(path="digits"))
    assert command.sources_of(config) == [files]
    config.data.train, config.evals = (held_out,), ()
    with pytest.raises(ConfigError, match="no source is folder or coco_captions or visual_genome"):
        command.sources_of(config)
