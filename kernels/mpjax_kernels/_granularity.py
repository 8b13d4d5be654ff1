"""Which entries of an array share a scale."""

import math
from dataclasses import dataclass

GroupSize = int | tuple[int, ...] | None


@dataclass(frozen=True)
class Granularity:
    """How an array is cut into blocks that have a scale each.

    Attributes:
        split: The shape of the array with every grouped axis as two: groups, entries of a group.
        reduced: The axes of `split` that share a scale.
        scales: The shape of the scale, of the rank of the array.
    """

    split: tuple[int, ...]
    reduced: tuple[int, ...]
    scales: tuple[int, ...]


def granularity(
    shape: tuple[int, ...], axis: int | tuple[int, ...] | None, group_size: GroupSize
) -> Granularity:
    """The granularity that the arguments of `quantize` ask for.

    Raises:
        ValueError: If an axis is out of range or named twice, or a group size does not fit.
    """
    axes = _canonical_axes(axis, len(shape))
    groups = dict(zip(axes, _group_sizes(axes, group_size), strict=True))
    split, reduced, scales = [], [], []
    for a, size in enumerate(shape):
        group = groups.get(a)
        if group is None:
            split.append(size)
            scales.append(size)
            continue
        if group == -1:
            scales.append(1)
        else:
            _check_divides(group, size, a)
            split.append(size // group)
            scales.append(size // group)
        reduced.append(len(split))
        split.append(size if group == -1 else group)
    return Granularity(tuple(split), tuple(reduced), tuple(scales))


def _check_divides(group: int, size: int, axis: int) -> None:
    if group < 1:
        raise ValueError(f"`group_size` {group} of axis {axis} is neither positive nor -1")
    if size % group:
        raise ValueError(
            f"`group_size` {group} does not divide axis {axis} of size {size}: "
            f"pad the axis to {math.ceil(size / group) * group} or choose a divisor"
        )


def _group_sizes(axes: tuple[int, ...], group_size: GroupSize) -> tuple[int, ...]:
    if group_size is None:
        return (-1,) * len(axes)
    sizes = group_size if isinstance(group_size, tuple) else (group_size,)
    if len(sizes) != len(axes):
        raise ValueError(
            f"`group_size` is {group_size} but `axis` has {len(axes)} axes {axes}: "
            "give one group size per axis, as in axis=(0, 1), group_size=(128, 128)"
        )
    return sizes


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
