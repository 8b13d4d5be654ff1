"""From an array to a QTensor and back: amax, scale, round, saturate."""

from functools import partial

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Float, Shaped

from ._derivative import without_derivative
from ._formats import Format, get_format
from ._granularity import Granularity, GroupSize, granularity
from ._qtensor import QTensor, decode, expand_scale, validate
from ._rounding import round_to

# No scale is below `tiny`, the smallest normal number: CPUs under XLA and TPUs flush smaller
# ones to zero, and x would be divided by zero.
_FLOAT32 = jnp.finfo(jnp.float32)

_NO_DERIVATIVE = (
    "quantize has no useful derivative: rounding is flat, so the gradient would be zero. "
    "Training through int8 products is not built yet, nor through those of other formats; "
    "differentiate the model before it is quantized, or, if no gradient is wanted here, quantize "
    "jax.lax.stop_gradient(x)"
)


def quantize(
    x: Float[ArrayLike, "*shape"],
    format: str | Format = "int8",
    *,
    axis: int | tuple[int, ...] | None = None,
    group_size: GroupSize = None,
    key: Array | None = None,
) -> QTensor:
    """Quantizes an array: `x ~ values * scale`, symmetric about zero.

    With everything in float32, and `amax` the maximum of `|x|` over the entries that share a
    scale::

        scale  = max(amax / format.max, 2**-126)   # 1 where amax == 0, NaN where it is not finite
        values = saturate(round(x / scale))

    The error `|x - values * scale|` is at most half the distance between the values next to
    `x / scale`, times the scale, apart from float32 rounding (three times 2**-24 of `|x|`) and
    from subnormals that hardware flushes to zero (2**-126): for an integer format `scale / 2`;
    for a floating one `|x| * epsilon / 2`, or `scale * smallest / 2` where that is more. With a
    `key` it is less than twice that, and zero on average. A non-finite entry makes its whole
    scale NaN, so that every product with it stays visibly non-finite; so does a float64 entry
    beyond the range of float32.

    Args:
        x: An array of any shape and any floating dtype.
        format: The name of a format, or a `Format`.
        axis: The axes that share a scale, as in `jnp.max(axis=...)`. For a weight [K, N],
            `axis=0` gives one scale per output channel; for an activation [M, K], `axis=1`
            gives one per row; `None` gives one for the whole tensor.
        group_size: How many neighbours along `axis` share a scale; None or -1 is all of them.
            With several axes, one size for each: `axis=(0, 1), group_size=(128, 128)` gives a
            scale per block of 128 x 128.
        key: A PRNG key (`jax.random.key`) rounds stochastically, with independent noise for every
            entry: on average `values * scale` is `x`. Give every tensor a key of its own. None
            rounds to nearest even.

    Returns:
        A `QTensor` with `x.shape` and logical dtype `x.dtype`; its scale is float32, with
        size 1 along `axis` and the size of `x` along the others.

    Raises:
        TypeError: If `x` is not floating.
        ValueError: If `format` is unknown, `axis` is out of range or has duplicates, or
            `group_size` does not divide the size of its axis.
        NotImplementedError: If it is differentiated with respect to `x`.

    References:
        Jacob et al., Quantization and Training of Neural Networks for Efficient
        Integer-Arithmetic-Only Inference, 2018, https://arxiv.org/abs/1712.05877
    """
    target = get_format(format)
    array = jnp.asarray(x)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(f"`x` must have a floating dtype to be quantized, got {array.dtype}")
    blocks = granularity(array.shape, axis, group_size)
    compute = partial(_quantize, target=target, blocks=blocks)
    values, scale = without_derivative(compute, _NO_DERIVATIVE)(array, key)
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
    return (decode(q, jnp.float32) * expand_scale(q)).astype(target)


def _quantize(
    x: Float[Array, "*shape"], key: Array | None, target: Format, blocks: Granularity
) -> tuple[Shaped[Array, "*shape"], Float[Array, "*scales"]]:
    split = x.astype(jnp.float32).reshape(blocks.split)
    amax = jnp.max(jnp.abs(split), axis=blocks.reduced, keepdims=True, initial=0.0)
    scale = scale_of(amax, target)
    # The cast of a NaN is not the same in every format and on every platform; the scale carries it.
    ratio = jnp.where(jnp.isfinite(scale), split / scale, 0.0)
    return round_to(ratio, target, key).reshape(x.shape), scale.reshape(blocks.scales)


def scale_of(amax: Float[Array, "*scales"], target: Format) -> Float[Array, "*scales"]:
    """The float32 scale of entries whose largest magnitude is `amax`."""
    # Rounded up, the scale of the largest float32s would bring `max * scale` to infinity.
    largest = np.nextafter(np.float32(_FLOAT32.max / target.max), np.float32(0))
    scale = jnp.clip(amax / target.max, _FLOAT32.tiny, largest)
    scale = jnp.where(amax == 0, 1.0, scale)
    return jnp.where(jnp.isfinite(amax), scale, jnp.nan)
