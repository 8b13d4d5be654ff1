"""Weights that an NNX model is given by path."""

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

from .._paths import join
from .._scaling import ScalingState
from ._files import variables_of


def given_values(model: nnx.Module, weights: Mapping[Any, Any]) -> dict[str, Any]:
    """The leaves of nested dicts by the paths of the variables of a model that they are for.

    A variable in a checkpoint may have its value under "value", as Flax saves its states.

    Raises:
      ValueError: a leaf is for no variable, has another shape, or is missing: every parameter has
        one, and every variable that has no value.
    """
    variables = _by_name(model)
    values = {
        name if name in variables else name.removesuffix("/value"): leaf
        for name, leaf in _leaves(weights, ())
    }
    lines = list(_differences(variables, values))
    if lines:
        more = [f"and {len(lines) - 10} more"] if len(lines) > 10 else []
        raise ValueError(
            f"these weights do not fit {type(model).__name__}, which stays as it was:\n  "
            + "\n  ".join(lines[:10] + more)
        )
    return values


def _differences(variables: Mapping[str, Any], values: Mapping[str, Any]) -> Iterator[str]:
    """What variables and the values for them do not have in common, one line each."""
    for name, value in values.items():
        if name not in variables:
            yield f"{name}: {_text(value)} among the weights, absent from the model"
    for name, variable in variables.items():
        own = variable.get_raw_value()
        if name not in values:
            if isinstance(variable, nnx.Param) or _is_abstract(own):
                yield f"{name}: absent from the weights, {_text(own)} in the model"
        elif np.shape(values[name]) != np.shape(own):
            yield f"{name}: {_text(values[name])} among the weights, {_text(own)} in the model"


def put_values(model: nnx.Module, values: Mapping[str, Any]) -> None:
    """Sets the values of variables by path; all of them, or none if that is stopped."""
    variables = _by_name(model) if values else {}
    before = {name: variables[name].get_raw_value() for name in values}
    try:
        for name, value in values.items():
            variables[name].set_raw_value(value)
    except BaseException:
        for name, value in before.items():
            variables[name].set_raw_value(value)
        raise


def _by_name(model: nnx.Module) -> dict[str, Any]:
    return {join(path): variable for path, variable in variables_of(model).items()}


def _leaves(node: Any, path: tuple[Any, ...]) -> Iterator[tuple[str, Any]]:
    if not isinstance(node, Mapping):
        yield join(path), node
        return
    for key, child in node.items():
        yield from _leaves(child, (*path, key))


def _is_abstract(value: Any) -> bool:
    return any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(value))


def _text(value: Any) -> str:
    if hasattr(value, "dtype") and not isinstance(value, ScalingState):
        return f"{value.dtype}{list(value.shape)}"
    return type(value).__name__
