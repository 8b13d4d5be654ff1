"""Axes as users name them, made canonical."""

import operator
from collections.abc import Sequence
from typing import Any

import numpy as np


def canonical_axes(
    axis: int | Sequence[int] | None, ndim: int, *, of: str = "x"
) -> tuple[int, ...]:
    """The axes of `of` as non-negative ints, in their order; None is all of them.

    Raises:
        TypeError: If one is no int.
        ValueError: If one is out of range or named twice.
    """
    if axis is None:
        return tuple(range(ndim))
    axes = ints("axis", axis)
    if not all(-ndim <= a < ndim for a in axes):
        raise ValueError(f"`axis` is {axis}, but `{of}` has {ndim} axes")
    axes = tuple(a % ndim for a in axes)
    if len(set(axes)) != len(axes):
        raise ValueError(f"`axis` is {axis}, which names an axis of `{of}` twice")
    return axes


def ints(name: str, value: Any) -> tuple[int, ...]:
    """The argument `name`, an int or a sequence of ints, as a tuple.

    Raises:
        TypeError: If it is neither.
    """
    items = value.tolist() if isinstance(value, np.ndarray) else value
    if not isinstance(items, Sequence) or isinstance(items, str):
        items = (items,)
    try:
        if any(isinstance(item, bool) for item in items):
            raise TypeError
        return tuple(map(operator.index, items))
    except TypeError:
        raise TypeError(f"`{name}` must be an int or a sequence of ints, got {value!r}") from None
