"""The dynamic subclasses that put NNX modules and variables under a policy.

Wrapping an NNX module changes the class of the objects in its graph and nothing else: no attribute,
no weight, no metadata. So the state's treedef and the weights stay the user's, `split`, `merge` and
`clone` carry the policy along (the class is part of the graph definition, hence of jit's cache
key), and unwrapping is setting the class back.

  a layer            its public methods cast their floating arguments; so do the wrapped module's
  one with a rule    is lent attributes (`dtype`, `promote_dtype`, `dot_general`, ...) by data
                     descriptors in the class, which shadow the instance's own
  one without        its own parameters get a subclass of `nnx.Param` that casts on read, inside a
                     wrapped call only: optimizers, `split` and checkpoints see the master weights

Flax's other door for that, an `on_get_value` hook in a variable's metadata, is deprecated, and is
lost as soon as `nnx.update` loads a state saved without it.
"""

import functools
import inspect
import types
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import nnx

from .._adapters import BASE, POLICY, ROOT, PolicyAttribute, takes_self
from .._cast import cast_floating
from .._context import Frame, active
from .._policy import DTypePolicy


def base_class(obj: Any) -> type:
    """The class that an object had before it was wrapped."""
    return getattr(type(obj), BASE, type(obj))


def set_class(obj: Any, cls: type) -> None:
    """Gives an object of an NNX graph another class (NNX guards plain assignment)."""
    object.__setattr__(obj, "__class__", cls)


class _Lent:
    """A class-level value that shadows an instance attribute, which keeps its own underneath."""

    def __init__(self, name: str, value: Any):
        self._name, self._value = name, value

    def __get__(self, obj: Any, owner: type | None = None) -> Any:
        return self._value

    def __set__(self, obj: Any, value: Any) -> None:
        vars(obj)[self._name] = value


@functools.cache
def module_class(
    base: Any,
    policy: DTypePolicy,
    lent: tuple[tuple[str, Any], ...],
    *,
    casts: bool,
    output_dtype: str | None = None,
    root: Any = None,
) -> type:
    """The subclass of `base` for a module under `policy`.

    Args:
      base: the user's, or Flax's, module class.
      policy: the policy that the module's path resolved to.
      lent: names and values of attributes that shadow the instance's own.
      casts: whether public methods cast their floating arguments to the compute dtype.
      output_dtype: dtype to cast the floating outputs of public methods to; None leaves them.
      root: the frozen policy as a whole, for the module that `wrap` was called on; else None.
    """
    namespace: dict[str, Any] = {BASE: base, POLICY: policy, ROOT: root}
    namespace |= {name: _Lent(name, value) for name, value in lent}
    for name in _public_methods(base):
        namespace[name] = _entering(getattr(base, name), policy, casts, output_dtype)
    if issubclass(base, nnx.MultiHeadAttention):
        namespace["init_cache"] = _adopting_cache(base.init_cache, policy.compute_dtype)
    if root is not None and not hasattr(base, "policy"):
        namespace["policy"] = PolicyAttribute(root)
    return _subclass(base, namespace, pytree=base._pytree__is_pytree)


@functools.cache
def variable_class(base: type, dtype: str) -> type:
    """The subclass of a variable type that reads as `dtype` inside a wrapped call.

    What is written there is cast back: the variable keeps its own dtype.
    """

    def get_value(self: Any, **index: Any) -> Any:
        value = base.get_value(self, **index)  # pyright: ignore[reportAttributeAccessIssue]
        return value if active.value is None else cast_floating(value, dtype)

    def set_value(self: Any, value: Any, **index: Any) -> None:
        stored = self.get_raw_value().dtype
        if active.value is not None and jnp.issubdtype(stored, jnp.floating):
            value = cast_floating(value, stored)
        base.set_value(self, value, **index)  # pyright: ignore[reportAttributeAccessIssue]

    namespace = {BASE: base, "get_value": get_value, "set_value": set_value}
    return _subclass(base, namespace)


def cast_on_read(module: nnx.Module, kind: type[nnx.Variable], dtype: str) -> None:
    """Gives the module's own variables of a kind the class that casts on read."""
    for variable in own_variables(module):
        if isinstance(variable, kind):
            set_class(variable, variable_class(base_class(variable), dtype))


def own_variables(module: nnx.Module) -> list[nnx.Variable]:
    """The variables that a module holds itself, in lists and dicts too, not in submodules."""
    found: list[nnx.Variable] = []
    pending = list(vars(module).values())
    while pending:
        value = pending.pop()
        if isinstance(value, nnx.Variable):
            found.append(value)
        elif isinstance(value, nnx.List | nnx.Dict | list | tuple | dict):
            items = vars(value) if isinstance(value, nnx.Pytree) else value
            pending.extend(items.values() if isinstance(items, dict) else items)
    return found


def _adopting_cache(init_cache: Callable[..., Any], dtype: str) -> Callable[..., Any]:
    @functools.wraps(init_cache)
    def adopting(self: Any, *args: Any, **kwargs: Any) -> None:
        init_cache(self, *args, **kwargs)
        cast_on_read(self, nnx.Cache, dtype)

    return adopting


def _subclass(base: type, namespace: dict[str, Any], **keywords: Any) -> type:
    namespace |= {"__module__": base.__module__, "__qualname__": base.__qualname__}
    namespace |= {"__doc__": base.__doc__, "__annotations__": {}}
    return types.new_class(base.__name__, (base,), keywords, lambda ns: ns.update(namespace))


def _public_methods(base: type) -> list[str]:
    """The methods that take activations: `__call__` and the public ones below `nnx.Module`."""
    names = [name for cls in base.__mro__ if issubclass(cls, nnx.Module) for name in vars(cls)]
    return [
        name
        for name in dict.fromkeys(names)
        if (name == "__call__" or not name.startswith("_"))
        and (name == "__call__" or not hasattr(nnx.Module, name))
        and takes_self(inspect.getattr_static(base, name))
    ]


def _entering(
    method: Callable[..., Any], policy: DTypePolicy, casts: bool, output_dtype: str | None
) -> Callable[..., Any]:
    frame = Frame(policy)

    @functools.wraps(method)
    def entering(self: Any, *args: Any, **kwargs: Any) -> Any:
        if casts:
            args, kwargs = cast_floating((args, kwargs), policy.compute_dtype, is_leaf=_is_nnx)
        if active.value is None:
            with active(frame):
                output = method(self, *args, **kwargs)
        else:
            output = method(self, *args, **kwargs)
        return output if output_dtype is None else cast_floating(output, output_dtype)

    return entering


def _is_nnx(x: Any) -> bool:
    """Modules, rngs and variables are arguments that keep their identity."""
    return isinstance(x, nnx.Pytree | nnx.Variable)
