"""float8 numbers from their bits, in integer arithmetic that CPUs vectorize."""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int8

from ._formats import Format


def from_bits(
    bits: Int8[Array, "*shape"], format: Format, dtype: DTypeLike
) -> Float[Array, "*shape"]:
    """The finite numbers that bit patterns stand for, in bfloat16 or a wider dtype; exact.

    E4M3 has a form of its own, a fifth faster than XLA's conversion, which goes through float16
    and float32; the other formats take XLA's.
    """
    if format.name == "float8_e4m3fn":
        return _from_e4m3(bits).astype(dtype)
    return jax.lax.bitcast_convert_type(bits, format.dtype).astype(dtype)


def _from_e4m3(bits: Int8[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Moves the three mantissa bits up by four and adds the difference of the exponent biases.

    The magnitudes 0 to 7 are subnormal, `m * 2**-9`. They are normal in bfloat16, so each takes
    the exponent of its leading bit: with `m = 2**p + f`, `f << (7 - p)` is the mantissa and
    `p - 9 + 127` the exponent. Multiplying a subnormal bfloat16 instead would not do: XLA:CPU
    flushes those to zero.
    """
    wide = bits.astype(jnp.int16)
    magnitude, sign = wide & _i16(0x7F), wide & _i16(-0x8000)
    normal = (magnitude << 4) + _exponent(127 - 7)
    # The leading bit of `magnitude << (7 - p)` is bit 7, and adds one to the exponent.
    subnormal = jnp.where(
        magnitude >= 4,
        (magnitude << 5) + _exponent(127 - 9 + 2 - 1),
        jnp.where(magnitude >= 2, (magnitude << 6) + _exponent(127 - 9 + 1 - 1), _one(magnitude)),
    )
    result = jnp.where(magnitude >= 8, normal, subnormal)
    return jax.lax.bitcast_convert_type(result | sign, jnp.bfloat16)


def _one(magnitude: Array) -> Array:
    return magnitude * _exponent(127 - 9)  # 2**-9 or, for a magnitude of zero, zero


def _exponent(biased: int) -> Array:
    return _i16(biased << 7)


def _i16(x: int) -> Array:
    return jnp.int16(x)
