"""How `mp.explain` reads JAX' name stacks, and numbers from an XLA program's text."""

import pytest

from mpjax._hlo_names import name_of
from mpjax._hlo_program import parse
from mpjax._hlo_runs import runs_of
from mpjax._hlo_shapes import dtype_name, shapes_in
from mpjax._hlo_traffic import traffic_of

STACKS = [
    ("jit(apply)/mpjax/Net/up/mpjax.quantized/dot_general", "up", "forward", "quantized"),
    (
        "jit(f)/transpose(jvp(mpjax))/Net/blocks/0/mpjax.forward/jit(_multiply)/dot_general",
        "blocks/0",
        "backward",
        "forward",
    ),
    (
        "jit(f)/mpjax/Net/while/body/closed_call/layers/up/mpjax.left.policy/cond/branch_0_fun/dot",
        "layers/up",
        "forward",
        "left.policy",
    ),
    ("jit(f)/mpjax/Net/eval_jaxpr/blocks/dense/dot_general", "blocks/dense", "forward", None),
    ("jit(f)/jvp(Outer)/Net/bk,kn->bn/dot_general", "Outer/Net", "forward", None),
    ("jit(f)/mpjax/Net/embed.attend/dot_general", "embed", "forward", None),
    ("jit(f)/transpose(jvp())/checkpoint/rematted_computation/dot", "", "recomputed", None),
    # The rule of a custom derivative, with all that is around it once more.
    (
        "jit(f)/transpose(jvp(mpjax))/Net/while/body/layers/1/mpjax.left.policy/"
        "jvp(mpjax)/Net/while/body/layers/1/mpjax.left.policy/hqk,khd->qhd/dot_general",
        "layers/1",
        "backward",
        "left.policy",
    ),
    # A wrapped model that a module of another differentiates.
    ("jit(f)/mpjax/Outer/up/jvp(mpjax)/Inner/down/dot", "up/Inner/down", "forward", None),
    # Modules that are called like control flow.
    ("jit(f)/mpjax/Net/body/cond/dot_general", "body/cond", "forward", None),
    ("", "", "forward", None),
]


@pytest.mark.parametrize("op_name, path, direction, decision", STACKS)
def test_a_name_stack(op_name, path, direction, decision):
    found = name_of(op_name)
    assert (found.path, found.direction, found.decision) == (path, direction, decision)


@pytest.mark.parametrize("word", ["quantized", "forward"])
def test_a_float_weight_is_told_beside_the_decision(word):
    found = name_of(f"jit(f)/mpjax/Net/up/mpjax.{word}.floats/jit(_multiply)/dot_general")
    assert (found.path, found.decision, found.floats) == ("up", word, True)
    assert not name_of(f"jit(f)/mpjax/Net/up/mpjax.{word}/dot_general").floats


def test_shapes_as_they_lie_in_memory():
    bf16, s4, scalar = shapes_in("(bf16[3,100]{1,0:T(8,128)(2,1)S(1)}, s4[3,100]{0,1}, f32[])")
    assert (bf16.bytes, bf16.padded_bytes, bf16.space) == (600, 8 * 128 * 2, 1)
    assert (s4.bytes, s4.padded_bytes, s4.order) == (150, 150, (0, 1))
    assert (scalar.size, scalar.bytes, scalar.space) == (1, 4, 0)
    assert [dtype_name(x) for x in ("s8", "bf16", "f8e4m3fn")] == [
        "int8",
        "bfloat16",
        "float8_e4m3fn",
    ]


PROGRAM = """HloModule jit_f, is_scheduled=true

%condition (c.1: (s32[], f32[4,8])) -> pred[] {
  %c.1 = (s32[], f32[4,8]{1,0}) parameter(0)
  %c.2 = s32[] get-tuple-element(%c.1), index=0
  %c.3 = s32[] constant(4)
  ROOT %c.4 = pred[] compare(%c.2, %c.3), direction=LT
}

%body (b.1: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %b.1 = (s32[], f32[4,8]{1,0}) parameter(0)
  %b.2 = s32[] get-tuple-element(%b.1), index=0
  %b.3 = f32[4,8]{1,0} get-tuple-element(%b.1), index=1
  %b.4 = f32[1,8]{1,0} dynamic-slice(%b.3, %b.2, %b.2), dynamic_slice_sizes={1,8}
  ROOT %b.5 = (s32[], f32[4,8]{1,0}) tuple(%b.2, %b.3)
}

ENTRY %main (p.1: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %p.1 = (s32[], f32[4,8]{1,0}) parameter(0)
  ROOT %w.1 = (s32[], f32[4,8]{1,0}) while(%p.1), condition=%condition, body=%body
}
"""


def test_a_loop_reads_its_slice_as_often_as_it_runs():
    program = parse(PROGRAM)
    runs = runs_of(program)
    assert (runs.loops, runs.unknown_loops, runs.by_name["body"].times) == (1, 0, 4)
    traffic = traffic_of(program, runs)
    assert (traffic.read, traffic.written) == (4 * 32, 4 * 32)


def test_a_loop_of_unknown_length_counts_once_and_is_said():
    runs = runs_of(parse(PROGRAM.replace("constant(4)", "parameter(1)")))
    assert (runs.loops, runs.unknown_loops, runs.by_name["body"].times) == (1, 1, 1)


def test_what_is_no_program():
    with pytest.raises(ValueError, match="it has no ENTRY computation. It starts with 'module"):
        parse("module @jit_f {}")
