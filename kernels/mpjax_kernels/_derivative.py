"""Derivatives of products that round: that of their linear part, or none and not zeros."""

import functools
import operator
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


def linear_in_arrays(
    product: Callable, linear_product: Callable, differentiated: Callable | None = None
) -> Callable:
    """`product` of two operands, whose derivative in each array of them is `linear_product`'s.

    That is the same product by an implementation that does not round arrays. `differentiated`
    computes the product itself in a program that is differentiated, if another does. A derivative
    in a QTensor raises `NotImplementedError`.
    """
    guarded = jax.custom_jvp(product)

    def rule(primals: tuple, tangents: tuple):
        primals, terms = tuple(primals), []
        for i, (primal, tangent) in enumerate(zip(primals, tangents, strict=True)):
            parts = jax.tree.leaves(tangent, is_leaf=lambda t: isinstance(t, SymbolicZero))
            if all(isinstance(part, SymbolicZero) for part in parts):
                continue
            if isinstance(primal, QTensor):
                raise NotImplementedError(_NO_DERIVATIVE_OF_QTENSOR)
            terms.append(linear_product(*primals[:i], tangent, *primals[i + 1 :]))
        # Of the product itself there may be a derivative once more.
        return (differentiated or guarded)(*primals), functools.reduce(operator.add, terms)

    guarded.defjvp(rule, symbolic_zeros=True)
    return guarded


_NO_DERIVATIVE_OF_QTENSOR = (
    "the values of a QTensor have no derivative, nor has its scale: they come from rounding, which "
    "is flat. Differentiate the model before it is quantized, or with respect to other arguments"
)
