"""Measure the matching of objects with queries, inside a compiled program, beside scipy's on the host.

    python benchmarks/matching.py --images=2 --objects=7

Prints milliseconds for the three problems of a step of Plain-DETR at 1024 pixels: the queries that predict and those
that are matched several to an object, of all layers at once, and the proposals. Boxes and classes are random; every
image has the same number of objects, of which there may be 100.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from scipy.optimize import linear_sum_assignment

from visionfm_jax.losses.detection import Truth, Weights, match, matching_costs
from visionfm_jax.models.boxes import Predicted, decode, to_corners
from visionfm_jax.parallel.cluster import take_cpu_without_driver

SIDE, MOST, CLASSES = 1024, 100, 80
PROBLEMS = {  # layers, queries, copies of an object
    "queries that predict": (6, 300, 1),
    "queries matched several to an object": (6, 1500, 6),
    "proposals": (1, 21_760, 1),
}


def milliseconds(run: Callable[[], object], times: int) -> float:
    """The best of so many."""
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        run()
        taken.append(time.perf_counter() - start)
    return 1e3 * min(taken)


def costs_of(rng: np.random.Generator, problems: int, queries: int, objects: int) -> jax.Array:
    """Of boxes near those of objects, as a trained layer predicts them, and of others; (problems, M, Q)."""

    def boxes(*shape: int) -> np.ndarray:
        return np.concatenate([rng.uniform(0, SIDE, (*shape, 2)), rng.uniform(20, 300, (*shape, 2))], -1)

    truth, reference = boxes(problems, MOST), boxes(problems, queries)
    near = rng.integers(0, objects, (problems, queries // 2))
    reference[:, ::2][:, : near.shape[1]] = np.take_along_axis(truth, near[..., None], 1)
    reference += rng.normal(0, 15, reference.shape)
    reference[..., 2:] = np.maximum(reference[..., 2:], 4)
    reference, deltas = jnp.array(reference, jnp.float32), jnp.array(rng.normal(0, 0.1, reference.shape), jnp.float32)
    predicted = Predicted(
        jnp.array(rng.normal(-2, 1, (problems, queries, CLASSES)), jnp.float32), deltas, reference,
        decode(deltas, reference, jnp.array([SIDE, SIDE])),
    )  # fmt: skip
    labels, present = jnp.array(rng.integers(0, CLASSES, (problems, MOST))), jnp.ones((problems, MOST), bool)
    truth = Truth(to_corners(jnp.array(truth, jnp.float32)), labels, present)
    return jax.vmap(lambda p, t: matching_costs(p, t, Weights(2.0, 1.0, 2.0)))(predicted, truth)


def main() -> None:
    """Make, measure, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2, help="of a device (%(default)s)")
    parser.add_argument("--objects", type=int, default=7, help="of each image (%(default)s; COCO has 7 on average)")
    parser.add_argument("--times", type=int, default=3, help="of which the best is printed (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the boxes (%(default)s)")
    arguments = parser.parse_args()
    take_cpu_without_driver()
    rng = np.random.default_rng(arguments.seed)
    program = jax.jit(lambda c, p, count: jax.vmap(lambda c, p: match(c, p, count))(c, p))
    for name, (layers, queries, copies) in PROBLEMS.items():
        problems = layers * arguments.images
        costs = jnp.repeat(costs_of(rng, problems, queries, arguments.objects), copies, 1)
        present = jnp.broadcast_to(jnp.arange(MOST * copies) < arguments.objects * copies, (problems, MOST * copies))
        given = costs, present, jnp.array(arguments.objects * copies)
        found = np.asarray(program(*given))
        ours = milliseconds(lambda given=given: program(*given).block_until_ready(), arguments.times)
        matrices = [np.asarray(c)[: arguments.objects * copies] for c in costs]
        theirs = milliseconds(lambda m=matrices: [linear_sum_assignment(c) for c in m], arguments.times)
        for matrix, query in zip(matrices, found, strict=True):  # copies are equal: several matchings are the best
            rows, columns = linear_sum_assignment(matrix)
            np.testing.assert_allclose(
                matrix[rows, query[: len(matrix)]].sum(), matrix[rows, columns].sum(), rtol=1e-4, atol=1e-3
            )
        print(f"{name}: {problems} problems, {len(matrices[0])} of {MOST * copies} x {queries}: ", end="")
        print(f"{ours:.1f} ms, scipy {theirs:.1f} ms")


if __name__ == "__main__":
    main()
