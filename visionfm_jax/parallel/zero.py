"""ZeRO (Rajbhandari et al. 2020) for any model: one table, and the collectives that follow from it.

The forward and backward pass run per device (`jax.shard_map`), so every collective of a step is one that stands
here, the same on every backend:

  stage   stored weights, moments   16-bit weights in use            gradients of matrices
  0       whole                     own copy                         summed whole, once a step
  1       sharded                   gathered once a step             summed into shards, once a step
  2       sharded                   gathered once a step             summed into shards, layer by layer
  3       sharded                   gathered per layer, at each use  summed into shards, layer by layer

Weights are cast to the compute dtype before they are gathered, and gradients of matrices are reduced in it:
half the bytes of fp32, as DeepSpeed does; they are accumulated over micro-batches in fp32. Vectors (norms, biases)
are 0.1 % of a model: always whole, reduced once a step, in fp32. Sharding is over the mesh axis `fsdp`; the
axis `replica` (hybrid sharding) adds a sum of the shards, in fp32: beside the backward pass, or, of several
micro-batches, once a step.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from visionfm_jax.errors import ConfigError
from visionfm_jax.parallel.accumulate import GradCache, LossFn, accumulate_gradients, with_grad_cache
from visionfm_jax.parallel.context import Context
from visionfm_jax.parallel.mesh import BATCH, FSDP, REPLICA, REPLICATED

Tree = Any
SCANNED = "blocks"  # below this key, dim 0 of every parameter counts layers


class ZeroStage(NamedTuple):
    """A ZeRO stage: True for what is sharded over `fsdp`."""

    state: bool  # stored weights and optimiser state
    gradients: bool  # and their accumulator
    in_use: bool  # weights during the forward and backward pass: sharded until a layer needs them


STAGES = {
    0: ZeroStage(state=False, gradients=False, in_use=False),
    1: ZeroStage(state=True, gradients=False, in_use=False),
    2: ZeroStage(state=True, gradients=True, in_use=False),
    3: ZeroStage(state=True, gradients=True, in_use=True),
}


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("shard", "whole"), meta_fields=("dim", "sum_replicas")
)
@dataclasses.dataclass(frozen=True)
class ShardedParam:
    """A weight whose gradient lives in a shard; `whole` is set where it has been gathered already."""

    shard: jax.Array
    whole: jax.Array | None
    dim: int  # the sharded dim, counted from the end: slicing a layer off leaves it valid
    sum_replicas: bool  # sum gradients over replicas at once, beside the layers below, not at the end of the step


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _gathered(shard: jax.Array, whole: jax.Array, dim: int) -> jax.Array:
    """`whole`, whose gradient goes, summed over devices, to `shard`."""
    return whole


def _gathered_fwd(shard: jax.Array, whole: jax.Array, dim: int) -> tuple[jax.Array, None]:
    return whole, None


def _gathered_bwd(dim: int, _: None, cotangent: jax.Array) -> tuple[jax.Array, None]:
    return jax.lax.psum_scatter(cotangent, FSDP, scatter_dimension=cotangent.ndim + dim, tiled=True), None


_gathered.defvjp(_gathered_fwd, _gathered_bwd)


@jax.custom_vjp
def _shared(shard: jax.Array) -> jax.Array:
    """`shard`, whose gradient is summed over replicas, in fp32."""
    return shard


def _shared_fwd(shard: jax.Array) -> tuple[jax.Array, None]:
    return shard, None


def _shared_bwd(_: None, cotangent: jax.Array) -> tuple[jax.Array]:
    return (jax.lax.psum(cotangent.astype(jnp.float32), REPLICA).astype(cotangent.dtype),)


_shared.defvjp(_shared_fwd, _shared_bwd)


def _gather(shard: jax.Array, dim: int) -> jax.Array:
    return jax.lax.all_gather(shard, FSDP, axis=shard.ndim + dim, tiled=True)


def is_sharded(param: Any) -> bool:
    """Whether this is a `ShardedParam`, not an array."""
    return isinstance(param, ShardedParam)


def gather_params(params: Tree) -> Tree:
    """Make parameters whole: what a network calls on one block's parameters (`models.layers.GatherParams`)."""

    def one(p: jax.Array | ShardedParam) -> jax.Array:
        if not isinstance(p, ShardedParam):
            return p
        shard = _shared(p.shard) if p.sum_replicas else p.shard
        return _gather(shard, p.dim) if p.whole is None else _gathered(shard, p.whole, p.dim)

    return jax.tree.map(one, params, is_leaf=is_sharded)


def select(tree: dict[str, Tree], names: tuple[str, ...]) -> dict[str, Tree]:
    """The parts below these names at the top of parameters, or of what is shaped like them; (): all.

    Raises:
      ConfigError: there is no part of such a name.
    """
    if missing := set(names) - tree.keys():
        raise ConfigError(
            f"config.task.trained = {names}: {', '.join(sorted(missing))} is no part of the parameters; they have "
            f"{', '.join(tree)}"
        )
    return {name: part for name, part in tree.items() if name in names} if names else tree


def is_scanned(path: tuple) -> bool:
    """Whether dim 0 of the parameter at this `jax.tree_util` path counts layers."""
    return any(getattr(k, "key", None) == SCANNED for k in path)


def matrix_rank(path: tuple, leaf: Any) -> int:
    """Dims of a parameter within one layer: 2 or more for matrices, 1 for vectors."""
    return leaf.ndim - is_scanned(path)


def shard_dim(path: tuple, leaf: Any, shards: int) -> int | None:
    """The dim to shard, counted from the end: the largest that divides; None: whole.

    Vectors stay whole, and so does a matrix none of whose dims divides.
    """
    if shards == 1 or matrix_rank(path, leaf) < 2:
        return None
    fits = [d for d in range(-matrix_rank(path, leaf), 0) if leaf.shape[d] % shards == 0]
    return max(fits, key=lambda d: leaf.shape[d]) if fits else None


def _spec(ndim: int, dim: int | None) -> PartitionSpec:
    return REPLICATED if dim is None else PartitionSpec(*(FSDP if d == ndim + dim else None for d in range(ndim)))


def _refuse_useless_mesh(params: Tree, dims: Tree, stage: int, shards: int) -> None:
    """A stage that shards is of no use on a mesh that divides next to nothing."""
    sizes = [(p.size, dim[0]) for p, dim in zip(jax.tree.leaves(params), _dims_of(dims), strict=True)]
    whole = sum(size for size, dim in sizes if dim is None) / sum(size for size, _ in sizes)
    if STAGES[stage].state and shards > 1 and whole > 0.5:
        raise ConfigError(
            f"config.parallel.stage = {stage}: the mesh shards over {shards} devices, which divides the dims of only "
            f"{1 - whole:.0%} of this model's parameters; use a number of devices that divides its width, or stage 0"
        )


def _dims_of(dims: Tree) -> list[list[int | None]]:
    return jax.tree.leaves(dims, is_leaf=lambda d: isinstance(d, list))


class Zero:
    """One stage on one mesh, for the parameters of one model.

    Args:
      mesh: (replica, fsdp).
      stage: a key of `STAGES`.
      params: the whole parameters, or their shapes.
      dtype: compute dtype, to which matrices are cast before they travel.
      trained: names at the top of the parameters that have gradients; (): all.
    """

    def __init__(self, mesh: Mesh, stage: int, params: Tree, dtype: jnp.dtype, trained: tuple[str, ...] = ()):
        self.mesh, self.stage, self.dtype, self.trained = mesh, STAGES[stage], dtype, trained
        shards = mesh.shape[FSDP]
        self._dims = jax.tree_util.tree_map_with_path(  # a list: None would vanish from a tree
            lambda path, p: [shard_dim(path, p, shards)], params
        )
        _refuse_useless_mesh(params, self._dims, stage, shards)
        self._is_matrix = jax.tree_util.tree_map_with_path(lambda path, p: matrix_rank(path, p) >= 2, params)
        self._specs = self._map(lambda p, dim: _spec(p.ndim, dim), params)

    def _map(self, f: Callable, tree: Tree, *rest: Tree) -> Tree:
        """f(leaf, sharded dim or None, …) over parameters, or the parts of them that `tree` has."""
        parts = ({name: of[name] for name in tree} for of in (self._dims, *rest))
        return jax.tree.map(lambda p, dim, *r: f(p, dim[0], *r), tree, *parts)

    @property
    def state_specs(self) -> Tree:
        """PartitionSpecs of the stored parameters, and of anything shaped like them in the optimiser."""
        return self._specs if self.stage.state else jax.tree.map(lambda _: REPLICATED, self._specs)

    def specs_of(self, arrays: Tree) -> Tree:
        """PartitionSpecs of other arrays that are stored between steps, by the same rule: matrices are sharded."""
        shards = self.mesh.shape[FSDP] if self.stage.state else 1
        return jax.tree_util.tree_map_with_path(
            lambda path, array: _spec(array.ndim, shard_dim(path, array, shards)), arrays
        )

    def shardings(self, specs: Tree) -> Tree:
        """NamedShardings on this mesh."""
        return jax.tree.map(lambda s: NamedSharding(self.mesh, s), specs)

    def _cast(self, params: Tree) -> Tree:
        return jax.tree.map(lambda p, matrix: p.astype(self.dtype) if matrix else p, params, self._is_matrix)

    def _whole(self, shards: Tree) -> Tree | None:
        """What is gathered once a step: everything in stages 1 and 2."""
        if not self.stage.state:
            return shards
        return None if self.stage.in_use else self._map(lambda p, d: p if d is None else _gather(p, d), shards)

    def _usable(self, shards: Tree, whole: Tree | None, sum_replicas: bool) -> Tree:
        """Parameters as networks take them: whole at the top, `ShardedParam` below scanned blocks."""
        if not self.stage.gradients:
            return whole

        def sharded(shard: jax.Array, dim: int | None, whole: jax.Array | None = None) -> jax.Array | ShardedParam:
            return shard if dim is None else ShardedParam(shard, whole, dim, sum_replicas)

        params = self._map(sharded, shards, *([] if whole is None else [whole]))
        return jax.tree_util.tree_map_with_path(
            lambda path, p: p if is_scanned(path) else gather_params(p), params, is_leaf=is_sharded
        )

    def _fixed(self, params: Tree) -> Tree:
        """Stored parameters in usable form, of which no gradient is taken."""
        shards = self._cast(params)
        return self._usable(shards, self._whole(shards), sum_replicas=False)

    def _context_specs(self, context: Context | None) -> Context | None:
        if context is None:
            return None
        specs = jax.tree.map(lambda _: REPLICATED, context)
        return specs if context.teacher is None else specs._replace(teacher=self.state_specs)

    def _usable_context(self, context: Context | None) -> Context | None:
        if context is None or context.teacher is None:
            return context
        return context._replace(teacher=self._fixed(context.teacher))

    def apply(self, f: Callable[..., Tree], params: Tree, batch: dict, context: Context | None = None) -> Tree:
        """f(usable parameters, local rows of the batch, context if any) on each device; to arrays over rows (B, …).

        `context`: with a teacher as it is stored.
        """

        def local(params: Tree, batch: dict, context: Context | None) -> Tree:
            more = () if context is None else (self._usable_context(context),)
            return f(self._fixed(params), batch, *more)

        specs = self.state_specs, BATCH, self._context_specs(context)
        return self._shard_map(local, specs, BATCH)(params, batch, context)

    def total(self, f: Callable[[dict], Tree], batch: dict) -> Tree:
        """The sum over all devices of f(local rows of the batch)."""
        return self._shard_map(lambda rows: jax.lax.psum(f(rows), (REPLICA, FSDP)), (BATCH,), REPLICATED)(batch)

    def held_bytes(self, params: Tree, accumulate: int) -> tuple[int, int]:
        """Bytes per device, beside the state, while a step runs: (compute-dtype weights, gradients).

        Weights that a layer gathers for itself (stage 3) are not counted, nor are those of one micro-batch's
        gradient before it is added to the others.

        Args:
          params: shapes of the whole parameters.
          accumulate: micro-batches; more than one are summed in fp32.
        """
        held = [0, 0]

        def add(path: tuple, p: Any, dim: list, matrix: bool) -> None:
            size = jnp.dtype(self.dtype if matrix else jnp.float32).itemsize
            shards = 1 if dim[0] is None else self.mesh.shape[FSDP]
            in_use_shards = shards if self.stage.in_use and is_scanned(path) else 1
            held[0] += p.size // in_use_shards * size if size < 4 else 0  # fp32 is read where it is stored
            gradient_shards = shards if self.stage.gradients else 1
            if not self.trained or path[0].key in self.trained:
                held[1] += p.size // gradient_shards * (4 if accumulate > 1 else size)

        jax.tree_util.tree_map_with_path(add, params, self._dims, self._is_matrix)
        return held[0], held[1]

    def layer_bytes(self, params: Tree) -> int:
        """Bytes of one device's shard of the gradients of the largest layer, or of a group that is repeated.

        In the compute dtype; 0 where gradients are not scattered, or no trained part has such layers.

        Args:
          params: shapes of the whole parameters.
        """
        layers: Counter[tuple[Any, ...]] = Counter()

        def add(path: tuple, p: Any, dim: list) -> None:
            if is_scanned(path) and dim[0] is not None:
                stack = path[: [key.key for key in path].index(SCANNED)]
                layers[stack] += p.size // p.shape[0] // self.mesh.shape[FSDP] * jnp.dtype(self.dtype).itemsize

        if self.stage.gradients:
            trained, dims = (select(tree, self.trained) for tree in (params, self._dims))
            jax.tree_util.tree_map_with_path(add, trained, dims)
        return max(layers.values(), default=0)

    def loss_and_grads(
        self,
        loss_fn: LossFn | GradCache,
        params: Tree,
        batch: dict,
        accumulate: int,
        scale: jax.Array | None = None,
        context: Context | None = None,
    ) -> tuple[dict, dict, Tree]:
        """The gradient of the mean loss over the global batch, in `accumulate` micro-batches.

        Args:
          loss_fn: from usable parameters, local rows and context to their mean loss, a dict of per-sample arrays
            (B, …), and one of arrays of which the mean over micro-batches and devices is wanted; or one that compares
            all rows of the batch, whatever the micro-batches.
          params: stored parameters, sharded by `state_specs`.
          batch: rows over all devices. Each device cuts up its own rows, in order: nothing travels.
          accumulate: micro-batches.
          scale: for fp16, by which the loss is multiplied in the backward pass; the gradients returned are without it.
          context: what the loss is handed, with a teacher as it is stored. A teacher's weights travel as the
            parameters' do in the forward pass, and have no gradient.

        Returns:
          The per-sample arrays over the global batch in its order; the means; and the gradients of the trained parts,
          fp32, sharded like the stored parameters.
        """
        parts = self.mesh.size * accumulate
        # Of several micro-batches it is cheaper to sum over replicas once, at the end.
        sum_replicas = self.mesh.shape[REPLICA] > 1 and self.stage.gradients and accumulate == 1

        def local(params: Tree, batch: dict, scale: jax.Array | None, context: Context | None) -> tuple:
            context = self._usable_context(context)
            shards = self._cast(params)
            whole = self._whole(shards)
            row_loss, join = loss_fn, None
            if isinstance(loss_fn, GradCache):
                usable = self._usable(shards, whole, sum_replicas=False)
                batch, row_loss, join = with_grad_cache(loss_fn, usable, batch, accumulate, context)

            def scaled_loss(params: Tree, rows: dict) -> tuple[jax.Array, tuple[dict, dict]]:
                loss, *rest = row_loss(params, rows, context)
                # fp16 sums of every device's mean would overflow early. So each adds its part of the whole batch's
                # mean: sums need no more range than the gradient itself, nothing is divided on the way, and a
                # sample's gradients, so also the scale that fits them, are the same for any mesh and `accumulate`.
                return loss if scale is None else loss * (scale / parts), tuple(rest)

            def micro(rows: dict) -> tuple[dict, tuple[Tree, dict]]:
                def loss(trained: Tree) -> tuple[jax.Array, tuple[dict, dict]]:
                    if self.stage.gradients:
                        return scaled_loss(self._usable(shards | trained, whole, sum_replicas), rows)
                    return scaled_loss(whole | trained, rows)

                of = select(shards if self.stage.gradients else whole, self.trained)
                grads, (per_sample, means) = jax.grad(loss, has_aux=True)(of)
                return per_sample, (grads, means)

            per_sample, (grads, means) = accumulate_gradients(micro, batch, accumulate)
            reduce = functools.partial(self._reduce, summed=sum_replicas)
            grads = self._map(reduce, grads, self._is_matrix)
            per_sample = per_sample if join is None else join(per_sample)
            means = jax.tree.map(lambda m: m / parts, jax.lax.psum(means, (REPLICA, FSDP)))
            return per_sample, means, jax.tree.map(lambda g: g / (parts if scale is None else scale), grads)

        specs = self.state_specs, BATCH, REPLICATED, self._context_specs(context)
        out_specs = BATCH, REPLICATED, select(self.state_specs, self.trained)
        return self._shard_map(local, specs, out_specs)(params, batch, scale, context)

    def _reduce(self, g: jax.Array, dim: int | None, matrix: bool, *, summed: bool) -> jax.Array:
        """One device's gradient (sum over its micro-batches) to the sum over devices, stored form, fp32.

        `summed`: shards are summed over replicas already.
        """
        if dim is not None and self.stage.gradients:  # a shard, summed over `fsdp` already
            g = g.astype(jnp.float32)
            return g if summed else jax.lax.psum(g, REPLICA)
        g = g.astype(self.dtype if matrix else jnp.float32)
        if dim is None or not self.stage.state:
            return jax.lax.psum(g, (REPLICA, FSDP)).astype(jnp.float32)
        g = jax.lax.psum_scatter(g, FSDP, scatter_dimension=g.ndim + dim, tiled=True)
        return jax.lax.psum(g.astype(jnp.float32), REPLICA)

    def _shard_map(self, f: Callable, in_specs: Any, out_specs: Any) -> Callable:
        # check_vma off: gradients are taken per device on purpose, and summed above where the table says.
        return jax.shard_map(f, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
