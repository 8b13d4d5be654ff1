"""The leaves of a checkpoint: from arrays of any kind to plain ones, and back bit for bit."""

import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def plain(leaf: Any) -> Any:
    """A leaf as an array that Orbax stores: random keys as their data, numbers as arrays."""
    if _is_key(leaf):
        return jax.random.key_data(leaf)
    return leaf if isinstance(leaf, jax.Array) else np.asarray(leaf)


def checksum(array: Any) -> int | None:
    """CRC-32 of the bytes of an array, in row-major order."""
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        return None
    return zlib.crc32(np.asarray(array).tobytes())


def sharding_to_restore(template: Any) -> Any:
    """The sharding that Orbax is to restore a leaf to, or None for an array on the host."""
    return None if _is_key(template) else committed(template)


def restored(array: Any, template: Any) -> Any:
    """A leaf of the template's type, on its devices.

    Args:
      array: what was stored: a NumPy array, or one with the template's sharding already; None for
        a leaf without elements.
      template: the leaf of the template.
    """
    on_device = isinstance(template, jax.Array | jax.ShapeDtypeStruct)
    if array is None:
        return jnp.empty(template.shape, template.dtype) if on_device else template
    if _is_key(template):
        impl = jax.random.key_impl(jnp.empty((), template.dtype))
        keys = jax.random.wrap_key_data(jnp.asarray(array), impl=impl)
        sharding = committed(template)
        return keys if sharding is None else jax.device_put(keys, sharding)
    if on_device:
        return jnp.asarray(array)
    if isinstance(template, np.ndarray):
        return np.asarray(array)
    return array[()] if isinstance(template, np.generic) else array.item()


def committed(template: Any) -> Any:
    """The sharding of an array that is bound to its devices; None for any other leaf."""
    if isinstance(template, jax.ShapeDtypeStruct):
        return template.sharding
    # An array that jit may move must stay one: committed to its device, it would not go together
    # with others that are sharded over several.
    return template.sharding if isinstance(template, jax.Array) and template.committed else None


def _is_key(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
