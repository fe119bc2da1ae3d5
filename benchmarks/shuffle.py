"""Test whether the order of samples is random: the loader's shuffle, one shuffle of Grain, numpy's permutation.

    python benchmarks/shuffle.py                         # the table of docs/reliability.md, some minutes
    python benchmarks/shuffle.py --sizes=65536,1048576 --shuffles=1,2,3

Of every size and seed, the first samples of an epoch are drawn one by one, as the loader does. Each column is the worst
of the seeds:

    lag r      the largest serial correlation of record numbers at the lags 1 to 4096, and its lag
    z          the same in standard deviations of a random order; its largest of 4096 lags is 3.5 to 4.5
    power      r^2 at the lags 2^k and 3 2^k and their neighbours, over that of a random order: 1, of few lags to 2
    pairs      chi^2 of (sample, sample + lag) on a grid, at the same lags: the largest, in standard deviations
    classes    chi^2/dof of the class counts of batches, with records sorted by class: 1; and its standard deviations
    distance   Kolmogorov-Smirnov distance, times sqrt(pairs), of |neighbour - neighbour|: above 1.63 once in 100
    epochs     correlation of two epochs, in standard deviations
    us         microseconds of this process for one index

`--sizes` below 100,000 are also checked to be permutations, in every epoch different.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import time
from importlib.metadata import version
from typing import NamedTuple

import numpy as np

from visionfm_jax.data import loader

SIZES = (50, 1000, 50_000, 65_536, 1_048_576, 1_281_167, 14_197_122, 1_200_000_000)
LAGS = 4096
MARKED = sorted({a * 2**k + b for k in range(1, 13) for a in (1, 3) for b in (-1, 0, 1)})  # where a block cipher shows


class Statistics(NamedTuple):
    """Of one order; the docstring of the program says what each is."""

    r: float
    lag: int
    z: float
    power: float
    pairs: float
    classes: float
    classes_z: float
    distance: float

    def worst(self, other: Statistics) -> Statistics:
        """Of each the farther from what a random order has."""
        r = max(self, other, key=lambda s: abs(s.z))
        c = max(self, other, key=lambda s: abs(s.classes_z))
        rest = {k: max(getattr(self, k), getattr(other, k)) for k in ("power", "pairs", "distance")}
        return Statistics(r.r, r.lag, r.z, classes=c.classes, classes_z=c.classes_z, **rest)


def draw(size: int, seed: int, samples: int, epoch: int = 0) -> np.ndarray:
    """The first record numbers of an epoch, as the loader asks for them."""
    order = loader.sample_order([size], [1.0], seed, shuffle=True)
    first = epoch * size
    return np.fromiter((order[first + i][1] for i in range(min(samples, size))), np.int64)


def statistics(records: np.ndarray, size: int) -> Statistics:
    """Of the first samples of an epoch of `size` records."""
    count = len(records)
    centred = records - records.mean()
    lags = np.arange(1, min(LAGS, count // 2) + 1)
    spectrum = np.fft.rfft(centred, 2 * count)
    products = np.fft.irfft(np.abs(spectrum) ** 2)[: lags[-1] + 1]
    r = products[lags] / products[0] * count / (count - lags)
    z = r * np.sqrt(count - lags)
    marked = [k for k in MARKED if k <= lags[-1]]
    at = int(np.abs(z).argmax())
    classes, classes_z = class_counts(records, size)
    return Statistics(
        r=float(r[at]),
        lag=int(lags[at]),
        z=float(z[at]),
        power=float(np.square(z[np.array(marked) - 1]).mean()),
        pairs=max(pair_grid(records, size, k) for k in marked),
        classes=classes,
        classes_z=classes_z,
        distance=neighbour_distance(records, size),
    )


def pair_grid(records: np.ndarray, size: int, lag: int) -> float:
    """chi^2 of (sample i, sample i + lag) on a grid of equal cells, in its standard deviations."""
    side = 16 if len(records) >= 5000 else 4
    cell = records * side // size
    found = np.bincount(cell[:-lag] * side + cell[lag:], minlength=side * side)
    width = np.bincount(np.arange(side * 1000) // 1000) / side / 1000
    expected = (len(records) - lag) * np.outer(width, width).ravel()
    whole = len(records) == size  # an epoch has every row and column in equal shares
    dof = (side - 1) ** 2 if whole else side * side - 1
    return float((np.square(found - expected) / expected).sum() - dof) / np.sqrt(2 * dof)


def class_counts(records: np.ndarray, size: int) -> tuple[float, float]:
    """chi^2/dof of the class counts in batches, records sorted by class; and its distance from 1 in deviations."""
    classes = max(2, min(1000, size // 25))
    batch = min(1024, len(records) // 5)
    batches = len(records) // batch
    labels = (records * classes // size)[: batches * batch].reshape(batches, batch)
    edges = -(-np.arange(classes + 1) * size // classes)
    expected = batch * np.diff(edges) / size
    chi = np.array([(np.square(np.bincount(b, minlength=classes) - expected) / expected).sum() for b in labels])
    ratio = chi.mean() / (classes - 1) * (size - 1) / (size - batch)  # drawn without putting back
    return float(ratio), float((ratio - 1) / np.sqrt(2 / (classes - 1) / batches))


def neighbour_distance(records: np.ndarray, size: int) -> float:
    """sqrt(pairs) times the Kolmogorov-Smirnov distance of |a - b| from 1 - (1 - d)^2, disjoint pairs of neighbours."""
    pairs = records[: len(records) // 2 * 2].reshape(-1, 2)
    d = np.sort((np.abs(pairs[:, 0] - pairs[:, 1]) - 0.5) / size)  # a whole number stands for its middle
    expected = 1 - np.square(1 - d)
    steps = np.arange(len(d) + 1) / len(d)
    distance = max(np.abs(expected - steps[1:]).max(), np.abs(expected - steps[:-1]).max())
    return float(distance * np.sqrt(len(d)))


def measure(size: int, shuffles: int, seeds: int, samples: int) -> str:
    """One row of the table."""
    loader.SHUFFLES = shuffles
    found, epochs, seconds, drawn = None, 0.0, 0.0, 0
    for seed in range(seeds):
        began = time.process_time()
        orders = [
            draw(size, seed, samples, epoch)
            if shuffles
            else np.random.default_rng([seed, epoch]).choice(size, min(samples, size), replace=False)
            for epoch in range(2)
        ]
        seconds, drawn = seconds + time.process_time() - began, drawn + sum(map(len, orders))
        if size <= min(samples, 100_000):
            assert all((np.sort(order) == np.arange(size)).all() for order in orders), f"{size}: not a permutation"
        assert (orders[0] != orders[1]).any(), f"{size}: two epochs are alike"
        epochs = max(epochs, abs(np.corrcoef(*orders)[0, 1]) * np.sqrt(len(orders[0])))
        new = statistics(orders[0], size)
        found = new if found is None else found.worst(new)
    assert found is not None
    name = {0: "numpy's permutation", 1: "Grain's shuffle"}.get(shuffles, f"{shuffles} of Grain's in turn")
    return (
        f"| {size:,} | {name} | {found.r:+.3f} at {found.lag} | {abs(found.z):.1f} | {found.power:.2f} "
        f"| {found.pairs:.1f} | {found.classes:.3f} ({found.classes_z:+.1f}) | {found.distance:.2f} | {epochs:.1f} "
        f"| {seconds / drawn * 1e6:.1f} |"
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=_numbers, default=SIZES, help="dataset sizes, e.g. 50,65536")
    shuffles = (0, 1, loader.SHUFFLES)
    parser.add_argument(
        "--shuffles", type=_numbers, default=shuffles, help="number of Grain's shuffles in sequence; 0: numpy's"
    )
    parser.add_argument("--seeds", type=int, default=3, help="seeds per size; the worst is printed (%(default)s)")
    parser.add_argument("--samples", type=int, default=1 << 17, help="maximum samples per epoch (%(default)s)")
    asked = parser.parse_args()
    print("| records | order | lag r | z | power | pairs | classes | distance | epochs | us |")
    print("| ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for size in asked.sizes:
        for count in asked.shuffles:
            print(measure(size, count, asked.seeds, asked.samples), flush=True)
    print(
        f"\n{asked.seeds} seeds, {asked.samples:,} samples at most; grain {version('grain')}, numpy {np.__version__}, "
        f"python {platform.python_version()}, {datetime.date.today().isoformat()}"
    )


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))


if __name__ == "__main__":
    main()
