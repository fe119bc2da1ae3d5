"""The contrastive step as XLA compiles it for GPUs: what a device holds of the global batch's logits; the full size."""

from __future__ import annotations

import functools
import math
from pathlib import Path

import jax
import pytest
from compiled_step import Compiled, elements

from visionfm_jax.config import Config, DataConfig, OptimConfig, ParallelConfig, TrainConfig
from visionfm_jax.config.load import from_arguments
from visionfm_jax.data.sources.kinds import TfdsConfig
from visionfm_jax.models.backbones.swin_v2 import SwinV2Config
from visionfm_jax.models.clip import ClipConfig
from visionfm_jax.models.text import TextConfig
from visionfm_jax.parallel.mesh import make_mesh
from visionfm_jax.parallel.targets import MEMORY_FRACTION, find_cluster
from visionfm_jax.parallel.zero import is_scanned, matrix_rank
from visionfm_jax.planning.compiled import GPU, compile_step
from visionfm_jax.planning.estimate import estimate
from visionfm_jax.tasks.contrastive import ContrastiveConfig
from visionfm_jax.train.step import Trainer

pytestmark = pytest.mark.usefixtures("quick_gpu_compiles")

CONFIGS = Path(__file__).parents[2] / "configs"
ROWS, WIDTH = 10, 40  # pairs on a device, and of the joint space
CLUSTERS = {8: "h100:1x8", 256: "h100:32x8"}


def small(devices: int) -> Config:
    config = Config(
        name="small",
        model=ClipConfig(
            image=SwinV2Config(size="P", image_size=32, window=2, drop_path=0.0, remat="full"),
            text=TextConfig(size="P", context=7),
            embed_dim=WIDTH,
        ),
        task=ContrastiveConfig(mixup=0.2),
        data=DataConfig(train=(TfdsConfig(path="-", caption_key="caption"),)),
        optim=OptimConfig(warmup_steps=2),
        parallel=ParallelConfig(stage=0),
        train=TrainConfig(batch_size=ROWS * devices, steps=20, precision="bf16"),
    )
    config.validate()
    return config


@functools.cache
def compiled(devices: int) -> Compiled:
    cluster = find_cluster(CLUSTERS[devices])
    return Compiled(compile_step(small(devices), cluster, GPU), cluster)


def test_fp16_compiles_where_a_map_is_a_single_place():
    config, _ = from_arguments([f"--config={CONFIGS / 'swinv2_g_clip.py'}:tiny"])
    config.model.image.depths = (1, 1, 1, 1)  # the last has one place, whose attention is a product with a vector
    assert config.train.precision == "fp16"
    step = compile_step(config, find_cluster("h100:1x1"), GPU)
    assert Compiled(step, find_cluster("h100:1x1")).arrays()


def shapes(devices: int) -> set[tuple[int, ...]]:
    return {tuple(d for d in a.shape if d > 1) for a in compiled(devices).arrays()}


@pytest.mark.parametrize("devices", CLUSTERS)
def test_logits_of_a_device_are_its_rows_against_all(devices):
    everybody = ROWS * devices
    assert {(ROWS, everybody), (everybody, ROWS)} & shapes(devices)
    assert (everybody, everybody) not in shapes(devices)
    assert everybody**2 not in map(math.prod, shapes(devices))


def test_nothing_that_more_devices_bring_is_larger_than_all_embeddings():
    brought = shapes(256) - shapes(8)  # a device's rows are as many, so all else is as large
    assert max(map(math.prod, brought)) == ROWS * 256 * WIDTH


def test_every_stage_recomputes_even_those_of_one_group():
    """Products of the backward pass that XLA found in the forward pass would be kept, whatever `remat` says."""
    module = compiled(8).module
    products = [i.source for i, inside, _ in module.instructions() if module.flops(i, inside)]
    again = [source for source in products if "rematted_computation" in source]
    for stage in range(4):
        assert any(f"stage{stage}/" in source and "mlp/fc1" in source for source in again)


def test_memory_grows_linearly_with_the_global_batch():
    few, many = (compiled(devices).step for devices in (8, 256))
    grown = (many.peak - many.arguments) - (few.peak - few.arguments)
    per_pair = grown / (many.batch_size - few.batch_size)
    assert per_pair < 4 * (8 * ROWS + 8 * WIDTH)  # bytes: some logits and embeddings; a square's would be 10,560


@functools.cache
def full(name: str) -> Compiled:
    """A shipped configuration on the cluster that it is made for."""
    config, _ = from_arguments([f"--config={CONFIGS / name}"])
    cluster = find_cluster("a100-80gb:16x8")
    return Compiled(compile_step(config, cluster, GPU), cluster)


@functools.cache
def sizes(name: str) -> dict[str, int]:
    """Parameters: matrices of scanned blocks, other matrices, vectors."""
    config, _ = from_arguments([f"--config={CONFIGS / name}"])
    config.parallel.stage = 0
    params = Trainer(config, make_mesh(1, jax.devices()[:1])).shapes.params
    found = {"blocks": 0, "others": 0, "vectors": 0}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        kind = "vectors" if matrix_rank(path, leaf) < 2 else "blocks" if is_scanned(path) else "others"
        found[kind] += leaf.size
    return found


@pytest.mark.full_size
@pytest.mark.timeout(1800)
def test_full_size_step():
    """At 640 px; `docs/plan.md` has what the same compile shows at 224."""
    name, pairs, side, window = "swinv2_g_clip_640.py", 32, 160, 20
    step, count = full(name), sizes(name)
    assert step.parameters == sum(count.values()) == pytest.approx(3.36e9, rel=2e-3)
    assert step.step.batch_size == 128 * pairs
    assert step.step.peak < MEMORY_FRACTION * step.cluster.target.memory_bytes
    assert step.state_bytes - 12 * count["vectors"] == pytest.approx(12 * step.parameters / 128, rel=0.01)

    matrices = count["blocks"] + count["others"]
    assert step.elements("all-gather", "f16") == matrices + count["blocks"]
    assert step.elements("reduce-scatter", "f16") == matrices
    assert step.elements("all-reduce", "f16") == 0
    weights = step.elements("all-gather", "f16") + step.elements("reduce-scatter", "f16")
    assert weights == pytest.approx(3 * step.parameters, rel=0.05)

    everybody, tokens = step.step.batch_size, window**2
    arrays = list(step.arrays())
    assert ("f32", (pairs, everybody)) in arrays  # logits of this device's rows
    pairs_of_tokens = [a for a in arrays if a.shape.count(tokens) >= 2]
    assert pairs_of_tokens  # the bias, for every window and head of the first stage at most, never for every image
    assert max(map(elements, pairs_of_tokens)) == (side // window) ** 2 * 16 * tokens**2
    found = estimate(step.step, step.cluster)
    assert found.exposed < 0.05 * found.seconds
