"""Whatever a stranger's JSON file says, a model is loaded or refused by one line."""

from __future__ import annotations

import copy
import json
import math
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

from tests.unit.test_export import config_of, model_of
from visionfm_jax.errors import UserError
from visionfm_jax.export import export
from visionfm_jax.interop import files
from visionfm_jax.train.initialise import described

VALUES = (None, [], {}, "x", -1, 0, 1e9, [[1]], {"a": {"b": 1}}, [0, 0, 0], [1, 2, 3], math.nan)
FOLDERS = {"vit_cls": ("timm", "transformers"), "swin": ("timm", "transformers"), "clip": ("transformers", "open_clip")}
NAMES = ("config.json", "open_clip_config.json", "preprocessor_config.json")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    base = tmp_path_factory.mktemp("folders")
    for name, forms in FOLDERS.items():
        model = model_of(config_of(name))
        for to in forms:
            export(model, to, base / f"{name}_{to}")
    return base


def places(value: Any) -> Iterator[tuple]:
    """Where there is a value, at any depth, of a list only the first."""
    parts = value.items() if isinstance(value, dict) else enumerate(value[:1]) if isinstance(value, list) else ()
    for key, part in parts:
        yield (key,)
        yield from ((key, *more) for more in places(part))


def changes(about: dict) -> Iterator[dict]:
    """A file with each of its values replaced in turn, or left out."""
    for *path, last in places(about):
        for value in (*VALUES, places):
            changed = copy.deepcopy(about)
            holder = changed
            for key in path:
                holder = holder[key]
            if value is places:
                del holder[last]
            else:
                holder[last] = value
            yield changed


@pytest.mark.parametrize(("name", "to"), [(name, to) for name, forms in FOLDERS.items() for to in forms])
def test_any_value_is_taken_or_refused_by_a_line(folders, tmp_path, monkeypatch, name, to):
    folder = tmp_path / "model"
    shutil.copytree(folders / f"{name}_{to}", folder)
    weights = files.read_weights(files.file_in(folder, "checkpoint.weights"))
    monkeypatch.setattr(files, "read_weights", lambda file: weights)
    refused = tried = 0
    for file in (folder / name for name in NAMES if (folder / name).is_file()):
        text = file.read_text()
        for about in changes(json.loads(text)):
            file.write_text(json.dumps(about))
            tried += 1
            said, line = outcome(folder)
            assert said is None or min(said.std) > 0
            assert "\n" not in line
            refused += bool(line)
        file.write_text(text)
    described(folder)
    assert 0.1 * tried < refused < tried


def outcome(folder):
    """What is described, or the line that refuses it; anything else is a traceback."""
    try:
        return described(folder)[1], ""
    except UserError as error:
        return None, str(error)


def changed(folders, tmp_path, name, file, change):
    folder = tmp_path / name
    shutil.copytree(folders / name, folder)
    about = json.loads((folder / file).read_text())
    about = change(about) or about
    (folder / file).write_text(json.dumps(about))
    return folder


@pytest.mark.parametrize(
    ("name", "file", "change", "says"),
    [
        ("vit_cls_timm", "config.json", lambda a: a.update(model_args=None), "model_args = None is not a valid value"),
        ("vit_cls_timm", "config.json", lambda a: a["pretrained_cfg"].update(std=[0, 0, 0]), "std = [0, 0, 0] beside"),
        ("clip_open_clip", "open_clip_config.json", lambda a: a.update(preprocess_cfg=[1]), "preprocess_cfg = [1] is"),
        ("clip_open_clip", "open_clip_config.json", lambda a: a["model_cfg"]["vision_cfg"].update(head_width=0),
         "head_width = 0 is not a valid value"),
        ("clip_transformers", "config.json", lambda a: a["text_config"].update(eos_token_id=math.nan),
         "eos_token_id = nan is not a valid value"),
    ],
)  # fmt: skip
def test_what_was_a_traceback_names_the_value(folders, tmp_path, name, file, change, says):
    with pytest.raises(UserError) as error:
        described(changed(folders, tmp_path, name, file, change))
    assert says in str(error.value)


def test_the_bare_configuration_of_open_clip_is_taken(folders, tmp_path):
    """`embed_dim`, `vision_cfg` and `text_cfg`, as in its `model_configs`; pixels are OpenAI's there."""
    bare = changed(folders, tmp_path, "clip_open_clip", "open_clip_config.json", lambda about: about["model_cfg"])
    config, said = described(bare)
    assert config.model == described(folders / "clip_open_clip")[0].model
    assert said.mean[0] == pytest.approx(0.48145466)
