"""Basic indexing of a tensor together with a scale that is coarser than it."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def scale_index(index: tuple, shape: tuple[int, ...], scale_shape: tuple[int, ...]) -> tuple:
    """The index into a scale that goes with a full `index` into the values.

    Args:
        index: One int, slice or None per entry; the ints and slices cover every axis.
        shape: The shape of the values.
        scale_shape: The shape of the scale, of the same rank.

    Raises:
        NotImplementedError: If an axis with one scale per group is cut inside a group.
    """
    result, axis = [], 0
    for item in index:
        if item is None:
            result.append(None)
            continue
        size, scales = shape[axis], scale_shape[axis]
        if scales == size or _is_everything(item):
            result.append(item)
        elif scales == 1:  # one scale for the whole axis serves any part of it
            result.append(slice(None) if isinstance(item, slice) else 0)
        elif isinstance(item, slice):
            result.append(_slice_of_groups(item, axis, size, scales))
        else:
            result.append(item // (size // scales))  # right for negative ones too
        axis += 1
    return tuple(result)


def _slice_of_groups(item: slice, axis: int, size: int, scales: int) -> slice:
    group = size // scales
    start, stop, step = item.indices(size)
    stop = max(start, stop)
    if step != 1 or start % group or stop % group:
        raise NotImplementedError(
            f"axis {axis} of size {size} has {scales} scales, one per group of {group}: "
            f"a slice of it has step 1 and starts and stops at multiples of {group}, got {item}"
        )
    return slice(start // group, stop // group)


def full_index(index: Any, shape: tuple[int, ...]) -> tuple:
    """`index` as a tuple of ints, slices and None in which every axis appears.

    Raises:
        TypeError: If an entry is not an int, a slice, None or Ellipsis.
        IndexError: If there are too many entries, or an int is out of range.
    """
    index = index if isinstance(index, tuple) else (index,)
    for item in index:
        _check_basic(item)
    missing = len(shape) - sum(item is not None and item is not Ellipsis for item in index)
    ellipses = sum(item is Ellipsis for item in index)
    if missing < 0 or ellipses > 1:
        raise IndexError(f"index {index} has too many entries for shape {shape}")
    if not ellipses:
        index = (*index, Ellipsis)
    at = next(i for i, item in enumerate(index) if item is Ellipsis)
    index = index[:at] + (slice(None),) * missing + index[at + 1 :]
    for item, size in zip((i for i in index if i is not None), shape, strict=True):
        # JAX clamps an index that is out of range, so a loop over a tensor would never end.
        if isinstance(item, int | np.integer) and not -size <= item < size:
            raise IndexError(f"index {item} is out of range for an axis of size {size}")
    return index


def _check_basic(item: Any) -> None:
    if isinstance(item, jax.Array):
        basic = item.ndim == 0 and jnp.issubdtype(item.dtype, jnp.integer)
    else:
        basic = item is None or item is Ellipsis or isinstance(item, int | np.integer | slice)
    if isinstance(item, bool) or not basic:
        raise TypeError(
            f"a QTensor takes ints, slices, None and Ellipsis as an index, got {item!r}; "
            "for anything else, dequantize it first with mpjax_kernels.dequantize"
        )


def _is_everything(item: Any) -> bool:
    return isinstance(item, slice) and item == slice(None)
