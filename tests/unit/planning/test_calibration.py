"""Estimates corrected by measured steps."""

import json
import math
import zlib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from visionfm_jax import bench
from visionfm_jax.errors import OutputError, UserError, entry_point
from visionfm_jax.parallel.targets import TARGETS, Cluster, find_target, sheet_of
from visionfm_jax.planning import rates
from visionfm_jax.planning.calibration import append_record, calibration_of, read_calibration
from visionfm_jax.planning.compiled import CompiledStep
from visionfm_jax.planning.rates import VERSION

A100 = TARGETS["a100-80gb"]
STEPS = [  # seconds of the model, by kind
    {"matmuls": 0.6, "attention": 0.05, "all else": 0.3, "waits": 0.0},
    {"matmuls": 0.3, "attention": 0.0, "all else": 0.4, "waits": 0.1},
    {"matmuls": 0.2, "attention": 0.3, "all else": 0.1, "waits": 0.0},
    {"matmuls": 0.5, "attention": 0.02, "all else": 0.1, "waits": 0.3},
]


def record(modelled, measured, device="NVIDIA A100-SXM4-80GB", sheet=None, mlp_matmuls="compute"):
    return {
        "device": device, "sheet": sheet or sheet_of(find_target(str(device)) or A100), "planned_seconds": modelled,
        "measured_seconds": measured, "mlp_matmuls": {"model": mlp_matmuls}, "rates": VERSION,
    }  # fmt: skip


def seconds(calibration, modelled):
    return sum(calibration.factors[kind] * value for kind, value in modelled.items())


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "measured.jsonl")


def test_one_step_corrects_a_plan_of_itself_and_narrows_its_range(path):
    append_record(path, record(STEPS[0], 1.1 * sum(STEPS[0].values())))
    found = read_calibration(path, A100, fp8=False)
    assert seconds(found, STEPS[0]) == pytest.approx(1.1 * sum(STEPS[0].values()), rel=0.015)
    assert found.deviation(STEPS[0]) < 0.5 * calibration_of(A100, fp8=False).deviation(STEPS[0])
    assert found.source == f"calibrated by {path}, 1 measured step"
    assert found.factors["waits"] == 1  # it waited for nothing


@pytest.mark.parametrize("device", ["NVIDIA A100-SXM4-80GB", "NVIDIA H100 80GB HBM3"])
@pytest.mark.parametrize("ratio", [1e-3, 0.3, 0.67, 0.95, 1.05, 1.5, 4, 1e3])
def test_a_step_lies_in_the_range_of_its_own_plan_however_far_it_was_from_it(path, capsys, device, ratio):
    for step in STEPS:
        Path(path).write_text(json.dumps(record(step, ratio * sum(step.values()), device)) + "\n")
        found = read_calibration(path, find_target(device), fp8=False)
        assert min(found.factors.values()) > 0
        distance = math.log(seconds(found, step) / (ratio * sum(step.values())))
        assert abs(distance) < found.deviation(step) < 0.03
    assert not capsys.readouterr().err


def test_a_line_that_contradicts_the_others_is_named(path, capsys):
    for measured in (*[0.95] * 9, 1.5):
        append_record(path, record(STEPS[0], measured))
    read_calibration(path, A100, fp8=False)
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert f"--calibration={path}: line 10: no factors explain the measured seconds to 6%" in line


def test_several_steps_tell_the_kinds_apart(path):
    true = {"matmuls": 1.1, "attention": 1.4, "all else": 0.9, "waits": 1.5}
    for step in STEPS:
        append_record(path, record(step, sum(true[kind] * value for kind, value in step.items())))
    found = read_calibration(path, A100, fp8=False)
    assert found.factors == pytest.approx(true, rel=0.06)
    assert found.source.endswith("4 measured steps")


def test_a_file_that_was_edited_on_windows(path):
    append_record(path, record(STEPS[0], 1.0))
    path = Path(path)
    path.write_bytes("\ufeff".encode() + path.read_bytes().replace(b"\n", b"\r\n"))
    assert read_calibration(str(path), A100, fp8=False).source.endswith("1 measured step")


def test_a_plan_of_a_plan_changes_nothing(path):
    append_record(path, record(STEPS[0], sum(STEPS[0].values())))
    assert read_calibration(path, A100, fp8=False).factors == pytest.approx(calibration_of(A100, fp8=False).factors)


def test_only_steps_of_the_same_card_count(path):
    append_record(path, record(STEPS[0], 9.0, device="NVIDIA H100 80GB HBM3"))
    append_record(path, record(STEPS[0], 1.0))
    assert read_calibration(path, A100, fp8=False).source.endswith("1 measured step")
    with pytest.raises(UserError, match="measured on NVIDIA A100-SXM4-80GB, NVIDIA H100 80GB HBM3, not on NVIDIA B200"):
        read_calibration(path, TARGETS["b200"], fp8=False)
    with pytest.raises(UserError, match="not on NVIDIA A100-SXM4-40GB; run visionfm bench"):
        read_calibration(path, TARGETS["a100-40gb"], fp8=False)
    with pytest.raises(UserError, match=r"not on Mine; run visionfm bench .* --targets=FILE, in which description is"):
        read_calibration(path, replace(A100, description="Mine"), fp8=False)


@pytest.mark.parametrize("name", ["NVIDIA Own", "NVIDIA A100-PCIE-40GB"])  # the words of the second are of a built-in
def test_steps_of_a_card_of_ones_own_count_where_it_is_described_as_it_was(path, name):
    own = replace(A100, name="own", description=name, cores=99)
    append_record(path, record(STEPS[0], 1.0, name, sheet_of(own)))
    assert read_calibration(path, own, fp8=False).source.endswith("1 measured step")
    with pytest.raises(UserError, match="planned with other figures of it than those of own; measure again"):
        read_calibration(path, replace(own, cores=100), fp8=False)
    assert calibration_of(own, fp8=False).source == "from data sheets and published rates, not measured"


def test_another_chip_is_not_calibrated_as_the_one_that_it_is_like(path):
    append_record(path, record(STEPS[0], 1.0, "NVIDIA H100 80GB HBM3"))
    h100 = TARGETS["h100"]
    assert read_calibration(path, replace(h100, name="slow network", network_between=1e9), fp8=False)
    waited = STEPS[0] | {"waits": 0.1}
    Path(path).write_text(json.dumps(record(waited, 1.0, h100.description)))
    with pytest.raises(UserError, match="other figures"):
        read_calibration(path, replace(h100, name="slow network", network_between=1e9), fp8=False)
    with pytest.raises(UserError, match="other figures"):
        read_calibration(path, replace(h100, peak_flops=2e15), fp8=False)
    assert "not measured" in calibration_of(replace(h100, peak_flops=2e15), fp8=False).source


def test_steps_with_fp8_products_say_nothing_of_those_without(path):
    h100 = TARGETS["h100"]
    append_record(path, record(STEPS[0], 1.0, h100.description))
    with pytest.raises(UserError, match="measured without FP8 products, and the plan is of one with; measure one by"):
        read_calibration(path, h100, fp8=True)
    append_record(path, record(STEPS[0], 1.0, h100.description, mlp_matmuls="fp8"))
    assert read_calibration(path, h100, fp8=True).source.endswith("1 measured step")
    assert read_calibration(path, h100, fp8=False).source.endswith("1 measured step")
    Path(path).write_text(Path(path).read_text().partition("\n")[2])
    with pytest.raises(UserError, match="measured with FP8 products, and the plan is of one without"):
        read_calibration(path, h100, fp8=False)


def test_rates_that_change_have_another_version():
    """Where this fails for a change of the figures, raise `VERSION` too."""
    figures = {name: value for name, value in vars(rates).items() if name.isupper()}
    assert f"{zlib.crc32(repr(sorted(figures.items())).encode()):08x}" == "ba92a6b0"


def test_the_range_says_what_it_rests_on():
    assert calibration_of(TARGETS["h100"], fp8=False).source == "calibrated on one H100, 3 steps"
    assert calibration_of(A100, fp8=False).source == "from data sheets and published rates, not measured"
    fp8 = calibration_of(TARGETS["h100"], fp8=True)
    assert fp8.source == "calibrated on one H100, 3 steps in 16 bit; FP8 from published rates, not measured"
    assert fp8.deviation(STEPS[0]) > 2 * calibration_of(TARGETS["h100"], fp8=False).deviation(STEPS[0])
    assert calibration_of(TARGETS["h100"], fp8=False).deviation(STEPS[0]) < 0.7 * calibration_of(
        A100, fp8=False
    ).deviation(STEPS[0])


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 2 is no record"),
        ("[]", "line 2 is no record"),
        ('{"device": "NVIDIA A100-SXM4-80GB"}', "line 2 lacks 'sheet'"),
        (json.dumps(record(STEPS[0], 1.0) | {"sheet": 7}), "line 2 is no record"),
        (json.dumps(record(STEPS[0], 1.0) | {"mlp_matmuls": "fp8"}), "line 2 is no record"),
        ("[" * 100_000, "line 2 is no record"),
        (json.dumps(record(STEPS[0] | {"waits": "0.002"}, 1.0)), "line 2: seconds must be numbers"),
        (json.dumps(record(STEPS[0] | {"waits": True}, 1.0)), "line 2: seconds must be numbers"),
        (json.dumps(record(STEPS[0] | {"waits": -1}, 1.0)), "line 2: seconds must be numbers"),
        (json.dumps(record(dict.fromkeys(STEPS[0], 0), 1.0)), "those of a step from 1e-06"),
        (json.dumps(record(STEPS[0], float("nan"))), "at most 1e[+]06"),
        (json.dumps(record(STEPS[0], 0)), "those of a step from 1e-06"),
        (json.dumps(record(STEPS[0], 1e-320)), "those of a step from 1e-06"),
        (json.dumps(record(STEPS[0], 1e300)), "at most 1e[+]06"),
        (json.dumps(record(STEPS[0] | {"waits": 10**400}, 1.0)), "at most 1e[+]06"),
        (json.dumps(record(STEPS[0], 1.0, device=7)), "line 2 is no record"),
        (json.dumps(record(STEPS[0], 1.0) | {"rates": 0}), "line 2 was planned with version 0 of the rates"),
        ("\n{", "line 3 is no record"),  # blank lines count
    ],
)
def test_a_bad_line_is_named(path, line, said):
    append_record(path, record(STEPS[0], 1.0))
    with open(path, "a") as file:
        file.write(line + "\n")
    with pytest.raises(UserError, match=said) as error:
        read_calibration(path, A100, fp8=False)
    assert "\n" not in str(error.value)


def test_no_file(path):
    with pytest.raises(UserError, match="cannot be read"):
        read_calibration(path, A100, fp8=False)
    Path(path).touch()
    with pytest.raises(UserError, match="is empty; measure steps by visionfm bench --compare-plan"):
        read_calibration(path, A100, fp8=False)


def test_a_line_that_was_cut_off_costs_no_other(path):
    Path(path).write_text('{"device": "NVIDIA A1')
    append_record(path, record(STEPS[0], 1.0))
    with pytest.raises(UserError, match="line 1 is no record"):
        read_calibration(path, A100, fp8=False)
    Path(path).write_text(Path(path).read_text().partition("\n")[2])
    assert read_calibration(path, A100, fp8=False).source.endswith("1 measured step")


TINY = CompiledStep(
    platform="cuda", parameters={}, state={"weights": 0}, weights_in_use=0, gradients=0, checkpoint_host_bytes=0,
    step_flops=1.0, total_steps=1, batch_size=1, peak=0, arguments=0, seconds=1.0, hlo="",
)  # fmt: skip
HLO = """HloModule jit_step, is_scheduled=true, num_partitions=1

ENTRY %main.1 (a: bf16[4096,4096]) -> bf16[4096,4096] {
  %a = bf16[4096,4096]{1,0} parameter(0)
  ROOT %dot = bf16[4096,4096]{1,0} dot(%a, %a), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
"""


def test_bench_writes_what_plan_reads(monkeypatch, path):
    """The step of a stand-in for a GPU: its name, and a program as XLA compiles for one."""
    step = SimpleNamespace(as_text=lambda: HLO, memory_analysis=lambda: SimpleNamespace(
        peak_memory_in_bytes=2**30, argument_size_in_bytes=2**20))  # fmt: skip
    monkeypatch.setattr(bench, "described", lambda trainer, compiled, *_: replace(
        TINY, hlo=compiled.as_text(), peak=compiled.memory_analysis().peak_memory_in_bytes))  # fmt: skip
    names = ("devices", "config", "batch_size", "accumulate", "precision", "stage", "attention", *bench.NETWORK)
    figures = dict.fromkeys(names) | {
        "device": "NVIDIA A100-SXM4-80GB",
        "mlp_matmuls": {"model": "compute"},
        "jax": jax.__version__,
    }
    plan = bench.planned(None, step, Cluster(A100, 1, 1))
    low, high = plan["range_ms"]
    assert low < 1e3 * sum(plan["seconds"].values()) < high
    figures |= {"step_ms": {"p50": 0.66}, "peak_gib_measured": 1.1, "plan": plan}
    append_record(path, bench.record_of(figures))
    assert json.loads(Path(path).read_text())["planned_peak_gib"] == 1.0
    assert seconds(read_calibration(path, A100, fp8=False), plan["seconds"]) == pytest.approx(0.66e-3, rel=0.03)


def test_machines_are_counted_by_the_hosts_of_their_processes():
    assert bench.count_machines(["a"]) == 1
    assert bench.count_machines(["a"] * 8) == 1  # a process for each GPU
    assert bench.count_machines(["a"] * 8 + ["b"] * 8) == 2
    assert bench.count_machines(["a", "b", "c"]) == 3  # a process for each machine
    for uneven in (["a", "b", "a", "b"], ["a", "a", "b"]):
        with pytest.raises(UserError, match=r"1 on b.*neighbours, on each machine; start them so"):
            bench.count_machines(uneven)


@pytest.fixture
def on_a_gpu(monkeypatch):
    """`bench` as on eight GPUs of a machine, one process each, without a step."""
    a100 = SimpleNamespace(platform="gpu", device_kind="NVIDIA A100-SXM4-80GB")
    monkeypatch.setattr(bench.cluster, "initialize", lambda: (0, 1))
    monkeypatch.setattr(bench.jax, "devices", lambda: [a100])
    monkeypatch.setattr(bench.jax, "device_count", lambda: 8)
    monkeypatch.setattr(bench, "from_each", lambda own: [own] * 8)
    monkeypatch.setattr(bench, "record_of", lambda figures: figures)
    monkeypatch.setattr(bench, "measure", lambda *_, compare, **__: {"cluster": compare.name})
    return monkeypatch


def test_a_process_for_each_gpu_is_one_machine_to_a_plan(on_a_gpu, path):
    assert entry_point(bench.main)(["--config=quickstart", f"--compare-plan={path}"]) == 0
    assert json.loads(Path(path).read_text()) == {"cluster": "a100-80gb:1x8"}


def test_the_first_process_alone_opens_the_file(on_a_gpu, capsys, tmp_path):
    words = ["--config=quickstart", f"--compare-plan={tmp_path / 'no' / 'folder'}"]
    assert entry_point(bench.main)(words) == 2
    assert "No such file or directory; name a file that can be written" in capsys.readouterr().err
    on_a_gpu.setattr(bench.cluster, "initialize", lambda: (1, 8))
    assert entry_point(bench.main)(words) == 0


def test_a_full_disk_does_not_lose_a_measurement(on_a_gpu, capsys):
    assert entry_point(bench.main)(["--config=quickstart", "--compare-plan=/dev/full"]) == OutputError.exit_code
    out, error = capsys.readouterr()
    assert json.loads(out) == {"cluster": "a100-80gb:1x8"}
    assert "--compare-plan=/dev/full: No space left on device; make room" in error


def test_bench_refuses_a_kernel_that_the_devices_lack(capsys):
    words = ["--config=quickstart", "--config.train.precision=bf16", "--config.model.attention=cudnn"]
    assert entry_point(bench.main)(words) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "config.model.attention = 'cudnn': needs a GPU of NVIDIA, and the step runs on cpu; set it to auto" in line


def test_a_card_of_ones_own_can_be_measured(on_a_gpu, capsys, path, tmp_path):
    own = SimpleNamespace(platform="gpu", device_kind="NVIDIA L40S")
    on_a_gpu.setattr(bench.jax, "devices", lambda: [own])
    words = ["--config=quickstart", f"--compare-plan={path}"]
    assert entry_point(bench.main)(words) == 2
    assert "runs on NVIDIA L40S, which is none of a100-40gb, " in capsys.readouterr().err
    (tmp_path / "own.toml").write_text('[l40s]\nlike = "h100"\ndescription = "NVIDIA L40S"\n')
    assert entry_point(bench.main)([*words, f"--targets={tmp_path / 'own.toml'}"]) == 0
    assert json.loads(Path(path).read_text()) == {"cluster": "l40s:1x8"}
    assert entry_point(bench.main)([words[0], f"--targets={tmp_path / 'own.toml'}"]) == 2
    assert "--targets: is for --compare-plan" in capsys.readouterr().err


def test_bench_refuses_to_compare_what_no_plan_is_for(monkeypatch, capsys, path):
    monkeypatch.setattr(bench, "measure", None)
    assert entry_point(bench.main)(["--config=quickstart", f"--compare-plan={path}"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert f"--compare-plan={path}: the step runs on cpu, for which there is no plan; run it on a GPU" in line
