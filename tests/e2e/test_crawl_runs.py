"""A crawl with all its faults through the commands: scored though processes are killed, freed of copies, selected, and
trained on by one, two and four processes, also continued."""

import contextlib
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from make_crawl import make_crawl
from runs import (
    ROOT,
    assert_identical,
    copy,
    environment,
    files,
    finish,
    finish_processes,
    kill_a_worker,
    losses,
    start_processes,
    state,
    steps,
    until,
)

from visionfm_jax.data.sources.tars import TarPairs
from visionfm_jax.errors import LEFT_OUT
from visionfm_jax.export import export

TARS, PAIRS = 12, 30
WHERE, KEEP = "not duplicate and not contaminated", 200
DEVICES, BATCH, EVERY = 4, 16, 2
STEPS = 2 * EVERY
CONFIG = """
from visionfm_jax.config import load
from visionfm_jax.models.backbones.vit import ViTConfig


def get_config(variant=""):
    config = load.load_file("configs/swinv2_g_clip.py:tiny")
    config.model.image = ViTConfig(size="P", width=32, depth=1, heads=2, mlp=64, patch_size=8, image_size=16)
    return config
"""
SMALL = [
    "--config.model.embed_dim=32",
    "--config.model.text.width=32",
    "--config.model.text.depth=1",
    "--config.model.text.heads=2",
    "--config.model.text.mlp=64",
    "--config.model.text.context=16",
    "--config.data.train[0].kind=tars",
    "--config.data.transforms[1].operations=2",
    f"--config.train.batch_size={BATCH}",
    f"--config.train.steps={STEPS}",
    "--config.train.precision=fp32",
    "--config.optim.warmup_steps=2",
    "--config.optim.lr=1e-6",  # Adam multiplies rounding by the rate; a loss shall tell of its batch alone
    f"--config.checkpoint.every_steps={EVERY}",
    "--config.evals=()",
    "--config.telemetry.log_every=1",
    "--config.telemetry.tensorboard=false",
]


@pytest.fixture(scope="module")
def web(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("web")


@pytest.fixture(scope="module")
def truth(web) -> dict[str, dict]:
    """The crawl is made; of each pair what it shows. One picture is damaged: it is `lost` as "damaged"."""
    rows = make_crawl(web / "crawl", shards=TARS, pairs=PAIRS).to_pylist()
    pairs = {f"{row['tar']}/{row['key']}": row for row in rows if row["lost"] is None}
    groups = [row["image_group"] for row in pairs.values()]
    damaged = next(row for row in pairs.values() if groups.count(row["image_group"]) == 1 and not row["heldout"])
    path = web / "crawl" / f"{damaged['tar']}.tar"
    with tarfile.open(path) as tar:
        picture = tar.getmember(f"{damaged['key']}.jpg")
    with path.open("r+b") as file:
        file.seek(picture.offset_data)
        file.write(bytes(picture.size))
    damaged["lost"] = "damaged"
    return pairs


@pytest.fixture(scope="module")
def model(web) -> Path:
    """A CLIP with random weights, as OpenCLIP has it; a tar of pictures takes it a quarter of a second."""
    made = runpy.run_path(f"{ROOT}/tests/unit/test_export.py")
    config = made["config_of"]("clip")
    config.model.image.image_size = 128
    export(made["model_of"](config), "open_clip", web / "model")
    return web / "model"


def start_data(log: Path, *words: object) -> subprocess.Popen:
    """`visionfm data` in a group of processes of its own; output to LOG.out and LOG.err."""
    command = [sys.executable, "-m", "visionfm_jax", "data", *map(str, words)]
    with open(f"{log}.out", "w") as out, open(f"{log}.err", "w") as err:
        return subprocess.Popen(command, cwd=ROOT, env=environment(1), stdout=out, stderr=err, start_new_session=True)


def data(log: Path, *words: object, code: int = 0) -> tuple[str, str]:
    return finish(start_data(log, *words), log, code)


@pytest.fixture(scope="module")
def score(web, truth, model) -> list[str]:
    return ["score", f"--path={web / 'crawl'}", f"--model={model}"]


@pytest.fixture(scope="module")
def scores(web, truth, score) -> Path:
    """What nothing disturbed."""
    out, _ = data(web / "scores", *score, f"--out={web / 'scores'}", code=LEFT_OUT)
    [damaged] = (key for key, row in truth.items() if row["lost"])
    assert f"1 image cannot be read, such as {damaged}" in out
    return web / "scores"


@pytest.fixture(scope="module")
def copies(web, scores) -> Path:
    words = [f"--path={web / 'crawl'}", f"--columns={scores}", f"--against=folder:{web / 'heldout'}@", "--jobs=1"]
    data(web / "copies", "dedup", *words, f"--out={web / 'copies'}", code=LEFT_OUT)
    return web / "copies"


def select(web: Path, out: Path, *words: str, code: int = 0) -> list[str]:
    """The keys of the pairs that are selected."""
    data(out, "select", f"--path={web / 'crawl'}", f"--out={out}", *words, code=code)
    source = TarPairs(str(web / "crawl"), selection=str(out))
    return [source.key(i) for i in range(len(source))]


@pytest.fixture(scope="module")
def selected(web, scores, copies) -> tuple[Path, list[str]]:
    """The selection, and the keys of its pairs."""
    out = web / "good.pairs"
    words = [f"--columns={scores}", f"--columns={copies}", f"--where={WHERE}", f"--keep={KEEP}"]
    return out, select(web, out, *words)


def rows_of(folder: Path) -> dict[str, dict]:
    """Of columns: TAR/KEY -> row."""
    found = {}
    for path in sorted(folder.glob("*.parquet")):
        found |= {f"{path.stem}/{row.pop('key')}": row for row in pq.read_table(path).to_pylist()}
    return found


@contextlib.contextmanager
def started(log: Path, *words: object) -> Iterator[subprocess.Popen]:
    """As `start_data`; nothing of it is left in the end."""
    process = start_data(log, *words)
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_for_all(group: int) -> None:
    """Until no process of a group is left."""
    end = time.monotonic() + 20
    while left := living(group):
        assert time.monotonic() < end, f"still there: {left}"
        time.sleep(0.02)


def living(group: int) -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it ends just now
            status, _, its = path.read_text().rpartition(")")[2].split()[:3]
            if its == str(group) and status != "Z":
                found.append(path.parent.name)
    return found


def test_whatever_is_killed_goes_on(tmp_path, scores, score):
    """A worker, then the command that has started it, then all at once: what is done stands, and the rest is done."""
    out = tmp_path / "scores"
    words, done = [*score, f"--out={out}", "--jobs=2"], {}

    def wait_for_more(process: subprocess.Popen) -> None:
        until(lambda: len(finished()) > len(done), process)
        check()

    def finished() -> dict[str, tuple[int, int]]:
        """Of each tar that is done, what tells its file from one that was made again."""
        return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in out.glob("0*.parquet")}

    def check() -> None:
        there = finished()
        assert done.items() <= there.items()
        done.update(there)

    def ended(process: subprocess.Popen) -> None:
        process.wait()
        wait_for_all(process.pid)
        check()
        assert len(done) < TARS

    out.mkdir()
    for name in ("about.json", "report.json"):  # what starts leave that are killed while they write them
        (out / f".{name}.0123456789abcdef").write_text("{")
    with started(tmp_path / "first", *words) as process:
        wait_for_more(process)
        kill_a_worker(process)
        until(lambda: "a process died at 000" in (tmp_path / "first.err").read_text(), process)
        check()
        wait_for_more(process)
        process.kill()
        ended(process)
    with started(tmp_path / "second", *words) as process:
        wait_for_more(process)
        os.killpg(process.pid, signal.SIGKILL)
        ended(process)
    last = start_data(tmp_path / "last", *words)
    finish(last, tmp_path / "last", LEFT_OUT)
    wait_for_all(last.pid)
    check()
    assert files(out) == files(scores)


def test_the_best_pairs_without_copies_are_selected(web, truth, scores, copies, selected):
    scored, found = rows_of(scores), rows_of(copies)
    assert scored.keys() == found.keys() == truth.keys()  # whatever the crawl has lost is no pair
    good = [key for key, row in found.items() if row["duplicate"] is False and row["contaminated"] is False]
    groups = [truth[key]["image_group"] for key in good]
    assert set(groups) >= {row["image_group"] for row in truth.values() if not row["heldout"] and not row["lost"]}
    sure = [truth[key] for key in good if truth[key]["change"] != "edges"]  # of pictures that are cut not all are found
    assert len({row["image_group"] for row in sure}) == len(sure)
    assert not any(row["heldout"] or row["lost"] for row in sure)
    for key, row in found.items():
        if row["duplicate"]:
            assert scored[key]["similarity"] <= scored[row["duplicate_of"]]["similarity"]
    ranked = sorted(good, key=lambda key: -scored[key]["similarity"])
    assert set(selected[1]) == set(ranked[:KEEP])
    assert KEEP == len(selected[1]) < len(ranked) < len(truth) - 30


def test_what_was_found_is_reported(web, truth, scores, copies, selected):
    [damaged] = (key for key, row in truth.items() if row["lost"])
    assert json.loads((scores / "report.json").read_text())["unreadable"] == 1
    page = (copies / "report.html").read_text()
    assert damaged in page
    assert "<b>kept, score " in page
    assert "<b>held out</b>" in page
    report = json.loads(Path(f"{selected[0]}.json").read_text())
    assert (report["pairs"], report["selected"]) == (len(truth), KEEP)
    [cut] = report["source"]["cut"]
    assert cut.startswith(f"{TARS // 2:05d}/")


def test_a_tar_without_its_scores_is_left_out(tmp_path, web, truth, scores):
    missing = shutil.copytree(scores, tmp_path / "scores")
    (missing / "00003.parquet").unlink()
    got = select(web, tmp_path / "all.pairs", f"--columns={missing}", "--where=similarity is not None", code=LEFT_OUT)
    assert got == [key for key, row in truth.items() if not row["lost"] and row["tar"] != "00003"]
    assert "1 of 12 tars left out" in (tmp_path / "all.pairs.err").read_text()


@pytest.fixture(scope="module")
def arguments(web, selected) -> list[str]:
    """Of the runs on the selected pairs."""
    (web / "pairs.py").write_text(CONFIG)
    data = {"path": web / "crawl", "selection": selected[0]}
    return [f"--config={web / 'pairs.py'}", *(f"--config.data.train[0].{name}={value}" for name, value in data.items())]


def train(folders: dict[int, Path], arguments: list[str]) -> list[tuple[str, str]]:
    """Runs side by side, by the number of their processes; what the first process of each prints."""
    started = {
        folder: start_processes(folder, number, *arguments, devices=DEVICES // number, base=SMALL)
        for number, folder in folders.items()
    }
    return [finish_processes(processes, folder)[0] for folder, processes in started.items()]


@pytest.fixture(scope="module")
def runs(web, arguments) -> dict[int, Path]:
    """Undisturbed runs, by the number of their processes."""
    found = {number: web / f"run{number}" for number in (1, 2, 4)}
    for (out, err), folder in zip(train(found, arguments), found.values(), strict=True):
        assert f"on {DEVICES} x cpu" in out
        assert "left out: 4 images with an empty caption: 0000" in err
        assert (folder / "report.html").is_file()
    return found


def test_processes_train_on_the_same_pairs(runs):
    expected, *others = map(losses, runs.values())
    assert list(expected) == list(range(1, STEPS + 1))
    for got in others:
        assert list(got) == list(expected)
        # At the chance of 1 in 16; other pairs in a batch would show in the second digit.
        np.testing.assert_allclose(list(got.values()), list(expected.values()), rtol=1e-4)
    assert np.ptp(list(expected.values())) > 1e-2


def test_continued_they_are_the_same_runs(tmp_path, arguments, runs):
    folders = {number: copy(whole, tmp_path / whole.name, EVERY) for number, whole in runs.items()}
    assert [steps(folder) for folder in folders.values()] == [[EVERY]] * len(runs)
    for (out, _), number in zip(train(folders, arguments), runs, strict=True):
        assert f"starts from      step {EVERY} of its own folder" in out
        assert losses(folders[number]) == losses(runs[number])
        assert_identical(state(folders[number]), state(runs[number]))
