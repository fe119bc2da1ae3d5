"""The roofline of a schedule, against sums done by hand on small programs and a chip of round numbers."""

import math
from dataclasses import replace

import pytest

from visionfm_jax.parallel.hlo import Array, Attention, Collective, Module
from visionfm_jax.parallel.targets import MEMORY_FRACTION, TARGETS, Cluster
from visionfm_jax.planning import estimate as roofline
from visionfm_jax.planning.calibration import calibration_of
from visionfm_jax.planning.compiled import CompiledStep
from visionfm_jax.planning.estimate import Estimate, estimate, memory_by_kind, network_seconds
from visionfm_jax.planning.report import of_weight

CHIP = replace(
    TARGETS["h100"], name="round", description="a round card", peak_flops=1e15, memory_bandwidth=1e12,
    memory_bytes=80 * 10**9, network_inside=400e9, network_between=25e9,
)  # fmt: skip
HOST = Cluster(CHIP, 1, 8)


@pytest.fixture(autouse=True)
def _round_assumptions(monkeypatch):
    """What programs reach, in round numbers: the real ones are measured, and change."""
    for name, value in {"NETWORK": 0.5, "KERNEL": 2e-6, "LATENCY": (10e-6, 1e-6, 4e-6)}.items():
        monkeypatch.setattr(roofline, name, value)
    monkeypatch.setattr(roofline, "memory_rate", lambda target: 0.8 * target.memory_bandwidth)
    monkeypatch.setattr(roofline, "arithmetic_seconds", arithmetic)


def arithmetic(product, target):
    reached = 0.25 if isinstance(product, Attention) else 0.5 * (0.5 if product.dtype == "f32" else 1)
    return product.flops / (reached * target.peak_flops)


def compiled_step(hlo="", **changes):
    step = CompiledStep(
        platform="cuda", parameters={}, state={"weights": 0, "optimiser": 0, "EMA weights": 0, "batch": 0},
        weights_in_use=0, gradients=0, checkpoint_host_bytes=0, step_flops=0.0, total_steps=1, batch_size=1, peak=0,
        arguments=0, seconds=1.0, hlo=hlo,
    )  # fmt: skip
    return replace(step, **changes)


def text(lines, computations=""):
    return (
        "HloModule jit_step, is_scheduled=true, num_partitions=8\n"
        f"{computations}\nENTRY %main.1 (p: bf16[8388608]) -> bf16[8388608] {{\n{lines}\n}}\n"
    )


def estimated(lines, computations=""):
    return estimate(compiled_step(text(lines, computations)), HOST)


def gather_over(group, nbytes=8 * 10**6):
    return Collective("all-gather", (Array("u8", (nbytes,)),), tuple(group), True, 1, "")


@pytest.mark.parametrize(
    ("group", "between", "bandwidth", "steps"),
    [
        (range(8), 25e9, 400e9, 7),  # one host; µs of the steps around the ring
        (range(4, 8), 25e9, 400e9, 3),  # half of one
        (range(32), 25e9, 8 * 25e9, 28 + 3 * 4),  # four hosts: eight adapters each
        (range(32), 100e9, 400e9, 28 + 3 * 4),  # whose adapters together are faster than the links inside
        ((0, 1, 8, 9), 25e9, 2 * 25e9, 2 + 4),
        ((0, 8, 16, 24), 25e9, 25e9, 3 * 4),  # one member per host
        ((7, 8), 25e9, 25e9, 4),
    ],
)
def test_a_collective_runs_at_the_speed_of_its_group(group, between, bandwidth, steps):
    cluster = Cluster(replace(CHIP, network_between=between), 4, 8)
    size = len(group)
    expected = 8e6 * (size - 1) / size / (0.5 * bandwidth) + 10e-6 + 1e-6 * steps
    assert network_seconds(gather_over(group), cluster) == pytest.approx(expected, rel=1e-12)


def test_hosts_are_as_large_as_the_cluster_says():
    pair, quad = Cluster(CHIP, 4, 2), Cluster(CHIP, 2, 4)
    seconds = 6e6 / (0.5 * 400e9) + 13e-6  # 3/4 of 8 MB
    assert network_seconds(gather_over(range(4)), quad) == pytest.approx(seconds)
    assert network_seconds(gather_over(range(4)), pair) == pytest.approx(6e6 / (0.5 * 2 * 25e9) + 16e-6)


# Times by hand. A copy of 2^23 bf16: 32 MiB read and written; gathers and sums over 8 GPUs of one host.
COPY = 2 * 2**24 / 0.8e12 + 2e-6  # 43.9 µs
SMALL = 2**22 * 7 / 8 / 200e9 + 17e-6  # 35.4 µs, 4 MiB gathered: less than a copy
LARGE = 2**24 * 7 / 8 / 200e9 + 17e-6  # 90.4 µs, 16 MiB gathered: more
SUM = 2 * 2**19 * 7 / 8 / 200e9 + 17e-6  # 512 KiB summed

ASYNC = 'replica_groups=[1,8]<=[8], dimensions={0}, backend_config={"collective_backend_config":{"is_sync":false}}'
SYNC = 'replica_groups=[1,8]<=[8], backend_config={"collective_backend_config":{"is_sync":true}}'
SCOPE = 'metadata={op_name="jit(step)/jvp(ViT)/while/body/eval_jaxpr/Block/mlp/fc1/dot_general"}'

LOOP = f"""
%less (i: s32[]) -> pred[] {{
  %i = s32[] parameter(0)
  ROOT %compare = pred[] compare(%i, %i), direction=LT
}}

%body (s: (s32[], bf16[8388608], bf16[262144])) -> (s32[], bf16[8388608], bf16[262144]) {{
  %s = (s32[], bf16[8388608]{{0}}, bf16[262144]{{0}}) parameter(0)
  %n = s32[] get-tuple-element(%s), index=0
  %x = bf16[8388608]{{0}} get-tuple-element(%s), index=1
  %shard = bf16[262144]{{0}} get-tuple-element(%s), index=2
  %start = ((bf16[1048576]{{0}}), bf16[8388608]{{0}}) all-gather-start(%shard), {ASYNC}
  %y = bf16[8388608]{{0}} copy(%x), {SCOPE}
  %done = bf16[8388608]{{0}} all-gather-done(%start)
  %sum = bf16[262144]{{0}} all-reduce(%shard), {SYNC}
  ROOT %out = (s32[], bf16[8388608]{{0}}, bf16[262144]{{0}}) tuple(%n, %y, %sum)
}}
"""

STEP = f"""
  %p = bf16[8388608]{{0}} parameter(0)
  %q = bf16[262144]{{0}} parameter(1)
  %one = s32[] parameter(2)
  %hidden = ((bf16[262144]{{0}}), bf16[2097152]{{0}}) all-gather-start(%q), {ASYNC}
  %c1 = bf16[8388608]{{0}} copy(%p), {SCOPE}
  %hidden-done = bf16[2097152]{{0}} all-gather-done(%hidden)
  %partly = ((bf16[1048576]{{0}}), bf16[8388608]{{0}}) all-gather-start(%hidden-done), {ASYNC}
  %c2 = bf16[8388608]{{0}} copy(%c1), {SCOPE}
  %partly-done = bf16[8388608]{{0}} all-gather-done(%partly)
  %sync = bf16[262144]{{0}} all-reduce(%q), {SYNC}
  %init = (s32[], bf16[8388608]{{0}}, bf16[262144]{{0}}) tuple(%one, %c2, %sync)
  %loop = (s32[], bf16[8388608]{{0}}, bf16[262144]{{0}}) while(%init), condition=%less, body=%body, backend_config={{"known_trip_count":{{"n":"5"}}}}
  ROOT %out.1 = bf16[8388608]{{0}} get-tuple-element(%loop), index=1
"""  # noqa: E501 - XLA's line


def test_collectives_are_hidden_exposed_or_waited_for():
    result = estimated(STEP, LOOP)
    hidden, partly, sync, looped, looped_sync = result.collectives

    assert [e.seconds for e in result.collectives] == pytest.approx([SMALL, LARGE, SUM, LARGE, SUM])
    assert [e.collective.count for e in result.collectives] == [1, 1, 1, 5, 5]
    assert hidden.exposed == 0
    assert partly.exposed == pytest.approx(LARGE - COPY)
    assert sync.exposed == pytest.approx(SUM)
    assert looped.exposed == pytest.approx(LARGE - COPY)  # of each iteration
    assert looped_sync.exposed == pytest.approx(SUM)
    assert not any(e.crosses_hosts for e in result.collectives)

    assert hidden.beside == {"mlp/fc1/dot_general": pytest.approx(COPY)}
    assert looped.beside == {"mlp/fc1/dot_general": pytest.approx(COPY)}
    assert not sync.beside

    waiting = (LARGE - COPY) + SUM
    assert result.exposed == pytest.approx(6 * waiting)
    assert result.network == pytest.approx(SMALL + 6 * (LARGE + SUM))
    assert result.seconds == pytest.approx(7 * COPY + 6 * waiting)
    by_kind = {"matmuls": 0, "attention": 0, "all else": 7 * COPY, "waits": 6 * waiting}
    assert result.seconds_by_kind == pytest.approx(by_kind)
    assert result.traffic_by_kind == {"matmuls": 0, "attention": 0, "all else": 7 * 2 * 2**24}
    assert result.traffic == 7 * 2 * 2**24
    assert result.executed_flops == 0


def test_collectives_that_are_alike_are_one_row():
    result = estimated(STEP, LOOP)
    hidden, partly, sync, looped, looped_sync = result.collectives
    assert of_weight(result.collectives) == [[hidden], [partly, looped], [sync, looped_sync]]


def test_the_network_carries_one_collective_after_the_other():
    result = estimated(
        f"""
  %p = bf16[8388608]{{0}} parameter(0)
  %q = bf16[1048576]{{0}} parameter(1)
  %a = ((bf16[1048576]{{0}}), bf16[8388608]{{0}}) all-gather-start(%q), {ASYNC}
  %b = ((bf16[1048576]{{0}}), bf16[8388608]{{0}}) all-gather-start(%q), {ASYNC}
  %c = bf16[8388608]{{0}} copy(%p)
  %a-done = bf16[8388608]{{0}} all-gather-done(%a)
  ROOT %b-done = bf16[8388608]{{0}} all-gather-done(%b)"""
    )
    first, second = result.collectives
    assert first.exposed == pytest.approx(LARGE - COPY)
    assert second.exposed == pytest.approx(LARGE)
    assert result.seconds == pytest.approx(2 * LARGE)
    assert first.beside == second.beside == {"copies": pytest.approx(COPY)}


def test_the_shortest_branch_of_a_conditional_counts_and_the_range_reaches_to_the_longest():
    branches = """
%once (a: bf16[8388608]) -> bf16[8388608] {
  %a = bf16[8388608]{0} parameter(0)
  ROOT %a.1 = bf16[8388608]{0} copy(%a)
}

%twice (b: bf16[8388608]) -> bf16[8388608] {
  %b = bf16[8388608]{0} parameter(0)
  %b.1 = bf16[8388608]{0} copy(%b)
  ROOT %b.2 = bf16[8388608]{0} copy(%b.1)
}
"""
    result = estimated(
        """
  %p = bf16[8388608]{0} parameter(0)
  %i = s32[] parameter(1)
  ROOT %c = bf16[8388608]{0} conditional(%i, %p, %p), branch_computations={%twice, %once}""",
        branches,
    )
    assert result.seconds == pytest.approx(COPY)
    assert result.traffic == 2 * 2**24  # of one branch, too
    factor = math.exp(2 * result.calibration.deviation(result.modelled))
    assert result.range == pytest.approx((COPY / factor, COPY * factor + COPY))


def product(dtype, rows, inner):
    return f"""
  %a = {dtype}[{rows},{inner}]{{1,0}} parameter(0)
  %b = {dtype}[{inner},{rows}]{{1,0}} parameter(1)
  ROOT %dot = {dtype}[{rows},{rows}]{{1,0}} dot(%a, %b), lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}"""


@pytest.mark.parametrize(("dtype", "rate"), [("bf16", 1.0), ("f32", 0.5)])
def test_products_bound_by_arithmetic(dtype, rate):
    result = estimated(product(dtype, 4096, 4096))
    flops = 2 * 4096**3
    assert result.executed_flops == flops
    assert result.seconds == pytest.approx(flops / (rate * 0.5e15) + 2e-6)
    assert result.seconds_by_kind["matmuls"] == result.seconds


def test_products_bound_by_memory():
    result = estimated(product("bf16", 4096, 16))
    moved = 2 * (4096 * 16 + 4096 * 16 + 4096 * 4096)
    assert result.seconds == pytest.approx(moved / 0.8e12 + 2e-6)
    assert result.traffic == result.traffic_by_kind["matmuls"] == moved
    assert result.seconds_by_kind["matmuls"] == result.seconds


def test_attention_kernels_reach_less_than_products():
    result = estimated(
        """
  %q = bf16[16,2048,16,64]{3,2,1,0} parameter(0)
  ROOT %out = (bf16[16,2048,16,64]{3,1,2,0}, u8[0]{0}) custom-call(%q, %q, %q), custom_call_target="__cudnn$fmhaSoftmax"
"""
    )
    flops = 2 * 2 * (16 * 16) * 2048 * 2048 * 64
    assert result.seconds == result.seconds_by_kind["attention"] == pytest.approx(flops / 0.25e15 + 2e-6)
    assert result.traffic == result.traffic_by_kind["attention"] == 4 * 2 * 16 * 2048 * 16 * 64


def test_what_costs_no_kernel_costs_no_time():
    result = estimated(
        """
  %p = bf16[8388608]{0} parameter(0)
  %view = bf16[4096,2048]{1,0} bitcast(%p)
  ROOT %out = (bf16[4096,2048]{1,0}) tuple(%view)"""
    )
    assert result.seconds == 0


def test_a_group_across_hosts_is_marked_and_slower():
    lines = f"""
  %q = bf16[262144]{{0}} parameter(0)
  ROOT %sum = bf16[262144]{{0}} all-reduce(%q), {SYNC}"""
    (collective,) = estimate(compiled_step(text(lines)), Cluster(CHIP, 2, 4)).collectives
    assert collective.crosses_hosts
    assert collective.seconds == pytest.approx(2 * 2**19 * 7 / 8 / (0.5 * 4 * 25e9) + 20e-6)


STACKS = """
%write (p.1: bf16[4,1024], p.2: s32[], p.3: bf16[1,1024]) -> bf16[4,1024] {
  %p.1 = bf16[4,1024]{1,0} parameter(0)
  %p.2 = s32[] parameter(1)
  %p.3 = bf16[1,1024]{1,0} parameter(2)
  ROOT %dus = bf16[4,1024]{1,0} dynamic-update-slice(%p.1, %p.3, %p.2, %p.2)
}

%layers (s: (s32[], bf16[1,1024], bf16[4,1024])) -> (s32[], bf16[1,1024], bf16[4,1024]) {
  %s = (s32[], bf16[1,1024]{1,0}, bf16[4,1024]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %x = bf16[1,1024]{1,0} get-tuple-element(%s), index=1
  %kept = bf16[4,1024]{1,0} get-tuple-element(%s), index=2
  %written = bf16[4,1024]{1,0} fusion(%kept, %i, %x), kind=kLoop, calls=%write
  ROOT %out = (s32[], bf16[1,1024]{1,0}, bf16[4,1024]{1,0}) tuple(%i, %x, %written)
}
"""
STACKS_STEP = """
  %init = (s32[], bf16[1,1024]{1,0}, bf16[4,1024]{1,0}) parameter(0)
  ROOT %loop = (s32[], bf16[1,1024]{1,0}, bf16[4,1024]{1,0}) while(%init), condition=%less, body=%layers, backend_config={"known_trip_count":{"n":"4"}}
"""  # noqa: E501
STATE = {"weights": 1000, "optimiser": 2000, "EMA weights": 0, "batch": 30}


def test_memory_by_kind_adds_up_to_the_peak():
    step = compiled_step(
        text(STACKS_STEP, STACKS), state=STATE, weights_in_use=500, gradients=400, peak=20_000, arguments=3030
    )
    kinds = memory_by_kind(step, Module(step.hlo))
    activations = 4 * 1024 * 2
    assert kinds == {
        "weights": 1500, "gradients": 400, "optimiser": 2000, "batch": 30, "activations": activations,
        "temporary": 20_000 - 1500 - 400 - 2000 - 30 - activations,
    }  # fmt: skip
    assert sum(kinds.values()) == step.peak
    more = {"teacher": 1500, "task state": 70}
    taught = memory_by_kind(replace(step, state=STATE | more), Module(step.hlo))
    assert taught == kinds | more | {"temporary": kinds["temporary"] - 1570}


def result_of(cluster=HOST, seconds=0.5, **changes):
    return Estimate(
        compiled=compiled_step(**changes), cluster=cluster, calibration=calibration_of(CHIP, fp8=False), memory={},
        collectives=[], executed_flops=0.0, traffic_by_kind={}, longest_branches=0.0,
        modelled={"matmuls": seconds, "attention": 0.0, "all else": 0.0, "waits": 0.0},
    )  # fmt: skip


def test_what_fits_a_card():
    usable = 73_600_000_000  # 92 % of 80 GB, as launch/env.sh lets XLA have
    assert MEMORY_FRACTION == 0.92
    assert result_of().usable == usable
    assert result_of(peak=usable).fits
    assert not result_of(peak=usable + 1).fits


def test_figures_of_a_run():
    result = result_of(Cluster(CHIP, 2, 8), seconds=0.5, batch_size=2048, step_flops=4e15, total_steps=345_600)
    assert result.images_per_s == 4096
    assert result.mfu == pytest.approx(4e15 / 0.5 / 16e15)  # one half
    assert result.days == 2
    assert result.gpu_hours == 2 * 24 * 16


def test_a_schedule_for_cpus_is_refused():
    with pytest.raises(ValueError, match="CPUs"):
        estimate(compiled_step(text(STEP, LOOP), platform="cpu"), HOST)
