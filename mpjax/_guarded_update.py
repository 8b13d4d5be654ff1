"""A step of an optimizer that happens only if the gradients are finite."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool


def guarded_update(
    optimizer: optax.GradientTransformation,
    finite: Bool[Array, ""],
    grads: Any,
    state: Any,
    params: Any = None,
    **extra_args: Any,
) -> tuple[Any, Any]:
    """Runs `optimizer.update` if `finite`, on the device's word, not the host's.

    Args:
        optimizer: Any optax optimizer.
        finite: bool[], whether the step happens.
        grads: Gradients, unscaled.
        state: The optimizer's state.
        params: The parameters, or None if the optimizer does not need them.
        **extra_args: Passed on if the optimizer takes them.

    Returns:
        `(updates, state)` of the optimizer if `finite`; otherwise zeros of the shapes and dtypes
        of those updates, and `state` bit for bit.
    """
    optimizer = optax.with_extra_args_support(optimizer)

    def step() -> tuple[Any, Any]:
        return optimizer.update(grads, state, params, **extra_args)

    # Updates may have other dtypes than the gradients, and a moment of bfloat16 becomes float32
    # when it first meets a float32 gradient: both branches must return the same types.
    updates, after = jax.eval_shape(step)

    def skip() -> tuple[Any, Any]:
        kept = jax.tree.map(lambda old, new: jnp.asarray(old, new.dtype), state, after)
        return jax.tree.map(jnp.zeros_like, updates), kept

    return jax.lax.cond(finite, step, skip)
