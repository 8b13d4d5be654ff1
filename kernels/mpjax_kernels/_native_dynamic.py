"""Few rows, quantized to int8 and multiplied in one native call: `native/quantized_rows.h`.

It gives the bits of the two calls that it stands for. Many rows are better cast once for all
products that they are in: XLA sees that two casts are the same.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from . import _native_grouped
from ._contraction import Contraction
from ._cpu_matrices import matrices
from ._formats import Format
from ._native import right_values, scales_of
from ._native_library import INT4, INT8, REALS
from ._qtensor import QTensor
from ._storage import as_stored

# Quantizing so many numbers takes a thread as long as a second call.
_MOST = 65536


def takes(x: Float[Array, "*lhs"], w: QTensor, format: Format) -> bool:
    """Whether one call is better than two, where the native kernels multiply the quantized `x`."""
    are_integers = format.name in INT8 and w.format.name in INT8 + INT4
    return are_integers and x.dtype.name in REALS and math.prod(x.shape) <= _MOST


def dot_general(
    x: Float[Array, "*lhs"], w: QTensor, contraction: Contraction, dtype: np.dtype
) -> Float[Array, "*out"]:
    """The product of `x`, quantized by a scale per row, and `w`, without a layout."""
    if not _native_grouped.is_plain(w, contraction.rhs_contract):
        return _native_grouped.dynamic_dot_general(x, w, contraction, dtype)
    left, right, _ = matrices(x, as_stored(w), contraction, swapped=False)
    out = jnp.dtype(dtype if dtype.name in REALS else jnp.float32)
    result = jax.ShapeDtypeStruct((left.batch, left.free, right.free), out)
    call = jax.ffi.ffi_call("mpjax_dynamic_int8_dot", result, vmap_method="expand_dims")
    rows = left.values if left.terms_last else jnp.swapaxes(left.values, 1, 2)
    values = right_values(w, right)
    product = call(rows, values, scales_of(w, right), rhs_terms_last=right.terms_last)
    return product.reshape(contraction.result_shape).astype(dtype)
