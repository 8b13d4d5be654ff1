"""float8 numbers to and from their bits, in integer arithmetic that CPUs vectorize."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int8, Shaped

from ._cpu_memory import in_memory
from ._formats import Format

# Those whose zero has a sign.
_SIGNED_ZERO = ("float8_e4m3fn", "float8_e5m2")


@partial(jax.jit, static_argnames="format")
def cast(x: Float[Array, "*shape"], format: Format) -> Shaped[Array, "*shape"]:
    """float32 numbers within the range of a format as `x.astype(format.dtype)`, bit for bit.

    XLA:CPU converts to float8 three to five times slower than this adds integers.
    """
    if format.name not in _SIGNED_ZERO:
        return _kept(x.astype(format.dtype))
    return jax.lax.platform_dependent(
        x,
        cpu=partial(_to_float8, format=format),
        default=lambda y: _kept(y.astype(format.dtype)),
    )


def _kept(x: Shaped[Array, "*shape"]) -> Shaped[Array, "*shape"]:
    """An array that is rounded to its dtype wherever it is used.

    XLA takes a conversion to float8 and back for excess precision, and leaves both out
    (`xla_allow_excess_precision`): what is quantized and dequantized in one program would be the
    array as it was.
    """
    return jax.lax.optimization_barrier(x)


def _to_float8(x: Float[Array, "*shape"], format: Format) -> Shaped[Array, "*shape"]:
    """Rounds the mantissa to nearest even, and moves it down to where the format has it.

    Half of the last place that is kept, less one bit if that is even, and the cut after it round;
    a carry out of the mantissa adds one to the exponent, as it should. Subnormal numbers are the
    multiples of `smallest`, which is the last place of `smallest * 2**23`: the sum with that has
    them as its last bits, rounded by the addition.
    """
    mantissa = round(-np.log2(format.epsilon))
    drop = 23 - mantissa
    least = format.smallest / format.epsilon  # the smallest normal number
    exponent = 127 + round(np.log2(least)) - 1  # what the exponents of the two differ by
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    magnitude = bits & _i32(0x7FFFFFFF)
    odd = (magnitude >> _i32(drop)) & _i32(1)
    rounded = (magnitude + (odd + _i32(2 ** (drop - 1) - 1))) >> _i32(drop)
    shift = np.float32(format.smallest * 2**23)
    shifted = jax.lax.bitcast_convert_type(magnitude, jnp.float32) + shift
    subnormal = jax.lax.bitcast_convert_type(shifted, jnp.int32)  # bits above the last 8 go
    normal = rounded - _i32(exponent << mantissa)
    is_normal = magnitude >= _i32((exponent + 1) << 23)
    sign = (bits >> _i32(24)) & _i32(0x80)
    result = (jax.lax.select(is_normal, normal, subnormal) | sign) & _i32(0xFF)
    values = jax.lax.bitcast_convert_type(result.astype(jnp.uint8), format.dtype)
    return in_memory(values)


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
    select = jax.lax.select
    subnormal = select(
        magnitude >= 4,
        (magnitude << 5) + _exponent(127 - 9 + 2 - 1),
        select(magnitude >= 2, (magnitude << 6) + _exponent(127 - 9 + 1 - 1), _one(magnitude)),
    )
    result = select(magnitude >= 8, normal, subnormal)
    return jax.lax.bitcast_convert_type(result | sign, jnp.bfloat16)


def _one(magnitude: Array) -> Array:
    return magnitude * _exponent(127 - 9)  # 2**-9 or, for a magnitude of zero, zero


def _exponent(biased: int) -> Array:
    return _i16(biased << 7)


def _i16(x: int) -> Array:
    return jnp.int16(x)


def _i32(x: int) -> np.int32:
    return np.int32(x)
