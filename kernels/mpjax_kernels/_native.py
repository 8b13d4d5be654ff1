"""Products of two 8-bit tensors by native CPU kernels: `native/dot.cc`, called through XLA's FFI.

Those of an array by a tensor of integers are in `_native_weight.py`, those by int4 or in groups in
`_native_grouped.py`.

One call multiplies two tensors of float8, or two of int8, whichever of their axes is stored last,
applies the scales in float32 and casts. float8 is decoded in registers, multiplied in bfloat16,
which holds it exactly, and summed in float32; int8 is summed exactly, in int32.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.export import is_symbolic_dim
from jaxtyping import Array, Float, Shaped

from . import _native_grouped, _native_weight
from ._contraction import Contraction
from ._cpu_matrices import Matrices, matrices
from ._groups import is_grouped
from ._native_library import FLOAT8, INT8, REALS, TILE, native_refusal, reads_tiles
from ._native_or import has_explicit_axes, is_partly_manual
from ._qtensor import QTensor, describe
from ._storage import as_stored
from ._xla import overflow

_CALLS = dict.fromkeys(FLOAT8, "mpjax_float8_dot") | dict.fromkeys(INT8, "mpjax_int8_dot")


def refusal(
    lhs: Array | QTensor, rhs: Array | QTensor, contraction: Contraction, *_: Any
) -> str | None:
    """Why the native kernels do not multiply these; None if they do."""
    surroundings = surroundings_refusal(*contraction.lhs_shape, *contraction.rhs_shape)
    if isinstance(lhs, QTensor) != isinstance(rhs, QTensor):
        if any(isinstance(o, QTensor) and o.tiles for o in (lhs, rhs)):
            return "a weight in tiles is multiplied by int8 alone"
        return _native_weight.refusal(lhs, rhs, contraction) or surroundings
    if isinstance(lhs, QTensor) and isinstance(rhs, QTensor):
        is_grouped_dot = _native_grouped.takes(lhs, rhs, contraction)
        if lhs.tiles or (rhs.tiles and (is_grouped_dot or not _are_tiles_of(rhs, contraction))):
            return "tiles that were made for another product"
        if is_grouped_dot:
            return surroundings or _native_grouped.refusal(lhs, rhs, contraction)
    for name, operand in (("lhs", lhs), ("rhs", rhs)):
        if not isinstance(operand, QTensor) or operand.format.name not in _CALLS:
            return (
                f"`{name}` is {describe(operand)}: both must be QTensors of {FLOAT8 + INT8}, or "
                "one of them an array"
            )
    assert isinstance(lhs, QTensor) and isinstance(rhs, QTensor)
    if _CALLS[lhs.format.name] != _CALLS[rhs.format.name]:
        return f"`lhs` is {describe(lhs)} and `rhs` {describe(rhs)}: of float8 and of int8"
    c = contraction
    if is_grouped(lhs, c.lhs_contract) or is_grouped(rhs, c.rhs_contract):
        return "a scale varies along a contracting axis"
    return native_refusal(lhs.format.name) or surroundings or overflow(lhs, rhs, c.terms)


def _are_tiles_of(rhs: QTensor, c: Contraction) -> bool:
    """Whether the tiles of a right operand, as stored, are those of the matrices of a product."""
    is_stack = c.rhs_batch + c.rhs_free + c.rhs_contract == tuple(range(rhs.ndim))
    if not (is_stack and c.rhs_free and c.rhs_contract and reads_tiles()):
        return False
    lane, term = c.rhs_free[-1], c.rhs_contract[-1]
    return rhs.tiles == tuple(zip((lane - rhs.ndim, term - rhs.ndim), TILE, strict=True))


def surroundings_refusal(*sizes: Any) -> str | None:
    """Says that the program around cannot hold a native call."""
    if any(map(is_symbolic_dim, sizes)):
        return "a size is symbolic"
    if has_explicit_axes():
        return "the mesh has explicit axes: XLA's own product has rules for how they are sharded"
    if is_partly_manual():
        return "some axes of the mesh are not manual: XLA cannot partition a native call"
    return None


def dot_general(
    lhs: Array | QTensor,
    rhs: Array | QTensor,
    contraction: Contraction,
    precision: jax.lax.PrecisionLike,
    dtype: np.dtype,
) -> Float[Array, "*out"]:
    """The product, as `_xla.dot_general` defines it up to the order of float32 sums.

    Products are exact whatever `precision` says.
    """
    del precision
    if not isinstance(lhs, QTensor) or not isinstance(rhs, QTensor):
        return _native_weight.dot_general(lhs, rhs, contraction, dtype)
    if _native_grouped.takes(lhs, rhs, contraction):
        return _native_grouped.dot_general(lhs, rhs, contraction, dtype)
    left, right, _ = matrices(lhs, as_stored(rhs), contraction, swapped=False)
    out = jnp.dtype(dtype if dtype.name in REALS else jnp.float32)
    result = jax.ShapeDtypeStruct((left.batch, left.free, right.free), out)
    call = jax.ffi.ffi_call(_CALLS[lhs.format.name], result, vmap_method="expand_dims")
    product = partial(call, lhs_terms_last=left.terms_last, rhs_terms_last=right.terms_last)
    values = right_values(rhs, right)
    product = product(left.values, values, scales_of(lhs, left), scales_of(rhs, right))
    return product.reshape(contraction.result_shape).astype(dtype)


def right_values(rhs: QTensor, stacked: Matrices) -> Shaped[Array, "batch ..."]:
    """The matrices of the right operand, or their tiles: [batch, lanes / 16, terms / 4, 16, 4]."""
    if not rhs.tiles:
        return stacked.values
    lanes, terms = TILE
    shape = stacked.batch, stacked.free // lanes, stacked.terms // terms, lanes, terms
    return rhs.values.reshape(shape)


def scales_of(operand: QTensor, stacked: Matrices) -> Shaped[Array, "batch lanes"]:
    """The scale of each matrix and lane, or the one of them all."""
    if operand.scale.size == 1:
        return operand.scale.reshape(1, 1)
    assert stacked.scale is not None
    return stacked.scale.reshape(stacked.batch, stacked.free)
