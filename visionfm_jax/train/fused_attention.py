"""Which attention a run computes where its configuration says "auto": cuDNN's fused one, if this GPU runs it.

A kernel that compiles may have no plan for a shape, or none with a driver, which shows when it is first run. So each
that a step has is run once, before the run depends on it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from visionfm_jax.config import Config
from visionfm_jax.errors import complain, one_line

KERNEL = "dot_product_attention"  # in the names of cuDNN's primitives in JAX


def with_attention(config: Config, mesh: Mesh, trace: Callable[[Config], Any]) -> Config:
    """`config`, whose networks with "auto" attention have the kind that the devices of `mesh` run.

    Devices that are only compiled for count as GPUs that run what JAX lets them. Where one does not, a line says why.

    Args:
      config: a valid one.
      mesh: of the run's devices.
      trace: from a configuration without "auto" to the jaxpr of its step.
    """
    names = [name for name, network in config.model.networks().items() if network.attention == "auto"]
    if not names:
        return config
    plain = _with(config, names, "xla")
    device = mesh.devices.flat[0]
    client = device.client
    if device.platform != "gpu" or "rocm" in client.platform_version.lower() or config.train.precision == "fp32":
        return plain
    for name in names:
        try:  # JAX knows of some shapes that there is no kernel of them
            jaxpr = trace(_with(plain, [name], "cudnn"))
            problem = "" if client.runtime_type == "compile_only_runtime" else refused(jaxpr)
        except Exception as error:
            problem = one_line(error)
        if jax.process_count() > 1:  # all hosts run one program
            refusals = multihost_utils.process_allgather(jnp.asarray(bool(problem)))
            problem = problem or ("another host refuses it" if refusals.any() else "")
        if problem and jax.process_index() == 0:
            complain(
                f"config.{name}.attention = auto: XLA's attention is used, as cuDNN's does not run here: {problem}"
            )
        plain = _with(plain, [name], "xla" if problem else "cudnn")
    return plain


def _with(config: Config, names: list[str], kind: str) -> Config:
    config = copy.deepcopy(config)
    for name, network in config.model.networks().items():
        if name in names:
            network.attention = kind
    return config


def refused(jaxpr: Any) -> str:
    """Why one of the attention kernels of a step does not run on a device of this host; empty: all of them do."""
    tried = set()
    for equation in _kernels(jaxpr):
        # A kernel works on samples one by one: one of them shows as much as all, and needs no memory.
        samples = equation.invars[0].aval.shape[0]
        shapes = [_of_one_sample(v.aval, samples) for v in equation.invars]
        key = str((equation.primitive, [(s.shape, s.dtype) for s in shapes], equation.params))
        if key in tried:
            continue
        tried.add(key)
        inputs = [jnp.ones(s.shape, s.dtype) for s in shapes]

        def run(*inputs: jax.Array, equation: Any = equation) -> Any:
            return equation.primitive.bind(*inputs, **equation.params)

        try:
            jax.block_until_ready(jax.jit(run)(*inputs))
        except Exception as error:  # whatever it is, the run goes on without this kernel
            return f"{equation.primitive.name} of {shapes[0].str_short()}: {one_line(error)}"
    return ""


def _of_one_sample(aval: Any, samples: int) -> Any:
    shape = (1, *aval.shape[1:]) if aval.shape[:1] == (samples,) else aval.shape
    return jax.core.ShapedArray(shape, aval.dtype)


def _kernels(jaxpr: Any) -> Iterator[Any]:
    """The equations of cuDNN's attention, also in what the jaxpr calls."""
    for equation in jaxpr.eqns:
        if KERNEL in equation.primitive.name:
            yield equation
            continue
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=_is_jaxpr):
            if _is_jaxpr(value):
                yield from _kernels(getattr(value, "jaxpr", value))


def _is_jaxpr(value: Any) -> bool:
    return hasattr(value, "eqns") or hasattr(value, "jaxpr")
