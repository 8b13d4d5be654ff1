"""The cast of a tensor to float8 by native CPU kernels: `native/quantize.cc`.

One call casts by the scale and finds the amax. It gives the bits of `_quantize.py`, whose rules it
follows, but that it keeps subnormal numbers.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from ._formats import Format
from ._native import FORMATS, surroundings_refusal
from ._native_library import native_refusal
from ._native_or import native_or

# Values, scale, amax.
Parts = tuple[Shaped[Array, "*shape"], Float[Array, "*scales"], Float[Array, "*scales"]]


def takes(x: Float[Array, "*shape"], scales: tuple[int, ...], format: Format, key: Any) -> bool:
    """Whether the native kernels cast `x` by a scale of this shape: one, and no noise."""
    if key is not None or any(size != 1 for size in scales) or format.name not in FORMATS:
        return False
    known = x.dtype in (jnp.float32, jnp.bfloat16)
    return known and (native_refusal() or surroundings_refusal(*x.shape)) is None


def quantize_or(
    otherwise: Callable[..., Parts],
    x: Float[Array, "*shape"],
    scale: Float[Array, "*scales"],
    format: Format,
    is_shared: bool,
) -> Parts:
    """Quantizes by one scale, that of the amax where it is 0; or by `otherwise(x, scale)`.

    Args:
        otherwise: Hashable; used where a program cannot have native calls.
        x: float32 or bfloat16.
        scale: float32, with a size of 1 along each axis.
        format: E4M3 or E5M2.
        is_shared: Whether all entries of an axis that `jax.vmap` maps share a scale that it does
            not map. Native kernels do not compute that.
    """
    one = jax.ShapeDtypeStruct(scale.shape, jnp.float32)
    results = jax.ShapeDtypeStruct(x.shape, format.dtype), one, one
    values, known, amax = native_or(
        _Call(format), otherwise, results, x, scale, all_mapped=is_shared
    )
    return values, known, amax


@dataclass(frozen=True)
class _Call:
    format: Format

    def __call__(self, x: Float[Array, "*shape"], scale: Float[Array, "*scales"]) -> Parts:
        one = jax.ShapeDtypeStruct((), jnp.float32)
        results = jax.ShapeDtypeStruct(x.shape, self.format.dtype), one, one
        call = jax.ffi.ffi_call("mpjax_float8_quantize", results, vmap_method="broadcast_all")
        values, known, amax = call(x, scale.reshape(()))
        return values, known.reshape(scale.shape), amax.reshape(scale.shape)
