"""What people see of a replayed step: where it went wrong, what was worse than usual, and the files."""

from __future__ import annotations

import copy
import json
import types

import numpy as np
import pytest
from PIL import Image

from visionfm_jax import main
from visionfm_jax.cli import replay, train
from visionfm_jax.config import load
from visionfm_jax.config.schema import to_dict
from visionfm_jax.errors import ConfigError, OutputError
from visionfm_jax.models.clip import ClipConfig
from visionfm_jax.telemetry.replay import write
from visionfm_jax.telemetry.watchdog import Watchdog
from visionfm_jax.train import spikes
from visionfm_jax.train.layer_statistics import INPUT, OUTPUT, Layer, Statistics
from visionfm_jax.train.provenance import with_settings
from visionfm_jax.train.replay import Replayed

NAMES = ["embed", "blocks[0]", "blocks[1].attn.out", "blocks[1]", ""]
GOOD, BAD = Statistics(1.0, 3.0, 0, ()), Statistics(1.0, 3.0, 7, (2,))


def replayed(
    forward: dict[str, Statistics] | None = None,
    backward: dict[str, Statistics] | None = None,
    loss: float = 2.0,
    norm: float = 1.0,
    **more,
) -> Replayed:
    """Step 5 of a model of four layers, whose statistics are `GOOD` save those given by the layer's side and name."""

    def layers(forward: dict, backward: dict) -> list[Layer]:
        sides = [(INPUT, ""), *((OUTPUT, name) for name in NAMES)]
        names = {(side, name): f"{side} {name}".strip() for side, name in sides}
        return [Layer(n, s, forward.get(names[s, n], GOOD), backward.get(names[s, n], GOOD)) for s, n in sides]

    samples = [
        {"sample": 20 + row, "source": "animals", "record": row, "key": f"{row}.jpg", "loss": loss + row / 4}
        for row in range(4)
    ]
    values = {
        "step": 5,
        "metrics": {"loss": loss, "grad_norm": norm, "finite": float(np.isfinite(loss) and np.isfinite(norm))},
        "gradient_norms": {"embed.kernel": 0.5, "head.kernel": norm},
        "bad_weights": [],
        "layers": layers(forward or {}, backward or {}),
        "beside": layers({}, {}),
        "samples": samples,
        "suspects": [2, 0],
        "images": np.zeros((2, 8, 8, 3), np.uint8),
    }
    return Replayed(**{**values, **more})


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ({}, ""),
        (
            {"forward": {"output of blocks[1].attn.out": BAD, "output of blocks[1]": BAD}, "loss": np.nan},
            "forward pass, output of blocks[1].attn.out; the output of blocks[0] is finite",
        ),
        ({"forward": {"input of": BAD}}, "forward pass, input of the network; so it comes with the data"),
        ({"loss": np.inf, "backward": {"output of": BAD}}, "the loss; the output of the network is finite"),
        (
            {"backward": {"output of blocks[0]": BAD, "output of embed": BAD}, "norm": np.inf},
            "backward pass, gradient of the output of blocks[0]; that of the output of blocks[1].attn.out is finite",
        ),
        (
            {"backward": {"output of": BAD}, "norm": np.nan},
            "backward pass, gradient of the output of the network; the loss is finite",
        ),
        (
            {"norm": np.inf},
            "the gradient of the weights head.kernel (1 tensors); those of all layers are finite",
        ),
        ({"bad_weights": ["head.bias"], "loss": np.nan}, "the weights before the step: head.bias (1 tensors)"),
    ],
)  # fmt: skip
def test_the_first_value_that_is_not_finite_is_named(found, expected):
    assert replayed(**found).first_bad == expected


def test_a_spike_is_compared_with_the_next_batch(tmp_path):
    backward = {"output of blocks[0]": Statistics(40.0, 90.0, 0, ()), "output of embed": Statistics(9.0, 9.0, 0, ())}
    found = replayed({"output of embed": Statistics(1.5, 4.0, 0, ())}, backward, norm=12.0)
    lines = write(found, tmp_path).splitlines()
    assert lines[:7] == [
        "step 5 again: loss 2, gradient norm 12",
        "  in the run       not kept",
        "  first not finite nowhere: everything is finite",
        "  samples          of the largest losses: 22 = animals 2.jpg (loss 2.5), 20 = animals 0.jpg (loss 2)",
        "  tensors          head.kernel 12, embed.kernel 0.5 (gradient norms)",
        "  activations      most beside the next batch: 1.5 times its RMS, output of embed",
        "  gradients        most beside the next batch: 40 times its RMS, output of blocks[0]",
    ]
    for line in lines[-2:]:
        with Image.open(line.strip()) as picture:
            assert np.asarray(picture).std() > 5


def test_the_file_has_everything(tmp_path):
    found = replayed({"output of blocks[1]": BAD}, loss=np.nan, norm=np.nan)
    assert "everything is finite" not in write(found, tmp_path)
    text = (tmp_path / "replay" / "step-00000005" / "statistics.json").read_text()
    values = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert values["metrics"]["loss"] == "nan"
    assert values["first_not_finite"].startswith("forward pass, output of blocks[1];")
    assert [layer["layer"] for layer in values["layers"]][-2:] == ["output of blocks[1]", "output of the network"]
    assert values["layers"][-2]["forward"] == {"rms": 1, "largest": 3, "bad": 7, "rows": [2]}
    assert [sample["key"] for sample in values["suspects"]] == ["2.jpg", "0.jpg"]
    assert len(values["samples"]) == 4


@pytest.mark.parametrize("change", [0.0, 1e-6])
def test_it_is_said_whether_the_run_saw_the_same(tmp_path, change):
    found = replayed(norm=12.0)
    values = {"loss": 2.0 + change, "grad_norm": 12.0, "gradient_norms": found.gradient_norms}
    source = type("Source", (), {"name": "animals", "key": lambda self, i: "", "__len__": lambda self: 4})()
    batch = {name: np.zeros(4, int) for name in ("source", "record", "damaged")}
    losses = np.array([sample["loss"] for sample in found.samples])
    spikes.SpikeFolder(tmp_path, [source]).keep(spikes.SPIKE, 5, values, losses, batch)
    line = write(found, tmp_path).splitlines()[1]
    assert line.startswith(
        "  in the run       spike, the same to the last bit" if not change else "  in the run       spike, loss 2"
    )


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "replay").write_text("in the way")
    with pytest.raises(OutputError, match=r"cannot write .*replay/step-00000005: Not a directory; free space there"):
        write(replayed(), tmp_path)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--mode=replay"], "--mode=replay needs a step; add --step=N"),
        (["--step=3"], "--step=3 is for --mode=replay; add that, or leave --step out"),
        (["--mode=replay", "--step=two"], "argument --step: invalid int value: 'two'"),
    ],
)
def test_a_step_is_for_replay_alone(arguments, line):
    with pytest.raises(ConfigError) as raised:
        main.main(["--config=configs/vit_huge.py:tiny", *arguments])
    assert line in str(raised.value)


def test_a_damaged_file_of_the_step_does_not_end_a_replay(tmp_path):
    (tmp_path / "spikes").mkdir()
    (tmp_path / "spikes" / "step-00000005.jsonl").write_text('{"step": 5')
    assert " step-00000005.jsonl is damaged or cannot be read: " in write(replayed(), tmp_path).replace("/", " ")


def run_with(folder, edit, name="config.json"):
    """The tiny configuration, and the record of a run of it, edited, in `folder`."""
    config = load.load_file("configs/vit_huge.py:tiny")
    config.workdir = str(folder)
    was = copy.deepcopy(config)
    edit(was)
    (folder / "checkpoints").mkdir(exist_ok=True)
    (folder / name).write_text(json.dumps({"config": to_dict(was), "derived": {}}))
    return config


@pytest.mark.parametrize(
    ("step", "line"),
    [
        (200, "--step=200: the run has the steps 0 to 199; name one of them"),
        (-1, "--step=-1: the run has the steps 0 to 199; name one of them"),
    ],
)
def test_a_step_that_there_is_not_is_refused(tmp_path, step, line):
    config = run_with(tmp_path, lambda c: setattr(c.train, "steps", 200))
    with pytest.raises(ConfigError) as raised:
        replay.replay(config, step, Watchdog(0, folder=config.workdir))
    assert str(raised.value) == line


def test_a_folder_without_a_run_is_refused(tmp_path):
    config = load.load_file("configs/vit_huge.py:tiny")
    config.workdir = str(tmp_path)
    with pytest.raises(ConfigError, match=r"contains no run; name the folder of the run$"):
        replay.replay(config, 3, Watchdog(0, folder=config.workdir))


def test_what_a_step_follows_from_is_the_runs(tmp_path):
    def other(c):
        c.optim.lr, c.seed, c.data.transforms[0].scale, c.task.num_classes = 0.5, 3, (0.4, 1.0), 9
        c.data.train[0].weight = 2.0
        c.telemetry.log_every, c.parallel.stage, c.data.train[0].path, c.evals = 7, 0, "there", ()
        c.checkpoint.weights, c.train.on_nonfinite = "from", "skip"

    config = run_with(tmp_path, other)
    before = copy.deepcopy(config)
    found, changed = with_settings(config, tmp_path, tmp_path / "config.json")
    assert config == before  # untouched
    assert changed == [
        "seed: 0 -> 3",
        "data.train[0].weight: 1.0 -> 2.0",
        f"data.transforms[0].scale: {before.data.transforms[0].scale} -> (0.4, 1.0)",
        f"optim.lr: {before.optim.lr} -> 0.5",
    ]
    assert found.checkpoint.weights == "from"  # what it began with
    assert (found.telemetry, found.parallel, found.evals) == (before.telemetry, before.parallel, before.evals)
    assert found.data.train[0].path == before.data.train[0].path
    config.checkpoint.weights = "elsewhere"
    assert with_settings(config, tmp_path, tmp_path / "config.json")[0].checkpoint.weights == "elsewhere"
    run_with(tmp_path, lambda c: None)
    assert with_settings(config, tmp_path, tmp_path / "config.json")[0].checkpoint.weights == ""


def test_another_kind_of_run_is_refused(tmp_path):
    run_with(tmp_path, lambda c: setattr(c, "model", ClipConfig()))
    config = load.load_file("configs/vit_huge.py:tiny")
    with pytest.raises(ConfigError, match=rf"^config.model: is a ViTConfig, and something else in {tmp_path}/config"):
        with_settings(config, tmp_path, tmp_path / "config.json")


def test_settings_whose_checkpoint_holds_no_fields_are_refused(tmp_path):
    config = run_with(tmp_path, lambda c: None)
    kept = json.loads((tmp_path / "config.json").read_text())
    kept["config"]["checkpoint"] = [1]
    (tmp_path / "config.json").write_text(json.dumps(kept))
    with pytest.raises(ConfigError, match=r"config.json is damaged: its config.checkpoint = \[1\] holds no fields"):
        with_settings(config, tmp_path, tmp_path / "config.json")


def test_settings_that_break_a_rule_are_refused(tmp_path):
    config = run_with(tmp_path, lambda c: setattr(c.optim, "lr", [1]))
    with pytest.raises(ConfigError, match=r"config.json does not fit this release or this command: config.optim.lr = "):
        with_settings(config, tmp_path, tmp_path / "config.json")


def test_settings_that_changed_between_the_checkpoint_and_the_step_are_refused(tmp_path, monkeypatch):
    config = run_with(tmp_path, lambda c: None)
    run_with(tmp_path, lambda c: setattr(c.optim, "lr", 0.5), "config-until-40.json")
    run_with(tmp_path, lambda c: setattr(c.telemetry, "log_every", 9), "config-until-60.json")
    state = types.SimpleNamespace(step=30)
    monkeypatch.setattr(replay, "starting_state", lambda *_: (state, {}, "step 30 of its own folder", None))
    monkeypatch.setattr(replay, "changes", lambda *_: pytest.fail("not refused"))
    with pytest.raises(ConfigError) as raised:
        replay.replay(config, 65, Watchdog(0, folder=config.workdir))
    assert str(raised.value).startswith(
        "--step=65: no checkpoint between step 30 of its own folder and it is left, and the settings changed on the "
        f"way ({tmp_path}/config-until-40.json has optim.lr: "
    )
    monkeypatch.setattr(state, "step", 40)  # what changed at 60 makes no other step
    with pytest.raises(pytest.fail.Exception):
        replay.replay(config, 65, Watchdog(0, folder=config.workdir))


@pytest.mark.parametrize("mode", ["train", "replay"])
def test_what_will_run_is_said_before_anything_compiles(tmp_path, monkeypatch, capsys, mode):
    config = run_with(tmp_path, lambda c: None)
    monkeypatch.setattr({"train": train, "replay": replay}[mode], "starting_state", lambda *_: 1 / 0)
    watchdog = Watchdog(0, folder=config.workdir)
    with pytest.raises(ZeroDivisionError):
        train.run(config, None, watchdog) if mode == "train" else replay.replay(config, 3, watchdog)
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("vit_huge_tiny: 694,089 parameters on 8 x cpu")
    assert said[-1] == f"  run folder       {tmp_path}"
