"""How the numbers of a QTensor lie in memory, and what they are before the scale."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Shaped

from ._axes import canonical_axes
from ._derivative import without_derivative
from ._layout import layout_of, stored_axes
from ._qtensor import QTensor, in_order, validate

_NO_DERIVATIVE = (
    "the values of a QTensor have no derivative: they come from rounding, which is flat, and their "
    "dtype has no room for one. Differentiate the model before it is quantized, or with respect to "
    "other arguments"
)


def as_stored(q: QTensor) -> QTensor:
    """The tensor that `values` is without its layout: the axes in the order they are stored in."""
    if q.layout is None:
        return q
    axes = stored_axes(q.layout, q.ndim)
    zero_point = None if q.zero_point is None else jnp.transpose(q.zero_point, axes)
    scale = jnp.transpose(q.scale, axes)
    return replace(q, scale=scale, zero_point=zero_point, layout=None)


def contiguous(q: QTensor, axis: int | Sequence[int]) -> QTensor:
    """The same tensor with the entries along `axis` stored next to each other.

    A weight [K, N] is multiplied along K. On CPUs a product of few rows reads it up to seven
    times faster when it is stored as [N, K], as `contiguous(w, axis=0)` does, and GPUs want
    float8 weights that way. Every operation gives the same result for either. `jax.vmap` and
    `jax.lax.scan` may map over the axes that come before those moved, and over no others.

    Args:
        q: The tensor.
        axis: The axis to store last, or several, in their order.

    Returns:
        A QTensor that equals `q`, with another `layout`.

    Raises:
        ValueError: If an axis is out of range or named twice.
        TypeError, ValueError: If `q` breaks an invariant of `QTensor`.
    """
    validate(q)
    last = canonical_axes(axis, q.ndim, of="q")
    axes = (*(a for a in range(q.ndim) if a not in last), *last)
    values = jnp.transpose(in_order(q).values, axes)
    return replace(q, values=values, layout=layout_of(axes))


def decode(q: QTensor, dtype: DTypeLike) -> Float[Array, "*shape"]:
    """`values - zero_point`, without the scale, in a wider floating dtype; exact.

    A derivative is refused. `q` has no layout.
    """
    convert = partial(jnp.asarray, dtype=dtype)
    if not q.format.is_integer:  # integers cannot carry a derivative
        convert = without_derivative(convert, _NO_DERIVATIVE)
    if q.zero_point is None:
        return convert(q.values)
    return convert(q.values) - convert(spread(q.zero_point, q.shape))


def expand_scale(q: QTensor) -> Float[Array, "*scales"]:
    """The scale with every group spelled out: each axis has size 1 or that of the tensor."""
    return spread(q.scale, q.shape)


def spread(per_group: Shaped[Array, "*scales"], shape: tuple[int, ...]) -> Shaped[Array, "*wide"]:
    """Repeats along every axis that has neither size 1 nor the size in `shape`."""
    for axis, (size, groups) in enumerate(zip(shape, per_group.shape, strict=True)):
        if groups not in (1, size):
            per_group = jnp.repeat(per_group, size // groups, axis=axis)
    return per_group
