"""A run continues with the samples that it was promised, or says in one line why it cannot."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import jax
import pytest

from visionfm_jax import storage
from visionfm_jax.config import Config
from visionfm_jax.config.schema import to_dict
from visionfm_jax.data import loader
from visionfm_jax.data.sources import open_source
from visionfm_jax.data.sources.kinds import BundledConfig, FolderConfig
from visionfm_jax.data.transforms import Flip, RandomResizedCrop
from visionfm_jax.errors import ConfigError, DataError, StorageError
from visionfm_jax.models.backbones.swin_v2 import SwinV2Config
from visionfm_jax.models.backbones.vit import ViTConfig
from visionfm_jax.tasks.classification import ClassificationConfig
from visionfm_jax.tasks.contrastive import ContrastiveConfig
from visionfm_jax.tasks.multimodal import MultimodalConfig
from visionfm_jax.train.provenance import (
    DATA,
    SETTINGS,
    Provenance,
    changes,
    provenance_of,
    read_provenance,
    refuse_other_classes,
    with_settings,
)


@pytest.fixture
def pictures(tmp_path) -> Path:
    """PATH/CLASS/FILE; nobody looks into the files here."""
    root = tmp_path / "pictures"
    for name, size in {"bee/a.jpg": 1, "bee/b.jpg": 2, "bee/c.jpg": 3, "cow/a.jpg": 4, "cow/b.jpg": 5}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x" * size)
    return root


def config_of(pictures: Path, **more) -> Config:
    config = Config(name="provenance", model=ViTConfig(), task=ClassificationConfig(), **more)
    config.train.steps, config.optim.warmup_steps = 100, 10
    config.data.train = (FolderConfig(path=str(pictures), split=""),)
    return config


def provenance(config: Config) -> Provenance:
    return provenance_of(config, [open_source(s) for s in config.data.train])


@pytest.fixture
def kept(pictures, tmp_path) -> tuple[Path, Provenance]:
    """A run folder, and the provenance of a run that goes on from it."""
    new = provenance(config_of(pictures))
    for name, value in zip((SETTINGS, DATA), new[:2], strict=True):
        (tmp_path / name).write_text(json.dumps(value))
    assert changes(read_provenance(tmp_path), new, tmp_path) == []
    return tmp_path, new


def test_another_jax_is_told(kept):
    folder, new = kept
    (folder / SETTINGS).write_text(json.dumps({**new.settings, "jax": "0.1"}))
    [change] = changes(read_provenance(folder), new, folder)
    assert change == f"jax: 0.1 -> {jax.__version__} (steps agree up to rounding only)"
    (folder / SETTINGS).write_text(json.dumps({k: v for k, v in new.settings.items() if k != "jax"}))
    assert changes(read_provenance(folder), new, folder) == []  # of a release that did not keep it


def added(root: Path) -> None:
    (root / "bee/d.jpg").write_bytes(b"x")


def removed(root: Path) -> None:
    (root / "cow/a.jpg").unlink()


def swapped(root: Path) -> None:
    (root / "bee/a.jpg").rename(root / "bee/z.jpg")
    (root / "cow/a.jpg").rename(root / "bee/a.jpg")
    (root / "bee/z.jpg").rename(root / "cow/a.jpg")


def another_class(root: Path) -> None:
    (root / "ant").mkdir()
    (root / "ant/a.jpg").write_bytes(b"x")


CRC = "[0-9a-f]{8}"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (added, f"5 records were there, 6 are; bee was 3 files, {CRC}, is 4 files, {CRC}; restore"),
        (removed, f"5 records were there, 4 are; cow was 2 files, {CRC}, is 1 file, {CRC}; restore"),
        (swapped, f"trained on: bee was 3 files, {CRC}, is 3 files, {CRC} and 1 more differ; restore"),
        (
            another_class,
            "5 records were there, 6 are; class 0 was 'bee', is 'ant' (of 2, now 3); ant was not there, is 1 file, ",
        ),
    ],
)
def test_changed_data_are_refused(pictures, tmp_path, change, words):
    config = config_of(pictures)
    old = provenance(config)
    change(pictures)
    with pytest.raises(DataError) as error:
        changes(old, provenance(config), tmp_path)
    message = str(error.value)
    assert message.startswith(f"config.data.train[0] = folder {pictures}: not the data that the run in {tmp_path} was ")
    assert re.search(words.replace("(of 2, now 3)", re.escape("(of 2, now 3)")), message), message
    assert message.endswith(
        "restore them, or start in another config.workdir, with its weights by "
        f"config.checkpoint.weights={str(tmp_path)!r}"
    )
    assert "\n" not in message


def test_the_same_data_elsewhere_continue(pictures, tmp_path):
    config = config_of(pictures)
    old = provenance(config)
    moved = Path(shutil.copytree(pictures, tmp_path / "elsewhere"))
    shutil.rmtree(pictures)
    assert changes(old, provenance(config_of(moved)), tmp_path) == [f"data.train[0].path: {pictures} -> {moved}"]


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("seed", lambda c: setattr(c, "seed", 7)),
        ("train.batch_size", lambda c: setattr(c.train, "batch_size", 8)),
        ("data.shuffle", lambda c: setattr(c.data, "shuffle", False)),
        ("data.train[0].weight", lambda c: setattr(c.data.train[0], "weight", 2.0)),
        ("data.train", lambda c: setattr(c.data, "train", c.data.train * 2)),
    ],
)
def test_settings_that_move_samples_are_refused(pictures, tmp_path, name, change):
    old, config = provenance(config_of(pictures)), config_of(pictures)
    change(config)
    with pytest.raises(ConfigError, match=re.escape(f"config.{name} differs from that of the run in {tmp_path}, and")):
        changes(old, provenance(config), tmp_path)


def test_a_field_that_was_not_there_counts_as_its_default(kept, pictures):
    folder, new = kept
    before = json.loads((folder / SETTINGS).read_text())
    config = before["config"]
    for holder, name in [
        (config["data"]["train"][0], "weight"), (config["data"]["augment"], "mean"), (config, "telemetry"),
        (config["checkpoint"], "on_damage"), (config, "evals"),
    ]:  # fmt: skip
        del holder[name]
    (folder / SETTINGS).write_text(json.dumps(before))
    assert changes(read_provenance(folder), new, folder) == []
    other = config_of(pictures)
    other.checkpoint.on_damage = "older"
    assert changes(read_provenance(folder), provenance(other), folder) == ["checkpoint.on_damage: stop -> older"]
    usual, other.data.augment.mean = other.data.augment.mean, (0.5, 0.5, 0.5)
    taken, changed = with_settings(other, folder, folder / SETTINGS)  # to replay a step of it
    assert (taken.data.augment.mean, changed) == (usual, [f"data.augment.mean: (0.5, 0.5, 0.5) -> {usual}"])
    other.data.train[0].weight = 2.0
    with pytest.raises(ConfigError, match=r"config\.data\.train\[0\]\.weight differs"):
        changes(read_provenance(folder), provenance(other), folder)


def former(config: Config) -> dict[str, Any]:
    """The settings that releases kept which had one class for all sources, and one for all evals."""
    before = {"kind", "image_key", "label_key", "caption_key", "selection", "split"}
    settings = json.loads(json.dumps(to_dict(config)))
    for source in (*settings["data"]["train"], *(e["source"] for e in settings["evals"])):
        source |= dict.fromkeys(before - source.keys(), "")
    for evaluation in settings["evals"]:
        more = {"classes": "", "prompts": "", "gallery": [], "decoding": "greedy", "beams": 4, "top_p": 0.9}
        evaluation |= {name: value for name, value in more.items() if name not in evaluation}
    del settings["model"]["kind"], settings["task"]["kind"]
    return settings


def test_settings_of_releases_with_one_class_for_all_kinds_continue(kept, pictures):
    folder, new = kept
    (folder / SETTINGS).write_text(json.dumps(new.settings | {"config": former(new.config)}))
    assert changes(read_provenance(folder), new, folder) == []
    assert with_settings(new.config, folder, folder / SETTINGS) == (new.config, [])
    other = config_of(pictures)
    other.data.train = (BundledConfig(path="digits"),)
    with pytest.raises(ConfigError, match=r"config\.data\.train\[0\]\.kind differs"):
        changes(read_provenance(folder), provenance(other), folder)


def test_another_model_or_task_is_refused(pictures, tmp_path):
    old = provenance(config_of(pictures))
    for part, other, line in (
        ("model", SwinV2Config(), "config.model.kind: ViTConfig -> SwinV2Config: the run in .* was trained"),
        ("task", ContrastiveConfig(tokenizer="clip"), "config.task.kind: ClassificationConfig -> ContrastiveConfig: "),
    ):
        config = config_of(pictures)
        setattr(config, part, other)
        with pytest.raises(ConfigError, match=line):
            changes(old, provenance(config), tmp_path)


def test_another_ratio_of_pairs_is_refused(tmp_path):
    def of(pair_ratio):
        task = MultimodalConfig(tokenizer="emoji", pair_ratio=pair_ratio)
        config = Config(name="pairs", model=ViTConfig(), task=task)
        config.train.steps = 100
        config.data.train = (
            BundledConfig(path="twemoji"),
            BundledConfig(path="digits"),
        )
        return provenance(config)

    with pytest.raises(ConfigError, match=r"config\.task\.pair_ratio differs"):
        changes(of((3, 1)), of((2, 1)), tmp_path)


def test_settings_of_a_later_stage_are_listed(pictures, tmp_path):
    old, config = provenance(config_of(pictures)), config_of(pictures)
    config.model.image_size, config.data.augment.grey_chance, config.train.steps = 448, 0.2, 200
    assert changes(old, provenance(config), tmp_path) == [
        "model.image_size: 224 -> 448",
        "data.augment.grey_chance: 0.0 -> 0.2",
        "train.steps: 100 -> 200",
    ]


class Flop(Flip):
    """Of the same fields."""


def test_transforms_are_compared_by_their_classes_too(kept, pictures):
    folder, _ = kept
    before = json.loads((folder / SETTINGS).read_text())
    before["config"]["data"]["transforms"] = to_dict((RandomResizedCrop(scale=(0.2, 1.0)), Flip()))
    (folder / SETTINGS).write_text(json.dumps(before))
    config = config_of(pictures)
    config.data.transforms = (RandomResizedCrop(), Flip())
    assert with_settings(config, folder, folder / SETTINGS)[0].data.transforms[0].scale == (0.2, 1.0)
    listed = changes(read_provenance(folder), provenance(config), folder)
    assert listed == ["data.transforms[0].scale: [0.2, 1.0] -> [0.08, 1.0]"]
    config.data.transforms = (RandomResizedCrop(scale=(0.2, 1.0)), Flop())
    assert changes(read_provenance(folder), provenance(config), folder) == ["data.transforms[1].kind: Flip -> Flop"]
    for other in (config.data.transforms, config.data.transforms[:1], ()):
        config.data.transforms = other
        with pytest.raises(ConfigError, match=r"name the configuration that the run was started with"):
            with_settings(config, folder, folder / SETTINGS)


def test_another_tokenizer_is_refused_and_a_moved_one_is_not(tmp_path):
    def of(path):
        config = Config(name="tokenizer", model=ViTConfig(), task=ContrastiveConfig(tokenizer=str(path)))
        config.train.steps = 100
        config.data.train = (BundledConfig(path="twemoji"),)
        return provenance(config)

    first, moved = tmp_path / "a.model", tmp_path / "b.model"
    first.write_bytes(b"pieces")
    old = of(first)
    moved.write_bytes(b"pieces")
    assert changes(old, of(moved), tmp_path) == [f"task.tokenizer: {first} -> {moved}"]
    first.write_bytes(b"others")
    with pytest.raises(DataError, match=r"config\.task\.tokenizer = .*a\.model': not the one that the run in"):
        changes(old, of(first), tmp_path)


def test_another_order_is_refused(pictures, tmp_path, monkeypatch):
    config = config_of(pictures)
    old, before = provenance(config), config_of(pictures)
    before.data.shuffle = False
    unshuffled = provenance(before)
    monkeypatch.setattr(loader, "SHUFFLES", 1)
    end = r"finish it with the versions that it was started with, or start in another config\.workdir"
    with pytest.raises(ConfigError, match=rf"had another order \(Grain \S+ shuffled then, \S+ does now\); {end}"):
        changes(old, provenance(config), tmp_path)
    assert changes(unshuffled, provenance(before), tmp_path) == []
    # A run of a release that kept the settings alone.
    with pytest.raises(ConfigError, match=rf"had another order \(an older release shuffled\); {end}"):
        changes(Provenance(old.settings, {}), provenance(config), tmp_path)
    assert changes(Provenance(unshuffled.settings, {}), provenance(before), tmp_path) == []


WHOLE = '"order": [], "grain": "0", "tokenizer": ""'


@pytest.mark.parametrize("name", [SETTINGS, DATA])
@pytest.mark.parametrize(
    "content",
    [b"", b'{"config": {"name": "fo', b"[1, 2]", b'{"other": 1}', b"\x00\xff\xfe" * 20, b"[" * 100_000, b'"\xc3("',
     f'{{"config": 1, {WHOLE}, "sources": [1]}}'.encode(), f'{{"config": [], {WHOLE}, "sources": [{{}}]}}'.encode()],
    ids=["empty", "cut", "list", "other", "binary", "deep", "no text", "numbers", "lists"],
)  # fmt: skip
def test_a_damaged_file_is_one_line(kept, name, content):
    folder, new = kept
    (folder / name).write_bytes(content)
    with pytest.raises(ConfigError) as error:
        changes(read_provenance(folder), new, folder)
    message = str(error.value)
    assert message.startswith(f"{folder / name} is damaged: ")
    assert ("; move it away to continue" if name == SETTINGS else "; start in another config.workdir") in message
    assert "\n" not in message


def test_storage_that_fails_is_no_damage(kept, monkeypatch):
    folder, _ = kept
    read, asked = Path.read_bytes, []

    def stale(path):
        asked.append(path)
        if len(asked) < 3:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", stale)
    monkeypatch.setattr(storage, "WAITS", (0, 0))
    assert read_provenance(folder).settings
    asked.clear()
    monkeypatch.setattr(storage, "WAITS", (0,))
    with pytest.raises(StorageError, match=r"config\.json cannot be read: .* 2 times"):
        read_provenance(folder)


def test_settings_that_were_moved_away_are_not_compared_but_order_and_data_are(kept):
    folder, new = kept
    (folder / SETTINGS).unlink()
    assert changes(read_provenance(folder), new, folder) == [
        f"{folder / SETTINGS} was not there: the settings were not compared"
    ]
    other = Provenance(new.settings, {**new.data, "order": new.data["order"][::-1]})
    with pytest.raises(ConfigError, match="had another order"):
        changes(read_provenance(folder), other, folder)
    (folder / DATA).unlink()  # checkpoints alone
    with pytest.raises(ConfigError, match="had another order"):
        changes(read_provenance(folder), new, folder)


def test_a_head_for_as_many_other_classes_is_refused(tmp_path):
    def refuse(names, new=()):
        refuse_other_classes(str(tmp_path), names, {"skipped": list(new)})

    refuse(["cat", "dog"])  # no run is there
    (tmp_path / "config.json").write_text(json.dumps({"config": {}}))
    about = {"order": [], "grain": "", "tokenizer": "", "sources": [{"classes": ["cat", "dog"]}]}
    (tmp_path / "data.json").write_text(json.dumps(about))
    for names, new in ((["cat", "dog"], ()), (["a", "b", "c"], ()), ((), ()), (["cat", "owl"], ["head/bias"])):
        refuse(names, new)
    with pytest.raises(ConfigError, match=r"label 1 was 'dog', is 'owl'\); list head in config\.checkpoint\.skip"):
        refuse(["cat", "owl"], ["pos_embed"])
