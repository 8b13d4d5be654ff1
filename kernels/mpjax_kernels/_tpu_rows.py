"""Products of one row, kept on the matrix unit of a TPU.

XLA:TPU writes a product with a single row as a multiplication and a sum on the vector unit, where
both operands are widened to 32 bits, and weights in groups are first written to memory as float32.
The matrix unit reads 8 and 4 bits as they lie, and multiplies eight rows in the time of one. So

  a row               gets seven rows of zeros below it
  a row, G groups     becomes G rows: each holds the entries of one group, and zeros

and one product gives the sums of all groups, [G, N], each to be multiplied by its scale. What this
saves by the compiler's estimate is in `benchmarks/results/decode_bytes.jsonl`.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.export import is_symbolic_dim
from jaxtyping import Array, Float, Shaped

from ._contraction import Contraction
from ._qtensor import QTensor
from ._storage import decode, spread

_ROWS = 8  # a float32 tile's
_GROUPS = 256  # more rows than the matrix unit has would be multiplied in several turns


def dot_general(
    lhs: Array, rhs: Array, contraction: Contraction, **options: Any
) -> Shaped[Array, "*out"]:
    """`jax.lax.dot_general` with the axes of `contraction`; `options` are its other arguments."""
    c = contraction
    plain = partial(jax.lax.dot_general, dimension_numbers=c.dimension_numbers, **options)
    if not c.lhs_free or is_symbolic_dim(c.rows) or c.rows != 1 or c.columns == 1:
        return plain(lhs, rhs)
    padded = partial(_padded, contraction=c, plain=plain)
    return jax.lax.platform_dependent(lhs, rhs, tpu=padded, default=plain)


def _padded(lhs: Array, rhs: Array, contraction: Contraction, plain: Any) -> Array:
    c, axis = contraction, contraction.lhs_free[-1]
    edges = [(0, _ROWS - 1 if i == axis else 0, 0) for i in range(lhs.ndim)]
    rows = jax.lax.pad(lhs, lhs.dtype.type(0), edges)
    axis = len(c.lhs_batch) + len(c.lhs_free) - 1
    return jax.lax.slice_in_dim(plain(rows, rhs), 0, 1, axis=axis)


def takes_groups(lhs: Array | QTensor, rhs: Array | QTensor, contraction: Contraction) -> bool:
    """Whether it is a row of an array by a weight whose scales vary along contracting axes."""
    c = contraction
    if isinstance(lhs, QTensor) or not isinstance(rhs, QTensor) or c.lhs_batch:
        return False
    if any(map(is_symbolic_dim, (*c.lhs_shape, *c.rhs_shape))) or c.rows != 1:
        return False
    return 1 < math.prod(rhs.scale.shape[a] for a in c.rhs_contract) <= _GROUPS


def grouped_dot(
    lhs: Array, rhs: QTensor, contraction: Contraction, precision: jax.lax.PrecisionLike
) -> Float[Array, "*out"]:
    """The product of operands that `takes_groups` took, in float32."""
    c, axes = contraction, contraction.rhs_contract
    sizes = tuple(rhs.shape[a] for a in axes)
    runs = tuple(rhs.scale.shape[a] for a in axes)
    dtype = jnp.dtype(jnp.float32) if lhs.dtype == jnp.float64 else lhs.dtype
    row = lhs.astype(dtype).transpose(c.lhs_free + c.lhs_contract).reshape(1, *sizes)
    groups = jnp.arange(math.prod(runs)).reshape(-1, *(1 for _ in sizes))
    rows = jnp.where(_group_of_each(sizes, runs) == groups, row, jnp.zeros((), dtype))
    sums = jax.lax.dot_general(
        rows,
        decode(rhs, dtype),
        ((tuple(range(1, rows.ndim)), axes), ((), ())),
        precision,
        preferred_element_type=jnp.float32,
    )
    wide = tuple(rhs.scale.shape[a] if a in axes else rhs.shape[a] for a in range(rhs.ndim))
    scales = spread(rhs.scale, wide).transpose(axes + c.rhs_free).reshape(sums.shape)
    return jnp.sum(sums * scales, axis=0).reshape(c.result_shape)


def _group_of_each(sizes: tuple[int, ...], runs: tuple[int, ...]) -> np.ndarray:
    """The number of the group of every term, in an array of the contracting axes."""
    number = np.zeros(sizes, np.int32)
    for axis, (size, count) in enumerate(zip(sizes, runs, strict=True)):
        own = np.arange(size) // (size // count)
        number = number * count + own.reshape([-1 if a == axis else 1 for a in range(len(sizes))])
    return number
