"""`visionfm data dedup`: what is dropped and why, by every engine and whatever dies the same, and what is reported."""

import functools
import io
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from make_crawl import make_crawl
from PIL import Image
from runs import environment

from visionfm_jax import __main__ as console
from visionfm_jax.curation.dedup import LEFT_OUT, dedup
from visionfm_jax.data import column_folder, duplicates
from visionfm_jax.data.shards import Here
from visionfm_jax.data.sources.tars import TarPairs
from visionfm_jax.errors import ConfigError, DataError, UserError

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def crawl(tmp_path_factory):
    """Six tars of a crawl with known copies, and the held-out set beside it."""
    folder = tmp_path_factory.mktemp("web") / "crawl"
    truth = make_crawl(folder, shards=6, pairs=60)
    return folder, {f"{row['tar']}/{row['key']}": row for row in truth.to_pylist()}


@pytest.fixture(scope="module")
def whole(crawl, tmp_path_factory):
    """What one process makes of it."""
    out = tmp_path_factory.mktemp("out") / "copies"
    report = dedup(str(crawl[0]), out, against=[against(crawl)], engine=Here())
    return out, report


def against(crawl) -> str:
    return f"folder:{crawl[0].parent / 'heldout'}@"


def rows_of(out: Path) -> dict[str, dict]:
    found = {}
    for path in sorted(out.glob("*.parquet")):
        found |= {f"{path.stem}/{row.pop('key')}": row for row in pq.read_table(path).to_pylist()}
    return found


def contents(out: Path) -> dict[str, bytes]:
    """All files but the page, which says when it was made."""
    files = (path for path in out.rglob("*") if path.is_file() and path.name != "report.html")
    return {str(path.relative_to(out)): path.read_bytes() for path in files}


def test_copies_of_known_pictures_are_dropped(crawl, whole):
    _, truth = crawl
    rows = rows_of(whole[0])
    groups = {key: truth[key]["image_group"] for key in rows}
    dropped = {key: row["duplicate_of"] for key, row in rows.items() if row["duplicate"]}
    assert all(groups[key] == groups[kept] for key, kept in dropped.items())
    assert not dropped.keys() & set(dropped.values())
    assert len(dropped) >= 0.85 * (len(groups) - len(set(groups.values()))) > 20
    for key, kept in dropped.items():
        same = truth[key]["caption_group"] == truth[kept]["caption_group"]
        assert rows[key]["why"] == ("pair" if same else "image")
    assert all(
        rows[key] | {"duplicate": False, "duplicate_of": None, "why": None} == rows[key]
        for key in rows.keys() - dropped.keys()
    )


def test_held_out_pictures_are_found(crawl, whole):
    _, truth = crawl
    rows = rows_of(whole[0])
    true = [key for key in rows if truth[key]["heldout"]]
    found = [key for key, row in rows.items() if row["contaminated"]]
    assert set(found) <= set(true)
    assert len(found) >= 0.75 * len(true) > 5
    for key in found:
        assert re.fullmatch(re.escape(against(crawl)) + r"#\d+ " + truth[key]["heldout"], rows[key]["contaminated_by"])


def test_the_report_counts_and_shows(crawl, whole):
    out, report = whole
    rows = rows_of(out)
    assert report == json.loads((out / "report.json").read_text())
    assert report["pairs"] == len(rows)
    assert (
        sum(report["duplicates"].values())
        == len(rows) - report["kept"]
        == sum(row["duplicate"] for row in rows.values())
    )
    assert report["contaminated"] == sum(row["contaminated"] for row in rows.values())
    words = [crawl[1][key]["caption_group"] for key in rows]
    assert report["captions"]["repeated"] == sum(words.count(word) > 1 for word in words)
    assert report["captions"]["top"][0]["pairs"] == max(map(words.count, words))
    page = (out / "report.html").read_text()
    assert page.count("<b>kept</b>") == page.count("<h3>") == 12
    assert page.count("<b>held out</b>") == report["contaminated"]
    assert page.count("data:image/jpeg;base64,") == page.count("<figure>")
    assert not (out / "work").exists()


def test_how_pairs_are_spread_changes_nothing(crawl, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(duplicates, "ROWS", 70)
    dedup(str(crawl[0]), tmp_path / "out", against=[against(crawl)], engine=Here())
    assert contents(tmp_path / "out") == contents(whole[0])


def test_what_is_killed_goes_on(crawl, whole, tmp_path):
    """A worker of two is killed, then the command; the next start finds what stands."""
    out = tmp_path / "out"
    command = [sys.executable, "-m", "visionfm_jax", "data", "dedup", f"--path={crawl[0]}", f"--out={out}", "--jobs=2"]
    command.append(f"--against={against(crawl)}")
    process = subprocess.Popen(command, cwd=ROOT, env=environment(1), stderr=subprocess.DEVNULL)

    def wait_for(pattern: str) -> None:
        while process.poll() is None and not any(out.glob(pattern)):
            time.sleep(0.002)

    wait_for("signatures/0*.parquet")
    kill_a_worker(process)
    wait_for("work/edges-*")
    process.kill()
    process.wait()
    assert not (out / "report.json").exists()
    dedup(str(crawl[0]), out, against=[against(crawl)], engine=Here())
    assert contents(out) == contents(whole[0])


def kill_a_worker(process):
    for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes():
            os.kill(int(child), signal.SIGKILL)
            return


def jpeg(pixels: np.ndarray, quality: int = 90) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


@functools.cache
def drawing(seed: int, side: int = 64) -> np.ndarray:
    """A picture of large random patches."""
    patches = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), np.uint8)
    return np.asarray(Image.fromarray(patches).resize((side, side), Image.Resampling.BICUBIC))


def write_pairs(folder: Path, *tars: list[tuple[bytes, str]]) -> Path:
    """NNNNN.tar of pairs 0, 1, …"""
    folder.mkdir()
    for t, pairs in enumerate(tars):
        with tarfile.open(folder / f"{t:05d}.tar", "w") as tar:
            for i, (image, caption) in enumerate(pairs):
                for name, content in ((f"{i}.jpg", image), (f"{i}.txt", caption.encode())):
                    info = tarfile.TarInfo(name)
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return folder


@pytest.fixture
def few(tmp_path):
    a, b = drawing(1), drawing(2)
    return write_pairs(
        tmp_path / "few",
        [(jpeg(a), "a photo"), (jpeg(b), "A photo!"), (jpeg(drawing(1, 128)), "large"), (b"\xff\xd8\xff", "broken")],
        [(jpeg(a, 50), "a   photo"), (jpeg(a[:, ::-1]), "mirrored"), (jpeg(b), "another")],
        [],
    )


@pytest.mark.parametrize(
    ("by", "expected"),
    [
        ("image", {"00000/0": "00000/2 image", "00001/0": "00000/2 image", "00001/2": "00000/1 image"}),
        ("pair", {"00001/0": "00000/0 pair"}),
        ("caption", {"00000/1": "00000/0 caption", "00001/0": "00000/0 pair"}),
    ],
)
def test_what_makes_a_duplicate(few, tmp_path, by, expected):
    dedup(str(few), tmp_path / "out", by=by, engine=Here())
    rows = rows_of(tmp_path / "out")
    assert {key: f"{row['duplicate_of']} {row['why']}" for key, row in rows.items() if row["duplicate"]} == expected
    assert rows["00000/3"] == {"duplicate": None, "duplicate_of": None, "why": None}


def test_the_best_scored_copy_is_kept(few, tmp_path):
    scores = column_folder.create(tmp_path / "scores", {"command": "data score"})
    for tar, values in zip(TarPairs(str(few)).index.tars, [[0.1, 0.3, 0.2, None], [0.4, 0.5, 0.3], []], strict=True):
        scores.write(tar, [str(i) for i in range(len(values))], {"similarity": pa.array(values, pa.float32())})
    dedup(str(few), tmp_path / "out", scores=scores.path, engine=Here())
    rows = rows_of(tmp_path / "out")
    assert {key: row["duplicate_of"] for key, row in rows.items() if row["duplicate"]} == {
        "00000/0": "00001/0",
        "00000/2": "00001/0",
        "00001/2": "00000/1",
    }
    assert "score 0.400" in (tmp_path / "out" / "report.html").read_text()


def test_mirrored_held_out_images_and_the_exit_code(few, tmp_path, capsys):
    held = tmp_path / "held" / "test" / "x"
    held.mkdir(parents=True)
    Image.fromarray(drawing(2)[:, ::-1]).save(held / "b.png")
    (held / "broken.png").write_bytes(b"\x89PNG")
    out = tmp_path / "out"
    words = ["data", "dedup", f"--path={few}", f"--out={out}", f"--against=folder:{tmp_path}/held@test", "--jobs=1"]
    assert console.main(words) == LEFT_OUT
    found = {key: row["contaminated_by"] for key, row in rows_of(out).items() if row["contaminated"]}
    assert found == dict.fromkeys(("00000/1", "00001/2"), f"folder:{tmp_path}/held@test#0 x/b.png")
    assert "held out, mirrored in the pair" in (out / "report.html").read_text()
    shown = capsys.readouterr()
    assert "00000/3: " in shown.err
    assert "#1 x/broken.png" in shown.err
    assert "that show held-out images" in shown.out
    (out / "00001.parquet").unlink()
    before = contents(out)
    assert console.main(words) == LEFT_OUT
    assert before.items() < contents(out).items()


def test_other_work_is_refused(few, tmp_path):
    out = tmp_path / "out"
    dedup(str(few), out, engine=Here())
    with pytest.raises(ConfigError, match="was made with another by"):
        dedup(str(few), out, by="pair", engine=Here())
    (few / "00001.tar").unlink()
    with pytest.raises(ConfigError, match="was made with another tars"):
        dedup(str(few), out, engine=Here())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"against": ["pets"]}, "--against=pets: is no KIND:PATH of a dataset; kinds are "),
        ({"against": ["folder:/nowhere@test"]}, "/nowhere"),
        ({"caption_key": ""}, "--caption_key: is empty"),
        ({"caption_key": "text"}, "holds no pair"),
        ({"scores": Path("/nowhere")}, "--columns=/nowhere: has no about.json"),
    ],
)
def test_wrong_arguments_are_one_line(few, tmp_path, change, message):
    with pytest.raises(UserError, match=re.escape(message)):
        dedup(str(few), tmp_path / "out", engine=Here(), **change)
    assert not (tmp_path / "out").exists()


def test_nothing_that_can_be_read_is_an_error(tmp_path):
    folder = write_pairs(tmp_path / "broken", [(b"\xff\xd8\xff", "a"), (b"no", "b")])
    with pytest.raises(DataError, match="no picture can be read; the first: 00000/0: "):
        dedup(str(folder), tmp_path / "out", engine=Here())
