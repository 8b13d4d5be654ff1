"""Ragged products by XLA's own, of the stored values, with the scales applied afterwards."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer, Shaped

from ._implementation import Operand
from ._multiplicands import Multiplicands, multiplicands, zero_point_refusal
from ._qtensor import QTensor, in_order
from ._storage import expand_scale
from ._xla import dtype_refusal, overflow


def refusal(lhs: Operand, rhs: Operand, sizes: Array, *_: Any) -> str | None:
    """Why XLA does not multiply these; None if it does."""
    for name, operand, axis in (("lhs", lhs, 1), ("rhs", rhs, 1)):
        if isinstance(operand, QTensor) and operand.scale.shape[axis] != 1:
            return (
                f"`{name}` has scale {operand.scale.shape}, which varies along contracting axis "
                f"{axis}: scales can be applied after the sum only if they are constant there"
            )
    return (
        zero_point_refusal(lhs, rhs) or dtype_refusal(lhs, rhs) or overflow(lhs, rhs, lhs.shape[1])
    )


def ragged_dot(
    lhs: Operand,
    rhs: Operand,
    sizes: Integer[Array, " g"],
    precision: jax.lax.PrecisionLike,
    dtype: np.dtype,
) -> Float[Array, "m n"]:
    """Multiplies the values, then each row by its own scale and those of its expert."""
    lhs, rhs = (in_order(o) if isinstance(o, QTensor) else o for o in (lhs, rhs))
    result = _sums(multiplicands(lhs, rhs, precision), sizes).astype(jnp.float32)
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


def _sums(m: Multiplicands, sizes: Integer[Array, " g"]) -> Shaped[Array, "m n"]:
    dot = partial(jax.lax.ragged_dot, preferred_element_type=m.sum_dtype)
    precise = partial(dot, precision=m.precision)
    if m.precision is None or m.lhs.dtype.itemsize != 1:
        return precise(m.lhs, m.rhs, sizes)
    # The compiler of TPU7x takes no precision for float8, whose products are exact there anyway.
    return jax.lax.platform_dependent(m.lhs, m.rhs, sizes, tpu=dot, default=precise)
