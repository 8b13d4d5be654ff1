"""The public ragged product: one contract, several implementations of it."""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Float, Integer

from . import _ragged_loop, _ragged_xla
from ._arguments import as_operand, refuse_integer_result, result_dtype
from ._derivative import linear_in_arrays, without_derivative
from ._implementation import Implementation, Operand, check_names, choose
from ._qtensor import QTensor, describe

# In the order they are tried when none is named. The last one takes everything.
IMPLEMENTATIONS = {
    "cpu": Implementation(_ragged_loop.refusal, _ragged_loop.ragged_dot, ("cpu",)),
    "xla": Implementation(_ragged_xla.refusal, _ragged_xla.ragged_dot),
    "reference": Implementation(_ragged_loop.no_refusal, _ragged_loop.reference_ragged_dot),
}
# Those that JAX can differentiate.
_LINEAR = ("xla", "reference")

_NO_DERIVATIVE = (
    "the ragged product of two QTensors has no derivative: their values come from rounding, which "
    "is flat. Differentiate the model before it is quantized, or keep one operand an array (the "
    "product is differentiable in that one)"
)


def ragged_dot(
    lhs: Float[Array, "m k"] | QTensor,
    rhs: Float[Array, "g k n"] | QTensor,
    group_sizes: Integer[ArrayLike, " g"],
    *,
    precision: jax.lax.PrecisionLike = None,
    preferred_element_type: DTypeLike | None = None,
    implementation: str | Sequence[str] | None = None,
) -> Float[Array, "m n"]:
    """`jax.lax.ragged_dot` whose operands may be quantized: rows sorted by expert, times experts.

    The first `group_sizes[0]` rows of `lhs` are multiplied by `rhs[0]`, the next `group_sizes[1]`
    by `rhs[1]`, and so on; rows that are left over give zeros. A group may be empty.

    Implementations, in the order they are tried:

    - `"cpu"`: on CPUs, one `dot_general` after the other for the experts that have rows; takes
      what that takes without its reference.
    - `"xla"`: `jax.lax.ragged_dot` of the stored values, for scales that are constant along K and
      integers without zero points. Two integers accumulate exactly in int32, two of float8 in
      float32; an array keeps its dtype, the values of a QTensor beside it are converted to that.
      The scales of each row and of its expert are applied in float32 afterwards.
    - `"reference"`: anything. Dequantizes to float32, and multiplies expert by expert in full
      float32.

    Two plain arrays go to `jax.lax.ragged_dot` whatever `implementation` says.

    Args:
        lhs: An array or a QTensor of shape [M, K].
        rhs: An array or a QTensor of shape [G, K, N].
        group_sizes: How many rows each expert has, non-negative; together at most M.
        precision: As in `dot_general`.
        preferred_element_type: As in `dot_general`.
        implementation: None tries them in order; a name allows that one only; a sequence of
            names tries those in order.

    Returns:
        An array of shape [M, N].

    Raises:
        ValueError: If the shapes do not go together, or an implementation is unknown.
        TypeError: If `group_sizes` are not integers, or for the reasons of `dot_general`.
        NotImplementedError: If no implementation allowed takes these operands, with every reason;
            or if a product of two QTensors is differentiated. That of an array and a QTensor is
            differentiable in the array.
    """
    check_names(IMPLEMENTATIONS, implementation)
    left, right, sizes = as_operand(lhs), as_operand(rhs), jnp.asarray(group_sizes)
    _check(left, right, sizes)
    if not isinstance(left, QTensor) and not isinstance(right, QTensor):
        refuse_integer_result(left, right, preferred_element_type)
        return jax.lax.ragged_dot(left, right, sizes, precision, preferred_element_type)
    sizes = sizes.astype(jnp.int32)  # which sums of them do not leave
    dtype = result_dtype(left, right, preferred_element_type)
    if 0 in (*left.shape, *right.shape):
        return jnp.zeros((left.shape[0], right.shape[2]), dtype)

    product = partial(_multiply, precision=precision, dtype=dtype)
    named = partial(product, implementation=implementation)
    if isinstance(left, QTensor) and isinstance(right, QTensor):
        return without_derivative(named, _NO_DERIVATIVE)(left, right, sizes)
    return linear_in_arrays(named, partial(product, implementation=_LINEAR))(left, right, sizes)


def _multiply(
    lhs: Operand,
    rhs: Operand,
    sizes: Integer[Array, " g"],
    precision: jax.lax.PrecisionLike,
    dtype: np.dtype,
    implementation: str | Sequence[str] | None,
) -> Array:
    return choose(IMPLEMENTATIONS, implementation, (lhs, rhs, sizes), precision, dtype)


def _check(lhs: Array | QTensor, rhs: Array | QTensor, sizes: Array) -> None:
    if lhs.ndim != 2 or rhs.ndim != 3:
        raise ValueError(
            f"`lhs` has shape {lhs.shape} and `rhs` {rhs.shape}: they must be [M, K] and [G, K, N]"
        )
    if lhs.shape[1] != rhs.shape[1]:
        raise ValueError(
            f"`lhs` has shape {lhs.shape} but `rhs` has {rhs.shape}: "
            f"contracting {lhs.shape[1]} with {rhs.shape[1]}"
        )
    if not jnp.issubdtype(sizes.dtype, jnp.integer):
        raise TypeError(f"`group_sizes` is {describe(sizes)}: they must be integers")
    if sizes.shape != rhs.shape[:1]:
        raise ValueError(
            f"`group_sizes` has shape {sizes.shape} but `rhs` {rhs.shape}: there must be one for "
            f"each of its {rhs.shape[0]} experts"
        )
