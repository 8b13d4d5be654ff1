"""From an array to a QTensor and back: amax, scale, round, saturate."""

from functools import partial

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Float, Shaped

from ._derivative import without_derivative
from ._formats import Format, get_format
from ._qtensor import QTensor, expand_scale, validate

# No scale is below `tiny`, the smallest normal number: CPUs under XLA and TPUs flush smaller
# ones to zero, and x would be divided by zero.
_FLOAT32 = jnp.finfo(jnp.float32)

_NO_DERIVATIVE = (
    "quantize has no useful derivative: rounding is flat, so the gradient would be zero. "
    "Training through int8 products is not built yet; differentiate the model before it is "
    "quantized, or, if no gradient is wanted here, quantize jax.lax.stop_gradient(x)"
)


def quantize(
    x: Float[ArrayLike, "*shape"],
    format: str | Format = "int8",
    *,
    axis: int | tuple[int, ...] | None = None,
) -> QTensor:
    """Quantizes an array: `x ~ values * scale`, symmetric about zero.

    With everything in float32, and `amax` the maximum of `|x|` along `axis`::

        scale  = max(amax / format.max, 2**-126)   # 1 where amax == 0, NaN where it is not finite
        values = clip(round_half_even(x / scale), -format.max, format.max)

    The error `|x - values * scale|` is at most `scale / 2`, apart from float32 rounding (a
    few units in the last place of amax). Where amax is below `format.max * 2**-126`, that is
    2**-127; on hardware that flushes subnormals to zero, it is below 2**-126. A non-finite
    entry makes its whole scale NaN, so that every product with it stays visibly non-finite;
    so does a float64 entry beyond the range of float32.

    Args:
        x: An array of any shape and any floating dtype.
        format: The name of a format, or a `Format`.
        axis: The axes that share a scale, as in `jnp.max(axis=...)`. For a weight [K, N],
            `axis=0` gives one scale per output channel; for an activation [M, K], `axis=1`
            gives one per row; `None` gives one for the whole tensor.

    Returns:
        A `QTensor` with `x.shape` and logical dtype `x.dtype`; its scale is float32, with
        size 1 along `axis` and the size of `x` along the others.

    Raises:
        TypeError: If `x` is not floating.
        ValueError: If `format` is unknown, or `axis` is out of range or has duplicates.
        NotImplementedError: If it is differentiated with respect to `x`.

    References:
        Jacob et al., Quantization and Training of Neural Networks for Efficient
        Integer-Arithmetic-Only Inference, 2018, https://arxiv.org/abs/1712.05877
    """
    target = get_format(format)
    array = jnp.asarray(x)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(f"`x` must have a floating dtype to be quantized, got {array.dtype}")
    compute = partial(_quantize, target=target, axes=_canonical_axes(axis, array.ndim))
    values, scale = without_derivative(compute, _NO_DERIVATIVE)(array)
    return QTensor(values, scale, np.dtype(array.dtype))


def dequantize(q: QTensor, dtype: DTypeLike | None = None) -> Float[Array, "*shape"]:
    """Returns `values * scale`, computed in float32 and cast to `dtype`.

    Args:
        q: The tensor to dequantize.
        dtype: A floating dtype; `q.dtype`, the logical dtype, if None.

    Returns:
        An array of shape `q.shape`.

    Raises:
        TypeError: If `dtype` is not floating.
        TypeError, ValueError: If `q` breaks an invariant of `QTensor`.
    """
    validate(q)
    target = q.dtype if dtype is None else jnp.dtype(dtype)
    if not jnp.issubdtype(target, jnp.floating):
        raise TypeError(f"`dtype` must be floating to dequantize {q!r}, got {target}")
    return (q.values.astype(jnp.float32) * expand_scale(q)).astype(target)


def _quantize(
    x: Float[Array, "*shape"], target: Format, axes: tuple[int, ...]
) -> tuple[Shaped[Array, "*shape"], Float[Array, "*scales"]]:
    x = x.astype(jnp.float32)
    amax = jnp.max(jnp.abs(x), axis=axes, keepdims=True, initial=0.0)
    scale = _scale_of(amax, target)
    rounded = jnp.clip(jnp.round(x / scale), -target.max, target.max)
    # The cast of a NaN to an integer is not the same on every platform; the scale carries it.
    rounded = jnp.where(jnp.isfinite(scale), rounded, 0.0)
    return rounded.astype(target.dtype), scale


def _scale_of(amax: Float[Array, "*scales"], target: Format) -> Float[Array, "*scales"]:
    # Rounded up, the scale of the largest float32s would bring `max * scale` to infinity.
    largest = np.nextafter(np.float32(_FLOAT32.max / target.max), np.float32(0))
    scale = jnp.clip(amax / target.max, _FLOAT32.tiny, largest)
    scale = jnp.where(amax == 0, 1.0, scale)
    return jnp.where(jnp.isfinite(amax), scale, jnp.nan)


def _canonical_axes(axis: int | tuple[int, ...] | None, ndim: int) -> tuple[int, ...]:
    if axis is None:
        return tuple(range(ndim))
    axes = axis if isinstance(axis, tuple) else (axis,)
    if not all(-ndim <= a < ndim for a in axes):
        raise ValueError(f"`axis` is {axis}, but `x` has {ndim} axes")
    axes = tuple(a % ndim for a in axes)
    if len(set(axes)) != len(axes):
        raise ValueError(f"`axis` is {axis}, which names an axis of `x` twice")
    return axes
