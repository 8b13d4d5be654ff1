"""How fast is a quantized product, against float32 and against every other library that has one?

A layer's forward pass, y = x @ w with x [M, K] and w [K, N] Gaussian, on whatever backend JAX has.
Weights are quantized beforehand and are arguments of the compiled function; quantizing the
activations is part of what is timed. Formats: `w8a8` and `float8` (E4M3) with a scale per row of x
and per output channel of w; `w8a16` and `w4a16` with x and y in bfloat16; `w4a8`; int4 in groups of
128 inputs. M = 1 is the decode step of a language model.

Peers, in the same process, called in turns with us: `jnp.matmul` in float32 and bfloat16, Qwix,
AQT, Flax float8, Keras on the JAX backend, ONNX Runtime's dynamic int8 and its 4-bit MatMulNBits,
PyTorch's dynamic int8 (of the extra `bench-torch`), and what XLA makes of our own float8 product.
Everyone's result is first compared with float32, and a wrong one is not timed. A peer that cannot
run has an entry with its error.

One JSON row per case: `ours` and `peers` by name, each with median and quartiles of milliseconds
per call, `compile_s` apart (for ONNX Runtime the making of the session), relative error, bytes per
second of arguments and result and operations per second, with their shares of the measured limits
of the machine; `ratio` is our median over the peer's. `targets` says which ratio we want and
whether we have it, `slower_than_float32` where we lose to no quantization at all. Weights that fit
the last-level cache stay in it from call to call (`of_read_limit` above 1), which flatters whoever
has the smaller ones: `--cold` empties the caches before every call.

    python benchmarks/matmul.py [--cases w8a8 ...] [--peers float32 ...] [--cold] [--quick]
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from _contest import Contender, Contest, chosen
from _matmul_peers import FORMATS, NAMES, ours, peers
from _suite import run, suite_parser

LAYER = (4096, 4096)
NATIVE_INT8 = ("onnxruntime", 1.1)  # beside other native code
FEW_ROWS = (("onnxruntime", 0.95), ("pytorch", 0.95))


@dataclass(frozen=True)
class Case:
    """A product [M, K] @ [K, N], and our time over a peer's that we want at most."""

    format: str
    m: int
    k: int
    n: int
    targets: tuple[tuple[str, float], ...] = ()

    def __str__(self) -> str:
        return f"{self.format} {self.m}x{self.k}x{self.n}"


def w8a8_cases() -> list[Case]:
    float32 = {1: 0.5, 2: 0.5, 4: 0.5, 8: 0.5, 16: 0.6, 128: 1.0}
    extra = {1: (("qwix", 0.1), *FEW_ROWS), 2: FEW_ROWS, 4: FEW_ROWS}
    rows = [
        Case("w8a8", m, *LAYER, (("float32", ratio), *extra.get(m, (NATIVE_INT8,))))
        for m, ratio in float32.items()
    ]
    return rows + [Case("w8a8", n, n, n, (("float32", 0.8), NATIVE_INT8)) for n in (1024, 2048)]


def float8_cases() -> list[Case]:
    few, many = ("mpjax_xla", 0.25), ("mpjax_xla", 0.7)
    rows = [
        Case("float8", m, *LAYER, (("qwix", 0.7 if m == 1 else 0.6), few if m <= 16 else many))
        for m in (1, 2, 4, 8, 16, 128)
    ]
    return rows + [Case("float8", n, n, n, (("qwix", 0.6), many)) for n in (1024, 2048)]


def other_cases() -> list[Case]:
    targets = {("w8a16", 1): (("float32", 0.7),)}
    targets |= {("w4a8", m): (NATIVE_INT8,) for m in (1, 16, 128)}
    return [
        Case(name, m, *LAYER, targets.get((name, m), ()))
        for name in ("w8a16", "w4a16", "w4a8")
        for m in (1, 16, 128)
    ]


CASES = {str(case): case for case in (*w8a8_cases(), *float8_cases(), *other_cases())}
QUICK_CASES = {str(case): case for case in (Case(name, 4, 256, 256) for name in FORMATS)}


def main(arguments: list[str] | None = None) -> None:
    options = suite_parser(__doc__, list(CASES), NAMES).parse_args(arguments)
    run("matmul", options, CASES, QUICK_CASES, partial(contest, names=options.peers))


def contest(case: Case, names: list[str] | None = None) -> Contest:
    """The case with its data, and the peers of these names."""
    x, w = (
        np.asarray(jax.random.normal(jax.random.key(seed), shape))
        for seed, shape in enumerate(((case.m, case.k), (case.k, case.n)))
    )
    w = w / np.float32(np.sqrt(case.k))
    reference = jnp.matmul(x, w, precision=jax.lax.Precision.HIGHEST)
    fmt = FORMATS[case.format]
    return Contest(
        facts={"case": str(case), "format": case.format, "m": case.m, "k": case.k, "n": case.n},
        reference=np.asarray(reference),
        ours=Contender(partial(ours, fmt, x, w), fmt.bound, "mpjax"),
        peers=chosen(peers(case.format, (x, w)), names),
        operations=2 * case.m * case.k * case.n,
        targets=dict(case.targets),
    )


if __name__ == "__main__":
    main()
