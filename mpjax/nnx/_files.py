"""The variables of an NNX model, as a file of weights holds them."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
from flax import nnx

from .._adapters import POLICY
from .._checkpoint_leaves import committed
from .._file_header import LeafRecord
from .._file_policy import WEIGHTS, difference
from .._paths import join
from .._prescaled import is_stored
from .._scaling import ScalingState
from .._stored import stored_of
from .._wrap import wrapped_adapter_of
from ._states import LossScale

Path = tuple[Any, ...]


def policy_of(model: nnx.Module) -> Any:
    """The frozen policy of a model; ValueError if it is not wrapped."""
    return wrapped_adapter_of(model).policy_of(model)


def variables_of(model: nnx.Module) -> dict[Path, Any]:
    """The variables of a model by path, shared ones once, but for the loss scale of training."""
    return {
        path: node
        for path, node in nnx.iter_graph(model)
        if isinstance(node, nnx.Variable) and not isinstance(node, LossScale)
    }


def stored_differences(model: nnx.Module) -> Iterator[str]:
    """How the weights of a model are stored otherwise than its policy asks, one line each."""
    modules = _modules(model)
    for path, variable in variables_of(model).items():
        if isinstance(variable, nnx.Param) and path[-1] in WEIGHTS:
            policy = _policy_at(modules, path)
            line = difference(join(path), variable.get_raw_value(), policy)
            yield from () if line is None else (line,)


def differences(model: nnx.Module, leaves: Sequence[LeafRecord]) -> Iterator[str]:
    """Why the leaves of a file cannot be the values of a model's variables, one line each."""
    policy_of(model)
    variables, modules = variables_of(model), _modules(model)
    saved = {leaf.path: leaf for leaf in leaves}
    for path in {**saved, **variables}:
        name = join(path)
        if path not in variables:
            yield f"{name}: {_text(saved[path].abstract)} in the file, absent from the model"
            continue
        ours = variables[path].get_raw_value()
        if path not in saved:
            yield f"{name}: absent from the file, {_text(ours)} in the model"
            continue
        theirs = saved[path].abstract
        is_weight = isinstance(variables[path], nnx.Param)
        if _form(theirs) != _form(ours) or (not is_weight and _format(theirs) != _format(ours)):
            yield f"{name}: {_text(theirs)} in the file, {_text(ours)} in the model"
        elif is_weight and is_stored(theirs):
            policy = _policy_at(modules, path)
            stored = stored_of(policy)
            if stored is None or stored.format != theirs.format.name:
                yield (
                    f"{name}: {theirs.format.name} in the file, but the policy of its layer in "
                    f"the model is {policy.name!r}"
                )


def shardings_of(model: nnx.Module, leaves: Sequence[LeafRecord]) -> dict[Path, Any]:
    """Where the weights of a model are bound to, for the leaves of a file that fits it."""
    variables, shardings = variables_of(model), {}
    for leaf in leaves:
        value = variables[leaf.path].get_raw_value()
        if is_stored(value) or isinstance(value, ScalingState):
            same = jax.tree.structure(value) == jax.tree.structure(leaf.abstract)
            shardings[leaf.path] = jax.tree.map(committed, value) if same else None
        else:
            shardings[leaf.path] = committed(value)
    return shardings


def put(model: nnx.Module, values: Mapping[Path, Any]) -> nnx.Module:
    """Replaces the values of the variables of a model, and returns it."""
    variables = variables_of(model)
    for path, value in values.items():
        variables[path].set_raw_value(value)
    return model


def _modules(model: nnx.Module) -> dict[Path, Any]:
    """The policies of the modules that have one, by path."""
    return {
        path: getattr(type(node), POLICY)
        for path, node in nnx.iter_graph(model)
        if hasattr(type(node), POLICY)
    }


def _policy_at(modules: Mapping[Path, Any], path: Path) -> Any:
    """The policy of the layer that has a variable."""
    return modules[max((p for p in modules if path[: len(p)] == p), key=len)]


def _format(value: Any) -> str | None:
    """What the values of a cache are stored in; None of what is not stored."""
    return value.format.name if is_stored(value) else None


def _form(value: Any) -> Any:
    """What values that can stand for each other have in common."""
    if isinstance(value, ScalingState):
        shapes = [x.shape for x in jax.tree.leaves(value)]
        return type(value.recipe), value.format, value.of_gradient, shapes
    return tuple(value.shape), str(value.dtype)


def _text(value: Any) -> str:
    if isinstance(value, ScalingState):
        history = list(value.amax_history.shape)
        return f"{type(value.recipe).__name__} of {value.format} with history {history}"
    if is_stored(value):
        return repr(value)
    return f"{value.dtype}[{', '.join(map(str, value.shape))}]"
