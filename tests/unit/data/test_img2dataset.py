"""What img2dataset itself wrote: read whole, selected, cut short, and in one order for any number of hosts."""

import hashlib
import io
import json
import multiprocessing
import tarfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from real_tars import unpack

from visionfm_jax.config.schema import DataConfig, PreprocessConfig
from visionfm_jax.data import select
from visionfm_jax.data.chain import EvalTransform
from visionfm_jax.data.fields import Texts
from visionfm_jax.data.loader import eval_loader, train_loader
from visionfm_jax.data.sources import Source, open_source, tar_index
from visionfm_jax.data.sources.kinds import TarsConfig
from visionfm_jax.data.tokenizer import open_tokenizer
from visionfm_jax.data.transforms import RandAugment, RandomResizedCrop

EMPTY = 3  # captions


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return unpack(tmp_path_factory.mktemp("img2dataset"))


@pytest.fixture(scope="module")
def rows(folder) -> dict[str, dict]:
    """Of the parquets: TAR/KEY -> row, of the downloads that succeeded."""
    out = {}
    for path in sorted(folder.glob("*.parquet")):
        table = pq.read_table(path).to_pylist()
        out |= {f"{path.stem}/{row['key']}": row for row in table if row["status"] == "success"}
    return out


def opened(folder: Path, **more) -> Source:
    return open_source(TarsConfig(path=str(folder), **more))


def test_the_set_is_what_img2dataset_says(folder, rows):
    stats = [json.loads(path.read_text()) for path in sorted(folder.glob("*_stats.json"))]
    assert [s["successes"] for s in stats] == [67, 66, 68]
    assert sum(s["failed_to_download"] for s in stats) == 14
    assert sum(s["failed_to_resize"] for s in stats) == 1
    assert len(rows) == 201


def test_all_pairs_with_a_caption_are_there(folder, rows):
    source = opened(folder)
    whole = {key: row for key, row in rows.items() if (row["caption"] or "").strip()}
    assert len(source) == len(whole) == len(rows) - EMPTY
    pairs = {source.key(i): source[i] for i in range(len(source))}
    assert pairs.keys() == whole.keys()
    for key, pair in pairs.items():
        assert pair["caption"] == whole[key]["caption"].strip()
        assert hashlib.sha256(pair["image"]).hexdigest() == whole[key]["sha256"]  # taken while downloading
        assert Image.open(io.BytesIO(pair["image"])).size == (whole[key]["width"], whole[key]["height"])
    skipped = source.report()["skipped"][tar_index.EMPTY]
    assert skipped["count"] == EMPTY
    assert set(skipped["first"]) == rows.keys() - whole.keys()
    assert {"first line\nsecond line", "Tür, café, 愛 \N{HEAVY BLACK HEART}"} <= {p["caption"] for p in pairs.values()}


@pytest.mark.parametrize(
    ("where", "holds"),
    [
        ("similarity >= 0.3", lambda row: (row["similarity"] or 0) >= 0.3),
        (
            'similarity >= 0.28 and NSFW == "UNLIKELY" and pwatermark < 0.8 and punsafe < 0.9 and width >= 50',
            lambda row: (
                (row["similarity"] or 0) >= 0.28
                and row["NSFW"] == "UNLIKELY"
                and row["pwatermark"] < 0.8
                and row["punsafe"] < 0.9
                and row["width"] >= 50
            ),
        ),
    ],
)
def test_a_selection_by_columns(folder, rows, tmp_path, where, holds):
    report = select.select(str(folder), where, tmp_path / "good.pairs")
    source = opened(folder, selection=str(tmp_path / "good.pairs"))
    expected = {key for key, row in rows.items() if holds(row) and (row["caption"] or "").strip()}
    assert {source.key(i) for i in range(len(source))} == expected
    assert 10 < report["selected"] == len(source) == len(expected) < 130
    assert (report["rows"], report["success"], report["pairs"]) == (216, 201, 201 - EMPTY)


def test_a_tar_cut_short_is_told_by_key(folder, tmp_path):
    before = opened(folder)
    keys = [before.key(i) for i in range(len(before))]
    place = keys.index(next(key for key in keys if key.startswith("00001/"))) + 40
    with tarfile.open(folder / "00001.tar") as tar:
        picture = tar.getmember(f"{keys[place].partition('/')[2]}.jpg")
    for path in folder.glob("*.tar"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    with (tmp_path / "00001.tar").open("r+b") as file:
        file.truncate(picture.offset_data + picture.size // 2)
    source = opened(tmp_path)
    assert source.report()["cut"] == [keys[place]]
    assert f"1 of 3 tars are truncated, at {keys[place]}; the complete pairs before are used" in source.report_lines()
    left = [source.key(i) for i in range(len(source))]
    assert left == keys[:place] + [key for key in keys if key.startswith("00002/")]


# --- through the loader ---

BATCH, STEPS = 12, 40  # 480 samples: more than two epochs


def batches(path: str, host: int, hosts: int, workers: int = 0) -> list[dict[str, np.ndarray]]:
    """Of one host, that opens the tars itself."""
    config = TarsConfig(path=path)
    chain = (RandomResizedCrop(scale=(0.5, 1.0)), RandAugment())
    data = DataConfig(train=(config,), transforms=chain, threads=2, workers=workers)
    with train_loader(
        data, image_size=16, batch_size=BATCH, seed=3, start_step=0, host=host, hosts=hosts,
        sources=[open_source(config)], fields=Texts(open_tokenizer("clip"), 16),
    ) as loader:  # fmt: skip
        return [{key: np.array(value) for key, value in next(loader).items()} for _ in range(STEPS)]


def hashes(parts: list[list[dict[str, np.ndarray]]]) -> list[str]:
    """Of the batches of all hosts together."""
    out = []
    for step in zip(*parts, strict=True):
        found = hashlib.sha256()
        for key in sorted(step[0]):
            found.update(np.concatenate([batch[key] for batch in step]).tobytes())
        out.append(found.hexdigest())
    return out


@pytest.fixture(scope="module")
def expected(folder) -> list[str]:
    whole = batches(str(folder), 0, 1)
    assert {k: (v.shape, v.dtype) for k, v in whole[0].items() if k in ("image", "text")} == {
        "image": ((BATCH, 16, 16, 3), np.dtype(np.uint8)),
        "text": ((BATCH, 16), np.dtype(np.int32)),
    }
    assert sum(int(batch["damaged"].sum()) for batch in whole) == 0
    records = np.concatenate([batch["record"] for batch in whole])
    for epoch in (records[:198], records[198:396]):
        assert sorted(epoch) == list(range(198))
    assert len(set(hashes([whole]))) == STEPS
    return hashes([whole])


def test_each_row_has_the_text_of_its_record(folder):
    source, tokenizer = opened(folder), open_tokenizer("clip")
    for batch in batches(str(folder), 0, 1)[:5]:
        for record, text in zip(batch["record"].tolist(), batch["text"], strict=True):
            np.testing.assert_array_equal(text, tokenizer(source[record]["caption"], 16))


@pytest.mark.parametrize("hosts", [2, 3])
def test_hosts_together_see_what_one_sees(folder, expected, hosts):
    assert hashes([batches(str(folder), host, hosts) for host in range(hosts)]) == expected


def test_processes_with_workers_see_what_one_sees(folder, expected):
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        parts = pool.starmap(batches, [(str(folder), host, 2) for host in range(2)])
    assert hashes(parts) == expected
    assert hashes([batches(str(folder), 0, 1, 1)]) == expected


def test_evaluation_sees_every_pair_once_in_order(folder):
    source, fields = opened(folder), Texts(open_tokenizer("clip"), 16)
    parts = [
        list(
            eval_loader(
                source, fields, EvalTransform(16, PreprocessConfig()), batch_size=64, host=host, hosts=2, threads=2
            )
        )
        for host in range(2)
    ]
    texts, masks = (
        np.concatenate([batch[key] for step in zip(*parts, strict=True) for batch in step]) for key in ("text", "mask")
    )
    assert masks.tolist() == [1.0] * 198 + [0.0] * (len(masks) - 198)
    np.testing.assert_array_equal(texts[:198], [fields(source[i])["text"] for i in range(198)])
