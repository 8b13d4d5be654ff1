"""`wrap` for Linen: a dynamic subclass whose methods run under `nn.intercept_methods`.

The subclass has the user's class name, fields and methods, so parameter names, treedefs and call
signatures are the unwrapped module's. `apply`, `init` and every public method enter, once,

  1. a `Frame` in `mpjax._context.active`, which is part of jit's cache keys, and
  2. Flax's own `nn.intercept_methods`, with the interceptor of `_intercept.py`.

A module wrapped inside a wrapped one enters its own frame, and the outer interceptor stands back.
The policy lives in the class, so that Flax's `clone` (which calls the class) keeps it, and the
class is made once per class and policy, so that equal wrapped modules are equal.
"""

import contextlib
import dataclasses
import functools
import inspect
import types
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax

from .._adapters import (
    BASE,
    POLICY,
    STRICT,
    PolicyAttribute,
    no_effect_message,
    output_dtype_at,
    refuse_if_suspended,
    takes_self,
)
from .._cast import cast_floating
from .._context import Frame, active, current_observation
from .._decisions import ROOT
from .._paths import check_keys, join, nodes, owner_paths
from .._policy_map import FrozenDTypePolicyMap, resolve
from ._intercept import Visits, interceptor
from ._layer import author_dtype


def wrap(module: nn.Module, policy: Any, *, strict: bool) -> nn.Module:
    """Returns `module` under a frozen policy; a wrapped module gets the new policy instead."""
    if module.scope is not None:
        raise ValueError(
            f"{type(module).__name__} (named {module.name!r}) already belongs to a bound parent, "
            "so wrapping it would rename its parameters. Inside a @nn.compact method create it "
            f"unattached: mp.wrap({type(module).__name__}(..., parent=None), policy); a model that "
            "came from `bind` is wrapped before it is bound"
        )
    base = base_class(type(module))
    return _construct(_wrapped_class(base, policy, strict), module)


def unwrap(module: nn.Module) -> nn.Module:
    """Returns the module as it was before `wrap`."""
    return _construct(base_class(type(module)), module)


def wrap_again(module: nn.Module, policy: Any, strict: bool) -> nn.Module:
    """What unpickling calls: the dynamic class cannot be found by name."""
    return wrap(module, policy, strict=strict)


def is_wrapped(module: nn.Module) -> bool:
    """Whether `module` is an instance that `wrap` made."""
    return hasattr(type(module), POLICY)


def policy_of(module: nn.Module) -> Any:
    """The frozen policy of a wrapped module."""
    return getattr(type(module), POLICY)


def base_class(cls: type) -> type:
    """The user's class behind a wrapped one; any other class is itself."""
    return getattr(cls, BASE, cls)


def _construct(cls: Any, module: nn.Module) -> nn.Module:
    fields = {
        name: getattr(module, name)
        for name, field in module.__dataclass_fields__.items()
        if field.init and name not in ("parent", "name")
    }
    return cls(**fields, name=module.name)


@functools.cache
def _wrapped_class(base: type[nn.Module], policy: Any, strict: bool) -> type[nn.Module]:
    namespace: dict[str, Any] = {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "__eq__": base.__eq__,
        "__hash__": base.__hash__,
        BASE: base,
        POLICY: policy,
        STRICT: strict,
        "__reduce__": nn.nowrap(lambda self: (wrap_again, (unwrap(self), policy, strict))),
        "apply": _entering_apply(base.apply),
        "init_with_output": _entering_init(base.init_with_output),
    }
    for name in _public_methods(base):
        namespace[name] = _entering(getattr(base, name))
    if not hasattr(base, "policy") and "policy" not in base.__dataclass_fields__:
        namespace["policy"] = PolicyAttribute(policy)
    return types.new_class(base.__name__, (base,), exec_body=lambda ns: ns.update(namespace))


def _public_methods(base: type) -> list[str]:
    """The user's own methods that can start a computation, inherited ones included."""
    fields = getattr(base, "__dataclass_fields__", {})
    names = [name for cls in base.__mro__ if issubclass(cls, nn.Module) for name in vars(cls)]
    return [
        name
        for name in dict.fromkeys(names)
        if (name == "__call__" or not name.startswith("_"))
        and name not in fields
        and name != "setup"
        and (name == "__call__" or not hasattr(nn.Module, name))
        and takes_self(inspect.getattr_static(base, name))
        and not hasattr(getattr(base, name), "nowrap")
    ]


def _entering(method: Callable[..., Any]) -> Callable[..., Any]:
    @nn.nowrap
    @functools.wraps(method)
    def entering(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if self.scope is None:  # Flax's own error says it best
            return method(self, *args, **kwargs)
        refuse_if_suspended(method)
        with _entered(self) as visits:
            is_root = active.value.root == self.path
            output = (_call if is_root else _pass)(self, method, args, kwargs)
            if visits is not None:
                _check(self, self.variables.get("params", {}), visits)
        return output

    return entering


def _call(
    module: nn.Module, method: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Any:
    """Casts what enters and leaves the wrapped module itself.

    It happens here and not in the interceptor, which sees a module whose class is lifted (by
    `nn.scan`, say) from within the loop only, where a carry can no longer change its dtype.
    """
    if author_dtype(module) is not None:
        return method(module, *args, **kwargs)
    policy = policy_of(module)
    args, kwargs = cast_floating((args, kwargs), resolve(policy, "").compute_dtype)
    output = method(module, *args, **kwargs)
    output_dtype = output_dtype_at(policy, "")
    return output if output_dtype is None else cast_floating(output, output_dtype)


def _pass(
    module: nn.Module, method: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Any:
    return method(module, *args, **kwargs)


def _entering_apply(apply: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(apply)
    def entering(self: nn.Module, variables: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        with _entered(self) as visits:
            output = apply(self, variables, *args, **kwargs)
            if visits is not None:
                _check(self, variables.get("params", {}), visits)
        return output

    return nn.nowrap(entering)


def _entering_init(init_with_output: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(init_with_output)
    def entering(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with _entered(self) as visits:
            output, variables = init_with_output(self, *args, **kwargs)
            if visits is not None:
                _check(self, variables.get("params", {}), visits)
        return output, variables

    return nn.nowrap(entering)


@contextlib.contextmanager
def _entered(module: nn.Module) -> Iterator[Visits | None]:
    """Opens the module's frame, and yields its visits; None where the frame is open already.

    It is open, too, inside a module of the same policy: a class that builds `type(self)(...)` in a
    wrapped instance builds wrapped ones, and they are part of the whole.
    """
    root = module.path if module.scope is not None else ()
    frame = Frame(policy_of(module), root, current_observation())
    around = active.value
    if isinstance(around, Frame) and root[: len(around.root)] == around.root:
        if dataclasses.replace(around, root=root) == frame:
            yield None
            return
    visits = Visits()
    with active(frame), nn.intercept_methods(interceptor(frame, visits)), jax.named_scope(ROOT):
        yield visits


def _check(module: nn.Module, params: Mapping[str, Any], visits: Visits) -> None:
    """Every key of the policy map reaches a layer, and the policy reaches some layer."""
    name, policy = type(module).__name__, policy_of(module)
    if isinstance(policy, FrozenDTypePolicyMap):
        owners = {join(path): owns for path, owns in nodes(params)}
        seen = [*owners, *visits.kept]
        parents = {path.rpartition("/")[0] for path in seen if path}
        layers = [p for p in seen if owners.get(p) or (p not in parents and p not in owners)]
        containers = [p for p in seen if p not in layers]
        check_keys(policy, layers, containers, name, strict=getattr(module, STRICT))
    if any(visits.kept.values()):
        called = [p for p in map(join, owner_paths(params)) if p in visits.kept]
        if all(visits.kept[p] for p in called):
            warnings.warn(no_effect_message(name, called), stacklevel=3)
