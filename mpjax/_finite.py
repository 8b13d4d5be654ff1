"""Which batches a calibration statistic takes in: those that are finite, and not all zero."""

import dataclasses
from typing import TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

State = TypeVar("State")


def amax_of(x: Float[Array, "..."]) -> Float[Array, ""]:
    """The largest |x| in float32: 0 of an empty array; NaN or infinite if an entry is."""
    # As integers, which order positive floats as their size, and a NaN above all of them: on CPUs
    # the maximum that XLA computes of many floats loses a NaN.
    bits = jax.lax.bitcast_convert_type(jnp.abs(x.astype(jnp.float32)), jnp.int32)
    return jax.lax.bitcast_convert_type(jnp.max(bits, initial=0), jnp.float32)


def choose(amax: Float[Array, ""], after: State, before: State) -> State:
    """The state `after` a batch, if it told anything; else that `before` it.

    A batch that is empty or all zero changes nothing. One with a NaN or an infinity only sets
    `finite` to False, for good.

    Args:
      amax: float32 [], the largest |x| of the batch.
      after: a dataclass with a field `finite`, which is not looked at.
      before: the same.
    """
    finite = jnp.isfinite(amax)
    useful = finite & (amax > 0)
    chosen = jax.tree.map(lambda new, old: jnp.where(useful, new, old), after, before)
    return dataclasses.replace(chosen, finite=before.finite & finite)  # pyright: ignore


def nan_unless(finite: Bool[Array, ""], x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """`x`, or NaN throughout."""
    return jnp.where(finite, x, jnp.nan)
