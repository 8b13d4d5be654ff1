"""What XLA is given to multiply for two operands, one of them a QTensor at least."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from ._implementation import Operand
from ._qtensor import QTensor
from ._storage import decode


@dataclass(frozen=True)
class Multiplicands:
    """Two arrays without their scales, and how they are multiplied and summed."""

    lhs: Array
    rhs: Array
    precision: jax.lax.PrecisionLike
    sum_dtype: np.dtype


def multiplicands(lhs: Operand, rhs: Operand, precision: jax.lax.PrecisionLike) -> Multiplicands:
    """The values of two operands without a layout, in one dtype that holds them exactly.

    Two of integers are int8, summed in int32; two of one float8 format are as stored; an array
    keeps its dtype, to which the values beside it are converted. For any other two it is bfloat16.
    """
    total = np.dtype("float32")
    if not isinstance(lhs, QTensor) or not isinstance(rhs, QTensor):
        array = rhs.dtype if isinstance(lhs, QTensor) else lhs.dtype
        common = total if array == jnp.float64 else array
    elif is_integer_pair(lhs, rhs):
        left, right = lhs.values.astype(jnp.int8), rhs.values.astype(jnp.int8)
        return Multiplicands(left, right, None, np.dtype("int32"))
    elif lhs.format == rhs.format:
        # At the default precision XLA:GPU may accumulate float8 in less than float32.
        precision = jax.lax.Precision.HIGHEST if precision is None else precision
        return Multiplicands(lhs.values, rhs.values, precision, total)
    else:
        common = jnp.dtype(jnp.bfloat16)
    left, right = (
        decode(o, common) if isinstance(o, QTensor) else o.astype(common) for o in (lhs, rhs)
    )
    return Multiplicands(left, right, precision, total)


def is_integer_pair(lhs: Operand, rhs: Operand) -> bool:
    """Whether both operands are QTensors of integers."""
    return all(isinstance(o, QTensor) and o.format.is_integer for o in (lhs, rhs))


def zero_point_refusal(lhs: Operand, rhs: Operand) -> str | None:
    """Says that two integer tensors have a zero point, which their values leave out."""
    if is_integer_pair(lhs, rhs):
        for name, q in (("lhs", lhs), ("rhs", rhs)):
            if isinstance(q, QTensor) and q.zero_point is not None:
                return f"`{name}` has a zero point: two integer tensors are multiplied without"
    return None
