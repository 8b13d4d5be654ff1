"""Casting the floating leaves of a tree, and only those."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ._prescaled import is_stored


def is_floating(x: Any) -> bool:
    """Whether `x` is an array (JAX or NumPy, scalars included) of a real floating dtype."""
    return isinstance(x, jax.Array | np.ndarray | np.generic) and jnp.issubdtype(
        x.dtype, jnp.floating
    )


def cast_array(x: Any, dtype: Any) -> Any:
    """`x` as `dtype` if it is a floating array of another dtype, else `x` itself."""
    if is_floating(x) and x.dtype != dtype:
        return jnp.asarray(x).astype(dtype)
    return x


def in_dtypes_of(value: Any, stored: Any) -> Any:
    """`value` with its floats in the dtypes of `stored`, where the two trees correspond."""
    if jax.tree.structure(value) != jax.tree.structure(stored):
        return value
    return jax.tree.map(
        lambda new, old: cast_array(new, old.dtype) if is_floating(old) else new, value, stored
    )


def cast_floating(tree: Any, dtype: Any, *, is_leaf: Callable[[Any], bool] | None = None) -> Any:
    """Casts every floating array leaf of `tree` to `dtype`.

    Integers, bools, PRNG keys, complex numbers, stored weights and everything that is not an array
    pass untouched, and an array that already has the dtype is the same object.

    Args:
      tree: any pytree.
      dtype: a floating dtype or its name.
      is_leaf: further objects not to look into (Flax NNX objects are pytrees, for instance).

    Returns:
      A tree of the same structure.
    """
    dtype = jnp.dtype(dtype)

    def stop(x: Any) -> bool:
        return is_stored(x) or (is_leaf is not None and is_leaf(x))

    return jax.tree.map(lambda x: cast_array(x, dtype), tree, is_leaf=stop)
