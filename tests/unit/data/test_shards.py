"""A function over shards gives the same by every engine, whatever dies."""

import contextlib
import functools
import os
import signal
import sys
import time
from multiprocessing.connection import Connection
from types import SimpleNamespace

import pytest
from shard_work import dies, fails, fails_oddly, squared_slowly

from visionfm_jax.config.arguments import Parser
from visionfm_jax.data import shards
from visionfm_jax.data.shards import Here, Local, Ray, Threads, map_shards
from visionfm_jax.errors import ConfigError, DataError, LostError, UserError

ENGINES = (Here(), Threads(3), Local(1), Local(3))


def squared(shard):
    return shard * shard


def dies_as_it_answers(folder, shard):
    """As `squared`, but once its process is killed with half of an answer in its pipe."""
    if shard == 5:
        with contextlib.suppress(FileExistsError):
            (folder / "died").touch(exist_ok=False)
            Connection._send = half_an_answer
    return shard * shard


def half_an_answer(connection, data):
    os.write(connection.fileno(), bytes(data)[: len(data) // 2])
    os.kill(os.getpid(), signal.SIGKILL)


def threads_of_products(shard):
    import numpy as np  # noqa: F401
    from threadpoolctl import threadpool_info

    return max(pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas")


def mapped(function, engine, count=40):
    return list(map_shards(function, range(count), engine, title="test"))


@pytest.mark.parametrize("engine", ENGINES, ids=repr)
def test_results_are_in_order(engine):
    assert mapped(squared_slowly, engine) == [i * i for i in range(40)]
    assert mapped(squared, engine, 0) == []


def test_matrix_products_of_processes_take_one_core_each(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert mapped(threads_of_products, Local(2), 2) == [1, 1]


@pytest.mark.parametrize("engine", ENGINES, ids=repr)
def test_what_a_shard_raises_comes_in_its_place(engine):
    results = map_shards(fails, range(40), engine, title="test")
    assert [next(results) for _ in range(7)] == list(range(7))
    with pytest.raises(DataError, match="shard 7 is damaged"):
        next(results)


class Changed:
    """A function that no other process can have, such as one of a dataset that has changed."""

    def __reduce__(self):
        return changed, ()


def changed():
    raise DataError("the tars changed")


def test_what_keeps_a_function_from_other_processes_is_told():
    with pytest.raises(DataError, match="the tars changed"):
        mapped(Changed(), Local(2))


def test_an_error_that_other_processes_do_not_know_is_told():
    with pytest.raises(RuntimeError, match="OddError: 404: no shard 0"):
        mapped(fails_oddly, Local(2))


@pytest.mark.parametrize("often", [1, 2])
def test_the_work_of_processes_that_die_is_done_again(tmp_path, often, capsys):
    assert mapped(functools.partial(dies, tmp_path, often=often), Local(2)) == [i * i for i in range(40)]
    assert len(os.listdir(tmp_path)) == often
    assert capsys.readouterr().err.count("a process died at 5 (signal 9); ") == often


def test_half_an_answer_is_none(tmp_path, capsys):
    assert mapped(functools.partial(dies_as_it_answers, tmp_path), Local(2)) == [i * i for i in range(40)]
    assert capsys.readouterr().err.count("a process died at 5 (signal 9); ") == 1


def test_a_shard_that_kills_its_process_each_time_is_named(tmp_path):
    with pytest.raises(LostError, match=r"a process died 3 times at 5 \(signal 9\); memory may be short"):
        mapped(functools.partial(dies, tmp_path, often=99), Local(2))


def test_shards_are_handed_out_as_workers_take_them():
    """Memory does not grow with their number: only so many wait as workers may be ahead."""
    started = []
    results = map_shards(started.append, range(10_000), Threads(2), title="test")
    next(results)
    time.sleep(0.1)
    assert len(started) <= 2 * shards.AHEAD + 1
    results.close()
    time.sleep(0.1)
    assert len(started) <= 2 * shards.AHEAD + 1, "work went on after nobody wanted it"


def engine_of(*words, gpus=False):
    parser = Parser("test", "")
    shards.add_arguments(parser)
    return shards.engine_of(parser.parse_args(words), gpus)


def test_the_command_line_names_an_engine():
    assert engine_of() is None
    assert engine_of("--jobs=3") == Local(3)
    assert engine_of("--engine=ray") == Ray("")
    assert engine_of("--engine=ray", "--address=head:6379", gpus=True) == Ray("head:6379", True)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--jobs=0"], r"--jobs=0: must lie in \[1, 1024\]"),
        (["--jobs=2", "--engine=ray"], "--jobs=2: is for --engine=local"),
        (["--address=head"], "--address=head: is for --engine=ray; add that, or leave --address out"),
        (["--engine=beam"], "invalid choice"),
    ],
)
def test_arguments_that_do_not_go_together_are_refused(words, message):
    with pytest.raises(ConfigError, match=message):
        engine_of(*words)


def test_where_there_is_no_ray_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"pip install 'visionfm_jax\[ray\]'"):
        mapped(squared, Ray())


def test_a_cluster_without_a_worker_is_told(monkeypatch, capsys):
    """It may start some; until then Ray waits and says nothing."""
    ray = SimpleNamespace(
        is_initialized=lambda: True, cluster_resources=dict, put=lambda it: it, get=lambda it: it,
        remote=lambda **options: lambda function: SimpleNamespace(remote=function),
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "ray", ray)
    assert mapped(squared, Ray()) == [i * i for i in range(40)]
    assert "the Ray cluster has no CPU; waiting until a node joins that has one" in capsys.readouterr().err
