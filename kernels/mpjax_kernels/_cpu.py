"""Products on CPUs: the values in the forms, and the layouts, that XLA:CPU multiplies fast.

- Two QTensors of integers: int8 products with exact int32 sums (`_cpu_integer`).
- A few rows of an array by integers: the rows as three int8 digits (`_cpu_digits`).
- Everything else in blocks (`_cpu_blocks`): the larger operand becomes bfloat16, if that holds the
  values of both exactly, or float32, a block at a time. Scales that vary along the contracted
  axis multiply the block.

Nothing here is native code: it is all XLA's, arranged.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.export import is_symbolic_dim
from jaxtyping import Array, Float

from . import _xla
from ._contraction import Contraction
from ._cpu_blocks import blocked_dot, decoded_dot, is_one_block
from ._cpu_digits import MOST_TERMS, digits, recombine
from ._cpu_integer import integer_dot
from ._cpu_matrices import Matrices, matrices, rows_first
from ._float8_bits import from_bits
from ._groups import is_grouped
from ._native_or import has_explicit_axes
from ._qtensor import QTensor, describe
from ._storage import decode, expand_scale

# Three digits of more rows than this take longer than decoding the weight. Digits have the 8 or 11
# bits of these dtypes and more to spare, but not the 24 of float32 for every entry of a row.
_DIGIT_ROWS = {"bfloat16": 4, "float16": 16}
_DEFAULT = (None, "default", jax.lax.Precision.DEFAULT)


def refusal(
    lhs: Array | QTensor, rhs: Array | QTensor, contraction: Contraction, *_: Any
) -> str | None:
    """Why this does not multiply these, or XLA's own product is as fast; None if it does."""
    reason = _xla.refusal(lhs, rhs, contraction)
    if reason is not None:
        return reason
    if has_explicit_axes():
        return "the mesh has explicit axes: XLA's own product has rules for how they are sharded"
    c = contraction
    if any(map(is_symbolic_dim, (*c.lhs_shape, *c.rhs_shape))):
        return "a size is symbolic: what is fast depends on it"
    if 0 in (*c.lhs_shape, *c.rhs_shape):
        return f"`lhs` has shape {c.lhs_shape} and `rhs` {c.rhs_shape}: there is nothing to do"
    if _is_integer(lhs, rhs) and not _is_grouped(lhs, rhs, c):
        return None
    larger, last = (lhs, c.lhs_contract) if c.columns < c.rows else (rhs, c.rhs_contract)
    if not isinstance(larger, QTensor):
        return f"the larger operand is {describe(larger)}: XLA decodes the smaller one as fast"
    if _is_grouped(lhs, rhs, c) and len(last) > 1:
        return "scales vary along several contracting axes: blocks are cut along one only"
    return None


def dot_general(
    lhs: Array | QTensor,
    rhs: Array | QTensor,
    contraction: Contraction,
    precision: jax.lax.PrecisionLike,
    dtype: np.dtype,
) -> Array:
    """The product, as `_xla.dot_general` defines it up to float32 rounding.

    Products are exact in bfloat16, or in float32, which CPUs have in full, whatever `precision`
    says. But digits, which are good to 2**-22 of the largest entry of a row, are for the default.
    """
    if _is_grouped(lhs, rhs, contraction):
        return _blocked(lhs, rhs, contraction, scaled=True).astype(dtype)
    return _xla.scaled_dot(lhs, rhs, contraction, partial(_dot, precision=precision)).astype(dtype)


def _dot(
    lhs: Array | QTensor,
    rhs: Array | QTensor,
    contraction: Contraction,
    precision: jax.lax.PrecisionLike,
) -> Array:
    """The product of the values."""
    if isinstance(lhs, QTensor) and isinstance(rhs, QTensor):
        if _is_integer(lhs, rhs):
            stored = lhs.values, rhs.values  # not yet widened, as those that `dot` is given are

            def dot(left: Array, right: Array, c: Contraction) -> Array:
                del left, right
                return _integer_dot(*stored, c)

            return _xla.integer_dot(lhs, rhs, contraction, dot)
    elif precision in _DEFAULT and _has_few_rows(lhs, rhs, contraction):
        return _digit_dot(lhs, rhs, contraction)
    return _blocked(lhs, rhs, contraction, scaled=False)


def _integer_dot(lhs: Array, rhs: Array, contraction: Contraction) -> Array:
    few, many, swapped = matrices(lhs, rhs, contraction)
    return _in_output(integer_dot(few, many), swapped, contraction)


def _digit_dot(lhs: Array | QTensor, rhs: Array | QTensor, contraction: Contraction) -> Array:
    few, many, swapped = matrices(lhs, rhs, contraction)
    rows, scale = digits(rows_first(few))
    sums = integer_dot(Matrices(rows, terms_last=True), many)
    return _in_output(recombine(sums) * scale, swapped, contraction)


def _blocked(
    lhs: Array | QTensor, rhs: Array | QTensor, contraction: Contraction, scaled: bool
) -> Float[Array, "*out"]:
    dtypes = [jnp.bfloat16 if isinstance(o, QTensor) else o.dtype for o in (lhs, rhs)]
    exact = not scaled and all(dtype == jnp.bfloat16 for dtype in dtypes)
    dtype = jnp.dtype(jnp.bfloat16 if exact else jnp.float32)
    swapped = contraction.columns < contraction.rows
    both = isinstance(lhs, QTensor) and isinstance(rhs, QTensor)
    if both and contraction.terms <= contraction.columns:
        swapped = False  # the result is larger than the operand that is turned instead
    few, many = (rhs, lhs) if swapped else (lhs, rhs)
    left = None if scaled else _turned_bits(few, matrices(lhs, rhs, contraction, swapped)[0], dtype)
    # Decoded in the shape it has, the same in all products, so that it is decoded once for them.
    at_once = is_one_block(many, few.size // contraction.terms, dtype)
    if swapped or at_once:
        rhs = _decoded(rhs, dtype, scaled)
    if not swapped or at_once:
        lhs = _decoded(lhs, dtype, scaled)
    first, second, _ = matrices(lhs, rhs, contraction, swapped)
    left = rows_first(first) if left is None else left
    if at_once:
        return _in_output(decoded_dot(left, second), swapped, contraction)
    return _in_output(blocked_dot(left, second, jnp.float32, scaled), swapped, contraction)


def _turned_bits(operand: Array | QTensor, stored: Matrices, dtype: np.dtype) -> Array | None:
    """`rows_first` of a float8 operand, decoded, if that moves its entries: in 8 bits, the least.

    XLA:CPU transposes what lies in memory three times faster than what it computes on the way.
    """
    if stored.terms_last or not isinstance(operand, QTensor) or operand.format.is_integer:
        return None
    bits = jax.lax.bitcast_convert_type(stored.values, jnp.int8)
    return from_bits(rows_first(replace(stored, values=bits)), operand.format, dtype)


def _decoded(operand: Array | QTensor, dtype: np.dtype, scaled: bool) -> Array:
    if not isinstance(operand, QTensor):
        return operand.astype(dtype)
    if operand.format.is_integer:
        values = decode(operand, dtype)
    else:
        bits = jax.lax.bitcast_convert_type(operand.values, jnp.int8)
        values = from_bits(bits, operand.format, dtype)
    return values * expand_scale(operand) if scaled else values


def _in_output(product: Array, swapped: bool, contraction: Contraction) -> Array:
    """[batch, few, many] as the axes of the contraction's result."""
    product = jnp.swapaxes(product, 1, 2) if swapped else product
    return product.reshape(contraction.result_shape)


def _is_integer(lhs: Array | QTensor, rhs: Array | QTensor) -> bool:
    return all(isinstance(o, QTensor) and o.format.is_integer for o in (lhs, rhs))


def _is_grouped(lhs: Array | QTensor, rhs: Array | QTensor, c: Contraction) -> bool:
    return is_grouped(lhs, c.lhs_contract) or is_grouped(rhs, c.rhs_contract)


def _has_few_rows(lhs: Array | QTensor, rhs: Array | QTensor, c: Contraction) -> bool:
    """Whether an array has few rows, to be multiplied by a larger tensor of integers."""
    q, array, rows = (rhs, lhs, c.rows) if isinstance(rhs, QTensor) else (lhs, rhs, c.columns)
    assert isinstance(q, QTensor)
    most = _DIGIT_ROWS.get(array.dtype.name, 0)
    integers = q.format.is_integer and q.zero_point is None
    return integers and rows <= most and c.terms <= MOST_TERMS
