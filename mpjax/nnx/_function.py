"""A wrapped NNX model as a pure function of its weights."""

from collections.abc import Callable
from typing import Any

from flax import nnx


def as_function(model: nnx.Module, *args: Any) -> tuple[Callable[..., Any], Any, tuple[Any, ...]]:
    """`(function, weights, args)` such that `function(weights, *args)` is the model's output."""
    graph, state = nnx.split(model)

    def function(state: Any, *args: Any, **kwargs: Any) -> Any:
        return nnx.merge(graph, state)(*args, **kwargs)

    return function, state, args
