"""How fast are `quantize` and `dequantize`, against memory and against other libraries?

A Gaussian float32 array of 4096 x 4096 to and from each format at each granularity: a scale per
tensor, per row (activations), per column (weights [K, N]), per group of 128 inputs, per block of
128 x 128; and rounded stochastically. Everything in one jit, the array an argument of it.

Peers, in the same process, called in turns with us: `cast`, which only converts the dtype and is
the least that could be done (its values are not x, so it is not compared), Qwix and AQT. The bytes
per second count what must be read and written once, and stand beside the measured rate of copying
(`of_copy_limit`). The JSON rows are otherwise those of `matmul.py`, without operations.

    python benchmarks/quantize.py [--cases int8 ...] [--peers cast ...] [--cold] [--quick]
"""

import importlib
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import mpjax_kernels as mk
from _contest import Contender, Contest, Program, chosen, compiled
from _suite import run, suite_parser

# Of 4096 * 4096 Gaussians the largest is 5.5 standard deviations, of 128 in a group 2.7. Rounding
# an integer format leaves a quarter of a step on average, a third if stochastic, against a mean
# |x| of 0.8: 5.5 / 127 / 3 / 0.8 and 2.7 / 7 / 4 / 0.8. E4M3 leaves 2**-5 at most on average.
BOUNDS = {"int8": 0.019, "int4": 0.13, "float8_e4m3fn": 0.031}
NAMES = ("cast", "qwix", "aqt")
# Of each granularity the axes that share a scale, and the sizes of their groups.
GRANULARITIES: dict[str, tuple[Any, Any]] = {
    "tensor": (None, None),
    "row": (1, None),
    "column": (0, None),
    "group": (0, 128),
    "block": ((0, 1), (128, 128)),
}


@dataclass(frozen=True)
class Case:
    """One direction, format and granularity, on a square array."""

    format: str
    granularity: str
    back: bool = False
    stochastic: bool = False
    size: int = 4096

    def __str__(self) -> str:
        direction = "dequantize" if self.back else "quantize"
        stochastic = " stochastic" if self.stochastic else ""
        return f"{direction} {self.format} per {self.granularity}{stochastic}"


def by_name(*cases: Case) -> dict[str, Case]:
    return {str(case): case for case in cases}


CASES = by_name(
    Case("int8", "tensor"),
    Case("int8", "row"),
    Case("int8", "column"),
    Case("int8", "row", stochastic=True),
    Case("int4", "group"),
    Case("float8_e4m3fn", "row"),
    Case("float8_e4m3fn", "block"),
    Case("int8", "row", back=True),
    Case("int4", "group", back=True),
    Case("float8_e4m3fn", "row", back=True),
)
QUICK_CASES = by_name(Case("int8", "row", size=256), Case("int4", "group", back=True, size=256))


def main(arguments: list[str] | None = None) -> None:
    options = suite_parser(__doc__, list(CASES), NAMES).parse_args(arguments)
    run("quantize", options, CASES, QUICK_CASES, partial(contest, names=options.peers))


def contest(case: Case, names: list[str] | None = None) -> Contest:
    """The case with its data, and the peers of these names."""
    x = np.asarray(jax.random.normal(jax.random.key(0), (case.size, case.size)))
    bound = BOUNDS[case.format]
    least = "only converts the dtype"
    peers = {"cast": Contender(partial(cast, case, x), None, note=least)}
    if not case.stochastic:
        decode = None if case.back else lambda q: np.asarray(_qwix().dequantize(q))
        peers["qwix"] = _contender(partial(qwix, case, x), bound, "qwix", decode)
    if case.format == "int8" and not case.stochastic:
        decode = None if case.back else lambda q: np.asarray(q.dequant())
        peers["aqt"] = _contender(partial(aqt, case, x), bound, "aqtp", decode)
    decode = None if case.back else lambda q: np.asarray(mk.dequantize(q))
    return Contest(
        facts={"case": str(case), "format": case.format, "granularity": case.granularity}
        | {"dequantize": case.back, "stochastic": case.stochastic, "shape": x.shape},
        reference=x,
        ours=_contender(partial(ours, case, x), bound, "mpjax", decode),
        peers=chosen(peers, names),
    )


def ours(case: Case, x: np.ndarray) -> Program:
    """`mk.quantize` or `mk.dequantize`."""
    axis, size = GRANULARITIES[case.granularity]
    convert = partial(mk.quantize, format=case.format, axis=axis, group_size=size)
    if case.back:
        return compiled(mk.dequantize, convert(x))
    if case.stochastic:
        return compiled(lambda x, key: convert(x, key=key), x, jax.random.key(1))
    return compiled(convert, x)


def cast(case: Case, x: np.ndarray) -> Program:
    """One conversion of the dtype."""
    target = jnp.dtype(case.format)
    if case.back:
        return compiled(lambda v: v.astype(jnp.float32), jnp.asarray(x).astype(target))
    return compiled(lambda x: x.astype(target), x)


def qwix(case: Case, x: np.ndarray) -> Program:
    """Qwix's public `quantize` or `dequantize`."""
    axis, size = GRANULARITIES[case.granularity]
    shared = {0, 1} if axis is None else {axis} if isinstance(axis, int) else set(axis)
    tiles = {a: 128 for a in shared} if size else None
    separate = [a for a in (0, 1) if a not in shared]
    convert = partial(
        _qwix().quantize, qtype=case.format, channelwise_axes=separate, tiled_axes=tiles
    )
    if case.back:
        return compiled(_qwix().dequantize, convert(jnp.asarray(x)))
    return compiled(convert, x)


def aqt(case: Case, x: np.ndarray) -> Program:
    """AQT v2's quantizer with its default calibration."""
    axis, _ = GRANULARITIES[case.granularity]
    quantizer = importlib.import_module("aqt.jax.v2.aqt_quantizer").quantizer_make(8)
    axes = (0, 1) if axis is None else (axis,)

    def convert(x: jax.Array) -> Any:
        return quantizer.quant(x, calibration_axes=axes)[0]

    if case.back:
        return compiled(lambda q: q.dequant(), convert(jnp.asarray(x)))
    return compiled(convert, x)


def _contender(prepare: Any, bound: float, package: str, decode: Any) -> Contender:
    return Contender(prepare, bound, package, decode=decode or np.asarray)


def _qwix() -> Any:
    return importlib.import_module("qwix")


if __name__ == "__main__":
    main()
