"""Products of int8 by int4, or by integers in groups, by native kernels: `native/grouped_dot.cc`.

One call multiplies int8 with one scale, or one for each of its rows, by int8 or int4 in either
storage order, with scales in groups of neighbouring terms or not, and with zero points or not. The
sum of a group is exact, in int32; it is scaled in float32, and the groups are added in their order.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ._contraction import Contraction
from ._cpu_matrices import Matrices, matrices
from ._groups import groups_are_runs, has_scale_per_term, is_grouped
from ._native_library import INT4, INT8, REALS, native_refusal
from ._qtensor import QTensor, describe
from ._xla import overflow

_INTEGERS = INT8 + INT4


def takes(lhs: QTensor, rhs: QTensor, c: Contraction) -> bool:
    """Whether these are two of integers that ask for more than the product of two int8 does."""
    if not {lhs.format.name, rhs.format.name} <= {*_INTEGERS}:
        return False
    return not (is_plain(lhs, c.lhs_contract) and is_plain(rhs, c.rhs_contract))


def is_plain(q: QTensor, contract: tuple[int, ...]) -> bool:
    """Whether it is int8 with its scale constant along the terms, and no zero point."""
    return q.format.name in INT8 and q.zero_point is None and not is_grouped(q, contract)


def refusal(lhs: QTensor, rhs: QTensor, contraction: Contraction) -> str | None:
    """Why the native kernels do not multiply two tensors of integers; None if they do."""
    c = contraction
    is_left = _is_weight_left(lhs, rhs, c)
    if is_left is None:
        return (
            f"`lhs` is {describe(lhs)} and `rhs` {describe(rhs)}: one of them must have a scale "
            "constant along the contracting axes, and no zero point"
        )
    weight, contract = (lhs, c.lhs_contract) if is_left else (rhs, c.rhs_contract)
    if not groups_are_runs(weight, contract):
        return "terms that share a scale do not lie next to each other"
    if has_scale_per_term(lhs, rhs, c):
        return "a scale changes with every term"
    return native_refusal(weight.format.name) or overflow(lhs, rhs, c.terms)


def _is_weight_left(lhs: QTensor, rhs: QTensor, c: Contraction) -> bool | None:
    """Which of them has what the other has not: int4, groups or zero points; None if both have.

    Of two int4 the one with more entries for each row of the other.
    """
    is_row = [
        q.zero_point is None and not is_grouped(q, contract)
        for q, contract in ((lhs, c.lhs_contract), (rhs, c.rhs_contract))
    ]
    if not any(is_row):
        return None
    if all(is_row):
        names = lhs.format.name, rhs.format.name
        return c.rows > c.columns if names[0] == names[1] else names[0] in INT4
    return is_row[1]


def dot_general(
    lhs: QTensor, rhs: QTensor, contraction: Contraction, dtype: np.dtype
) -> Float[Array, "*out"]:
    """The product, as `_xla.dot_general` defines it up to the order of float32 factors."""
    if contraction.terms == 0:
        return jnp.zeros(contraction.result_shape, dtype)
    swapped = bool(_is_weight_left(lhs, rhs, contraction))
    left, weight, _ = matrices(lhs, rhs, contraction, swapped)
    assert left.scale is not None
    rows = _rows(left).astype(jnp.int8), left.scale.reshape(left.batch, left.free)
    product = _call("mpjax_grouped_dot", rows, left, weight, dtype)
    product = jnp.swapaxes(product, 1, 2) if swapped else product
    return product.reshape(contraction.result_shape).astype(dtype)


def dynamic_dot_general(
    x: Array, w: QTensor, contraction: Contraction, dtype: np.dtype
) -> Float[Array, "*out"]:
    """The same of an array that is quantized to int8 in the call, by a scale for each row."""
    if contraction.terms == 0:
        return jnp.zeros(contraction.result_shape, dtype)
    left, weight, _ = matrices(x, w, contraction, swapped=False)
    product = _call("mpjax_dynamic_grouped_dot", (_rows(left),), left, weight, dtype)
    return product.reshape(contraction.result_shape).astype(dtype)


def _rows(left: Matrices) -> Array:
    return left.values if left.terms_last else jnp.swapaxes(left.values, 1, 2)


def _call(
    name: str, rows: tuple[Array, ...], left: Matrices, weight: Matrices, dtype: np.dtype
) -> Float[Array, "batch rows columns"]:
    """A call of rows, followed by their scales if they have some, and a weight."""
    out = jnp.dtype(dtype if dtype.name in REALS else jnp.float32)
    result = jax.ShapeDtypeStruct((left.batch, left.free, weight.free), out)
    call = jax.ffi.ffi_call(name, result, vmap_method="expand_dims")
    assert weight.group_scale is not None
    scales = weight.group_scale, weight.group_zero_point
    return call(rows[0], _even(weight), *rows[1:], *scales, weight_terms_last=weight.terms_last)


def _even(weight: Matrices) -> Array:
    """The values, of int4 where every row, or every group of terms, begins with a byte."""
    assert weight.group_scale is not None
    groups = weight.group_scale.shape[1] if weight.terms_last else 1
    is_even = weight.values.shape[2] // groups % 2 == 0
    return weight.values if is_even else weight.values.astype(jnp.int8)
