"""The public product: one contract, several implementations of it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array

from . import _cpu, _gpu, _native, _reference, _tpu, _xla
from ._arguments import as_operand, refuse_integer_result, result_dtype
from ._contraction import Contraction, DimensionNumbers, contraction
from ._derivative import linear_in_arrays, without_derivative
from ._implementation import Implementation, Operand, check_names, choose
from ._layout import stored_axes
from ._qtensor import QTensor
from ._storage import as_stored


def _of_whole(module: Any, *platforms: str) -> Implementation:
    """One whose operands are in no tiles."""
    refusal, run = partial(_refusal, module.refusal), partial(_run, module.dot_general)
    return Implementation(refusal, run, platforms)


def _refusal(function: Callable[..., str | None], *operands: Any) -> str | None:
    shapes = (jax.eval_shape(as_stored, o) if _in_tiles(o) else o for o in operands)
    return function(*shapes)


def _run(function: Callable[..., Array], *operands: Any, **options: Any) -> Array:
    return function(*(as_stored(o) if _in_tiles(o) else o for o in operands), **options)


def _in_tiles(operand: Any) -> bool:
    return isinstance(operand, QTensor) and bool(operand.tiles)


# In the order they are tried when none is named. The last one takes everything.
IMPLEMENTATIONS = {
    "native": Implementation(_native.refusal, _native.dot_general, ("cpu",), is_native=True),
    "tpu": replace(_of_whole(_tpu, "tpu"), is_native=True, tuned=_tpu.tuned),
    "cpu": _of_whole(_cpu, "cpu"),
    "gpu": _of_whole(_gpu, "cuda"),
    "xla": _of_whole(_xla),
    "reference": _of_whole(_reference),
}
# Those that XLA can differentiate: linear in an array beside a QTensor, in every bit.
_LINEAR = ("xla", "reference")

_NO_DERIVATIVE = (
    "the product of two QTensors has no derivative: their values come from rounding, which is "
    "flat. To train through quantized products use mpjax_kernels.quantized_dot_general, or a "
    "policy of mpjax; differentiate the model before it is quantized, or keep one "
    "operand an array (the product is differentiable in that one)"
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

    - `"native"`: on CPUs, a call of a native kernel for two QTensors of int8 or int4, with exact
      sums, of which one may have a scale per group and zero points, two of float8, or a float32,
      bfloat16 or float16 array and a QTensor of int8, int4 or float8, where the package was built
      with them; in programs for one device, or inside of `jax.shard_map`, and not in exported ones.
    - `"tpu"`: on TPUs, a Pallas kernel for bfloat16 by a QTensor of int8 or int4 with a scale per
      group of a multiple of 128 terms, from so many rows on as it is faster with on that TPU; in
      the same programs as `"native"`.
    - `"cpu"`: on CPUs, what takes XLA a form of its own to be fast there: integers, with the same
      exact sums; a few rows of a 16-bit array by integers, the rows as integers of 23 bits (off by
      2**-22 of their amax) unless `precision` asks for more; and products in bfloat16 or float32 of
      a larger operand that is decoded block by block.
    - `"gpu"`: on NVIDIA GPUs, two QTensors of integers or two of float8, as the one batched matrix
      product that reaches their 8-bit tensor cores.
    - `"xla"`: what XLA multiplies as stored, on every platform. Two QTensors of integers
      accumulate exactly in int32, two of float8 in float32, one of each in bfloat16 products and
      float32 sums. An array keeps its dtype, the values of a QTensor beside it are converted to
      that. Scales are applied in float32 after the dot, or after the dot of each group where they
      vary along a contracting axis.
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
            and a QTensor is differentiable in the array, by `"xla"` or `"reference"`.
    """
    check_names(IMPLEMENTATIONS, implementation)
    left, right = as_operand(lhs), as_operand(rhs)
    axes = contraction(left.shape, right.shape, dimension_numbers)
    if not isinstance(left, QTensor) and not isinstance(right, QTensor):
        refuse_integer_result(left, right, preferred_element_type)
        return jax.lax.dot_general(
            left, right, axes.dimension_numbers, precision, preferred_element_type
        )
    dtype = result_dtype(left, right, preferred_element_type)
    product = partial(
        multiply, axes=axes, precision=precision, dtype=dtype, implementation=implementation
    )
    if isinstance(left, QTensor) and isinstance(right, QTensor):
        return without_derivative(product, _NO_DERIVATIVE)(left, right)
    return linear_in_arrays(product, partial(product, implementation=_LINEAR))(left, right)


def multiply(
    lhs: Operand,
    rhs: Operand,
    axes: Contraction,
    precision: jax.lax.PrecisionLike,
    dtype: np.dtype,
    implementation: str | Sequence[str] | None,
    table: Mapping[str, Implementation] = IMPLEMENTATIONS,
) -> Array:
    """The product of valid operands, one of them a QTensor, with no rule for its derivative."""
    orders = tuple(
        stored_axes(o.layout if isinstance(o, QTensor) else None, o.ndim) for o in (lhs, rhs)
    )
    stored = axes.reordered(*orders)
    operands = tuple(
        as_stored(o, in_tiles=True) if isinstance(o, QTensor) else o for o in (lhs, rhs)
    )
    result = choose(table, implementation, operands, stored, precision, dtype)
    # The free axes come in the order in which they are stored; put them in that of the operands.
    batch, rows = len(axes.lhs_batch), len(axes.lhs_free)
    left = [batch + [orders[0][a] for a in stored.lhs_free].index(a) for a in axes.lhs_free]
    right = [orders[1][a] for a in stored.rhs_free]
    right = [batch + rows + right.index(a) for a in axes.rhs_free]
    order = [*range(batch), *left, *right]
    return result if order == sorted(order) else jnp.transpose(result, order)
