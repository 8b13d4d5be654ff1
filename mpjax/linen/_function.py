"""A wrapped Linen model as a pure function of its weights."""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn

from ._trace import explained


def as_function(
    model: nn.Module, variables: Any, *args: Any
) -> tuple[Callable[..., Any], Any, tuple[Any, ...]]:
    """`(function, weights, args)` such that `function(weights, *args)` is the model's output.

    Raises:
      TypeError: `variables` are not what `init` returned.
    """
    if not isinstance(variables, Mapping) or "params" not in variables:
        raise TypeError(
            "`variables` must be what mp.quantize or `init` returned, a dict with 'params', but "
            f"got {type(variables).__name__}: call mp.export(model, variables, x)"
        )

    def function(variables: Any, *args: Any, **kwargs: Any) -> Any:
        with explained(model, args, kwargs):
            return model.apply(variables, *args, **kwargs)

    return function, variables, args
