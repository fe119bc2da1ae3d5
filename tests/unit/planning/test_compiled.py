"""What a plan counts, of a step that is not compiled."""

import dataclasses
import json

import jax
import pytest

from visionfm_jax.config import load
from visionfm_jax.errors import UserError
from visionfm_jax.parallel.mesh import make_mesh
from visionfm_jax.parallel.targets import find_cluster
from visionfm_jax.planning import compiled
from visionfm_jax.planning.compiled import inputs_of, shard_bytes, state_bytes
from visionfm_jax.train.step import Trainer


@pytest.fixture
def compiles(monkeypatch, tmp_path):
    """The steps that a stand-in for the compiler was given; the cache is in `tmp_path`."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    step, given = {field.name: {} for field in dataclasses.fields(compiled.CompiledStep)}, []
    monkeypatch.setattr(compiled, "_in_own_process", lambda *of: given.append(of) or json.dumps(step).encode())
    return given


def step_of_vit():
    return compiled.compile_step(load.load_file("vit_huge:tiny"), find_cluster("h100:1x8"), compiled.GPU)


def test_a_damaged_entry_of_the_cache_is_made_again(compiles):
    first = step_of_vit()
    (entry,) = compiled.cache_folder().iterdir()
    whole = entry.read_bytes()
    for damaged in (whole[:20] + bytes(8) + whole[28:], whole[:-12], b"", b"{}"):
        entry.write_bytes(damaged)
        assert step_of_vit() == step_of_vit() == first
    assert len(compiles) == 5


def test_a_plan_needs_no_cache(compiles, tmp_path, capsys):
    (tmp_path / "cache").write_text("a file")
    assert step_of_vit() == step_of_vit()
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert f"compiles are not cached: {tmp_path / 'cache'}" in line


@pytest.mark.parametrize(
    ("end", "expected"),
    [
        (
            "echo 'a warning'; echo 'the reason'; echo '=== Source Location Trace: ==='; echo 'file.cc:1'; exit 1",
            "reason",
        ),
        ("kill -SEGV $$", "ended with -11"),
    ],
)
def test_a_compiler_that_refuses_says_why(monkeypatch, tmp_path, end, expected):
    compiler_that_ends(monkeypatch, tmp_path, end)
    with pytest.raises(compiled.CompileError, match=expected):
        step_of_vit()


@pytest.mark.parametrize(("name", "said"), [("KILL", "was killed by signal 9"), ("INT", "was interrupted")])
def test_a_compiler_that_is_killed_refuses_nothing(monkeypatch, tmp_path, name, said):
    compiler_that_ends(monkeypatch, tmp_path, f"kill -{name} $$")
    with pytest.raises(UserError, match=said) as raised:
        step_of_vit()
    assert not isinstance(raised.value, compiled.CompileError)


def compiler_that_ends(monkeypatch, tmp_path, how):
    script = tmp_path / "compiler"
    script.write_text(f"#!/bin/sh\ncat > {tmp_path / 'given'}\nexec >&2\n{how}\n")
    script.chmod(0o755)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(compiled.sys, "executable", str(script))


def test_all_of_the_state_is_counted_under_its_own_name():
    config = load.load_file("vit_huge_dino:tiny")
    config.task.targets = "centring"
    trainer = Trainer(config, make_mesh(1, jax.devices()[:2]))
    state, batch = inputs_of(trainer, config.train.batch_size)
    found = state_bytes(state, batch, teacher_in_use=1000)
    assert found["teacher"] == found["weights"] + 1000
    assert found["task state"] == sum(map(shard_bytes, state.task_state.values())) > 0
    assert sum(found.values()) == 1000 + sum(map(shard_bytes, jax.tree.leaves((state, batch)))) - 4  # but the step
