"""What this machine is, and what it was measured to do: the limits beside which results stand."""

import os
import platform
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import mpjax_kernels as mk
from _timing import seconds

REPEATS = 7
MEGABYTES = 256  # more than a cache holds


def environment() -> dict[str, Any]:
    """The hardware, the versions and how busy others kept it: what every row of a run shares."""
    return {
        "backend": jax.default_backend(),
        "device": _processor() if jax.default_backend() == "cpu" else jax.devices()[0].device_kind,
        "cores": cores(),
        "load": round(os.getloadavg()[0], 2),  # of the minute before; 0 is an idle machine
        "python": platform.python_version(),
        "jax": version("jax"),
        "jaxlib": version("jaxlib"),
    } | ({"xla_flags": os.environ["XLA_FLAGS"]} if os.environ.get("XLA_FLAGS") else {})


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def limits(megabytes: int = MEGABYTES, size: int = 2048) -> dict[str, float]:
    """Measures the machine, each figure the best of several calls.

    Args:
        megabytes: The size of the array that is read, and of the one that is copied.
        size: M, K and N of the products.

    Returns:
        `read_gb_per_s`: of a float32 array summed by rows, or multiplied by a vector, whichever is
        faster. `copy_gb_per_s`: read and written, of `x + 1` in place; a large result in a new
        array costs more, as the system has to supply its pages. `float32_gops` and `int8_gops`:
        multiplications and additions of a product, two for each of M * K * N; the int8 one takes
        [M, K] and [N, K].
    """
    x = jnp.ones((64, megabytes * 2**20 // 256), jnp.float32)
    row, square = jnp.ones((1, 64)), jnp.ones((size, size))
    int8 = square.astype(jnp.int8)
    reads = (_best(lambda x: jnp.sum(x, axis=1), x), _best(jnp.matmul, row, x))
    one = jnp.ones((1, 1), jnp.float32)
    tensor = mk.QTensor(int8, one, jnp.dtype(jnp.float32))
    products = (_best(_int8_product, int8, int8), _best(_our_product, tensor, tensor))
    operations = 2 * size**3
    return {
        "read_gb_per_s": round(x.nbytes / min(reads) / 1e9, 1),
        "copy_gb_per_s": round(2 * x.nbytes / _best_in_place(x) / 1e9, 1),
        "float32_gops": round(operations / _best(jnp.matmul, square, square) / 1e9, 1),
        "int8_gops": round(operations / min(products) / 1e9, 1),
    }


def cache_eviction() -> Callable[[], Any]:
    """A call that reads so much that nothing read before is left in the caches."""
    x = jnp.ones((64, MEGABYTES * 2**20 // 256), jnp.float32)
    read = jax.jit(lambda x: jnp.sum(x, axis=1))
    return lambda: jax.block_until_ready(read(x))


def _int8_product(lhs: jax.Array, rhs: jax.Array) -> jax.Array:
    axes = (((1,), (1,)), ((), ()))
    return jax.lax.dot_general(lhs, rhs, axes, preferred_element_type=jnp.int32)


def _our_product(lhs: mk.QTensor, rhs: mk.QTensor) -> jax.Array:
    return mk.dot_general(lhs, rhs, (((1,), (1,)), ((), ())))


def _best(function: Callable[..., jax.Array], *operands: Any) -> float:
    compiled = jax.jit(function).lower(*operands).compile()
    return min(
        seconds(lambda: jax.block_until_ready(compiled(*operands))) for _ in range(REPEATS + 1)
    )


def _best_in_place(x: jax.Array) -> float:
    increment = jax.jit(lambda x: x + 1, donate_argnums=0)
    times = []
    for _ in range(REPEATS + 1):
        started = time.perf_counter()
        x = jax.block_until_ready(increment(x))
        times.append(time.perf_counter() - started)
    return min(times)


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
