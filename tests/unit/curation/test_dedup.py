"""`visionfm data dedup`: what is dropped and why, by every engine and whatever dies the same, and what is reported."""

import collections
import functools
import io
import itertools
import json
import re
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
from runs import environment, kill_a_worker

from visionfm_jax import __main__ as console
from visionfm_jax.curation.dedup import LEFT_OUT, dedup
from visionfm_jax.data import column_folder, duplicates
from visionfm_jax.data.shards import Here, Local
from visionfm_jax.data.sources import store
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


def test_writing_that_was_stopped_goes_on(crawl, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(duplicates, "ROWS", 70)
    out, write = tmp_path / "out", duplicates.write

    def write_some(job, part):
        return write(job, part) if part.group < 2 else 1 / 0

    with monkeypatch.context() as patch:
        patch.setattr(duplicates, "write", write_some)
        with pytest.raises(ZeroDivisionError):
            dedup(str(crawl[0]), out, against=[against(crawl)], engine=Here())
    assert (out / "00000.parquet").exists() > (out / "00005.parquet").exists()
    for last in ("kept-*", "dropped-*"):
        sorted((out / "work").glob(last))[-1].unlink()
    (out / "00000.parquet").unlink()
    dedup(str(crawl[0]), out, against=[against(crawl)], engine=Here())
    assert contents(out) == contents(whole[0])


@pytest.mark.parametrize("setting", ["ROWS", "VERSION"])
def test_work_of_another_version_is_made_again(crawl, whole, tmp_path, monkeypatch, setting):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(duplicates, setting, 70)
        patch.setattr(duplicates, "choose", lambda found: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            dedup(str(crawl[0]), out, against=[against(crawl)], engine=Here())
    for path in (out / "work").glob("edges-*"):
        store.write_table(path, [], lambda: {})  # that one finds nothing
    dedup(str(crawl[0]), out, against=[against(crawl)], engine=Here())
    assert contents(out) == contents(whole[0])


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


def test_signatures_are_read_as_often_wherever_the_copies_lie(tmp_path, monkeypatch):
    """Each of five tars has a copy of a picture of every other, of which the larger is kept."""
    pictures = [[jpeg(drawing(i, 128 if i == t else 64)) for i in range(5)] for t in range(5)]
    pairs = write_pairs(tmp_path / "pairs", *([(image, "a photo") for image in tar] for tar in pictures))
    monkeypatch.setattr(duplicates, "ROWS", 5)
    read, count = column_folder.ColumnFolder.read, collections.Counter()

    def counted(folder, tar, names=None):
        count[folder.path.name, tar["name"]] += 1
        return read(folder, tar, names)

    monkeypatch.setattr(column_folder.ColumnFolder, "read", counted)
    monkeypatch.setattr("visionfm_jax.curation.dedup._Found.page", lambda *_: "")
    dedup(str(pairs), tmp_path / "out", engine=Here())
    rows = rows_of(tmp_path / "out")
    assert {key: row["duplicate_of"] for key, row in rows.items()} == {
        f"{t:05d}/{i}": None if i == t else f"{i:05d}/{i}" for t in range(5) for i in range(5)
    }
    # To spread them, to look up copies, and to write.
    assert count == {("signatures", f"{t:05d}.tar"): 3 for t in range(5)} | {
        ("out", f"{t:05d}.tar"): 1 for t in range(5)
    }


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


def test_captions_in_json_are_compared_without_the_rest(tmp_path):
    """Whose members are otherwise told apart by what else is in them."""
    folder = tmp_path / "json"
    folder.mkdir()
    with tarfile.open(folder / "00000.tar", "w") as tar:
        for i in range(3):
            text = json.dumps({"caption": "a photo" if i else "another", "number": i}).encode()
            for name, content in ((f"{i}.jpg", jpeg(drawing(1))), (f"{i}.json", text)):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    dedup(str(folder), tmp_path / "out", by="pair", caption_key="json:caption", engine=Here())
    assert [row["duplicate_of"] for row in rows_of(tmp_path / "out").values()] == [None, None, "00000/1"]


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


def turned(vector: np.ndarray, cosine: float, rng: np.random.Generator) -> np.ndarray:
    """A unit vector of that cosine with another."""
    other = rng.standard_normal(vector.shape)
    other -= other @ vector * vector
    return cosine * vector + np.sqrt(1 - cosine**2) * other / np.linalg.norm(other)


def write_embeddings(out: Path, source: TarPairs, scores: list, vectors: list) -> Path:
    """As `visionfm data score --embeddings` does, of all pairs in order; None: could not be read."""
    folder = column_folder.create(out, {"command": "data score", "embeddings": True})
    width = len(next(vector for vector in vectors if vector is not None))
    for shard, (start, stop) in zip(source.index.shards, itertools.pairwise(source.index.starts.tolist()), strict=True):
        flat = [np.zeros(width) if vector is None else vector for vector in vectors[start:stop]]
        flat = pa.array(np.array(flat, np.float16).reshape(-1))
        lost = pa.array([vector is None for vector in vectors[start:stop]], pa.bool_())
        column = pa.FixedSizeListArray.from_arrays(flat, width, mask=lost)
        columns = {"similarity": pa.array(scores[start:stop], pa.float32()), "image_embedding": column}
        folder.write(shard.tar, [source.key(i).partition("/")[2] for i in range(start, stop)], columns)
    return folder.path


@pytest.fixture(scope="module")
def embedded(tmp_path_factory):
    """Four tars of 160 different pictures, of which pair i, 80 to 159, has an embedding near to that of i - 80, with a
    cosine of 0.97 where i is even, and 0.9 where it is odd; two have none.
    """
    folder = tmp_path_factory.mktemp("embedded")
    pictures = [(jpeg(drawing(i)), f"a drawing, {i % 80}" if i % 4 else f"{i}") for i in range(160)]
    pairs = write_pairs(folder / "pairs", *(pictures[i : i + 40] for i in range(0, 160, 40)))
    rng = np.random.default_rng(0)
    themes = rng.standard_normal((8, 32))
    vectors = [themes[i % 8] + rng.standard_normal(32) for i in range(80)]
    vectors = [vector / np.linalg.norm(vector) for vector in vectors]
    vectors += [turned(vector, 0.9 if i % 2 else 0.97, rng) for i, vector in enumerate(vectors)]
    scores: list = [0.1 + i / 1000 if i < 80 else 0.3 if i % 8 == 0 else 0.0 for i in range(160)]
    vectors[4] = vectors[82] = scores[4] = scores[82] = None
    return pairs, write_embeddings(folder / "scores", TarPairs(str(pairs)), scores, vectors)


@pytest.fixture
def clusters(monkeypatch):
    """Small ones, so that there are some."""
    monkeypatch.setattr(duplicates, "CLUSTER", 20)


def similar(embedded, out: Path, **settings) -> dict:
    return dedup(str(embedded[0]), out, **{"scores": embedded[1], "similar": 0.95, "engine": Here(), **settings})


@pytest.fixture(scope="module")
def compared(embedded, tmp_path_factory):
    """What one process makes of it."""
    out = tmp_path_factory.mktemp("compared") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(duplicates, "CLUSTER", 20)
        report = similar(embedded, out)
    return out, report


def expected_similar(keep=lambda i: True) -> dict[str, str]:
    """Dropped pair -> kept one, of those near pairs that `keep` takes."""

    def name(i: int) -> str:
        return f"{i // 40:05d}/{i % 40}"

    near = [i for i in range(80, 160, 2) if i not in (82, 84) and keep(i)]
    return {name(i - 80 if i % 8 == 0 else i): name(i if i % 8 == 0 else i - 80) for i in near}


def test_near_embeddings_are_copies(compared):
    out, report = compared
    rows = rows_of(out)
    dropped = {key: row["duplicate_of"] for key, row in rows.items() if row["duplicate"]}
    assert dropped == expected_similar()
    assert {rows[key]["why"] for key in dropped} == {"similar"}
    assert report["duplicates"] == {"image": 0, "caption": 0, "pair": 0, "similar": len(dropped)}
    assert (report["similar"], report["kept"]) == (0.95, 160 - len(dropped))
    page = (out / "report.html").read_text()
    assert page.count("dropped by similar, cosine 0.97") == page.count("<h3>1 dropped</h3>") == 12
    assert not (out / "work").exists()


def test_processes_find_the_same_near_embeddings(embedded, compared, clusters, tmp_path):
    similar(embedded, tmp_path / "out", engine=Local(2))
    assert contents(tmp_path / "out") == contents(compared[0])


def test_how_embeddings_are_spread_changes_nothing(embedded, compared, clusters, tmp_path, monkeypatch):
    monkeypatch.setattr(duplicates, "ROWS", 64)  # clusters, too, are larger than what is in memory
    similar(embedded, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(compared[0])


@pytest.mark.parametrize("gone", ["edges-8-*", "embeddings-*", "centres"])
def test_embeddings_whose_comparison_was_stopped_go_on(embedded, compared, clusters, tmp_path, monkeypatch, gone):
    with monkeypatch.context() as patch:
        patch.setattr(duplicates, "choose", lambda found: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            similar(embedded, tmp_path / "out")
    files = sorted((tmp_path / "out" / "work").glob(gone))
    assert files
    files[0].unlink()
    similar(embedded, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(compared[0])


def test_near_embeddings_of_equal_captions(embedded, clusters, tmp_path):
    similar(embedded, tmp_path / "out", by="pair")
    rows = rows_of(tmp_path / "out")
    dropped = {key: row["duplicate_of"] for key, row in rows.items() if row["duplicate"]}
    assert dropped == expected_similar(lambda i: i % 4) != {}


def test_equal_pictures_and_near_embeddings(tmp_path):
    """Of equal pictures those of other embeddings have a fate of their own."""
    pictures = [jpeg(drawing(i)) for i in (1, 2, 2, 2, 2)]
    pairs = write_pairs(tmp_path / "pairs", [(image, f"{i}") for i, image in enumerate(pictures)])
    rng = np.random.default_rng(0)
    a = np.eye(16)[0]
    b, c = turned(a, 0.97, rng), np.eye(16)[1]
    scores = write_embeddings(tmp_path / "scores", TarPairs(str(pairs)), [0.9, 0.8, 0.7, 0.6, None], [a, b, b, c, None])
    similar((pairs, scores), tmp_path / "out")
    found = {key: (row["duplicate_of"], row["why"]) for key, row in rows_of(tmp_path / "out").items()}
    assert found == {
        "00000/0": (None, None),
        "00000/1": ("00000/0", "similar"),
        "00000/2": ("00000/0", "similar"),
        "00000/3": (None, None),
        "00000/4": ("00000/3", "image"),
    }


def test_another_threshold_is_refused(embedded, compared):
    for other in (0.9, None):
        with pytest.raises(ConfigError, match="was made with another similar"):
            similar(embedded, compared[0], similar=other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"similar": 1.5}, "--similar=1.5: must lie in (0, 1], as a cosine"),
        ({"similar": float("nan")}, "--similar=nan: must lie in (0, 1]"),
        ({"by": "caption"}, "--similar=0.95: compares pictures, but --by=caption goes by captions alone; leave one"),
        (
            {"scores": None},
            "--similar=0.95: needs embeddings; add --columns=FOLDER of visionfm data score --embeddings",
        ),
        ({}, "has no column image_embedding, which --similar compares; visionfm data score --embeddings makes it"),
    ],
)
def test_wrong_settings_of_embeddings_are_one_line(few, tmp_path, change, message):
    scores = column_folder.create(tmp_path / "scores", {"command": "data score"})
    for tar in TarPairs(str(few)).index.tars:
        scores.write(tar, ["k"] * tar["pairs"], {"similarity": pa.nulls(tar["pairs"], pa.float32())})
    with pytest.raises(ConfigError, match=re.escape(message)) as error:
        similar((few, scores.path), tmp_path / "out", **change)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


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
