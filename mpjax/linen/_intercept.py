"""The interceptor: finds each layer's path and policy, casts what enters it, calls its handler.

Floating arguments are cast on entry to the wrapped module and to every layer: a module of a
registered type, or one that owns parameters and holds no other layer. A module of the user's that
holds others passes on what it receives, so that its hand-written arithmetic keeps the dtypes it
would have. Parameters come in the compute dtype everywhere.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn

from .._adapters import output_dtype_at
from .._cast import cast_floating
from .._context import Frame, active
from .._decisions import NONE, Decision, at_path, of_attention, of_author
from .._paths import join
from .._policy import DTypePolicy
from .._policy_map import resolve
from ._handlers import default, handler_of
from ._layer import Layer, author_dtype


@dataclasses.dataclass
class Visits:
    """What one entry into a wrapped model met: path of each module, and who keeps its own dtype.

    Attributes:
      kept: path (relative to the wrapped module) -> whether the author's `dtype=` rules there.
    """

    kept: dict[str, bool] = dataclasses.field(default_factory=dict)


def interceptor(frame: Frame, visits: Visits) -> Callable[..., Any]:
    """The function for `flax.linen.intercept_methods` that puts the frame's policy into force."""

    def intercept(
        call: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        context: nn.module.InterceptorContext,
    ) -> Any:
        module, method = context.module, context.method_name
        if active.value != frame or module.scope is None:
            return call(*args, **kwargs)
        path, policy = _resolve(frame, module.path)
        own = author_dtype(module)
        if path not in visits.kept:
            visits.kept[path] = own is not None
            _observe(frame, join(module.path), DTypePolicy(own) if own else policy)
        if own is not None:
            with of_author(frame.policy, path, own).scope():
                return call(*args, **kwargs)
        layer = Layer(module, method, path, join(module.path), policy)
        # The output of the wrapped module itself (path "") is cast by `_wrap._call`.
        output_dtype = output_dtype_at(frame.policy, path) if path else None
        with _decision(frame, layer).scope():
            return _run(layer, call, args, kwargs, output_dtype)

    return intercept


def _resolve(frame: Frame, full_path: tuple[str, ...]) -> tuple[str, DTypePolicy]:
    """A module's path from the wrapped one, and its policy; the default for one from outside it."""
    inside = full_path[: len(frame.root)] == frame.root
    path = join(full_path[len(frame.root) :] if inside else full_path)
    default_policy = getattr(frame.policy, "default_policy", frame.policy)
    return path, resolve(frame.policy, path) if inside else default_policy


def _decision(frame: Frame, layer: Layer) -> Decision:
    """What the policy decided about the products of a layer; nothing about those of others."""
    if isinstance(layer.module, nn.MultiHeadDotProductAttention):
        return of_attention(frame.policy, layer.path)
    is_layer = handler_of(layer.module) is not None or _is_leaf_layer(layer.module)
    return at_path(frame.policy, layer.path) if is_layer else NONE


def _run(
    layer: Layer,
    call: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    output_dtype: str | None,
) -> Any:
    handler = handler_of(layer.module)
    if layer.method.startswith(("_", "<")) and layer.method != "__call__":
        # A private helper or a lambda gets its arguments as they are.
        return (call if handler else _reading(layer, call))(*args, **kwargs)
    if layer.method == "setup":
        return (handler or default)(layer, call, args, kwargs)
    if handler is None and not _is_leaf_layer(layer.module):
        output = _reading(layer, call)(*args, **kwargs)
    else:
        output = (handler or default)(layer, _casting(layer, call), args, kwargs)
    return output if output_dtype is None else cast_floating(output, output_dtype)


def _reading(layer: Layer, call: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: default(layer, call, args, kwargs)


def _casting(layer: Layer, call: Callable[..., Any]) -> Callable[..., Any]:
    def cast_and_call(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = layer.cast((args, kwargs))
        return call(*args, **kwargs)

    return cast_and_call


def _is_leaf_layer(module: nn.Module) -> bool:
    """Whether the module owns parameters and holds no module that does.

    One that holds others passes on what it receives, so that a residual stream that enters a
    scanned block in float32 leaves it in float32. While a user's own @nn.compact layer is being
    initialized it owns nothing yet.
    """
    params = module.variables.get("params", {})
    return bool(params) and not any(isinstance(x, Mapping) for x in params.values())


def _observe(frame: Frame, full_path: str, policy: DTypePolicy) -> None:
    if frame.observation is not None:
        frame.observation.policies.setdefault(full_path, policy)
