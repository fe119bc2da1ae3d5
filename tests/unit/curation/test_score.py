"""Scores of pairs: what the model says, whoever computes them, and what is left of a start that was stopped."""

import json
import runpy
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from small_clip import small_clip
from tar_sets import caption, members, picture, tar_bytes

import visionfm_jax
from visionfm_jax.curation import score
from visionfm_jax.data.shards import Local
from visionfm_jax.errors import ConfigError, DataError, UserError
from visionfm_jax.export import export

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return small_clip(tmp_path_factory.mktemp("clip") / "model")


@pytest.fixture(scope="module")
def tars(tmp_path_factory):
    """Two tars of three pairs; a picture of the second is damaged."""
    folder = tmp_path_factory.mktemp("tars")
    for t in range(2):
        files = members(100 * t, 3)
        if t:
            files["000000101.jpg"] = files["000000101.jpg"][:40]
        (folder / f"{t:05d}.tar").write_bytes(tar_bytes(files))
    return folder


@pytest.fixture(scope="module")
def scored(clip, tars, tmp_path_factory):
    """The folder of scores and the report."""
    out = tmp_path_factory.mktemp("out") / "scores"
    return out, score.score(str(tars), str(clip), out, embeddings=True)


def test_a_score_is_the_cosine_of_the_embeddings_of_the_model(clip, scored):
    out, report = scored
    model = visionfm_jax.load(clip)
    images, texts = (
        model.embed_images([picture(i) for i in range(3)]),
        model.embed_texts([caption(i) for i in range(3)]),
    )
    first, second = (pq.read_table(out / f"0000{t}.parquet") for t in range(2))
    np.testing.assert_allclose(first["similarity"].to_numpy(), (images * texts).sum(1), rtol=1e-5, atol=1e-6)
    assert first["key"].to_pylist() == ["000000000", "000000001", "000000002"]
    kept = np.array(first["image_embedding"].to_pylist())
    np.testing.assert_allclose(kept, images, atol=1e-3)
    np.testing.assert_allclose(np.array(first["text_embedding"].to_pylist()), texts, atol=1e-3)
    assert second["similarity"].is_null().to_pylist() == [False, True, False]
    assert second["image_embedding"].is_null().to_pylist() == [False, True, False]
    assert (report["pairs"], report["unreadable"]) == (6, 1)
    assert report["tars"][1]["first"] == ["00001/000000101"]
    assert sum(report["histogram"]) == 5
    assert json.loads((out / "report.json").read_text()) == json.loads(json.dumps(report))


def test_two_processes_write_the_same_bytes(clip, tars, scored, tmp_path):
    score.score(str(tars), str(clip), tmp_path / "scores", embeddings=True, engine=Local(2))
    names = [file.name for file in sorted(scored[0].iterdir())]
    assert names == ["00000.parquet", "00001.parquet", "about.json", "report.json"]
    for name in names:
        assert (tmp_path / "scores" / name).read_bytes() == (scored[0] / name).read_bytes(), name


def test_what_is_done_is_kept_and_what_is_damaged_is_made_again(clip, tars, scored, tmp_path, monkeypatch, capsys):
    out = tmp_path / "scores"
    shutil.copytree(scored[0], out)
    (out / "00001.parquet").write_bytes((out / "00001.parquet").read_bytes()[:-9])
    done = []
    columns = score.Scorer._columns
    monkeypatch.setattr(score.Scorer, "_columns", lambda self, shard: done.append(str(shard)) or columns(self, shard))
    score.score(str(tars), str(clip), out, embeddings=True)
    assert done == ["00001.tar"]
    assert "00001.parquet is damaged" in capsys.readouterr().err
    assert (out / "00001.parquet").read_bytes() == (scored[0] / "00001.parquet").read_bytes()
    with pytest.raises(ConfigError, match=r"was made with another embeddings \(True, not False\); name another"):
        score.score(str(tars), str(clip), out)


def test_the_command_prints_what_people_choose_a_threshold_by(clip, tars, tmp_path, capsys):
    assert score.main([f"--path={tars}", f"--model={clip}", f"--out={tmp_path / 'scores'}"]) == 3
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"5 pairs of 2 tars have a similarity: {tmp_path / 'scores'}"
    assert lines[1].startswith("of these lie: 1% below ")
    assert lines[2] == "1 image cannot be read, such as 00001/000000101"


def test_what_cannot_be_scored_is_refused(clip, tars, tmp_path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures/0.tar").write_bytes(tar_bytes({"a.jpg": picture(0)}))
    with pytest.raises(DataError, match=r"has no image with a caption .txt; set --caption_key, --image_key or --path"):
        score.score(str(tmp_path / "pictures"), str(clip), tmp_path / "a")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged/0.tar").write_bytes(tar_bytes({"a.jpg": b"no picture", "a.txt": b"a text"}))
    with pytest.raises(DataError, match=r"none of 1 image can be read, such as 0/a"):
        score.score(str(tmp_path / "damaged"), str(clip), tmp_path / "b")
    made = runpy.run_path(f"{ROOT}/tests/unit/test_export.py")
    export(made["model_of"](made["config_of"]("vit_cls")), "timm", tmp_path / "vit")
    with pytest.raises(UserError, match=r"--model=.*vit: ClassificationConfig has no embeddings .*; name a CLIP"):
        score.score(str(tars), str(tmp_path / "vit"), tmp_path / "c")


def test_captions_in_json_and_pictures_of_a_suffix_are_scored(clip, tars, scored, tmp_path):
    files = {}
    for name, content in members(0, 3).items():
        key, _, kind = name.partition(".")
        if kind == "jpg":
            files[f"{key}.rgb.jpg"] = files[f"{key}.depth.jpg"] = content
        elif kind == "txt":
            files[f"{key}.json"] = json.dumps({"say": content.decode(), "more": "words " * 9}).encode()
    (tmp_path / "tars").mkdir()
    (tmp_path / "tars/00000.tar").write_bytes(tar_bytes(files))
    keys = {"caption_key": ".JSON:say", "image_key": "rgb.jpg"}
    score.score(str(tmp_path / "tars"), str(clip), tmp_path / "scores", **keys)
    found, expected = (pq.read_table(out / "00000.parquet")["similarity"] for out in (tmp_path / "scores", scored[0]))
    assert found.to_pylist() == expected.to_pylist()
    for key in ("", "json:", ":x", "txt:say"):
        with pytest.raises(ConfigError, match="caption_key"):
            score.score(str(tmp_path / "tars"), str(clip), tmp_path / "none", caption_key=key)
