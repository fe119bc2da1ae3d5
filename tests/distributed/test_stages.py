"""ZeRO on eight virtual devices: the same training, other bytes, exactly the collectives of the table."""

import collections
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_run import batches, losses, trainer_on

from visionfm_jax.parallel.mesh import to_global

pytestmark = pytest.mark.usefixtures("quick_compiles")

STEPS = 4


@pytest.fixture(scope="module")
def one_device():
    return losses(trainer_on(1, stage=0), STEPS)


@pytest.mark.parametrize(
    ("stage", "accumulate", "replicas"),
    [(0, 1, 1), (0, 4, 1), (1, 2, 1), (2, 1, 1), (2, 4, 1), (3, 1, 1), (3, 2, 1), (3, 1, 2), (1, 1, 4)],
)
def test_losses_equal_those_of_one_device(one_device, stage, accumulate, replicas):
    expected, norms, state = one_device
    got, got_norms, got_state = losses(trainer_on(8, stage=stage, accumulate=accumulate, replicas=replicas), STEPS)
    np.testing.assert_allclose(got, expected, rtol=2e-6)
    np.testing.assert_allclose(got_norms, norms, rtol=2e-5)
    assert expected[0] != expected[-1]
    # Adam divides by the root of tiny second moments, so weights agree less closely than losses.
    chex.assert_trees_all_close(jax.device_get(got_state.ema), jax.device_get(state.ema), rtol=1e-3, atol=2e-4)


def bytes_on_first_device(tree) -> int:
    device = jax.devices()[0]
    return sum(s.data.nbytes for leaf in jax.tree.leaves(tree) for s in leaf.addressable_shards if s.device == device)


def test_state_bytes_per_device_follow_the_table():
    sizes = {}
    for stage in range(4):
        trainer = trainer_on(8, stage=stage)
        state = trainer.init()
        sizes[stage] = bytes_on_first_device((state.params, state.opt_state))
        parameters = sum(p.size for p in jax.tree.leaves(trainer.shapes.params))
    assert sizes[0] == pytest.approx(12 * parameters, rel=1e-3)  # fp32 weights and two moments
    for stage in (1, 2, 3):  # an eighth of the matrices; vectors whole
        vectors = sum(p.size for p in jax.tree.leaves(trainer_vectors(trainer)))
        assert sizes[stage] == pytest.approx(12 * ((parameters - vectors) / 8 + vectors), rel=1e-3)
        assert sizes[stage] < 0.2 * sizes[0]


def trainer_vectors(trainer) -> list:
    specs = jax.tree.leaves(trainer.zero._specs, is_leaf=lambda s: isinstance(s, jax.sharding.PartitionSpec))
    return [p for p, s in zip(jax.tree.leaves(trainer.shapes.params), specs, strict=True) if "fsdp" not in s]


def collectives(trainer) -> collections.Counter:
    """Collectives that the program asks for, those in loops once: (kind, dtype) -> how many."""
    batch = to_global(trainer.mesh, batches(1)[0])
    text = trainer.step.lower(trainer.shapes, batch).as_text(dialect="hlo")
    counts = collections.Counter()
    for line in text.splitlines():
        if match := re.search(r"= (\w+)\[([\d,]*)\].* (all-gather|reduce-scatter|all-reduce|all-to-all)\(", line):
            counts[match[3], match[1]] += 1
    return counts


def test_collectives_are_those_of_the_table():
    seen = {
        (stage, m): collectives(trainer_on(8, stage=stage, accumulate=m, precision="bf16"))
        for stage in range(4)
        for m in (1, 4)
    }
    matrices = len(jax.tree.leaves(trainer_on(8).shapes.params)) - len(trainer_vectors(trainer_on(8)))
    assert matrices == 7  # embed, pos_embed, qkv, out, fc1, fc2, head
    for stage in range(4):
        assert seen[stage, 1] == seen[stage, 4], "accumulation must not multiply collectives"
        assert not any(kind == "all-to-all" for kind, _ in seen[stage, 1])
        assert seen[stage, 1]["all-gather", "f32"] == 0, "weights travel in 16 bit"
        assert seen[stage, 1]["reduce-scatter", "f32"] == 0
    assert seen[0, 1]["all-gather", "bf16"] == seen[0, 1]["reduce-scatter", "bf16"] == 0
    assert seen[0, 1]["all-reduce", "bf16"] == matrices
    for stage in (1, 2):
        assert seen[stage, 1]["all-gather", "bf16"] == matrices
        assert seen[stage, 1]["reduce-scatter", "bf16"] == matrices
    # Stage 3 gathers the four matrices of a layer again in the backward pass; the three others stay.
    assert seen[3, 1]["all-gather", "bf16"] == matrices + 4
    assert seen[3, 1]["reduce-scatter", "bf16"] == matrices


def test_a_step_that_is_not_finite_changes_nothing_but_its_number():
    trainer = trainer_on(8)
    state = trainer.init()
    before = jax.device_get(state)
    poisoned = state.replace(
        params={**state.params, "norm": jax.tree.map(lambda p: p.at[3].set(jnp.nan), state.params["norm"])}
    )
    poisoned_before = jax.device_get(poisoned)
    after, metrics = trainer.step(poisoned, to_global(trainer.mesh, batches(1)[0]))
    assert not metrics["finite"]
    assert int(after.step) == int(before.step) + 1
    chex.assert_trees_all_equal(jax.device_get(after.replace(step=before.step)), poisoned_before)
