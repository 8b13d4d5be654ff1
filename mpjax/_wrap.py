"""`wrap` and `unwrap`: the front door, which sends a module to the adapter of its Flax API."""

import importlib
import sys
import textwrap
from types import ModuleType
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from ._policy import DTypePolicy
from ._policy_map import FrozenDTypePolicyMap, resolve_on
from ._serialize import get_policy
from ._target import Target

M = TypeVar("M")


def wrap(
    module: M,
    policy: Any = None,
    *,
    strict: bool = True,
    target: str | Target | None = None,
    when: str = "always",
) -> M:
    """Puts a Flax module under a dtype policy, without a change to the module's code.

    Every layer inside follows the policy of its path: floating arguments, and parameters where the
    layer reads them, are cast to the policy's compute dtype; the parameters themselves stay in the
    variable dtype, and so do their gradients. Under a quantized policy the products of Dense,
    DenseGeneral, Einsum and attention projections run in 8 bits (see `quantize`).

    Names, shapes and treedef of the parameters and the call signature are the module's own. A layer
    whose author set `dtype=`, and a layer that was wrapped by itself, keep their dtype.

    Args:
      module: a `flax.linen.Module` that is not bound, or a `flax.nnx.Module`. A wrapped module gets
        the new policy in place of the old one. NNX: wrap before `nnx.jit`, `nnx.grad` and the like,
        which want a module that they were given to keep its class.
      policy: anything `get_policy` takes: a policy, its name, a config, a dtype, a `DTypePolicyMap`
        from layer paths to policies. None is the global policy, `dtype_policy()`, as it is now:
        later changes to it, or to the map, do not reach the wrapped module.
      strict: False makes a map key that matches no layer a warning instead of an error.
      target: the hardware that the model is for, see `resolve_target`; None is the device at hand.
        Only `"auto8"` policies and `when="profitable"` ask for it.
      when: `"always"`, or `"profitable"`: a layer stays in its source precision where quantizing
        its operands would cost more time on the target than 8 bits save, by a roofline of its
        shapes (see `mpjax.roofline`). Weights that are quantized already stay quantized.

    Returns:
      Linen: a new module whose class is a subclass of the module's, with the frozen policy as
      `.policy`. NNX: the same object, changed in place; no weight is copied.

    Raises:
      TypeError: `module` is neither a Linen nor an NNX module.
      ValueError: the policy computes in a dtype that is not floating, or needs `jax_enable_x64`;
        the target or `when` is unknown; or, for NNX, the policy has a map key that reaches no
        layer (Linen tells at `init`, `apply`, `quantize`).

    References:
      Keras mixed precision policies, https://keras.io/api/mixed_precision/policy/
    """
    adapter = adapter_of(module)
    if isinstance(policy, dict) and "class_name" not in policy:
        raise ValueError(
            f"`policy` is a dict without 'class_name': {textwrap.shorten(repr(policy), 120)}. For "
            "policies by layer path, give a map and its default: "
            "mp.DTypePolicyMap('mixed_bfloat16', {...})"
        )
    frozen = resolve_on(get_policy(policy), target, when)
    for each in policies_of(frozen):
        _check_dtypes(each)
    return adapter.wrap(module, frozen, strict=strict)


def unwrap(module: M) -> M:
    """Takes the policy off a module again.

    Args:
      module: a wrapped Linen module, or a wrapped NNX module, which is changed in place. Modules
        inside that were wrapped by themselves stay wrapped.

    Returns:
      Linen: a module of the original class. NNX: the same object, its classes as they were. Weights
      that `quantize` replaced stay quantized: take `nnx.clone(model)` before it to keep the floats.

    Raises:
      TypeError: `module` is neither a Linen nor an NNX module.
      ValueError: `module` is not wrapped.
    """
    return wrapped_adapter_of(module).unwrap(module)


def adapter_of(module: Any) -> ModuleType:
    """`mpjax.linen._adapter` or `mpjax.nnx._adapter`; raises TypeError for any other object."""
    for api in ("linen", "nnx"):
        flax_api = sys.modules.get(f"flax.{api}")  # an instance exists only once it is imported
        if flax_api is not None and isinstance(module, flax_api.Module):
            return importlib.import_module(f"mpjax.{api}._adapter")
    hint = ""
    if isinstance(module, type):
        hint = f"; that is a class: pass an instance, {module.__name__}(...)"
    raise TypeError(
        "`module` must be a flax.linen.Module or a flax.nnx.Module, but got "
        f"{textwrap.shorten(repr(module), 120)} of type {type(module).__name__}{hint}"
    )


def wrapped_adapter_of(module: Any) -> ModuleType:
    """`adapter_of`, for a module that must be wrapped."""
    adapter = adapter_of(module)
    if not adapter.is_wrapped(module):
        raise ValueError(
            f"{type(module).__name__} is not wrapped: call `mp.wrap(module, policy)` first"
        )
    return adapter


def policies_of(policy: Any) -> tuple[DTypePolicy, ...]:
    """The one policy, or a map's default and values."""
    if isinstance(policy, FrozenDTypePolicyMap):
        return (policy.default_policy, *policy.values())
    return (policy,)


def _check_dtypes(policy: DTypePolicy) -> None:
    for role in ("compute", "variable", "output"):
        dtype = getattr(policy, f"{role}_dtype")
        if not jnp.issubdtype(jnp.dtype(dtype), jnp.floating) or jnp.dtype(dtype).itemsize < 2:
            raise ValueError(
                f"policy {policy!r} has {role} dtype {dtype}: a module can only be wrapped with "
                "floating-point policies of 16 bits or more, such as 'mixed_bfloat16'; for 8 bits "
                "use a quantized policy, such as 'int8_from_mixed_bfloat16'"
            )
        if dtype == "float64" and not jax.config.read("jax_enable_x64"):
            raise ValueError(
                f"policy {policy!r} has {role} dtype float64, which JAX turns into float32 unless "
                "the flag jax_enable_x64 is set: call jax.config.update('jax_enable_x64', True) "
                "at startup"
            )
