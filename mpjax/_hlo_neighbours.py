"""The name of an instruction that the compiler left without one: what its neighbours' names share.

A pass of XLA that rewrites a product (one of a batch of 1, say) may forget JAX' name of it. What
feeds it and what takes its result was named; the scopes that all of these are in, it was in too.
"""

from collections.abc import Iterator

from ._hlo_names import split
from ._hlo_program import Computation, Instruction, Program
from ._hlo_runs import Runs


def op_name_of(program: Program, runs: Runs, within: Computation, instruction: Instruction) -> str:
    """JAX' name of an instruction; else the scopes that its neighbours share, and its opcode."""
    if instruction.op_name:
        return instruction.op_name
    search = _Search(program, runs)
    names = {*search.before(within, instruction), *search.after(within, instruction)}
    stacks = [split(name)[:-1] for name in names]
    shared = []
    for parts in zip(*stacks, strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return "/".join([*shared, instruction.opcode]) if shared else ""


class _Search:
    """The nearest named instructions around one, across the borders of fusions."""

    def __init__(self, program: Program, runs: Runs):
        self._program, self._runs = program, runs
        self._seen: set[tuple[str, str, bool]] = set()

    def before(self, within: Computation, instruction: Instruction) -> Iterator[str]:
        """Names of what an instruction is made of."""
        if instruction.opcode == "parameter":
            run = self._runs.by_name[within.name]
            for call in run.calls if run.fused else ():
                operand = call.instruction.operands[int(instruction.argument)]
                yield from self._named(call.within, operand, is_before=True)
        for operand in instruction.operands:
            yield from self._named(within, operand, is_before=True)

    def after(self, within: Computation, instruction: Instruction) -> Iterator[str]:
        """Names of what is made of an instruction."""
        run = self._runs.by_name[within.name]
        if instruction.is_root and run.fused:
            for call in run.calls:
                yield from self._named(call.within, call.instruction.name, is_before=False)
        for user in within.users[instruction.name]:
            yield from self._named(within, user.name, is_before=False)

    def _named(self, within: Computation, name: str, *, is_before: bool) -> Iterator[str]:
        key = (within.name, name, is_before)
        if key in self._seen:
            return
        self._seen.add(key)
        instruction = within.instructions[name]
        is_argument = instruction.opcode == "parameter"  # which has the name of a variable
        if instruction.op_name and not is_argument:
            yield instruction.op_name
        elif is_before and instruction.opcode == "fusion":
            inner = self._program.computations[instruction.called[0]]
            yield from self._named(inner, inner.root.name, is_before=True)
        elif is_before:
            yield from self.before(within, instruction)
        else:
            yield from self.after(within, instruction)
