"""Rates of kernels by shape, against sums done by hand and what is published and measured of real cards."""

import math
from dataclasses import replace

import pytest

from visionfm_jax.parallel.hlo import Attention
from visionfm_jax.parallel.targets import TARGETS
from visionfm_jax.planning import rates
from visionfm_jax.planning.rates import FILL, attention_seconds, matmul_seconds, rates_of

H100, A100 = TARGETS["h100"], TARGETS["a100-80gb"]


def reached(m, n, k, dtype="bf16", target=H100):
    """TFLOP/s."""
    return 2 * m * n * k / matmul_seconds(m, n, k, dtype, target) / 1e12


def test_waves_of_tiles_over_the_cores():
    core = rates_of(H100).matmuls * H100.peak_flops / 132
    tile = 2 * 128 * 256 * (4096 + FILL) / core  # seconds
    assert matmul_seconds(128 * 12, 256 * 11, 4096, "bf16", H100) == pytest.approx(tile)  # a tile for each core
    assert matmul_seconds(128 * 12, 256 * 22, 4096, "bf16", H100) == pytest.approx(2 * tile)
    one_more = matmul_seconds(128 * 12, 256 * 11 + 8, 4096, "bf16", H100)
    assert 1.05 * tile < one_more < 2 * tile  # the last wave leaves cores idle, unless smaller tiles do better
    assert matmul_seconds(128 * 4, 256 * 11, 4096, "bf16", H100, batch=3) == pytest.approx(tile)


def test_few_tiles_are_split_along_the_sum():
    """Of a weight's gradient: 1280 x 1280 has 50 large tiles, for 132 cores."""
    assert reached(1280, 1280, 32768) > 1.5 * 50 / 132 * reached(8192, 8192, 8192)


def test_short_sums_reach_less():
    assert reached(32768, 4096, 128) < 0.75 * reached(32768, 4096, 4096)


@pytest.mark.parametrize(
    ("card", "low", "high"), [("h100", 650, 750), ("h200", 700, 800), ("a100-80gb", 250, 280), ("b200", 1450, 1745)]
)
def test_large_products_reach_what_is_published(card, low, high):
    assert low < reached(8192, 8192, 8192, target=TARGETS[card]) < high


@pytest.mark.parametrize("dtype", ["f8e4m3fn", "f8e5m2"])
def test_fp8_is_faster_where_the_card_has_it(dtype):
    assert reached(8192, 8192, 8192, dtype) == pytest.approx(1.78 * reached(8192, 8192, 8192))
    assert reached(8192, 8192, 8192, dtype, A100) == pytest.approx(reached(8192, 8192, 8192, target=A100))
    assert reached(8192, 8192, 8192, "f32") == pytest.approx(0.5 * reached(8192, 8192, 8192))


@pytest.mark.parametrize(
    ("length", "dim", "backward", "published"),  # TFLOP/s of cuDNN on an H100, FlashAttention-3's paper, not causal
    [
        (512, 64, False, 335), (4096, 64, False, 408), (512, 128, False, 497), (4096, 128, False, 609),
        (512, 64, True, 266), (2048, 64, True, 395), (512, 128, True, 305), (4096, 128, True, 499),
    ],
)  # fmt: skip
def test_attention_reaches_what_is_published(length, dim, backward, published):
    kernel = Attention("bf16", 16 * 1024, length, length, dim, backward)
    assert kernel.flops / attention_seconds(kernel, H100) / 1e12 == pytest.approx(published, rel=0.06)


def test_heads_and_lengths_are_padded():
    def seconds(length, dim):
        return attention_seconds(Attention("bf16", 1, length, length, dim, False), A100)

    assert seconds(256, 80) == pytest.approx(seconds(256, 128))
    assert seconds(196, 64) > seconds(256, 64)  # a window of 14 x 14: as much work, and shorter loops


def test_other_cards_have_rates_too():
    assert rates_of(replace(H100, description="a card of 2030")) == rates.OTHERS
    assert not rates.OTHERS.measured
    assert math.isfinite(matmul_seconds(1, 1, 1, "s8", replace(H100, description="a card of 2030")))
