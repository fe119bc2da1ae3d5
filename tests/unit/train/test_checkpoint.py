"""Which checkpoints stay, in this process and after a restart; what a folder without one gets."""

from __future__ import annotations

import errno
import functools
import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from visionfm_jax import storage
from visionfm_jax.config import CheckpointConfig
from visionfm_jax.errors import CheckpointError, StorageError
from visionfm_jax.train import checkpoint
from visionfm_jax.train.checkpoint import Checkpoints
from visionfm_jax.train.state import TrainState

BEST = {"keep_best": 1, "best_metric": "val/top1"}


def state_of(step: int, *, ema: bool = False) -> TrainState:
    params = {"w": jnp.full((8, 4), step, jnp.float32)}
    return TrainState(
        step=jnp.asarray(step, jnp.int32),
        params=params,
        opt_state=({"mu": {"w": -params["w"]}}, ()),
        ema={"w": params["w"] + 0.5} if ema else None,
    )


def shapes_and_shardings(state: TrainState) -> tuple[TrainState, TrainState]:
    here = jax.sharding.SingleDeviceSharding(jax.devices()[3])
    return jax.eval_shape(lambda: state), jax.tree.map(lambda _: here, state)


def save(folder: Path, config: CheckpointConfig, scores: dict[int, float | None]) -> None:
    with Checkpoints(folder, config) as checkpoints:
        for step, score in scores.items():
            checkpoints.save(step, state_of(step), {})
            if score is not None:
                assert not checkpoints.failed(wait=True)
                checkpoints.attach(step, {"val/top1": score, "val/loss": 1.0}, {"val": "0123abcd"})


def kept(folder: Path) -> list[int]:
    return sorted(int(p.name) for p in (folder / "checkpoints").iterdir())


@pytest.mark.parametrize(
    ("config", "scores", "expected"),
    [
        ({"keep_last": 2}, {1: 0.9, 2: None, 3: 0.1, 4: None}, [3, 4]),
        ({"keep_last": 1, **BEST}, {1: 0.2, 2: 0.9, 3: None, 4: 0.5, 5: None}, [2, 5]),
        ({"keep_last": 1, **BEST}, {1: 0.2, 2: 0.3, 3: 0.9}, [3]),
        ({"keep_last": 1, **BEST, "keep_best": 2}, {1: 0.5, 2: 0.3, 3: 0.9, 4: None}, [1, 3, 4]),
        ({"keep_last": 1, **BEST}, {1: None, 2: None}, [2]),
    ],
)
def test_the_last_and_the_best_are_kept(tmp_path, config, scores, expected):
    save(tmp_path, CheckpointConfig(**config), scores)
    assert kept(tmp_path) == expected


def test_later_steps_do_not_count(tmp_path):
    config = CheckpointConfig(keep_last=3)
    save(tmp_path, config, {2: None, 4: None, 6: None})
    for until, expected in ((None, 6), (6, 6), (5, 4), (1, None)):
        with Checkpoints(tmp_path, config, read_only=True, until=until) as checkpoints:
            assert checkpoints.latest() == expected
            if expected:
                assert checkpoints.restore(*shapes_and_shardings(state_of(0))).what.step == expected


def test_the_best_survives_restarts(tmp_path):
    config = CheckpointConfig(keep_last=1, **BEST)
    save(tmp_path, config, {1: 0.9, 2: 0.1})
    save(tmp_path, config, {3: 0.5, 4: None})
    assert kept(tmp_path) == [1, 4]
    save(tmp_path, config, {5: 0.95, 6: None})
    assert kept(tmp_path) == [5, 6]


def test_scores_come_back_and_damaged_ones_are_named(tmp_path):
    save(tmp_path, CheckpointConfig(), {1: None, 2: 0.25})
    with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
        assert checkpoints.scores(1) == ({}, {})
        assert checkpoints.scores(2) == ({"val/top1": 0.25, "val/loss": 1.0}, {"val": "0123abcd"})
    file = tmp_path / "checkpoints" / "2" / "scores.json"
    file.write_text(file.read_text().replace("0.25", "0.75"))
    with pytest.raises(CheckpointError, match=r"scores\.json is damaged: .*; remove it, .*evaluated again"):
        Checkpoints(tmp_path, CheckpointConfig())


def test_scores_of_the_version_before_still_keep_the_best(tmp_path):
    config = CheckpointConfig(keep_last=1, **BEST)
    save(tmp_path, config, {1: 0.2})
    step = tmp_path / "checkpoints" / "1"
    (step / "scores.json").unlink()
    (step / "metrics").mkdir()
    (step / "metrics" / "metrics").write_text('{"val/top1": 0.9}')
    save(tmp_path, config, {2: 0.5, 3: None})
    assert kept(tmp_path) == [1, 3]


def test_the_record_comes_back_to_the_last_bit(tmp_path):
    record = {"losses": [0.1 + 0.2, 1e-300, float("nan")], "skipped": 3}
    with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
        checkpoints.save(1, state_of(1), record)
        assert not checkpoints.failed(wait=True)
        found = checkpoints.restore(*shapes_and_shardings(state_of(1))).record
        assert repr({k: found[k] for k in record}) == repr(record)
        file = tmp_path / "checkpoints" / "1" / "_CHECKPOINT_METADATA"
        file.write_text(file.read_text().replace("1e-300", "1e-200"))
    line = r"checkpoints/1 is damaged: its checksum differs; there is no older"
    with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints, pytest.raises(CheckpointError, match=line):
        checkpoints.restore(*shapes_and_shardings(state_of(1)))


@pytest.mark.parametrize("ema", [False, True])
def test_the_state_comes_back_where_it_is_wanted(tmp_path, ema):
    state = state_of(7, ema=ema)
    with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
        assert checkpoints.latest() is None
        checkpoints.save(7, state, {})
    shapes, shardings = shapes_and_shardings(state)
    with Checkpoints(tmp_path, CheckpointConfig(), read_only=True) as checkpoints:
        restored = checkpoints.restore(shapes, shardings).what
        weights = checkpoints.restore_weights(shapes.params, shardings.params).what
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    for got, expected in zip(jax.tree.leaves(restored), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(got, expected)
        assert got.devices() == {jax.devices()[3]}
    np.testing.assert_array_equal(weights["w"], 7.5 if ema else 7)


def test_a_state_with_more_or_less_is_refused(tmp_path):
    with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
        checkpoints.save(7, state_of(7), {})
        assert not checkpoints.failed(wait=True)
        with pytest.raises(CheckpointError, match=r"(?s)another model.*only in this model: +ema\.w \(8, 4\)"):
            checkpoints.restore(*shapes_and_shardings(state_of(7, ema=True)))
        more = state_of(7).replace(params={"w": jnp.zeros((8, 5)), "b": jnp.zeros(2)})
        with pytest.raises(CheckpointError, match=r"params\.b \(2,\)\n.*params\.w \(8, 4\) there, \(8, 5\) here"):
            checkpoints.restore(*shapes_and_shardings(more))


def test_reading_where_there_is_none(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    with Checkpoints(tmp_path, CheckpointConfig(), read_only=True) as checkpoints:
        assert checkpoints.latest() is None
        with pytest.raises(CheckpointError, match="holds no complete checkpoint"):
            checkpoints.restore(*shapes_and_shardings(state_of(1)))


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "checkpoints").write_text("a file")
    with pytest.raises(CheckpointError, match=r"opening .*checkpoints: "):
        Checkpoints(tmp_path, CheckpointConfig())


def damage(folder: Path, step: int) -> None:
    """One bit of a weight, as a disk or a transfer may turn it: the arrays are saved again with it."""
    state = state_of(step)
    turned = np.asarray(state.params["w"]).copy()
    turned.view(np.uint32)[5, 1] ^= 1 << 7
    at = folder / "checkpoints" / str(step) / "default"
    with ocp.PyTreeCheckpointer() as writer:
        writer.save(at, state.replace(params={"w": jnp.asarray(turned)}), force=True)


def test_one_bit_of_one_weight_is_noticed(tmp_path):
    save(tmp_path, CheckpointConfig(), {3: None, 7: None})
    damage(tmp_path, 7)
    shapes, shardings = shapes_and_shardings(state_of(7))
    line = r"checkpoints/7 is damaged: 1 of {} arrays differ from their checksums, params\.w; move it away to continue "
    line += r"from step 3, or set config\.checkpoint\.on_damage=\"older\""
    with Checkpoints(tmp_path, CheckpointConfig(), read_only=True) as checkpoints:
        with pytest.raises(CheckpointError, match=line.format(3)):
            checkpoints.restore(shapes, shardings)
        with pytest.raises(CheckpointError, match=line.format(1)):
            checkpoints.restore_weights(shapes.params, shardings.params)
    older = CheckpointConfig(on_damage="older")
    with Checkpoints(tmp_path, older, read_only=True) as checkpoints:  # somebody else's folder stays as it is
        assert checkpoints.restore(shapes, shardings).step == 3
    assert kept(tmp_path) == [3, 7]
    with Checkpoints(tmp_path, older) as checkpoints:
        found = checkpoints.restore(shapes, shardings)
        assert (found.step, int(found.what.step)) == (3, 3)
        assert "passed over: " in found.notes[0]
        assert "checkpoints/7 is damaged" in found.notes[0]
        assert checkpoints.latest() == 3
        checkpoints.save(7, state_of(7), {})
    assert kept(tmp_path) == [3, 7]
    assert len(list((tmp_path / "damaged").iterdir())) == 1
    with Checkpoints(tmp_path, CheckpointConfig(), read_only=True) as checkpoints:
        assert checkpoints.restore(shapes, shardings).notes == []


def test_one_without_checksums_is_loaded_with_a_word(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "seal", lambda record: "")  # as versions before
    save(tmp_path, CheckpointConfig(), {7: None})
    damage(tmp_path, 7)
    with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
        notes = checkpoints.restore(*shapes_and_shardings(state_of(7))).notes
    assert notes == ["step 7 is not verified: it was saved by a version without checksums"]


def test_a_step_that_storage_fails_to_give_for_a_moment_is_not_damaged(tmp_path, monkeypatch):
    older = CheckpointConfig(on_damage="older")
    save(tmp_path, older, {1: None, 2: None})
    times = [0]

    def fails(restore, *arguments, **more):
        times[0] -= 1
        if times[0] >= 0:
            raise ValueError("UNAVAILABLE: reading: " + os.strerror(errno.EIO))
        return restore(*arguments, **more)

    monkeypatch.setattr(storage, "WAITS", (0, 0))
    with Checkpoints(tmp_path, older) as checkpoints:
        monkeypatch.setattr(checkpoints._arrays, "restore", functools.partial(fails, checkpoints._arrays.restore))
        times[0] = 2
        assert checkpoints.restore(*shapes_and_shardings(state_of(0))).step == 2
        times[0] = 3
        with pytest.raises(StorageError, match=r"^restoring: .*/2: .*Input/output error, 3 times in 0 s"):
            checkpoints.restore(*shapes_and_shardings(state_of(0)))
    assert kept(tmp_path) == [1, 2]


def test_scores_are_attached_again_where_storage_fails_for_a_moment(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(storage, "WAITS", (0.0,))
    sync, asked = os.fsync, []

    def fails_once(file):
        asked.append(file)
        if len(asked) == 1:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        sync(file)

    with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
        checkpoints.save(1, state_of(1), {})
        assert not checkpoints.failed(wait=True)
        monkeypatch.setattr(os, "fsync", fails_once)
        checkpoints.attach(1, {"val/top1": 0.5}, {})
        assert checkpoints.scores(1) == ({"val/top1": 0.5}, {})
        assert checkpoints.latest() == 1
    assert "Input/output error; trying again in 0 s" in capsys.readouterr().err


@pytest.mark.parametrize("content", [None, ""])
def test_one_whose_record_is_lost_is_damaged_not_old(tmp_path, content):
    save(tmp_path, CheckpointConfig(), {3: None, 7: None})
    file = tmp_path / "checkpoints" / "7" / "_CHECKPOINT_METADATA"
    file.unlink()
    if content is not None:
        file.write_text(content)
    with (
        Checkpoints(tmp_path, CheckpointConfig(), read_only=True) as checkpoints,
        pytest.raises(CheckpointError, match="7 is damaged: the file of its record is missing or empty"),
    ):
        checkpoints.restore(*shapes_and_shardings(state_of(7)))
    with Checkpoints(tmp_path, CheckpointConfig(on_damage="older"), read_only=True) as checkpoints:
        assert checkpoints.restore(*shapes_and_shardings(state_of(3))).step == 3


def test_the_cause_of_damage_is_what_was_raised_not_how(tmp_path):
    with pytest.raises(CheckpointError) as raised, checkpoint._plain_errors("7 is damaged"):
        json.loads("torn")  # which Python's reader notices by an iterator that ends
    assert str(raised.value) == "7 is damaged: Expecting value: line 1 column 1 (char 0)"


def storage_error(number: int) -> Exception:
    return ValueError("UNAVAILABLE: " + os.strerror(number))


@pytest.mark.parametrize(
    ("first", "then", "kind", "text"),
    [
        (storage_error(errno.EIO), storage_error(errno.ENOSPC), CheckpointError, "the disk is full"),
        (storage_error(errno.ENOSPC), storage_error(errno.EIO), StorageError, "Input/output error"),
        (storage_error(errno.ENOSPC), ValueError("nothing to clean up"), CheckpointError, "the disk is full"),
    ],
)
def test_of_several_tries_the_last_counts(first, then, kind, text):
    then.__context__ = first  # as when it is raised while that one is handled
    with pytest.raises(kind, match=text), checkpoint._plain_errors("saving"):
        raise then


def test_a_step_under_the_number_of_another_is_damaged(tmp_path):
    save(tmp_path, CheckpointConfig(), {7: None})
    (tmp_path / "checkpoints" / "7").rename(tmp_path / "checkpoints" / "20")
    with (
        Checkpoints(tmp_path, CheckpointConfig(), read_only=True) as checkpoints,
        pytest.raises(CheckpointError, match="20 is damaged: it holds step 7"),
    ):
        checkpoints.restore(*shapes_and_shardings(state_of(7)))
