"""Every matrix product and convolution of a compiled program, with what became of it."""

import dataclasses
import json
import math
import re
from collections.abc import Iterator

from ._hlo_flops import convolution_flops, dot_flops, matrix_flops
from ._hlo_names import Lines, Name, name_of
from ._hlo_neighbours import op_name_of
from ._hlo_program import Computation, Instruction, Program
from ._hlo_runs import Runs
from ._hlo_shapes import Shape
from ._hlo_sources import Copy, Source, sources_of

_CUBLAS = re.compile(r"__cublas\$")
_CUDNN = re.compile(r"__cudnn\$conv(Forward|BackwardInput|BackwardFilter|Bias)?")
_PRODUCTS = ("dot_general", "conv_general_dilated", "ragged_dot_general", "ragged_dot")
_ATTENTION = ("mpjax_attention_scores", "mpjax_attention_output")
# Take floats, and multiply them as int8.
_QUANTIZE_LHS = ("mpjax_dynamic_int8_dot", "mpjax_dynamic_grouped_dot")


@dataclasses.dataclass(frozen=True)
class HloProduct:
    """One product, as often as it runs.

    Attributes:
      instruction: its name in the program.
      name: module path, direction and decision.
      line: of the user's source.
      lhs: the left operand as it is multiplied.
      rhs: the right one.
      result: what it makes.
      unit: what computes it.
      flops: of all its runs; None for a custom call that does not say.
      times: how often it runs.
      sources: the arrays that the operands were made of.
      copies: arrays in memory that hold an operand in another form.
      cycles: the compiler's estimate of all its runs, in cycles of a TPU, with all that is fused
        with it; None where it gives none.
    """

    instruction: str
    name: Name
    line: str
    lhs: Shape
    rhs: Shape
    result: Shape
    unit: str
    flops: int | None
    times: int
    sources: tuple[Source, ...]
    copies: tuple[Copy, ...]
    cycles: int | None

    @property
    def in_8_bits(self) -> bool:
        """Whether both operands are multiplied in 8 bits or fewer."""
        return max(self.lhs.bits, self.rhs.bits) <= 8


@dataclasses.dataclass(frozen=True)
class _Found:
    """An instruction that multiplies: its operands, and its operations in one run."""

    lhs: Instruction
    rhs: Instruction
    flops: int | None
    shapes: tuple[Shape, Shape]


def products_of(program: Program, runs: Runs, platform: str) -> list[HloProduct]:
    """Reads them in the order of the text."""
    lines, products = Lines(program.text), []
    for within in program.computations.values():
        run = runs.by_name.get(within.name)
        if run is None:
            continue
        for instruction in within:
            found = _found(within, instruction)
            if found is None:
                continue
            traced = [sources_of(program, runs, within, x) for x in (found.lhs, found.rhs)]
            outer = _in_schedule(runs, within, instruction)
            products.append(
                HloProduct(
                    instruction.name,
                    name_of(op_name_of(program, runs, within, instruction)),
                    lines.line_of(instruction),
                    *found.shapes,
                    instruction.shape,
                    _unit(platform, instruction, outer),
                    None if found.flops is None else found.flops * run.times,
                    run.times,
                    tuple(source for sources, _ in traced for source in sources),
                    tuple(copy for _, copies in traced for copy in copies),
                    None if outer.cycles is None else outer.cycles * run.times,
                )
            )
    return products


def _found(within: Computation, instruction: Instruction) -> _Found | None:
    operands = [within.instructions[name] for name in instruction.operands]
    if instruction.opcode == "dot":
        return _of(operands, dot_flops(instruction, operands[0].shape))
    if instruction.opcode == "convolution":
        shapes = operands[0].shape, operands[1].shape, instruction.shape
        return _of(operands, convolution_flops(instruction, *shapes))
    if instruction.opcode == "reduce":
        return _reduced(within, instruction, operands)
    if instruction.opcode == "custom-call" and len(operands) >= 2:
        is_product, flops = _custom(instruction, operands)
        if not is_product:
            return None
        found = _of(_largest(operands) if _is_pallas(instruction) else operands, flops)
        if instruction.text("custom_call_target") not in _QUANTIZE_LHS:
            return found
        lhs, rhs = found.shapes
        return dataclasses.replace(found, shapes=(dataclasses.replace(lhs, dtype="s8"), rhs))
    return None


def _of(operands: list[Instruction], flops: int | None) -> _Found:
    lhs, rhs = operands[:2]
    return _Found(lhs, rhs, flops, (lhs.shape, rhs.shape))


def _is_pallas(call: Instruction) -> bool:
    return call.text("custom_call_target") == "tpu_custom_call"


def _largest(operands: list[Instruction]) -> list[Instruction]:
    """The two largest, in their order: a Pallas kernel has scales and group sizes beside them."""
    by_size = sorted(operands, key=lambda x: x.shape.size, reverse=True)[:2]
    return [each for each in operands if each in by_size][:2]


def _reduced(
    within: Computation, reduction: Instruction, operands: list[Instruction]
) -> _Found | None:
    """A product that the compiler wrote as a multiplication and a sum, on the vector unit.

    The vector unit widens what it multiplies; what is reported is what it was widened from.
    """
    if name_of(reduction.op_name).primitive not in _PRODUCTS:
        return None
    multiplied = _unwidened(within, operands[0])
    if multiplied.opcode != "multiply":
        return None
    sides = [within.instructions[name] for name in multiplied.operands]
    plain = [_unwidened(within, side) for side in sides]
    shapes = plain[0].shape, plain[1].shape
    return _Found(plain[0], plain[1], 2 * operands[0].shape.size, shapes)


def _unwidened(within: Computation, instruction: Instruction) -> Instruction:
    while instruction.opcode in ("convert", "bitcast", "broadcast", "reshape", "copy"):
        instruction = within.instructions[instruction.operands[0]]
    return instruction


def _custom(call: Instruction, operands: list[Instruction]) -> tuple[bool, int | None]:
    """Whether a custom call is a product, and its operations if that can be told."""
    target, shapes = call.text("custom_call_target"), [x.shape for x in operands]
    if _CUBLAS.match(target):
        return True, _cublas_flops(call, shapes)
    if kind := _CUDNN.match(target):
        order = {
            "BackwardInput": (call.shape, shapes[1], shapes[0]),
            "BackwardFilter": (shapes[0], call.shape, shapes[1]),
        }.get(kind[1] or "", (shapes[0], shapes[1], call.shape))
        return True, convolution_flops(call, *order)
    if target == "__onednn$matmul":
        return True, matrix_flops(shapes[0], shapes[1], call.shape, _batch(call.shape))
    if re.fullmatch(r"mpjax_\w+_dot", target):  # ours: [batch, ...] each
        return True, matrix_flops(shapes[0], shapes[1], call.shape, call.shape.dims[0])
    if target in _ATTENTION:  # the first operand's last axis is summed over
        return True, 2 * call.shape.size * shapes[0].dims[-1]
    if _is_pallas(call):
        cost = re.search(r'"cost_estimate":\{"flops":"?(\d+)', call.backend_config)
        return True, int(cost[1]) if cost else None
    return False, None


def _batch(result: Shape) -> int:
    return math.prod(result.dims[:-2])


def _cublas_flops(call: Instruction, shapes: list[Shape]) -> int | None:
    found = re.search(r'"lhs_contracting_dimensions":(\[[^\]]*\])', call.backend_config)
    if found is None:
        return None
    axes = [int(axis) for axis in json.loads(found[1])]
    return 2 * call.shape.size * math.prod(shapes[0].dims[axis] for axis in axes)


def _in_schedule(runs: Runs, within: Computation, instruction: Instruction) -> Instruction:
    """The instruction outside of all fusions that an instruction is part of."""
    while runs.by_name[within.name].fused:
        call = runs.by_name[within.name].calls[0]
        within, instruction = call.within, call.instruction
    return instruction


def _unit(platform: str, instruction: Instruction, outer: Instruction) -> str:
    """What computes a product, in the words of the field."""
    if instruction.opcode == "custom-call":
        target = instruction.text("custom_call_target")
        return "Pallas" if _is_pallas(instruction) else target.removeprefix("__")
    if instruction.opcode == "reduce":
        return "vector"
    if platform == "tpu":
        return "MXU"
    config = outer.backend_config
    for mark, unit in (("triton", "Triton"), ("ynn", "YNNPACK"), ("onednn", "oneDNN")):
        if mark in config or f'"__{mark}' in config:
            return unit
    return "XLA"


def all_instructions(program: Program, runs: Runs) -> Iterator[tuple[Instruction, int]]:
    """Those outside of fusions, with how often each runs."""
    for name, run in runs.by_name.items():
        if not run.fused:
            yield from ((each, run.times) for each in program.computations[name])
