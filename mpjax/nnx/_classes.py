"""The dynamic subclasses that put NNX modules under a policy.

Wrapping an NNX module changes the class of the modules in its graph and nothing else: no attribute,
no variable, no metadata. So the state and its treedef stay the user's, `split`, `merge` and `clone`
carry the policy along (the class is part of the graph definition, hence of jit's cache key), and
unwrapping is setting the class back.

  reads      of a module's own parameters come in the compute dtype (`_views.py`)
  calls      of a layer's public methods cast their floating arguments; so do the wrapped module's
  a rule     lends a layer attributes (`dtype`, `promote_dtype`, `dot_general`, ...) by data
             descriptors in the class, which shadow the instance's own
"""

import contextlib
import functools
import inspect
import types
from collections.abc import Callable
from typing import Any

from flax import nnx

from .._adapters import BASE, POLICY, ROOT, PolicyAttribute, refuse_if_suspended, takes_self
from .._cast import cast_floating
from .._context import Frame, active
from .._decisions import NONE, Decision
from .._policy import DTypePolicy
from ._names import named
from ._states import bound
from ._views import reading


def base_class(obj: Any) -> type:
    """The class that an object had before it was wrapped."""
    return getattr(type(obj), BASE, type(obj))


def set_class(obj: Any, cls: type) -> None:
    """Gives an object of an NNX graph another class (NNX guards plain assignment)."""
    object.__setattr__(obj, "__class__", cls)


class _Lent:
    """A class-level value that shadows an instance attribute, which keeps its own underneath."""

    def __init__(self, name: str, value: Any):
        self._name, self.value = name, value

    def __get__(self, obj: Any, owner: type | None = None) -> Any:
        return self.value if obj is None else bound(self.value, obj)

    def __set__(self, obj: Any, value: Any) -> None:
        vars(obj)[self._name] = value


def lent_to(cls: type) -> list[Any]:
    """The values that a module class lends its instances."""
    return [x.value for x in vars(cls).values() if isinstance(x, _Lent)]


@functools.cache
def module_class(
    base: Any,
    policy: DTypePolicy,
    lent: tuple[tuple[str, Any], ...],
    *,
    keeps: frozenset[str] = frozenset(),
    casts: bool,
    output_dtype: str | None = None,
    root: Any = None,
    decision: Decision = NONE,
) -> type:
    """The subclass of `base` for a module under `policy`.

    Args:
      base: the user's, or Flax's, module class.
      policy: the policy that the module's path resolved to.
      lent: names and values of attributes that shadow the instance's own; under the name of a
        public method, what is called in its place with the module first.
      keeps: names of parameters that are read as they are stored.
      casts: whether public methods cast their floating arguments to the compute dtype.
      output_dtype: dtype to cast the floating outputs of public methods to; None leaves them.
      root: the frozen policy as a whole, for the module that `wrap` was called on; else None.
      decision: what programs are to say of the products that its methods trace.
    """
    namespace: dict[str, Any] = {BASE: base, POLICY: policy, ROOT: root}
    namespace |= {name: _Lent(name, value) for name, value in lent}
    for name in _public_methods(base):
        method = dict(lent).get(name, getattr(base, name))
        namespace[name] = _entering(method, policy, casts, output_dtype, decision)
    kinds = (nnx.Param, nnx.Cache) if issubclass(base, nnx.MultiHeadAttention) else (nnx.Param,)
    namespace["__getattribute__"] = reading(base, policy.compute_dtype, kinds, keeps)
    if root is not None and not hasattr(base, "policy"):
        namespace["policy"] = PolicyAttribute(root)
    return _subclass(base, namespace, pytree=base._pytree__is_pytree)


@functools.cache
def container_class(base: Any, policy: DTypePolicy) -> type:
    """The subclass of `nnx.List` or `nnx.Dict` for one that holds a layer's own parameters."""
    read = reading(base, policy.compute_dtype, (nnx.Param,), frozenset())
    namespace = {BASE: base, "__getattribute__": read}
    return _subclass(base, namespace, pytree=base._pytree__is_pytree)


def _subclass(base: type, namespace: dict[str, Any], **keywords: Any) -> type:
    # Flax' messages tell two classes apart by this name only.
    namespace |= {"__qualname__": f"{base.__qualname__} (wrapped by mp.wrap)"}
    namespace |= {"__module__": base.__module__}
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
    method: Callable[..., Any],
    policy: DTypePolicy,
    casts: bool,
    output_dtype: str | None,
    decision: Decision,
) -> Callable[..., Any]:
    frame = Frame(policy)

    @functools.wraps(method)
    def entering(self: Any, *args: Any, **kwargs: Any) -> Any:
        refuse_if_suspended(method)
        if casts:
            args, kwargs = cast_floating((args, kwargs), policy.compute_dtype, is_leaf=_is_nnx)
        with contextlib.nullcontext() if active.value is not None else active(frame):
            with named(self), decision.scope():
                output = method(self, *args, **kwargs)
        return output if output_dtype is None else cast_floating(output, output_dtype)

    return entering


@functools.cache
def marked_class(base: Any, decision: Decision) -> type:
    """The subclass of `base` for a layer that no policy touches, and whose programs say so."""

    def marking(method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def entering(self: Any, *args: Any, **kwargs: Any) -> Any:
            with named(self), decision.scope():
                return method(self, *args, **kwargs)

        return entering

    namespace: dict[str, Any] = {BASE: base}
    namespace |= {name: marking(getattr(base, name)) for name in _public_methods(base)}
    return _subclass(base, namespace, pytree=base._pytree__is_pytree)


def _is_nnx(x: Any) -> bool:
    """Modules, rngs and variables are arguments that keep their identity."""
    return isinstance(x, nnx.Pytree | nnx.Variable)
