"""Checksums of arrays, computed where the arrays are.

They cover the whole way to a disk and back: the host's memory, the store, the transfer. They do not depend on the mesh
or the sharding, so that a state saved on one is verified on any other.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

_BLOCK = 2**20  # words that are mixed at a time on the host
_GOLDEN = 0x9E3779B9  # 2^32 / golden ratio, which spreads consecutive numbers (Knuth, TAOCP 3, 6.4)
_MIX = ((16, 0x7FEB352D), (15, 0x846CA68B))  # lowbias32 of Wellons, "Prospecting for hash functions", 2018


def checksums(tree: Any) -> dict[str, str]:
    """Path (as `name_of` gives it) -> 16 hex digits of every array of `tree`.

    Each array is read once, on its device; only the sums, 8 bytes an array, come to the host. Those in the memory of
    this host are not worth a program, which takes longer to compile than to run.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    arrays = [leaf for _, leaf in leaves]
    if all(x.is_fully_addressable and all(d.platform == "cpu" for d in x.devices()) for x in arrays):
        sums = [host_sums(np.asarray(x)) for x in arrays]
    else:
        mesh = getattr(arrays[0].sharding, "mesh", None)
        sums = jax.device_get(_program(mesh)(arrays))
    return {name_of(path): f"{a:08x}{b:08x}" for (path, _), (a, b) in zip(leaves, sums, strict=True)}


def name_of(path: tuple) -> str:
    """The path of a leaf with dots; the same for dicts, dataclasses and tuples."""
    return ".".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


def mixed_sums(x: jax.Array) -> jax.Array:
    """Two sums modulo 2^32 (2,) over the words of an array of any shape, each word mixed with its place.

    Mixing is invertible, so that a change of one word always shows; one of several is missed with a probability of
    about 2^-60. Sums of integers do not depend on the order, hence not on the sharding.
    """
    bits = x.astype(jnp.uint8) if x.dtype == jnp.bool_ else x
    words = jax.lax.bitcast_convert_type(bits, jnp.dtype(f"uint{8 * bits.dtype.itemsize}")).astype(jnp.uint32)
    index = jnp.zeros(x.shape, jnp.uint32)
    for dim in range(x.ndim):
        stride = np.uint32(math.prod(x.shape[dim + 1 :]) % 2**32)
        index += jax.lax.broadcasted_iota(jnp.uint32, x.shape, dim) * stride
    place = index * np.uint32(_GOLDEN)
    mixed = words ^ place
    for shift, multiplier in _MIX:
        mixed = (mixed ^ (mixed >> shift)) * np.uint32(multiplier)
    mixed ^= mixed >> 16
    return jnp.stack([jnp.sum(v, dtype=jnp.uint32) for v in (mixed, mixed * (place | 1))])


def host_sums(x: np.ndarray) -> tuple[int, int]:
    """As `mixed_sums`."""
    bits = x.astype(np.uint8) if x.dtype == np.bool_ else x
    words = np.ascontiguousarray(bits).reshape(-1).view(f"uint{8 * bits.dtype.itemsize}")
    total = [0, 0]
    for first in range(0, words.size, _BLOCK):
        block = words[first : first + _BLOCK].astype(np.uint32)
        place = np.arange(first, first + block.size, dtype=np.uint64).astype(np.uint32) * np.uint32(_GOLDEN)
        mixed = block ^ place
        for shift, multiplier in _MIX:
            mixed = (mixed ^ (mixed >> np.uint32(shift))) * np.uint32(multiplier)
        mixed ^= mixed >> np.uint32(16)
        for i, v in enumerate((mixed, mixed * (place | np.uint32(1)))):
            total[i] = (total[i] + int(v.sum(dtype=np.uint32))) % 2**32
    return total[0], total[1]


@functools.cache
def _program(mesh: jax.sharding.Mesh | None) -> Any:
    """(arrays on `mesh`) -> (number of arrays, 2), known to every host.

    One program for all arrays: on CPU devices of one process, small programs whose sums cross devices and that are in
    flight together can wait for each other for ever.
    """
    whole = None if mesh is None else NamedSharding(mesh, PartitionSpec())
    return jax.jit(lambda arrays: jnp.stack([mixed_sums(x) for x in arrays]), out_shardings=whole)
