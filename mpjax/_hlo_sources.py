"""Where an operand of a product comes from, and what was made of it in memory on the way.

From the operand the walk goes back, step by step (`_hlo_steps.py`), until it is at an argument of
the program or at something that was computed. Every array that it passes outside of a fusion lies
in memory: a transposed copy, a padded one, or floats that were made of 8 bits.
"""

import dataclasses
from collections.abc import Iterator

from ._hlo_program import Computation, Instruction, Program
from ._hlo_runs import Runs
from ._hlo_shapes import Shape
from ._hlo_steps import SLICES, Place, steps_back

_NO_ARRAY = {"bitcast", "get-tuple-element", "tuple", "parameter", "constant", "while", "call"}


@dataclasses.dataclass(frozen=True)
class Copy:
    """An array in memory that holds an operand in another form.

    Attributes:
      name: of the instruction that wrote it.
      kind: `"transposed"`, `"padded"` or `"dequantized"`.
      bytes: of the array, as it lies there; of a padded one only what it has grown by.
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
      name: JAX' name of it, `"variables['params']['up']['kernel'].values"`.
      is_argument: whether it is an argument of the program.
      fraction: how much of it was read, a slice perhaps.
    """

    shape: Shape
    name: str
    is_argument: bool
    fraction: float = 1.0

    @property
    def bytes(self) -> int:
        """That are read, as they lie in memory."""
        return round(self.shape.padded_bytes * self.fraction)

    @property
    def padding(self) -> int:
        """How many of these hold no value."""
        return round((self.shape.padded_bytes - self.shape.bytes) * self.fraction)


@dataclasses.dataclass(frozen=True)
class _Made:
    """An array in memory that the walk has passed, and how it was made from what came before.

    Attributes:
      name: of the instruction that wrote it.
      shape: of the array.
      ways: what was done, and how many bytes of the array are due to it.
    """

    name: str
    shape: Shape
    ways: tuple[tuple[str, int], ...] = ()


_Passed = tuple[_Made, ...]


def sources_of(
    program: Program, runs: Runs, within: Computation, operand: Instruction
) -> tuple[list[Source], list[Copy]]:
    """The arrays that an operand of a product was made of, and the copies on the way."""
    read: dict[Source, float] = {}
    copies: dict[tuple[str, str], Copy] = {}
    seen: set[tuple[tuple[str, str, int], tuple[str, ...]]] = set()

    def walk(place: Place, cuts: tuple[str, ...], fraction: float, passed: _Passed) -> None:
        if (place.key, cuts) in seen:  # two slices of one array are two reads of it
            return
        seen.add((place.key, cuts))
        onward = list(steps_back(program, runs, place))
        if not onward:
            source = Source(place.shape, place.instruction.op_name, _is_argument(program, place))
            read[source] = read.get(source, 0) + fraction
            stored = place.shape if source.is_argument else None
            copies.update({(copy.name, copy.kind): copy for copy in _copies(passed, stored)})
            return
        if _is_array(runs, place):
            passed = (*passed, _Made(place.instruction.name, place.shape))
        for each in onward:
            cut = _cut(place, each)
            passing = _passing(passed, place, each)
            if cut is None:
                walk(each, cuts, fraction, passing)
            else:
                walk(each, (*cuts, place.instruction.name), fraction * cut, passing)

    walk(Place(within, operand), (), 1.0, ())
    sources = [dataclasses.replace(x, fraction=min(part, 1.0)) for x, part in read.items()]
    return sources, list(copies.values())


def _is_argument(program: Program, place: Place) -> bool:
    return place.within is program.entry and place.instruction.opcode == "parameter"


def _cut(place: Place, before: Place) -> float | None:
    """How much of an array a slice is; None if it is no slice."""
    if place.instruction.opcode not in SLICES:
        return None
    # `slice-start` makes a tuple of the whole, the slice, and a flag.
    index = 1 if place.instruction.opcode == "slice-start" else 0
    return place.instruction.shapes[index].size / max(before.shape.size, 1)


def _is_array(runs: Runs, place: Place) -> bool:
    fused = runs.by_name[place.within.name].fused
    return not fused and place.instruction.opcode not in _NO_ARRAY


def _passing(passed: _Passed, place: Place, before: Place) -> _Passed:
    """Notes in the last array how it differs from what it is made of."""
    if not passed:
        return passed
    opcode, last = place.instruction.opcode, passed[-1]
    turned = opcode == "copy" and before.shape.order != place.shape.order
    if opcode == "transpose" or turned:
        way = ("transposed", last.shape.padded_bytes)
    elif opcode == "pad":
        way = ("padded", place.shape.bytes - before.shape.bytes)
    else:
        return passed
    return (*passed[:-1], dataclasses.replace(last, ways=(*last.ways, way)))


def _copies(passed: _Passed, stored: Shape | None) -> Iterator[Copy]:
    """What was made of an argument, `stored`, or of something computed."""
    is_narrow = stored is not None and stored.bits <= 8 and stored.dtype != "pred"
    for each in passed:
        ways = dict(each.ways)
        if is_narrow and each.shape.bits > 8:
            ways["dequantized"] = each.shape.padded_bytes
        for kind, count in ways.items():
            yield Copy(each.name, kind, count, each.shape.space)
