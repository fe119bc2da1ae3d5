"""Embeddings in files and folders: what is read is what was written; stopped, continued, shared, damaged."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest

from visionfm_jax import parts
from visionfm_jax.errors import ConfigError, DataError, UserError
from visionfm_jax.index import FORMS, open_index, search_index, write_index
from visionfm_jax.parts import check_out

NAMES = [f"photos/ñ {i}.jpg" for i in range(11)]
ABOUT = {"model": "clip", "step": 7}
WHOLE = (0, 1)


def embed(names):
    rows = np.array([[len(name), sum(map(ord, name)) / 1e3, 1] for name in names], np.float32)
    rows[[i for i, name in enumerate(names) if name == NAMES[5]]] = np.nan
    return rows


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(parts, "ROWS", 4)


def read_index(path):
    """All parts of an index in one."""
    about, found = open_index(path)
    assert about == ABOUT
    names, rows = zip(*found, strict=True)
    return [name for part in names for name in part], np.concatenate(rows)


def same(found):
    names, rows = found
    assert names == NAMES
    assert rows.dtype == np.float32
    np.testing.assert_array_equal(rows, embed(NAMES))


@pytest.mark.parametrize("name", ["a.npz", "A.NPZ", "a.parquet", "A.Parquet", "folder"])
def test_what_is_written_is_read(tmp_path, name):
    write_index(tmp_path / name, NAMES, embed, ABOUT, WHOLE)
    same(read_index(str(tmp_path / name)))


def test_a_stopped_index_is_continued(tmp_path):
    asked = []

    def until(last):
        def some(names):
            asked.append(names)
            if len(asked) > last:
                raise KeyboardInterrupt
            return embed(names)

        return some

    whole, out = tmp_path / "whole", tmp_path / "stopped"
    write_index(whole, NAMES, embed, ABOUT, WHOLE)
    with pytest.raises(KeyboardInterrupt):
        write_index(out, NAMES, until(2), ABOUT, WHOLE)
    (out / f".part-00002.parquet.{'0' * 16}").write_bytes(b"half")  # what a kill leaves
    with pytest.raises(DataError, match=r"parts are missing, such as part-00002\.parquet of 3; run the same"):
        read_index(str(out))
    asked.clear()
    write_index(out, NAMES, until(9), ABOUT, WHOLE)
    assert asked == [NAMES[8:]]
    same(read_index(str(out)))
    assert {p.name: p.read_bytes() for p in out.iterdir()} == {p.name: p.read_bytes() for p in whole.iterdir()}


def test_damaged_parts_are_made_again(tmp_path, capsys):
    """Truncated, empty, of one bit, of another model, of other images, no file."""
    whole, out = tmp_path / "whole", tmp_path / "out"
    write_index(whole, NAMES, embed, ABOUT, WHOLE)
    other, others = tmp_path / "other", tmp_path / "others"
    write_index(other, NAMES, embed, {**ABOUT, "step": 8}, WHOLE)
    write_index(others, [f"x{name}" for name in NAMES], embed, ABOUT, WHOLE)
    part = "part-00001.parquet"
    content = (whole / part).read_bytes()
    at = content.index(NAMES[5].encode()) + 3
    flipped = content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :]
    damaged = [content[:-9], b"", b"garbage", flipped, *((f / part).read_bytes() for f in (other, others))]
    for damage in damaged:
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(whole, out)
        (out / part).write_bytes(damage)
        if damage != damaged[-1]:  # an index cannot know the images that it is of
            with pytest.raises(DataError):
                read_index(str(out))
        write_index(out, NAMES, embed, ABOUT, WHOLE)
        assert f"{part} is damaged" in capsys.readouterr().err
        assert (out / part).read_bytes() == content


def test_processes_share_the_parts(tmp_path):
    asked = []

    def noted(names):
        asked.extend(names)
        return embed(names)

    for i in (1, 0):
        write_index(tmp_path / "out", NAMES, noted, ABOUT, (i, 2))
    assert sorted(asked) == sorted(NAMES)
    same(read_index(str(tmp_path / "out")))


def test_processes_that_start_together_share_a_folder(tmp_path):
    """Each finds the folder empty, or with what another has just begun to write."""
    program = (
        "import sys, numpy as np; from visionfm_jax import index, parts; parts.ROWS = 4;"
        "names = [str(i) for i in range(64)]; i = int(sys.argv[1]); out = index.Path('out');"
        "index.write_index(out, names, lambda some: np.array([[float(n), 1] for n in some]), {'a': 1}, (i, 4))"
    )
    started = [subprocess.Popen([sys.executable, "-c", program, str(i)], cwd=tmp_path) for i in range(4)]
    assert [process.wait(120) for process in started] == [0] * 4
    _, found = open_index(str(tmp_path / "out"))
    assert np.concatenate([rows for _, rows in found])[:, 0].tolist() == list(range(64))


def test_what_a_killed_process_leaves_of_the_first_file_is_no_other_work(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / f"out/.index.json.{'0' * 16}").write_bytes(b"{")
    write_index(tmp_path / "out", NAMES, embed, ABOUT, WHOLE)
    same(read_index(str(tmp_path / "out")))


def test_the_best_rows_of_all_parts_by_cosine(tmp_path):
    """Whatever the lengths of rows; those of NaN and of zeros are never found."""
    random = np.random.default_rng(0)
    rows = random.standard_normal((11, 3)).astype(np.float32) * random.uniform(0.1, 9, (11, 1)).astype(np.float32)
    rows[3], rows[7] = np.nan, 0
    table = dict(zip(NAMES, rows, strict=True))
    write_index(tmp_path / "out", NAMES, lambda names: np.stack([table[n] for n in names]), ABOUT, WHOLE)
    query = random.standard_normal((1, 3)).astype(np.float32)
    cosines = {
        n: float(r @ query[0] / np.linalg.norm(r) / np.linalg.norm(query)) for n, r in table.items() if r[0] ** 2 > 0
    }
    expected = sorted(cosines.items(), key=lambda one: -one[1])
    for count in (4, 100):
        found = search_index(open_index(str(tmp_path / "out"))[1], query, count)
        assert [name for name, _ in found] == [name for name, _ in expected[:count]]
        np.testing.assert_allclose([s for _, s in found], [s for _, s in expected[:count]], rtol=1e-5)
    with pytest.raises(ValueError, match="rows of 3 numbers, and a query of 4"):
        search_index(open_index(str(tmp_path / "out"))[1], np.ones((1, 4)), 2)


@pytest.mark.parametrize(
    ("names", "about", "says"),
    [
        (NAMES[:-1], ABOUT, "differs in images, names"),
        ([*NAMES[:-1], "x.jpg"], ABOUT, "differs in names"),
        (NAMES, {**ABOUT, "step": 8}, "differs in step"),
    ],
)
def test_an_index_of_other_rows_is_not_continued(tmp_path, names, about, says):
    write_index(tmp_path / "out", NAMES, embed, ABOUT, WHOLE)
    with pytest.raises(ConfigError, match=says):
        write_index(tmp_path / "out", names, embed, about, WHOLE)
    same(read_index(str(tmp_path / "out")))


def test_folders_of_other_files_are_left_alone(tmp_path):
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(ConfigError, match="is a folder of other files"):
        write_index(tmp_path, NAMES, embed, ABOUT, WHOLE)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--out: .*name a place that can be written"):
        write_index(tmp_path / "file", NAMES, embed, ABOUT, WHOLE)
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged/index.json").write_text("{")
    with pytest.raises(ConfigError, match=r"index\.json in it is damaged"):
        write_index(tmp_path / "damaged", NAMES, embed, ABOUT, WHOLE)


NONSENSE = [
    "[]",
    "5",
    '{"images": 3, "rows": 0}',
    '{"images": 10000000000000, "rows": 1}',
    "[" * 100_000,
    '{"rows": 4}',
]


@pytest.mark.parametrize("about", NONSENSE, ids=range(len(NONSENSE)))
def test_what_stands_in_its_json_may_be_anything(tmp_path, about):
    (tmp_path / "index.json").write_text(about)
    with pytest.raises(DataError):
        read_index(str(tmp_path))
    with pytest.raises(ConfigError):
        write_index(tmp_path, NAMES, embed, ABOUT, WHOLE)


def test_what_is_no_index(tmp_path):
    (tmp_path / "index.json").write_text(json.dumps({"images": "many"}))
    np.savez(tmp_path / "other.npz", a=np.zeros(3))
    np.savez(tmp_path / "short.npz", name=np.array(["a"]), embedding=np.zeros((2, 3), np.float32))
    np.savez(tmp_path / "double.npz", name=np.array(["a"]), embedding=np.zeros((1, 3)))
    np.savez(tmp_path / "objects.npz", name=np.array([{}], object), embedding=np.zeros((1, 3), np.float32))
    (tmp_path / "torn.npz").write_bytes(b"PK\x03\x04torn")
    (tmp_path / "torn.parquet").write_bytes(b"PAR1torn")
    (tmp_path / "text.npz").write_text("text")
    for name in ("", "other.npz", "short.npz", "double.npz", "objects.npz", "torn.npz", "torn.parquet", "text.npz",
                 "none.npz"):  # fmt: skip
        with pytest.raises(DataError) as error:
            read_index(str(tmp_path / name))
        assert "\n" not in str(error.value)


def test_names_of_files(tmp_path):
    for name in ("a.npz", "a.parquet", "folder/", "new"):
        check_out(name, FORMS)
    (tmp_path / "v1.2").mkdir()
    check_out(str(tmp_path / "v1.2"), FORMS)
    check_out("laion.v2", FORMS)
    (tmp_path / "file.v2").write_text("")
    with pytest.raises(UserError, match="File name too long"):
        check_out("x" * 300, FORMS)
    for name in ("", "a.csv", "a.CSV", str(tmp_path / "file.v2")):
        with pytest.raises(ConfigError, match="name a file"):
            check_out(name, FORMS)
