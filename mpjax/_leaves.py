"""The leaves of a pytree as a checkpoint keeps them: by path, as arrays of plain dtypes.

What the file of an array cannot hold is put in a record beside it: that a leaf is an array of
random keys, that it has no elements, and a checksum of its bytes.
"""

import dataclasses
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_ARRAYS = (jax.Array, np.ndarray, np.generic, bool, int, float, complex)


@dataclasses.dataclass(frozen=True)
class Record:
    """What is known of a leaf.

    Attributes:
      shape: of the leaf; an array of random keys counts each key as one element.
      dtype: its name, `"key<fry>"` for random keys.
      checksum: CRC-32 of the bytes, None where no process has them all.
    """

    shape: tuple[int, ...]
    dtype: str
    checksum: int | None = None

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join(map(str, self.shape))}]"

    @property
    def stored(self) -> bool:
        """Whether there is an array to store: Orbax takes none without elements."""
        return 0 not in self.shape

    def fits(self, other: "Record") -> bool:
        """Whether shape and dtype are the same."""
        return (self.shape, self.dtype) == (other.shape, other.dtype)


def by_path(tree: Any) -> dict[str, Any]:
    """The leaves of a tree: `{"variables/params/Dense_0/kernel": ...}`.

    Raises:
      ValueError: two leaves have the same path.
    """
    leaves: dict[str, Any] = {}
    for keys, leaf in jax.tree_util.tree_leaves_with_path(tree):
        path = jax.tree_util.keystr(keys, simple=True, separator="/") or "value"
        if path in leaves:
            raise ValueError(
                f"two leaves have the path '{path}', so a checkpoint could not tell them apart: "
                "rename a key that is a number as well as a string, or has a '/' in it"
            )
        leaves[path] = leaf
    return leaves


def record_of(path: str, leaf: Any) -> Record:
    """The record of a leaf, without a checksum.

    Raises:
      TypeError: the leaf is not an array or a number.
    """
    if not isinstance(leaf, (*_ARRAYS, jax.ShapeDtypeStruct)):
        raise TypeError(
            f"'{path}' is a {type(leaf).__name__}, but a checkpoint holds arrays and numbers only: "
            "keep it as static metadata, or leave it out"
        )
    if not hasattr(leaf, "dtype"):
        leaf = np.asarray(leaf)
    return Record(tuple(leaf.shape), str(leaf.dtype))


def plain(leaf: Any) -> Any:
    """A leaf as an array that Orbax stores: random keys as their data, numbers as arrays."""
    if _is_key(leaf):
        return jax.random.key_data(leaf)
    return leaf if isinstance(leaf, jax.Array) else np.asarray(leaf)


def checksum(array: Any) -> int | None:
    """CRC-32 of the bytes of an array, in row-major order."""
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        return None
    return zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8))


def sharding_to_restore(template: Any) -> Any:
    """The sharding that Orbax is to restore a leaf to, or None for an array on the host."""
    if _is_key(template) or not isinstance(template, jax.Array | jax.ShapeDtypeStruct):
        return None
    # An array that jit may move must stay one: committed to its device, it would not go together
    # with others that are sharded over several.
    return template.sharding if getattr(template, "committed", True) else None


def restored(array: Any, template: Any) -> Any:
    """A leaf from a stored array: of the template's type, on its devices."""
    if _is_key(template):
        keys = jax.random.wrap_key_data(jnp.asarray(array), impl=jax.random.key_impl(template))
        committed = template.sharding if getattr(template, "committed", True) else None
        return keys if committed is None else jax.device_put(keys, committed)
    if isinstance(template, jax.Array | jax.ShapeDtypeStruct):
        return jnp.asarray(array)
    if isinstance(template, np.ndarray):
        return np.asarray(array)
    return array[()] if isinstance(template, np.generic) else array.item()


def differences(saved: Mapping[str, Record], wanted: Mapping[str, Record]) -> Iterator[str]:
    """What a checkpoint and a template do not have in common, one line each."""
    for path in sorted(saved.keys() | wanted.keys()):
        if path not in wanted:
            yield f"{path}: {saved[path]} in the checkpoint, absent from the template"
        elif path not in saved:
            yield f"{path}: absent from the checkpoint, {wanted[path]} in the template"
        elif not saved[path].fits(wanted[path]):
            yield f"{path}: {saved[path]} in the checkpoint, {wanted[path]} in the template"


def _is_key(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
