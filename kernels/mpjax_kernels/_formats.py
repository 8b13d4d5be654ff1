"""The number formats a tensor can be quantized to."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np


@jax.tree_util.register_static
@dataclass(frozen=True)
class Format:
    """A storage format: `x ~ values * scale` with `|values| <= max`.

    Every format rounds to nearest even, or stochastically where `quantize` is given a key, and
    then saturates: a value beyond `max` becomes `max`, never Inf and never NaN.

    The values of an integer format are the integers. Those of a floating one lie `epsilon * 2**e`
    apart between `2**e` and `2**(e + 1)`, and no closer than `smallest`.

    Attributes:
        name: What users type, e.g. `"int8"`.
        dtype: The dtype that `values` are stored in.
        bits: The bits that a value takes.
        max: The largest magnitude a value may take. `scale = amax / max`.
        epsilon: The distance from 1 to the next value.
        smallest: The smallest positive value, in a floating format a subnormal number.
    """

    name: str
    dtype: np.dtype
    bits: int
    max: float
    epsilon: float = 1.0
    smallest: float = 1.0

    @property
    def is_integer(self) -> bool:
        """Whether the values are integers."""
        return jnp.issubdtype(self.dtype, jnp.integer)

    @property
    def lowest(self) -> float:
        """The smallest value beside a zero point: -128 of int8, -8 of int4."""
        return -self.max - 1 if self.is_integer else -self.max


# Without a zero point, -128 and -8 are left out: a range symmetric about zero makes a
# product of two integer tensors one integer dot and one rescale, without correction terms.
int8 = Format("int8", jnp.dtype(jnp.int8), 8, 127.0)
int4 = Format("int4", jnp.dtype(jnp.int4), 4, 7.0)

# Micikevicius et al., FP8 Formats for Deep Learning, 2022, https://arxiv.org/abs/2209.05433
float8_e4m3fn = Format(
    "float8_e4m3fn", jnp.dtype(jnp.float8_e4m3fn), 8, 448.0, epsilon=2.0**-3, smallest=2.0**-9
)
float8_e5m2 = Format(
    "float8_e5m2", jnp.dtype(jnp.float8_e5m2), 8, 57344.0, epsilon=2.0**-2, smallest=2.0**-16
)

# The pair of some AMD GPUs: no Inf, no negative zero, one more exponent at the small end.
# Noune et al., 8-bit Numerical Formats for Deep Neural Networks, 2022,
# https://arxiv.org/abs/2206.02915
float8_e4m3fnuz = Format(
    "float8_e4m3fnuz", jnp.dtype(jnp.float8_e4m3fnuz), 8, 240.0, epsilon=2.0**-3, smallest=2.0**-10
)
float8_e5m2fnuz = Format(
    "float8_e5m2fnuz",
    jnp.dtype(jnp.float8_e5m2fnuz),
    8,
    57344.0,
    epsilon=2.0**-2,
    smallest=2.0**-17,
)

FORMATS = {
    f.name: f for f in (int8, int4, float8_e4m3fn, float8_e5m2, float8_e4m3fnuz, float8_e5m2fnuz)
}


FormatLike = str | Format | np.dtype | type


def get_format(format: FormatLike) -> Format:
    """Returns the format of that name; a `Format` is returned as it is.

    Args:
        format: A name such as `"int8"`, a `Format`, or the dtype of one: `jnp.int8`,
            `np.dtype("int8")`.

    Raises:
        TypeError: If it is none of these.
        ValueError: If no format has that name or dtype.
    """
    if isinstance(format, Format):
        return format
    if not isinstance(format, FormatLike):
        raise TypeError(
            f"`format` must be a name, a dtype or a Format, got {format!r}: "
            f"known formats are {sorted(FORMATS)}"
        )
    name = format if isinstance(format, str) else np.dtype(format).name
    if name not in FORMATS:
        raise ValueError(f"unknown `format` {format!r}: known formats are {sorted(FORMATS)}")
    return FORMATS[name]
