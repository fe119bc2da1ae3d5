"""Selecting pairs by columns: what conditions mean, what is counted, and the one line that bad input gets."""

import functools
import json
import os
import subprocess
import sys

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from tar_sets import members, tar_bytes, write_parquet, write_tars

from visionfm_jax.data import columns, select
from visionfm_jax.data.conditions import parse
from visionfm_jax.data.sources.tars import TarPairs
from visionfm_jax.errors import ConfigError, DataError, UserError, entry_point

NAN = float("nan")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path):
    """Two tars of four pairs; rows in another order than members, failed downloads among them."""
    folder = write_tars(tmp_path / "pairs", tars=2)
    write_parquet(
        folder / "00000.parquet",
        url=["u"] * 6,
        key=["000000003", "000000009", "000000000", "000000002", "000000001", "000000008"],
        status=["success", "failed_to_download", "success", "success", "success", "failed_to_resize"],
        similarity=[0.33, 0.9, 0.30, NAN, 0.10, 0.9],
        NSFW=["UNLIKELY", "UNLIKELY", "NSFW", "UNLIKELY", "UNLIKELY", "UNLIKELY"],
        width=[640, None, 100, 640, 640, None],
    )
    write_parquet(
        folder / "00001.parquet",
        url=["u"] * 4,
        key=["000000100", "000000101", "000000102", "000000103"],
        status=["success"] * 4,
        similarity=[0.29, None, 0.31, 0.10],
        NSFW=[None, "UNLIKELY", "UNLIKELY", "NSFW"],
        width=[640, 640, 640, 100],
    )
    return folder


def chosen(folder, where: str, out: str = "out.pairs") -> list[str]:
    select.select(str(folder), where, folder / out)
    source = TarPairs(str(folder), selection=str(folder / out))
    return [source.key(i).rpartition("/")[2].lstrip("0") or "0" for i in range(len(source))]


@pytest.mark.parametrize(
    ("where", "left"),
    [
        ("similarity >= 0.3", "0 3 102"),
        ("similarity >= 0.3 and NSFW == 'UNLIKELY'", "3 102"),
        ("similarity < 0.3", "1 100 103"),
        ("not similarity >= 0.3", "1 100 103"),  # neither null nor NaN satisfies the contrary
        ("similarity != 0.1", "0 3 100 102"),
        ("similarity is None", "2 101"),
        ("similarity is not None and NSFW is not None", "0 1 3 102 103"),
        ("NSFW in ('UNLIKELY', 'UNSURE')", "1 2 3 101 102"),
        ("NSFW not in ['UNLIKELY']", "0 103"),
        ("similarity > 0.3 or NSFW == 'UNLIKELY'", "1 2 3 101 102"),
        ("0.2 < similarity <= 0.3", "0 100"),
        ("width * width / 2 > 5000.5 and key != '000000001'", "2 3 100 101 102"),
        ("width >= 200 and not (NSFW == 'NSFW' or similarity < .3)", "3 102"),
        ("width > -1", "0 1 2 3 100 101 102 103"),
    ],
)
def test_conditions_choose(folder, where, left):
    assert chosen(folder, where) == left.split()


def test_records_of_a_selection_are_those_of_the_whole(folder):
    chosen(folder, "similarity >= 0.3")
    whole, part = TarPairs(str(folder)), TarPairs(str(folder), selection=str(folder / "out.pairs"))
    assert len(part) == 3
    assert [part[i] for i in range(3)] == [whole[i] for i in (0, 3, 6)]
    assert part.report()["records"] == 3
    with pytest.raises(IndexError):
        part[3]


def test_the_report_counts_what_each_condition_drops(folder, capsys):
    where = 'similarity >= 0.28 and NSFW == "UNLIKELY" and width >= 200'
    assert select.main([f"--path={folder}", f"--where={where}", f"--out={folder}/deep/s.pairs", "--jobs=1"]) == 0
    printed = capsys.readouterr().out
    report = json.loads((folder / "deep" / "s.pairs.json").read_text())
    tars = report.pop("tars")
    assert report.pop("source")["cut"] == []
    assert report == {
        "path": str(folder),
        "where": where,
        "columns": dict.fromkeys(("similarity", "NSFW", "width"), "the parquets beside the tars"),
        "left_out": [],
        "rows": 10,
        "success": 8,
        "pairs": 8,
        "known": 8,
        "selected": 2,
        "conditions": [
            {"condition": "similarity >= 0.28", "drops": 4, "empty": 2, "only": 3},
            {"condition": "NSFW == 'UNLIKELY'", "drops": 3, "empty": 1, "only": 1},
            {"condition": "width >= 200", "drops": 2, "empty": 0, "only": 0},
        ],
    }
    assert [(t["name"], t["drops"], t["selected"]) for t in tars] == [
        ("00000.tar", [2, 1, 1], 1),
        ("00001.tar", [2, 2, 1], 1),
    ]
    for line in ("10 rows in the parquets, 8 with a picture", "similarity >= 0.28  ", "2 pairs selected"):
        assert line in printed
    assert [line.split() for line in printed.splitlines() if line.startswith("all")] == [["all", "8", "2", "25.0%"]]


def test_pairs_without_a_row_are_counted_and_left_out(folder, capsys):
    write_parquet(folder / "00001.parquet", key=["000000102"], status=["success"], similarity=[0.5])
    assert chosen(folder, "similarity > 0") == ["0", "1", "3", "102"]
    select.main([f"--path={folder}", "--where=similarity > 0", f"--out={folder}/s.pairs"])
    assert "8 pairs in 2 tars; 3 without such a row are left out" in capsys.readouterr().out


def test_keys_may_be_numbers_and_types_may_differ_by_shard(folder):
    write_parquet(
        folder / "00000.parquet", key=[3, 0, 2], status=["success"] * 3, similarity=np.float32([0.5, 0.1, 0.4])
    )
    write_parquet(
        folder / "00001.parquet",
        key=["000000100"],
        status=pa.array(["success"]).dictionary_encode(),
        similarity=pa.nulls(1),
    )
    assert chosen(folder, "similarity > 0.2") == ["2", "3"]


def test_only_needed_columns_are_read(folder, monkeypatch):
    asked = []
    read = columns.pq.ParquetFile.read
    monkeypatch.setattr(
        columns.pq.ParquetFile, "read", lambda self, columns: asked.append(columns) or read(self, columns=columns)
    )
    chosen(folder, "width > 1 and similarity > 0 and width < 9999")
    assert asked[0] == ["key", "status", "width", "similarity"]


def test_a_store(folder):
    memory = fsspec.filesystem("memory")
    for path in folder.iterdir():
        memory.pipe(f"/chosen/{path.name}", path.read_bytes())
    try:
        select.select("memory://chosen", "similarity >= 0.3", folder / "s.pairs")
        source = TarPairs("memory://chosen", selection=str(folder / "s.pairs"))
        assert [source.key(i) for i in range(3)] == ["00000/000000000", "00000/000000003", "00001/000000102"]
        local = TarPairs(str(folder), selection=str(folder / "s.pairs"))  # the same tars, copied
        assert [source[i] for i in range(3)] == [local[i] for i in range(3)]
    finally:
        memory.rm("/chosen", recursive=True)


def test_processes_choose_the_same(tmp_path, monkeypatch):
    folder = write_tars(tmp_path / "many", tars=17, pairs=1)
    for t in range(17):
        write_parquet(folder / f"{t:05d}.parquet", key=[f"{100 * t:09d}"], status=["success"], n=[t])
    command = [
        sys.executable,
        "-m",
        "visionfm_jax.data.select",
        f"--path={folder}",
        "--where=n >= 3",
        "--keep=2",
        "--by=n",
        "--jobs=2",
    ]
    result = subprocess.run([*command, f"--out={tmp_path}/s.pairs"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    source = TarPairs(str(folder), selection=str(tmp_path / "s.pairs"))
    assert [source.key(i) for i in range(len(source))] == ["00015/000001500", "00016/000001600"]


def change(folder):
    (folder / "00001.tar").write_bytes(tar_bytes(members(104, 4)))


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (change, r"00001\.tar changed after it was made; run .*select again"),
        (lambda f: (f / "00001.tar").unlink(), r"00001\.tar vanished after it was made"),
        (lambda f: (f / "00002.tar").write_bytes(tar_bytes(members(200, 1))), r"00002\.tar came after it was made"),
        (lambda f: (f / "out.pairs").unlink(), "no such file; make it with"),
        (lambda f: (f / "out.pairs").write_bytes(b"x" * 40), "cannot be read"),
        (lambda f: os.replace(f / "visionfm_pairs_txt.index", f / "out.pairs"), "of another kind"),
    ],
)
def test_a_selection_of_other_tars_is_refused(folder, act, message):
    chosen(folder, "width > 0")
    act(folder)
    with pytest.raises(DataError, match=message) as caught:
        TarPairs(str(folder), selection=str(folder / "out.pairs"))
    assert "\n" not in str(caught.value)


def test_a_tar_only_touched_or_copied_keeps_its_selection(folder):
    left = chosen(folder, "width > 200")
    for tar in folder.glob("*.tar"):
        os.utime(tar, ns=(1, 1))
    assert len(TarPairs(str(folder), selection=str(folder / "out.pairs"))) == len(left)


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("nsfw == 'UNLIKELY'", r"no column 'nsfw'; did you mean NSFW\? the columns are url, key, status, similarity"),
        ("similarty > 0.3", r"no column 'similarty'; did you mean similarity\?"),
        ("zzz > 0.3", r"no column 'zzz'; the columns are"),
        ("similarity > 2 and width > 1", "leaves none of 8 pairs; 'similarity > 2' alone drops 8; loosen it"),
        ("similarity > 'a'", r"cannot be evaluated: similarity is double"),
        ("similarity", r"cannot be evaluated"),
        ("similarity >", "invalid syntax"),
        ("", "--where and --keep are both missing"),
        ("1 < 2", "names no column"),
        ("__import__('os').system('x') == 0", "is not allowed here"),
        ("similarity > (lambda: 1)", "is not allowed here"),
        ("similarity.real > 1", "is not allowed here"),
        ("width > 10 ** 9", "is not allowed here"),
        ("width > 99999999999999999999", "is not allowed here"),
        ("width > None", "is not allowed here"),
        ("width in ()", "is not allowed here"),
        ("width if width else width", "is not allowed here"),
        (r"NSFW == '\ud800'", "is not allowed here"),
        ("NSFW == '\udc80'", "surrogates not allowed; write COLUMN"),
        ("not " * 500 + "width", "is nested too deeply"),
        ("(" * 5000 + "width" + ")" * 5000, "too many nested parentheses"),
        ("width > " + "1" * 5000, "a number has thousands of digits; write COLUMN"),
        ("width > 0x" + "f" * 5000, "a number of thousands of digits is not allowed here"),
        ("width > 1 or 1 > 'a'", r"1 > 'a'.* cannot be evaluated"),
    ],
)
def test_a_wrong_condition_is_one_line_and_writes_nothing(folder, capsys, where, message):
    out = folder / "s.pairs"
    assert entry_point(select.main)([f"--path={folder}", f"--where={where}", f"--out={out}"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    with pytest.raises(UserError, match=message):
        select.select(str(folder), where, out)
    assert not out.exists()
    assert not list(folder.glob(".s.pairs*"))


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda f: [p.unlink() for p in f.glob("*.tar")], "holds no .tar file"),
        (
            lambda f: [write_parquet(f / f"0000{t}.parquet", key=["7"], status=["success"], width=[1]) for t in (0, 1)],
            "none of the 8 pairs has a row with its key",
        ),
    ],
)
def test_a_wrong_folder_is_one_line(folder, act, message):
    act(folder)
    with pytest.raises(DataError, match=message) as caught:
        select.main([f"--path={folder}", "--where=width > 0", f"--out={folder}/s.pairs"])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda f: (f / "00001.parquet").unlink(), "00001.parquet: missing beside the tar"),
        (lambda f: (f / "00001.parquet").write_bytes(b"PAR1"), "00001.parquet: cannot be read"),
        (lambda f: write_parquet(f / "00001.parquet", key=["1"], width=[1]), "no column 'status'"),
    ],
)
def test_a_wrong_parquet_is_one_line_and_code_3(folder, capsys, act, message):
    act(folder)
    assert entry_point(select.main)([f"--path={folder}", "--where=width > 0", f"--out={folder}/s.pairs"]) == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_a_tar_without_its_columns_is_left_out_and_the_exit_code_says_so(folder, capsys):
    (folder / "00000.parquet").unlink()
    write_parquet(folder / "00001.parquet", key=["000000100"], status=["success"], width=["wide"])
    write_tars(folder, tars=3)
    write_parquet(folder / "00002.parquet", key=["000000201"], status=["success"], width=[7])
    out = folder / "s.pairs"
    assert entry_point(select.main)([f"--path={folder}", "--where=width > 'w' and width < 'x'", f"--out={out}"]) == 3
    (line,) = (line for line in capsys.readouterr().err.splitlines() if "left out, the" in line)
    assert "2 of 3 tars left out, the selection has the others: " in line
    assert "00000.parquet: missing beside the tar" in line
    source = TarPairs(str(folder), selection=str(out))
    assert [source.key(i) for i in range(len(source))] == ["00001/000000100"]
    why = {tar["name"]: tar["why"] for tar in json.loads(select.report_file(out).read_text())["left_out"]}
    assert why.keys() == {"00000.tar", "00002.tar"}
    assert why["00002.tar"].startswith("00002.tar: --where: ")


def test_an_output_that_cannot_be_written(folder):
    with pytest.raises(UserError, match="name a file that can be written"):
        select.select(str(folder), "width > 0", folder / "00000.tar" / "s.pairs")


def test_conditions_are_the_parts_that_and_joins():
    found = parse("a > 1 and (b == 'x' or c) and d in (1, 2)")
    assert [(c.text, c.columns) for c in found] == [
        ("a > 1", ("a",)),
        ("b == 'x' or c", ("b", "c")),
        ("d in (1, 2)", ("d",)),
    ]
    assert [c.columns for c in parse("a > 1 or b > 1 and c")] == [("a", "b", "c")]
    with pytest.raises(ConfigError):
        parse("a > 1; b > 2")


BIG = 2**53 + 1  # the least whole number that is no float64


@pytest.mark.parametrize(
    ("where", "rows"),
    [
        ("big > 2.5e7", [True, False, None]),
        ("big > 2.5", [True, True, None]),
        ("2.5e7 < big", [True, False, None]),
        ("big == 9007199254740993", [True, False, None]),
        ("big > 9007199254740992.0", [True, False, None]),
        ("big > single", [True, False, None]),
        ("big * 2 > 6", [True, False, None]),
        ("small < 1000 and small > 2.5", [True, True, None]),
        ("hash > 2.5 and hash > -1", [True, False, None]),
        ("hash == 9223372036854775807", [False, False, None]),
        ("single >= 0.29", [True, True, None]),
        ("single == .29", [True, False, None]),
        ("single > 1e39", [False, True, None]),
        ("half >= 0.29", [True, True, None]),
        ("half > 1e6 or half == single", [False, True, None]),
        ("half != double", [True, False, None]),
        ("double / small > 1", [False, True, None]),
        ("1 / (small - 7) < 0", [None, True, None]),  # divided by zero
        ("not 1 / (small - 7) < 0", [None, False, None]),
        ("0 / (small - 7) is None", [True, False, True]),
        ("small > 1 / 0", [None, None, None]),
        ("nothing > 1 or nothing == nothing", [None, None, None]),
        ("text in ('a', 'c')", [True, False, None]),
        ("text not in ('a', 'c')", [False, True, None]),
        ("kind in ('a', 'c') and kind != 'b'", [True, False, None]),
        ("small in (1, 7, 1000)", [True, False, None]),
        ("big in (3.0, 4.5)", [False, True, None]),
        ("single in (0.29, 3)", [True, False, None]),
        ("1 in (small, 1)", [True, True, True]),
        ("hash in (1, 2)", [False, True, None]),
    ],
)
def test_a_condition_holds_for_every_type_of_column(where, rows):
    table = pa.table(
        {
            "big": [BIG, 3, None],
            "small": pa.array([7, 3, None], pa.int8()),
            "hash": pa.array([2**64 - 1, 1, None], pa.uint64()),
            "single": pa.array([0.29, float("inf"), NAN], pa.float32()),
            "half": pa.array(np.array([0.29, np.inf, np.nan], np.float16)),
            "double": [0.29, float("inf"), None],
            "text": ["a", "b", None],
            "kind": pa.array(["a", "b", None]).dictionary_encode(),
            "nothing": pa.nulls(3),
        }
    )
    results = [condition.evaluate(table) for condition in parse(where)]
    assert functools.reduce(pc.and_kleene, results).to_pylist() == rows


@pytest.mark.parametrize(
    "where",
    [
        f"n in ({', '.join(map(str, range(9000)))})",
        f"text in ({', '.join(repr(str(i)) for i in range(9000))})",
        " or ".join(f"n == {i}" for i in range(9000)),
        f"n == 3 or ({' and '.join(f'n != {i}' for i in range(9000))})",
    ],
)
def test_thousands_of_values_are_as_good_as_one(where):
    (condition,) = parse(where)
    table = pa.table({"n": [3, 9000, None], "text": ["3", "9000", None]})
    held = condition.evaluate(table).to_pylist()
    assert held == ([True, True, None] if "!=" in where else [True, False, None])


def test_a_parquet_of_other_types_is_one_line_and_code_3(folder, capsys):
    good = {"key": ["000000100"], "status": ["success"], "width": [7]}
    columns = {
        "status": [{**good, "status": [1]}, {**good, "status": [["success"]]}],
        "key": [{**good, "key": [["000000100"]]}, {**good, "key": [{"a": 1}]}],
    }
    twice = [
        pa.table([[1], *good.values()], names=["width", *good]),
        pa.table([["1"], *good.values()], names=["key", *good]),
    ]
    tables = [pa.table(table) for tables in columns.values() for table in tables] + twice
    write_tars(folder, tars=1 + len(tables))
    for t, table in enumerate(tables, 1):
        pq.write_table(table, folder / f"{t:05d}.parquet")
    out = folder / "s.pairs"
    assert entry_point(select.main)([f"--path={folder}", "--where=width > 0", f"--out={out}", "--jobs=1"]) == 3
    assert "6 of 7 tars left out" in capsys.readouterr().err.splitlines()[-1]
    why = [tar["why"] for tar in json.loads(select.report_file(out).read_text())["left_out"]]
    says = [
        "its column 'status' is of int64, not of text", "its column 'status' is of list", "keys do not fit",
        "keys do not fit", "has several columns 'width'", "has several columns 'key'",
    ]  # fmt: skip
    for t, (line, part) in enumerate(zip(why, says, strict=True), 1):
        assert part in line
        assert f"{t:05d}.parquet" in line


def test_a_table_shows_names_and_conditions_as_they_are(folder, capsys):
    for suffix in ("tar", "parquet"):
        (folder / f"00001.{suffix}").rename(folder / f"[bold]\x1b[31m.{suffix}")
    out = folder / "[i]s.pairs"
    assert select.main([f"--path={folder}", '--where=NSFW != "[/b]"', f"--out={out}", "--jobs=1"]) == 0
    printed = capsys.readouterr().out
    for part in ("NSFW != '[/b]'", r"[bold]\x1b[31m.tar", "[i]s.pairs"):
        assert part in printed


def test_an_infinite_threshold_is_valid_json(folder, capsys):
    write_parquet(folder / "00000.parquet", key=["000000001"], status=["success"], x=[float("inf")])
    write_parquet(folder / "00001.parquet", key=["000000100"], status=["success"], x=[1.0])
    out = folder / "s.pairs"
    assert select.main([f"--path={folder}", "--keep=1", "--by=x", f"--out={out}", "--jobs=1"]) == 0
    assert "x >= inf" in capsys.readouterr().out
    report = json.loads(select.report_file(out).read_text(), parse_constant=pytest.fail)
    assert report["threshold"] == "inf"


def test_help_and_missing_flags():
    command = [sys.executable, "-m", "visionfm_jax.data.select"]
    shown = subprocess.run([*command, "--help"], capture_output=True, text=True)
    assert shown.returncode == 0
    assert "--where='similarity >= 0.28" in shown.stdout
    assert subprocess.run(command, capture_output=True).returncode == 2


@pytest.mark.parametrize("name", ["00000.tar", "00000_stats"])
def test_no_file_but_a_selection_is_replaced(tmp_path, name):
    folder = write_tars(tmp_path / "tars", 1, 3)
    (folder / "00000_stats.json").write_text("{}")
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".index"}
    with pytest.raises(UserError, match=r"is there, and is no selection; name another file"):
        select.select(str(folder), "width > 0", folder / name)
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".index"} == before
