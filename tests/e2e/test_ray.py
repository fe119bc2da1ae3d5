"""A Ray cluster of two nodes on this machine: it gives what one process gives, whatever dies."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from make_crawl import make_crawl
from runs import ROOT, environment
from small_clip import small_clip

from visionfm_jax.curation.dedup import dedup
from visionfm_jax.curation.score import score
from visionfm_jax.data.shards import Here

TESTS = ROOT / "tests"
SQUARES = " ".join(str(i * i) for i in range(40))


class Cluster:
    """The cluster, and programs that use it. None of it runs in the process of the tests."""

    def __init__(self):
        command = [sys.executable, str(TESTS / "ray_nodes.py")]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)
        self.address = self._process.stdout.readline().strip()
        assert self.address, "Ray did not start"

    def lose_a_node(self) -> None:
        self._process.stdin.write("lose\n")
        self._process.stdin.flush()
        assert self._process.stdout.readline() == "lost\n"

    def end(self) -> None:
        self._process.stdin.close()
        try:
            self._process.wait(30)
        finally:
            self._process.kill()

    def start(self, *words: str) -> subprocess.Popen:
        pipe = subprocess.PIPE
        return subprocess.Popen([sys.executable, *words], cwd=ROOT, env=environment(1), stdout=pipe, text=True)

    def start_work(self, folder: Path, *names: str) -> subprocess.Popen:
        return self.start(str(TESTS / "ray_work.py"), self.address, str(folder), *names)

    def start_data(self, *words: str) -> subprocess.Popen:
        return self.start("-m", "visionfm_jax", "data", *words, "--engine=ray", f"--address={self.address}")


def ended(process: subprocess.Popen, code: int = 0, seconds: float = 240) -> str:
    """What it has printed."""
    try:
        printed, _ = process.communicate(timeout=seconds)
    finally:
        process.kill()
    assert process.returncode == code, printed
    return printed


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    running = Cluster()
    yield running
    running.end()


@pytest.fixture(scope="module")
def crawl(tmp_path_factory):
    folder = tmp_path_factory.mktemp("web") / "crawl"
    make_crawl(folder, shards=2, pairs=60)
    return folder


def contents(out: Path) -> dict[str, bytes]:
    """All files but the page, which says when it was made."""
    files = (path for path in out.rglob("*") if path.is_file() and path.name != "report.html")
    return {str(path.relative_to(out)): path.read_bytes() for path in files}


def test_results_and_errors_are_those_of_one_process(cluster, tmp_path):
    names = ("squared", "fails", "dies twice", "fails oddly", "dies always")
    ended(cluster.start_work(tmp_path, *names))
    *results, odd, lost = ((tmp_path / f"{name}.txt").read_text() for name in names)
    assert results == [SQUARES, "DataError: shard 7 is damaged", SQUARES]
    assert odd.startswith("RuntimeError: ")
    assert "OddError: 404: no shard 0" in odd
    assert len(os.listdir(tmp_path / "dies twice")) == 2
    assert lost.startswith("LostError: the worker died 3 times at 5 (")
    assert lost.endswith("start the same command again")
    assert len(os.listdir(tmp_path / "dies always")) == 3


def test_scores_are_the_same(cluster, crawl, tmp_path):
    clip = small_clip(tmp_path / "clip")
    score(str(crawl), str(clip), tmp_path / "here", engine=Here())
    words = ["score", f"--path={crawl}", f"--model={clip}", f"--out={tmp_path / 'there'}"]
    assert "of 2 tars have a similarity" in ended(cluster.start_data(*words))
    assert contents(tmp_path / "there") == contents(tmp_path / "here")


def test_copies_are_the_same_after_the_driver_was_killed(cluster, crawl, tmp_path):
    held_out = f"folder:{crawl.parent / 'heldout'}@"
    dedup(str(crawl), tmp_path / "here", against=[held_out], engine=Here())
    words = ["dedup", f"--path={crawl}", f"--out={tmp_path / 'there'}", f"--against={held_out}"]
    killed = cluster.start_data(*words)
    while not list((tmp_path / "there").glob("signatures/0*.parquet")):
        assert killed.poll() is None
        time.sleep(0.002)
    killed.kill()
    killed.wait()
    assert not (tmp_path / "there/report.json").exists()
    ended(cluster.start_data(*words))
    assert contents(tmp_path / "there") == contents(tmp_path / "here")


def test_the_work_of_a_node_that_is_lost_is_done_by_others(cluster, tmp_path):
    """The last test, as the node does not come back."""
    process = cluster.start_work(tmp_path, "waits")
    while len(list(tmp_path.glob("waits/*"))) < 6:
        assert process.poll() is None
        time.sleep(0.01)
    cluster.lose_a_node()
    ended(process)
    assert (tmp_path / "waits.txt").read_text() == SQUARES
