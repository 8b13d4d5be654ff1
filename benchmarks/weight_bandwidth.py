"""What share of the memory's bandwidth does a row reach by weights that no cache holds?

A float32 or bfloat16 row through twelve layers of 4096 x 4096, one after the other, as a decoding
step reads them: 201 MB of int8 or float8, half of that of int4, scales included. Everything in one
jit, the weights among its arguments; activations are quantized in it where the format has them so.

Peers, in the same process, called in turns with us, read as many bytes: `read_sum` sums a float32
array by rows, `read_product` multiplies it by a vector; the faster of them is what this machine can
read at that moment. A ratio of 1.25 to both is 80% of its bandwidth.

    python benchmarks/weight_bandwidth.py [--cases int8 ...] [--quick]
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import mpjax_kernels as mk
from _contest import Contender, Contest, Program, chosen, compiled
from _suite import run, suite_parser

NAMES = ("read_sum", "read_product")
SHARE = 0.8
BOUNDS = {"int8": 0.02, "int4": 0.2, "float8_e4m3fn": 0.06}


@dataclass(frozen=True)
class Case:
    """A format of weights, and what becomes of the activations."""

    format: str
    activations: str  # a format, or a dtype
    layers: int = 12
    size: int = 4096

    def __str__(self) -> str:
        return f"{self.format} by {self.activations}"

    @property
    def is_quantized(self) -> bool:
        """Whether activations are."""
        return self.activations not in ("float32", "bfloat16")

    def weight(self, layer: int) -> jax.Array:
        """float32 [K, N], of rows that keep the size of an activation."""
        shape = self.size, self.size
        return jax.random.normal(jax.random.key(layer), shape) / self.size**0.5

    def row(self) -> np.ndarray:
        return np.asarray(jax.random.normal(jax.random.key(self.layers), (1, self.size)))

    def stored(self, layer: int) -> mk.QTensor:
        group = 128 if self.format == "int4" else None
        weight = mk.quantize(self.weight(layer), self.format, axis=0, group_size=group)
        if (self.format, self.activations) == ("int8", "int8"):
            return mk.prepacked(weight, axis=0)
        return weight


def by_name(*cases: Case) -> dict[str, Case]:
    return {str(case): case for case in cases}


CASES = by_name(
    Case("int8", "int8"),
    Case("int8", "bfloat16"),
    Case("int4", "int8"),
    Case("int4", "bfloat16"),
    Case("float8_e4m3fn", "float8_e4m3fn"),
    Case("float8_e4m3fn", "bfloat16"),
)
QUICK_CASES = by_name(Case("int8", "int8", 2, 256), Case("int4", "bfloat16", 2, 256))


def main(arguments: list[str] | None = None) -> None:
    options = suite_parser(__doc__, list(CASES), NAMES).parse_args(arguments)
    run("weight_bandwidth", options, CASES, QUICK_CASES, partial(contest, names=options.peers))


def contest(case: Case, names: list[str] | None = None) -> Contest:
    """The case with its data, and the peers of these names."""
    weights = [case.stored(i) for i in range(case.layers)]
    size = sum(_bytes(x) for x in jax.tree.leaves(weights))
    note = "as many bytes, read as float32"
    peers = {
        "read_sum": Contender(partial(read, size, False), None, note=note),
        "read_product": Contender(partial(read, size, True), None, note=note),
    }
    x = case.row()
    expected = x
    for i in range(case.layers):
        expected = expected @ np.asarray(case.weight(i))
    # Every layer adds its own error to what it is given.
    bound = BOUNDS[case.format] * case.layers**0.5
    return Contest(
        facts={"case": str(case), "format": case.format, "activations": case.activations}
        | {"layers": case.layers, "size": case.size, "weight_bytes": size},
        reference=expected,
        ours=Contender(partial(ours, case, weights, x), bound, "mpjax", decode=_float32),
        peers=chosen(peers, names),
        operations=2 * case.layers * case.size**2,
        targets=dict.fromkeys(NAMES, 1 / SHARE),
    )


def ours(case: Case, weights: list[mk.QTensor], x: np.ndarray) -> Program:
    """Layer after layer."""

    def layers(x: jax.Array, weights: list[mk.QTensor]) -> jax.Array:
        for weight in weights:
            if case.is_quantized:
                x = mk.quantized_matmul(x, weight, case.activations)
            else:
                x = mk.matmul(x, weight).astype(x.dtype)
        return x

    dtype = jnp.float32 if case.is_quantized else case.activations
    return compiled(layers, jnp.asarray(x, dtype), weights)


def read(size: int, multiplied: bool) -> Program:
    """Reads a float32 array of so many bytes."""
    x = jnp.ones((64, size // 256), jnp.float32)
    if multiplied:
        return compiled(jnp.matmul, jnp.ones((1, 64)), x)
    return compiled(lambda x: jnp.sum(x, axis=1), x)


def _bytes(x: Any) -> int:
    return x.size // 2 if x.dtype == jnp.int4 else x.nbytes


def _float32(x: Any) -> np.ndarray:
    return np.asarray(x, np.float32)


if __name__ == "__main__":
    main()
