"""Order, crops and damage depend on (seed, sample index) only; and everything that was started ends."""

import collections
import errno
import io
import json
import math
import os
import pathlib
import signal
import subprocess
import sys
import textwrap
import threading
import time
import typing
from types import SimpleNamespace

import numpy as np
import pytest
from absl import logging
from PIL import Image

from visionfm_jax import storage
from visionfm_jax.config.schema import DataConfig, PreprocessConfig
from visionfm_jax.data import batches as batches_module
from visionfm_jax.data.chain import EvalTransform
from visionfm_jax.data.fields import Labels
from visionfm_jax.data.loader import DamageLog, eval_loader, sample_order, train_loader
from visionfm_jax.data.sources.kinds import TfdsConfig
from visionfm_jax.data.sources.record import DamagedRecord
from visionfm_jax.data.transforms import RandAugment, RandomResizedCrop, Resize
from visionfm_jax.errors import DataError, StorageError
from visionfm_jax.machine import Room

SIZE = 16
LABELS = Labels(100)
VIEW = EvalTransform(SIZE, PreprocessConfig())


class Pictures:
    """Record i: a noisy picture of its own, as PNG; some are damaged."""

    class_names = None

    def __init__(self, length: int, name: str = "pictures", damaged: tuple[int, ...] = ()):
        self.length, self.name, self.num_classes, self.damaged = length, name, length, damaged

    def __len__(self) -> int:
        return self.length

    def key(self, index: int) -> str:
        return f"{self.name}/{index}.png"

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < self.length:
            raise IndexError(index)
        if index in self.damaged:
            return {"image": b"junk", "label": index}
        file = io.BytesIO()
        pixels = np.random.default_rng(index).integers(0, 256, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(file, "PNG", compress_level=1)
        return {"image": file.getvalue(), "label": index}


class Unreadable(Pictures):
    def __getitem__(self, index: int) -> dict:
        raise OSError(f"disk failure at {index}")


@pytest.fixture(scope="module", autouse=True)
def no_waits():
    """Also for the threads that outlive a test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage, "WAITS", (0, 0))
        yield


def config(sources: int = 1, **changes) -> DataConfig:
    return DataConfig(
        train=(TfdsConfig(path="x"),) * sources, **{"threads": 2, "transforms": (RandomResizedCrop(),), **changes}
    )


def load(steps: int, sources=None, data=None, *, batch_size=8, seed=0, start_step=0, host=0, hosts=1) -> list[dict]:
    sources = sources or [Pictures(13)]
    arguments = {"batch_size": batch_size, "seed": seed, "start_step": start_step, "host": host, "hosts": hosts}
    data = data or config(len(sources))
    with train_loader(data, image_size=SIZE, sources=sources, fields=LABELS, **arguments) as loader:
        return [{k: np.array(v) for k, v in next(loader).items()} for _ in range(steps)]


def same(a: list[dict], b: list[dict]) -> bool:
    assert len(a) == len(b)
    return all((x[k] == y[k]).all() for x, y in zip(a, b, strict=True) for k in x | y)


def joined(parts: list[list[dict]]) -> list[dict]:
    return [{k: np.concatenate([p[k] for p in step]) for k in step[0]} for step in zip(*parts, strict=True)]


def test_a_batch_has_the_promised_arrays():
    (batch,) = load(1)
    assert {k: (v.dtype.name, v.shape) for k, v in batch.items()} == {
        "image": ("uint8", (8, SIZE, SIZE, 3)),
        "label": ("int32", (8,)),
        "source": ("int32", (8,)),
        "record": ("int64", (8,)),
        "damaged": ("int32", (8,)),
    }
    assert (batch["label"] == batch["record"]).all()
    assert batch["image"].std() > 10


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_together_are_one_host(hosts):
    sources, data = [Pictures(13), Pictures(7, "more", damaged=(3,))], config(2)
    whole = load(3, sources, data)
    assert same(whole, joined([load(3, sources, data, host=h, hosts=hosts) for h in range(hosts)]))
    assert len(whole[0]["label"]) == 8


def test_threads_and_prefetch_change_nothing():
    assert same(load(3), load(3, data=config(threads=1, prefetch=1)))
    assert same(load(3), load(3, data=config(threads=5, prefetch=4)))


def test_worker_processes_change_nothing():
    sources = [Pictures(13), Pictures(7, "more", damaged=(3,))]
    expected = load(5, sources, config(2, workers=0), start_step=2)
    assert same(expected, load(5, sources, config(2, workers=2), start_step=2))


def started(demand: float) -> tuple[int, str, list[dict]]:
    """Workers that are chosen, why, and the first batches."""
    arguments = {"image_size": SIZE, "batch_size": 8, "seed": 0, "start_step": 0, "host": 0, "hosts": 1}
    with train_loader(config(workers=-1), sources=[Pictures(13)], fields=LABELS, demand=demand, **arguments) as loader:
        return loader.workers, loader.choice, [next(loader) for _ in range(3)]


def test_measuring_how_many_workers_are_needed_changes_nothing():
    workers, choice, batches = started(demand=1e-3)
    assert workers == 0
    assert "threads of this process: one process makes" in choice
    assert same(batches, load(3, data=config(workers=0)))
    workers, choice, batches = started(demand=0.0)
    assert (workers, choice) == (0, "")
    assert same(batches, load(3, data=config(workers=0)))


@pytest.mark.parametrize(
    ("demand", "cores", "memory", "workers"),
    [
        (90.0, 18, math.inf, 0),
        (110.0, 18, math.inf, 2),
        (500.0, 18, math.inf, 5),
        (5000.0, 18, math.inf, 8),  # two cores each, and two for the run
        (math.inf, 18, math.inf, 8),
        (5000.0, 18, 3.5, 3),  # times what a process needs
        (5000.0, 5, math.inf, 0),
        (5000.0, 0.25, math.inf, 0),  # eight processes on two cores
        (5000.0, 18, 0.0, 0),
    ],
)
def test_as_many_workers_as_are_needed_and_have_room(demand, cores, memory, workers):
    class Batches:
        nbytes = 10

        def rate(self):
            return 100.0, 2.0

    chosen, why = batches_module.choose_workers(Batches(), demand, Room(cores, memory * 60), 2)
    assert chosen == workers
    assert ("allow no more than" in why) == (demand > 100 * max(1, workers))
    assert "one process makes 100 images/s on 2.0 cores" in why


def test_threads_end_where_measuring_meets_an_error():
    before = set(threading.enumerate())
    with pytest.raises(StorageError):
        train_loader(
            config(workers=-1), sources=[Unreadable(13)], fields=LABELS, demand=1.0,
            image_size=SIZE, batch_size=8, seed=0, start_step=0, host=0, hosts=1,
        )  # fmt: skip
    for thread in set(threading.enumerate()) - before:
        thread.join(5)
        assert not thread.is_alive()


def test_starting_at_a_step_is_skipping_to_it():
    whole = load(7)
    for step in (1, 4):
        assert same(whole[step:], load(7 - step, start_step=step))
    far = load(1, start_step=10**15)  # index arithmetic alone: nothing is counted up to there
    assert far[0]["image"].any()


def test_the_seed_changes_order_and_crops():
    a, b = load(3), load(3, seed=1)
    assert not same(a, b)
    assert a[0]["record"].tolist() != b[0]["record"].tolist()
    assert same(a, load(3))


def test_every_epoch_has_every_record_once_in_another_order_with_other_crops():
    steps = load(6, [Pictures(8)])
    orders = [tuple(s["record"].tolist()) for s in steps]
    assert all(sorted(order) == list(range(8)) for order in orders)
    assert len(set(orders)) > 4
    first, second = (s["image"][s["record"].tolist().index(5)] for s in steps[:2])
    assert (first != second).any()


def test_one_source_is_not_ordered_like_another_of_its_length():
    order = sample_order([50, 50], [1, 1], 0, True)
    samples = [order[i] for i in range(100)]
    first, second = ([r for s, r in samples if s == k] for k in (0, 1))
    assert sorted(first) == sorted(second) == list(range(50))
    assert first != second
    assert first != [r for s, r in (sample_order([50], [1], 1, True)[i] for i in range(50))]


@pytest.mark.parametrize("weights", [(3.0, 1.0), (0.7, 0.3), (0.2, 0.0, 0.5, 0.3), (1e-3, 1.0)])
def test_mixture_shares(weights):
    order = sample_order([5000, 2000, 4000, 3000][: len(weights)], weights, 0, True)
    n = 5000
    counts = np.bincount([order[i][0] for i in range(n)], minlength=len(weights))
    shares = np.array(weights) / sum(weights)
    assert np.abs(counts - n * shares).max() <= 1 + 0.01 * n * shares.min()
    assert len(order) > 2**60


def test_no_shuffling_is_said(caplog):
    logging.use_python_logging(quiet=True)
    with caplog.at_level("WARNING"):
        steps = load(2, data=config(shuffle=False))
    assert steps[0]["record"].tolist() == list(range(8))
    assert steps[1]["record"].tolist() == [8, 9, 10, 11, 12, 0, 1, 2]
    assert [r.message for r in caplog.records if "data.shuffle" in r.message] == [
        "data.shuffle is False: the records come in the order of the files, which is often sorted by class; "
        "set data.shuffle to True to train"
    ]
    caplog.clear()
    load(1)
    assert not caplog.records


def test_no_random_crop_passes_pixels_through():
    class Digits(Pictures):
        def __getitem__(self, index):
            return {"image": np.random.default_rng(index).integers(0, 256, (SIZE, SIZE, 1), np.uint8), "label": index}

    (batch,) = load(1, [Digits(13)], config(transforms=()))
    for record, image in zip(batch["record"], batch["image"], strict=True):
        assert (image == Digits(13)[int(record)]["image"]).all()


def test_a_damaged_record_is_replaced_by_the_next_readable_one_of_its_source():
    sources = [Pictures(13, damaged=(4, 12, 0)), Pictures(9, "fine")]
    steps = load(4, sources)
    expected = {4: (5, 1), 12: (1, 2), 0: (1, 1)}
    met = set()
    for batch in steps:
        for source, record, label, damaged in zip(*(batch[k] for k in ("source", "record", "label", "damaged"))):  # noqa: B905
            bad = source == 0 and int(record) in expected
            assert (label, damaged) == (expected[int(record)] if bad else (record, 0))
            met |= {int(record)} if bad else set()
    assert met == set(expected)


def test_only_damaged_records_stop_the_run_and_name_the_first():
    with pytest.raises(DataError, match=r"pictures: 17 records in a row cannot be decoded, from pictures/\d+\.png on"):
        load(1, [Pictures(30, damaged=tuple(range(30)))])


def test_storage_that_fails_is_no_damaged_image():
    again = r"3 times in 0 s; check the storage, then start the same command again"
    with pytest.raises(StorageError, match=rf"record pictures/\d+\.png cannot be read: disk failure at \d+, {again}"):
        load(1, [Unreadable(13)])
    assert StorageError.exit_code == 71  # schedulers start the run again


class Failing(Pictures):
    """Every record fails `times` times before it can be read."""

    def __init__(self, length: int, times: int):
        super().__init__(length)
        self.left = collections.Counter(dict.fromkeys(range(length), times))

    def __getitem__(self, index: int) -> dict:
        self.left[index] -= 1
        if self.left[index] >= 0:
            raise OSError(errno.EIO, "Input/output error")
        return super().__getitem__(index)


def test_storage_that_fails_for_a_moment_changes_nothing(capsys):
    shaky = load(2, [Failing(13, times=2)])
    for a, b in zip(load(2), shaky, strict=True):
        np.testing.assert_equal(a, b)
    assert "cannot be read: [Errno 5] Input/output error; trying again in 0 s" in capsys.readouterr().err


def test_a_label_that_is_no_class_is_a_damaged_record():
    class Labelled(Pictures):
        def __getitem__(self, index: int) -> dict:
            return super().__getitem__(index) | {"label": -1 if index == 2 else index}

    (batch,) = load(1, [Labelled(8)], data=config(shuffle=False))
    assert batch["label"].tolist() == [0, 1, 3, 3, 4, 5, 6, 7]
    assert batch["damaged"].tolist() == [0, 0, 1, 0, 0, 0, 0, 0]


def test_damage_is_logged_once_a_record_and_judged_by_share(caplog):
    logging.use_python_logging(quiet=True)
    sources = [Pictures(13, damaged=(4, 5))]
    steps = load(26)  # 208 samples: 16 epochs
    steps = load(26, sources)
    kept = []
    log = DamageLog(sources, 0.2, batch_size=8, keep=kept.append)
    with caplog.at_level("WARNING"):
        for batch in steps:
            log.see(batch)
    first = next(i for i, r in enumerate(np.concatenate([b["record"] for b in steps]).tolist()) if r in (4, 5))
    lines = [r.message for r in caplog.records if " is damaged " in r.message]
    assert len(lines) == 2
    assert all(line.startswith("pictures: record pictures/") and "is damaged" in line for line in lines)
    assert f"(sample {first} of the run): is none of AVIF, BMP," in lines[0]
    assert (log.seen, log.damaged, log.records) == (208, 32, 2)
    assert (kept[0]["source"], kept[0]["sample"]) == ("pictures", first)
    assert sorted(row["key"] for row in kept) == [sources[0].key(4), sources[0].key(5)]
    strict = DamageLog(sources, 0.05, batch_size=8)
    with pytest.raises(DataError, match=r"of \d+ samples \(.*%\).*data\.max_damaged = 0\.05"):
        collections.deque(map(strict.see, steps), maxlen=0)
    assert 8 < strict.seen < 208  # not by the chance of a first batch
    with pytest.raises(DataError, match="max_damaged = 0 allows"):
        DamageLog(sources, 0.0, batch_size=8).see(next(b for b in steps if b["damaged"].any()))


def test_counts_of_other_hosts_are_shared_out():
    counts = [[100, 4], [100, 2], [100, 0], [100, 2]]
    assert DamageLog([], 0.1, batch_size=8, host=1, hosts=4, counts=counts).counts == (100, 2)
    assert DamageLog([], 0.1, batch_size=8, host=1, hosts=2, counts=counts).counts == (200, 4)
    logs = [DamageLog([], 0.1, batch_size=9, host=host, hosts=3, counts=counts) for host in range(3)]
    assert [sum(log.counts[k] for log in logs) for k in (0, 1)] == [400, 8]  # none is lost
    assert DamageLog([], 0.1, batch_size=8).counts == (0, 0)


def test_cut_captions_are_counted_and_told_at_powers_of_ten(caplog):
    logging.use_python_logging(quiet=True)
    log = DamageLog([Pictures(5)], 0.0, batch_size=8)
    batch = {"damaged": np.zeros(8), "text": np.array([[1, 5, 2]] * 6 + [[0, 0, 0]] * 2)}
    with caplog.at_level("WARNING"):
        for cut in (0, 1, 3, 4, 4, 0):
            log.see(batch | {"truncated": np.arange(8) < cut})
    assert [r.message.partition(";")[0] for r in caplog.records] == [
        "1 of 12 captions so far were longer than 3 tokens and were truncated",
        "12 of 30 captions so far were longer than 3 tokens and were truncated",
    ]
    assert (log.truncated, log.captions, log.seen) == (12, 36, 48)


def test_the_sample_index_in_the_log_is_that_of_the_whole_run(caplog):
    logging.use_python_logging(quiet=True)
    batch = {"damaged": np.array([0, 1]), "source": np.array([0, 0]), "record": np.array([1, 2])}
    log = DamageLog([Pictures(5)], 1.0, batch_size=8, start_step=10, host=3, hosts=4)
    with caplog.at_level("WARNING"):
        log.see(batch)
        log.see(batch | {"record": np.array([1, 3])})
    assert ["(sample 87 " in caplog.records[0].message, "(sample 95 " in caplog.records[1].message] == [True, True]


def test_sources_that_do_not_fit_are_refused():
    with pytest.raises(DataError, match="names 1 sources, but 2 were opened"):
        load(1, [Pictures(3)] * 2, config(1))
    with pytest.raises(DataError, match="9 does not divide over 2 hosts; the nearest is 8"):
        load(1, batch_size=9, hosts=2)
    with pytest.raises(DataError, match="holds no record"):
        load(1, [Pictures(0)])


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_evaluation_sees_every_record_once_in_order(hosts):
    sources = Pictures(13, damaged=(6,))
    arguments = {"transform": VIEW, "batch_size": 8, "hosts": hosts, "threads": 2}
    parts = [list(eval_loader(sources, LABELS, host=h, **arguments)) for h in range(hosts)]
    steps = joined(parts)
    assert len(steps) == 2
    assert {k: v.dtype.name for k, v in steps[0].items()} == {"image": "uint8", "label": "int32", "mask": "float32"}
    mask = np.concatenate([s["mask"] for s in steps])
    label = np.concatenate([s["label"] for s in steps])
    assert label[mask > 0].tolist() == [i for i in range(13) if i != 6]
    assert mask.tolist() == [1.0] * 6 + [0.0] + [1.0] * 6 + [0.0] * 3
    assert not steps[1]["image"][5:].any()


def test_evaluation_of_nothing_readable_is_an_error():
    with pytest.raises(DataError, match="none of its 5 records could be read"):
        list(eval_loader(Pictures(5, damaged=(0, 1, 2, 3, 4)), LABELS, VIEW, batch_size=4, host=0, hosts=1, threads=1))


def test_small_shared_memory_is_said_before_it_kills_workers(monkeypatch):
    class Stat:
        f_bavail, f_frsize = 16, 4096

    monkeypatch.setattr(batches_module.os, "statvfs", lambda _: Stat)
    with pytest.raises(DataError, match=r"/dev/shm has 0 MB free.*--shm-size.*data\.workers to 0"):
        load(1, data=config(workers=2), batch_size=64)
    big = SimpleNamespace(nbytes=10**6, close=lambda: None)
    with pytest.raises(DataError, match=r"but the 2 processes of data\.workers = -1 with"):
        batches_module.Loader(big, workers=2, prefetch=2, choice="2 processes: …")
    monkeypatch.setattr(batches_module.os, "access", lambda path, _: path != "/dev/shm")  # as in a container without
    with pytest.raises(DataError, match=r"/dev/shm is full, not there or cannot be written, but the 2 processes"):
        load(1, data=config(workers=2))


def test_threads_end_with_the_loader_also_after_an_error():
    before = set(threading.enumerate())
    load(2)
    with pytest.raises(StorageError):
        load(1, [Unreadable(13)])
    loader = train_loader(
        config(),
        image_size=SIZE,
        batch_size=8,
        seed=0,
        start_step=0,
        host=0,
        hosts=1,
        sources=[Pictures(13)],
        fields=LABELS,
    )
    next(loader)
    loader.close()
    loader.close()
    assert next(loader, None) is None
    end = time.monotonic() + 5
    while set(threading.enumerate()) - before and time.monotonic() < end:
        time.sleep(0.01)
    assert not set(threading.enumerate()) - before


PROGRAM = """
import os, signal, sys, time
sys.path.insert(0, sys.argv[1])
open(sys.argv[2], "a").write("imported\\n")  # once: worker processes must not import the program again
import test_loader
from visionfm_jax.errors import UserError

MAIN = os.getpid()

class Odd(Exception):
    def __init__(self, a, b):
        super().__init__(a, b)
        self.hook = lambda: None  # does not pickle

class Source(test_loader.Pictures):
    def __getitem__(self, index):
        assert os.getpid() == MAIN or os.environ["JAX_PLATFORMS"] == "cpu"
        if sys_argv[3] == "raise" and index == 5:
            raise Odd("cannot go", "on")
        if sys_argv[3] == "die" and index == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.01)
        return super().__getitem__(index)

sys_argv = sys.argv[:]
data = test_loader.config(workers=int(sys.argv[4]))
try:
    loader = test_loader.train_loader(data, image_size=16, batch_size=8, seed=0, start_step=0, host=0, hosts=1,
                                      sources=[Source(13)], fields=test_loader.LABELS)
    if sys.argv[3] == "interrupt":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # stands for a handler that saves
    with loader:
        for step, batch in enumerate(loader):
            print("step", step, flush=True)
except UserError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(error.exit_code)
except RuntimeError as error:
    print(f"error: {str(error).strip().splitlines()[-1]}", file=sys.stderr)
    sys.exit(1)
except KeyboardInterrupt:
    print("interrupted", file=sys.stderr)
    sys.exit(130)
"""


def members(session: int) -> list[int]:
    """Living processes of a session."""
    found = []
    for entry in pathlib.Path("/proc").iterdir():
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            found.append(int(entry.name))
    return found


@pytest.mark.parametrize(
    ("mode", "workers", "code", "line"),
    [
        ("raise", 1, 1, "error: Odd: ('cannot go', 'on')"),
        ("die", 1, 2, "error: a worker process of the input pipeline died with exit code -9, most often for"),
        ("interrupt", 2, 130, "interrupted"),
        ("interrupt", 0, 130, "interrupted"),
        ("kill", 1, -9, ""),
    ],
)
def test_a_crash_or_an_interrupt_ends_everything(tmp_path, mode, workers, code, line):
    script, imports = tmp_path / "program.py", tmp_path / "imports"
    script.write_text(textwrap.dedent(PROGRAM))
    command = [sys.executable, str(script), os.path.dirname(__file__), str(imports), mode, str(workers)]
    root = str(pathlib.Path(__file__).parents[3])
    environment = {**os.environ, "PYTHONPATH": root}
    with subprocess.Popen(
        command, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as program:
        if mode in ("interrupt", "kill"):
            assert program.stdout is not None
            for step in range(4):  # all workers run
                assert program.stdout.readline() == f"step {step}\n"
            if mode == "interrupt":
                os.killpg(program.pid, signal.SIGTERM)  # as a scheduler does: everybody gets it, the main process saves
                for step in range(4, 20):  # and the workers work on
                    assert program.stdout.readline() == f"step {step}\n"
                os.killpg(program.pid, signal.SIGINT)  # as a terminal does
            else:
                program.kill()
        _, errors = program.communicate(timeout=60)
    assert program.returncode == code, errors
    if mode != "kill":
        assert errors.startswith(line)
        assert len(errors.splitlines()) == 1, errors
    assert imports.read_text() == "imported\n"
    end = time.monotonic() + 10
    while members(program.pid) and time.monotonic() < end:
        time.sleep(0.05)
    assert not members(program.pid)


def test_the_benchmark_runs():
    root = pathlib.Path(__file__).parents[3]
    small = ["--sizes=64x48", "--files=2", "--repeats=1", "--batches=1", "--batch_size=4"]
    done = subprocess.run(
        [sys.executable, str(root / "benchmarks" / "input_pipeline.py"), *small],
        env={**os.environ, "PYTHONPATH": str(root)}, capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    (result,) = json.loads(done.stdout.splitlines()[-1])["results"]
    assert all(result[key] > 0 for key in ("pillow", "bare", "loader", "loader/pillow", "loader/bare"))


class Captioned:
    """Fields of pictures of which some have no caption."""

    spec: typing.ClassVar = {"text": ((2,), np.int32)}

    def __call__(self, record: dict, rng: np.random.Generator | None = None) -> dict:
        if record["label"] % 3 == 0:
            raise DamagedRecord("the caption is empty")
        return {"text": np.full(2, record["label"])}


def test_a_record_without_caption_is_replaced_as_a_damaged_image_is():
    with train_loader(
        config(shuffle=False), image_size=SIZE, sources=[Pictures(7)], fields=Captioned(), batch_size=7, seed=0,
        start_step=0, host=0, hosts=1,
    ) as loader:  # fmt: skip
        batch = next(loader)
    assert batch["text"][:, 0].tolist() == [1, 1, 2, 4, 4, 5, 1]
    assert batch["damaged"].tolist() == [1, 0, 0, 1, 0, 0, 2]
    (rows,) = eval_loader(Pictures(7), Captioned(), VIEW, batch_size=7, host=0, hosts=1, threads=1)
    assert rows["mask"].tolist() == [0, 1, 1, 0, 1, 1, 0]


def test_rand_augment_is_a_function_of_the_sample_and_works_on_the_resized_image():
    def images(operations: int, seed: int = 0) -> np.ndarray:
        chain = (Resize(), RandAugment(operations=operations, magnitude=9.0))
        data = config(shuffle=False, transforms=chain)
        return load(1, [Pictures(8)], data, seed=seed)[0]["image"]

    assert (images(2) != images(0)).any(axis=(1, 2, 3)).sum() >= 6  # few draw nothing but the identity
    np.testing.assert_array_equal(images(2), images(2))
    assert (images(2) != images(2, seed=1)).any()
