"""Bytes that a program moves to and from main memory, counted from its own instructions.

Each instruction outside of a fusion reads its operands and writes its result, as they lie in
memory, tiles filled up; what lies in a TPU's VMEM costs nothing here but to bring it there. A slice
reads what it cuts out, an update in place writes what it puts in, also inside a fusion; the body of
a loop counts as often as it runs. XLA's own figure (`cost_analysis()["bytes accessed"]`) counts
loops once, and VMEM like main memory.
"""

import dataclasses

from ._hlo_program import Computation, Instruction, Program
from ._hlo_runs import Runs
from ._hlo_shapes import MAIN_MEMORY, Shape
from ._hlo_sources import is_concat_bitcast

_NOTHING = {
    "add-dependency",
    "after-all",
    "async-done",
    "async-update",
    "bitcast",
    "call",
    "conditional",
    "constant",
    "copy-done",
    "domain",
    "get-tuple-element",
    "opt-barrier",
    "optimization-barrier",
    "parameter",
    "partition-id",
    "replica-id",
    "slice-done",
    "tuple",
    "while",
}
_CUTS = {"dynamic-slice", "gather", "slice"}
_SAME_VALUES = {"bitcast", "copy", "convert", "reshape"}


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Bytes read and written."""

    read: int = 0
    written: int = 0

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(self.read + other.read, self.written + other.written)

    def __mul__(self, times: int) -> "Traffic":
        return Traffic(self.read * times, self.written * times)


def traffic_of(program: Program, runs: Runs) -> Traffic:
    """Of one run of the program."""
    total = Traffic()
    for name, run in runs.by_name.items():
        if run.fused or any(call.instruction.opcode == "async-start" for call in run.calls):
            continue
        computation = program.computations[name]
        for instruction in computation:
            total += instruction_traffic(program, computation, instruction) * run.times
    return total


def instruction_traffic(program: Program, within: Computation, instruction: Instruction) -> Traffic:
    """Of one instruction outside of a fusion, once."""
    opcode = instruction.opcode
    if opcode in _NOTHING or is_concat_bitcast(instruction):
        return Traffic()
    operands = [within.instructions[name] for name in instruction.operands]
    if opcode in ("fusion", "async-start"):
        inner = program.computations[instruction.called[0]]
        return Traffic(
            sum(
                min(_main(x.shapes), _read(program, inner, inner.parameters[i]))
                for i, x in enumerate(operands)
                if i in inner.parameters
            ),
            _written(program, inner, instruction.shapes),
        )
    if opcode == "copy-start":
        return Traffic(_main(operands[0].shapes), _main(instruction.shapes[:1]))
    if opcode == "slice-start":
        part = instruction.shapes[1]
        is_main = operands[0].shape.space == MAIN_MEMORY
        return Traffic(part.padded_bytes if is_main else 0, _main((part,)))
    if opcode in _CUTS:
        is_main = operands[0].shape.space == MAIN_MEMORY
        cut = instruction.shape.padded_bytes if is_main else 0
        return Traffic(cut, _main(instruction.shapes))
    if opcode == "dynamic-update-slice":
        update = operands[1].shape
        is_main = instruction.shape.space == MAIN_MEMORY
        return Traffic(_main((update,)), update.padded_bytes if is_main else 0)
    return Traffic(sum(_main(x.shapes) for x in operands), _main(instruction.shapes))


def _main(shapes: tuple[Shape, ...]) -> int:
    return sum(shape.padded_bytes for shape in shapes if shape.space == MAIN_MEMORY)


def _read(program: Program, inner: Computation, value: Instruction) -> int:
    """How much of a value of a fusion is read in it."""
    everything, read = sum(shape.padded_bytes for shape in value.shapes), 0
    if value.is_root:
        return everything
    for user in inner.users[value.name]:
        first = user.operands[0] == value.name
        if user.opcode in _CUTS and first:
            read += user.shape.padded_bytes
        elif user.opcode == "dynamic-update-slice" and first:
            continue
        elif user.opcode in _SAME_VALUES:
            scale = value.shape.bits / user.shape.bits
            read += round(_read(program, inner, user) * scale)
        elif user.opcode == "fusion":
            nested = program.computations[user.called[0]]
            numbers = [i for i, name in enumerate(user.operands) if name == value.name]
            read += sum(_read(program, nested, nested.parameters[i]) for i in numbers)
        else:
            return everything
    return min(everything, read)


def _written(program: Program, inner: Computation, shapes: tuple[Shape, ...]) -> int:
    root = inner.root
    is_tuple = root.opcode == "tuple"
    results = [inner.instructions[name] for name in root.operands] if is_tuple else [root]
    if len(results) != len(shapes):  # a fusion in the fusion makes the tuple
        return _main(shapes)
    return sum(
        _update(program, inner, each) or shape.padded_bytes
        for each, shape in zip(results, shapes, strict=True)
        if shape.space == MAIN_MEMORY
    )


def _update(program: Program, inner: Computation, result: Instruction) -> int:
    """The bytes that a result replaces in an array that is updated in place; 0 if it is all new."""
    if result.opcode == "dynamic-update-slice":
        return inner.instructions[result.operands[1]].shape.padded_bytes
    if result.opcode == "bitcast":
        return _update(program, inner, inner.instructions[result.operands[0]])
    if result.opcode == "fusion" and not result.is_tuple:
        nested = program.computations[result.called[0]]
        return _update(program, nested, nested.root)
    return 0
