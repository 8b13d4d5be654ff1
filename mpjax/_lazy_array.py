"""An array that is still in a file, and what the rest of the library may ask of it."""

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class LazyArray:
    """An array in a file of weights, which is read whenever `read` is called.

    Attributes:
      name: in the file.
      shape: of the array.
      dtype: of the array.
      read: reads it, a NumPy array of that shape and dtype; raises `ModelFileError`.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """The bytes it takes once it is read."""
        return self.size * self.dtype.itemsize

    def __repr__(self) -> str:
        return f"LazyArray({self.name!r}, {self.dtype.name}{list(self.shape)})"


def in_memory(leaf: Any) -> Any:
    """A leaf with its numbers: a `LazyArray` is read, anything else is what it is."""
    return leaf.read() if isinstance(leaf, LazyArray) else leaf


def is_lazy(tree: Any) -> bool:
    """Whether a tree has a `LazyArray` in it."""
    return any(isinstance(leaf, LazyArray) for leaf in jax.tree.leaves(tree))


def on_device(leaf: Any) -> Any:
    """A `LazyArray` read and put on the default device, or in memory if JAX lacks its dtype."""
    return to_devices(leaf.read(), None) if isinstance(leaf, LazyArray) else leaf


def to_devices(array: np.ndarray, sharding: Any) -> Any:
    """An array on its devices; as it is, if JAX has no such dtype at present."""
    if jax.dtypes.canonicalize_dtype(array.dtype) != array.dtype:
        return array
    # Waited for, so that no two arrays are on the host at once.
    return jax.block_until_ready(jax.device_put(array, sharding))


def abstract(tree: Any) -> Any:
    """A tree with a `jax.ShapeDtypeStruct` in place of every `LazyArray`."""

    def shape_of(leaf: Any) -> Any:
        if not isinstance(leaf, LazyArray):
            return leaf
        return jax.ShapeDtypeStruct(leaf.shape, jax.dtypes.canonicalize_dtype(leaf.dtype))

    return jax.tree.map(shape_of, tree)


def nested(leaves: Iterable[tuple[str, LazyArray]], separator: str) -> dict[str, Any]:
    """Nested dicts of leaves whose names are paths.

    Raises:
      ValueError: one name is the beginning of another, or has an empty part.
    """
    tree: dict[str, Any] = {}
    for name, leaf in leaves:
        *folders, last = name.split(separator)
        if not all((*folders, last)):
            raise ValueError(f"the name {name!r} has an empty part between its {separator!r}")
        node = tree
        for part in folders:
            node = node.setdefault(part, {})
            if not isinstance(node, dict):
                break
        if not isinstance(node, dict) or last in node:
            raise ValueError(f"{name!r} and another name lead through each other")
        node[last] = leaf
    return tree
