"""How the numbers of a QTensor lie in memory, and what they are before the scale."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Shaped

from ._axes import canonical_axes
from ._derivative import without_derivative
from ._layout import cut, joined, layout_of, stored_axes
from ._native_library import INT8, TILE, tiles_refusal
from ._qtensor import QTensor, in_order, validate

_NO_DERIVATIVE = (
    "the values of a QTensor have no derivative: they come from rounding, which is flat, and their "
    "dtype has no room for one. Differentiate the model before it is quantized, or with respect to "
    "other arguments"
)


def as_stored(q: QTensor, *, in_tiles: bool = False) -> QTensor:
    """The tensor that `values` is without its layout: the axes in the order they are stored in.

    Args:
        q: The tensor.
        in_tiles: Whether tiles may stay, and then with a layout that is the order of the axes.
    """
    if q.layout is None:
        return q
    axes = stored_axes(q.layout, q.ndim)
    zero_point = None if q.zero_point is None else jnp.transpose(q.zero_point, axes)
    scale = jnp.transpose(q.scale, axes)
    if not (q.tiles and in_tiles):
        values = joined(q.values, q.layout, q.tiles)
        return replace(q, values=values, scale=scale, zero_point=zero_point, layout=None, tiles=())
    place = {axis: i - q.ndim for i, axis in enumerate(axes)}
    tiles = tuple((place[q.ndim + axis], size) for axis, size in q.tiles)
    layout = tuple(range(-len(q.layout), 0))
    return replace(q, scale=scale, zero_point=zero_point, layout=layout, tiles=tiles)


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
    return replace(q, values=values, layout=layout_of(axes), tiles=())


def prepacked(q: QTensor, axis: int | Sequence[int]) -> QTensor:
    """The same tensor, stored as the native kernels of this CPU read a weight along `axis`.

    An int8 weight with scales constant along `axis` is stored in the tiles that its products by
    int8 are made of (tiles of 16 outputs by 4 inputs, on CPUs with AVX512-VNNI), where 16 and 4
    divide its last axes: it is then never packed again. Any other is `contiguous(q, axis)`. Every
    operation gives the same result for either. One that does not read tiles, as on another
    machine, puts them in order at every call: where a weight is not multiplied by int8 take
    `contiguous`.

    Args:
        q: The tensor.
        axis: The axis that is contracted, or several, in their order.

    Returns:
        A QTensor that equals `q`, with another `layout`, and perhaps `tiles`.

    Raises:
        ValueError: If an axis is out of range or named twice.
        TypeError, ValueError: If `q` breaks an invariant of `QTensor`.
    """
    q = contiguous(q, axis)
    last = canonical_axes(axis, q.ndim, of="q")
    if _refusal(q, last) is not None:
        return q
    free = [a for a in range(q.ndim) if a not in last]
    axes = (*free, *last)
    start = min(q.ndim - len(q.layout or ()), axes.index(free[-1]))
    layout = tuple(a - q.ndim for a in axes[start:])
    sizes = zip((free[-1], last[-1]), TILE, strict=True)
    tiles = tuple((a - q.ndim, size) for a, size in sizes)
    return replace(q, values=cut(q.values, layout, tiles), layout=layout, tiles=tiles)


def prepacked_refusal(q: QTensor, axis: int | Sequence[int]) -> str | None:
    """Why `prepacked(q, axis)` has no tiles on this machine; None if it has.

    Args:
        q: The tensor.
        axis: The axis that is contracted, or several, in their order.

    Raises:
        ValueError: If an axis is out of range or named twice.
        TypeError, ValueError: If `q` breaks an invariant of `QTensor`.
    """
    validate(q)
    return _refusal(q, canonical_axes(axis, q.ndim, of="q"))


def _refusal(q: QTensor, last: Sequence[int]) -> str | None:
    free = [a for a in range(q.ndim) if a not in last]
    if tiles_refusal() is not None:
        return tiles_refusal()
    if q.format.name not in INT8:
        return f"tiles are of int8, and it is {q.format.name}"
    if not free or not last or q.size == 0:
        return f"of shape {q.shape}, contracted along {tuple(last)}, it is no matrix"
    if q.zero_point is not None or any(q.scale.shape[a] != 1 for a in last):
        return f"it has zero points, or scales that vary along {tuple(last)}"
    for axis, size in zip((free[-1], last[-1]), TILE, strict=True):
        if q.shape[axis] % size:
            return f"axis {axis} has {q.shape[axis]} entries, no multiple of {size}"
    return None


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
