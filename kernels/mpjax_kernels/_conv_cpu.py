"""Integer convolutions in the form that XLA:CPU runs fast.

XLA:CPU has a fast int8 convolution for two spatial axes, features last, four features or a
multiple, an image that is not dilated and no groups; everything else takes a plain loop, up to 300
times slower. So axes are moved, a missing spatial axis is added, features are filled up with zeros
and a dilated image is written out, none of which changes a sum. A convolution of each feature by
itself (depthwise) is added up tap by tap, which XLA fuses into one pass over the image.
"""

import math
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int8, Int32

from ._conv_xla import refusal as xla_refusal
from ._conv_xla import rescale
from ._convolution import Convolution
from ._implementation import Operand
from ._layout import positions
from ._multiplicands import is_integer_pair, multiplicands
from ._qtensor import QTensor

_TWO = jax.lax.ConvDimensionNumbers((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))
_FEATURES = 4  # a multiple of it
_MOST_TAPS = 128  # of a depthwise kernel; each is an operation of the program


def refusal(lhs: Operand, rhs: Operand, window: Convolution, *_: Any) -> str | None:
    """Why these are not convolved here; None if they are."""
    if not is_integer_pair(lhs, rhs):
        return "it convolves two QTensors of integers"
    space = len(window.window_strides)
    if space not in (1, 2):
        return f"there are {space} spatial axes: it takes one or two"
    if window.batch_group_count != 1:
        return f"`batch_group_count` is {window.batch_group_count}: it takes 1"
    groups = window.feature_group_count
    if groups != 1 and not _is_depthwise(window):
        return f"`feature_group_count` is {groups}: it takes 1, or as many as there are features"
    return xla_refusal(lhs, rhs, window)


def conv(
    lhs: QTensor,
    rhs: QTensor,
    window: Convolution,
    precision: jax.lax.PrecisionLike,
    dtype: np.dtype,
) -> Array:
    """Convolves the values exactly, in int32, then multiplies by the scales as `"xla"` does."""
    del precision  # integers are exact
    axes, both = window.axes, multiplicands(lhs, rhs, None)
    x = both.lhs.transpose(_last(*axes.lhs_spec))
    w = both.rhs.transpose((*axes.rhs_spec[2:], *axes.rhs_spec[1::-1]))
    if len(window.window_strides) == 1:
        x, w, plane = x[:, None], w[None], _as_plane(window)
    else:
        plane = window
    plane = replace(plane, lhs_shape=x.shape, rhs_shape=w.shape, axes=_TWO)
    result = _depthwise(x, w, plane) if _is_depthwise(window) else _dense(x, w, plane)
    if len(window.window_strides) == 1:
        result = result[:, 0]
    result = result.transpose(positions(_last(*axes.out_spec)))
    return rescale(result, lhs, rhs, window).astype(dtype)


def _last(batch: int, features: int, *space: int) -> tuple[int, ...]:
    return (batch, *space, features)


def _as_plane(window: Convolution) -> Convolution:
    """The window with a first spatial axis along which everything has size 1."""
    return replace(
        window,
        window_strides=(1, *window.window_strides),
        padding=((0, 0), *window.padding),
        lhs_dilation=(1, *window.lhs_dilation),
        rhs_dilation=(1, *window.rhs_dilation),
    )


def _is_depthwise(window: Convolution) -> bool:
    groups, axes = window.feature_group_count, window.axes
    taps = math.prod(window.rhs_shape[a] for a in axes.rhs_spec[2:])
    return groups > 1 and groups == window.lhs_shape[axes.lhs_spec[1]] and taps <= _MOST_TAPS


def _dense(
    x: Int8[Array, "n h w i"], w: Int8[Array, "kh kw i o"], window: Convolution
) -> Int32[Array, "n oh ow o"]:
    if window.lhs_dilation != (1, 1):
        x, window = _written_out(x, window)
    fill = -x.shape[-1] % _FEATURES
    x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, fill)))
    w = jnp.pad(w, ((0, 0), (0, 0), (0, fill), (0, 0)))
    return window(x, w, None, jnp.int32)


def _written_out(
    x: Int8[Array, "n h w i"], window: Convolution
) -> tuple[Int8[Array, "n dh dw i"], Convolution]:
    """The image with its padding and dilation as zeros, and the window for it."""
    space = [(*pad, d - 1) for pad, d in zip(window.padding, window.lhs_dilation, strict=True)]
    x = jax.lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *space, (0, 0, 0)])
    none = ((0, 0), (0, 0))
    return x, replace(window, lhs_shape=x.shape, padding=none, lhs_dilation=(1, 1))


def _depthwise(
    x: Int8[Array, "n h w c"], w: Int8[Array, "kh kw 1 cm"], window: Convolution
) -> Int32[Array, "n oh ow cm"]:
    """The sum over taps of the shifted image times what the kernel has there, in int32."""
    n, oh, ow, out = window.result_shape
    x, window = _written_out(x, window)
    c = x.shape[-1]
    taps = w.reshape(*w.shape[:2], c, out // c).astype(jnp.int32)
    (sh, sw), (dh, dw) = window.window_strides, window.rhs_dilation
    total = jnp.zeros((n, oh, ow, c, out // c), jnp.int32)
    if 0 in total.shape:
        return total.reshape(n, oh, ow, out)
    for i, j in np.ndindex(*w.shape[:2]):
        top, left = i * dh, j * dw
        end = top + (oh - 1) * sh + 1, left + (ow - 1) * sw + 1
        shifted = jax.lax.slice(x, (0, top, left, 0), (n, *end, c), (1, sh, sw, 1))
        total = total + shifted.astype(jnp.int32)[..., None] * taps[i, j]
    return total.reshape(n, oh, ow, out)
