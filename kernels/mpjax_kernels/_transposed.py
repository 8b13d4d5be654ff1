"""The products of a dot's derivative, as contractions.

The gradient `g` of `out = dot(lhs, rhs)` has the axes of `out`: batch, free of `lhs`, free of
`rhs`.
"""

from dataclasses import dataclass

from jaxtyping import Array, Float

from ._contraction import Contraction, contraction
from ._layout import positions


@dataclass(frozen=True)
class Transposed:
    """One product of the derivative, and the order that brings its result to its operand's axes."""

    contraction: Contraction
    order: tuple[int, ...]


def dlhs(c: Contraction) -> Transposed:
    """`dlhs = dot(g, rhs)`, over the free axes of `rhs`."""
    batch, _, free = _axes_of_result(c)
    product = contraction(c.result_shape, c.rhs_shape, ((free, c.rhs_free), (batch, c.rhs_batch)))
    # What is left of `rhs` are its contracting axes, ascending: as axes of `lhs`, their partners.
    partners = tuple(c.lhs_contract[c.rhs_contract.index(b)] for b in sorted(c.rhs_contract))
    return Transposed(product, positions(c.lhs_batch + c.lhs_free + partners))


def drhs(c: Contraction) -> Transposed:
    """`drhs = dot(lhs, g)`, over the free axes of `lhs`."""
    batch, free, _ = _axes_of_result(c)
    product = contraction(c.lhs_shape, c.result_shape, ((c.lhs_free, free), (c.lhs_batch, batch)))
    partners = tuple(c.rhs_contract[c.lhs_contract.index(a)] for a in sorted(c.lhs_contract))
    return Transposed(product, positions(c.rhs_batch + partners + c.rhs_free))


def onto_lhs(scale: Float[Array, "..."], c: Contraction) -> Float[Array, "..."]:
    """A scale of `rhs`, of size 1 along its free axes, laid out to multiply `lhs`."""
    scale = scale.transpose(c.rhs_batch + c.rhs_contract + c.rhs_free)
    return _place(scale, c.lhs_batch + c.lhs_contract, c.lhs_free)


def onto_rhs(scale: Float[Array, "..."], c: Contraction) -> Float[Array, "..."]:
    """A scale of `lhs`, of size 1 along its free axes, laid out to multiply `rhs`."""
    scale = scale.transpose(c.lhs_batch + c.lhs_contract + c.lhs_free)
    return _place(scale, c.rhs_batch + c.rhs_contract, c.rhs_free)


def _place(
    scale: Float[Array, "..."], axes: tuple[int, ...], others: tuple[int, ...]
) -> Float[Array, "..."]:
    kept = scale.reshape(scale.shape[: len(axes)] + (1,) * len(others))
    return kept.transpose(positions(axes + others))


def _axes_of_result(c: Contraction) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """The axes of the output that are batch, free of `lhs`, free of `rhs`."""
    batch, rows = len(c.lhs_batch), len(c.lhs_free)
    axes = tuple(range(len(c.result_shape)))
    return axes[:batch], axes[batch : batch + rows], axes[batch + rows :]
