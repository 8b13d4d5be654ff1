"""Ragged products by XLA's own, of the stored values, with the scales applied afterwards."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer, Shaped

from . import _xla
from ._contraction import Contraction
from ._implementation import Operand
from ._qtensor import QTensor, in_order
from ._storage import decode, expand_scale


def refusal(lhs: Operand, rhs: Operand, sizes: Array, *_: Any) -> str | None:
    """Why XLA does not multiply these; None if it does."""
    for name, operand, axis in (("lhs", lhs, 1), ("rhs", rhs, 1)):
        if isinstance(operand, QTensor) and operand.scale.shape[axis] != 1:
            return (
                f"`{name}` has scale {operand.scale.shape}, which varies along contracting axis "
                f"{axis}: scales can be applied after the sum only if they are constant there"
            )
    if _are_integers(lhs, rhs):
        for name, q in (("lhs", lhs), ("rhs", rhs)):
            if isinstance(q, QTensor) and q.zero_point is not None:
                return f"`{name}` has a zero point: two integer tensors are multiplied without"
    return _xla.refusal(lhs, rhs, Contraction(lhs.shape, rhs.shape[1:], (1,), (0,), (), ()))


def ragged_dot(
    lhs: Operand,
    rhs: Operand,
    sizes: Integer[Array, " g"],
    precision: jax.lax.PrecisionLike,
    dtype: np.dtype,
) -> Float[Array, "m n"]:
    """Multiplies the values, then each row by its own scale and those of its expert."""
    lhs, rhs = (in_order(o) if isinstance(o, QTensor) else o for o in (lhs, rhs))
    result = _values(lhs, rhs, sizes, precision).astype(jnp.float32)
    ends = jnp.cumsum(sizes)
    row = jnp.arange(lhs.shape[0], dtype=ends.dtype)
    if isinstance(lhs, QTensor):
        result = result * expand_scale(lhs)
    if isinstance(rhs, QTensor):
        scale = expand_scale(rhs)[:, 0]
        if scale.shape[0] != 1:
            expert = jnp.searchsorted(ends, row, side="right", method="compare_all")
            scale = scale[jnp.minimum(expert, scale.shape[0] - 1)]
        result = result * scale
    # The rows that are left over are zero whatever the scales are.
    return jnp.where(row[:, None] < ends[-1], result, 0.0).astype(dtype)


def _are_integers(lhs: Operand, rhs: Operand) -> bool:
    return all(isinstance(o, QTensor) and o.format.is_integer for o in (lhs, rhs))


def _values(
    lhs: Operand, rhs: Operand, sizes: Integer[Array, " g"], precision: jax.lax.PrecisionLike
) -> Shaped[Array, "m n"]:
    if not isinstance(lhs, QTensor) or not isinstance(rhs, QTensor):
        array = rhs.dtype if isinstance(lhs, QTensor) else lhs.dtype
        common = jnp.dtype(jnp.float32) if array == jnp.float64 else array
    elif _are_integers(lhs, rhs):
        left, right = lhs.values.astype(jnp.int8), rhs.values.astype(jnp.int8)
        return jax.lax.ragged_dot(left, right, sizes, preferred_element_type=jnp.int32)
    elif lhs.format == rhs.format:
        # At the default precision XLA:GPU may accumulate float8 in less than float32.
        precision = jax.lax.Precision.HIGHEST if precision is None else precision
        return jax.lax.ragged_dot(lhs.values, rhs.values, sizes, precision, jnp.float32)
    else:  # this one holds the values of both
        common = jnp.dtype(jnp.bfloat16)
    left, right = (
        decode(o, common) if isinstance(o, QTensor) else o.astype(common) for o in (lhs, rhs)
    )
    return jax.lax.ragged_dot(left, right, sizes, precision, jnp.float32)
