import os
import re
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import jax
import pytest

from visionfm_jax.errors import ConfigError
from visionfm_jax.parallel.targets import (
    BOUNDS,
    MEMORY_FRACTION,
    TARGETS,
    XLA_FLAGS,
    Cluster,
    Target,
    find_cluster,
    find_target,
    peak_flops,
    pipelined,
    read_targets,
    xla_flags,
)

ROOT = Path(__file__).parents[3]


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
    # Memory of the card, of the network inside a host, and of that between hosts: each about ten times the next.
    assert 3 < target.memory_bandwidth / target.network_inside < 12
    assert 5 < target.network_inside / target.network_between < 20
    # A core multiplies and adds twice per unit and cycle in fp32; tensor cores are 10 to 40 times as fast.
    plain = 2 * target.cores * target.fpus_per_core * target.clock_ghz * 1e9
    assert 10 < target.peak_flops / plain < 40
    assert 2**25 < target.l2_bytes < 2**28
    assert 2**17 < target.shared_memory_per_core <= 2**18
    assert target.capability >= (8, 0)


@pytest.mark.parametrize(
    ("spec", "hosts", "per_host"), [("h100:4x8", 4, 8), ("h100:1x1", 1, 1), ("h100", 1, 1), ("h100:16x10", 16, 10)]
)
def test_clusters_by_name(spec, hosts, per_host):
    cluster = find_cluster(spec)
    assert cluster == Cluster(TARGETS["h100"], hosts, per_host)
    assert cluster.devices == hosts * per_host
    assert find_cluster(cluster.name) == cluster


@pytest.mark.parametrize(
    "counts",
    ["4x", "x8", "0x8", "4x0", "4x8x2", "-4x8", "4*8", "4 x 8", "4.0x8", "32", "9999999999x9", "9" * 5000 + "x8"],
    ids=range(12),
)
def test_counts_that_name_no_cluster(counts):
    with pytest.raises(ConfigError) as error:
        find_cluster(f"h100:{counts}")
    assert str(error.value).endswith(
        ": write hosts x GPUs per host after the colon, at most 131072 GPUs, such as h100:4x8"
    )
    assert str(error.value).startswith(f"--cluster=h100:{counts[:10]}")


def test_an_unknown_target_is_told_its_nearest():
    with pytest.raises(ConfigError) as error:
        find_cluster("a100-80g:1x8")
    assert str(error.value) == (
        "--cluster=a100-80g:1x8: no data sheet named 'a100-80g'; there is a100-40gb, a100-80gb, h100, h200, b200; "
        "did you mean a100-80gb?"
    )


def test_an_unknown_target_without_a_near_one():
    with pytest.raises(ConfigError, match=r"named 'tpu'; there is a100-40gb, .*b200$"):
        find_cluster("tpu:1x8")


FULL = """
description = "Own chip"
peak_flops = 5e14
memory_bytes = 64e9
memory_bandwidth = 2_000_000_000_000
network_inside = 2e11
network_between = 25e9
capability = [9, 0]
cores = 100
fpus_per_core = 128
clock_ghz = 2
l2_bytes = 50_000_000
shared_memory_per_core = 233472
"""


QUOTES = "a text in quotes, without quotes and backslashes in it"


def read(folder, text):
    path = folder / "targets.toml"
    path.write_text(text)
    return read_targets(str(path))


def test_a_sheet_like_another(tmp_path):
    targets = read(tmp_path, '[slow]\nlike = "h100"\nnetwork_between = 12.5e9\n')
    assert targets == TARGETS | {"slow": replace(TARGETS["h100"], name="slow", network_between=12.5e9)}
    assert find_cluster("slow:2x4", targets).target.network_between == 12.5e9
    assert "slow" not in TARGETS


def test_a_sheet_like_one_above_it_and_one_in_place_of_a_built_in(tmp_path):
    targets = read(tmp_path, '[a]\nlike = "h100"\ncores = 66\n[b]\nlike = "a"\n[h100]\nlike = "h200"\n')
    assert targets["b"] == replace(TARGETS["h100"], name="b", cores=66, description="a (like NVIDIA H100 80GB HBM3)")
    assert targets["h100"] == replace(TARGETS["h200"], name="h100")


def test_another_chip_is_not_called_what_it_is_like(tmp_path):
    targets = read(
        tmp_path,
        '[memory]\nlike = "h100"\nmemory_bytes = 96e9\n[chip]\nlike = "h100"\ncores = 99\n'
        '[named]\nlike = "h100"\ncores = 99\ndescription = "NVIDIA H99"\n',
    )
    names = {name: targets[name].description for name in ("memory", "chip", "named")}
    assert names == {
        "memory": "NVIDIA H100 80GB HBM3",
        "chip": "chip (like NVIDIA H100 80GB HBM3)",
        "named": "NVIDIA H99",
    }
    assert find_target("NVIDIA H99", targets) is targets["named"]
    assert find_target("NVIDIA H100 80GB HBM3", targets) is targets["memory"]  # as its maker asks for it
    assert find_target("NVIDIA H99") is None


def test_the_file_and_the_table_of_the_documents(tmp_path):
    page = (ROOT / "docs/plan.md").read_text().partition("## Cards and networks of your own")[2].partition("\n## ")[0]
    block = re.search(r"(?m)(^    .*\n|^\n)+", page.partition("plan on other hardware:\n")[2])[0]
    targets = read(tmp_path, re.sub(r"(?m)^    ", "", block))
    assert find_target("NVIDIA L40S", targets) is targets["l40s"]
    fields = {
        field: value for field, value in re.findall(r"(?m)^\| `(\w+)` \|.*\| ([^|]+) \|$", page) if field != "like"
    }
    assert set(fields) == set(asdict(TARGETS["h100"])) - {"name"}
    sheet = "\n".join(f"{field} = {value}" for field, value in fields.items() if field != "description")
    assert read(tmp_path, f"[h]\ndescription = {fields['description'].replace('`', chr(34))}\n{sheet}")["h"] == replace(
        TARGETS["h100"], name="h"
    )


def test_a_full_sheet_of_ones_own(tmp_path):
    own = read(tmp_path, "[own]" + FULL)["own"]
    assert own == Target(
        name="own", description="Own chip", peak_flops=5e14, memory_bytes=64 * 10**9, memory_bandwidth=2e12,
        network_inside=2e11, network_between=25e9, capability=(9, 0), cores=100, fpus_per_core=128, clock_ghz=2.0,
        l2_bytes=50_000_000, shared_memory_per_core=233472,
    )  # fmt: skip
    # In the fields' types whatever the file wrote: the compiler is told 64000000000, not 6.4e10.
    assert {k: type(v) for k, v in asdict(own).items()} == {k: type(v) for k, v in asdict(TARGETS["h100"]).items()}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('["a:b"]\nlike = "h100"', r"\['a:b'\] must be of letters, digits, _, - and \.; call it otherwise"),
        ('[""]\nlike = "h100"', r"\[''\] must be of letters, .*"),
        (
            '[x]\nlike = "h100"\ncores = 1' + 400 * "0",
            r"\[x\] cores = 10+: must be a whole number from 1 to 100000; that of h100 is 132",
        ),
        ("[x]\ncores = 1" + 5000 * "0", "cannot be read as TOML: Exceeds the limit.*"),
        ("x = " + 3000 * "[", "cannot be read as TOML: .*"),
        ('[x]\nlike = "h100"\nflops = 1e15', r"\[x\] has 'flops'; the fields are capability, clock_ghz, .*"),
        ('[x]\nlike = "h100"\nname = "y"', r"\[x\] has 'name'; the fields are .*"),
        ("[x]" + FULL.replace("cores = 100\n", ""), r"\[x\] lacks cores; or add like = \"h100\""),
        ("[x]\ncores = 9", r"\[x\] lacks capability, clock_ghz, description, .*"),
        ('[x]\nlike = "h10"', r"\[x\] is like 'h10', which is none of a100-40gb, .*b200"),
        ('[x]\nlike = ["h100"]', r"\[x\] is like \['h100'\], which is none of .*"),
        ('like = "h100"\n[x]\ncores = 9', r"like stands outside a table; write \[NAME\] above the fields of one"),
        ("[x\ncores = 9", r"cannot be read as TOML: .*"),
        ('[x]\nlike = "h100"\nlike = "h200"', r"cannot be read as TOML: .*"),
    ],
)
def test_sheets_that_cannot_be_read(tmp_path, text, message):
    with pytest.raises(ConfigError) as error:
        read(tmp_path, text)
    assert re.fullmatch(re.escape(f"--targets={tmp_path}/targets.toml: ") + message, str(error.value))


@pytest.mark.parametrize(
    ("field", "value", "printed"),
    [
        ("peak_flops", "-1e15", "-1000000000000000.0"), ("peak_flops", "0", "0"), ("peak_flops", "nan", "nan"),
        ("peak_flops", "inf", "inf"), ("peak_flops", '"1e15"', "'1e15'"), ("peak_flops", "true", "True"),
        ("peak_flops", "989", "989"), ("memory_bandwidth", "3350", "3350"), ("clock_ghz", "1980", "1980"),
        ("network_between", "[5e10]", "[50000000000.0]"), ("network_between", "{ gbit = 400 }", "{'gbit': 400}"),
    ],
)  # fmt: skip
def test_values_that_are_no_figure_of_a_card(tmp_path, field, value, printed):
    low, high = BOUNDS[field]
    rule = f"[x] {field} = {printed}: must be a number from {low:g} to {high:g}; that of h100 is"
    with pytest.raises(ConfigError, match=re.escape(rule)):
        read(tmp_path, f'[x]\nlike = "h100"\n{field} = {value}')


@pytest.mark.parametrize(
    ("field", "value", "remedy"),
    [
        ("cores", "0.5", "a whole number from 1 to 100000; that of h100 is 132"),
        ("cores", "[132]", "a whole number from 1 to 100000; that of h100 is 132"),
        ("memory_bytes", "inf", "a whole number from 1e+06 to 1e+14; that of h100 is 8e+10"),
        ("memory_bytes", "80", "a whole number from 1e+06 to 1e+14; that of h100 is 8e+10"),
        ("shared_memory_per_core", "10", "a whole number from 16000 to 1e+07; that of h100 is 233472"),
        ("capability", "9.0", "two whole numbers of at most 99, such as [9, 0]"),
        ("capability", "[9]", "two whole numbers of at most 99, such as [9, 0]"),
        ("capability", "[9, 0.5]", "two whole numbers of at most 99, such as [9, 0]"),
        ("capability", '["9", "0"]', "two whole numbers of at most 99, such as [9, 0]"),
        ("capability", "[100, 0]", "two whole numbers of at most 99, such as [9, 0]"),
        ("description", "100", QUOTES), ("description", '""', QUOTES), ("description", "'a\"b'", QUOTES),
    ],
)  # fmt: skip
def test_values_of_another_type(tmp_path, field, value, remedy):
    with pytest.raises(ConfigError, match=rf"\[x\] {field} = .*: must be {re.escape(remedy)}$"):
        read(tmp_path, f'[x]\nlike = "h100"\n{field} = {value}')


def test_a_file_that_is_missing_or_no_text(tmp_path):
    with pytest.raises(ConfigError, match=r"--targets=.*/none\.toml: cannot be read as TOML: .*No such file"):
        read_targets(str(tmp_path / "none.toml"))
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"bytes\.toml: cannot be read as TOML: "):
        read_targets(str(tmp_path / "bytes.toml"))


def test_flags_are_spelled_as_this_jax_spells_them():
    for old in ("0.10.2", "0.11.2"):
        assert "--xla_gpu_enable_pipelined_all_gather=true" in xla_flags(old)
    for new in ("0.12.0.1", "0.13.0", "1.0.0.dev1"):
        assert "--xla_gpu_pipeline_all_gather=on" in xla_flags(new)
        assert len(xla_flags(new)) == len(xla_flags("0.10.2"))
        assert pipelined("reduce_scatter", new) == "--xla_gpu_pipeline_reduce_scatter=on"
    assert pipelined("reduce_scatter", "0.10.2") == "--xla_gpu_enable_pipelined_reduce_scatter=true"


def test_launchers_without_this_package_say_which_python_they_asked():
    environment = os.environ | {"PYTHON": "/no/python"}
    done = subprocess.run(
        ["bash", "-c", "source launch/env.sh"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "error: launch/env.sh: /no/python cannot say XLA's settings; set PYTHON" in done.stderr


def test_plans_compile_with_what_the_launchers_set():
    environment = {k: v for k, v in os.environ.items() if not k.startswith("XLA_")} | {"PYTHON": sys.executable}
    output = subprocess.run(
        ["bash", "launch/env.sh"], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    ).stdout
    settings = dict(line.split("=", 1) for line in output.splitlines())
    assert settings["XLA_FLAGS"].split() == list(XLA_FLAGS)
    assert float(settings["XLA_PYTHON_CLIENT_MEM_FRACTION"]) == MEMORY_FRACTION
