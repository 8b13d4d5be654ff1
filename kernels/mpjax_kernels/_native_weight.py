"""Products of an array by a weight of 8 bits or int4 by native kernels: `native/weight_dot.cc`.

One call multiplies a float32, bfloat16 or float16 array by it in either storage order, decoded
where it is multiplied, sums in float32, applies the scales, in groups of neighbouring terms or not,
and casts. What a bfloat16 array is multiplied by is exact in bfloat16, zero points taken off or
not; a float16 array is multiplied in float32.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ._contraction import Contraction
from ._cpu_matrices import matrices
from ._groups import groups_are_runs, has_scale_per_term
from ._native_library import FLOAT8, INT4, INT8, REALS, native_refusal
from ._qtensor import QTensor, describe

_WEIGHTS = INT8 + INT4 + FLOAT8


def refusal(lhs: Array | QTensor, rhs: Array | QTensor, contraction: Contraction) -> str | None:
    """Why the native kernels do not multiply an array and a QTensor; None if they do."""
    c = contraction
    weight, array, contract = (
        (lhs, rhs, c.lhs_contract) if isinstance(lhs, QTensor) else (rhs, lhs, c.rhs_contract)
    )
    assert isinstance(weight, QTensor)
    if weight.format.name not in _WEIGHTS or array.dtype.name not in REALS:
        return (
            f"{describe(array)} by {describe(weight)}: an array must be one of {REALS}, and what "
            f"it is multiplied by one of {_WEIGHTS}"
        )
    if not groups_are_runs(weight, contract):
        return "terms that share a scale do not lie next to each other"
    if has_scale_per_term(lhs, rhs, c):
        return "a scale changes with every term"
    return native_refusal(weight.format.name, by_array=True)


def dot_general(
    lhs: Array | QTensor, rhs: Array | QTensor, contraction: Contraction, dtype: np.dtype
) -> Float[Array, "*out"]:
    """The product, as `_xla.dot_general` defines it up to the order of float32 sums."""
    if contraction.terms == 0:
        return jnp.zeros(contraction.result_shape, dtype)
    swapped = isinstance(lhs, QTensor)
    left, weight, _ = matrices(lhs, rhs, contraction, swapped)
    out = jnp.dtype(dtype if dtype.name in REALS else jnp.float32)
    result = jax.ShapeDtypeStruct((left.batch, left.free, weight.free), out)
    call = jax.ffi.ffi_call("mpjax_weight_dot", result, vmap_method="expand_dims")
    rows = left.values if left.terms_last else jnp.swapaxes(left.values, 1, 2)
    values = weight.values
    if values.dtype == jnp.int4 and values.shape[2] % 2:
        values = values.astype(jnp.int8)  # of which rows begin with a byte
    scales = weight.group_scale, weight.group_zero_point
    product = call(rows, values, *scales, weight_terms_last=weight.terms_last)
    product = jnp.swapaxes(product, 1, 2) if swapped else product
    return product.reshape(contraction.result_shape).astype(dtype)
