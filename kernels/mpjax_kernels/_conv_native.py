"""Convolutions of int8 as products of patches by native CPU kernels.

What the window holds at each place becomes a row: slices of the image, one for each tap of the
kernel, next to each other. The rows by the kernel as a matrix is one product, with exact sums,
whose scales and cast are applied as the result is written. XLA:CPU's own int8 convolution takes
longer than the slices and the product together.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int8

from . import _native
from ._contraction import contraction
from ._conv_xla import refusal as xla_refusal
from ._convolution import Convolution
from ._implementation import Operand
from ._layout import positions
from ._native_library import INT8, native_refusal
from ._qtensor import QTensor, describe

_MOST_TAPS = 128  # each is an operation of the program
_MOST_BYTES = 1 << 28  # of patches


def refusal(lhs: Operand, rhs: Operand, window: Convolution, *_: Any) -> str | None:
    """Why these are not convolved here; None if they are."""
    for name, operand in (("lhs", lhs), ("rhs", rhs)):
        if not isinstance(operand, QTensor) or operand.format.name not in INT8:
            return f"`{name}` is {describe(operand)}: both must be QTensors of {INT8}"
    groups = window.feature_group_count, window.batch_group_count
    if groups != (1, 1):
        return f"`feature_group_count` and `batch_group_count` are {groups}: it takes 1"
    reason = _native.surroundings_refusal(*window.lhs_shape, *window.rhs_shape)
    reason = reason or xla_refusal(lhs, rhs, window) or native_refusal(INT8[0])
    if reason is not None:
        return reason
    taps = math.prod(window.rhs_shape[a] for a in window.axes.rhs_spec[2:])
    if taps > _MOST_TAPS:
        return f"the kernel has {taps} taps: it takes {_MOST_TAPS}"
    out = window.result_shape
    places = math.prod(out) // max(1, out[window.axes.out_spec[1]])
    if places * window.terms > _MOST_BYTES:
        return f"the patches would take {places * window.terms} bytes: {_MOST_BYTES} at most"
    return None


def conv(
    lhs: QTensor,
    rhs: QTensor,
    window: Convolution,
    precision: jax.lax.PrecisionLike,
    dtype: np.dtype,
) -> Array:
    """Convolves the values exactly, in int32, then multiplies by the scales as `"xla"` does."""
    axes, out = window.axes, window.result_shape
    batch, features, *space = axes.lhs_spec
    x = lhs.values.transpose((batch, *space, features))
    w = rhs.values.transpose((*axes.rhs_spec[2:], *axes.rhs_spec[1::-1]))
    images, sides = x.shape[0], tuple(out[a] for a in axes.out_spec[2:])
    places, columns = math.prod(sides), w.shape[-1]
    rows = _patches(x, w.shape[:-2], sides, window).reshape(images * places, window.terms)
    by_image = jnp.broadcast_to(lhs.scale.reshape(-1, 1), (images, places)).reshape(-1, 1)
    scale = lhs.scale.reshape(1, 1) if lhs.scale.size == 1 else by_image
    left = QTensor(rows, scale, lhs.dtype)
    right = QTensor(w.reshape(window.terms, columns), rhs.scale.reshape(1, -1), rhs.dtype)
    product = contraction(left.shape, right.shape, (((1,), (0,)), ((), ())))
    result = _native.dot_general(left, right, product, precision, dtype)
    last = (axes.out_spec[0], *axes.out_spec[2:], axes.out_spec[1])
    return result.reshape(images, *sides, columns).transpose(positions(last))


def _patches(
    x: Int8[Array, "n *space c"],
    kernel: tuple[int, ...],
    sides: tuple[int, ...],
    window: Convolution,
) -> Int8[Array, "n *out terms"]:
    """What each place of the result is a sum of: taps, and the features of each."""
    space = [(*pad, d - 1) for pad, d in zip(window.padding, window.lhs_dilation, strict=True)]
    x = jax.lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *space, (0, 0, 0)])
    images, features = x.shape[0], x.shape[-1]
    if 0 in (*sides, *kernel):
        return jnp.zeros((images, *sides, window.terms), x.dtype)
    taps = []
    for tap in np.ndindex(*kernel):
        first = [int(i * apart) for i, apart in zip(tap, window.rhs_dilation, strict=True)]
        steps = zip(first, sides, window.window_strides, strict=True)
        end = [start + (side - 1) * stride + 1 for start, side, stride in steps]
        strides = (1, *window.window_strides, 1)
        taps.append(jax.lax.slice(x, (0, *first, 0), (images, *end, features), strides))
    return jnp.concatenate(taps, axis=-1)
