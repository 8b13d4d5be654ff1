"""The products of attention by native CPU kernels: `native/attention.cc`.

One call reads keys or values as a cache holds them, multiplies and sums in float32, whatever their
dtype, and rounds once.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ._derivative import linear_in_arrays
from ._native import surroundings_refusal
from ._native_library import INT8, REALS, native_refusal
from ._native_or import native_or
from ._qtensor import QTensor

_FORMATS = ("int8", "float8_e4m3fn")

Product = Callable[[Array, "Array | QTensor"], Array]


def takes(queried: Array, cached: Array | QTensor, dtype: np.dtype) -> bool:
    """Whether the native kernels multiply these."""
    known = _FORMATS if isinstance(cached, QTensor) else REALS
    name = cached.format.name if isinstance(cached, QTensor) else cached.dtype.name
    if name not in known or not {queried.dtype.name, dtype.name}.issubset(REALS):
        return False
    return not (surroundings_refusal(*queried.shape, *cached.shape) or native_refusal(INT8[0]))


def product_or(
    otherwise: Product,
    call: str,
    result: jax.ShapeDtypeStruct,
    queried: Float[Array, "*queried"],
    cached: Float[Array, "*batch length heads depth"] | QTensor,
) -> Array:
    """The product by a native call; or by `otherwise(queried, cached)`, whose derivative it has.

    A program that is differentiated has the latter alone, whose products a policy of
    `jax.checkpoint` knows.

    Args:
        otherwise: Hashable; used where a program cannot have native calls.
        call: Its name.
        result: Shape and dtype of the product.
        queried: A query, or weights.
        cached: Keys or values.
    """
    native = _Native(call, tuple(result.shape), jnp.dtype(result.dtype))
    product = linear_in_arrays(partial(_product, native, otherwise), otherwise, otherwise)
    return product(queried, cached)


def _product(
    native: "_Native", otherwise: Product, queried: Array, cached: Array | QTensor
) -> Array:
    if isinstance(cached, QTensor):
        values, scale, dtype = cached.values, cached.scale[..., 0], cached.dtype
    else:
        of_no_positions = (*cached.shape[:-3], 0, cached.shape[-2])
        values, scale, dtype = cached, jnp.zeros(of_no_positions, jnp.float32), None
    result = jax.ShapeDtypeStruct(native.shape, native.dtype)
    operands = queried, values, scale
    return native_or(native, _Otherwise(otherwise, dtype), (result,), *operands)[0]


@dataclass(frozen=True)
class _Native:
    call: str
    shape: tuple[int, ...]
    dtype: np.dtype

    def __call__(self, queried: Array, values: Array, scale: Array) -> tuple[Array]:
        result = jax.ShapeDtypeStruct(self.shape, self.dtype)
        product = jax.ffi.ffi_call(self.call, result, vmap_method="expand_dims")
        return (product(queried, values, scale),)


@dataclass(frozen=True)
class _Otherwise:
    product: Product
    dtype: Any  # the logical one of a QTensor; None for an array

    def __call__(self, queried: Array, values: Array, scale: Array) -> tuple[Array]:
        if self.dtype is None:
            return (self.product(queried, values),)
        return (self.product(queried, QTensor(values, scale[..., None], self.dtype)),)
