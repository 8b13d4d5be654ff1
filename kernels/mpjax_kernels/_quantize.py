"""From an array to a QTensor and back: amax, scale, round, saturate."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Float, Int8, Shaped

from . import _float8_bits, _native_quantize
from ._cpu_memory import once
from ._derivative import without_derivative
from ._formats import Format, FormatLike, get_format
from ._granularity import Granularity, GroupSize, granularity, granularity_of
from ._largest import largest, zero_or_nan
from ._qtensor import QTensor, describe, in_order, validate
from ._rounding import round_to
from ._storage import decode, expand_scale

# No scale is below `tiny`, the smallest normal number: CPUs under XLA and TPUs flush smaller
# ones to zero, and x would be divided by zero.
_FLOAT32 = jnp.finfo(jnp.float32)

_NO_DERIVATIVE = (
    "quantize has no useful derivative: rounding is flat, so the gradient would be zero. "
    "To train through quantized products use mpjax_kernels.quantized_dot_general, or a policy of "
    "mpjax; differentiate the model before it is quantized, or, if no gradient is wanted here, "
    "quantize jax.lax.stop_gradient(x)"
)


def quantize(
    x: Float[ArrayLike, "*shape"],
    format: FormatLike = "int8",
    *,
    axis: int | tuple[int, ...] | None = None,
    group_size: GroupSize = None,
    scale: Float[ArrayLike, "*scales"] | None = None,
    symmetric: bool = True,
    key: Array | None = None,
) -> QTensor:
    """Quantizes an array: `x ~ values * scale`, or `x ~ (values - zero_point) * scale`.

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

    With `symmetric=False`, and `low <= 0 <= high` the range of the entries and of zero::

        scale      = max((high - low) / (2**bits - 1), 2**-126)
        zero_point = saturate(round(-2**(bits - 1) - low / scale))
        values     = saturate(round(x / scale + zero_point))

    The error is at most `scale / 2` again (`scale`, where entries and zero span nearly the range of
    float32), and zeros stay exact zeros.

    Args:
        x: An array of any shape and any floating dtype.
        format: The name of a format, a `Format`, or its storage dtype.
        axis: The axes that share a scale, as in `jnp.max(axis=...)`. For a weight [K, N],
            `axis=0` gives one scale per output channel; for an activation [M, K], `axis=1`
            gives one per row; `None` gives one for the whole tensor.
        group_size: How many neighbours along `axis` share a scale; None or -1 is all of them.
            With several axes, one size for each: `axis=(0, 1), group_size=(128, 128)` gives a
            scale per block of 128 x 128.
        scale: A scale known before (static or delayed), in place of the one from the amax:
            positive float32, of the rank of `x` with size 1, the size of `x` or a divisor of it
            along each axis, or a scalar for the whole tensor. What lies beyond `format.max *
            scale` saturates. A 0 stands for a scale that is not known yet: that from the amax.
            `axis` and `group_size` are read off its shape.
        symmetric: Whether zero is the value 0. If False, a zero point lets entries that are not
            balanced about zero use the whole range of an integer format.
        key: A PRNG key (`jax.random.key`) rounds stochastically, with independent noise for every
            entry: on average `values * scale` is `x`. Give every tensor a key of its own. None
            rounds to nearest even.

    Returns:
        A `QTensor` with `x.shape` and logical dtype `x.dtype`; its scale is float32, with size 1
        (or one entry per group) along `axis` and the size of `x` along the others.

    Raises:
        TypeError: If `x` or `scale` is not floating.
        ValueError: If `format` is unknown, `axis` is out of range or has duplicates,
            `group_size` does not divide the size of its axis, the shape of `scale` does not fit
            or it comes with `axis`, `group_size` or `symmetric=False`, or the format has no zero
            point.
        NotImplementedError: If it is differentiated with respect to `x`.

    References:
        Jacob et al., Quantization and Training of Neural Networks for Efficient
        Integer-Arithmetic-Only Inference, 2018, https://arxiv.org/abs/1712.05877
    """
    target = get_format(format)
    array = jnp.asarray(x)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(f"`x` must have a floating dtype to be quantized, got {array.dtype}")
    if not symmetric and not target.is_integer:
        raise ValueError(
            f"`symmetric=False` needs an integer format: {target.name} has no zero point"
        )
    if scale is None:
        blocks = granularity(array.shape, axis, group_size)
        compute = _quantize if symmetric else _quantize_asymmetric
        if symmetric and _native_quantize.takes(array, blocks.scales, target, key):
            compute = _native_or_quantize
        compute = partial(compute, target=target, blocks=blocks)
        parts = without_derivative(compute, _NO_DERIVATIVE)(array, key)
    else:
        if axis is not None or group_size is not None or not symmetric:
            raise ValueError(
                "`scale` says by its shape which entries share one: "
                "give neither `axis` nor `group_size` nor `symmetric=False` beside it"
            )
        return quantize_by(array, target, known_scale(scale, array.shape), key)[0]
    values, found, *zero_point = parts
    return QTensor(values, found, np.dtype(array.dtype), *zero_point)


def quantize_by(
    x: Float[Array, "*shape"],
    format: Format,
    scale: Float[Array, "*scales"],
    key: Array | None = None,
    over: Callable[[Array, Array], Array] | None = None,
) -> tuple[QTensor, Float[Array, "*scales"]]:
    """Quantizes by a scale from `known_scale`, of which an entry of 0 is not known yet.

    `over(amax, scale)` makes of the amaxes of `x` those of all that shares the scale; None: only
    `x` does. Returns the amaxes of `x` too.
    """
    compute = partial(_quantize_by, target=format, over=over)
    is_alone = over is None or not jax.sharding.get_abstract_mesh().manual_axes
    if is_alone and _native_quantize.takes(x, scale.shape, format, key):
        compute = partial(_native_or_quantize_by, target=format, over=over)
    values, found, amax = without_derivative(compute, _NO_DERIVATIVE)(x, scale, key)
    return QTensor(values, found, np.dtype(x.dtype)), amax


def known_scale(
    scale: Float[ArrayLike, "*scales"], shape: tuple[int, ...]
) -> Float[Array, "*scales"]:
    """A scale that a user gives for an array of this shape, as float32 of its rank.

    Raises:
        TypeError: If it is not floating.
        ValueError: If its shape does not fit.
    """
    array = jnp.asarray(scale)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(f"`scale` must be floating, got {describe(array)}")
    if array.ndim == 0:
        array = array.reshape((1,) * len(shape))
    granularity_of(shape, array.shape)
    return array.astype(jnp.float32)


def dequantize(q: QTensor, dtype: DTypeLike | None = None) -> Float[Array, "*shape"]:
    """Returns `(values - zero_point) * scale`, computed in float32 and cast to `dtype`.

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
    q = in_order(q)
    return (decode(q, jnp.float32) * expand_scale(q)).astype(target)


def _quantize(
    x: Float[Array, "*shape"], key: Array | None, target: Format, blocks: Granularity
) -> tuple[Shaped[Array, "*shape"], Float[Array, "*scales"]]:
    split = x.astype(jnp.float32).reshape(blocks.split)
    amax = largest(split, blocks.reduced, keepdims=True)
    scale = scale_of(amax, target)
    # The cast of a NaN is not the same in every format and on every platform; the scale carries it.
    ratio = jnp.where(jnp.isfinite(scale), split / scale, 0.0)
    values = round_to(ratio, target, key, cast=_float8_bits.cast)
    return values.reshape(x.shape), scale.reshape(blocks.scales)


@dataclass(frozen=True)
class _Quantize:
    """`_quantize` without a key: hashable."""

    target: Format
    blocks: Granularity

    def __call__(self, x: Float[Array, "*shape"]) -> tuple[Array, Array]:
        return _quantize(x, None, self.target, self.blocks)


def _native_or_quantize(
    x: Float[Array, "*shape"], key: None, target: Format, blocks: Granularity
) -> tuple[Shaped[Array, "*shape"], Float[Array, "*scales"]]:
    del key
    otherwise = _Quantize(target, blocks)
    return _native_quantize.dynamic_or(otherwise, x, blocks.scales, target)


def _quantize_by(
    x: Float[Array, "*shape"],
    scale: Float[Array, "*scales"],
    key: Array | None,
    target: Format,
    over: Callable[[Array, Array], Array] | None,
) -> _native_quantize.Parts:
    blocks = granularity_of(x.shape, scale.shape)
    split = x.astype(jnp.float32).reshape(blocks.split)
    amax = largest(split, blocks.reduced).reshape(scale.shape)
    shared = amax if over is None else over(amax, scale)
    known = jnp.where(scale == 0, _finite_scale(shared, target), jnp.maximum(scale, _FLOAT32.tiny))
    known = once(jnp.where((scale >= 0) & jnp.isfinite(shared), known, jnp.nan))
    kept = known.reshape([1 if a in blocks.reduced else n for a, n in enumerate(blocks.split)])
    ratio = jnp.where(jnp.isfinite(kept), split / kept, 0.0)
    values = round_to(ratio, target, key, cast=_float8_bits.cast)
    return values.reshape(x.shape), known, amax


@dataclass(frozen=True)
class _QuantizeBy:
    """`_quantize_by` without a key: hashable."""

    target: Format
    over: Callable[[Array, Array], Array] | None

    def __call__(
        self, x: Float[Array, "*shape"], scale: Float[Array, "*scales"]
    ) -> _native_quantize.Parts:
        return _quantize_by(x, scale, None, self.target, self.over)


def _native_or_quantize_by(
    x: Float[Array, "*shape"],
    scale: Float[Array, "*scales"],
    key: None,
    target: Format,
    over: Callable[[Array, Array], Array] | None,
) -> _native_quantize.Parts:
    del key
    otherwise = _QuantizeBy(target, over)
    return _native_quantize.quantize_or(otherwise, x, scale, target, is_shared=over is not None)


def _quantize_asymmetric(
    x: Float[Array, "*shape"], key: Array | None, target: Format, blocks: Granularity
) -> tuple[Shaped[Array, "*shape"], Float[Array, "*scales"], Int8[Array, "*scales"]]:
    split = x.astype(jnp.float32).reshape(blocks.split)
    high = jnp.max(split, axis=blocks.reduced, keepdims=True, initial=0.0)
    low = jnp.min(split, axis=blocks.reduced, keepdims=True, initial=0.0)
    # Two quotients, because the difference of the largest float32s is infinite; and rounded down
    # where a value times the scale could be.
    levels = 2.0**target.bits - 1
    scale = high / levels - low / levels
    scale = jnp.where(jnp.isinf(scale * levels), jnp.nextafter(scale, 0.0), scale)
    scale = jnp.maximum(scale, _FLOAT32.tiny)
    scale = jnp.where(high == low, 1.0, scale)
    scale += zero_or_nan(split, blocks.reduced, keepdims=True)
    finite = jnp.isfinite(scale)
    zero_point = jnp.where(finite, target.lowest - low / scale, 0.0)
    zero_point = jnp.clip(jnp.round(zero_point), target.lowest, target.max)
    # So many scales are finite; with fewer than 255 a number is off by a scale, not by half of one.
    most = jnp.floor(_FLOAT32.max / scale)
    ratio = jnp.where(finite, jnp.clip(split / scale, -most, most) + zero_point, 0.0)
    values = round_to(ratio, target, key, lowest=target.lowest).reshape(x.shape)
    return (
        values,
        scale.reshape(blocks.scales),
        zero_point.astype(jnp.int8).reshape(blocks.scales),
    )


def scale_of(amax: Float[Array, "*scales"], target: Format) -> Float[Array, "*scales"]:
    """The float32 scale of entries whose largest magnitude is `amax`; NaN if that is not finite."""
    return jnp.where(jnp.isfinite(amax), _finite_scale(amax, target), jnp.nan)


def _finite_scale(amax: Float[Array, "*scales"], target: Format) -> Float[Array, "*scales"]:
    # Rounded up, the scale of the largest float32s would bring `max * scale` to infinity.
    largest = np.nextafter(np.float32(_FLOAT32.max / target.max), np.float32(0))
    scale = jnp.clip(amax / target.max, _FLOAT32.tiny, largest)
    return jnp.where(amax == 0, 1.0, scale)
