"""What a plan counts, of a step that is not compiled."""

import jax

from visionfm_jax.config import load
from visionfm_jax.parallel.mesh import make_mesh
from visionfm_jax.planning.compiled import inputs_of, shard_bytes, state_bytes
from visionfm_jax.train.step import Trainer


def test_all_of_the_state_is_counted_under_its_own_name():
    config = load.load_file("vit_huge_dino:tiny")
    config.task.targets = "centring"
    trainer = Trainer(config, make_mesh(1, jax.devices()[:2]))
    state, batch = inputs_of(trainer, config.train.batch_size)
    found = state_bytes(state, batch, teacher_in_use=1000)
    assert found["teacher"] == found["weights"] + 1000
    assert found["task state"] == sum(map(shard_bytes, state.task_state.values())) > 0
    assert sum(found.values()) == 1000 + sum(map(shard_bytes, jax.tree.leaves((state, batch)))) - 4  # but the step
