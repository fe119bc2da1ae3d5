import jax
import pytest

from visionfm_jax.parallel.targets import TARGETS, find_target, peak_flops


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("NVIDIA A100-PCIE-40GB", "a100-40gb"),
        ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
        ("NVIDIA A100 80GB PCIe", "a100-80gb"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA B200", "b200"),
    ],
)
def test_device_kinds_find_their_entry(kind, name):
    assert find_target(kind) is TARGETS[name]
    assert peak_flops(kind) == TARGETS[name].peak_flops


@pytest.mark.parametrize(
    "kind",
    [
        "cpu", "", "NVIDIA GeForce RTX 4090", "Tesla V100-SXM2-16GB", "NVIDIA GH200 480GB", "NVIDIA GB200",
        "NVIDIA H100 PCIe", "NVIDIA H100 NVL", "NVIDIA H200 NVL", "NVIDIA A100-SXM4-80GB MIG 3g.40gb",
    ],
)  # fmt: skip
def test_other_boards_get_no_figure(kind):
    assert peak_flops(kind) is None


def test_the_devices_here_can_be_asked():
    assert all(peak_flops(device.device_kind) is None for device in jax.devices("cpu"))


@pytest.mark.parametrize("name", TARGETS)
def test_entries_are_in_plausible_units(name):
    target = TARGETS[name]
    assert target.name == name
    assert 1e14 < target.peak_flops < 1e16
    assert 3e10 < target.memory_bytes < 1e12
    assert 100 < target.peak_flops / target.memory_bandwidth < 500  # FLOP per byte where compute and memory balance
