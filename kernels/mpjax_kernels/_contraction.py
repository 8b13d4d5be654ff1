"""The axes of a dot product, sorted by the part they play."""

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass

from ._layout import positions

# ((lhs contracting, rhs contracting), (lhs batch, rhs batch)), as jax.lax.dot_general has it.
DimensionNumbers = tuple[
    tuple[Sequence[int], Sequence[int]],
    tuple[Sequence[int], Sequence[int]],
]


@dataclass(frozen=True)
class Contraction:
    """Which axes of two operands are contracted, batched or kept.

    The output has the batch axes first, then the free axes of the left operand, then those of
    the right operand. All axes are non-negative.
    """

    lhs_shape: tuple[int, ...]
    rhs_shape: tuple[int, ...]
    lhs_contract: tuple[int, ...]
    rhs_contract: tuple[int, ...]
    lhs_batch: tuple[int, ...]
    rhs_batch: tuple[int, ...]

    def reordered(self, lhs_axes: tuple[int, ...], rhs_axes: tuple[int, ...]) -> "Contraction":
        """The same contraction of operands whose axes are put in the orders given."""
        left, right = positions(lhs_axes), positions(rhs_axes)
        return Contraction(
            tuple(self.lhs_shape[a] for a in lhs_axes),
            tuple(self.rhs_shape[a] for a in rhs_axes),
            tuple(left[a] for a in self.lhs_contract),
            tuple(right[a] for a in self.rhs_contract),
            tuple(left[a] for a in self.lhs_batch),
            tuple(right[a] for a in self.rhs_batch),
        )

    @property
    def dimension_numbers(self) -> DimensionNumbers:
        """The form that `jax.lax.dot_general` takes."""
        return (self.lhs_contract, self.rhs_contract), (self.lhs_batch, self.rhs_batch)

    @property
    def lhs_free(self) -> tuple[int, ...]:
        """The axes of the left operand that are in the output alone."""
        return _others(len(self.lhs_shape), self.lhs_contract + self.lhs_batch)

    @property
    def rhs_free(self) -> tuple[int, ...]:
        """The axes of the right operand that are in the output alone."""
        return _others(len(self.rhs_shape), self.rhs_contract + self.rhs_batch)

    @property
    def result_shape(self) -> tuple[int, ...]:
        """The shape of the output."""
        return (
            *(self.lhs_shape[a] for a in self.lhs_batch + self.lhs_free),
            *(self.rhs_shape[a] for a in self.rhs_free),
        )

    @property
    def rows(self) -> int:
        """M of the matrix product: the size of the left free axes together."""
        return math.prod(self.lhs_shape[a] for a in self.lhs_free)

    @property
    def columns(self) -> int:
        """N of the matrix product: the size of the right free axes together."""
        return math.prod(self.rhs_shape[a] for a in self.rhs_free)

    @property
    def terms(self) -> int:
        """K of the matrix product: how many products are summed."""
        return math.prod(self.lhs_shape[a] for a in self.lhs_contract)


def contraction(
    lhs_shape: tuple[int, ...], rhs_shape: tuple[int, ...], dimension_numbers: DimensionNumbers
) -> Contraction:
    """Makes a `Contraction`, checking that the two shapes go together.

    Raises:
        ValueError: If `dimension_numbers` is built otherwise, an axis is out of range or
            named twice, or two sizes differ.
    """
    lhs_contract, rhs_contract, lhs_batch, rhs_batch = _four(dimension_numbers)
    left = _axes("lhs", lhs_shape, (*lhs_batch, *lhs_contract))
    right = _axes("rhs", rhs_shape, (*rhs_batch, *rhs_contract))
    batch = len(lhs_batch)
    if len(rhs_batch) != batch or len(left) != len(right):
        raise ValueError(
            f"`dimension_numbers` {dimension_numbers} pairs a different number of axes of "
            "`lhs` and `rhs`"
        )
    for i, (a, b) in enumerate(zip(left, right, strict=True)):
        if lhs_shape[a] != rhs_shape[b]:
            verb = "batching" if i < batch else "contracting"
            raise ValueError(
                f"`lhs` has shape {lhs_shape} but `rhs` has {rhs_shape}: "
                f"{verb} {lhs_shape[a]} with {rhs_shape[b]}"
            )
    return Contraction(
        lhs_shape, rhs_shape, left[batch:], right[batch:], left[:batch], right[:batch]
    )


def _four(dimension_numbers: DimensionNumbers) -> list[tuple[int, ...]]:
    """The contracted axes of both operands, then their batch axes."""
    try:
        (lhs_contract, rhs_contract), (lhs_batch, rhs_batch) = dimension_numbers
        parts = lhs_contract, rhs_contract, lhs_batch, rhs_batch
        return [tuple(map(operator.index, axes)) for axes in parts]
    except (TypeError, ValueError):
        raise ValueError(
            f"`dimension_numbers` is {dimension_numbers}: it must be ((lhs_contracting, "
            "rhs_contracting), (lhs_batch, rhs_batch)), each a sequence of ints, as in "
            "(((1,), (0,)), ((), ())) for a matrix product"
        ) from None


def _axes(name: str, shape: tuple[int, ...], axes: tuple[int, ...]) -> tuple[int, ...]:
    ndim = len(shape)
    if not all(-ndim <= a < ndim for a in axes):
        raise ValueError(f"`dimension_numbers` asks for axes {axes} of `{name}` of shape {shape}")
    result = tuple(a % ndim for a in axes)
    if len(set(result)) != len(result):
        raise ValueError(f"`dimension_numbers` names an axis of `{name}` twice: {result}")
    return result


def _others(ndim: int, axes: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(a for a in range(ndim) if a not in axes)
