"""How fast is a quantized product on a GPU, against bfloat16 and against other libraries?

y = x @ w with x [M, K] in bfloat16 and w [K, N] Gaussian, y in bfloat16: squares, and a layer of a
large language model (8192 to 28672) that decodes one token or 16, whose weights no cache holds.
Ours are named by their format and by who shares a scale (`float8_row`: a row of x, and an output
channel of w); quantizing the activations is part of what is timed, but in `..._product`, whose
activations are quantized beforehand as those of PyTorch's `_scaled_mm` and `_int_mm` are. Peers,
in the same process: `jnp.matmul`, Qwix, Flax float8 (delayed scaling, which quantizes its weights
at every call) and PyTorch.

Everyone's result is first compared with float32, and a wrong one is not timed. One JSON row per
case, in `contenders` for each: `busy_median_ms` with quartiles, the time in which the GPU was at
work (`_gpu_timing.py`), `median_ms` of a call from Python and back, `tflops`, and `speedup`, the
busy time of bfloat16 over its own. A peer that cannot run has an entry with its error. Without a
GPU, for a rehearsal, the figures are those of calls. PyTorch needs the memory that JAX leaves:

    XLA_PYTHON_CLIENT_PREALLOCATE=false python benchmarks/gpu_matmul.py [--cases 4096 ...]
        [--contenders bfloat16 ...] [--quick]
"""

import argparse
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.table import Table

from _contest import chosen, race
from _gpu_contenders import COMPARED_ROWS, OURS, PEERS, contenders
from _gpu_timing import busy_entry
from _machine import environment
from _suite import Rows, output_folder, parser, selected
from _table import console

SHAPES = ((1024, 1024, 1024), (4096, 4096, 4096), (8192, 8192, 8192))
SHAPES += ((1, 8192, 28672), (16, 8192, 28672))
CASES = {"x".join(map(str, shape)): shape for shape in SHAPES}
QUICK_CASES = {"64x256x128": (64, 256, 128), "1x256x128": (1, 256, 128)}
ROUNDS, QUICK_ROUNDS = 5, 1


def main(arguments: list[str] | None = None) -> None:
    options = _options(arguments)
    if jax.default_backend() != "gpu" and not options.quick:
        print("gpu_matmul.py measures a GPU, and there is none: --quick rehearses it on a CPU.")
        return
    jax.config.update("jax_enable_compilation_cache", False)
    whole = options.cases is None and options.contenders is None
    written = Rows("gpu_matmul", output_folder(options, whole))
    machine = environment()
    rounds = options.rounds or (QUICK_ROUNDS if options.quick else ROUNDS)
    for case, shape in selected(QUICK_CASES if options.quick else CASES, options.cases).items():
        row = {"benchmark": "gpu_matmul", "case": case} | measure(shape, options.contenders, rounds)
        written.add(row | {"machine": machine})
        console().print(table_of(row))


def measure(shape: tuple[int, int, int], names: list[str] | None, rounds: int) -> dict[str, Any]:
    """Checks and times everyone; returns the row.

    Raises:
        ArithmeticError: If a result of ours is wrong.
    """
    m, k, n = shape
    x, w = (
        np.asarray(jax.random.normal(jax.random.key(seed), of, jnp.float32))
        for seed, of in enumerate(((m, k), (k, n)))
    )
    w = w / np.float32(np.sqrt(k))
    reference = jnp.matmul(x[:COMPARED_ROWS], w, precision=jax.lax.Precision.HIGHEST)
    known = chosen(contenders(x, w), names)
    entries = race(known, OURS, np.asarray(reference), rounds, None, also=busy_entry)
    for entry in entries.values():
        if time_of(entry):
            entry["tflops"] = round(2 * m * k * n / time_of(entry) / 1e9, 2)
    base = time_of(entries.get("bfloat16", {}))
    for entry in entries.values():
        if base and time_of(entry):
            entry["speedup"] = round(base / time_of(entry), 3)
    return {"m": m, "k": k, "n": n, "rounds": rounds, "contenders": entries}


def time_of(entry: dict[str, Any]) -> float:
    """Milliseconds of an entry: those of the GPU, if it has one; 0 if it did not run."""
    return entry.get("busy_median_ms") or entry.get("median_ms", 0.0)


def table_of(row: dict[str, Any]) -> Table:
    table = Table(title=row["case"], title_justify="left", box=None, pad_edge=False)
    headings = ("", "busy ms", "call ms", "TFLOP/s", "of bfloat16", "error", "compile s")
    for heading in headings:
        table.add_column(heading, justify="right" if heading else "left")
    errors = []
    for name, entry in row["contenders"].items():
        if "error" in entry:
            errors.append(f"{name} cannot run: {entry['error'].strip().splitlines()[0][:150]}")
            continue
        figures = [entry.get("busy_median_ms"), entry["median_ms"], entry["tflops"]]
        figures += [entry.get("speedup"), entry["relative_error"], entry["compile_s"]]
        table.add_row(name, *("" if each is None else f"{each:g}" for each in figures))
    table.caption = "\n".join(errors).replace("[", r"\[") or None
    table.caption_justify = "left"
    return table


def _options(arguments: list[str] | None) -> argparse.Namespace:
    options = parser(__doc__)
    options.add_argument("--cases", nargs="+", help=f"parts of their names: {'; '.join(CASES)}")
    options.add_argument(
        "--contenders", nargs="+", choices=(*OURS, *PEERS), help="all of them by default"
    )
    return options.parse_args(arguments)


if __name__ == "__main__":
    main()
