"""Operands in a shape and a dtype for which XLA's products on NVIDIA GPUs are right.

XLA compiles small products by Triton, whose tiles may be 16 terms deep. A tensor core takes 32 of
8 bits: what comes out then is twice the sum of int8, and NaN of float8 (JAX 0.11.2 on an H200, with
autotuning and without; with as many terms as a multiple of 32, only without). Zeros up to the next
multiple change no sum.

int4 that Triton unpacks is wrong where there are batch axes, as groups are: it is widened first.
Left as it is, because it was right in every case tried and halves what is read, is a weight beside
few rows of bfloat16: a step that decodes.
"""

import math

import jax
import jax.numpy as jnp
from jax.export import is_symbolic_dim
from jaxtyping import Array, Int8, Shaped

from ._contraction import Contraction

TERMS = 32
FEW_ROWS = 16


def needs_zeros(contraction: Contraction) -> bool:
    """Whether a product in 8 bits has as many terms as no tensor core takes."""
    return is_symbolic_dim(contraction.terms) or contraction.terms % TERMS != 0


def with_zeros(
    lhs: Shaped[Array, "*lhs"], rhs: Shaped[Array, "*rhs"], contraction: Contraction
) -> tuple[Shaped[Array, "*lhs"], Shaped[Array, "*rhs"]]:
    """Both operands with zeros at the end of a contracting axis: a multiple of 32 terms."""
    if not needs_zeros(contraction):
        return lhs, rhs
    a, b = contraction.lhs_contract[-1:], contraction.rhs_contract[-1:]
    if not a:  # an outer product, of one term
        return lhs, rhs
    others = math.prod(lhs.shape[axis] for axis in contraction.lhs_contract[:-1])
    step = TERMS if is_symbolic_dim(others) else TERMS // math.gcd(TERMS, others)
    return zeros_after(lhs, a[0], step), zeros_after(rhs, b[0], step)


def unpacked(values: Shaped[Array, "*shape"]) -> Int8[Array, "*shape"]:
    """int4 as int8 in memory; int8 as it is."""
    if values.dtype == jnp.int8:
        return values
    return jax.lax.optimization_barrier(values.astype(jnp.int8))


def zeros_after(x: Shaped[Array, "*shape"], axis: int, step: int = TERMS) -> Shaped[Array, "*wide"]:
    """An array with zeros after it along an axis, up to a multiple of `step`."""
    missing = -x.shape[axis] % step
    if missing == 0:
        return x
    widths = [(0, missing if i == axis else 0, 0) for i in range(x.ndim)]
    return jax.lax.pad(x, jnp.zeros((), x.dtype), widths)
