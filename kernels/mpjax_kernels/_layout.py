"""The order in which the axes of a tensor are stored.

A layout is None, or the trailing axes of a tensor in the order in which they are stored, counted
from the end: under `(-1, -2)` a tensor of shape [..., K, N] is stored as [..., N, K]. Axes that it
does not name lead, as they are, so that `vmap` and `scan` can map over them.
"""

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
