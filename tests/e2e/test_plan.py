"""`python -m visionfm_jax.plan`, as people call it."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from visionfm_jax.config import load
from visionfm_jax.errors import entry_point
from visionfm_jax.parallel.targets import MEMORY_FRACTION, TARGETS, find_cluster, sheet_of
from visionfm_jax.plan import _progress, main
from visionfm_jax.planning.compiled import GPU, compile_step
from visionfm_jax.planning.rates import VERSION

ROOT = Path(__file__).parents[2]
FULL, TINY = "--config=configs/vit_huge.py", "--config=configs/vit_huge.py:tiny"
COMMAND = ("-m", "visionfm_jax.plan")
QUICKLY = """
import sys
from gpu_compiles import without_softmax_kernels
from visionfm_jax import plan
from visionfm_jax.errors import entry_point
with without_softmax_kernels():
    sys.exit(entry_point(plan.main)(sys.argv[1:]))
"""
# In stage 1 the tests compile least: there are fewer other settings, and they share some.
SMALL = (TINY, "--config.parallel.stage=1", "--config.data.augment.jitter=(0,0,0,0)")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def plan(cache, *words, program=("-c", QUICKLY), timeout=500):
    path = os.pathsep.join([str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"XDG_CACHE_HOME": str(cache), "COLUMNS": "110", "PYTHONPATH": path}
    return subprocess.run(
        [sys.executable, *program, *words], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout
    )


def test_a_plan_with_advice(cache, tmp_path):
    done = plan(cache, *SMALL, "--cluster=h100:1x8", f"--json={tmp_path / 'plan.json'}")
    assert done.returncode == 0, done.stderr
    for words in ("Parameters", "activations", "it fits", "reduce-scatter", "runs beside", "GPU-hours"):
        assert words in done.stdout, done.stdout
    found = json.loads((tmp_path / "plan.json").read_text())
    assert {"parameters", "per_gpu", "collectives", "step", "run", "advice"} <= set(found)
    assert found["parameters"]["total"] == sum(v for k, v in found["parameters"].items() if k != "total")
    per_gpu = found["per_gpu"]
    kinds = ("weights", "gradients", "optimiser", "batch", "activations", "temporary")
    assert sum(per_gpu[f"{kind}_bytes"] for kind in kinds) == per_gpu["peak_bytes"]
    assert found["step"]["executed_flops"] == pytest.approx(found["step"]["model_flops"], rel=0.2)
    assert found["run"]["gpu_hours"] == pytest.approx(found["run"]["days"] * 24 * 8)
    assert {c["dtype"] for c in found["collectives"] if c["kind"] == "reduce-scatter"} == {"bf16"}

    step = found["step"]
    parts = (step[f"{kind}_seconds"] for kind in ("matmul", "attention", "other", "exposed"))
    assert step["seconds"] == pytest.approx(sum(parts))
    assert step["seconds_range"][0] < step["seconds"] < step["seconds_range"][1]
    assert sum(step["memory_traffic_bytes_by_kind"].values()) == step["memory_traffic_bytes"]
    assert "calibrated on one H100, 3 steps" in done.stdout
    assert found["settings"]["train.precision"] == "bf16"
    for name, value in found["settings"].items():
        assert f"{name}={value}" in done.stdout
    assert "Not compared, as it rounds more: --config.model.mlp_matmuls=fp8" in done.stdout

    again = plan(cache, *SMALL, "--cluster=h100:1x8")
    assert again.stdout == done.stdout  # from the cache

    kinds = {"matmuls": 0.5, "attention": 0, "all else": 0.5, "waits": 0}
    h100 = TARGETS["h100"]
    record = {
        "device": h100.description, "sheet": sheet_of(h100), "planned_seconds": kinds, "measured_seconds": 1.2,
        "mlp_matmuls": {"model": "compute"}, "rates": VERSION,
    }  # fmt: skip
    (tmp_path / "measured").write_text(json.dumps(record))
    words = ("--advice=no", f"--calibration={tmp_path / 'measured'}", f"--json={tmp_path / 'plan.json'}")
    alone = plan(cache, *SMALL, "--cluster=h100:1x8", *words)
    assert alone.returncode == 0, alone.stderr
    assert "settings were compared" not in alone.stdout
    corrected = json.loads((tmp_path / "plan.json").read_text())
    assert "advice" not in corrected
    assert corrected["step"]["other_seconds"] > 1.1 * step["other_seconds"]
    assert corrected["step"]["calibration"] == f"calibrated by {tmp_path / 'measured'}, 1 measured step"


def test_search_ranks_what_fits(cache, tmp_path):
    # For fp32 there is one attention kernel, and where no layers are a loop none are unrolled.
    words = ("--cluster=h100:1x8", "--config.train.precision=fp32", "--config.model.scan_layers=False")
    program = QUICKLY.replace("with without", "plan.settings.REMAT = ('dots',)\nwith without")
    done = plan(cache, *SMALL, *words, "--search", f"--json={tmp_path / 'plan.json'}", program=("-c", program))
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "plan.json").read_text())["search"]
    assert {s["stage"] for s in found} == {0, 1, 2, 3}
    assert [s["seconds"] for s in found] == sorted(s["seconds"] for s in found)
    assert "Settings that fit, fastest first" in done.stdout
    assert "--config.parallel.stage=" in done.stdout


def test_what_does_not_fit_is_code_3_with_the_nearest_that_does(cache, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    peaks = {}
    monkeypatch.chdir(ROOT)
    for remat in ("none", "dots"):  # as the first test has compiled them
        config, _ = load.from_arguments([*SMALL, f"--config.model.remat={remat}"])
        peaks[remat] = compile_step(config, find_cluster("h100:1x8"), GPU).peak
    card = int((0.7 * peaks["none"] + 0.3 * peaks["dots"]) / MEMORY_FRACTION)  # too small for one, enough for the other
    (tmp_path / "sheets.toml").write_text(f'[toy]\nlike = "h100"\nmemory_bytes = {card}\n')
    words = ("--cluster=toy:1x8", f"--targets={tmp_path / 'sheets.toml'}", "--config.model.remat=none")
    done = plan(cache, *SMALL, *words)
    assert done.returncode == 3, done.stdout + done.stderr
    assert "it does not fit" in done.stdout
    assert "The nearest setting that fits" in done.stdout
    assert "--config.model.remat=" in done.stdout or "--config.train.accumulate=" in done.stdout


def test_nothing_fits(cache, tmp_path):
    (tmp_path / "sheets.toml").write_text('[toy]\nlike = "h100"\nmemory_bytes = 1_000_000\n')
    words = (TINY, "--cluster=toy:1x8", f"--targets={tmp_path / 'sheets.toml'}", "--config.model.remat=full",
              "--config.train.accumulate=8", "--config.model.attention=cudnn", "--config.task.cutmix=0")  # fmt: skip
    done = plan(cache, *words, program=COMMAND)
    assert done.returncode == 3, done.stdout + done.stderr
    assert "No setting of this batch fits: take more or larger GPUs." in done.stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((TINY,), "--cluster is missing"),
        ((TINY, "--cluster=h10:1x8"), "did you mean h100?"),
        ((TINY, "--cluster=h100:8"), "such as h100:4x8"),
        ((FULL, "--cluster=h100:1x7", "--config.evals=()"), "config.train.batch_size = 2048: must be a multiple of 7"),
        ((TINY, "--cluster=h100:1x8", "--json=/no/such/folder/plan.json"), "--json=/no/such/folder/plan.json: No such"),
        ((TINY, "--cluster=h100:1x8", "--targets=nowhere.toml"), "--targets=nowhere.toml"),
        ((TINY, "--cluster=h100:1x8", "--calibration=nowhere"), "--calibration=nowhere: cannot be read"),
        ((TINY, "--cluster=h100:1x8", "--calibration="), "--calibration: names no file"),
        ((TINY, "--cluster=h100:1x8", "--advice=no", "--search"), "--search and --advice=no do not go together"),
        (
            (TINY, "--cluster=a100-80gb:1x8", "--config.model.mlp_matmuls=fp8"),
            "error: config.model.mlp_matmuls = 'fp8': needs a card with FP8 units",
        ),
        (("--config=configs/vit_hug.py", "--cluster=h100:1x8"), "did you mean configs/vit_huge.py?"),
    ],
)
def test_bad_input_is_one_line(monkeypatch, capsys, words, said):
    monkeypatch.chdir(ROOT)
    assert entry_point(main)(list(words)) == 2
    out, err = capsys.readouterr()
    assert not out
    assert said in err
    assert len(err.strip().splitlines()) == 1, err


WITHOUT_CUDA = """
import importlib.util, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name.startswith(("jax_plugins", "nvidia")) else find(name, *rest)
from visionfm_jax import plan
from visionfm_jax.errors import entry_point
sys.exit(entry_point(plan.main)(sys.argv[1:]))
"""


def test_without_the_cuda_packages_it_says_what_it_cannot_show(cache, tmp_path):
    words = (TINY, "--config.task.cutmix=0", "--cluster=a100-80gb:16x4", f"--json={tmp_path / 'plan.json'}")
    done = plan(cache, *words, program=("-c", WITHOUT_CUDA))
    assert done.returncode == 0, done.stderr
    assert "pip install 'visionfm_jax[plan]'" in done.stdout
    assert "cannot show peak memory" in done.stdout
    found = json.loads((tmp_path / "plan.json").read_text())
    assert found["per_gpu"]["fits"] is None
    assert found["per_gpu"]["optimiser_bytes"] > 0
    assert found["settings"]["model.attention"] == "cudnn"  # of the run, not of this compile
    assert found["step"]["model_flops"] > 0

    search = plan(cache, *words, "--search", program=("-c", WITHOUT_CUDA))
    assert search.returncode == 2
    assert "pip install 'visionfm_jax[plan]'" in search.stderr


def test_the_bar_counts_what_is_compiled(monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr("sys.stderr", terminal)
    with _progress() as on_progress:
        on_progress(0, 1)
        on_progress(2, 5)
    assert "compiling:   0%" in terminal.getvalue()
    assert "2/5" in terminal.getvalue()


def test_a_log_has_a_line_for_each_setting(capsys):
    with _progress() as on_progress:
        for done, of in ((0, 1), (1, 2), (1, 3), (2, 3)):
            on_progress(done, of)
    assert [line.partition(" settings")[0] for line in capsys.readouterr().err.splitlines()] == [
        "compiling the step, minutes for a large model that is not cached …",
        "compiled 1 of the 2", "compiled 2 of the 3",
    ]  # fmt: skip


def test_help():
    done = subprocess.run(
        [sys.executable, "-m", "visionfm_jax.plan", "--help"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0
    assert "--search" in done.stdout
