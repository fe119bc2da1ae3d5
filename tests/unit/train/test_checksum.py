"""Checksums of arrays on devices."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from visionfm_jax.parallel.mesh import make_mesh
from visionfm_jax.train import checksum
from visionfm_jax.train.checksum import _program, checksums, host_sums, mixed_sums


def test_the_mesh_does_not_matter():
    x = np.random.default_rng(0).normal(size=(16, 8, 3)).astype(np.float32)
    here = jax.device_put(x, jax.devices()[5])
    laid_out = [
        jax.device_put(x, NamedSharding(make_mesh(replicas), PartitionSpec(*spec)))
        for replicas, spec in [(1, ("fsdp",)), (2, (None, "fsdp")), (4, (("replica", "fsdp"),)), (8, ())]
    ]
    found = [checksums({"x": y})["x"] for y in (here, *laid_out)]
    for y in laid_out:
        ((a, b),) = _program(y.sharding.mesh)([y])  # that of devices with a memory of their own
        found.append(f"{a:08x}{b:08x}")
    assert len(set(found)) == 1
    index = np.arange(x.size, dtype=np.uint32)  # the definition, in NumPy
    place = index * np.uint32(0x9E3779B9)
    mixed = x.ravel().view(np.uint32) ^ place
    mixed = (mixed ^ (mixed >> 16)) * np.uint32(0x7FEB352D)
    mixed = (mixed ^ (mixed >> 15)) * np.uint32(0x846CA68B)
    mixed ^= mixed >> 16
    sums = [v.sum(dtype=np.uint32) for v in (mixed, mixed * (place | np.uint32(1)))]
    assert found[0] == "".join(f"{s:08x}" for s in sums)


@pytest.mark.parametrize("dtype", [np.float32, np.int32, jnp.bfloat16, np.uint8, np.bool_])
def test_every_single_bit_counts_and_so_does_the_place(dtype):
    rng = np.random.default_rng(1)
    x = np.asarray(rng.integers(0, 2 if dtype == np.bool_ else 100, (5, 3)), dtype)
    sums = jax.jit(mixed_sums)

    def of(array: np.ndarray) -> tuple[int, ...]:
        found = tuple(np.asarray(sums(array)).tolist())
        assert host_sums(array) == found
        return found

    seen = {of(x)}
    for bit in [0] if dtype == np.bool_ else range(8 * x.dtype.itemsize):
        other = x.copy()
        raw = other.view(np.uint8).reshape(-1)
        raw[7 * x.dtype.itemsize + bit // 8] ^= 1 << bit % 8
        seen.add(of(other))
    assert len(seen) == 2 if dtype == np.bool_ else 1 + 8 * x.dtype.itemsize
    swapped = x.copy()
    a, b = np.flatnonzero(x.ravel() != x.ravel()[0])[0], 0
    swapped.ravel()[[a, b]] = x.ravel()[[b, a]]
    assert of(swapped) != of(x)


def test_values_that_compare_equal_are_told_apart():
    """0.0 and -0.0 are equal, NaN is not equal to itself: a checksum is one of bits."""
    zero, nan = jnp.zeros(4), jnp.full(4, jnp.nan)
    assert checksums({"x": zero}) != checksums({"x": -zero})
    assert checksums({"x": nan}) == checksums({"x": nan})
    assert checksums({"a": {"b": (jnp.zeros((), jnp.int32),)}}).keys() == {"a.b.0"}


@pytest.mark.parametrize("shape", [(), (0,), (1,), (7,), (3, 5, 2)])
def test_the_host_adds_in_blocks(monkeypatch, shape):
    monkeypatch.setattr(checksum, "_BLOCK", 4)
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    assert host_sums(x) == tuple(np.asarray(mixed_sums(x)).tolist())
