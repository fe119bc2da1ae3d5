"""A small crawl: the truth says what is in the folder, which img2dataset's readers open."""

import io

import numpy as np
import pyarrow.parquet as pq
import pytest
from make_crawl import main, make_crawl, words
from PIL import Image

from visionfm_jax.data.sources import open_source, tar_index
from visionfm_jax.data.sources.kinds import FolderConfig, TarsConfig
from visionfm_jax.data.sources.tars import TarPairs
from visionfm_jax.errors import UserError

SHARDS, PAIRS = 3, 40


@pytest.fixture(scope="module")
def crawl(tmp_path_factory):
    out = tmp_path_factory.mktemp("crawls") / "crawl"
    return out, make_crawl(out, shards=SHARDS, pairs=PAIRS).to_pylist()


def grey(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content)).convert("L").resize((16, 16)), float)


def test_the_pairs_are_those_that_are_not_lost(crawl):
    out, truth = crawl
    source = TarPairs(str(out))
    pairs = {source.key(i): source[i] for i in range(len(source))}
    whole = {f"{row['tar']}/{row['key']}": row for row in truth if row["lost"] is None}
    assert pairs.keys() == whole.keys()
    assert all(pairs[key]["caption"] == row["caption"].strip() for key, row in whole.items())
    report = source.report()
    assert len(report["cut"]) == 1
    assert {tar_index.EMPTY, tar_index.NO_CAPTION, tar_index.NO_PICTURE} <= report["skipped"].keys()
    assert {row["lost"] for row in truth} == {
        None, "cut", "failed", "renamed", "no caption", "empty caption",
    }  # fmt: skip


def test_copies_look_and_read_alike(crawl):
    out, truth = crawl
    source = TarPairs(str(out))
    pairs = {source.key(i): source[i] for i in range(len(source))}
    copies = 0
    for row in truth:
        name = f"{row['tar']}/{row['key']}"
        if row["lost"] is None and row["image_group"] != name and row["image_group"] in pairs:
            copies += 1
            ours, other = grey(pairs[name]["image"]), grey(pairs[row["image_group"]]["image"])
            assert np.corrcoef(ours.ravel(), other.ravel())[0, 1] > 0.9, row["change"]
            assert (pairs[name]["image"] == pairs[row["image_group"]]["image"]) == (row["change"] == "none")
        if row["caption_group"] in pairs:
            assert words(row["caption"]) == words(pairs[row["caption_group"]]["caption"])
        if row["heldout"]:
            assert (out.parent / "heldout" / row["heldout"]).exists()
    assert copies >= SHARDS * PAIRS * 0.05


def test_about_a_quarter_is_mislabelled_and_the_parquets_tell_of_all_rows(crawl):
    out, truth = crawl
    wrong = [row for row in truth if row["mislabelled"]]
    assert 0.15 < len(wrong) / len(truth) < 0.3
    assert all(row["name"] not in row["caption"] for row in wrong)
    table = [row for s in range(SHARDS) for row in pq.read_table(out / f"{s:05d}.parquet").to_pylist()]
    assert [row["key"] for row in table] == [row["key"] for row in truth]
    assert [row["status"] == "success" for row in table] == [row["lost"] != "failed" for row in truth]
    assert {"caption", "url", "width", "height", "original_width", "exif", "sha256"} <= table[0].keys()


def test_the_held_out_set_is_written_twice(crawl):
    out, _ = crawl
    folder = open_source(FolderConfig(path=str(out.parent / "heldout"), split=""))
    pairs = open_source(TarsConfig(path=str(out.parent / "heldout_pairs")))
    assert sorted(folder[i]["image"] for i in range(len(folder))) == sorted(p["image"] for p in pairs)


def test_the_seed_decides_and_nothing_is_overwritten(crawl, tmp_path, capsys):
    out, truth = crawl
    main([f"--out={tmp_path}/again", f"--shards={SHARDS}", f"--pairs={PAIRS}"])
    assert f"{SHARDS * PAIRS} rows" in capsys.readouterr().out
    for path in out.glob("*.tar"):
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()
    with pytest.raises(UserError, match="is there already"):
        make_crawl(out)
    with pytest.raises(UserError, match="at least 20"):
        main([f"--out={tmp_path}/small", "--pairs=3"])
    assert make_crawl(tmp_path / "other" / "crawl", shards=1, pairs=20, seed=1).to_pylist() != truth
