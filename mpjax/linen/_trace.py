"""One call of a Linen model, traced; and its errors, explained to whoever chose the arguments."""

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
from flax import errors

from .._context import Observation, observe

_OF_APPLY = ("method", "rngs", "mutable", "capture_intermediates")  # and not of the model's method


def trace(model: nn.Module, variables: Mapping[str, Any], *args: Any, **kwargs: Any) -> Observation:
    """Traces one `apply` by `jax.eval_shape` and returns what its layers reported."""
    with observe() as observation, explained(model, args, kwargs):
        jax.eval_shape(*call_of(model, variables, *args, **kwargs))
    return observation


def call_of(model: nn.Module, variables: Any, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
    """A function of variables and array arguments alone, then those; flags stay Python's."""
    leaves, treedef = jax.tree.flatten((args, kwargs))
    arrays = {i: x for i, x in enumerate(leaves) if hasattr(x, "shape") and hasattr(x, "dtype")}

    def apply(variables: Any, arrays: Mapping[int, Any]) -> Any:
        call = [arrays.get(i, leaf) for i, leaf in enumerate(leaves)]
        args, kwargs = jax.tree.unflatten(treedef, call)
        return model.apply(variables, *args, **kwargs)

    return apply, variables, arrays


@contextlib.contextmanager
def explained(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[None]:
    """Says of errors of a model's `apply` what is wrong with its arguments, where that is known.

    Args:
      model: that is called.
      args, kwargs: of `apply`, without the variables.
    """
    try:
        yield
    except (
        errors.ScopeParamNotFoundError,
        errors.ScopeCollectionNotFound,
        errors.ScopeParamShapeError,
    ) as error:
        raise ValueError(
            f"these variables do not fit {type(model).__name__}: {error} Are they the parameters "
            "of another model, or is an argument of another size than in training?"
        ) from error
    except errors.InvalidRngError as error:
        error.add_note(
            f"the call of {type(model).__name__} draws random numbers, as dropout does in "
            "training: give the arguments of inference, such as train=False or "
            "deterministic=True, or rngs= if inference needs them too"
        )
        raise
    except errors.ModifyScopeVariableError as error:
        error.add_note(
            f"the call of {type(model).__name__} changes variables, as a batch norm does in "
            "training: give the arguments of inference, such as train=False or "
            "use_running_average=True, or mutable= if inference changes them too, as a decoding "
            "step does its cache: mutable=['cache']"
        )
        raise
    except TypeError as error:
        note = _missing(model, args, kwargs)
        if note is not None:
            error.add_note(note)
        raise


def _missing(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str | None:
    """What a model's method takes, if these arguments are not that."""
    called = kwargs.get("method") or "__call__"
    method: Callable[..., Any] = getattr(type(model), called) if isinstance(called, str) else called
    signature = inspect.signature(getattr(method, "__func__", method))
    given = {name: value for name, value in kwargs.items() if name not in _OF_APPLY}
    try:
        signature.bind(model, *args, **given)
    except TypeError:
        name = f"{type(model).__name__}.{getattr(method, '__name__', method)}"
        return (
            "a Linen model meets its layers in a call, so give all the arguments of one, as it is "
            f"in inference, after the variables, or their shapes: {name} takes {signature}"
        )
    return None
