"""Times programs, and their making; several in turns, so that what disturbs one disturbs all."""

import math
import random
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

TURN_SECONDS = 0.02  # a program faster than this is called several times in its turn
MOST_CALLS = 50
# Lets the threads of the program before go to sleep, which takes ONNX Runtime's 40 ms of a core.
PAUSE_SECONDS = 0.06


def interleaved(
    programs: Mapping[str, Callable[[], Any]],
    rounds: int,
    before: Callable[[], Any] | None = None,
) -> dict[str, list[float]]:
    """Calls every program in every round, in an order that changes; returns seconds per call.

    The first call of a turn is not counted: it wakes the threads and, without `before`, brings
    the operands into the caches that hold them.

    Args:
        programs: Calls that return when their result is ready, already warm.
        rounds: How many turns each program gets.
        before: Called before every call that is timed, and not timed itself.
    """
    calls = {name: _calls_in_a_turn(program) for name, program in programs.items()}
    samples: dict[str, list[float]] = {name: [] for name in programs}
    for turn in range(rounds):
        for name in random.Random(turn).sample(list(programs), len(programs)):
            time.sleep(PAUSE_SECONDS)
            programs[name]()
            for _ in range(calls[name]):
                if before is not None:
                    before()
                samples[name].append(seconds(programs[name]))
    return samples


def seconds(program: Callable[[], Any]) -> float:
    """The time of one call."""
    started = time.perf_counter()
    program()
    return time.perf_counter() - started


def spread(samples: list[float]) -> dict[str, Any]:
    """Median and quartiles in milliseconds, and of how many calls."""
    low, middle, high = (round(1e3 * float(q), 4) for q in np.percentile(samples, (25, 50, 75)))
    return {"median_ms": middle, "p25_ms": low, "p75_ms": high, "calls": len(samples)}


def compile_once(lower: Callable[[], Any]) -> dict[str, float]:
    """Seconds to trace and lower, to compile, and of the processor, with nothing cached."""
    jax.clear_caches()
    cpu, started = time.process_time(), time.perf_counter()
    lowered = lower()
    traced = time.perf_counter()
    lowered.compile()
    ended = time.perf_counter()
    return {
        "trace_lower": traced - started,
        "compile": ended - traced,
        "total": ended - started,
        "cpu": time.process_time() - cpu,
    }


def _calls_in_a_turn(program: Callable[[], Any]) -> int:
    fastest = min(seconds(program) for _ in range(3))
    return max(1, min(MOST_CALLS, math.ceil(TURN_SECONDS / fastest)))
