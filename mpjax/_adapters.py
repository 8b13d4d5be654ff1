"""What the Linen and the NNX adapter share."""

import inspect
from typing import Any

import jax.numpy as jnp

from ._policy import DTypePolicy
from ._policy_map import resolve

# Names of class attributes of the dynamic subclasses that both adapters make.
BASE, POLICY, ROOT, STRICT = (f"__mpjax_{name}__" for name in ("base", "policy", "root", "strict"))


class PolicyAttribute:
    """Reads as the wrapped model's policy; an attribute `policy` of the user's own wins.

    Having no `__set__`, it gives way to an instance attribute of the same name.
    """

    nowrap = True  # Flax leaves it alone

    def __init__(self, policy: Any):
        self._policy = policy

    def __get__(self, obj: Any, owner: type | None = None) -> Any:
        return self if obj is None else self._policy


def floating_name(dtype: Any) -> str | None:
    """The name of a floating dtype that a layer was given by `dtype=`; None for anything else."""
    try:
        named = jnp.dtype(dtype) if dtype is not None else None
    except TypeError:  # a `dtype` attribute of another meaning, such as "image"
        return None
    return named.name if named is not None and jnp.issubdtype(named, jnp.inexact) else None


def takes_self(function: Any) -> bool:
    """Whether a class attribute is a method: a function, or what `jit` or `remat` made of one."""
    plain = not isinstance(function, type | staticmethod | classmethod | property)
    return plain and callable(function) and hasattr(function, "__get__")


def refuse_if_suspended(method: Any) -> None:
    """Raises for a generator or a coroutine, whose body runs when the policy no longer does."""
    inner = inspect.unwrap(method)
    if (
        inspect.isgeneratorfunction(inner)
        or inspect.iscoroutinefunction(inner)
        or inspect.isasyncgenfunction(inner)
    ):
        raise NotImplementedError(
            f"`{inner.__qualname__}` is a generator or a coroutine: its body runs after the call "
            "has returned, where no policy reaches it. Let it call a method that is neither"
        )


def is_half(policy: DTypePolicy) -> bool:
    """Whether the policy computes in fewer bits than float32."""
    return jnp.dtype(policy.compute_dtype).itemsize < 4


def output_dtype_at(policy: Any, path: str) -> str | None:
    """The dtype to cast the output of the module at `path` to, or None to leave it.

    The wrapped module's own output (`path == ""`) follows the policy, or a map's default; inside
    it, only a layer that a map names does. Where `output_dtype` is the compute dtype nothing is
    cast: layers return it by themselves, and a model may widen its logits on purpose.
    """
    resolved = resolve(policy, path)
    default = getattr(policy, "default_policy", policy)
    if resolved is default and path != "":
        return None
    return None if resolved.output_dtype == resolved.compute_dtype else resolved.output_dtype


def no_effect_message(model: str, paths: list[str]) -> str:
    """The warning for a model whose author set `dtype=` on every layer."""
    return (
        f"the policy of {model} changes nothing: its author set `dtype=` on every layer "
        f"({', '.join(repr(path) for path in paths[:5])}), and a layer's own dtype wins. Build the "
        "model with dtype=None to let the policy choose"
    )
