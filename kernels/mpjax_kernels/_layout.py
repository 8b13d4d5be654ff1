"""The order in which the axes of a tensor are stored.

A layout is None, or the trailing axes of a tensor in the order in which they are stored, counted
from the end: under `(-1, -2)` a tensor of shape [..., K, N] is stored as [..., N, K]. Axes that it
does not name lead, as they are, so that `vmap` and `scan` can map over them.

What is stored by a layout may be cut into tiles: under `(-1, -2)` and `((-1, 16), (-2, 4))` it is
stored as [..., N / 16, K / 4, 16, 4].
"""

import jax.numpy as jnp
from jaxtyping import Array, Shaped

Layout = tuple[int, ...] | None


def stored_axes(layout: Layout, ndim: int) -> tuple[int, ...]:
    """The axes of the tensor (non-negative) in the order in which they are stored."""
    layout = layout or ()
    return (*range(ndim - len(layout)), *(ndim + a for a in layout))


def positions(axes: tuple[int, ...]) -> tuple[int, ...]:
    """Where each axis is in `axes`: the inverse of a permutation."""
    return tuple(axes.index(a) for a in range(len(axes)))


def layout_of(axes: tuple[int, ...]) -> Layout:
    """The layout under which a tensor is stored in the order `axes` (non-negative)."""
    lead = 0
    while lead < len(axes) and axes[lead] == lead:
        lead += 1
    return tuple(a - len(axes) for a in axes[lead:]) or None


def is_layout(layout: Layout, ndim: int) -> bool:
    """Whether `layout` is one for a tensor of `ndim` axes."""
    if layout is None:
        return True
    return len(layout) <= ndim and sorted(layout) == list(range(-len(layout), 0))


# Axes, counted from the end, and the size of the tiles that each is cut into.
Tiles = tuple[tuple[int, int], ...]


def is_tiles(tiles: Tiles, layout: Layout) -> bool:
    """Whether `tiles` cuts axes that the layout names, each once."""
    axes = [axis for axis, _ in tiles]
    named = set(layout or ())
    return len(set(axes)) == len(axes) and named >= set(axes) and all(n > 0 for _, n in tiles)


def whole_shape(stored: tuple[int, ...], layout: Layout, tiles: Tiles) -> tuple[int, ...]:
    """The shape of a tensor whose values are stored in a shape."""
    ndim = len(stored) - len(tiles)
    shape = [stored[place] for place in positions(stored_axes(layout, ndim))]
    for axis, size in tiles:
        shape[axis] *= size
    return tuple(shape)


def cut(values: Shaped[Array, "..."], layout: Layout, tiles: Tiles) -> Shaped[Array, "..."]:
    """Values stored by a layout, cut into tiles, whose entries come last, in their order."""
    sizes, order = _halves(values.shape, layout, tiles)
    return jnp.transpose(values.reshape(sizes), order)


def joined(values: Shaped[Array, "..."], layout: Layout, tiles: Tiles) -> Shaped[Array, "..."]:
    """The inverse of `cut`."""
    if not tiles:
        return values
    shape = whole_shape(values.shape, layout, tiles)
    stored = tuple(shape[axis] for axis in stored_axes(layout, len(shape)))
    _, order = _halves(stored, layout, tiles)
    return jnp.transpose(values, positions(tuple(order))).reshape(stored)


def _halves(stored: tuple[int, ...], layout: Layout, tiles: Tiles) -> tuple[list[int], list[int]]:
    """A shape with two axes for each that is cut, and the order that brings the second last."""
    ndim, size_of = len(stored), dict(tiles)
    sizes, first, second = [], [], {}
    for size, axis in zip(stored, stored_axes(layout, ndim), strict=True):
        first.append(len(sizes))
        tile = size_of.get(axis - ndim)
        sizes += [size] if tile is None else [size // tile, tile]
        second[axis - ndim] = len(sizes) - 1
    return sizes, first + [second[axis] for axis, _ in tiles]
