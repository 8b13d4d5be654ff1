"""The public product: one contract, several implementations of it."""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array

from ._contraction import Contraction, DimensionNumbers, contraction
from ._derivative import without_derivative
from ._qtensor import QTensor, describe, validate
from ._reference import reference_dot_general
from ._xla import xla_dot_general

# In the order they are tried when none is named. The last one takes everything.
IMPLEMENTATIONS = {"xla": xla_dot_general, "reference": reference_dot_general}

_NO_DERIVATIVE = (
    "the product of two QTensors has no derivative: their values come from rounding, which is "
    "flat. Training through int8 products is not built yet, nor through those of other formats; "
    "differentiate the model before it is quantized, or keep one operand an array (the product is "
    "differentiable in that one)"
)


def dot_general(
    lhs: Array | QTensor,
    rhs: Array | QTensor,
    dimension_numbers: DimensionNumbers,
    precision: jax.lax.PrecisionLike = None,
    preferred_element_type: DTypeLike | None = None,
    *,
    implementation: str | Sequence[str] | None = None,
) -> Array:
    """`jax.lax.dot_general` whose operands may be quantized.

    Implementations, in the order they are tried:

    - `"xla"`: one or two QTensors whose scales are constant along the contracting axes, applied
      in float32 after the dot. Two of integers accumulate exactly in int32, two of float8 in
      float32. An array keeps its dtype, the values of a QTensor beside it are converted to that.
    - `"reference"`: anything. Dequantizes to float32 and multiplies in full float32. It is
      the definition of the result; the others differ from it only by float32 rounding.

    Two plain arrays go to `jax.lax.dot_general` whatever `implementation` says.

    Args:
        lhs: An array or a QTensor.
        rhs: An array or a QTensor.
        dimension_numbers: `((lhs_contracting, rhs_contracting), (lhs_batch, rhs_batch))`.
        precision: As in `jax.lax.dot_general`, for what `"xla"` multiplies in floating point. Two
            float8 operands take `HIGHEST` if None: some GPUs accumulate in fewer bits otherwise.
            Integer products and `"reference"` are exact to the highest precision whatever it says.
        preferred_element_type: The dtype of the result. If None, `jnp.result_type` of the
            two dtypes (for a QTensor its logical dtype), the same on every platform.
        implementation: None tries them in order; a name allows that one only; a sequence of
            names tries those in order.

    Returns:
        An array with the batch axes first, then the free axes of `lhs`, then those of `rhs`.

    Raises:
        ValueError: If an implementation is unknown or the shapes do not go together.
        TypeError: If `preferred_element_type` is not floating, and an operand is a QTensor or one
            array is floating and the other not.
        NotImplementedError: If no implementation allowed takes these operands, with every
            reason; or if a product of two QTensors is differentiated. A product of an array
            and a QTensor is differentiable in the array.
    """
    names = _names(implementation)
    left, right = _operand(lhs), _operand(rhs)
    axes = contraction(left.shape, right.shape, dimension_numbers)
    if not isinstance(left, QTensor) and not isinstance(right, QTensor):
        _refuse_integer_result(left, right, preferred_element_type)
        return jax.lax.dot_general(
            left, right, axes.dimension_numbers, precision, preferred_element_type
        )
    product = partial(
        _first_that_can,
        names=names,
        axes=axes,
        precision=precision,
        dtype=_result_dtype(left, right, preferred_element_type),
    )
    if isinstance(left, QTensor) and isinstance(right, QTensor):
        product = without_derivative(product, _NO_DERIVATIVE)
    return product(left, right)


def _first_that_can(
    lhs: Array | QTensor,
    rhs: Array | QTensor,
    names: tuple[str, ...],
    axes: Contraction,
    precision: jax.lax.PrecisionLike,
    dtype: np.dtype,
) -> Array:
    reasons = []
    for name in names:
        try:
            return IMPLEMENTATIONS[name](lhs, rhs, axes, precision, dtype)
        except NotImplementedError as error:
            reasons.append(f"{name!r}: {error}")
    raise NotImplementedError(
        f"no implementation allowed multiplies {describe(lhs)} by {describe(rhs)}: "
        + "; ".join(reasons)
    )


def _names(implementation: str | Sequence[str] | None) -> tuple[str, ...]:
    if implementation is None:
        return tuple(IMPLEMENTATIONS)
    names = (implementation,) if isinstance(implementation, str) else tuple(implementation)
    unknown = [name for name in names if name not in IMPLEMENTATIONS]
    if unknown or not names:
        raise ValueError(
            f"unknown `implementation` {implementation!r}: known are {sorted(IMPLEMENTATIONS)}"
        )
    return names


def _operand(operand: Array | QTensor) -> Array | QTensor:
    if isinstance(operand, QTensor):
        validate(operand)
        return operand
    return jnp.asarray(operand)


def _result_dtype(
    lhs: Array | QTensor, rhs: Array | QTensor, preferred: DTypeLike | None
) -> np.dtype:
    dtype = jnp.result_type(lhs.dtype, rhs.dtype) if preferred is None else jnp.dtype(preferred)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"a product with a QTensor has a floating dtype, not {dtype}")
    return dtype


def _refuse_integer_result(lhs: Array, rhs: Array, preferred: DTypeLike | None) -> None:
    # Such a product aborts the TPU compiler, and with it the process.
    floating = [jnp.issubdtype(dtype, jnp.floating) for dtype in (lhs.dtype, rhs.dtype)]
    if preferred is not None and any(floating) and jnp.issubdtype(preferred, jnp.integer):
        raise TypeError(
            f"`lhs` is {describe(lhs)} and `rhs` {describe(rhs)}: "
            f"their product has a floating dtype, not {jnp.dtype(preferred)}"
        )
