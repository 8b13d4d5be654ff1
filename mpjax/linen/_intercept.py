"""The interceptor: finds each layer's path and policy, casts what enters it, calls its handler.

Floating arguments are cast on entry to the wrapped module and to every layer: a module of a
registered type, or one that owns parameters. A module of the user's that only holds others passes
on what it receives, so that its hand-written arithmetic keeps the dtypes it would have.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from .._adapters import output_dtype_at
from .._cast import cast_floating
from .._context import Frame, active
from .._paths import join
from .._policy import DTypePolicy
from .._policy_map import resolve
from ._handlers import default, handler_of
from ._layer import Layer


@dataclasses.dataclass
class Visits:
    """What one entry into a wrapped model met: path of each module, and who keeps its own dtype.

    Attributes:
      kept: path (relative to the wrapped module) -> whether the author's `dtype=` rules there.
    """

    kept: dict[str, bool] = dataclasses.field(default_factory=dict)


def author_dtype(module: nn.Module) -> str | None:
    """The dtype that the module's author gave it by `dtype=`, by name, or None."""
    fields = {field.name for field in dataclasses.fields(module)}
    dtype = getattr(module, "dtype", None) if "dtype" in fields else None
    return None if dtype is None else jnp.dtype(dtype).name


def interceptor(frame: Frame, visits: Visits) -> Callable[..., Any]:
    """The function for `flax.linen.intercept_methods` that puts the frame's policy into force."""

    def intercept(
        call: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        context: nn.module.InterceptorContext,
    ) -> Any:
        module, method = context.module, context.method_name
        if active.value != frame or module.scope is None or not _is_entry(method):
            return call(*args, **kwargs)
        path = join(module.path[len(frame.root) :])
        policy, own = resolve(frame.policy, path), author_dtype(module)
        if path not in visits.kept:
            visits.kept[path] = own is not None
            _observe(frame, join(module.path), DTypePolicy(own) if own else policy)
        if own is not None:
            return call(*args, **kwargs)
        layer = Layer(module, method, path, join(module.path), policy)
        output_dtype = (
            output_dtype_at(frame.policy, path) if path else None
        )  # see `_wrap._entering`
        return _run(layer, call, args, kwargs, output_dtype)

    return intercept


def _is_entry(method: str) -> bool:
    """Public methods and `setup`; a private helper, or a lambda, gets what its caller has."""
    return method == "__call__" or not method.startswith(("_", "<"))


def _run(
    layer: Layer,
    call: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    output_dtype: str | None,
) -> Any:
    handler = handler_of(layer.module)
    if layer.method == "setup":
        return (handler or default)(layer, call, args, kwargs)
    if handler is not None or _owns_parameters(layer.module):
        output = (handler or default)(layer, _casting(layer, call), args, kwargs)
    else:
        output = default(layer, call, args, kwargs)
    return output if output_dtype is None else cast_floating(output, output_dtype)


def _casting(layer: Layer, call: Callable[..., Any]) -> Callable[..., Any]:
    def cast_and_call(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = layer.cast((args, kwargs))
        return call(*args, **kwargs)

    return cast_and_call


def _owns_parameters(module: nn.Module) -> bool:
    """Whether the module is a layer; one that only holds others leaves what passes through it.

    So a residual stream that enters a scanned block in float32 leaves it in float32. While a user's
    own @nn.compact layer is being initialized this is not known yet, and False.
    """
    return any(not isinstance(x, Mapping) for x in module.variables.get("params", {}).values())


def _observe(frame: Frame, full_path: str, policy: DTypePolicy) -> None:
    if frame.observation is not None:
        frame.observation.policies.setdefault(full_path, policy)
