"""Products by XLA's own dot of the stored values, with the scales applied afterwards."""

import math
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.export import is_symbolic_dim
from jaxtyping import Array, Float, Int8, Int32, Shaped

from . import _tpu_rows
from ._contraction import Contraction
from ._groups import grouped_dot, has_scale_per_term, is_grouped
from ._qtensor import QTensor, describe
from ._storage import decode, expand_scale, spread
from ._tensor_cores import FEW_ROWS, needs_zeros, unpacked, with_zeros

# The dtypes of an array that can be multiplied by the values of a QTensor: each holds all of them.
ARRAY_DTYPES = ("float16", "bfloat16", "float32", "float64")


def refusal(
    lhs: Array | QTensor, rhs: Array | QTensor, contraction: Contraction, *_: Any
) -> str | None:
    """Why XLA does not multiply these; None if it does."""
    if has_scale_per_term(lhs, rhs, contraction):
        return (
            f"`lhs` is {describe(lhs)} and `rhs` {describe(rhs)}: a scale changes with every term"
        )
    return dtype_refusal(lhs, rhs) or overflow(lhs, rhs, contraction.terms)


def dtype_refusal(lhs: Array | QTensor, rhs: Array | QTensor) -> str | None:
    """Says that an array beside a QTensor has a dtype that may not hold its values."""
    for name, operand in (("lhs", lhs), ("rhs", rhs)):
        if not isinstance(operand, QTensor) and operand.dtype.name not in ARRAY_DTYPES:
            return (
                f"`{name}` is {describe(operand)}: an array beside a QTensor must be one of "
                f"{', '.join(ARRAY_DTYPES)}"
            )
    return None


def dot_general(
    lhs: Array | QTensor,
    rhs: Array | QTensor,
    contraction: Contraction,
    precision: jax.lax.PrecisionLike,
    dtype: np.dtype,
) -> Array:
    """Multiplies the values, then the result by the scales: `(lhs @ rhs) * lhs.scale * rhs.scale`.

    Two integer QTensors are summed exactly in int32, two float8 ones in float32, an integer and a
    float8 one in float32 from bfloat16, which holds the values of both, and an array by a QTensor
    in float32 from the array's dtype. Scales that vary along a contracting axis multiply the sum
    of each group, and the groups are added in float32.
    """
    if contraction.terms == 0:
        return jnp.zeros(contraction.result_shape, dtype)
    product = partial(scaled_dot, dot=partial(_dot, precision=precision))
    if is_grouped(lhs, contraction.lhs_contract) or is_grouped(rhs, contraction.rhs_contract):
        groups = partial(grouped_dot, contraction=contraction, product=product)
        # XLA:TPU adds the products of all groups up as they leave the matrix unit, however many
        # and large they are; other compilers would write them to memory first.
        on_tpu = partial(groups, at_once=True)
        if _tpu_rows.takes_groups(lhs, rhs, contraction):
            on_tpu = partial(_tpu_rows.grouped_dot, contraction=contraction, precision=precision)
        return jax.lax.platform_dependent(lhs, rhs, tpu=on_tpu, default=groups).astype(dtype)
    return product(lhs, rhs, contraction).astype(dtype)


def scaled_dot(
    lhs: Array | QTensor, rhs: Array | QTensor, contraction: Contraction, dot: Any
) -> Float[Array, "*out"]:
    """`dot` of the values, times the scales, which are constant along the contracting axes.

    They are applied in float32, one after the other, because the product of two small scales can
    underflow where the result does not.
    """
    result = dot(lhs, rhs, contraction).astype(jnp.float32)
    if isinstance(lhs, QTensor):
        result = result * lhs_in_output(expand_scale(lhs), contraction)
    if isinstance(rhs, QTensor):
        result = result * rhs_in_output(expand_scale(rhs), contraction)
    return result


def lhs_in_output(x: Shaped[Array, "*lhs"], contraction: Contraction) -> Shaped[Array, "*out"]:
    """What `x`, of size 1 along the contracting axes of the left operand, is in the output."""
    c = contraction
    x = x.transpose(c.lhs_batch + c.lhs_free + c.lhs_contract)
    kept = x.shape[: len(c.lhs_batch) + len(c.lhs_free)]
    return x.reshape(kept + (1,) * len(c.rhs_free))


def rhs_in_output(x: Shaped[Array, "*rhs"], contraction: Contraction) -> Shaped[Array, "*out"]:
    """What `x`, of size 1 along the contracting axes of the right operand, is in the output."""
    c = contraction
    x = x.transpose(c.rhs_batch + c.rhs_free + c.rhs_contract)
    batch, free = len(c.rhs_batch), len(c.rhs_free)
    return x.reshape(x.shape[:batch] + (1,) * len(c.lhs_free) + x.shape[batch : batch + free])


def overflow(lhs: Array | QTensor, rhs: Array | QTensor, terms: int) -> str | None:
    """Says that a sum of integer products could leave int32, as one of 133145 of int8 could."""
    largest = 1.0
    for q in (lhs, rhs):
        if not isinstance(q, QTensor) or not q.format.is_integer:
            return None
        largest *= q.format.max if q.zero_point is None else q.format.max - q.format.lowest
    most = int((2**31 - 1) // largest)
    if terms <= most:
        return None
    return f"contracts {terms} terms: more than {most} can overflow int32"


def integer_dot(
    lhs: QTensor, rhs: QTensor, contraction: Contraction, dot: Any
) -> Int32[Array, "*out"]:
    """`(lhs.values - lhs.zero_point) @ (rhs.values - rhs.zero_point)`, exactly.

    By `dot` of the values as they are stored and, where there is a zero point `z`, the sums of
    the other operand's values: `x @ (w - z) = x @ w - sum(x) * z`.
    """
    left, right = _int8(lhs), _int8(rhs)
    result = dot(left, right, contraction)
    left_sum = partial(_sum, left, contraction.lhs_contract, lhs_in_output, contraction)
    right_sum = partial(_sum, right, contraction.rhs_contract, rhs_in_output, contraction)
    # Integers wrap around, so the result is right wherever it fits, whatever the parts do.
    if lhs.zero_point is not None:
        left_zero = lhs_in_output(_spread_zero(lhs), contraction)
        result = result - left_zero * right_sum()
    if rhs.zero_point is not None:
        right_zero = rhs_in_output(_spread_zero(rhs), contraction)
        result = result - left_sum() * right_zero
        if lhs.zero_point is not None:
            terms = jnp.int32(contraction.terms)
            result = result + left_zero * right_zero * terms
    return result


def _spread_zero(q: QTensor) -> Int32[Array, "*wide"]:
    assert q.zero_point is not None
    return spread(q.zero_point, q.shape).astype(jnp.int32)


def _sum(values: Array, axes: tuple[int, ...], in_output: Any, c: Contraction) -> Array:
    return in_output(jnp.sum(values, axes, dtype=jnp.int32, keepdims=True), c)


def _dot(
    lhs: Array | QTensor,
    rhs: Array | QTensor,
    contraction: Contraction,
    precision: jax.lax.PrecisionLike,
) -> Shaped[Array, "*out"]:
    if not isinstance(lhs, QTensor) or not isinstance(rhs, QTensor):
        return _array_dot(lhs, rhs, contraction, precision)
    if lhs.format.is_integer and rhs.format.is_integer:
        return integer_dot(lhs, rhs, contraction, partial(_eight_bit_dot, dtype=jnp.int32))
    return _float_dot(lhs, rhs, contraction, precision)


def _array_dot(
    lhs: Array | QTensor,
    rhs: Array | QTensor,
    contraction: Contraction,
    precision: jax.lax.PrecisionLike,
) -> Float[Array, "*out"]:
    """Weight-only: the values become the array's dtype, without their scale and so exactly."""
    array = rhs if isinstance(lhs, QTensor) else lhs
    dtype = jnp.dtype(jnp.float32) if array.dtype == jnp.float64 else array.dtype
    as_packed = dtype == jnp.bfloat16 and _has_few_rows(lhs, contraction)
    left, right = (
        decode(o if as_packed else _unpacked(o), dtype)
        if isinstance(o, QTensor)
        else o.astype(dtype)
        for o in (lhs, rhs)
    )
    return _tpu_rows.dot_general(
        left, right, contraction, precision=precision, preferred_element_type=jnp.float32
    )


def _has_few_rows(lhs: Array | QTensor, c: Contraction) -> bool:
    """Whether the array beside a QTensor is known to have few rows, in every batch."""
    shape, free = (c.lhs_shape, c.lhs_free)
    if isinstance(lhs, QTensor):
        shape, free = (c.rhs_shape, c.rhs_free)
    rows = math.prod(shape[a] for a in free)
    return not is_symbolic_dim(rows) and rows <= FEW_ROWS


def _unpacked(q: QTensor) -> QTensor:
    """int4 on its way to a dot of another dtype; see `_tensor_cores.py`."""
    return replace(q, values=_int8(q)) if q.format.bits == 4 else q


def _int8(q: QTensor) -> Int8[Array, "*shape"]:
    if q.values.dtype == jnp.int8:
        return q.values
    return jax.lax.platform_dependent(q.values, cuda=unpacked, default=lambda v: v.astype(jnp.int8))


def _float_dot(
    lhs: QTensor, rhs: QTensor, contraction: Contraction, precision: jax.lax.PrecisionLike
) -> Float[Array, "*out"]:
    # No hardware multiplies float8 by int8, nor one of the fnuz formats by another.
    names = lhs.format.name, rhs.format.name
    mixed = lhs.format.is_integer or rhs.format.is_integer
    if mixed or names[0].endswith("fnuz") != names[1].endswith("fnuz"):
        left, right = (decode(_unpacked(each), jnp.bfloat16) for each in (lhs, rhs))
        return _tpu_rows.dot_general(
            left, right, contraction, precision=precision, preferred_element_type=jnp.float32
        )
    # At the default precision XLA:GPU may accumulate float8 in less than float32.
    precision = jax.lax.Precision.HIGHEST if precision is None else precision
    return _eight_bit_dot(lhs.values, rhs.values, contraction, jnp.float32, precision)


def _eight_bit_dot(
    lhs: Array,
    rhs: Array,
    contraction: Contraction,
    dtype: Any,
    precision: jax.lax.PrecisionLike = None,
) -> Shaped[Array, "*out"]:
    def dot(lhs: Array, rhs: Array) -> Array:
        return _tpu_rows.dot_general(
            lhs, rhs, contraction, precision=precision, preferred_element_type=dtype
        )

    def dot_with_zeros(lhs: Array, rhs: Array) -> Array:
        return dot(*with_zeros(lhs, rhs, contraction))

    if not needs_zeros(contraction):
        return dot(lhs, rhs)
    return jax.lax.platform_dependent(lhs, rhs, cuda=dot_with_zeros, default=dot)
