"""The order of the samples has the statistics of a random one; the old order, a single shuffle of Grain's, has not."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from visionfm_jax.data import loader

SPEC = importlib.util.spec_from_file_location("shuffle", Path(__file__).parents[3] / "benchmarks" / "shuffle.py")
shuffle = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(shuffle)
SAMPLES = 10_000


def faults(found: shuffle.Statistics) -> set[str]:
    """What a random order (numpy's) has about once in 1000, of each."""
    limits = {"z": 5.2, "power": 2.5, "pairs": 7.0, "classes_z": 3.5, "distance": 1.95}
    return {name for name, limit in limits.items() if not abs(getattr(found, name)) < limit}


# By the size: the single shuffle shows most in these (in the worst lag, and in the class counts of sorted data).
CASES = {50: 0, 1000: 0, 50_000: 4, 65_536: 4, 1_048_576: 4, 14_197_122: 4, 1_200_000_000: 3}


@pytest.mark.parametrize(("size", "seed"), [*((size, 0) for size in CASES), (50_000, 1), (50_000, 2)])
def test_the_order_is_random(size, seed):
    assert not faults(shuffle.statistics(shuffle.draw(size, seed, SAMPLES), size))


@pytest.mark.parametrize("size", [size for size, count in CASES.items() if count])
def test_the_limits_find_the_faults_of_one_shuffle(size, monkeypatch):
    monkeypatch.setattr(loader, "SHUFFLES", 1)
    assert len(faults(shuffle.statistics(shuffle.draw(size, 0, SAMPLES), size))) >= CASES[size]


def test_the_limits_leave_a_random_order_alone():
    for seed in range(20):
        rng = np.random.default_rng(seed)
        for size in (1000, 14_197_122):
            records = rng.choice(size, min(size, SAMPLES), replace=False)
            assert not faults(shuffle.statistics(records, size))


def test_epochs_are_permutations_that_have_nothing_in_common():
    epochs = np.array([shuffle.draw(997, 3, 997, epoch) for epoch in range(4)])
    assert (np.sort(epochs) == np.arange(997)).all()
    between = np.corrcoef(epochs)[np.triu_indices(4, 1)]
    assert np.abs(between).max() < 4 / 997**0.5
