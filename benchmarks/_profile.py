"""Where the time of a compiled program goes: XLA's own trace of its operations, added up by kind.

XLA:CPU reports every thunk (a fused loop, a product, a copy) that it runs, by the name it has in
the compiled program, with its duration; the program says what is in it, and the JAX scope it came
from. The duration of a thunk is the median over the calls. What is between the thunks (dispatch,
waiting for a thread) is the row `rest`: the median duration of a whole call, measured without
the trace, less the sum; it is negative where thunks run beside each other, or longer when they are
traced. Programs take turns. A fusion that does several things counts as the first kind
below that it is; loops, whose bodies report for themselves, are not counted.
"""

import re
import tempfile
from collections import defaultdict
from pathlib import Path
from statistics import median
from typing import Any

import jax

from _contest import Program
from _timing import interleaved

CONTAINERS = ("while", "call", "conditional")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = \(?(\w+)\[([\d,]*)\].*? ([\w\-]+)\(")
_CALLED = re.compile(r"calls=%?([\w.\-]+)")
_NATIVE = re.compile(r'custom_call_target="mpjax_(\w+)"')
_NATIVE_KINDS = {
    "int8_dot": "products of weights, int8",
    "dynamic_int8_dot": "products of weights, int8",
    "float8_dot": "products of weights, float8",
    "quantize": "quantizing activations",
    "weight_dot": "products of weights, decoded",
    "grouped_dot": "products of int8 by int4",
    "dynamic_grouped_dot": "products of int8 by int4",
    "attention_scores": "products of attention",
    "attention_output": "products of attention",
}
_SCOPE = re.compile(r'op_name="([^"]*)"')
# In the names that `_inference_models.py` and Flax' attention give to their layers.
_AMAX = re.compile(r"/(query|key|value|out|up|down|head)/reduce_(max|sum)")
_SOFTMAX = re.compile(r"/attention/(reduce_max|reduce_sum|exp|sub|div)\b")


def breakdown(programs: dict[str, Program], rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds per call in each kind of operation, of each program, and in `total`."""
    kinds = {name: operations(program.text) for name, program in programs.items()}
    durations: dict[str, Any] = {name: defaultdict(list) for name in programs}
    whole = interleaved({name: program.run for name, program in programs.items()}, rounds)
    for _ in range(rounds):
        for name, program in programs.items():
            for operation, ms in _traced(program).items():
                durations[name][operation].append(ms)
    return {
        name: _added_up(durations[name], kinds[name], 1e3 * median(whole[name]))
        for name in programs
    }


def _added_up(
    durations: dict[str, list[float]], kinds: dict[str, str], whole: float
) -> dict[str, float]:
    added: dict[str, float] = defaultdict(float)
    for operation, samples in durations.items():
        kind = kinds.get(operation, "other")
        if kind != "container":
            added[kind] += median(samples)
    ordered = dict(sorted(added.items(), key=lambda item: -item[1]))
    rest = whole - sum(added.values())
    return {kind: round(ms, 4) for kind, ms in (ordered | {"rest": rest, "total": whole}).items()}


def _traced(program: Program) -> dict[str, float]:
    """Milliseconds in each operation of one call."""
    program.run()  # wakes the threads
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            program.run()
        (path,) = Path(folder).rglob("*.xplane.pb")
        data = jax.profiler.ProfileData.from_file(str(path))
        found: dict[str, float] = defaultdict(float)
        for plane in data.planes:
            for line in plane.lines:
                for event in line.events:
                    operation = dict(event.stats).get("hlo_op")
                    if operation is not None:
                        found[str(operation)] += event.duration_ns / 1e6
    return found


def operations(text: str) -> dict[str, str]:
    """The kind of every instruction of a compiled program, by its name."""
    computations: dict[str, list[str]] = {}
    current: list[str] = []
    for line in text.splitlines():
        start = _COMPUTATION.match(line)
        if start:
            current = computations.setdefault(start[1], [])
        elif _INSTRUCTION.match(line):
            current.append(line)
    found = {}
    for lines in computations.values():
        for line in lines:
            match, called = _INSTRUCTION.match(line), _CALLED.search(line)
            assert match is not None
            inside = computations.get(called[1], []) if called else []
            found[match[1]] = kind_of([line, *inside])
    return found


def kind_of(lines: list[str]) -> str:
    """What a thunk does, from the lines of the compiled program that it consists of."""
    matches = [match for line in lines if (match := _INSTRUCTION.match(line))]
    if matches and matches[0][4] in CONTAINERS:
        return "container"
    native = next((found[1] for line in lines if (found := _NATIVE.search(line))), None)
    if native in _NATIVE_KINDS:
        return _NATIVE_KINDS[native]
    opcodes = {match[4] for match in matches}
    scopes = " ".join(scope[1] for line in lines if (scope := _SCOPE.search(line)))
    for match in matches:
        if match[4] in ("dot", "convolution"):
            inside = "hqk" in scopes
            where = "attention" if inside else "weights"
            return f"products of {where}, {'int8' if match[2] == 's32' else match[2]}"
    if "round-nearest-even" in opcodes or "reduce" in opcodes and _AMAX.search(scopes):
        return "quantizing activations"
    if _SOFTMAX.search(scopes):
        return "softmax"
    if "norm" in scopes:
        return "norms and residual sums"
    if "erf" in scopes or "tanh" in scopes:
        return "gelu"
    if "gather" in opcodes:
        return "embeddings"
    if opcodes & {"transpose", "copy", "dynamic-slice", "dynamic-update-slice", "concatenate"}:
        return "copies"
    return "other elementwise"
