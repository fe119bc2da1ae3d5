"""Data sheets of accelerators and of clusters of them: for MFU, and to plan without having one.

Sources, all NVIDIA; peaks are dense (the sheets print twice that, "with sparsity", from Hopper on):
  a100  "NVIDIA A100 Tensor Core GPU" data sheet: 312 TFLOPS BF16; 40 GB at 1,555 GB/s, 80 GB (SXM) at 2,039 GB/s;
        NVLink 600 GB/s both ways; "NVIDIA A100 Tensor Core GPU Architecture" for the chip
  h100  "NVIDIA H100 Tensor Core GPU" data sheet, SXM5: 1,979 TFLOPS BF16 with sparsity; 80 GB at 3.35 TB/s;
        NVLink 900 GB/s both ways; "NVIDIA H100 Tensor Core GPU Architecture" for the chip
  h200  "NVIDIA H200 Tensor Core GPU" data sheet, SXM: 1,979 TFLOPS BF16 with sparsity; 141 GB at 4.8 TB/s
  b200  "NVIDIA DGX B200" data sheet, an eighth of the system: 4.5 PFLOPS BF16 with sparsity; 180 GB at 8 TB/s;
        NVLink 14.4 TB/s both ways among eight
Power is the TDP that the same sheets state for a GPU: 400, 700, 700 and 1,000 W.
Networks between hosts are those of the makers' own machines: DGX A100 has one 200 Gb/s adapter per GPU, DGX H100,
H200 and B200 one of 400 Gb/s.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib.metadata
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path

from visionfm_jax.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Target:
    """One kind of accelerator."""

    name: str
    description: str  # as the driver names it
    peak_flops: float  # dense bf16 with fp32 accumulation, FLOP/s
    memory_bytes: int  # as sold, in decimal gigabytes; what a program may use differs by a few per cent
    memory_bandwidth: float  # bytes/s
    network_inside: float  # bytes/s per GPU and direction, to GPUs of the same host
    network_between: float  # bytes/s per GPU and direction, to other hosts
    # What XLA's compiler asks of the chip:
    capability: tuple[int, int]  # CUDA compute capability
    cores: int  # streaming multiprocessors
    fpus_per_core: int
    clock_ghz: float
    l2_bytes: int
    shared_memory_per_core: int  # bytes; a block may use 1 KiB less


# What a step of one GPU takes its time from, and how its program is compiled.
CHIP = (
    "peak_flops", "memory_bandwidth", "capability", "cores", "fpus_per_core", "clock_ghz", "l2_bytes",
    "shared_memory_per_core",
)  # fmt: skip
# The least and the most that a data sheet may say, to find units that are wrong.
BOUNDS = {
    "peak_flops": (1e12, 1e18), "memory_bytes": (1e6, 1e14), "memory_bandwidth": (1e9, 1e16),
    "network_inside": (1e6, 1e15), "network_between": (1e6, 1e15), "capability": (0, 99), "cores": (1, 1e5),
    "fpus_per_core": (1, 1e5), "clock_ghz": (0.1, 20), "l2_bytes": (1e4, 1e12),
    "shared_memory_per_core": (16_000, 1e7),
}  # fmt: skip

_A100 = {
    "peak_flops": 312e12, "network_inside": 300e9, "network_between": 25e9,
    "capability": (8, 0), "cores": 108, "fpus_per_core": 64, "clock_ghz": 1.41, "l2_bytes": 40 * 2**20,
    "shared_memory_per_core": 164 * 2**10,
}  # fmt: skip
_H100 = {
    "peak_flops": 989.5e12, "network_inside": 450e9, "network_between": 50e9,
    "capability": (9, 0), "cores": 132, "fpus_per_core": 128, "clock_ghz": 1.98, "l2_bytes": 50 * 2**20,
    "shared_memory_per_core": 228 * 2**10,
}  # fmt: skip
_B200 = {
    "peak_flops": 2250e12, "network_inside": 900e9, "network_between": 50e9,
    "capability": (10, 0), "cores": 148, "fpus_per_core": 128, "clock_ghz": 1.97, "l2_bytes": 126 * 2**20,
    "shared_memory_per_core": 228 * 2**10,
}  # fmt: skip

TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        Target(
            name="a100-40gb", description="NVIDIA A100-SXM4-40GB", memory_bytes=40 * 10**9, memory_bandwidth=1.555e12,
            **_A100,
        ),
        Target(
            name="a100-80gb", description="NVIDIA A100-SXM4-80GB", memory_bytes=80 * 10**9, memory_bandwidth=2.039e12,
            **_A100,
        ),
        Target(
            name="h100", description="NVIDIA H100 80GB HBM3", memory_bytes=80 * 10**9, memory_bandwidth=3.35e12,
            **_H100,
        ),
        Target(name="h200", description="NVIDIA H200", memory_bytes=141 * 10**9, memory_bandwidth=4.8e12, **_H100),
        Target(name="b200", description="NVIDIA B200", memory_bytes=180 * 10**9, memory_bandwidth=8e12, **_B200),
    )
}  # fmt: skip

WATTS = {"a100-40gb": 400, "a100-80gb": 400, "h100": 700, "h200": 700, "b200": 1000}  # thermal design power of a GPU


def pipelined(collective: str, version: str) -> str:
    """XLA's flag to run `collective` of a layer ("all_gather") beside its neighbour, as this version of jax spells it.

    jax 0.12 deprecates the former spelling, which jax 0.10 alone knows.
    """
    numbers = tuple(int(n) for n in re.findall(r"\d+", version)[:2])
    new = numbers >= (0, 12)
    return f"--xla_gpu_pipeline_{collective}=on" if new else f"--xla_gpu_enable_pipelined_{collective}=true"


def xla_flags(version: str) -> tuple[str, ...]:
    """XLA's settings for training with this version of jax: `launch/env.sh` sets them, and a plan compiles with them.

    Not among them, though NVIDIA's JAX-Toolbox and MaxText's scripts set some of these:
      pipelined reduce-scatter, while-loop double buffering (two layers an iteration): not measured on a cluster. Try
        them by `benchmarks/flag_sweep.py`.
      --xla_gpu_enable_triton_gemm=false: on a card, XLA times its own kernels against cuBLAS for each product, and
        takes the faster. A plan, which cannot, assumes cuBLAS.
      --xla_gpu_enable_nccl_user_buffers=true: NCCL then needs no copies inside a host, but the buffers come from a
        pool beside that of XLA, of whose size no plan knows. Try it by `benchmarks/flag_sweep.py`.
    """
    return (
        # Start a collective as early and wait for it as late as its data allow: without this the weight gathers of
        # ZeRO-3 stand between the layers instead of running below them.
        "--xla_gpu_enable_latency_hiding_scheduler=true",
        # Gather the next layer's weights while this one computes: a layer cannot hide the gather of its own. One more
        # layer's weights are held.
        pipelined("all_gather", version),
        # Join the small gathers of one layer (weights, biases, norms) into one of up to 256 MiB: more than a layer
        # of the largest model here in bf16, so each layer pays one latency.
        "--xla_gpu_all_gather_combine_threshold_bytes=268435456",
        # The same for the gradients that are scattered after each layer's backward pass.
        "--xla_gpu_reduce_scatter_combine_threshold_bytes=268435456",
        # And for plain data parallelism (stage 0 and replicas): large, but small enough that the first all-reduce
        # can run while later gradients are still computed.
        "--xla_gpu_all_reduce_combine_threshold_bytes=268435456",
    )


XLA_FLAGS = xla_flags(importlib.metadata.version("jax"))
MEMORY_FRACTION = 0.92  # of a GPU's memory that a run may use: XLA_PYTHON_CLIENT_MEM_FRACTION there

# Slower boards and slices that carry a table entry's name: no figure is better than a wrong one.
_OTHERS = re.compile(r"\b(NVL|MIG|H\d00 PCIe)\b", re.IGNORECASE)


def find_target(device_kind: str, targets: dict[str, Target] = TARGETS) -> Target | None:
    """The entry for a `jax.Device.device_kind`, such as "NVIDIA H100 80GB HBM3"; None if there is none.

    The last with this description, or else that of the built-in table whose name is in its words.
    """
    for target in reversed(targets.values()):
        if target.description == device_kind:
            return target
    if _OTHERS.search(device_kind):
        return None
    words = set(re.split(r"[^a-z0-9]+", device_kind.lower()))  # whole words: GH200 is no H200
    for name, target in TARGETS.items():
        if set(name.split("-")) <= words:
            return target
    return None


def chip_of(target: Target) -> dict[str, float | list[int]]:
    """The figures of `CHIP`, as JSON has them."""
    return {name: list(v) if isinstance(v := getattr(target, name), tuple) else v for name in CHIP}


def sheet_of(target: Target) -> dict[str, float | list[int]]:
    """The figures that the time of a step is planned with, as JSON has them."""
    return {**chip_of(target), "network_inside": target.network_inside, "network_between": target.network_between}


def peak_flops(device_kind: str) -> float | None:
    """Dense bf16 FLOP/s of a `jax.Device.device_kind`; None for CPUs and whatever is not in the table."""
    target = find_target(device_kind)
    return None if target is None else target.peak_flops


def design_power(device_kind: str) -> float | None:
    """Watts of a `jax.Device.device_kind`; None for CPUs, boards for PCIe and whatever is not in the table."""
    target = None if "pcie" in device_kind.lower() else find_target(device_kind)
    return None if target is None else WATTS.get(target.name)


@dataclass(frozen=True)
class Cluster:
    """Equal hosts full of equal accelerators."""

    target: Target
    hosts: int
    per_host: int

    @property
    def devices(self) -> int:
        return self.hosts * self.per_host

    @property
    def name(self) -> str:
        return f"{self.target.name}:{self.hosts}x{self.per_host}"


MOST_GPUS = 2**17  # of a cluster; no plan compiles for more in a person's time


def find_cluster(spec: str, targets: dict[str, Target] = TARGETS) -> Cluster:
    """The cluster of "TARGET:HOSTSxGPUS", such as h100:4x8; "TARGET" alone is one GPU.

    Raises:
      ConfigError: no such target, or no such form.
    """
    name, _, counts = spec.partition(":")
    if name not in targets:
        near = difflib.get_close_matches(name, targets, n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(
            f"--cluster={spec[:60]}: no data sheet named {name[:60]!r}; there is {', '.join(targets)}{hint}"
        )
    match = re.fullmatch(r"([1-9]\d{0,9})x([1-9]\d{0,9})", counts or "1x1")
    if not match or int(match[1]) * int(match[2]) > MOST_GPUS:
        rule = f"write hosts x GPUs per host after the colon, at most {MOST_GPUS} GPUs, such as {name}:4x8"
        raise ConfigError(f"--cluster={spec[:60]}: {rule}")
    return Cluster(targets[name], int(match[1]), int(match[2]))


def read_targets(path: str) -> dict[str, Target]:
    """The built-in table, extended by a TOML file of one table per target.

        [h100-slow-network]
        like = "h100"              # starts from this entry of the table
        network_between = 12.5e9   # and changes fields of `Target`, in its units

    One of another chip than that which it is like, and not in its place, is not described as that one.

    Raises:
      ConfigError: no such file, no TOML, an unknown field, or one that is missing.
    """
    try:
        sheets = tomllib.loads(Path(path).read_text())
    except (OSError, ValueError, RecursionError) as error:  # not only TOML's own errors: numbers of 5,000 digits
        raise ConfigError(f"--targets={path}: cannot be read as TOML: {error}") from error
    known = {f.name for f in dataclasses.fields(Target)} - {"name"}
    targets = dict(TARGETS)
    for name, sheet in sheets.items():
        if not re.fullmatch(r"[\w.-]+", name):  # as --cluster=NAME:4x8 has it
            raise ConfigError(f"--targets={path}: [{name!r}] must be of letters, digits, _, - and .; call it otherwise")
        if not isinstance(sheet, dict):
            raise ConfigError(f"--targets={path}: {name} stands outside a table; write [NAME] above the fields of one")
        like = sheet.pop("like", None)
        if like is not None and like not in list(targets):  # a list: TOML's values need not be hashable
            raise ConfigError(f"--targets={path}: [{name}] is like {like!r}, which is none of {', '.join(targets)}")
        base = targets[like] if like else None
        values = dataclasses.asdict(base) if base else {}
        if unknown := set(sheet) - known:
            fields = ", ".join(sorted(known))
            raise ConfigError(f"--targets={path}: [{name}] has {min(unknown)!r}; the fields are {fields}")
        values |= sheet
        if missing := known - set(values):
            raise ConfigError(f'--targets={path}: [{name}] lacks {", ".join(sorted(missing))}; or add like = "h100"')
        values["name"] = name
        checked = {f.name: _checked(path, name, f.name, f.type, values[f.name]) for f in dataclasses.fields(Target)}
        targets[name] = Target(**checked)
        if base and name != like and "description" not in sheet and chip_of(targets[name]) != chip_of(base):
            # The words of the other one choose its rates.
            targets[name] = dataclasses.replace(targets[name], description=f"{name} (like {base.description})")
    return targets


def _checked(path: str, name: str, field: str, kind: str, value: object) -> object:
    """A field of a sheet in its type, within `BOUNDS`."""
    refused = f"--targets={path}: [{name}] {field} = {value!r}: must be"
    if kind == "str":
        if isinstance(value, str) and re.fullmatch(r'[^"\\\n]+', value):
            return value
        raise ConfigError(f"{refused} a text in quotes, without quotes and backslashes in it")
    whole, (low, high) = kind != "float", BOUNDS[field]  # 80e9 is whole too

    def good(n: object) -> bool:
        is_number = isinstance(n, (int, float)) and not isinstance(n, bool) and low <= n <= high
        return is_number and (not whole or n == int(n))

    if kind.startswith("tuple"):
        if isinstance(value, (list, tuple)) and len(value) == 2 and all(map(good, value)):
            return tuple(map(int, value))
        raise ConfigError(f"{refused} two whole numbers of at most {high}, such as [9, 0]")
    if not good(value):
        rule = f"a {'whole ' * whole}number from {low:g} to {high:g}"
        raise ConfigError(f"{refused} {rule}; that of h100 is {getattr(TARGETS['h100'], field):g}")
    return int(value) if kind == "int" else float(value)


if __name__ == "__main__":  # for launch/env.sh
    print(*XLA_FLAGS)
