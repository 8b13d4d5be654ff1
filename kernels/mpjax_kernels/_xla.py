"""int8 products by XLA's own integer dot: int32 accumulation, scales afterwards."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int8, Int32

from ._contraction import Contraction
from ._formats import int8
from ._qtensor import QTensor, expand_scale

# The most products of two int8 values whose sum is sure to fit in an int32: 133144.
MAX_TERMS = int((2**31 - 1) // int8.max**2)


def xla_dot_general(
    lhs: Array | QTensor, rhs: Array | QTensor, contraction: Contraction, dtype: np.dtype
) -> Array:
    """Multiplies two int8 QTensors: `(lhs.values @ rhs.values) * lhs.scale * rhs.scale`.

    The integer sum is exact. It is converted to float32 and scaled there, then cast to
    `dtype`. One scale is applied after the other, because the product of two small scales
    can underflow where the result does not.

    Raises:
        NotImplementedError: If an operand is not an int8 QTensor, a scale varies along a
            contracting axis, or the sum could overflow.
    """
    left = _require_int8("lhs", lhs, contraction.lhs_contract)
    right = _require_int8("rhs", rhs, contraction.rhs_contract)
    if contraction.terms > MAX_TERMS:
        raise NotImplementedError(
            f"contracts {contraction.terms} terms: more than {MAX_TERMS} can overflow int32"
        )
    sums = _int8_dot(left.values, right.values, contraction).astype(jnp.float32)
    lhs_scale, rhs_scale = _output_scales(left, right, contraction)
    return (sums * lhs_scale * rhs_scale).astype(dtype)


def _require_int8(name: str, operand: Array | QTensor, contract: tuple[int, ...]) -> QTensor:
    if not isinstance(operand, QTensor) or operand.format != int8:
        raise NotImplementedError(f"`{name}` is not an int8 QTensor")
    if any(operand.scale.shape[a] != 1 for a in contract):
        raise NotImplementedError(
            f"`{name}` has scale {operand.scale.shape}, which varies along contracting axes "
            f"{contract}: scales can be applied after the dot only if they are constant there"
        )
    return operand


def _output_scales(
    lhs: QTensor, rhs: QTensor, contraction: Contraction
) -> tuple[Float[Array, "*out"], Float[Array, "*out"]]:
    """Both scales laid out as the output is: batch, left free, right free axes."""
    c = contraction
    lhs_scale = expand_scale(lhs).transpose(c.lhs_batch + c.lhs_free + c.lhs_contract)
    rhs_scale = expand_scale(rhs).transpose(c.rhs_batch + c.rhs_free + c.rhs_contract)
    batch, rows, columns = len(c.lhs_batch), len(c.lhs_free), len(c.rhs_free)
    lhs_shape = lhs_scale.shape[: batch + rows] + (1,) * columns
    rhs_shape = rhs_scale.shape[:batch] + (1,) * rows + rhs_scale.shape[batch : batch + columns]
    return lhs_scale.reshape(lhs_shape), rhs_scale.reshape(rhs_shape)


def _int8_dot(
    lhs: Int8[Array, "*lhs"], rhs: Int8[Array, "*rhs"], contraction: Contraction
) -> Int32[Array, "*out"]:
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
