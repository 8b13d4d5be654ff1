"""What every product checks of its arguments."""

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array

from ._qtensor import QTensor, describe, validate


def as_operand(operand: Array | QTensor) -> Array | QTensor:
    """The operand as an array or a valid QTensor."""
    if isinstance(operand, QTensor):
        validate(operand)
        return operand
    return jnp.asarray(operand)


def result_dtype(
    lhs: Array | QTensor, rhs: Array | QTensor, preferred: DTypeLike | None
) -> np.dtype:
    """The dtype of a product with a QTensor.

    Raises:
        TypeError: If it is not floating.
    """
    dtype = jnp.result_type(lhs.dtype, rhs.dtype) if preferred is None else jnp.dtype(preferred)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"a product with a QTensor has a floating dtype, not {dtype}")
    return dtype


def refuse_integer_result(lhs: Array, rhs: Array, preferred: DTypeLike | None) -> None:
    """Refuses an integer result of a product of arrays of which one is floating.

    Raises:
        TypeError: If it is asked for.
    """
    # Such a product aborts the TPU compiler, and with it the process.
    floating = [jnp.issubdtype(dtype, jnp.floating) for dtype in (lhs.dtype, rhs.dtype)]
    if preferred is not None and any(floating) and jnp.issubdtype(preferred, jnp.integer):
        raise TypeError(
            f"`lhs` is {describe(lhs)} and `rhs` {describe(rhs)}: "
            f"their product has a floating dtype, not {jnp.dtype(preferred)}"
        )
