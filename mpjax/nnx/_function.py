"""A wrapped NNX model as a pure function of its weights."""

from collections.abc import Callable
from typing import Any

from flax import nnx


def as_function(model: nnx.Module, *args: Any) -> tuple[Callable[..., Any], Any, tuple[Any, ...]]:
    """`(function, weights, args)` such that `function(weights, *args)` is the model's output."""
    function, state = method_as_function(model, "__call__")
    return function, state, args


def method_as_function(model: nnx.Module, name: str) -> tuple[Callable[..., Any], Any]:
    """`(function, weights)` such that `function(weights, *args)` is what a method returns."""
    graph, state = nnx.split(model)

    def function(weights: Any, *args: Any, **kwargs: Any) -> Any:
        return getattr(nnx.merge(graph, weights), name)(*args, **kwargs)

    return function, state
