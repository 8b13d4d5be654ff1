"""`wrap` for NNX: gives every module in the graph the class that its path's policy asks for."""

import warnings
from collections.abc import Hashable
from typing import Any

from flax import nnx

from .._adapters import POLICY, ROOT, floating_name, no_effect_message, output_dtype_at
from .._decisions import NONE, Decision, at_path, of_attention, of_author
from .._paths import check_keys, join
from .._policy import DTypePolicy
from .._policy_map import resolve
from .._prescaled import is_stored
from .._recipes import recipe_of
from ._classes import (
    base_class,
    container_class,
    lent_to,
    marked_class,
    module_class,
    set_class,
)
from ._graph import own_containers, own_variables
from ._rules import rule_of
from ._states import attach, detach, outside_of_traces, prefixes_of


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
    containers_of = [c for m in modules.values() for c in own_containers(m)]
    before = [(each, type(each)) for each in [*modules.values(), *containers_of]]
    try:
        for each, _ in before:
            set_class(each, base_class(each))
        for path, each in modules.items():
            root, own = policy if each is module else None, author_dtype(each)
            if root is not None or own is None:
                decision = _decision(policy, join(path), each)
                output_dtype = output_dtype_at(policy, join(path))
                _adopt(each, resolved[path], output_dtype, root, decision)
            else:
                decision = of_author(policy, join(path), own)
                set_class(each, marked_class(base_class(each), decision))
        with outside_of_traces("mp.wrap"):
            for path, each in modules.items():
                _give_states(each, resolved[path])
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
        for obj in (each, *own_containers(each)):
            set_class(obj, base_class(obj))
        detach(each)
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
        if not _parameters(each):
            continue
        policy = DTypePolicy(own) if own else getattr(type(each), POLICY, None)
        if policy is None:
            raise ValueError(
                f"layer '{join(path)}' follows no policy: it was added, or unwrapped, after the "
                "model was wrapped. Call mp.wrap(model, policy) again"
            )
        policies[join(path)] = policy
    return policies


def author_dtype(module: nnx.Module) -> str | None:
    """The dtype that the module's author gave it by `dtype=`, by name, or None."""
    dtype = vars(module).get("dtype")
    if dtype is None or (
        isinstance(module, nnx.Embed) and dtype == module.embedding.get_raw_value().dtype
    ):  # `nnx.Embed` fills in the table's dtype where its author gave none
        return None
    return floating_name(dtype)


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
    for variable in _parameters(module):
        value = variable.get_raw_value()
        if is_stored(value) and policy.quantization_mode is None:
            raise ValueError(
                f"layer '{path}' is quantized ({value!r}), which {policy!r} cannot undo: keep a "
                "quantized policy, or load the float weights first"
            )


def _position(node: Any, path: tuple[Any, ...]) -> tuple[int, ...]:
    """Where a path comes in the order in which the modules were assigned; NNX sorts by name."""
    position: list[Any] = []
    for part in path:
        items: Any = vars(node) if hasattr(node, "__dict__") else node
        key = str(part) if hasattr(node, "__dict__") else part
        position.append(list(items).index(key) if isinstance(items, dict) else key)
        node = items[key]
    return tuple(position)


def _decision(policy: Any, path: str, module: nnx.Module) -> Decision:
    """What the policy decided about the products of a layer; nothing about those of others."""
    if isinstance(module, nnx.MultiHeadAttention):
        return of_attention(policy, path)
    return at_path(policy, path) if is_layer(module) else NONE


def _adopt(
    module: Any, policy: DTypePolicy, output_dtype: str | None, root: Any, decision: Decision
) -> None:
    base, rule, own = base_class(module), rule_of(base_class(module)), author_dtype(module)
    lent = rule.attributes(module, policy) if rule is not None and own is None else {}
    policy = policy if own is None else DTypePolicy(own)
    cls = module_class(
        base,
        policy,
        _hashable(lent, base),
        keeps=frozenset() if rule is None else rule.keeps(lent),
        casts=root is not None or rule is not None or _is_leaf_layer(module),
        output_dtype=output_dtype,
        root=root,
        decision=decision,
    )
    set_class(module, cls)
    for container in own_containers(module):
        if any(isinstance(x, nnx.Param) for x in own_variables(container)):
            set_class(container, container_class(base_class(container), policy))


def _give_states(module: Any, policy: DTypePolicy) -> None:
    """Attaches the scaling states of a quantized product, and detaches those of an earlier one."""
    recipe = recipe_of(policy)
    prefixes = [prefix for value in lent_to(type(module)) for prefix in prefixes_of(value)]
    if recipe is not None and prefixes:
        attach(module, recipe, prefixes)
    else:
        detach(module)


def _hashable(lent: dict[str, Any], base: type) -> tuple[tuple[str, Any], ...]:
    for name, value in lent.items():
        if not isinstance(value, Hashable):
            raise TypeError(
                f"the rule of {base.__name__} lends `{name}` = {value!r}, which is not hashable: "
                "it becomes part of jit's cache key; lend a tuple or a frozen dataclass"
            )
    return tuple(lent.items())


def _is_leaf_layer(module: nnx.Module) -> bool:
    """Whether the module owns parameters and holds no other module.

    One that holds others passes on what it receives, as in Linen: a residual stream that enters a
    scanned block in float32 leaves it in float32.
    """
    return bool(_parameters(module)) and len(_modules(module)) == 1


def _parameters(module: nnx.Module) -> list[nnx.Variable]:
    return [v for v in own_variables(module) if isinstance(v, nnx.Param)]
