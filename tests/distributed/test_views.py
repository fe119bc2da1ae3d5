"""Two hosts that see different states of one run folder decide alike: each process here has a folder of its own."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp

from visionfm_jax.config import CheckpointConfig
from visionfm_jax.train.checkpoint import Checkpoints
from visionfm_jax.train.state import TrainState

PROGRAM = """
import functools, sys
from pathlib import Path
from visionfm_jax.parallel import cluster
me, _ = cluster.initialize(timeout=120)
import jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from visionfm_jax import storage
from visionfm_jax.config import CheckpointConfig
from visionfm_jax.errors import StorageError
from visionfm_jax.parallel import agreement
from visionfm_jax.train.checkpoint import Checkpoints
from visionfm_jax.train.state import TrainState

mesh = jax.make_mesh((2,), ("data",))
state = TrainState(step=jnp.int32(0), params={"w": jnp.zeros((8, 4))}, opt_state=(), ema=None)
shapes = jax.eval_shape(lambda: state)
spec = lambda leaf: NamedSharding(mesh, PartitionSpec("data") if leaf.ndim else PartitionSpec())
shardings = jax.tree.map(spec, state)

def fails(restore, left, *arguments, **more):
    left[0] -= 1
    if me == 1 and left[0] >= 0:
        raise OSError(5, "Input/output error")
    return restore(*arguments, **more)

def work():
    try:
        agreement.require_same([me], "data.train")
    except StorageError as error:
        print(error, file=sys.stderr)
    print(agreement.first_text(""), agreement.first_text("\u00e9" * me), agreement.from_first(lambda: [me]))
    print(agreement.from_each([me]))
    config = CheckpointConfig(keep_last=1, keep_best=1, best_metric="val/top1", on_damage="older")
    with Checkpoints(Path(sys.argv[1], str(me)), config) as checkpoints:
        print(checkpoints.latest(), checkpoints.scores(6), sorted(checkpoints._keep.scores.items()))
        storage.WAITS = (0, 0)
        restore = checkpoints._arrays.restore
        checkpoints._arrays.restore = functools.partial(fails, restore, [2])  # for a moment
        found = checkpoints.restore(shapes, shardings)
        print(found.step, len(found.notes), "6 is damaged" in found.notes[0], found.record["losses"])
        checkpoints.attach(4, {"val/top1": 0.1 + me}, {})
        print(checkpoints._keep.scores[4], checkpoints.latest())
        checkpoints._arrays.restore = functools.partial(fails, restore, [9])  # for good
        checkpoints.restore(shapes, shardings)

sys.exit(cluster.run_together(work))
"""


def test_what_one_process_sees_or_finds_damaged_counts_for_all(tmp_path):
    first, second = tmp_path / "0", tmp_path / "1"
    with Checkpoints(first, CheckpointConfig(keep_last=9)) as checkpoints:
        for step in (2, 4, 6):
            params = {"w": jnp.full((8, 4), step, jnp.float32)}
            state = TrainState(step=jnp.asarray(step, jnp.int32), params=params, opt_state=(), ema=None)
            checkpoints.save(step, state, {"losses": [float(step)]})
            assert not checkpoints.failed(wait=True)
        for step in (2, 6):
            checkpoints.attach(step, {"val/top1": step / 8}, {"val": "0123abcd"})
    shutil.copytree(first, second)
    (second / "checkpoints" / "6" / "scores.json").unlink()
    data = second / "checkpoints" / "6" / "default"
    for file in data.rglob("d/*"):
        file.write_bytes(b"x" * file.stat().st_size)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        where = f"127.0.0.1:{free.getsockname()[1]}"
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "",
        "VISIONFM_COORDINATOR": where,
        "VISIONFM_PROCESSES": "2",
    }
    two = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(tmp_path)],
            env=env | {"VISIONFM_PROCESS": str(i)}, cwd=Path(__file__).parents[2], text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for i in range(2)
    ]  # fmt: skip
    try:
        said = [process.communicate(timeout=240) for process in two]
    finally:
        for process in two:
            process.kill()
    assert [process.returncode for process in two] == [71, 71], said
    lines = [[line for line in out.splitlines() if not line.startswith("[Gloo]")] for out, _ in said]
    assert lines[0] == lines[1]
    assert lines[0] == [
        " \u00e9 [0]",
        "[[0], [1]]",
        "6 ({'val/top1': 0.75}, {'val': '0123abcd'}) [(2, {'val/top1': 0.25}), (4, {}), (6, {'val/top1': 0.75})]",
        "4 1 True [4.0]",
        "{'val/top1': 0.1} 4",
    ]
    assert "config.data.train: process 1 sees other values than process 0; make sure that" in said[1][1]
    for _, err in said:
        assert "Input/output error, 3 times in 0 s; check the storage, then start the same command again" in err
