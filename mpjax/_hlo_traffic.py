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
# Custom calls that only give a name to memory: that of a loop's results, or of neighbours.
_NO_WORK = {"AllocateBuffer", "ConcatBitcast"}
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
    if opcode in _NOTHING or instruction.text("custom_call_target") in _NO_WORK:
        return Traffic()
    operands = [within.instructions[name] for name in instruction.operands]
    if opcode in ("fusion", "async-start"):
        inner = program.computations[instruction.called[0]]
        reads = [
            _part(operand.shapes, _read(program, inner, inner.parameters[i]))
            for i, operand in enumerate(operands)
            if i in inner.parameters
        ]
        return Traffic(sum(reads), _written(program, inner, instruction.shapes))
    if opcode == "copy-start":
        return Traffic(_part(operands[0].shapes), _part(instruction.shapes[:1]))
    if opcode == "slice-start":
        part = instruction.shapes[1]
        return Traffic(_part(operands[0].shapes, part.size), _part((part,)))
    if opcode in _CUTS:
        cut = instruction.shape
        return Traffic(_part(operands[0].shapes, cut.size), _part(instruction.shapes))
    if opcode == "dynamic-update-slice":
        update = operands[1].shape
        return Traffic(_part((update,)), _part(instruction.shapes, update.size))
    return Traffic(sum(_part(x.shapes) for x in operands), _part(instruction.shapes))


def _part(shapes: tuple[Shape, ...], values: float | None = None) -> int:
    """Bytes of arrays in main memory, or of so many values of one of them.

    What a fusion cuts out has a layout of its own there, which says nothing about what it costs.
    """
    main = [shape for shape in shapes if shape.space == MAIN_MEMORY]
    if values is None:
        return sum(shape.padded_bytes for shape in main)
    return sum(round(x.padded_bytes * min(1.0, values / max(x.size, 1))) for x in main)


def _read(program: Program, inner: Computation, value: Instruction) -> float | None:
    """How many entries of an array of a fusion are read in it; None for all of them."""
    read = 0.0
    if value.is_root:
        return None
    for user in inner.users[value.name]:
        first = user.operands[0] == value.name
        if user.opcode in _CUTS and first:
            read += user.shape.size
        elif user.opcode == "dynamic-update-slice" and first:
            continue
        elif user.opcode in _SAME_VALUES or _only_copies(program, user):
            part = _read(program, inner, user)
            if part is None:
                return None
            read += part
        elif user.opcode == "fusion":
            nested = program.computations[user.called[0]]
            numbers = [i for i, name in enumerate(user.operands) if name == value.name]
            parts = [_read(program, nested, nested.parameters[i]) for i in numbers]
            if None in parts:
                return None
            read += sum(part for part in parts if part is not None)
        else:
            return None
    return read


def _only_copies(program: Program, user: Instruction) -> bool:
    """Whether an instruction of a fusion is one that gives an array another layout on the way."""
    if user.opcode != "fusion" or len(user.operands) != 1:
        return False
    nested = program.computations[user.called[0]]
    return all(each.opcode in (*_SAME_VALUES, "parameter") for each in nested)


def _written(program: Program, inner: Computation, shapes: tuple[Shape, ...]) -> int:
    root = inner.root
    is_tuple = root.opcode == "tuple"
    results = [inner.instructions[name] for name in root.operands] if is_tuple else [root]
    if len(results) != len(shapes):  # a fusion in the fusion makes the tuple
        return _part(shapes)
    return sum(
        _part((shape,), _update(program, inner, each))
        for each, shape in zip(results, shapes, strict=True)
    )


def _update(program: Program, inner: Computation, result: Instruction) -> int | None:
    """How many entries a result replaces in an array that is updated in place; None for all."""
    if result.opcode == "dynamic-update-slice":
        return inner.instructions[result.operands[1]].shape.size
    if result.opcode == "bitcast":
        return _update(program, inner, inner.instructions[result.operands[0]])
    if result.opcode == "fusion" and not result.is_tuple:
        nested = program.computations[result.called[0]]
        return _update(program, nested, nested.root)
    return None
