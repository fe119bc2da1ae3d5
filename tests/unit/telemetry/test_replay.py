"""What people see of a replayed step: where it went wrong, what was worse than usual, and the files."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from visionfm_jax import main
from visionfm_jax.config import load
from visionfm_jax.errors import ConfigError, OutputError
from visionfm_jax.telemetry.replay import write
from visionfm_jax.telemetry.watchdog import Watchdog
from visionfm_jax.train import spikes
from visionfm_jax.train.layer_statistics import INPUT, OUTPUT, Layer, Statistics
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


@pytest.mark.parametrize(
    ("step", "line"),
    [
        (300, "--step=300: the run has the steps 0 to 299; name one of them"),
        (-1, "--step=-1: the run has the steps 0 to 299; name one of them"),
        (3, "config.workdir = 'nowhere': holds no run; name the folder of the step's run"),
    ],
)
def test_a_step_that_there_is_not_is_refused(step, line):
    config = load.load_file("configs/vit_huge.py:tiny")
    config.workdir = "nowhere"
    with pytest.raises(ConfigError) as raised:
        main.replay(config, step, Watchdog(0, folder=config.workdir))
    assert str(raised.value) == line
