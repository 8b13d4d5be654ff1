"""Exact products of int8 matrices, in the forms that XLA:CPU has fast kernels for.

Those take two or more rows on either side and want the terms of the left operand next to each
other. A 4096 x 4096 weight on two cores of an AVX-512 CPU (JAX 0.10), in milliseconds with the
activation's quantization:

| rows | float32 | w [N, K]: x @ w.T | the same, w left, in 8 cuts | w [K, N]: x @ w | in blocks |
|---|---|---|---|---|---|
| 1 | 1.7 | 0.95 (one row as two) | 0.78 | 7 (25 as one row) | 1.3 |
| 4 | 2.1 | 1.1 | 0.80 | 7 | 1.8 |
| 16 | 3.6 | 1.7 | 1.6 | 4.7 | 2.2 |
| 128 | 12 | 7.5 | 8.0 | 10.4 | 9.7 |
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int8, Int32, Shaped

from ._cpu_blocks import blocked_dot
from ._cpu_matrices import Matrices, rows_first

# Up to so many rows the larger operand is best on the left, in so many cuts.
_FEW_ROWS, _CUTS = 16, 8
# Up to so many, one whose terms are not next to each other is best multiplied in blocks of terms.
_BLOCKED_ROWS = 128
# All that needs more than this many bytes: a smaller one stays in the cache, is as fast as it lies,
# and to cut or copy it costs more than a tenth of its product.
_SMALL = 2**20


def integer_dot(few: Matrices, many: Matrices) -> Int32[Array, "batch rows columns"]:
    """The products of the values: sums in int32, which must not overflow."""
    narrow = many.values.dtype != jnp.int8  # int4 is widened block by block
    small = many.values.size <= _SMALL * many.batch
    crosswise = not many.terms_last and (many.batch > 1 or few.free <= _BLOCKED_ROWS and not small)
    if narrow or crosswise:
        left = Matrices(few.values.astype(jnp.int8), few.terms_last)
        return blocked_dot(rows_first(left), many, jnp.int32)
    few = Matrices(few.values.astype(jnp.int8), few.terms_last)
    if small and few.free <= _FEW_ROWS:
        rows = rows_first(few)
        return _dot(jnp.repeat(rows, 2, axis=1) if few.free == 1 else rows, many)[:, : few.free]
    if many.terms_last and few.free <= _FEW_ROWS:
        return _few_rows(rows_first(few), many.values)
    if many.terms_last and not few.terms_last:
        return jnp.swapaxes(_dot(many.values, few), 1, 2)
    return _dot(rows_first(few), many)


def _few_rows(
    few: Int8[Array, "batch rows terms"], many: Int8[Array, "batch columns terms"]
) -> Int32[Array, "batch rows columns"]:
    """`many` on the left, cut into as many pieces as keep its two or more cores busy."""
    batch, rows, terms = few.shape
    columns = many.shape[1]
    if rows == 1:
        few = jnp.repeat(few, 2, axis=1)
    cuts = _CUTS if batch == 1 and columns % _CUTS == 0 else 1
    pieces = many.reshape(batch * cuts, columns // cuts, terms)
    repeated = Matrices(jnp.repeat(few, cuts, axis=0), terms_last=True)
    product = _dot(pieces, repeated).reshape(batch, columns, -1)
    return jnp.swapaxes(product[:, :, :rows], 1, 2)


def _dot(left: Shaped[Array, "batch left terms"], right: Matrices) -> Int32[Array, "batch _ _"]:
    axes = (((2,), (2 if right.terms_last else 1,)), ((0,), (0,)))
    if right.batch > 1:
        return jax.lax.dot_general(left, right.values, axes, preferred_element_type=jnp.int32)
    axes = (((1,), (1 if right.terms_last else 0,)), ((), ()))
    product = jax.lax.dot_general(left[0], right.values[0], axes, preferred_element_type=jnp.int32)
    return product[None]
