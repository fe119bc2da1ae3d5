"""Reading scheduled HLO, on small programs written by hand in the form that XLA's GPU compiler prints."""

import pytest

from visionfm_jax.parallel.hlo import Array, Module

BACKEND = '"force_earliest_schedule":false,"reification_cost":[]'
ASYNC = f'backend_config={{"collective_backend_config":{{"is_sync":false,"is_pipelined":false}},{BACKEND}}}'
SYNC = f'backend_config={{"collective_backend_config":{{"is_sync":true,"is_pipelined":false}},{BACKEND}}}'


def module(lines, computations=""):
    return Module(
        "HloModule jit_step, is_scheduled=true, entry_computation_layout={(f32[8]{0})->f32[8]{0}}, num_partitions=8\n"
        f"{computations}\nENTRY %main.1_spmd (param.1: s32[]) -> (s32[]) {{\n{lines}\n}}\n\n"
    )


def find(program, name):
    """An instruction of the entry and the computation around it."""
    inside = program.computations[program.entry]
    return inside[name], inside


def one_collective(lines, computations=""):
    (collective,) = module(lines, computations).collectives()
    return collective


# A step of 3 micro-batches over 4 layers, weights sharded 4 ways in 2 replicas: per layer one gather of 2 weights and
# one product on the way forward, one reduce-scatter on the way back. Kept: 2 activations; gradients in a stack.
LOOPS = f"""
%sum.1 (a.1: bf16[], b.1: bf16[]) -> bf16[] {{
  %a.1 = bf16[] parameter(0)
  %b.1 = bf16[] parameter(1)
  ROOT %add.1 = bf16[] add(%a.1, %b.1)
}}

%gemm.1 (p.1: bf16[16,64], p.2: bf16[64,64]) -> bf16[16,64] {{
  %p.1 = bf16[16,64]{{1,0}} parameter(0)
  %p.2 = bf16[64,64]{{1,0}} parameter(1)
  ROOT %dot.1 = bf16[16,64]{{1,0}} dot(%p.1, %p.2), lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}
}}

%write.1 (p.3: bf16[4,16,64], p.4: s32[], p.5: bf16[16,64]) -> bf16[4,16,64] {{
  %p.3 = bf16[4,16,64]{{2,1,0}} parameter(0)
  %p.4 = s32[] parameter(1)
  %p.5 = bf16[16,64]{{1,0}} parameter(2)
  %bitcast.1 = bf16[1,16,64]{{2,1,0}} bitcast(%p.5)
  %zero.1 = s32[] constant(0)
  ROOT %dus.1 = bf16[4,16,64]{{2,1,0}} dynamic-update-slice(%p.3, %bitcast.1, %p.4, %zero.1, %zero.1)
}}

%write_transposed.1 (p.6: s32[], p.7: bf16[16,64], p.8: bf16[4,16,64]) -> (s32[], bf16[4,16,64]) {{
  %p.6 = s32[] parameter(0)
  %p.7 = bf16[16,64]{{1,0}} parameter(1)
  %p.8 = bf16[4,16,64]{{1,2,0}} parameter(2)
  %bitcast.2 = bf16[4,64,16]{{2,1,0}} bitcast(%p.8)
  %transpose.1 = bf16[1,64,16]{{2,1,0}} transpose(%p.7), dimensions={{1,0}}
  %zero.2 = s32[] constant(0)
  %dus.2 = bf16[4,64,16]{{2,1,0}} dynamic-update-slice(%bitcast.2, %transpose.1, %p.6, %zero.2, %zero.2)
  %bitcast.3 = bf16[4,16,64]{{1,2,0}} bitcast(%dus.2)
  %one.1 = s32[] constant(1)
  %add.2 = s32[] add(%p.6, %one.1)
  ROOT %tuple.1 = (s32[], bf16[4,16,64]{{1,2,0}}) tuple(%add.2, %bitcast.3)
}}

%write_gradient.1 (p.9: f32[4,32,64], p.10: s32[], p.11: bf16[32,64]) -> f32[4,32,64] {{
  %p.9 = f32[4,32,64]{{2,1,0}} parameter(0)
  %p.10 = s32[] parameter(1)
  %p.11 = bf16[32,64]{{1,0}} parameter(2)
  %convert.1 = f32[1,32,64]{{2,1,0}} convert(%p.11)
  %zero.3 = s32[] constant(0)
  ROOT %dus.3 = f32[4,32,64]{{2,1,0}} dynamic-update-slice(%p.9, %convert.1, %p.10, %zero.3, %zero.3)
}}

%less.1 (p.12: s32[]) -> pred[] {{
  %p.12 = s32[] parameter(0)
  %four.1 = s32[] constant(4)
  ROOT %compare.1 = pred[] compare(%p.12, %four.1), direction=LT
}}

%forward.1 (s.1: (s32[], bf16[16,64], bf16[4,16,64], bf16[4,16,64], bf16[16,64], bf16[8,64])) -> (s32[]) {{
  %s.1 = (s32[], bf16[16,64]{{1,0}}, bf16[4,16,64]{{2,1,0}}, bf16[4,16,64]{{1,2,0}}, bf16[16,64]{{1,0}}, /*index=5*/bf16[8,64]{{1,0}}) parameter(0)
  %i.1 = s32[] get-tuple-element(%s.1), index=0
  %x.1 = bf16[16,64]{{1,0}} get-tuple-element(%s.1), index=1
  %kept.1 = bf16[4,16,64]{{2,1,0}} get-tuple-element(%s.1), index=2
  %kept.2 = bf16[4,16,64]{{1,2,0}} get-tuple-element(%s.1), index=3
  %shard.1 = bf16[16,64]{{1,0}} get-tuple-element(%s.1), index=4
  %shard.2 = bf16[8,64]{{1,0}} get-tuple-element(%s.1), index=5
  %all-gather-start.1 = ((bf16[16,64]{{1,0}}, bf16[8,64]{{1,0}}), (bf16[64,64]{{1,0}}, bf16[32,64]{{1,0}})) all-gather-start(%shard.1, %shard.2), channel_id=1, replica_groups=mesh['replica'=2,'fsdp'=4] {{'fsdp'}}, dimensions={{0}}, use_global_device_ids=true, metadata={{op_name="jit(step)/jvp(ViT)/while/body/all_gather" stack_frame_id=1}}, {ASYNC}
  %write.2 = bf16[4,16,64]{{2,1,0}} fusion(%kept.1, %i.1, %x.1), kind=kLoop, calls=%write.1, metadata={{op_name="jit(step)/jvp(ViT)/while/body/dynamic_update_slice"}}
  %all-gather-done.1 = (bf16[64,64]{{1,0}}, bf16[32,64]{{1,0}}) all-gather-done(%all-gather-start.1), metadata={{op_name="jit(step)/jvp(ViT)/while/body/all_gather"}}, {ASYNC}
  %weight.1 = bf16[64,64]{{1,0}} get-tuple-element(%all-gather-done.1), index=0
  %gemm.2 = bf16[16,64]{{1,0}} fusion(%x.1, %weight.1), kind=kCustom, calls=%gemm.1, metadata={{op_name="jit(step)/jvp(ViT)/while/body/dot_general"}}
  %fusion-start.1 = ((s32[], bf16[16,64]{{1,0}}, bf16[4,16,64]{{1,2,0}}), (s32[], bf16[4,16,64]{{1,2,0}}), u32[]) fusion-start(%i.1, %gemm.2, %kept.2), kind=kLoop, calls=%write_transposed.1
  %fusion-done.1 = (s32[], bf16[4,16,64]{{1,2,0}}) fusion-done(%fusion-start.1)
  %next.1 = s32[] get-tuple-element(%fusion-done.1), index=0
  %kept.3 = bf16[4,16,64]{{1,2,0}} get-tuple-element(%fusion-done.1), index=1
  ROOT %tuple.2 = (s32[], bf16[16,64]{{1,0}}, bf16[4,16,64]{{2,1,0}}, bf16[4,16,64]{{1,2,0}}, bf16[16,64]{{1,0}}, /*index=5*/bf16[8,64]{{1,0}}) tuple(%next.1, %gemm.2, %write.2, %kept.3, %shard.1, /*index=5*/%shard.2)
}}

%backward.1 (s.2: (s32[], bf16[128,64], f32[4,32,64])) -> (s32[], bf16[128,64], f32[4,32,64]) {{
  %s.2 = (s32[], bf16[128,64]{{1,0}}, f32[4,32,64]{{2,1,0}}) parameter(0)
  %i.2 = s32[] get-tuple-element(%s.2), index=0
  %grad.1 = bf16[128,64]{{1,0}} get-tuple-element(%s.2), index=1
  %stack.1 = f32[4,32,64]{{2,1,0}} get-tuple-element(%s.2), index=2
  %reduce-scatter-start.1 = ((bf16[128,64]{{1,0}}), bf16[32,64]{{1,0}}) reduce-scatter-start(%grad.1), channel_id=2, replica_groups=mesh['replica'=2,'fsdp'=4] {{'fsdp'}}, use_global_device_ids=true, dimensions={{0}}, to_apply=%sum.1, metadata={{op_name="jit(step)/transpose(jvp(ViT))/while/body/reduce_scatter"}}, {ASYNC}
  %reduce-scatter-done.1 = bf16[32,64]{{1,0}} reduce-scatter-done(%reduce-scatter-start.1), metadata={{op_name="jit(step)/transpose(jvp(ViT))/while/body/reduce_scatter"}}
  %write.3 = f32[4,32,64]{{2,1,0}} fusion(%stack.1, %i.2, %reduce-scatter-done.1), kind=kLoop, calls=%write_gradient.1
  ROOT %tuple.3 = (s32[], bf16[128,64]{{1,0}}, f32[4,32,64]{{2,1,0}}) tuple(%i.2, %grad.1, %write.3)
}}

%micro.1 (s.3: (s32[], f32[4,32,64])) -> (s32[], f32[4,32,64]) {{
  %s.3 = (s32[], f32[4,32,64]{{2,1,0}}) parameter(0)
  %i.3 = s32[] get-tuple-element(%s.3), index=0
  %sums.1 = f32[4,32,64]{{2,1,0}} get-tuple-element(%s.3), index=1
  %start.1 = (s32[], bf16[16,64]{{1,0}}, bf16[4,16,64]{{2,1,0}}, bf16[4,16,64]{{1,2,0}}, bf16[16,64]{{1,0}}, /*index=5*/bf16[8,64]{{1,0}}) custom-call(), custom_call_target="AllocateBuffer"
  %while.1 = (s32[], bf16[16,64]{{1,0}}, bf16[4,16,64]{{2,1,0}}, bf16[4,16,64]{{1,2,0}}, bf16[16,64]{{1,0}}, /*index=5*/bf16[8,64]{{1,0}}) while(%start.1), condition=%less.1, body=%forward.1, metadata={{op_name="jit(step)/jvp(ViT)/while"}}, backend_config={{"known_trip_count":{{"n":"4"}},"known_init_step":{{"init":"0","step":"1"}},"dynamic_variables":[]}}
  %start.2 = (s32[], bf16[128,64]{{1,0}}, f32[4,32,64]{{2,1,0}}) custom-call(), custom_call_target="AllocateBuffer"
  %while.2 = (s32[], bf16[128,64]{{1,0}}, f32[4,32,64]{{2,1,0}}) while(%start.2), condition=%less.1, body=%backward.1, metadata={{op_name="jit(step)/transpose(jvp(ViT))/while"}}, backend_config={{"known_trip_count":{{"n":"4"}},"known_init_step":{{"init":"0","step":"1"}},"dynamic_variables":[]}}
  %grads.1 = f32[4,32,64]{{2,1,0}} get-tuple-element(%while.2), index=2
  %add.3 = f32[4,32,64]{{2,1,0}} add(%sums.1, %grads.1)
  ROOT %tuple.4 = (s32[], f32[4,32,64]{{2,1,0}}) tuple(%i.3, %add.3)
}}
"""  # noqa: E501 - XLA's lines

STEP = f"""
  %param.1 = s32[] parameter(0), metadata={{op_name="state.params[\\'blocks\\'][\\'ln1\\']"}}
  %start.3 = (s32[], f32[4,32,64]{{2,1,0}}) custom-call(), custom_call_target="AllocateBuffer"
  %while.3 = (s32[], f32[4,32,64]{{2,1,0}}) while(%start.3), condition=%less.1, body=%micro.1, metadata={{op_name="jit(step)/while"}}, backend_config={{"known_trip_count":{{"n":"3"}},"dynamic_variables":[]}}
  %grads.2 = f32[4,32,64]{{2,1,0}} get-tuple-element(%while.3), index=1
  %all-reduce.1 = f32[4,32,64]{{2,1,0}} all-reduce(%grads.2), channel_id=3, replica_groups=mesh['replica'=2,'fsdp'=4] {{'replica'}}, use_global_device_ids=true, to_apply=%sum.1, metadata={{op_name="jit(step)/psum"}}, {SYNC}
  ROOT %tuple.5 = (s32[]) tuple(%param.1)
"""  # noqa: E501


@pytest.fixture(scope="module")
def step():
    return module(STEP, LOOPS)


def test_collectives_of_nested_loops(step):
    gather, scatter, reduce = step.collectives()  # in program order

    assert (gather.kind, gather.count, gather.is_async) == ("all-gather", 3 * 4, True)
    assert gather.arrays == (Array("bf16", (64, 64)), Array("bf16", (32, 64)))  # whole, not the shards
    assert gather.group == (0, 1, 2, 3)
    assert gather.nbytes == (64 * 64 + 32 * 64) * 2
    assert gather.wire_bytes == 12288 * 3 / 4
    assert gather.source == "jit(step)/jvp(ViT)/while/body/all_gather"

    assert (scatter.kind, scatter.count, scatter.is_async) == ("reduce-scatter", 3 * 4, True)
    assert scatter.arrays == (Array("bf16", (128, 64)),)  # what it is given, not the shard that it leaves
    assert scatter.wire_bytes == 128 * 64 * 2 * 3 / 4

    assert (reduce.kind, reduce.count, reduce.is_async) == ("all-reduce", 1, False)
    assert reduce.group == (0, 4)
    assert reduce.nbytes == 4 * 32 * 64 * 4
    assert reduce.wire_bytes == 2 * 32768 / 2  # a scatter and a gather of half each


def test_tuple_types_are_flattened_across_index_comments(step):
    while_ = step.computations["micro.1"]["while.1"]
    kept = Array("bf16", (4, 16, 64))
    assert while_.outputs == (
        Array("s32", ()), Array("bf16", (16, 64)), kept, kept, Array("bf16", (16, 64)), Array("bf16", (8, 64)),
    )  # fmt: skip
    assert while_.output_bytes == 4 + 2048 + 8192 + 8192 + 2048 + 1024
    assert step.computations["forward.1"].root.operands == (
        "next.1",
        "gemm.2",
        "write.2",
        "kept.3",
        "shard.1",
        "shard.2",
    )


def test_every_instruction_comes_with_its_count(step):
    counts = {i.name: times for i, _, times in step.instructions()}
    assert counts["while.3"] == counts["all-reduce.1"] == 1
    assert counts["while.1"] == counts["while.2"] == counts["add.3"] == 3
    assert counts["gemm.2"] == counts["write.3"] == 12
    assert "dot.1" not in counts  # part of gemm.2
    assert "compare.1" not in counts


def test_flops_of_a_step(step):
    flops = [(times, step.flops(i, inside)) for i, inside, times in step.instructions() if i.opcode != "while"]
    assert sum(times * f["bf16"] for times, f in flops) == 12 * 2 * 16 * 64 * 64
    assert sum(times * f.total() for times, f in flops) == 12 * 2 * 16 * 64 * 64


def test_stacks_are_told_apart_by_the_loop_that_writes_them(step):
    forward = 2 * 4 * 16 * 64 * 2  # one by a fusion, one behind a bitcast in a fusion that runs beside others
    backward = 4 * 32 * 64 * 4
    assert step.stacked_bytes() == (forward, backward)


def test_a_loop_of_unknown_length_counts_once():
    program = module(STEP.replace('"known_trip_count":{"n":"3"},', ""), LOOPS)
    assert [c.count for c in program.collectives()] == [4, 4, 1]


def test_both_branches_and_calls_are_walked():
    program = module(
        """
  %param.1 = s32[] parameter(0)
  %call.1 = s32[] call(%param.1), to_apply=%one.1
  ROOT %conditional.1 = s32[] conditional(%param.1, %call.1, %call.1), branch_computations={%one.1, %two.1}""",
        """
%one.1 (p.1: s32[]) -> s32[] {
  ROOT %p.1 = s32[] parameter(0)
}

%two.1 (p.2: s32[]) -> s32[] {
  %p.2 = s32[] parameter(0)
  ROOT %negate.1 = s32[] negate(%p.2)
}
""",
    )
    assert [i.name for i, _, _ in program.instructions()] == ["param.1", "p.1", "p.1", "p.2", "negate.1"]


@pytest.mark.parametrize(
    ("groups", "first"),
    [
        ("mesh['a'=2,'b'=4] {'b'}", (0, 1, 2, 3)),
        ("mesh['a'=2,'b'=4] {'a'}", (0, 4)),
        ("mesh['a'=2,'b'=4] {'a','b'}", (0, 1, 2, 3, 4, 5, 6, 7)),
        ("[2,4]<=[8]", (0, 1, 2, 3)),
        ("[2,4]<=[4,2]T(1,0)", (0, 2, 4, 6)),
        ("{{0,1},{2,3},{4,5},{6,7}}", (0, 1)),
        ("{{5,7,1,3},{0,2,4,6}}", (5, 7, 1, 3)),
        ("{}", (0, 1, 2, 3, 4, 5, 6, 7)),
    ],
)
def test_notations_of_replica_groups(groups, first):
    gather = one_collective(
        f"""
  %param.1 = f32[32]{{0}} parameter(0)
  ROOT %all-gather.1 = f32[256]{{0}} all-gather(%param.1), replica_groups={groups}, dimensions={{0}}, {SYNC}"""
    )
    assert gather.group == first
    assert gather.wire_bytes == 1024 * (len(first) - 1) / len(first)


@pytest.mark.parametrize(
    ("line", "wire"),
    [
        ("f32[64]{0} all-to-all(%param.1)", 256 * 3 / 4),
        ("f32[64]{0} collective-permute(%param.1)", 256),
        ("f32[64]{0} all-reduce(%param.1)", 256 * 3 / 4 * 2),
        ("f32[16]{0} reduce-scatter(%param.1)", 256 * 3 / 4),
        ("f32[256]{0} all-gather(%param.1)", 1024 * 3 / 4),
    ],
)
def test_bytes_on_the_wire(line, wire):
    collective = one_collective(
        f"  %param.1 = f32[64]{{0}} parameter(0)\n  ROOT %out.1 = {line}, replica_groups=[2,4]<=[8], {SYNC}"
    )
    assert collective.wire_bytes == wire


@pytest.mark.parametrize("opcode", ["all-gather", "reduce-scatter"])
def test_a_pair_marked_synchronous_is_synchronous(opcode):
    collective = one_collective(
        f"""
  %param.1 = f32[32]{{0}} parameter(0)
  %start.1 = ((f32[32]{{0}}), f32[32]{{0}}) {opcode}-start(%param.1), replica_groups={{}}, dimensions={{0}}, {SYNC}
  ROOT %done.1 = f32[32]{{0}} {opcode}-done(%start.1), {SYNC}"""
    )
    assert (collective.kind, collective.is_async) == (opcode, False)


ASYNC_SCATTER = """
%wrapped.1 (p.1: f32[64]) -> f32[16] {
  %p.1 = f32[64]{0} parameter(0)
  ROOT %reduce-scatter.1 = f32[16]{0} reduce-scatter(%p.1), channel_id=1, replica_groups=[2,4]<=[4,2]T(1,0), use_global_device_ids=true, dimensions={0}, to_apply=%sum.1
}
"""  # noqa: E501


@pytest.mark.parametrize("called_again", ["", ", calls=%wrapped.1"])
def test_a_wrapped_collective_is_found_once(called_again):
    scatter = one_collective(
        f"""
  %param.1 = f32[64]{{0}} parameter(0)
  %async-start.1 = ((f32[64]{{0}}), f32[16]{{0}}, u32[]) async-start(%param.1), calls=%wrapped.1, metadata={{op_name="jit(step)/scatter"}}, {ASYNC}
  ROOT %async-done.1 = f32[16]{{0}} async-done(%async-start.1){called_again}, {ASYNC}""",  # noqa: E501
        ASYNC_SCATTER,
    )
    assert (scatter.kind, scatter.is_async, scatter.count) == ("reduce-scatter", True, 1)
    assert scatter.arrays == (Array("f32", (64,)),)
    assert scatter.group == (0, 2, 4, 6)
    assert scatter.source == "jit(step)/scatter"


NESTED = """
%inner.1 (p.1: f32[2,16,32], p.2: f32[2,32,8]) -> f32[2,16,8] {
  %p.1 = f32[2,16,32]{2,1,0} parameter(0)
  %p.2 = f32[2,32,8]{2,1,0} parameter(1)
  ROOT %dot.1 = f32[2,16,8]{2,1,0} dot(%p.1, %p.2), lhs_batch_dims={0}, lhs_contracting_dims={2}, rhs_batch_dims={0}, rhs_contracting_dims={1}
}

%outer.1 (p.3: f32[2,16,32], p.4: f32[2,32,8], p.5: bf16[4,8,16]) -> (f32[2,16,8], bf16[16,16]) {
  %p.3 = f32[2,16,32]{2,1,0} parameter(0)
  %p.4 = f32[2,32,8]{2,1,0} parameter(1)
  %p.5 = bf16[4,8,16]{2,1,0} parameter(2)
  %inner.2 = f32[2,16,8]{2,1,0} fusion(%p.3, %p.4), kind=kLoop, calls=%inner.1
  %dot.2 = f32[16,16]{1,0} dot(%p.5, %p.5), lhs_contracting_dims={0,1}, rhs_contracting_dims={0,1}
  %convert.1 = bf16[16,16]{1,0} convert(%dot.2)
  ROOT %tuple.1 = (f32[2,16,8]{2,1,0}, bf16[16,16]{1,0}) tuple(%inner.2, %convert.1)
}
"""  # noqa: E501


def test_flops_of_nested_fusions_by_the_operands_dtype():
    program = module(
        """
  %a = f32[2,16,32]{2,1,0} parameter(0)
  %b = f32[2,32,8]{2,1,0} parameter(1)
  %c = bf16[4,8,16]{2,1,0} parameter(2)
  %fusion.1 = (f32[2,16,8]{2,1,0}, bf16[16,16]{1,0}) fusion(%a, %b, %c), kind=kCustom, calls=%outer.1
  %start.1 = ((f32[2,16,32], f32[2,32,8], bf16[4,8,16]), (f32[2,16,8], bf16[16,16])) fusion-start(%a, %b, %c), calls=%outer.1
  ROOT %done.1 = (f32[2,16,8], bf16[16,16]) fusion-done(%start.1), calls=%outer.1""",  # noqa: E501
        NESTED,
    )
    expected = {"f32": 2 * (2 * 16 * 8) * 32, "bf16": 2 * (16 * 16) * (4 * 8)}
    assert program.flops(*find(program, "fusion.1")) == expected
    assert program.flops(*find(program, "fusion.1")) == expected  # read again: counted once
    assert program.flops(*find(program, "start.1")) == expected
    assert not program.flops(*find(program, "done.1"))


LIBRARY = """
  %rows = bf16[16,64]{1,0} parameter(0)
  %weight = bf16[64,48]{1,0} parameter(1)
  %q = bf16[2,128,4,64]{3,2,1,0} parameter(2)
  %k = bf16[2,256,4,64]{3,2,1,0} parameter(3)
  %gemm = (bf16[16,48]{1,0}, s8[33554432]{0}) custom-call(%rows, %weight), custom_call_target="__cublas$lt$matmul", backend_config={"operation_queue_id":"0","gemm_backend_config":{"alpha_real":1,"beta":0,"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"],"lhs_batch_dimensions":[],"rhs_batch_dimensions":[]},"epilogue":"DEFAULT"}}
  %turned = (bf16[64,48]{1,0}, s8[33554432]{0}) custom-call(%rows, %gemm.0), custom_call_target="__cublas$gemm", backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["0"],"rhs_contracting_dimensions":["0"]}}}
  %gemm.0 = bf16[16,48]{1,0} get-tuple-element(%gemm), index=0
  %forward = (bf16[2,128,4,64]{3,1,2,0}, u8[0]{0}) custom-call(%q, %k, %k), custom_call_target="__cudnn$fmhaSoftmax", backend_config={"cudnn_fmha_backend_config":{"fmha_scale":0.125}}
  %backward = (bf16[2,128,4,64]{3,1,2,0}, bf16[2,256,4,64]{3,1,2,0}, bf16[2,256,4,64]{3,1,2,0}, u8[16]{0}) custom-call(%q, %k, %k, %q, %q), custom_call_target="__cudnn$fmhaSoftmaxBackward"
  %sort = bf16[16,64]{1,0} custom-call(%rows), custom_call_target="__cub$DeviceRadixSort"
  ROOT %tuple.1 = () tuple()
"""  # noqa: E501


@pytest.mark.parametrize(
    ("name", "flops"),
    [
        ("gemm", 2 * 16 * 48 * 64),
        ("turned", 2 * 64 * 48 * 16),
        ("forward", 2 * 2 * (2 * 4 * 128 * 256 * 64)),  # products of 128 queries with 256 keys, then values
        ("backward", 5 * 2 * (2 * 4 * 128 * 256 * 64)),
        ("sort", 0),
    ],
)
def test_flops_of_library_calls(name, flops):
    program = module(LIBRARY)
    counted = program.flops(*find(program, name))
    assert counted == ({"bf16": flops} if flops else {})


TRAFFIC = """
%read_layer.1 (p.1: bf16[64,4,16], p.2: s32[]) -> bf16[16,64] {
  %p.1 = bf16[64,4,16]{0,2,1} parameter(0)
  %bitcast.1 = bf16[4,16,64]{2,1,0} bitcast(%p.1)
  %p.2 = s32[] parameter(1)
  %zero.1 = s32[] constant(0)
  %slice.1 = bf16[1,16,64]{2,1,0} dynamic-slice(%bitcast.1, %p.2, %zero.1, %zero.1), dynamic_slice_sizes={1,16,64}
  ROOT %bitcast.2 = bf16[16,64]{1,0} bitcast(%slice.1)
}

%add_to_layer.1 (p.3: f32[4,16,64], p.4: s32[], p.5: bf16[16,64]) -> (f32[64,4,16], f32[16,64]) {
  %p.3 = f32[4,16,64]{2,1,0} parameter(0)
  %p.4 = s32[] parameter(1)
  %p.5 = bf16[16,64]{1,0} parameter(2)
  %zero.2 = s32[] constant(0)
  %slice.2 = f32[1,16,64]{2,1,0} dynamic-slice(%p.3, %p.4, %zero.2, %zero.2), dynamic_slice_sizes={1,16,64}
  %convert.1 = f32[1,16,64]{2,1,0} convert(%p.5)
  %add.1 = f32[1,16,64]{2,1,0} add(%slice.2, %convert.1)
  %bitcast.3 = f32[16,64]{1,0} bitcast(%add.1)
  %dus.1 = f32[4,16,64]{2,1,0} dynamic-update-slice(%p.3, %add.1, %p.4, %zero.2, %zero.2)
  %bitcast.4 = f32[64,4,16]{0,2,1} bitcast(%dus.1)
  ROOT %tuple.1 = (f32[64,4,16]{0,2,1}, f32[16,64]{1,0}) tuple(%bitcast.4, %bitcast.3)
}

%read_whole.1 (p.6: bf16[4,16,64], p.7: s32[]) -> bf16[4,16,64] {
  %p.6 = bf16[4,16,64]{2,1,0} parameter(0)
  %p.7 = s32[] parameter(1)
  %zero.3 = s32[] constant(0)
  %slice.3 = bf16[1,16,64]{2,1,0} dynamic-slice(%p.6, %p.7, %zero.3, %zero.3), dynamic_slice_sizes={1,16,64}
  %reshape.1 = bf16[16,64]{1,0} bitcast(%slice.3)
  %broadcast.1 = bf16[4,16,64]{2,1,0} broadcast(%reshape.1), dimensions={1,2}
  ROOT %add.2 = bf16[4,16,64]{2,1,0} add(%p.6, %broadcast.1)
}
"""

TRAFFIC_STEP = """
  %param = (s32[], bf16[64,4,16]{0,2,1}) parameter(0)
  %i = s32[] get-tuple-element(%param), index=0
  %stack = bf16[64,4,16]{0,2,1} get-tuple-element(%param), index=1
  %view = bf16[4,16,64]{2,1,0} bitcast(%stack)
  %sums = f32[4,16,64]{2,1,0} parameter(1)
  %zero = s32[] constant(0)
  %layer = bf16[16,64]{1,0} fusion(%stack, %i), kind=kLoop, calls=%read_layer.1
  %start = ((bf16[64,4,16]{0,2,1}, s32[]), bf16[16,64]{1,0}, u32[]) fusion-start(%stack, %i), kind=kLoop, calls=%read_layer.1
  %done = bf16[16,64]{1,0} fusion-done(%start)
  %added = (f32[64,4,16]{0,2,1}, f32[16,64]{1,0}) fusion(%sums, %i, %layer), kind=kLoop, calls=%add_to_layer.1
  %whole = bf16[4,16,64]{2,1,0} fusion(%view, %i), kind=kLoop, calls=%read_whole.1
  %slice = bf16[1,16,64]{2,1,0} dynamic-slice(%view, %i, %zero, %zero), dynamic_slice_sizes={1,16,64}
  %update = bf16[4,16,64]{2,1,0} dynamic-update-slice(%view, %slice, %i, %zero, %zero)
  %copy-start = (bf16[16,64]{1,0}, bf16[16,64]{1,0}, u32[]) copy-start(%layer)
  %copy-done = bf16[16,64]{1,0} copy-done(%copy-start)
  ROOT %sum = bf16[16,64]{1,0} add(%layer, %copy-done)
"""  # noqa: E501

LAYER = 16 * 64 * 2  # bytes in bf16


@pytest.mark.parametrize(
    ("name", "moved"),
    [
        ("layer", LAYER + 4 + LAYER),  # one layer of the stack and its index; the layer
        ("start", LAYER + 4 + LAYER),
        ("done", 0),
        ("added", (2 * LAYER + 4 + LAYER) + (2 * LAYER + 2 * LAYER)),  # fp32: one layer's sums, twice a result
        ("whole", (4 * LAYER + 4) + 4 * LAYER),  # it slices the stack, but reads all of it besides
        ("slice", 2 * LAYER),
        ("update", 2 * LAYER),
        ("copy-start", 2 * LAYER),
        ("copy-done", 0),
        ("sum", 3 * LAYER),
        ("view", 0),
        ("i", 0),
    ],
)
def test_bytes_moved(name, moved):
    program = module(TRAFFIC_STEP, TRAFFIC)
    assert program.bytes_moved(*find(program, name)) == moved


@pytest.mark.parametrize(
    "text", ["", "HloModule jit_step\n\n%one (p: s32[]) -> s32[] {\n  ROOT %p = s32[] parameter(0)\n}\n"]
)
def test_text_without_an_entry_is_refused(text):
    with pytest.raises(ValueError, match="no ENTRY"):
        Module(text)


@pytest.mark.parametrize(
    ("dtype", "nbytes"), [("pred", 6), ("u8", 6), ("s4", 3), ("f8e4m3fn", 6), ("bf16", 12), ("f32", 24), ("c64", 48)]
)
def test_bytes_of_arrays(dtype, nbytes):
    assert Array(dtype, (2, 3)).nbytes == nbytes


@pytest.mark.parametrize("in_a_loop", [False, True])  # of micro-batches
def test_what_the_forward_pass_keeps_for_the_backward_pass_beside_it(in_a_loop):
    forward, backward = 'metadata={op_name="jit(f)/jvp(M)/mul"}', 'metadata={op_name="jit(f)/transpose(jvp(M))/mul"}'
    text = f"""HloModule m, is_scheduled=true

{"" if in_a_loop else "ENTRY "}%main (p: bf16[64]) -> bf16[64] {{
  %p = bf16[64]{{0}} parameter(0)
  %kept = (bf16[64]{{0}}, f32[8]{{0}}) custom-call(%p), custom_call_target="x", {forward}
  %first = bf16[64]{{0}} get-tuple-element(%kept), index=0, {forward}
  %second = f32[8]{{0}} get-tuple-element(%kept), index=1, {forward}
  %gone = bf16[64]{{0}} multiply(%first, %first), {forward}
  %sum = f32[] reduce(%gone, %second), {forward}
  %view = bf16[8,8]{{1,0}} bitcast(%first), {backward}
  %again = bf16[64]{{0}} multiply(%p, %first), {backward}
  %used = bf16[8,8]{{1,0}} multiply(%view, %again), {backward}
  ROOT %out = bf16[64]{{0}} multiply(%used, %again), {backward}
}}
"""
    if in_a_loop:
        text += """
ENTRY %all (q: bf16[64]) -> bf16[64] {
  %q = bf16[64]{0} parameter(0)
  ROOT %loop = bf16[64]{0} while(%q), condition=%less, body=%main
}
"""
    assert Module(text).kept_bytes() == 128  # of `kept` one output, twice read; the other stays in the forward pass
