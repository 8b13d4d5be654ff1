"""Convolutions by XLA's own, of the stored values, with the scales applied afterwards."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from ._conv_gpu import int8_sums, widened_sums
from ._convolution import Convolution
from ._implementation import Operand
from ._multiplicands import Multiplicands, multiplicands, zero_point_refusal
from ._qtensor import QTensor
from ._storage import expand_scale
from ._xla import dtype_refusal, overflow


def refusal(lhs: Operand, rhs: Operand, window: Convolution, *_: Any) -> str | None:
    """Why XLA does not convolve these; None if it does."""
    per_image = window.axes.lhs_spec[0] if window.batch_group_count == 1 else None
    return (
        dtype_refusal(lhs, rhs)
        or _scale_refusal("lhs", lhs, per_image, "batch")
        or _scale_refusal("rhs", rhs, window.axes.rhs_spec[0], "output feature")
        or zero_point_refusal(lhs, rhs)
        or overflow(lhs, rhs, window.terms)
    )


def conv(
    lhs: Operand,
    rhs: Operand,
    window: Convolution,
    precision: jax.lax.PrecisionLike,
    dtype: np.dtype,
) -> Array:
    """Convolves the values, then multiplies the sums by the scales of `lhs` and of `rhs`.

    As `dot_general`: two integer QTensors are summed exactly in int32, the rest in float32.
    """
    m = multiplicands(lhs, rhs, precision)

    def sums(lhs: Array, rhs: Array) -> Array:
        return window(lhs, rhs, m.precision, m.sum_dtype).astype(jnp.float32)

    gpu = _gpu_sums(m)
    if gpu is None:
        result = sums(m.lhs, m.rhs)
    else:
        result = jax.lax.platform_dependent(
            m.lhs, m.rhs, cuda=partial(gpu, window=window), default=sums
        )
    return rescale(result, lhs, rhs, window).astype(dtype)


def _gpu_sums(m: Multiplicands) -> Callable[..., Array] | None:
    """What sums them up on an NVIDIA GPU, if that is not XLA's convolution as it is."""
    if m.lhs.dtype == jnp.int8 and m.rhs.dtype == jnp.int8:
        return int8_sums
    return widened_sums if m.lhs.dtype.itemsize == 1 else None


def rescale(
    result: Shaped[Array, "*out"], lhs: Operand, rhs: Operand, window: Convolution
) -> Float[Array, "*out"]:
    """A convolution of values times the scales, in float32, one after the other."""
    result = result.astype(jnp.float32)
    if isinstance(lhs, QTensor):  # of size 1 along all axes but the batch
        shape = [1] * result.ndim
        shape[window.axes.out_spec[0]] = -1
        result = result * expand_scale(lhs).reshape(shape)
    if isinstance(rhs, QTensor):  # the same for the output features
        shape = [1] * result.ndim
        shape[window.axes.out_spec[1]] = -1
        result = result * expand_scale(rhs).reshape(shape)
    return result


def _scale_refusal(name: str, operand: Operand, free: int | None, what: str) -> str | None:
    if isinstance(operand, QTensor):
        if any(size != 1 for a, size in enumerate(operand.scale.shape) if a != free):
            where = "nowhere" if free is None else f"along the {what} axis {free} alone"
            return (
                f"`{name}` has scale {operand.scale.shape}: for it to be applied after the sum it "
                f"may vary {where}"
            )
    return None
