"""The convolution that every other implementation is measured against."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from ._convolution import Convolution
from ._implementation import Operand
from ._reference import _float32, refusal

__all__ = ["conv", "refusal"]


def conv(
    lhs: Operand,
    rhs: Operand,
    window: Convolution,
    precision: jax.lax.PrecisionLike,
    dtype: np.dtype,
) -> Array:
    """Dequantizes to float32, convolves in full float32, casts to `dtype`. Takes everything."""
    del precision  # this is the highest there is
    highest = jax.lax.Precision.HIGHEST
    return window(_float32(lhs), _float32(rhs), highest, jnp.float32).astype(dtype)
