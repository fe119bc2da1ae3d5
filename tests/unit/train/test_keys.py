"""Augmentation keys follow from (seed, global sample index), whatever the batch size and however long the run."""

import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from visionfm_jax.config.load import load_file
from visionfm_jax.tasks.task import make_task
from visionfm_jax.train.step import sample_keys

ROOT = Path(__file__).resolve().parents[3]

SEED = jax.random.key(3)


def data(step: int, batch: int) -> np.ndarray:
    return np.asarray(jax.random.key_data(sample_keys(SEED, jnp.int32(step), batch)))


def test_the_batch_size_does_not_matter():
    np.testing.assert_array_equal(np.concatenate([data(6, 32), data(7, 32)]), data(3, 64))


@pytest.mark.parametrize(
    ("step", "batch"), [(0, 7), (2**21 - 1, 2048), (2**21, 2048), (2**31 - 1, 65_536), (99_999, 50_000)]
)
def test_the_index_is_exact_beyond_32_bits(step, batch):
    index = step * batch + batch - 1
    key = jax.random.fold_in(jax.random.fold_in(SEED, np.uint32(index >> 32)), np.uint32(index & 0xFFFFFFFF))
    np.testing.assert_array_equal(data(step, batch)[-1], jax.random.key_data(key))


class Applied(Exception):
    """The network was reached."""


@pytest.mark.parametrize("name", ["vit_huge.py", "vit_huge_ade20k.py", "vit_huge_ade20k.py:eomt", "vit_huge_coco.py"])
def test_no_two_draws_of_a_sample_share_a_key(name, monkeypatch):
    """Those of `photometric`, which splits its key into four, among them: a draw must not tell of another."""
    config = load_file(f"{ROOT}/configs/{name}")
    if name == "vit_huge.py":
        config.task.cutmix = 1.0
    task, used = make_task(config, lambda params: params), []
    module = sys.modules[type(task).__module__]

    def spent(*arrays):
        leaves = [a for a in jax.tree.leaves(arrays) if jnp.issubdtype(a.dtype, jax.dtypes.prng_key)]
        used.extend(leaves)
        return leaves

    def augment(images, keys, _):
        spent(jax.vmap(lambda key: jax.random.split(key, 4))(keys).ravel(), keys)
        return images

    def apply(_, *arguments):
        assert spent([a for a in arguments if not isinstance(a, bool)])
        raise Applied

    monkeypatch.setattr(module, "augment", augment)
    monkeypatch.setattr(task, "model", SimpleNamespace(apply=apply))
    if name == "vit_huge.py":
        monkeypatch.setattr(module, "pair_boxes", lambda keys, *_: spent(keys) and jnp.zeros((2, 1, 1), bool))
    batch = {"image": jnp.zeros((2, 4, 4, 3)), "size": jnp.full((2, 2), 4)}
    with pytest.raises(Applied):
        task.loss({}, batch, jax.random.split(SEED), SimpleNamespace(step=jnp.int32(0)))
    rows = np.concatenate([np.asarray(jax.random.key_data(keys)).reshape(-1, 2) for keys in used])
    assert len(rows) >= 2 * (4 + 1 + 1)
    assert len(np.unique(rows, axis=0)) == len(rows)
