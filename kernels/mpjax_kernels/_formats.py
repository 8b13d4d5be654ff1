"""The number formats a tensor can be quantized to."""

from dataclasses import dataclass

import jax
import numpy as np


@jax.tree_util.register_static
@dataclass(frozen=True)
class Format:
    """A storage format: `x ~ values * scale` with `|values| <= max`.

    Attributes:
        name: What users type, e.g. `"int8"`.
        dtype: The dtype that `values` are stored in.
        max: The largest magnitude a value may take. `scale = amax / max`.
    """

    name: str
    dtype: np.dtype
    max: float


# -128 is left out: a range symmetric about zero needs no zero point, so a product of two
# int8 tensors is one integer dot and one rescale, without correction terms.
int8 = Format("int8", np.dtype(np.int8), 127.0)

_FORMATS = {f.name: f for f in (int8,)}


def get_format(format: str | Format) -> Format:
    """Returns the format of that name; a `Format` is returned as it is.

    Raises:
        ValueError: If no format has that name.
    """
    if isinstance(format, Format):
        return format
    if format not in _FORMATS:
        raise ValueError(f"unknown `format` {format!r}: known formats are {sorted(_FORMATS)}")
    return _FORMATS[format]
