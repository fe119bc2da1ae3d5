"""The board's numbers are those of OpenCLIP's own evaluation of the same weights and images (`make_board.py`)."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest

from tests.parity.board_sets import CIFAR10, PAIRS, TEMPLATES, clip, picture, write_sets
from visionfm_jax.board import board, find_sets, main, markdown, page
from visionfm_jax.errors import ConfigError, DataError
from visionfm_jax.export import export

REFERENCE = dict(np.load(Path(__file__).with_name("board.npz")))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sets")
    write_sets(folder)
    (folder / "notes").mkdir()
    return folder


@pytest.fixture(scope="module")
def model():
    return clip()


@pytest.fixture(scope="module")
def rows(data, model):
    return list(board({"tiny": model}, find_sets(data), probe=True))


def test_numbers_are_openclips(rows):
    of = {(row["set"], row["kind"]): row["metrics"] for row in rows}
    for name in ("cifar10", "dtd"):
        for metric in ("top1", "top5"):
            assert of[name, "zero_shot"][metric] == pytest.approx(float(REFERENCE[f"{name}/{metric}"]), abs=1e-12)
    for way in ("image_to_text", "text_to_image"):
        for k in (1, 5, 10):
            expected = float(REFERENCE[f"flickr8k/{way}_R@{k}"])
            assert of["flickr8k", "retrieval"][f"{way}_r{k}"] == pytest.approx(expected, abs=1e-12)
    assert len({float(v) for v in REFERENCE.values() if v.ndim == 0}) > 6  # they say something


def test_guesses_are_openclips(data, model):
    with tarfile.open(data / "wds_vtab-cifar10/test/0.tar") as tar:
        images = [picture(int(name[1:8])) for name in tar.getnames() if name.endswith(".png")]
    prompts = [template.replace("{c}", "{}") for template in TEMPLATES]
    found = model.classify(images, CIFAR10, prompts)
    expected = REFERENCE["cifar10/cosines"][: len(images)]
    np.testing.assert_array_equal(found.probability.argmax(1), expected.argmax(1))


def test_what_is_measured(rows):
    assert [(row["set"], row["kind"]) for row in rows] == [
        ("cifar10", "zero_shot"), ("dtd", "zero_shot"), ("dtd", "knn"), ("dtd", "linear_probe"),
        ("flickr8k", "retrieval"),
    ]  # fmt: skip
    assert [row["records"] for row in rows] == [60, 42, 42, 42, PAIRS]
    assert rows[0]["settings"]["prompts"] == tuple(t.replace("{c}", "{}") for t in TEMPLATES)
    assert "a photo of a {} texture." in rows[1]["settings"]["prompts"]
    assert len({row["protocol"] for row in rows}) == len(rows)


def test_tables(rows):
    more = [*rows, *({**row, "model": "<b>"} for row in rows)]
    text = markdown(rows)
    assert f"| cifar10 | 60 | {100 * rows[0]['metrics']['top1']:.1f} |" in text
    assert "| mean |" in text
    assert "| set | images | tiny | <b> | protocol |" in markdown(more)
    assert "<b>" not in page(more).replace("<b></b>", "")
    assert "&lt;b&gt;" in page(more)


def test_from_the_command_line_and_again(data, model, tmp_path, monkeypatch, capsys):
    export(model, "open_clip", tmp_path / "clip")
    arguments = [str(tmp_path / "clip"), f"--data={data}", "--sets=cifar10", f"--out={tmp_path / 'out'}"]
    main(arguments)
    first = json.loads((tmp_path / "out/board.json").read_text())["measurements"]
    assert first[0]["metrics"]["top1"] == pytest.approx(float(REFERENCE["cifar10/top1"]), abs=1e-12)
    assert "| cifar10 | 60 |" in (tmp_path / "out/board.md").read_text()
    assert "Zero-shot classification" in (tmp_path / "out/board.html").read_text()
    monkeypatch.setattr("visionfm_jax.board.measure", None)  # measures nothing again
    main(arguments)
    assert json.loads((tmp_path / "out/board.json").read_text())["measurements"] == first
    assert capsys.readouterr().out.count(f"[{first[0]['protocol']}]") == 2


def test_bad_input(data, model, tmp_path, capsys):
    with pytest.raises(DataError, match=r"--data=.*: is no folder"):
        find_sets(tmp_path / "nothing")
    with pytest.raises(DataError, match="holds no set; a set is a folder such as cifar10/test/CLASS/FILE"):
        find_sets(tmp_path)
    with pytest.raises(DataError, match=r"--sets=cifar11: not in .*; there are cifar10, dtd, flickr8k"):
        find_sets(data, ["cifar11"])
    (tmp_path / "out").mkdir()
    (tmp_path / "out/board.json").write_text('{"measurements": [1]}')
    with pytest.raises(ConfigError, match=r"board.json: cannot be read as a board"):
        main([str(tmp_path), f"--data={data}", f"--out={tmp_path / 'out'}"])
    # Tars without names of classes, and names of another number than there are folders, are left out by one line each.
    broken = tmp_path / "sets"
    write_sets(broken)
    (broken / "wds_vtab-cifar10/classnames.txt").unlink()
    (broken / "dtd/classnames.txt").write_text("banded\nblotchy")
    assert not list(board({"tiny": model}, find_sets(broken, ["cifar10", "dtd"])))
    said = capsys.readouterr().err
    assert "cifar10 is left out: tars" in said
    assert "no image has a caption, a member KEY.txt beside it; for labels in members KEY.cls write" in said
    assert "classnames.txt has 2 lines, and there are 6 class folders" in said
