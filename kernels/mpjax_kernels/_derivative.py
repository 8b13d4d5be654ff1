"""Refusing a derivative that would silently be zero."""

from collections.abc import Callable

import jax


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
