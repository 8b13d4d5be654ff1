"""The cast of a tensor to float8 or int8 by native CPU kernels: `native/quantize.cc`.

One call casts by a scale, or by one for each row, and finds the amaxes. It gives the bits of
`_quantize.py`, whose rules it follows, but that it keeps subnormal numbers.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from ._formats import Format
from ._native import surroundings_refusal
from ._native_library import FLOAT8, INT8, REALS, native_refusal
from ._native_or import native_or

# Values, scale, amax.
Parts = tuple[Shaped[Array, "*shape"], Float[Array, "*scales"], Float[Array, "*scales"]]


# XLA casts shorter rows in vectors across them.
_SHORTEST_ROW = 16


def takes(x: Float[Array, "*shape"], scales: tuple[int, ...], format: Format, key: Any) -> bool:
    """Whether the native kernels cast `x` by scales of this shape: one or, to int8, one per row.

    A row is what its last axes hold, one or several. Nothing casts with noise.
    """
    if key is not None or format.name not in FLOAT8 + INT8:
        return False
    if format.name in FLOAT8 and any(size != 1 for size in scales):
        return False
    if x.dtype.name not in REALS or surroundings_refusal(*x.shape):
        return False
    lead = 0
    while lead < x.ndim and scales[lead] == x.shape[lead]:
        lead += 1
    in_rows = all(size == 1 for size in scales[lead:])
    in_rows = in_rows and (math.prod(scales) == 1 or math.prod(x.shape[lead:]) >= _SHORTEST_ROW)
    return in_rows and native_refusal(format.name) is None


def dynamic_or(
    otherwise: Callable[..., tuple[Array, Array]],
    x: Float[Array, "*shape"],
    scales: tuple[int, ...],
    format: Format,
) -> tuple[Shaped[Array, "*shape"], Float[Array, "*scales"]]:
    """Quantizes by scales of this shape, from the amaxes of `x`; or by `otherwise(x)`.

    Args:
        otherwise: Hashable; used where a program cannot have native calls.
        x: float32, bfloat16 or float16.
        scales: The shape of the scales.
        format: The format.
    """
    found = jax.ShapeDtypeStruct(scales, jnp.float32)
    results = jax.ShapeDtypeStruct(x.shape, format.dtype), found
    values, scale = native_or(_Dynamic(_Call(format), scales), otherwise, results, x)
    return values, scale


def quantize_or(
    otherwise: Callable[..., Parts],
    x: Float[Array, "*shape"],
    scale: Float[Array, "*scales"],
    format: Format,
    is_shared: bool,
) -> Parts:
    """Quantizes by a scale, that of the amax where it is 0; or by `otherwise(x, scale)`.

    Args:
        otherwise: Hashable; used where a program cannot have native calls.
        x: float32, bfloat16 or float16.
        scale: float32, of a shape that `takes` says is taken.
        format: The format.
        is_shared: Whether all entries of an axis that `jax.vmap` maps share a scale that it does
            not map. Native kernels do not compute that.
    """
    each = jax.ShapeDtypeStruct(scale.shape, jnp.float32)
    results = jax.ShapeDtypeStruct(x.shape, format.dtype), each, each
    values, known, amax = native_or(
        _Call(format), otherwise, results, x, scale, all_mapped=is_shared
    )
    return values, known, amax


@dataclass(frozen=True)
class _Call:
    format: Format

    def __call__(self, x: Float[Array, "*shape"], scale: Float[Array, "*scales"]) -> Parts:
        each = jax.ShapeDtypeStruct((scale.size,), jnp.float32)
        results = jax.ShapeDtypeStruct(x.shape, self.format.dtype), each, each
        call = jax.ffi.ffi_call("mpjax_quantize", results, vmap_method="broadcast_all")
        values, known, amax = call(x, scale.reshape(-1))
        return values, known.reshape(scale.shape), amax.reshape(scale.shape)


@dataclass(frozen=True)
class _Dynamic:
    call: _Call
    scales: tuple[int, ...]

    def __call__(self, x: Float[Array, "*shape"]) -> tuple[Array, Array]:
        values, scale, _ = self.call(x, jnp.zeros(self.scales, jnp.float32))
        return values, scale
