"""Products by XLA's own dot of the stored values, with the scales applied afterwards."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int8, Int32

from ._contraction import Contraction
from ._qtensor import QTensor, decode, describe, expand_scale

# The dtypes of an array that can be multiplied by the values of a QTensor: each holds all of them.
_ARRAY_DTYPES = ("float16", "bfloat16", "float32", "float64")


def xla_dot_general(
    lhs: Array | QTensor,
    rhs: Array | QTensor,
    contraction: Contraction,
    precision: jax.lax.PrecisionLike,
    dtype: np.dtype,
) -> Array:
    """Multiplies the values, then the result by the scales: `(lhs @ rhs) * lhs.scale * rhs.scale`.

    Two integer QTensors are summed exactly in int32, two float8 ones in float32, and an array by
    a QTensor in float32 from the array's dtype. The scales are applied in float32, one after the
    other, because the product of two small scales can underflow where the result does not.

    Raises:
        NotImplementedError: If a scale varies along a contracting axis, an integer sum could
            overflow, or XLA has no product of the two dtypes.
    """
    _require_constant_scale("lhs", lhs, contraction.lhs_contract)
    _require_constant_scale("rhs", rhs, contraction.rhs_contract)
    if not isinstance(lhs, QTensor) or not isinstance(rhs, QTensor):
        result = _array_dot(lhs, rhs, contraction, precision)
    elif lhs.format.is_integer and rhs.format.is_integer:
        result = _integer_dot(lhs, rhs, contraction).astype(jnp.float32)
    else:
        result = _float8_dot(lhs, rhs, contraction, precision)
    for scale in _output_scales(lhs, rhs, contraction):
        result = result * scale
    return result.astype(dtype)


def _require_constant_scale(name: str, operand: Array | QTensor, contract: tuple[int, ...]) -> None:
    if isinstance(operand, QTensor) and any(operand.scale.shape[a] != 1 for a in contract):
        raise NotImplementedError(
            f"`{name}` has scale {operand.scale.shape}, which varies along contracting axes "
            f"{contract}: scales can be applied after the dot only if they are constant there"
        )


def _array_dot(
    lhs: Array | QTensor,
    rhs: Array | QTensor,
    contraction: Contraction,
    precision: jax.lax.PrecisionLike,
) -> Float[Array, "*out"]:
    """Weight-only: the values become the array's dtype, without their scale and so exactly."""
    name, array = ("rhs", rhs) if isinstance(lhs, QTensor) else ("lhs", lhs)
    if array.dtype.name not in _ARRAY_DTYPES:
        raise NotImplementedError(
            f"`{name}` is {describe(array)}: an array beside a QTensor must be one of "
            f"{', '.join(_ARRAY_DTYPES)}"
        )
    dtype = jnp.dtype(jnp.float32) if array.dtype == jnp.float64 else array.dtype
    left, right = (
        decode(o, dtype) if isinstance(o, QTensor) else o.astype(dtype) for o in (lhs, rhs)
    )
    return jax.lax.dot_general(
        left, right, contraction.dimension_numbers, precision, preferred_element_type=jnp.float32
    )


def _float8_dot(
    lhs: QTensor, rhs: QTensor, contraction: Contraction, precision: jax.lax.PrecisionLike
) -> Float[Array, "*out"]:
    names = lhs.format.name, rhs.format.name
    if lhs.format.is_integer or rhs.format.is_integer:
        raise NotImplementedError(f"`lhs` is {names[0]} and `rhs` {names[1]}: no common product")
    if names[0].endswith("fnuz") != names[1].endswith("fnuz"):
        raise NotImplementedError(
            f"`lhs` is {names[0]} and `rhs` {names[1]}: no hardware multiplies one of the fnuz "
            "formats by another"
        )
    # At the default precision XLA:GPU may accumulate float8 in less than float32.
    precision = jax.lax.Precision.HIGHEST if precision is None else precision
    return jax.lax.dot_general(
        lhs.values,
        rhs.values,
        contraction.dimension_numbers,
        precision,
        preferred_element_type=jnp.float32,
    )


def _output_scales(
    lhs: Array | QTensor, rhs: Array | QTensor, contraction: Contraction
) -> list[Float[Array, "*out"]]:
    """The scales laid out as the output is: batch, left free, right free axes."""
    c, scales = contraction, []
    batch, rows, columns = len(c.lhs_batch), len(c.lhs_free), len(c.rhs_free)
    if isinstance(lhs, QTensor):
        scale = expand_scale(lhs).transpose(c.lhs_batch + c.lhs_free + c.lhs_contract)
        scales.append(scale.reshape(scale.shape[: batch + rows] + (1,) * columns))
    if isinstance(rhs, QTensor):
        scale = expand_scale(rhs).transpose(c.rhs_batch + c.rhs_free + c.rhs_contract)
        free = scale.shape[batch : batch + columns]
        scales.append(scale.reshape(scale.shape[:batch] + (1,) * rows + free))
    return scales


def _integer_dot(left: QTensor, right: QTensor, contraction: Contraction) -> Int32[Array, "*out"]:
    limit = int((2**31 - 1) // (left.format.max * right.format.max))  # 133144 for int8 by int8
    if contraction.terms > limit:
        raise NotImplementedError(
            f"contracts {contraction.terms} terms: more than {limit} can overflow int32"
        )
    lhs, rhs = left.values.astype(jnp.int8), right.values.astype(jnp.int8)
    dot = partial(
        jax.lax.dot_general,
        dimension_numbers=contraction.dimension_numbers,
        preferred_element_type=jnp.int32,
    )
    if 1 not in (contraction.rows, contraction.columns):
        return dot(lhs, rhs)
    # XLA:CPU has a fast int8 matrix product but no fast matrix-vector product. A 4096 x 4096
    # weight times one row, on two cores of an AVX-512 CPU: 35 ms; times that row twice: 7 ms
    # (JAX 0.10) and 2.4 ms (JAX 0.12), or 1.3 ms with the weight stored [N, K].
    double = partial(_doubled_dot, contraction=contraction)
    return jax.lax.platform_dependent(lhs, rhs, cpu=double, default=dot)


def _doubled_dot(
    lhs: Int8[Array, "*lhs"], rhs: Int8[Array, "*rhs"], contraction: Contraction
) -> Int32[Array, "*out"]:
    """The same dot with the operand that is a single vector given twice, and half dropped."""
    c = contraction
    new_axis = len(c.lhs_batch)  # of the output: where the repeated operand's free axes begin
    if c.rows == 1:
        lhs = jnp.broadcast_to(lhs, (2, *lhs.shape))
        c = replace(c, lhs_contract=_next(c.lhs_contract), lhs_batch=_next(c.lhs_batch))
    else:
        rhs = jnp.broadcast_to(rhs, (2, *rhs.shape))
        new_axis += len(c.lhs_free)
        c = replace(c, rhs_contract=_next(c.rhs_contract), rhs_batch=_next(c.rhs_batch))
    both = jax.lax.dot_general(lhs, rhs, c.dimension_numbers, preferred_element_type=jnp.int32)
    return jax.lax.index_in_dim(both, 0, new_axis, keepdims=False)


def _next(axes: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(a + 1 for a in axes)
