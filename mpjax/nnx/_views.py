"""How a wrapped NNX module reads its parameters: through views in the compute dtype.

Inside a wrapped call, `self.w` of a wrapped module is a view: an `nnx.Variable` of the same type
that holds the value cast, and hands whatever is written to it back to the parameter, in the
parameter's own dtype. Outside a wrapped call `self.w` is the parameter. The graph itself, and so
`split`, `state`, optimizers and checkpoints, never meets a view: NNX reads it from `vars(module)`.

A variable's metadata could hold an `on_get_value` hook that casts, but hooks are deprecated, and a
hook is lost as soon as `nnx.update` loads a state saved without it.
"""

import functools
import warnings
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from .._cast import cast_floating, in_dtypes_of, is_floating
from .._context import active


def reading(base: Any, dtype: str, kinds: tuple[type, ...], keeps: frozenset[str]) -> Callable:
    """A `__getattribute__` that returns views of variables while a wrapped call is active.

    Args:
      base: the class whose attributes are read.
      dtype: the compute dtype.
      kinds: the types of variables to view; others are returned as they are.
      keeps: names of attributes that are never viewed.
    """

    def view(x: Any) -> Any:
        return _view(x, dtype) if isinstance(x, kinds) else x

    def __getattribute__(self: Any, name: str) -> Any:
        value = base.__getattribute__(self, name)
        if active.value is None or name in keeps or name.startswith("__"):
            return value
        if type(value) in (list, tuple, dict):
            leaves = jax.tree.leaves(value, is_leaf=_is_node)
            if any(isinstance(x, kinds) for x in leaves):
                return jax.tree.map(view, value, is_leaf=_is_node)
        return view(value)

    return __getattribute__


def _is_node(x: Any) -> bool:
    return isinstance(x, nnx.Variable | nnx.Pytree)


def _view(variable: nnx.Variable, dtype: str) -> nnx.Variable:
    value = variable.get_value()
    cast = cast_floating(value, dtype)
    if all(a is b for a, b in zip(jax.tree.leaves(cast), jax.tree.leaves(value), strict=True)):
        return variable
    metadata = {**variable.get_metadata(), "hijax": False, "ref": False}
    view = _view_class(type(variable)).from_metadata(cast, metadata)
    object.__setattr__(view, "_origin", variable)
    return view


@functools.cache
def _view_class(base: Any) -> Any:
    class View(base):
        __slots__ = ("_origin",)

        def set_value(self, value: Any, **index: Any) -> None:
            origin = getattr(self, "_origin", None)
            if origin is not None:  # None: a copy that a JAX transform made
                _warn_of_written(origin, self)
                origin.set_value(in_dtypes_of(value, origin.get_raw_value()), **index)
            base.set_value(self, value, **index)

        def update_from_state(self, variable_state: nnx.Variable) -> None:
            origin = getattr(self, "_origin", None)
            if origin is not None:
                value = in_dtypes_of(variable_state.get_raw_value(), origin.get_raw_value())
                origin.set_raw_value(value)
            base.update_from_state(self, variable_state)

    View.__name__, View.__qualname__ = base.__name__, base.__qualname__
    return View


def _warn_of_written(origin: nnx.Variable, view: nnx.Variable) -> None:
    if isinstance(origin, nnx.Param):
        dtypes = {x.dtype.name for x in jax.tree.leaves(view.get_raw_value()) if is_floating(x)}
        warnings.warn(
            f"a parameter of shape {origin.get_raw_value().shape} is assigned inside a call of a "
            f"wrapped model, where it reads as {', '.join(sorted(dtypes))}: the bits below that "
            "are lost. Update parameters outside the model's methods",
            stacklevel=4,
        )
