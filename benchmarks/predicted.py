"""Does the roofline predict how long a product takes?

A product [M, K] @ [K, N] has 2 * M * K * N operations and has to move its operands and its result
once. With the peak rate of the dtype and the bandwidth of the memory, both the vendor's
(`mp.resolve_target()`), it takes at least

    max(operations / peak, bytes / bandwidth)

Ten shapes, from a decoding step to a large square, each in bfloat16, in float8 and in int8 with
a scale per row and per output channel (operands quantized beforehand, the result in bfloat16), are
measured, and the prediction set beside. One JSON row per shape and dtype: both times, and
`efficiency`, predicted over measured; and a last row `summary` with, for each dtype and for all,
Pearson's correlation of the logarithms, Spearman's of the ranks, and the geometric mean of the
efficiencies. A measured time is that in which the GPU was at work (`_gpu_timing.py`); without a
GPU, that of a call.

    python benchmarks/predicted.py [--quick]
"""

import math
from functools import partial
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import mpjax as mp
import mpjax_kernels as mk
from _contest import Program, compiled
from _gpu_timing import busy
from _machine import environment
from _suite import Rows, output_folder, parser
from _timing import interleaved

SHAPES = ((1, 8192, 28672), (16, 4096, 14336), (64, 8192, 8192), (256, 4096, 16384))
SHAPES += ((512, 2048, 2048), (1024, 1024, 1024), (2048, 4096, 4096), (4096, 4096, 4096))
SHAPES += ((4096, 8192, 28672), (8192, 8192, 8192))
QUICK_SHAPES = ((1, 256, 512), (16, 128, 128), (128, 256, 256))
DTYPES = ("bfloat16", "float8_e4m3fn", "int8")
CALLS = 20


def main(arguments: list[str] | None = None) -> None:
    options = parser(__doc__).parse_args(arguments)
    if jax.default_backend() != "gpu" and not options.quick:
        print("predicted.py measures a GPU, and there is none: --quick rehearses it on a CPU.")
        return
    jax.config.update("jax_enable_compilation_cache", False)
    written = Rows("predicted", output_folder(options, True))
    machine, target = environment(), mp.resolve_target()
    shared = {"benchmark": "predicted", "target": target.name, "machine": machine}
    rows = []
    for shape in QUICK_SHAPES if options.quick else SHAPES:
        for dtype in DTYPES:
            times = milliseconds(product(shape, dtype), 3 if options.quick else CALLS)
            predicted, measured = roofline(shape, dtype, target), median(times)
            row = dict(zip("mkn", shape, strict=True)) | {"dtype": dtype}
            row |= {"predicted_ms": predicted, "measured_ms": measured}
            row["efficiency"] = predicted / measured
            rows.append(rounded(row) | {"calls": len(times)})
            written.add(shared | rows[-1])
            print(line(rows[-1]))
    of = {name: [row for row in rows if row["dtype"] == name] for name in DTYPES} | {"all": rows}
    summary = {name: correlations(some) for name, some in of.items()}
    written.add(shared | {"summary": summary})
    for name, figures in summary.items():
        print(f"{name}: {figures}")


def roofline(shape: tuple[int, int, int], dtype: str, target: mp.Target) -> float:
    """Milliseconds that a product takes at least: of operands in `dtype` to bfloat16."""
    m, k, n = shape
    size = jnp.dtype(dtype).itemsize
    scales = 0 if dtype == "bfloat16" else 4 * (m + n)
    moved = size * (m * k + k * n) + 2 * m * n + scales
    return 1e3 * max(2 * m * k * n / target.rate(dtype), moved / target.bandwidth)


def product(shape: tuple[int, int, int], dtype: str) -> Program:
    """The product of Gaussians, made where they are multiplied."""
    m, k, n = shape
    x, w = (
        jax.random.normal(jax.random.key(seed), of, jnp.bfloat16)
        for seed, of in enumerate(((m, k), (k, n)))
    )
    if dtype == "bfloat16":
        return compiled(jnp.matmul, x, w)
    left, right = mk.quantize(x, dtype, axis=1), mk.quantize(w, dtype, axis=0)
    return compiled(mk.matmul, left, mk.contiguous(right, 0))


def milliseconds(program: Program, calls: int) -> list[float]:
    """Of several calls: of the GPU, or of the calls where there is none."""
    program.run()
    if jax.default_backend() == "gpu":
        seconds = busy(program.run, calls)
    else:
        seconds = interleaved({"": program.run}, calls)[""]
    return [1e3 * each for each in seconds]


def correlations(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Of the predicted and the measured times, which span orders of magnitude."""
    predicted, measured = (
        np.log([row[name] for row in rows]) for name in ("predicted_ms", "measured_ms")
    )
    return {
        "pearson_of_logs": round(float(np.corrcoef(predicted, measured)[0, 1]), 4),
        "spearman": round(float(np.corrcoef(_ranks(predicted), _ranks(measured))[0, 1]), 4),
        "mean_efficiency": round(float(np.exp(np.mean(predicted - measured))), 3),
    }


def _ranks(values: np.ndarray) -> np.ndarray:
    """The place of each in order; equal ones share the mean of theirs."""
    _, which, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[which]


def rounded(row: dict[str, Any]) -> dict[str, Any]:
    digits = partial(round, ndigits=5)
    return {name: digits(v) if isinstance(v, float) else v for name, v in row.items()}


def line(row: dict[str, Any]) -> str:
    shape = "x".join(str(row[axis]) for axis in "mkn")
    bound = math.floor(100 * row["efficiency"])
    return (
        f"{shape:>18} {row['dtype']:<14} predicted {row['predicted_ms']:.4f} ms, measured "
        f"{row['measured_ms']:.4f} ms: {bound} %"
    )


if __name__ == "__main__":
    main()
