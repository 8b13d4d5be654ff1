"""The product that every other implementation is measured against."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from ._contraction import Contraction
from ._qtensor import QTensor
from ._quantize import dequantize


def refusal(*_: Any) -> None:
    """It takes everything."""


def dot_general(
    lhs: Array | QTensor,
    rhs: Array | QTensor,
    contraction: Contraction,
    precision: jax.lax.PrecisionLike,
    dtype: np.dtype,
) -> Array:
    """Dequantizes to float32, multiplies in full float32, casts to `dtype`. Takes everything."""
    del precision  # this is the highest there is
    result = jax.lax.dot_general(
        in_float32(lhs),
        in_float32(rhs),
        contraction.dimension_numbers,
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
    return result.astype(dtype)


def in_float32(operand: Array | QTensor) -> Array:
    if isinstance(operand, QTensor):
        return dequantize(operand, jnp.float32)
    return operand.astype(jnp.float32)
