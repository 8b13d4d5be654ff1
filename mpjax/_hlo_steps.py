"""One step from a value back to what holds the same values before it.

Whatever moves, converts or scales them is passed, into fusions and out of them, into loops whose
body hands an array on as it came, and through the slices in which a TPU fetches large arrays.
"""

import dataclasses
from collections.abc import Iterator

from ._hlo_program import Computation, Instruction, Program
from ._hlo_runs import Runs
from ._hlo_shapes import Shape

SLICES = {"dynamic-slice", "slice", "slice-start"}
_MOVES = SLICES | {
    "async-done",
    "async-update",
    "bitcast",
    "bitcast-convert",
    "broadcast",
    "copy",
    "copy-done",
    "copy-start",
    "dynamic-update-slice",  # of a cache, in place
    "pad",
    "reshape",
    "reverse",
    "slice-done",
    "transpose",
}
# Values scaled or rounded by what was spread over them are still the same; a sum of two is not.
_SCALES = {
    "add",
    "and",
    "clamp",
    "convert",
    "divide",
    "floor",
    "maximum",
    "minimum",
    "multiply",
    "negate",
    "or",
    "round-nearest-even",
    "select",
    "shift-left",
    "shift-right-arithmetic",
    "shift-right-logical",
    "subtract",
    "xor",
}
_RUNS = {"fusion", "call", "async-start"}


@dataclasses.dataclass(frozen=True)
class Place:
    """Where the walk is: an instruction, or one element of the tuple that it makes."""

    within: Computation
    instruction: Instruction
    element: int = 0

    @property
    def key(self) -> tuple[str, str, int]:
        """What makes it the same place."""
        return self.within.name, self.instruction.name, self.element

    @property
    def shape(self) -> Shape:
        """Of the array there."""
        shapes = self.instruction.shapes
        return shapes[self.element] if self.element < len(shapes) else shapes[0]


def steps_back(program: Program, runs: Runs, place: Place) -> Iterator[Place]:
    """What holds the same values one step earlier; nothing where they come into being."""
    within, instruction, element = place.within, place.instruction, place.element
    operands = [within.instructions[name] for name in instruction.operands]
    opcode = instruction.opcode
    if opcode == "parameter":
        yield from _outside(program, runs, place)
    elif opcode == "get-tuple-element":
        yield Place(within, operands[0], int(instruction.text("index")))
    elif opcode == "tuple":
        yield Place(within, operands[element])
    elif opcode in _RUNS:
        inner = program.computations[instruction.called[0]]
        yield _result(inner, element)
    elif opcode == "while":
        if _hands_on(program.computations[instruction.called[0]], element):
            yield Place(within, operands[0], element)
    elif opcode in ("opt-barrier", "optimization-barrier"):
        yield Place(within, operands[element if len(operands) > 1 else 0], element)
    elif opcode == "concatenate" or _is_concat_bitcast(instruction):
        yield from (Place(within, each) for each in operands)
    elif opcode in _MOVES:
        yield Place(within, operands[0], element if opcode.startswith("async") else 0)
    elif opcode in _SCALES:
        scaled = [each for each in operands if not _is_spread(within, each)]
        yield from (Place(within, each) for each in scaled if len(scaled) == 1)


def _is_spread(within: Computation, operand: Instruction) -> bool:
    """Whether an operand has fewer values than it shows, or only decides between others."""
    while operand.opcode in ("bitcast", "reshape", "convert", "copy", "transpose"):
        operand = within.instructions[operand.operands[0]]
    is_few = operand.opcode in ("broadcast", "constant", "iota") or operand.shape.size == 1
    return is_few or operand.shape.dtype == "pred"


def _is_concat_bitcast(instruction: Instruction) -> bool:
    """Whether it only says that arrays lie behind each other: a TPU fetches large ones in parts."""
    return instruction.text("custom_call_target") == "ConcatBitcast"


def _result(inner: Computation, element: int) -> Place:
    root = inner.root
    if root.opcode == "tuple":
        return Place(inner, inner.instructions[root.operands[element]])
    return Place(inner, root, element)


def _outside(program: Program, runs: Runs, place: Place) -> Iterator[Place]:
    """A parameter of a computation, as whoever runs that passes it."""
    calls = runs.by_name[place.within.name].calls
    if not calls:
        return
    call, number = calls[0], int(place.instruction.argument)
    operands = [call.within.instructions[name] for name in call.instruction.operands]
    if call.instruction.opcode == "while":
        if _hands_on(program.computations[call.instruction.called[0]], place.element):
            yield Place(call.within, operands[0], place.element)
    elif call.instruction.opcode == "conditional":
        branch = call.instruction.called.index(place.within.name)
        yield Place(call.within, operands[branch + 1], place.element)
    else:
        yield Place(call.within, operands[number], place.element)


def _hands_on(body: Computation, element: int) -> bool:
    """Whether an element of a loop's state is the same after every turn."""
    if body.root.opcode != "tuple":
        return False
    kept = body.instructions[body.root.operands[element]]
    if kept.opcode != "get-tuple-element" or int(kept.text("index")) != element:
        return False
    return body.instructions[kept.operands[0]].opcode == "parameter"
