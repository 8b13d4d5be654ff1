"""What a handler is told about a layer, and how it lends it other attributes for one call."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import errors
from flax.core import meta

from .._adapters import floating_name
from .._cast import cast_floating, in_dtypes_of
from .._context import active
from .._policy import DTypePolicy
from .._prescaled import is_stored


def author_dtype(module: nn.Module) -> str | None:
    """The dtype that the module's author gave it by `dtype=`, by name, or None."""
    fields = {field.name for field in dataclasses.fields(module)}
    return floating_name(getattr(module, "dtype", None)) if "dtype" in fields else None


@dataclasses.dataclass(frozen=True)
class Layer:
    """One call of one method of a bound Linen module inside a wrapped model.

    Attributes:
      module: the bound module; its fields, `param` and `variable` are at the handler's disposal.
      method: name of the method called (`"__call__"`, `"setup"`, `"attend"`, ...).
      path: the module's path from the wrapped module, `"encoder/Dense_0"`.
      full_path: its path from the root of the tree of parameters.
      policy: the policy that the path resolved to.
    """

    module: nn.Module
    method: str
    path: str
    full_path: str
    policy: DTypePolicy

    def cast(self, tree: Any) -> Any:
        """`tree` with its floating arrays in the layer's compute dtype."""
        return cast_floating(tree, self.policy.compute_dtype)

    def param(self, *, keeps: Sequence[str] = ()) -> Callable[..., Any]:
        """A stand-in for `module.param` that follows the policy.

        A parameter created here in float32, Flax's default, is created in the variable dtype
        instead; one that its author created in another dtype keeps it. What is read comes in the
        compute dtype, but for the names in `keeps`; the stored parameter, and so its gradient,
        does not change.
        """

        def param(name: str, init_fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            if self.policy.variable_dtype != "float32":
                init_fn = _initialized_in(self.policy.variable_dtype, init_fn)
            init_fn = self._ordered_as_stored(name, init_fn)
            value = type(self.module).param(self.module, name, init_fn, *args, **kwargs)
            self._check_quantized(name, value)
            self._observe(name, value)
            return value if name in keeps else self.cast(value)

        return param

    def variable(self, *collections: str) -> Callable[..., Any]:
        """A stand-in for `module.variable` that follows the policy in some collections.

        Floats read in the compute dtype there, and are written back in their own.
        """

        def variable(collection: str, name: str, *args: Any, **kwargs: Any) -> Any:
            own = type(self.module).variable(self.module, collection, name, *args, **kwargs)
            if collection not in collections:
                return own
            return _CastVariable(own, self.policy.compute_dtype)

        return variable

    def _ordered_as_stored(self, name: str, init_fn: Callable[..., Any]) -> Callable[..., Any]:
        """Flax compares the shape that `init_fn` gives, and no more, with that of the values."""
        stored = meta.unbox(self.module.get_variable("params", name))
        if not is_stored(stored) or stored.layout is None:
            return init_fn

        def shaped(x: Any) -> Any:
            if x.shape != stored.shape:
                where = f"/{self.full_path}"  # as Flax says it of what has no layout
                raise errors.ScopeParamShapeError(name, where, stored.shape, x.shape)
            return jnp.transpose(x, stored.stored_axes).reshape(stored.values.shape)

        return lambda *args, **kwargs: jax.tree.map(shaped, init_fn(*args, **kwargs))

    def _observe(self, name: str, value: Any) -> None:
        frame = active.value
        if frame is not None and frame.observation is not None:
            ranks = [len(jnp.shape(leaf)) for leaf in jax.tree.leaves(value)]
            path = f"{self.full_path}/{name}" if self.full_path else name
            frame.observation.ranks[path] = max(ranks, default=0)

    def _check_quantized(self, name: str, value: Any) -> None:
        if is_stored(value) and self.policy.quantization_mode is None:
            raise TypeError(
                f"parameter '{name}' of layer '{self.full_path}' is quantized ({value!r}), but the "
                f"layer's policy is {self.policy!r}: apply quantized variables with the model that "
                "`mp.quantize` was given, or wrap this one with the same quantized policy"
            )


class _CastVariable:
    """A Linen variable that reads in another dtype, and is written back in its own."""

    def __init__(self, variable: Any, dtype: str):
        self._variable, self._dtype = variable, dtype

    @property
    def value(self) -> Any:
        return cast_floating(self._variable.value, self._dtype)

    @value.setter
    def value(self, value: Any) -> None:
        self._variable.value = in_dtypes_of(value, self._variable.value)


def _initialized_in(dtype: str, init_fn: Callable[..., Any]) -> Callable[..., Any]:
    def init(*args: Any, **kwargs: Any) -> Any:
        def convert(x: Any) -> Any:
            return x.astype(dtype) if getattr(x, "dtype", None) == jnp.float32 else x

        return jax.tree.map(convert, init_fn(*args, **kwargs))

    return init


@contextlib.contextmanager
def lent(module: nn.Module, **attributes: Any) -> Iterator[None]:
    """Gives a bound module instance other attributes for the length of one call.

    Only the instance that Flax made for this `apply` is touched, never its class.
    """
    before = {name: vars(module)[name] for name in attributes if name in vars(module)}
    for name, value in attributes.items():
        object.__setattr__(module, name, value)
    try:
        yield
    finally:
        for name in attributes:
            if name in before:
                object.__setattr__(module, name, before[name])
            else:
                object.__delattr__(module, name)
