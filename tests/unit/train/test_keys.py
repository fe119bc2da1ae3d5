"""Augmentation keys follow from (seed, global sample index), whatever the batch size and however long the run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from visionfm_jax.train.step import sample_keys

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
