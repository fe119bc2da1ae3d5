"""The one mesh of a run, and arrays laid out on it."""

from __future__ import annotations

import os
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from visionfm_jax.errors import ConfigError, one_line, printable
from visionfm_jax.parallel.cluster import take_cpu_without_driver

REPLICA, FSDP = "replica", "fsdp"
DEVICES = (REPLICA, FSDP)  # all axes: inside a step, what to sum over
BATCH = PartitionSpec(DEVICES)  # the first dim of every batch, over all devices
REPLICATED = PartitionSpec()


def make_mesh(replicas: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh (replica, fsdp): `replicas` groups of neighbouring devices, parameters sharded within each.

    Neighbours come first, so that with as many replicas as hosts each weight is gathered inside a host.
    """
    devices = _devices() if devices is None else devices
    if devices[0].platform == "cpu" and len(devices) > 1:
        # jax 0.10 reads steps of several CPU devices back from its compilation cache as programs that compute other
        # losses, and others from run to run.
        jax.config.update("jax_enable_compilation_cache", False)
    return Mesh(np.asarray(devices).reshape(replicas, -1), (REPLICA, FSDP), axis_types=(AxisType.Auto,) * 2)


def _devices() -> list[jax.Device]:
    """All that there are.

    Raises:
      ConfigError: JAX finds none, or not those that JAX_PLATFORMS names.
    """
    take_cpu_without_driver()
    try:
        return jax.devices()
    except (RuntimeError, AssertionError) as error:
        where = f"JAX_PLATFORMS={printable(os.environ.get('JAX_PLATFORMS', ''))}"
        raise ConfigError(
            f"{where}: JAX finds no such device ({one_line(error)}); set cpu, or cuda with the gpu extra"
        ) from error


def to_global(mesh: Mesh, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """The host's rows of a batch, as arrays over all hosts' devices; returns before the copy has ended."""
    sharding = NamedSharding(mesh, BATCH)
    return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()}


def of_all_hosts(numbers: Sequence[int]) -> list[list[int]]:
    """What each host gives, in order of their numbers; to be called on all of them."""
    if jax.process_count() == 1:
        return [[*numbers]]
    halves = np.array(numbers, np.int64).view(np.int32)  # JAX has no 64 bits
    return multihost_utils.process_allgather(halves).view(np.int64).tolist()


def all_rows(x: jax.Array) -> jax.Array:
    """Inside a step, on each device: everybody's rows (G, …) of which these are its own (B, …), in batch order.

    Its derivative sums over devices what each of them makes of a row.
    """
    return jax.lax.all_gather(x, (REPLICA, FSDP), axis=0, tiled=True)


def first_row(rows: int) -> jax.Array:
    """Inside a step, on each device: where its own `rows` begin in `all_rows`."""
    return jax.lax.axis_index((REPLICA, FSDP)) * rows
