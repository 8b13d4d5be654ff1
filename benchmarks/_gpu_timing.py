"""Times a GPU by its own clock: the durations of what it ran, from the trace of XLA's profiler.

A call from Python to a GPU and back takes 0.1 ms, which is longer than many a product. What the
trace holds is every kernel, copy and fill with its duration, those of CUDA graphs and of other
libraries in this process too. Left out is the time between them, of which a program that waits for
nobody has little.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from _timing import spread


def busy(program: Callable[[], Any], calls: int) -> list[float]:
    """Seconds in which the GPU was at work in each of several calls.

    Args:
        program: A call that returns when its result is ready, already warm.
        calls: How often it is called; each call runs the same kernels.

    Raises:
        NotImplementedError: If JAX has no GPU.
        RuntimeError: If the trace does not hold equally many events of every call.
    """
    if jax.default_backend() != "gpu":
        raise NotImplementedError(f"{jax.default_backend()} has no kernels to time")
    program()
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(calls):
                program()
        (path,) = Path(folder).rglob("*.xplane.pb")
        data = jax.profiler.ProfileData.from_file(str(path))
        events = sorted(
            (event.start_ns, event.duration_ns)
            for plane in data.planes
            if "GPU" in plane.name
            for line in plane.lines
            if line.name.startswith("Stream")
            for event in line.events
        )
    each, left = divmod(len(events), calls)
    if left or not each:
        raise RuntimeError(f"the trace of {calls} calls holds {len(events)} events")
    durations = [nanoseconds / 1e9 for _, nanoseconds in events]
    return [sum(durations[i : i + each]) for i in range(0, len(durations), each)]


def busy_entry(program: Any, calls: int = 20) -> dict[str, Any]:
    """The figures of `busy` for a row; none where there is no GPU."""
    if jax.default_backend() != "gpu":
        return {}
    try:
        samples = busy(program.run, calls)
    except RuntimeError as error:
        return {"busy_error": str(error)}
    return {f"busy_{name}": value for name, value in spread(samples).items()}
