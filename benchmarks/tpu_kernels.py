"""Would a Pallas kernel of ours beat what XLA makes of a quantized product on a TPU?

For each chip and the shapes of real models, the library's own product, which is XLA's, against
Pallas kernels (`_pallas_matmul.py`, each with the best of its blocks), by what libtpu compiles for
that chip. No TPU is needed, and none has run this.

    row          bfloat16 activations, quantized per row, by weights of a scale per column: int8 on
                 v5e and v6e, float8 on TPU7x; against a kernel that quantizes in VMEM
    dlhs, drhs   the two products of a backward pass, of operands in 8 bits
    w4a16        bfloat16 by int4 in groups of 128; the Pallas kernel is the library's own
    w4a8         the same, the activations quantized per row
    128x128      float8, weights in blocks of 128 x 128, activations in runs of 128

One JSON row per case: the estimate in cycles of one core and how it comes about (`_tpu_schedule`),
bytes, passes over memory, VMEM; `floor` is what the chip's published rates allow; `headroom` is
XLA's estimate over that, the most that any kernel can win. A kernel wins if it is estimated at 0.85
of XLA's or less: estimates are no timings, so less would say nothing.

    pip install 'mpjax[tpu]'
    python benchmarks/tpu_kernels.py [--quick] [--targets v6e] [--cases row]
    python benchmarks/tpu_kernels.py --tune    # the library's table, from the committed rows
"""

import dataclasses
import math
import os
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import mpjax_kernels as mk
from _pallas_matmul import GROUP, fused_blocks, fused_rows, grouped, grouped_blocks
from _suite import RESULTS, Rows, output_folder, parser
from _tpu_account import CLOCKS, Account, account, floor_cycles
from _tpu_schedule import FLAGS
from _tpu_tune import CANDIDATES, tune
from mpjax_kernels import _tpu

E4M3 = "float8_e4m3fn"
FORMATS = {"v5e": "int8", "v6e": "int8", "tpu7x": E4M3}
# What a kernel may use of a core's VMEM: 128 MiB on v5e and v6e, 64 MiB on TPU7x.
VMEM = {"v5e": 96 * 2**20, "v6e": 96 * 2**20, "tpu7x": 48 * 2**20}
WINS = 0.85

# M, K, N
DECODE = [(m, k, n) for m in (1, 8, 64) for k, n in ((4096, 4096), (4096, 14336), (8192, 28672))]
PREFILL = [
    (512, 4096, 4096),
    (512, 8192, 28672),
    (2048, 4096, 1024),
    (2048, 1024, 4096),
    (2048, 4096, 4096),
    (2048, 5120, 5120),
    (2048, 4096, 14336),
]
TRAINING = [(2048, 14336, 4096), (8192, 4096, 4096), (8192, 8192, 1024)]
GROUPS = [(m, 4096, 4096) for m in (8, 64, 256, 512, 2048)] + [(2048, 4096, 14336)]
# Decoding, for the kernel that the library has.
FEW = [(8, 4096, 14336), (8, 14336, 4096), (64, 4096, 14336), (64, 14336, 4096), (128, 4096, 4096)]
QUICK = [(8, 1024, 1024), (512, 1024, 1024)]
MATRIX = (((1,), (0,)), ((), ()))


@dataclasses.dataclass(frozen=True)
class Case:
    """One product on one chip."""

    target: str
    kind: str
    rows: int
    terms: int
    columns: int

    @property
    def name(self) -> str:
        return f"{self.target} {self.kind} {self.rows} x {self.terms} x {self.columns}"


def cases(quick: bool) -> dict[str, Case]:
    """By their names."""

    def kinds(target: str) -> Iterator[tuple[str, list[tuple[int, int, int]]]]:
        # XLA takes minutes for each float8 product of this size for TPU7x.
        large = [] if quick or target == "tpu7x" else TRAINING
        yield "row", QUICK if quick else DECODE + PREFILL + large
        yield "dlhs", large[1:]
        yield "drhs", large[1:]
        for kind in ("w4a16", "128x128") if target == "tpu7x" else ("w4a16", "w4a8"):
            yield kind, QUICK if quick else FEW + GROUPS if kind == "w4a16" else GROUPS

    found = [
        Case(target, kind, *shape)
        for target in (("v6e",) if quick else FORMATS)
        for kind, shapes in kinds(target)
        for shape in shapes
    ]
    return {case.name: case for case in found}


def array(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
    """An argument that is not allocated."""
    return jax.ShapeDtypeStruct(shape, dtype)


def weight(case: Case, format: str, **options: Any) -> Any:
    """A quantized weight [K, N], abstract."""
    dense = array(jnp.bfloat16, case.terms, case.columns)
    return jax.eval_shape(lambda w: mk.quantize(w, format, **options), dense)


def by_xla(case: Case) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """The library's product, and its arguments."""
    format, x = FORMATS[case.target], array(jnp.bfloat16, case.rows, case.terms)
    out = {"preferred_element_type": jnp.bfloat16, "implementation": "xla"}
    if case.kind in ("dlhs", "drhs"):
        g = array(jnp.bfloat16, case.rows, case.columns)
        other = weight(case, format) if case.kind == "dlhs" else x
        axis = 1 if case.kind == "dlhs" else 0
        operands = [
            jax.eval_shape(partial(mk.quantize, format=format), each)
            if isinstance(each, jax.ShapeDtypeStruct)
            else each
            for each in ((g, other) if case.kind == "dlhs" else (other, g))
        ]
        axes = (((axis,), (axis,)), ((), ()))
        return lambda x, y: mk.dot_general(x, y, axes, **out), tuple(operands)
    if case.kind == "row":
        return lambda x, w: mk.quantized_matmul(x, w, format, **out), (
            x,
            weight(case, format, axis=0),
        )
    w, quantize = _grouped_operands(case)
    return lambda x, w: mk.dot_general(quantize(x), w, MATRIX, **out), (x, w)


def _grouped_operands(case: Case) -> tuple[Any, Callable[[Any], Any]]:
    """A weight with a scale per group, and what quantizes an activation for it."""
    if case.kind == "128x128":
        w = weight(case, E4M3, axis=(0, 1), group_size=(GROUP, GROUP))
        return w, lambda x: mk.quantize(x, E4M3, axis=1, group_size=GROUP)
    w = weight(case, "int4", axis=0, group_size=GROUP)
    return w, (lambda x: x) if case.kind == "w4a16" else lambda x: mk.quantize(x, "int8", axis=1)


def by_pallas(case: Case) -> Iterator[tuple[Any, Callable[..., Any], tuple[Any, ...]]]:
    """Blocks, the product by them, and its arguments; nothing where there is no kernel."""
    x, vmem = array(jnp.bfloat16, case.rows, case.terms), VMEM[case.target]
    sizes = case.rows, case.columns, case.terms
    if case.kind == "row":
        format = FORMATS[case.target]
        w = weight(case, format, axis=0)
        for blocks in fused_blocks(*sizes, vmem):
            run = partial(fused_rows, format=format, blocks=blocks, vmem=VMEM[case.target])
            yield blocks, lambda x, w, run=run: run(x, w.values, w.scale), (x, w)
    elif case.kind == "w4a16":
        w, _ = _grouped_operands(case)
        each = (_tpu.blocks_for(*sizes, GROUP, most) for most in CANDIDATES)
        for blocks in dict.fromkeys(each):
            yield blocks, partial(_by_our_kernel, blocks), (x, w)
    elif case.kind not in ("dlhs", "drhs"):
        w, quantize = _grouped_operands(case)
        for blocks in grouped_blocks(*sizes):
            run = partial(grouped, blocks=blocks, vmem=vmem)
            yield blocks, partial(_by_groups, quantize, run), (x, w)


def _by_our_kernel(blocks: _tpu.Blocks, x: Any, w: Any) -> Any:
    dtype = jnp.dtype(jnp.bfloat16)
    return _tpu.grouped_matmul(x, w.values, w.scale, dtype, transposed=False, blocks=blocks)


def _by_groups(quantize: Callable[[Any], Any], run: Callable[..., Any], x: Any, w: Any) -> Any:
    q, columns = quantize(x), w.shape[1]
    scale = jnp.repeat(w.scale, columns // w.scale.shape[1], axis=1)
    if isinstance(q, mk.QTensor):
        return run(q.values, w.values, q.scale, scale)
    return run(q, w.values, None, scale)


def row(case: Case, listings: Path) -> dict[str, Any]:
    """The figures of a case."""
    function, args = by_xla(case)
    in_bfloat16 = case.kind == "w4a16"
    stored = sum(math.prod(a.shape) * jnp.dtype(a.dtype).itemsize for a in jax.tree.leaves(args))
    stored -= args[1].size // 2 if args[1].format.bits == 4 else 0  # two in a byte
    result = jax.eval_shape(function, *args)
    floor = floor_cycles(
        case.target,
        2 * case.rows * case.terms * case.columns,
        "bfloat16" if in_bfloat16 else FORMATS[case.target],
        stored + result.size * result.dtype.itemsize,
    )
    measure = partial(account, target=case.target, listings=listings, floor=floor)
    xla = measure(function, args)
    tried = []
    for blocks, by_blocks, arguments in by_pallas(case):
        measured = if_it_fits(partial(measure, by_blocks, arguments))
        tried += [] if measured is None else [(blocks, measured)]
    found: dict[str, Any] = {"xla": dataclasses.asdict(xla)}
    ratio = None
    if tried:
        blocks, best = min(tried, key=lambda each: each[1].cycles)
        ratio = round(best.cycles / xla.cycles, 3)
        found["pallas"] = (
            dataclasses.asdict(blocks) | {"tried": len(tried)} | dataclasses.asdict(best)
        )
        if in_bfloat16:
            found["candidates"] = [
                dataclasses.asdict(blocks) | {"cycles": each.cycles} for blocks, each in tried
            ]
    return {
        "benchmark": "tpu_kernels",
        "case": case.name,
        "target": case.target,
        "kind": case.kind,
        "m_k_n": [case.rows, case.terms, case.columns],
        "clock_ghz": CLOCKS[case.target] / 1e9,
        "floor": floor,
        "headroom": round(xla.cycles / floor, 3),
        "ratio": ratio,
        "winner": "pallas" if ratio is not None and ratio <= WINS else "xla",
        **found,
    }


def if_it_fits(measure: Callable[[], Account]) -> Account | None:
    """The account of a program; None if its kernel takes more VMEM than there is."""
    try:
        return measure()
    except jax.errors.JaxRuntimeError as error:
        if "in memory space vmem" not in str(error):
            raise
        return None


def line(row: dict[str, Any]) -> str:
    """A row for the screen."""
    pallas: dict[str, Any] = row.get("pallas", {})
    cycles = f"{row['xla']['cycles']:>9,} {pallas.get('cycles', 0):>9,}"
    return (
        f"{row['case']:<34} {row['floor']:>9,} {cycles} {row['ratio'] or 0:>6.2f} {row['winner']}"
    )


def main() -> None:
    """Compiles, and prints and writes a row per case."""
    arguments = parser(__doc__)
    arguments.add_argument("--targets", nargs="+", choices=FORMATS, help="all of them by default")
    arguments.add_argument("--cases", nargs="+", help="parts of their names")
    arguments.add_argument(
        "--tune", action="store_true", help="compile nothing, and write the library's table anew"
    )
    options = arguments.parse_args()
    if options.tune:
        tune(RESULTS / "tpu_kernels.jsonl")
        return
    chosen = [
        case
        for name, case in cases(options.quick).items()
        if (options.targets is None or case.target in options.targets)
        and (options.cases is None or any(part in name for part in options.cases))
    ]
    whole = options.targets is None and options.cases is None
    written = Rows("tpu_kernels", output_folder(options, whole))
    environ = {name: version(name) for name in ("jax", "jaxlib", "libtpu")}
    jax.config.update("jax_platforms", "cpu")  # the TPU's compiler needs no TPU
    jax.config.update("jax_enable_compilation_cache", False)
    with tempfile.TemporaryDirectory() as listings:
        os.environ["LIBTPU_INIT_ARGS"] = FLAGS.format(folder=listings)  # read as libtpu is loaded
        print(f"{'cycles':<34} {'floor':>9} {'XLA':>9} {'Pallas':>9}  ratio winner")
        for case in chosen:
            found = row(case, Path(listings)) | environ
            written.add(found)
            print(line(found), flush=True)


if __name__ == "__main__":
    main()
