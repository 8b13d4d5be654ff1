"""The operands of a contraction as stacks of matrices, moved in memory as little as possible."""

import math
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int8, Shaped

from ._contraction import Contraction
from ._cpu_memory import in_memory
from ._formats import Format
from ._qtensor import QTensor
from ._storage import spread


@dataclass(frozen=True)
class Matrices:
    """One operand: [batch, free, terms] if `terms_last`, else [batch, terms, free].

    Attributes:
        values: The numbers, as they are stored.
        terms_last: Whether the contracted axis is the last one.
        format: The format of the values; None for those of an array.
        scale: The scales, of the shape of the values but for the terms: one for each group of
            them. None for an array.
        zero_point: The zero points, of the shape of the scales, or None.
        group_scale: The scales as [batch, groups, free], whatever is last in the values: XLA makes
            no copy of those of a weight that is stored [N, K], which are [groups, N].
        group_zero_point: The zero points likewise, or no groups of them.
    """

    values: Shaped[Array, "batch _ _"]
    terms_last: bool
    format: Format | None = None
    scale: Shaped[Array, "batch _ _"] | None = None
    zero_point: Shaped[Array, "batch _ _"] | None = None
    group_scale: Float[Array, "batch groups free"] | None = None
    group_zero_point: Int8[Array, "batch groups free"] | None = None

    @property
    def batch(self) -> int:
        """How many matrices."""
        return self.values.shape[0]

    @property
    def free(self) -> int:
        """The size of the axis that is in the output."""
        return self.values.shape[1 if self.terms_last else 2]

    @property
    def terms(self) -> int:
        """The size of the contracted axis."""
        return self.values.shape[2 if self.terms_last else 1]


def matrices(
    lhs: Array | QTensor,
    rhs: Array | QTensor,
    contraction: Contraction,
    swapped: bool | None = None,
) -> tuple[Matrices, Matrices, bool]:
    """The left operand, the right one, and whether the left is `rhs`.

    If `swapped` is None, the left one is that with fewer free entries. The other, a weight as a
    rule, stays as it is stored if its contracting axes, in any order, are its last ones or come
    right before or after the free ones.
    """
    c = contraction
    swapped = c.columns < c.rows if swapped is None else swapped
    many_contract = c.lhs_contract if swapped else c.rhs_contract
    order = sorted(range(len(many_contract)), key=many_contract.__getitem__)
    left = _matrices(lhs, c.lhs_batch, c.lhs_free, tuple(c.lhs_contract[i] for i in order))
    right = _matrices(rhs, c.rhs_batch, c.rhs_free, tuple(c.rhs_contract[i] for i in order))
    return (right, left, True) if swapped else (left, right, False)


def rows_first(x: Matrices) -> Shaped[Array, "batch free terms"]:
    """The values with the contracted axis last in memory.

    XLA folds the transpose of an operand into the dot, and an optimization barrier does not keep
    it from that; but its fast kernels want the terms of the left operand next to each other. For
    8-bit integers that is ten times faster. A constraint of its layout keeps the transpose.
    """
    if x.terms_last:
        return x.values
    return in_memory(jnp.swapaxes(x.values, 1, 2))


def _matrices(
    x: Array | QTensor, batch: tuple[int, ...], free: tuple[int, ...], contract: tuple[int, ...]
) -> Matrices:
    last, first = batch + free + contract, batch + contract + free
    terms_last = last == tuple(range(x.ndim)) or first != tuple(range(x.ndim))
    axes = last if terms_last else first
    cut = len(batch), len(batch) + len(free if terms_last else contract)

    def stack(y: Any, axes: tuple[int, ...], cut: tuple[int, int]) -> Array:
        y = jnp.transpose(y, axes)
        parts = y.shape[: cut[0]], y.shape[cut[0] : cut[1]], y.shape[cut[1] :]
        return y.reshape([math.prod(part) for part in parts])

    if not isinstance(x, QTensor):
        return Matrices(stack(x, axes, cut), terms_last)

    def widened(y: Array) -> Array:
        shape = tuple(y.shape[a] if a in contract else size for a, size in enumerate(x.shape))
        return jnp.broadcast_to(spread(y, shape), shape)

    by_group = first, (len(batch), len(batch) + len(contract))
    scale = widened(x.scale)
    values, stacked, of_groups = (
        stack(x.values, axes, cut),
        stack(scale, axes, cut),
        stack(scale, *by_group),
    )
    if x.zero_point is None:
        none = jnp.zeros((of_groups.shape[0], 0, of_groups.shape[2]), jnp.int8)
        return Matrices(values, terms_last, x.format, stacked, None, of_groups, none)
    zero = widened(x.zero_point)
    zeros = stack(zero, axes, cut), stack(zero, *by_group)
    return Matrices(values, terms_last, x.format, stacked, zeros[0], of_groups, zeros[1])
