"""Aurora's step of several micro-batches as XLA compiles it for GPUs: what travels, how often, and what is left out."""

from __future__ import annotations

import re
from collections import Counter

import jax
import pytest
from compiled_step import Compiled, elements

from visionfm_jax.config import (
    Config,
    DataConfig,
    OptimConfig,
    ParallelConfig,
    TrainConfig,
)
from visionfm_jax.data.sources.kinds import TfdsConfig
from visionfm_jax.models.aurora import AuroraConfig
from visionfm_jax.models.backbones.swin_v2 import SwinV2Config
from visionfm_jax.models.decoder import DecoderConfig
from visionfm_jax.parallel.hlo import Instruction
from visionfm_jax.parallel.mesh import make_mesh
from visionfm_jax.parallel.targets import find_cluster
from visionfm_jax.parallel.zero import matrix_rank
from visionfm_jax.planning.compiled import GPU, compile_step
from visionfm_jax.tasks.multimodal import MultimodalConfig
from visionfm_jax.train.step import Trainer

GPUS, MICRO_BATCHES = 8, 8
PAIRS, BARE = 24, 8  # in a GPU's micro-batch
WIDTH, WORDS = 40, 328  # of the joint space, of the vocabulary
BATCH = GPUS * MICRO_BATCHES * (PAIRS + BARE)
EMBEDDINGS = 2 * GPUS * MICRO_BATCHES * PAIRS * WIDTH


def small(stage: int) -> Config:
    config = Config(
        name="small",
        model=AuroraConfig(
            image=SwinV2Config(size="P", image_size=32, window=2, drop_path=0.0),
            text=DecoderConfig(size="P", vocab_size=WORDS, context=7),
            embed_dim=WIDTH,
        ),
        task=MultimodalConfig(tokenizer="-", pair_ratio=(3, 1), mask_unit=8),
        data=DataConfig(train=(TfdsConfig(path="-"),)),
        optim=OptimConfig(warmup_steps=2),
        parallel=ParallelConfig(stage=stage),
        train=TrainConfig(batch_size=BATCH, accumulate=MICRO_BATCHES, steps=20, precision="bf16"),
    )
    config.validate()
    return config


@pytest.fixture(scope="module")
def step(quick_gpu_compiles) -> Compiled:
    cluster = find_cluster("h100:1x8")
    return Compiled(compile_step(small(stage=2), cluster, GPU), cluster)


@pytest.fixture(scope="module")
def sizes() -> Counter:
    """Parameters: matrices and vectors."""
    found: Counter = Counter()
    params = Trainer(small(stage=0), make_mesh(1, jax.devices()[:1])).shapes.params
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        found["vectors" if matrix_rank(path, leaf) < 2 else "matrices"] += leaf.size
    return found


def passes(step: Compiled) -> list[Instruction]:
    """The loops over micro-batches: to embed, and to learn."""
    entry = step.module.computations[step.module.entry]
    return [i for i in entry.values() if i.opcode == "while" and i.trips == MICRO_BATCHES]


def flops(step: Compiled, loop: Instruction, *, backward: bool) -> Counter:
    """Of one micro-batch, by the way through the model."""
    found: Counter = Counter()
    for instruction, inside, times in step.module.instructions(loop.body):
        if instruction.opcode != "while" and ("transpose(" in instruction.source) == backward:
            way = re.search(r"Aurora\.(\w+)|$", instruction.source)[1]
            found[way] += times * sum(step.module.flops(instruction, inside).values())
    return +found


def test_every_weight_is_gathered_once_a_step(step, sizes):
    assert step.parameters == sizes["matrices"] + sizes["vectors"]
    assert step.elements("all-gather", "bf16") == sizes["matrices"]
    assert "all-gather" not in {c.kind for c in step.in_loops}
    assert step.step.weights_in_use == 2 * sizes["matrices"]


def test_gradients_are_scattered_in_every_micro_batch(step, sizes):
    assert step.elements("reduce-scatter", "bf16") == MICRO_BATCHES * sizes["matrices"]
    assert {(c.kind, c.count, c.is_async) for c in step.in_loops} == {("reduce-scatter", MICRO_BATCHES, True)}
    assert {a.dtype for c in step.in_loops for a in c.arrays} == {"bf16"}
    assert step.step.gradients == 4 * (sizes["matrices"] // GPUS + sizes["vectors"])
    carried = sum(elements(a) for a in passes(step)[1].outputs if a.dtype == "f32")
    assert carried < sizes["matrices"] // GPUS + 3 * sizes["vectors"] + EMBEDDINGS  # vectors and their gradients


def test_nothing_else_travels_but_vectors_and_embeddings(step, sizes):
    assert {c.kind for c in step.collectives} == {"all-reduce", "all-gather", "reduce-scatter"}
    assert step.elements("all-reduce", "bf16") == 0
    assert sizes["vectors"] <= step.elements("all-reduce", "f32") < sizes["vectors"] + 300  # and norms of tensors
    assert step.elements("all-gather", "f32") == EMBEDDINGS + BATCH  # and losses
    assert step.elements("reduce-scatter", "f32") == EMBEDDINGS


def test_the_first_pass_makes_embeddings_and_nothing_else(step):
    part = small(stage=2).model.flops()
    loop = passes(step)[0]
    found = flops(step, loop, backward=False)
    found.pop(None, None)  # where XLA lost the name: 1 %
    assert found == {
        "encode": pytest.approx(PAIRS * part["encoder"], rel=0.02),
        "encode_text": pytest.approx(PAIRS * part["unimodal"], rel=0.02),
        "embed_image": pytest.approx(PAIRS * part["pool"], rel=0.02),
        "embed_text": pytest.approx(PAIRS * part["text_projection"], rel=0.02),
    }
    assert not flops(step, loop, backward=True)
    arrays = [a for i, _, _ in step.module.instructions(loop.body) if i.opcode != "while" for a in i.outputs]
    assert not [a for a in arrays if WORDS in a.shape[1:]]  # logits; the table of words begins by them


def test_the_second_pass_sees_every_image_once_and_every_text_twice(step):
    part = small(stage=2).model.flops(readings=2)
    found = flops(step, passes(step)[1], backward=False)
    assert {way: found[way] for way in ("encode", "reconstruct", "encode_text", "decode_text")} == {
        "encode": pytest.approx((PAIRS + BARE) * part["encoder"], rel=0.02),
        "reconstruct": pytest.approx(BARE * part["reconstruction"], rel=0.02),
        "encode_text": pytest.approx(PAIRS * part["unimodal"], rel=0.02),
        "decode_text": pytest.approx(PAIRS * part["multimodal"], rel=0.02),
    }
