"""A few rows of floating numbers as integers of 23 bits, in three digits of int8.

XLA:CPU has no fast product of one row of bfloat16 or float32 by an int8 weight: it decodes the
weight first. But its int8 product is fast and has room for more rows at little cost, so one row
can be three: `x ~ (65536 a + 256 b + c) * scale`, each of a, b, c a row of int8.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int8, Int32

from ._largest import largest

# A sum of more products of a digit (up to 128) and a weight (up to 127) can overflow int32.
MOST_TERMS = (2**31 - 1) // (128 * 127)

_EXPONENT_BITS = np.int32(0x7F800000)  # of a float32: no sign, no mantissa
_TINY = np.float32(2.0**-105)  # the least power for which the scale is a normal number


def digits(
    x: Float[Array, "batch rows terms"],
) -> tuple[Int8[Array, "batch 3*rows terms"], Float[Array, "batch rows 1"]]:
    """All rows of high digits, all of middle and all of low ones; and the scale of each row.

    The scale is a power of two, so all that the integers can hold is exact: a bfloat16 number from
    `2**-14` of the largest of its row, any multiple of the scale. With `2**e <= amax < 2**(e+1)`::

        scale = 2**(e - 21), or 2**-126 if that is more
        |x - (65536 a + 256 b + c) * scale| <= scale / 2 <= amax * 2**-22, or 2**-127

    The scale is NaN where the row is not finite, and its digits are zero.
    """
    x = x.astype(jnp.float32)
    amax = largest(x, 2, keepdims=True)
    bits = jax.lax.bitcast_convert_type(amax, jnp.int32) & _EXPONENT_BITS
    power = jnp.maximum(jax.lax.bitcast_convert_type(bits, jnp.float32), _TINY)
    finite = jnp.isfinite(amax)
    scale = jnp.where(finite, power * 2.0**-21, jnp.nan)
    integers = jnp.round(jnp.where(finite, x / scale, 0.0)).astype(jnp.int32)
    rest, low = _split(integers)
    high, middle = _split(rest)
    return jnp.concatenate([high, middle, low], axis=1).astype(jnp.int8), scale


def recombine(
    sums: Int32[Array, "batch 3*rows columns"],
) -> Float[Array, "batch rows columns"]:
    """`65536 a + 256 b + c` of the products of the digits, in float32."""
    high, middle, low = jnp.split(sums.astype(jnp.float32), 3, axis=1)
    return (high * 65536.0 + middle * 256.0) + low


def _split(x: Int32[Array, "*shape"]) -> tuple[Int32[Array, "*shape"], Int32[Array, "*shape"]]:
    """`x = 256 * rest + digit` with a digit from -128 to 127."""
    digit = ((x + 128) & 255) - 128
    return (x - digit) >> 8, digit
