"""What a program compiled for a TPU moves and computes, instruction by instruction."""

import dataclasses
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mpjax as mp
from _tpu_schedule import schedule
from mpjax._compile_target import compile_for
from mpjax._hlo_program import Computation, Program, parse
from mpjax._hlo_runs import runs_of
from mpjax._hlo_traffic import Traffic, instruction_traffic

# The clocks at which the schedules of large products reach the rates that Google publishes.
CLOCKS = {"v5e": 1.5e9, "v6e": 1.75e9, "tpu7x": 1.1e9}
CORES = {"v5e": 1, "v6e": 1, "tpu7x": 2}


@dataclasses.dataclass(frozen=True)
class Account:
    """One program on one core.

    Attributes:
        cycles: The estimate: the instructions one after the other, each as its schedule says, but
            no less than all bytes take at the bandwidth, nor than `floor`.
        bundles: Of all instructions.
        passes: Over the first argument, over the second, and the bytes of all else, results
            aside, in sizes of the first.
        read: Bytes from main memory.
        written: Bytes to it.
        temporary: Bytes allocated there beside arguments and results.
        vmem: The most that an instruction asks for, in bytes.
        unlisted: Instructions that move bytes and have no schedule; copies are among them.
        compile_s: What compiling took.
    """

    cycles: int
    bundles: int
    passes: dict[str, float]
    read: int
    written: int
    temporary: int
    vmem: int
    unlisted: tuple[str, ...]
    compile_s: float


def bytes_per_cycle(target: str) -> float:
    """Of the memory, for one core."""
    return mp.resolve_target(target).bandwidth / CORES[target] / CLOCKS[target]


def floor_cycles(target: str, operations: int, dtype: str, moved: int) -> int:
    """What no program can be below: the published rate of multiplying, and moving all once."""
    rate = mp.resolve_target(target).rate(dtype) / CORES[target]
    return round(max(operations / rate * CLOCKS[target], moved / bytes_per_cycle(target)))


def account(
    function: Callable[..., Any], args: tuple[Any, ...], target: str, listings: Path, floor: int
) -> Account:
    """Compiles a function and reads what its compiler wrote into the folder of listings."""
    before = _listings(listings)
    started = time.perf_counter()
    compiled = compile_for(function, args, {}, target)
    elapsed = time.perf_counter() - started
    schedules = {}
    for path in _listings(listings) - before:
        name = re.sub(r"^\d+-|-\d+-final_bundles\.txt$", "", path.name)
        if name != "TLP" and not name.startswith("<"):  # what starts and ends a program
            schedules[name] = schedule(path.read_text(), bytes_per_cycle(target))
        path.unlink()
    program = parse(compiled.text)
    total, of_argument, bundles, cycles, unlisted = Traffic(), {0: 0, 1: 0}, 0, 0.0, []
    for within, times in _computations(program):
        for instruction in within:
            found = schedules.get(instruction.name)
            if found is None:
                moved, reads = _by_text(program, within, instruction)
                unlisted += [instruction.name] if moved != Traffic() else []
            else:
                moved, reads = Traffic(found.read, found.written), found.read_of
                bundles += found.bundles * times
                cycles += found.cycles * times
            total += moved * times
            for number, size in reads.items():
                argument = _argument(within, instruction.operands[number])
                if within.name == program.entry.name and argument in of_argument:
                    of_argument[argument] += size * times
    shapes = program.entry.parameters
    sizes = [shapes[i].shape.padded_bytes for i in (0, 1)]
    result = sum(shape.padded_bytes for shape in program.entry.root.shapes)
    rest = total.read + total.written - sum(of_argument.values()) - result
    passes = {
        "first": of_argument[0] / sizes[0],
        "second": of_argument[1] / sizes[1],
        "rest": max(0, rest) / sizes[0],
    }
    moving = (total.read + total.written) / bytes_per_cycle(target)
    vmem = re.findall(r'"memory_space":"1","offset":"\d+","size":"(\d+)"', compiled.text)
    return Account(
        round(max(cycles, moving, floor)),
        bundles,
        {name: round(value, 2) for name, value in passes.items()},
        total.read,
        total.written,
        compiled.memory.get("temp", 0),
        max(map(int, vmem), default=0),
        tuple(unlisted),
        round(elapsed, 1),
    )


def _listings(folder: Path) -> set[Path]:
    return {p for p in folder.glob("*-final_bundles.txt") if "schedule-analysis" not in p.name}


def _computations(program: Program) -> list[tuple[Computation, int]]:
    """What runs outside of fusions, with how often."""
    return [
        (program.computations[name], run.times)
        for name, run in runs_of(program).by_name.items()
        if not run.fused and not any(c.instruction.opcode == "async-start" for c in run.calls)
    ]


def _by_text(program: Program, within: Computation, instruction: Any) -> tuple[Traffic, dict]:
    """What an instruction without a schedule moves, by the text of the program: a copy."""
    moved = instruction_traffic(program, within, instruction)
    return moved, ({0: moved.read} if instruction.operands and moved.read else {})


def _argument(within: Computation, name: str) -> int | None:
    """The number of the program's argument that an operand is; None if it is something else."""
    found = within.instructions[name]
    while found.opcode == "bitcast":
        found = within.instructions[found.operands[0]]
    return int(found.argument) if found.opcode == "parameter" else None
