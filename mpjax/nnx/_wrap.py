"""`wrap` for NNX: gives every module in the graph the class that its path's policy asks for."""

import warnings
from typing import Any

import jax.numpy as jnp
from flax import nnx

import mpjax_kernels as mk

from .._adapters import POLICY, ROOT, no_effect_message, output_dtype_at
from .._paths import check_keys, join
from .._policy import DTypePolicy
from .._policy_map import resolve
from ._classes import base_class, cast_on_read, module_class, own_variables, set_class
from ._rules import rule_of


def wrap(module: nnx.Module, policy: Any, *, strict: bool) -> nnx.Module:
    """Puts `module` under a frozen policy, in place; see `mpjax.wrap`."""
    modules = _own_modules(module)
    layers = [join(path) for path, m in modules.items() if is_layer(m)]
    containers = [join(path) for path, m in modules.items() if not is_layer(m)]
    name = base_class(module).__name__
    check_keys(policy, layers, containers, name, strict=strict)
    resolved = {path: resolve(policy, join(path)) for path in modules}
    for path, each in modules.items():
        _check_quantized(each, resolved[path], join(path))
    owned = [v for m in modules.values() for v in own_variables(m)]
    before = [(each, type(each)) for each in [*modules.values(), *owned]]
    try:
        for each, _ in before:
            set_class(each, base_class(each))
        for path, each in modules.items():
            root = policy if each is module else None
            if root is not None or author_dtype(each) is None:
                _adopt(each, resolved[path], output_dtype_at(policy, join(path)), root)
    except BaseException:  # a user's rule may raise anything: the module is as it was
        for each, cls in before:
            set_class(each, cls)
        raise
    kept = [join(path) for path, m in modules.items() if _parameters(m) and author_dtype(m)]
    if kept and len(kept) == sum(1 for m in modules.values() if _parameters(m)):
        warnings.warn(no_effect_message(name, kept), stacklevel=3)
    return module


def unwrap(module: nnx.Module) -> nnx.Module:
    """Gives every object of the graph its own class back."""
    for each in _own_modules(module).values():
        set_class(each, base_class(each))
        for variable in own_variables(each):
            set_class(variable, base_class(variable))
    return module


def is_wrapped(module: nnx.Module) -> bool:
    """Whether `wrap` was called on this very module."""
    return getattr(type(module), ROOT, None) is not None


def policy_of(module: nnx.Module) -> Any:
    """The frozen policy of a wrapped module."""
    return getattr(type(module), ROOT)


def layer_policies(
    module: nnx.Module, variables: Any = None, *args: Any, **kwargs: Any
) -> dict[str, DTypePolicy]:
    """See `mpjax.layer_policies`."""
    if variables is not None or args or kwargs:
        raise TypeError("an NNX model holds its layers: call mp.layer_policies(model)")
    policies = {}
    modules = _modules(module)
    for path in sorted(modules, key=lambda path: _position(module, path)):
        each, own = modules[path], author_dtype(modules[path])
        if _parameters(each):
            policies[join(path)] = DTypePolicy(own) if own else getattr(type(each), POLICY)
    return policies


def author_dtype(module: nnx.Module) -> str | None:
    """The dtype that the module's author gave it by `dtype=`, by name, or None."""
    dtype = vars(module).get("dtype")
    if dtype is None or (
        isinstance(module, nnx.Embed) and dtype == module.embedding.get_raw_value().dtype
    ):  # `nnx.Embed` fills in the table's dtype where its author gave none
        return None
    return jnp.dtype(dtype).name


def is_layer(module: nnx.Module) -> bool:
    """Whether the module owns parameters, or contains no other module."""
    return bool(_parameters(module)) or len(_modules(module)) == 1


def _modules(module: nnx.Module) -> dict[tuple[Any, ...], nnx.Module]:
    """The modules of the graph by path; lists and dicts of modules count as their owner's."""
    found = nnx.iter_modules(module)
    return {path: m for path, m in found if not isinstance(m, nnx.List | nnx.Dict)}


def _own_modules(module: nnx.Module) -> dict[tuple[Any, ...], nnx.Module]:
    """`_modules`, less those of modules inside that were wrapped by themselves."""
    modules = _modules(module)
    nested = [path for path, m in modules.items() if m is not module and is_wrapped(m)]
    return {
        path: m
        for path, m in modules.items()
        if not any(path[: len(root)] == root for root in nested)
    }


def _check_quantized(module: nnx.Module, policy: DTypePolicy, path: str) -> None:
    for variable in own_variables(module):
        value = variable.get_raw_value()
        if isinstance(value, mk.QTensor) and policy.quantization_mode is None:
            raise ValueError(
                f"layer '{path}' is quantized ({value!r}), which {policy!r} cannot undo: keep a "
                "quantized policy, or load the float weights first"
            )


def _position(node: Any, path: tuple[Any, ...]) -> tuple[int, ...]:
    """Where a path comes in the order in which the modules were assigned; NNX sorts by name."""
    position: list[int] = []
    for part in path:
        items = vars(node) if isinstance(node, nnx.Pytree) else node
        names = list(items) if isinstance(items, dict) else range(len(items))
        key = str(part) if isinstance(node, nnx.Pytree) else part
        position.append(list(names).index(key))
        node = items[key]
    return tuple(position)


def _adopt(module: Any, policy: DTypePolicy, output_dtype: str | None, root: Any) -> None:
    base = base_class(module)
    rule = rule_of(base) if author_dtype(module) is None else None
    lent = {} if rule is None else rule(module, policy)
    # As in Linen, a module that only holds others passes on what it receives.
    casts = root is not None or rule is not None or bool(_parameters(module))
    items = tuple(lent.items())
    set_class(
        module,
        module_class(base, policy, items, casts=casts, output_dtype=output_dtype, root=root),
    )
    if rule is None and author_dtype(module) is None:
        cast_on_read(module, nnx.Param, policy.compute_dtype)
    if isinstance(module, nnx.MultiHeadAttention):
        cast_on_read(module, nnx.Cache, policy.compute_dtype)


def _parameters(module: nnx.Module) -> list[nnx.Variable]:
    return [v for v in own_variables(module) if isinstance(v, nnx.Param)]
