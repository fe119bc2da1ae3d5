"""Selecting by computed columns, the best so many, and copies of what was selected."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from make_crawl import make_crawl
from tar_sets import picture, tar_bytes

from visionfm_jax.config.schema import DataConfig
from visionfm_jax.data import column_folder, copies, select
from visionfm_jax.data.fields import Texts
from visionfm_jax.data.loader import train_loader
from visionfm_jax.data.shards import Here
from visionfm_jax.data.sources import open_source, tar_index
from visionfm_jax.data.sources.kinds import TarsConfig, TfdsConfig
from visionfm_jax.data.sources.selection import Selection, read_selection
from visionfm_jax.data.sources.tars import TarPairs
from visionfm_jax.data.tokenizer import open_tokenizer
from visionfm_jax.data.transforms import RandomResizedCrop
from visionfm_jax.errors import ConfigError, DataError, UserError, entry_point

SHARDS = 3


def write_columns(crawl: Path, folder: Path, command: str, **columns) -> None:
    """Columns of all pairs, one value after the other."""
    source = TarPairs(str(crawl))
    out = column_folder.create(folder, {"command": command})
    starts = source.index.starts.tolist()
    for tar, a, b in zip(source.index.tars, starts, starts[1:], strict=False):
        keys = tar_index.keys(source.store, tar["name"], source.index.records[a:b])
        out.write(tar, keys, {name: column[a:b] for name, column in columns.items()})


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A crawl with scores and copies; the columns are returned, too."""
    root = tmp_path_factory.mktemp("scored")
    make_crawl(root / "crawl", shards=SHARDS, pairs=30)
    pairs, rng = len(TarPairs(str(root / "crawl"))), np.random.default_rng(0)
    similarity = rng.integers(20, 33, pairs).astype(np.float32) / 100  # many are equal
    scores = pa.array(similarity, mask=rng.random(pairs) < 0.1)
    duplicate = pa.array(rng.random(pairs) < 0.3, mask=rng.random(pairs) < 0.05)
    contaminated = pa.array(rng.random(pairs) < 0.1)
    write_columns(root / "crawl", root / "scores", "data score", similarity=scores)
    write_columns(root / "crawl", root / "copies", "data dedup", duplicate=duplicate, contaminated=contaminated)
    table = pa.table({"similarity": scores, "duplicate": duplicate, "contaminated": contaminated}).to_pylist()
    return root, table


@pytest.fixture
def folder(made, tmp_path) -> Path:
    """Like the first, to be changed."""
    return Path(shutil.copytree(made[0], tmp_path / "scored"))


def chosen(root: Path, out: Path, where: str = "", **more) -> list[int]:
    """Numbers of the pairs that are selected."""
    folders = [root / "scores", root / "copies"]
    select.select(str(root / "crawl"), where, out, columns=folders, **more)
    selection = read_selection(str(out), TarPairs(str(root / "crawl")).index)
    index = TarPairs(str(root / "crawl")).index
    return [
        int(index.starts[t]) + i
        for t in range(len(index.tars))
        for i in np.flatnonzero(np.unpackbits(selection.bits[selection.first[t] : selection.first[t + 1]])).tolist()
    ]


@pytest.mark.parametrize(
    ("where", "holds"),
    [
        ("not duplicate", lambda row: row["duplicate"] is False),
        ("duplicate", lambda row: row["duplicate"] is True),
        ("duplicate is None", lambda row: row["duplicate"] is None),
        ("duplicate == False or duplicate is None", lambda row: not row["duplicate"]),
        (
            "similarity >= 0.25 and not duplicate and not contaminated",
            lambda row: (row["similarity"] or 0) >= 0.2499999 and row["duplicate"] is False and not row["contaminated"],
        ),
    ],
)
def test_conditions_on_computed_columns(made, tmp_path, where, holds):
    root, table = made
    assert chosen(root, tmp_path / "s.pairs", where) == [i for i, row in enumerate(table) if holds(row)]


@pytest.mark.parametrize("keep", [1, 7, 20, 45])
@pytest.mark.parametrize("where", ["", "not duplicate"])
def test_keep_takes_exactly_the_best_and_of_equal_ones_the_first(made, tmp_path, where, keep):
    root, table = made
    fit = [i for i, row in enumerate(table) if row["similarity"] is not None]
    fit = [i for i in fit if not where or table[i]["duplicate"] is False]
    best = sorted(fit, key=lambda i: (-table[i]["similarity"], i))[:keep]
    assert chosen(root, tmp_path / "s.pairs", where, keep=keep) == sorted(best)
    report = json.loads((tmp_path / "s.pairs.json").read_text())
    threshold = table[best[-1]]["similarity"]
    ties = sum(table[i]["similarity"] == threshold for i in fit) - sum(
        table[i]["similarity"] == threshold for i in best
    )
    assert (report["threshold"], report["ties"]) == (threshold, ties)
    assert report["selected"] == sum(tar["selected"] for tar in report["tars"]) == len(best)
    assert sum(report["histogram"]["fit"]) == len(fit)
    assert report["columns"]["similarity"] == str(root / "scores")


def test_fewer_than_keep_asks_for_are_all_taken(made, tmp_path, capsys):
    root, table = made
    assert len(chosen(root, tmp_path / "s.pairs", keep=10**9)) == sum(row["similarity"] is not None for row in table)
    arguments = [f"--path={root}/crawl", f"--columns={root}/scores", f"--out={tmp_path}/s.pairs"]
    assert select.main([*arguments, "--keep=1.2e9"]) == 0
    printed = capsys.readouterr().out
    assert "--keep=1,200,000,000: all " in printed
    assert "similarity from" in printed
    assert f"similarity: of {root}/scores" in printed


def test_parquets_are_read_only_where_a_column_of_theirs_is_named(folder, tmp_path):
    whole = chosen(folder, tmp_path / "s.pairs", "similarity > 0.25 and width > 90")
    for path in (folder / "crawl").glob("*.parquet"):
        path.unlink()
    more = chosen(folder, tmp_path / "s.pairs", "similarity > 0.25")
    assert set(whole) < set(more)
    report = json.loads((tmp_path / "s.pairs.json").read_text())
    assert (report["rows"], report["known"]) == (None, report["pairs"])
    with pytest.raises(DataError, match=r"without parquets.*no column 'widht'; the columns are similarity, duplicate"):
        chosen(folder, tmp_path / "s.pairs", "similarity > 0.25 and widht > 90")


def test_a_column_of_a_folder_goes_before_one_of_a_parquet(folder, tmp_path):
    write_columns(folder / "crawl", folder / "own", "mine", width=np.arange(len(TarPairs(str(folder / "crawl")))))
    select.select(str(folder / "crawl"), "width < 2", tmp_path / "s.pairs", columns=[folder / "own"])
    source = TarPairs(str(folder / "crawl"), selection=str(tmp_path / "s.pairs"))
    assert len(source) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--where=similarty > 0"], r"no column 'similarty'; did you mean similarity\?.*caption, url"),
        (["--where=similarity > 1"], r"leaves none of [0-9]+ pairs; 'similarity > 1' alone drops [0-9]+"),
        (["--where=similarity > 0", "--columns={root}/scores"], r"scores both have a column 'similarity'; leave one"),
        (["--where=similarity > 0", "--columns={root}/crawl"], r"has no about\.json"),
        ([], "--where and --keep are both missing"),
        (["--keep=0"], r"--keep='0': must be a whole number of pairs"),
        (["--keep=1.5"], "must be a whole number"),
        (["--keep=many"], "must be a whole number"),
        (["--keep=5", "--by=duplicate"], "--by=duplicate: is a column of bool; name one of numbers"),
        (["--keep=5", "--by=a b"], "--by='a b': is no name of a column"),
        (["--keep=5", "--by=nothing"], "no column 'nothing'"),
        (["--keep=5", "--write=tars"], "--write and --to belong together"),
        (["--keep=5", "--write=tars", "--to={root}/crawl"], "--to=.*is a folder of other files"),
    ],
)
def test_a_wrong_command_is_one_line(made, tmp_path, capsys, arguments, message):
    root, _ = made
    arguments = [argument.format(root=root) for argument in arguments]
    command = [f"--path={root}/crawl", f"--columns={root}/scores", f"--columns={root}/copies", *arguments]
    with pytest.raises(UserError, match=message) as caught:
        select.main([*command, f"--out={tmp_path}/s.pairs"])
    assert "\n" not in str(caught.value)


def test_columns_of_another_crawl_are_refused(folder, tmp_path):
    make_crawl(tmp_path / "other" / "crawl", shards=SHARDS, pairs=30, seed=1)
    command = [f"--path={tmp_path}/other/crawl", f"--columns={folder}/scores", f"--out={tmp_path}/s.pairs"]
    with pytest.raises(DataError, match=r"00000\.parquet: is of another 00000\.tar"):
        select.main([*command, "--keep=3"])
    assert not (tmp_path / "s.pairs").exists()


def test_a_score_that_is_not_finished_leaves_out_tars(folder, tmp_path, capsys):
    (folder / "scores" / "00001.parquet").unlink()
    command = [f"--path={folder}/crawl", f"--columns={folder}/scores", "--keep=1e6", f"--out={tmp_path}/s.pairs"]
    assert entry_point(select.main)(command) == 3
    assert "00001.parquet: is missing; run visionfm data score again" in capsys.readouterr().err.splitlines()[-1]
    source = TarPairs(str(folder / "crawl"), selection=str(tmp_path / "s.pairs"))
    assert {source.key(i).partition("/")[0] for i in range(len(source))} == {"00000", "00002"}


# --- copies ---


def records(source) -> list[tuple[bytes, str]]:
    found = [source[i] for i in range(len(source))]
    texts = [r["caption"].decode() if isinstance(r["caption"], bytes) else r["caption"] for r in found]
    return [(record["image"], text) for record, text in zip(found, texts, strict=True)]


def batches(config) -> list[dict[str, np.ndarray]]:
    """The first of a training."""
    data = DataConfig(train=(config,), transforms=(RandomResizedCrop(scale=(0.5, 1.0)),), threads=1)
    with train_loader(
        data, image_size=16, batch_size=4, seed=0, start_step=0, host=0, hosts=1,
        sources=[open_source(config)], fields=Texts(open_tokenizer("clip"), 8),
    ) as loader:  # fmt: skip
        return [{key: np.array(value) for key, value in next(loader).items()} for _ in range(3)]


@pytest.mark.parametrize("form", copies.FORMS)
def test_a_copy_has_the_records_of_the_selection(folder, tmp_path, form):
    to, out = tmp_path / "copy", tmp_path / "s.pairs"
    command = [
        f"--path={folder}/crawl", f"--columns={folder}/scores", f"--columns={folder}/copies", f"--out={out}",
        "--where=similarity >= 0.3 and not duplicate", f"--write={form}", f"--to={to}", "--jobs=1",
    ]  # fmt: skip
    select.main(command)
    of_part = TarsConfig(path=str(folder / "crawl"), selection=str(out))
    part = open_source(of_part)
    config = TarsConfig(path=str(to)) if form == "tars" else TfdsConfig(path=str(to))
    copy = open_source(config)
    assert 5 < len(part) < 60
    assert records(copy) == records(part)
    for ours, theirs in zip(batches(config), batches(of_part), strict=True):
        assert ours.keys() >= {"image", "text"}
        for name in ours:
            np.testing.assert_array_equal(ours[name], theirs[name])
    if form == "tars":
        assert [copy.key(i) for i in range(len(copy))] == [part.key(i) for i in range(len(part))]
        table = pq.read_table(next(to.glob("*.parquet")))
        assert {"key", "status", "width", "caption", "similarity", "duplicate"} <= set(table.column_names)
        assert min(table["similarity"].to_pylist()) >= 0.2999
        again = select.select(str(to), "width > 0 and similarity > 0.29 and not duplicate", tmp_path / "again.pairs")
        assert again["selected"] == len(part)  # the copy has its columns beside it

    files = {path.name: path.read_bytes() for path in to.iterdir() if path.is_file()}
    first = min(name for name in files if name.endswith((".tar", "-of-00003")))
    (to / first).unlink()  # it was interrupted
    stamps = {name: (to / name).stat().st_mtime_ns for name in files if name != first and "array_record-" in name}
    select.main(command)
    assert {path.name: path.read_bytes() for path in to.iterdir() if path.is_file() and path.suffix != ".index"} == {
        name: content for name, content in files.items() if not name.endswith(".index")
    }
    assert stamps == {name: (to / name).stat().st_mtime_ns for name in stamps}
    with pytest.raises(ConfigError, match=r"--to=.*was made with another selection"):
        select.main([*(a for a in command if not a.startswith("--where")), "--where=similarity >= 0.31"])


def test_a_copy_keeps_long_and_foreign_names_and_needs_no_parquet(tmp_path):
    (tmp_path / "crawl").mkdir()
    names = ["0", "a" * 120, "folder/" + "b" * 95, "\N{GREEK SMALL LETTER MU}"]
    files = {f"{name}.{kind}": what for name in names for kind, what in (("png", picture(1)), ("txt", name.encode()))}
    (tmp_path / "crawl/00000.tar").write_bytes(tar_bytes(files))
    source = TarPairs(str(tmp_path / "crawl"))
    every = Selection(np.packbits(np.ones(4, bool)), np.array([0, 1]), np.array([4]))
    copies.copy_pairs(source, every, tmp_path / "copy", "tars")
    copy = TarPairs(str(tmp_path / "copy"))
    assert [(copy.key(i), copy[i]) for i in range(4)] == [
        (f"00000/{name}", {"image": picture(1), "caption": name}) for name in names
    ]
    assert pq.read_table(tmp_path / "copy/00000.parquet")["key"].to_pylist() == names


def test_a_tar_that_changed_is_not_copied(folder, tmp_path):
    source = TarPairs(str(folder / "crawl"))
    select.select(str(folder / "crawl"), "width > 0", tmp_path / "s.pairs")
    chosen_of = read_selection(str(tmp_path / "s.pairs"), source.index)
    record = source.index.records[0]
    with (folder / "crawl" / "00000.tar").open("r+b") as file:
        file.seek(int(record["image"]) * tar_index.BLOCK)
        file.write(b"changed")
    with pytest.raises(DataError, match=r"00000\.tar: the pair at byte .* differs from what was indexed"):
        copies.copy_pairs(source, chosen_of, tmp_path / "copy", "tars", engine=Here())
    assert not list((tmp_path / "copy").glob("*.tar"))
