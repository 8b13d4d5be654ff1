"""One case of a benchmark: we and our peers compute it, are checked, and are timed in turns."""

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from _timing import interleaved, spread

# Largest relative mean absolute errors of products of Gaussians.
FLOAT32_BOUND = 0.001  # what TensorFloat-32 would leave; float32 itself leaves 1e-6
BFLOAT16_BOUND = 0.005  # two operands and a result, each to 2**-9
# A scale per tensor follows the largest of M * K Gaussians, one per row the largest of K: with
# 2048 * 2048 and 4096 of them 5.1 and 3.6 standard deviations. The error of a product grows so.
PER_TENSOR = 1.6


@dataclass(frozen=True)
class Program:
    """What a contender is timed with.

    Attributes:
        run: One call, which returns when the result is there.
        compile_seconds: What it took to trace and compile, or to load into a session.
        bytes: The arguments, weights included, and the result.
        temporary_bytes: What the call allocates beside them, where that is known.
        text: The compiled program, where XLA made it.
    """

    run: Callable[[], Any]
    compile_seconds: float
    bytes: int
    temporary_bytes: int | None = None
    text: str = ""


@dataclass(frozen=True)
class Contender:
    """We or a peer, before anything of its is imported, quantized or compiled.

    Attributes:
        prepare: Returns the program; what it does is not timed.
        bound: The largest relative mean absolute error that its format allows; None for one that
            computes less than the case asks, as a yardstick, and is not compared.
        package: Whose version stands in the row.
        note: What a reader must know to compare it.
        decode: From what the program returns to the array that is compared.
    """

    prepare: Callable[[], Program]
    bound: float | None
    package: str = "jax"
    note: str = ""
    decode: Callable[[Any], Any] = np.asarray


@dataclass(frozen=True)
class Contest:
    """A case: what its result should be, who computes it, and how fast we mean to be.

    Attributes:
        facts: The fields of the row that say which case it is; `case` is its name.
        reference: The float32 result.
        operations: Multiplications and additions; None if they are not the point.
        targets: For a peer, the ratio of our time to its that we want at most.
    """

    facts: dict[str, Any]
    reference: np.ndarray
    ours: Contender
    peers: dict[str, Contender]
    operations: int | None = None
    targets: dict[str, float] = field(default_factory=dict)


def compiled(function: Callable[..., Any], *arguments: Any) -> Program:
    """The program of a JAX function, everything in one jit and the weights among its arguments."""
    arguments = jax.device_put(arguments)
    fresh = jax.jit(lambda *arguments: function(*arguments))  # compiled in no case before
    started = time.perf_counter()
    executable = fresh.lower(*arguments).compile()
    elapsed = time.perf_counter() - started
    return _program(lambda: jax.block_until_ready(executable(*arguments)), executable, elapsed)


def stepping(step: Callable[..., Any], state: Any, *arguments: Any) -> Program:
    """The program of `step(state, *arguments) -> (state, result)`, each call the next step.

    The state is donated from call to call.
    """
    arguments = jax.device_put(arguments)
    fresh = jax.jit(lambda state, *arguments: step(state, *arguments), donate_argnums=0)
    started = time.perf_counter()
    executable = fresh.lower(state, *arguments).compile()
    elapsed = time.perf_counter() - started
    held = [jax.tree.map(jnp.copy, state)]  # the caller's own is not donated

    def run() -> Any:
        held[0], result = executable(held[0], *arguments)
        return jax.block_until_ready(result)

    return _program(run, executable, elapsed)


def _program(run: Callable[[], Any], executable: Any, seconds: float) -> Program:
    memory = executable.memory_analysis()
    if memory is None:
        raise NotImplementedError(f"{jax.default_backend()} does not say what a program reads")
    return Program(
        run=run,
        compile_seconds=seconds,
        bytes=memory.argument_size_in_bytes + memory.output_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        text=executable.as_text(),
    )


def hold(
    contest: Contest,
    rounds: int,
    limits: dict[str, float],
    before: Callable[[], Any] | None = None,
) -> dict[str, Any]:
    """Prepares, checks and times everyone; returns the JSON row of the case.

    Raises:
        ArithmeticError: If our own result is wrong. A peer's is an entry with that error.
    """
    contenders = {"ours": contest.ours} | contest.peers
    entries = race(
        contenders, {"ours"}, contest.reference, rounds, limits, contest.operations, before
    )
    return contest.facts | {"rounds": rounds} | compared(entries, contest.targets)


def race(
    contenders: dict[str, Contender],
    own: Collection[str],
    reference: np.ndarray,
    rounds: int,
    limits: dict[str, float] | None,
    operations: int | None = None,
    before: Callable[[], Any] | None = None,
    also: Callable[[Program], dict[str, Any]] | None = None,
) -> dict[str, dict[str, Any]]:
    """Prepares, checks and times everyone; returns their entries.

    Without `limits` there are no rates in them; `also` returns further figures of a program.

    Raises:
        ArithmeticError: If the result of one of our `own` is wrong. A peer's is an entry with
            that error, as is whatever else it raises.
    """
    programs, entries = {}, {}
    for name, contender in contenders.items():
        try:
            programs[name], entries[name] = _ready(contender, reference)
        except Exception as error:  # Whatever a peer raises is its entry, and the only one caught.
            if name in own:
                raise
            entries[name] = _identity(contender) | {"error": f"{type(error).__name__}: {error}"}
    runs = {name: program.run for name, program in programs.items()}
    for name, samples in interleaved(runs, rounds, before).items():
        timing = spread(samples)
        elapsed, size = timing["median_ms"] / 1e3, programs[name].bytes
        rates = {} if limits is None else _rates(elapsed, size, operations, limits)
        entries[name] |= timing | rates | ({} if also is None else also(programs[name]))
    return entries


def compared(entries: dict[str, dict[str, Any]], targets: dict[str, float]) -> dict[str, Any]:
    """Our entry, each peer's with the ratio of our time to its, and what became of the targets."""
    ours = entries["ours"]
    peers = {name: dict(entry) for name, entry in entries.items() if name != "ours"}
    for entry in peers.values():
        if "median_ms" in entry:
            entry["ratio"] = round(ours["median_ms"] / entry["median_ms"], 4)
    verdicts = []
    for name, at_most in targets.items():
        if name in peers:
            ratio = peers[name].get("ratio")
            reached = None if ratio is None else ratio <= at_most
            verdicts.append({"peer": name, "at_most": at_most, "ratio": ratio, "reached": reached})
    float32 = peers.get("float32", {}).get("ratio")
    slower = None if float32 is None else float32 > 1
    return {"ours": ours, "peers": peers, "targets": verdicts, "slower_than_float32": slower}


def relative_error(result: Any, reference: np.ndarray) -> float:
    """The relative mean absolute error: mean(|result - reference|) / mean(|reference|)."""
    result = np.asarray(result, np.float64)
    if result.shape != reference.shape:
        raise ArithmeticError(f"the result has shape {result.shape}, not {reference.shape}")
    return float(np.mean(np.abs(result - reference)) / np.mean(np.abs(reference)))


def chosen(contenders: dict[str, Contender], names: Sequence[str] | None) -> dict[str, Contender]:
    """The contenders of these names; all of them if None."""
    return {name: each for name, each in contenders.items() if names is None or name in names}


def _ready(contender: Contender, reference: np.ndarray) -> tuple[Program, dict[str, Any]]:
    program = contender.prepare()
    result = program.run()
    error = None
    if contender.bound is not None:
        error = relative_error(contender.decode(result), reference)
        if not error <= contender.bound:  # NaN is not
            raise ArithmeticError(
                f"wrong result: relative mean absolute error {error:.4g}, "
                f"at most {contender.bound:.4g}"
            )
    entry = _identity(contender) | {
        "relative_error": None if error is None else float(f"{error:.4g}"),
        "error_bound": contender.bound,
        "compile_s": round(program.compile_seconds, 4),
        "bytes": program.bytes,
        "temporary_bytes": program.temporary_bytes,
    }
    return program, entry


def _identity(contender: Contender) -> dict[str, Any]:
    note = {"note": contender.note} if contender.note else {}
    return {"package": contender.package, "version": _version(contender.package)} | note


def _version(package: str) -> str | None:
    try:
        return version(package)
    except ModuleNotFoundError:  # of which PackageNotFoundError is one
        return None


def _rates(
    elapsed: float, size: int, operations: int | None, limits: dict[str, float]
) -> dict[str, float]:
    bandwidth = size / elapsed / 1e9
    rates = {
        "gb_per_s": round(bandwidth, 2),
        "of_read_limit": round(bandwidth / limits["read_gb_per_s"], 3),
    }
    if operations is None:
        return rates | {"of_copy_limit": round(bandwidth / limits["copy_gb_per_s"], 3)}
    rate = operations / elapsed / 1e9
    return rates | {
        "gops": round(rate, 1),
        "of_float32_limit": round(rate / limits["float32_gops"], 3),
        "of_int8_limit": round(rate / limits["int8_gops"], 3),
    }
