"""Derivatives of products that round: that of their linear part, or none and not zeros."""

from collections.abc import Callable

import jax
from jax.custom_derivatives import SymbolicZero

from ._qtensor import QTensor


def without_derivative(function: Callable, reason: str) -> Callable:
    """`function`, except that differentiating it raises `NotImplementedError(reason)`.

    Rounding is flat almost everywhere, so autodiff returns zeros for anything that passes
    through it, and a model would train without ever moving. Arguments that carry no tangent
    raise nothing: gradients with respect to other inputs still work.
    """
    guarded = jax.custom_jvp(function)

    def rule(primals: tuple, tangents: tuple):
        raise NotImplementedError(reason)

    guarded.defjvp(rule)
    return guarded


def linear_in_array(product: Callable, linear_product: Callable) -> Callable:
    """`product` of an array and a QTensor, whose derivative in the array is `linear_product`'s.

    That is the same product by an implementation that does not round the array. A derivative
    in the QTensor raises `NotImplementedError`.
    """
    guarded = jax.custom_jvp(product)

    def rule(primals: tuple, tangents: tuple):
        primals = tuple(primals)
        moving = []
        for primal, tangent in zip(primals, tangents, strict=True):
            parts = jax.tree.leaves(tangent, is_leaf=lambda t: isinstance(t, SymbolicZero))
            moves = not all(isinstance(part, SymbolicZero) for part in parts)
            if moves and isinstance(primal, QTensor):
                raise NotImplementedError(_NO_DERIVATIVE_OF_QTENSOR)
            moving.append(tangent if moves else primal)
        out = product(*primals)
        return out, linear_product(*moving)

    guarded.defjvp(rule, symbolic_zeros=True)
    return guarded


_NO_DERIVATIVE_OF_QTENSOR = (
    "the values of a QTensor have no derivative, nor has its scale: they come from rounding, which "
    "is flat. Differentiate the model before it is quantized, or with respect to other arguments"
)
