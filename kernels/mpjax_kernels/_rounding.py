"""Rounding float32 numbers to the values of a format."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from ._formats import Format

_EXPONENT_BITS = np.int32(0x7F800000)  # of a float32: no sign, no mantissa
_TWICE_THE_BIAS = np.int32(0x7F000000)  # of the exponent: 2**-n has this less the bits of 2**n


def round_to(
    x: Float[Array, "*shape"],
    format: Format,
    key: Array | None = None,
    lowest: float | None = None,
    cast: Callable[[Array, Format], Array] | None = None,
) -> Shaped[Array, "*shape"]:
    """Rounds finite float32 numbers to values of a format, and saturates.

    Args:
        x: The numbers, in units of the scale.
        format: The format.
        key: None rounds to nearest even. A PRNG key rounds to one of the two neighbouring values,
            to each with the probability that makes `x` the mean.
        lowest: The smallest value to use, if not `-format.max`.
        cast: What converts to the dtype and rounds to nearest even, if not XLA's cast.

    Returns:
        Values of `format.dtype`.
    """
    # Saturating first changes no value, since `max` is one; a cast could overflow.
    x = jnp.clip(x, -format.max if lowest is None else lowest, format.max)
    if key is not None:
        x = _round_stochastically(x, format, key)
    elif format.is_integer:
        x = jnp.round(x)
    if cast is not None:
        return cast(x, format)
    return x.astype(format.dtype)  # this cast rounds to nearest even in a floating format


def round_to_grid(x: Float[Array, "*shape"], format: Format) -> Float[Array, "*shape"]:
    """Rounds finite float32 numbers to nearest even, as if the format had no largest value.

    By arithmetic that is exact on all hardware, so that a cast that rounds otherwise than to
    nearest even, or twice, has nothing left to round.
    """
    step = _step(x, format)
    bits = _TWICE_THE_BIAS - jax.lax.bitcast_convert_type(step, jnp.int32)
    inverse = jax.lax.bitcast_convert_type(bits, jnp.float32)  # exact: a step is a power of two
    return jnp.round(x * inverse) * step


def _round_stochastically(
    x: Float[Array, "*shape"], format: Format, key: Array
) -> Float[Array, "*shape"]:
    step = _step(x, format)
    steps = x / step  # exact, as is all that follows: a step is a power of two
    below = jnp.floor(steps)
    above = jax.random.uniform(key, x.shape, jnp.float32) < steps - below
    return (below + above.astype(jnp.float32)) * step


def _step(x: Float[Array, "*shape"], format: Format) -> Float[Array, "*shape"]:
    """The distance between the two values of the format that enclose x."""
    if format.is_integer:
        return jnp.ones_like(x)
    bits = jax.lax.bitcast_convert_type(x, jnp.int32) & _EXPONENT_BITS
    power = jax.lax.bitcast_convert_type(bits, jnp.float32)  # 2**floor(log2(|x|))
    return jnp.maximum(power * format.epsilon, format.smallest)
