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
    # A choice of values and not of branches: on GPUs a branch waits for the host to read `finite`.
    optimizer = optax.with_extra_args_support(optimizer)
    updates, after = optimizer.update(grads, state, params, **extra_args)
    # A moment of bfloat16 becomes float32 when it first meets a float32 gradient.
    kept = jax.tree.map(lambda new, old: jnp.where(finite, new, old), after, state)
    return jax.tree.map(lambda x: jnp.where(finite, x, jnp.zeros_like(x)), updates), kept
