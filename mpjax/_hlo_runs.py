"""How often each computation of a program runs, and who calls it.

The body of a loop counts as often as it is known to run: by XLA's own count, or, where its back end
has dropped that, by the one number that the loop's condition compares with, as in every `lax.scan`
and `fori_loop`. A loop without either counts once, and each branch of a conditional as often as
the conditional.
"""

import dataclasses
import re
from collections.abc import Mapping

from ._hlo_program import Computation, Instruction, Program

# What these call is part of them, and nothing in between goes to memory.
_FUSING = ("fusion",)


@dataclasses.dataclass(frozen=True)
class Call:
    """One instruction that runs a computation, and the computation that holds it."""

    instruction: Instruction
    within: Computation


@dataclasses.dataclass
class Run:
    """How a computation is run.

    Attributes:
      times: how often.
      calls: what runs it; none for the entry.
      fused: whether it is part of a fusion, whose values inside never reach memory.
    """

    times: int = 0
    calls: list[Call] = dataclasses.field(default_factory=list)
    fused: bool = False


@dataclasses.dataclass(frozen=True)
class Runs:
    """How each computation is run.

    Attributes:
      by_name: the computations that run.
      loops: how many loops there are.
      unknown_loops: how many of these are of unknown length.
    """

    by_name: Mapping[str, Run]
    loops: int
    unknown_loops: int


def runs_of(program: Program) -> Runs:
    """Follows every call from the entry."""
    runs = {program.entry.name: Run(times=1)}
    loops = unknown = 0

    def visit(computation: Computation, times: int, fused: bool) -> None:
        nonlocal loops, unknown
        for instruction in computation:
            repeated = times
            if instruction.opcode == "while":
                count = trip_count(program, instruction)
                loops += 1
                unknown += count is None
                repeated = times * (1 if count is None else count)
            for name in instruction.called:
                run = runs.setdefault(name, Run())
                run.times += repeated
                run.calls.append(Call(instruction, computation))
                run.fused = fused or instruction.opcode in _FUSING
                visit(program.computations[name], repeated, run.fused)

    visit(program.entry, 1, False)
    return Runs(runs, loops, unknown)


def trip_count(program: Program, loop: Instruction) -> int | None:
    """How often the body of a loop runs, or None if the program does not say."""
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.backend_config)
    if known:
        return int(known[1])
    condition = program.computations[loop.text("condition").removeprefix("%")]
    bodies = [condition, *(program.computations[n] for each in condition for n in each.called)]
    compared = [each for body in bodies for each in body if each.opcode == "compare"]
    numbers = {
        int(each.argument)
        for body in bodies
        for each in body
        if each.opcode == "constant" and re.fullmatch(r"-?\d+", each.argument)
    }
    if len(compared) != 1 or compared[0].text("direction") not in ("LT", "GT") or len(numbers) != 1:
        return None
    return max(numbers.pop(), 0)
