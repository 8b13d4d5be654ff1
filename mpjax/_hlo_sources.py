"""Where an operand of a product comes from, and what was made of it in memory on the way.

From the operand the walk goes back through whatever moves, converts or scales the same values, into
fusions and out of them, and into loops whose body hands an array on as it came, until it is at an
argument of the program or at something that was computed. Every array that it passes outside of a
fusion lies in memory: a transposed copy, a padded one, or floats that were made of 8 bits.
"""

import dataclasses
from collections.abc import Iterator

from ._hlo_program import Computation, Instruction, Program
from ._hlo_runs import Runs
from ._hlo_shapes import Shape

_SLICES = {"dynamic-slice", "slice"}
_MOVES = _SLICES | {
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
    "transpose",
}
# Of these every operand as large as the result is followed: scaled values are still the same.
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
_NO_ARRAY = {"bitcast", "get-tuple-element", "tuple", "parameter", "constant", "while", "call"}


@dataclasses.dataclass(frozen=True)
class Copy:
    """An array in memory that holds an operand in another form.

    Attributes:
      name: of the instruction that wrote it.
      kind: `"transposed"`, `"padded"` or `"dequantized"`.
      bytes: of the array, as it lies there.
      space: the memory space; 0 is main memory.
    """

    name: str
    kind: str
    bytes: int
    space: int


@dataclasses.dataclass(frozen=True)
class Source:
    """An array that an operand was made of.

    Attributes:
      shape: of the array.
      fraction: how much of it was read, a slice perhaps.
      name: JAX' name of it, `"variables['params']['up']['kernel'].values"`.
      is_argument: whether it is an argument of the program.
    """

    shape: Shape
    fraction: float
    name: str
    is_argument: bool

    @property
    def bytes(self) -> int:
        """That are read, as they lie in memory."""
        return round(self.shape.padded_bytes * self.fraction)

    @property
    def padding(self) -> int:
        """How many of these hold no value."""
        return round((self.shape.padded_bytes - self.shape.bytes) * self.fraction)


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where the walk is: an instruction, or one element of the tuple that it makes."""

    within: Computation
    instruction: Instruction
    element: int = 0

    @property
    def shape(self) -> Shape:
        shapes = self.instruction.shapes
        return shapes[self.element] if self.element < len(shapes) else shapes[0]


@dataclasses.dataclass(frozen=True)
class _Made:
    """An array in memory that the walk has passed, and how it was made from what came before."""

    name: str
    shape: Shape
    ways: frozenset[str] = frozenset()


def sources_of(
    program: Program, runs: Runs, within: Computation, operand: Instruction
) -> tuple[list[Source], list[Copy]]:
    """The arrays that an operand of a product was made of, and the copies on the way."""
    sources: dict[tuple[str, str, int], Source] = {}
    copies: dict[tuple[str, str], Copy] = {}
    seen: set[tuple[str, str, int]] = set()

    def walk(place: _Place, fraction: float, passed: tuple[_Made, ...]) -> None:
        key = (place.within.name, place.instruction.name, place.element)
        if key in seen:
            return
        seen.add(key)
        onward = list(_back(program, runs, place))
        if not onward:
            is_argument = place.within is program.entry
            is_argument &= place.instruction.opcode == "parameter"
            name = place.instruction.op_name
            sources[key] = Source(place.shape, fraction, name, is_argument)
            for copy in _copies(passed, place.shape):
                copies[copy.name, copy.kind] = copy
            return
        if _is_array(runs, place):
            passed = (*passed, _Made(place.instruction.name, place.shape))
        for each in onward:
            cut = each.shape.size and place.shape.size / each.shape.size
            is_cut = place.instruction.opcode in _SLICES
            walk(each, fraction * (cut if is_cut else 1), _passing(passed, place, each))

    walk(_Place(within, operand), 1.0, ())
    return list(sources.values()), list(copies.values())


def _is_array(runs: Runs, place: _Place) -> bool:
    fused = runs.by_name[place.within.name].fused
    return not fused and place.instruction.opcode not in _NO_ARRAY


def _passing(passed: tuple[_Made, ...], place: _Place, before: _Place) -> tuple[_Made, ...]:
    """Notes in the last array how it differs from what it is made of."""
    opcode, way = place.instruction.opcode, None
    turned = opcode == "copy" and before.shape.order != place.shape.order
    if opcode == "transpose" or turned:
        way = "transposed"
    elif opcode == "pad":
        way = "padded"
    if way is None or not passed:
        return passed
    last = dataclasses.replace(passed[-1], ways=passed[-1].ways | {way})
    return (*passed[:-1], last)


def _copies(passed: tuple[_Made, ...], source: Shape) -> Iterator[Copy]:
    for each in passed:
        ways = set(each.ways)
        if source.bits <= 8 < each.shape.bits and source.dtype != "pred":
            ways.add("dequantized")
        for way in sorted(ways):
            yield Copy(each.name, way, each.shape.padded_bytes, each.shape.space)


def _back(program: Program, runs: Runs, place: _Place) -> Iterator[_Place]:
    """What holds the same values one step earlier; nothing where they come into being."""
    within, instruction, element = place.within, place.instruction, place.element
    operands = [within.instructions[name] for name in instruction.operands]
    opcode = instruction.opcode
    if opcode == "parameter":
        yield from _outside(program, runs, place)
    elif opcode == "get-tuple-element":
        yield _Place(within, operands[0], int(instruction.text("index")))
    elif opcode == "tuple":
        yield _Place(within, operands[element])
    elif opcode in _RUNS:
        inner = program.computations[instruction.called[0]]
        yield _result(inner, element)
    elif opcode == "while":
        if _hands_on(program.computations[instruction.called[0]], element):
            yield _Place(within, operands[0], element)
    elif opcode in ("opt-barrier", "optimization-barrier"):
        yield _Place(within, operands[element if len(operands) > 1 else 0], element)
    elif opcode in _MOVES:
        yield _Place(within, operands[0], element if opcode.startswith("async") else 0)
    elif opcode in _SCALES:
        same = [each for each in operands if each.shape.dims == instruction.shape.dims]
        plain = [x for x in same if x.opcode not in ("broadcast", "constant", "iota")]
        yield from (_Place(within, x) for x in plain if x.shape.dtype != "pred")


def _result(inner: Computation, element: int) -> _Place:
    root = inner.root
    if root.opcode == "tuple":
        return _Place(inner, inner.instructions[root.operands[element]])
    return _Place(inner, root, element)


def _outside(program: Program, runs: Runs, place: _Place) -> Iterator[_Place]:
    """A parameter of a computation, as whoever runs that passes it."""
    calls = runs.by_name[place.within.name].calls
    if not calls:
        return
    call, number = calls[0], int(place.instruction.argument)
    operands = [call.within.instructions[name] for name in call.instruction.operands]
    if call.instruction.opcode == "while":
        if _hands_on(program.computations[call.instruction.called[0]], place.element):
            yield _Place(call.within, operands[0], place.element)
    elif call.instruction.opcode == "conditional":
        branch = call.instruction.called.index(place.within.name)
        yield _Place(call.within, operands[branch + 1], place.element)
    else:
        yield _Place(call.within, operands[number], place.element)


def _hands_on(body: Computation, element: int) -> bool:
    """Whether an element of a loop's state is the same after every turn."""
    if body.root.opcode != "tuple":
        return False
    kept = body.instructions[body.root.operands[element]]
    if kept.opcode != "get-tuple-element" or int(kept.text("index")) != element:
        return False
    return body.instructions[kept.operands[0]].opcode == "parameter"
