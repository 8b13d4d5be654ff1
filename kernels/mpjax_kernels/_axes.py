"""Axes as users name them, made canonical."""

import operator
from collections.abc import Sequence


def canonical_axes(
    axis: int | Sequence[int] | None, ndim: int, *, of: str = "x"
) -> tuple[int, ...]:
    """The axes of `of` as non-negative ints, in their order; None is all of them.

    Raises:
        ValueError: If one is out of range or named twice.
    """
    if axis is None:
        return tuple(range(ndim))
    axes = tuple(map(operator.index, axis if isinstance(axis, Sequence) else (axis,)))
    if not all(-ndim <= a < ndim for a in axes):
        raise ValueError(f"`axis` is {axis}, but `{of}` has {ndim} axes")
    axes = tuple(a % ndim for a in axes)
    if len(set(axes)) != len(axes):
        raise ValueError(f"`axis` is {axis}, which names an axis of `{of}` twice")
    return axes
