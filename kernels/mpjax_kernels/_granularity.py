"""Which entries of an array share a scale."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ._axes import canonical_axes, ints

GroupSize = int | Sequence[int] | None


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
    shape: tuple[int, ...], axis: int | Sequence[int] | None, group_size: GroupSize
) -> Granularity:
    """The granularity that the arguments of `quantize` ask for.

    Raises:
        TypeError: If an axis or a group size is no int.
        ValueError: If an axis is out of range or named twice, or a group size does not fit.
    """
    axes = canonical_axes(axis, len(shape))
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


def granularity_of(shape: tuple[int, ...], scales: tuple[int, ...]) -> Granularity:
    """The granularity that a scale of shape `scales` means.

    Raises:
        ValueError: If the ranks differ, or a size is not 1, that of `shape` or a divisor of it.
    """
    if len(shape) != len(scales) or not all(map(fits, shape, scales)):
        raise ValueError(
            f"`scale` has shape {scales}, but `x` has {shape}: it must have the same rank, and "
            "along each axis size 1, the size of `x` or a divisor of it"
        )
    split, reduced = [], []
    for size, groups in zip(shape, scales, strict=True):
        if groups == 1:  # not cut: XLA:CPU writes an array of more axes more slowly
            reduced.append(len(split))
            split.append(size)
            continue
        split.append(groups)
        if groups != size:
            reduced.append(len(split))
            split.append(size // groups)
    return Granularity(tuple(split), tuple(reduced), scales)


def fits(size: int, scales: int) -> bool:
    """Whether an axis of this size can have that many scales."""
    return scales in (1, size) or (scales > 0 and size % scales == 0)


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
    sizes = ints("group_size", group_size)
    if len(sizes) != len(axes):
        raise ValueError(
            f"`group_size` is {group_size} but `axis` has {len(axes)} axes {axes}: "
            "give one group size per axis, as in axis=(0, 1), group_size=(128, 128)"
        )
    return sizes
