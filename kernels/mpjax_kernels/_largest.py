"""Maxima in which what is not finite stays visible.

XLA:CPU computes a maximum of more than some thousand floats by a library that loses NaN, and
devices lose it where they compare theirs. A sum loses none: `x - x` is 0, or NaN for an infinity
and for a NaN. (`x * 0` would be too, but XLA keeps an array of zeros for it.)
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

Axis = int | tuple[int, ...] | None


def largest(
    x: Float[Array, "*shape"], axis: Axis, *, keepdims: bool = False
) -> Float[Array, "..."]:
    """The largest `|x|` along axes: NaN where an entry is not finite, 0 where there is none."""
    # A maximum has no first value to start from that costs nothing: XLA computes one more maximum.
    initial = None if x.size else 0.0
    amax = jnp.max(jnp.abs(x), axis=axis, keepdims=keepdims, initial=initial)
    return amax + zero_or_nan(x, axis, keepdims=keepdims)


def zero_or_nan(
    x: Float[Array, "*shape"], axis: Axis = None, *, keepdims: bool = False
) -> Float[Array, "..."]:
    """0 along axes, or NaN where an entry is not finite."""
    return jnp.sum(x - x, axis=axis, keepdims=keepdims)


def largest_of_devices(
    amax: Float[Array, "*shape"], axis_names: Sequence[str]
) -> Float[Array, "*shape"]:
    """The largest of non-negative numbers along axes of a mesh; NaN if one is NaN.

    As integers, which order them as their size, and a NaN above all others.
    """
    bits = jax.lax.bitcast_convert_type(amax, jnp.int32) & np.int32(0x7FFFFFFF)
    return jax.lax.bitcast_convert_type(jax.lax.pmax(bits, tuple(axis_names)), jnp.float32)
