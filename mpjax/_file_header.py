"""The header of a file that `mpjax.save` wrote: what it holds, and checksums to believe it by.

It is JSON inside the metadata of a safetensors header, beside a checksum of its own:

    {"version": 1, "mpjax": "0.1.0", "policy": {...} or null, "leaves": [
        {"path": ["params", "Dense_0", "kernel"], "kind": "qtensor", "static": {...},
         "arrays": {"values": {"name": "params/Dense_0/kernel", "dtype": "int8",
                               "shape": [8, 4], "crc32": "9ae0daaf"}, "scale": {...}}}]}

A dtype and shape are those of the array as it is in memory. int4 is stored as bytes, two values to
a byte, the first in the low bits.
"""

import dataclasses
import json
import math
import zlib
from collections.abc import Iterable, Mapping
from typing import Any, Self

import jax
import ml_dtypes
import numpy as np

from ._file_leaves import LeafParts, put_together
from ._safetensors import (
    BY_NAME,
    ModelFileError,
    SafetensorsFile,
    check_shape,
    damaged,
    damaged_header,
    strict_json,
)

VERSION = 3
# The version that first had a kind of leaf, or something static of it; others are of version 1.
_SINCE = {"prescaled": 2, "tiles": 3}
MAX_DEPTH = 64  # of nested dicts; JAX recurses over them
Key = str | int
_HEADER, _CRC32 = "mpjax", "mpjax_crc32"
_INT4 = np.dtype(ml_dtypes.int4)
_BY_NAME = {**BY_NAME, _INT4.name: _INT4}


@dataclasses.dataclass(frozen=True)
class ArrayRecord:
    """An array of a leaf.

    Attributes:
      name: in the safetensors file.
      dtype: its name.
      shape: of the array.
      crc32: of the bytes that are stored.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    crc32: int = 0

    @property
    def is_packed(self) -> bool:
        """Whether two values are stored to a byte."""
        return self.dtype == _INT4.name

    @property
    def stored(self) -> tuple[np.dtype, tuple[int, ...]]:
        """Dtype and shape of what is stored."""
        if self.is_packed:
            return np.dtype(np.uint8), (-(-math.prod(self.shape) // 2),)
        return _BY_NAME[self.dtype], self.shape

    @property
    def abstract(self) -> jax.ShapeDtypeStruct:
        """Shape and dtype for JAX."""
        return jax.ShapeDtypeStruct(self.shape, _BY_NAME[self.dtype])


@dataclasses.dataclass(frozen=True)
class LeafRecord:
    """A leaf: where it is in the tree, what it is, and its arrays.

    Attributes:
      path: keys of the nested dicts.
      kind, static: as in `LeafParts`.
      arrays: by the name of the part.
    """

    path: tuple[Key, ...]
    kind: str
    static: Mapping[str, Any]
    arrays: Mapping[str, ArrayRecord]

    @property
    def abstract(self) -> Any:
        """The leaf with a `jax.ShapeDtypeStruct` in place of every array."""
        arrays = {part: record.abstract for part, record in self.arrays.items()}
        return put_together(LeafParts(self.kind, self.static, arrays))

    def without_tiles(self) -> "LeafRecord":
        """The same leaf, in no tiles."""
        if not self.static.get("tiles"):
            return self
        q = self.abstract
        shape = tuple(q.shape[axis] for axis in q.stored_axes)
        arrays = {**self.arrays, "values": dataclasses.replace(self.arrays["values"], shape=shape)}
        static = {name: value for name, value in self.static.items() if name != "tiles"}
        return dataclasses.replace(self, static=static, arrays=arrays)


@dataclasses.dataclass(frozen=True)
class Header:
    """What a file holds.

    Attributes:
      mpjax: the version that wrote it.
      policy: as `mpjax.serialize` gave it; None if the file was saved without.
      leaves: in the order of the tree.
    """

    mpjax: str
    policy: dict[str, Any] | None
    leaves: tuple[LeafRecord, ...]

    @property
    def arrays(self) -> list[ArrayRecord]:
        """Every array in the file, the widest dtypes first, so that each is aligned to its own."""
        arrays = [array for leaf in self.leaves for array in leaf.arrays.values()]
        return sorted(arrays, key=lambda array: -array.stored[0].itemsize)

    def to_metadata(self) -> dict[str, str]:
        """The header as text; its length does not depend on the checksums."""
        leaves = [
            {
                "path": leaf.path,
                "kind": leaf.kind,
                "static": dict(leaf.static),
                "arrays": {part: _to_json(array) for part, array in leaf.arrays.items()},
            }
            for leaf in self.leaves
        ]
        # The oldest that can hold it, so that an older mpjax reads what it can.
        names = (name for leaf in self.leaves for name in (leaf.kind, *leaf.static))
        version = max((_SINCE.get(name, 1) for name in names), default=1)
        content = {"version": version, "mpjax": self.mpjax, "policy": self.policy, "leaves": leaves}
        text = json.dumps(content, separators=(",", ":"), allow_nan=False)
        return {_HEADER: text, _CRC32: f"{zlib.crc32(text.encode()):08x}"}

    @classmethod
    def of(cls, file: SafetensorsFile) -> Self:
        """The header of an open file.

        Raises:
          ModelFileError: mpjax did not write the file, or a newer version did, or it is damaged.
        """
        content = _content(file)
        try:
            policy = content["policy"]
            if policy is not None and not isinstance(policy, dict):
                raise TypeError("the policy is no dict")
            leaves = tuple(_leaf(each) for each in content["leaves"])
            nest((leaf.path, None) for leaf in leaves)
            _check_stored(leaves, file)
            return cls(str(content["mpjax"]), policy, leaves)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise damaged_header(file.path, error) from error


def nest(leaves: Iterable[tuple[tuple[Key, ...], Any]]) -> dict[Key, Any]:
    """Nested dicts of leaves by path; ValueError if one path leads through another's leaf."""
    tree: dict[Key, Any] = {}
    ends: set[tuple[Key, ...]] = set()
    for path, leaf in leaves:
        node = tree
        for depth, key in enumerate(path[:-1], 1):
            if path[:depth] in ends:
                raise ValueError(f"two leaves are at {path[:depth]}")
            node = node.setdefault(key, {})
        if path[-1] in node:
            raise ValueError(f"two leaves are at {path}")
        node[path[-1]] = leaf
        ends.add(path)
    return tree


def was_saved_by_mpjax(file: SafetensorsFile) -> bool:
    """Whether `mpjax.save` wrote the file."""
    return _HEADER in file.metadata


def _content(file: SafetensorsFile) -> dict[str, Any]:
    """The JSON of the header, of a version that can be read."""
    if not was_saved_by_mpjax(file):
        raise ModelFileError(
            f"{file.path} is a safetensors file that mpjax.save did not write: read it with "
            "mpjax.load_safetensors"
        )
    text = file.metadata[_HEADER].encode("utf-8", "surrogatepass")
    if file.metadata.get(_CRC32) != f"{zlib.crc32(text):08x}":
        raise damaged(file.path, "its header has changed since it was saved")
    try:
        content = strict_json(text)
        version, by = content["version"], content["mpjax"]
    except (KeyError, TypeError, ValueError) as error:
        raise damaged_header(file.path, error) from error
    if type(version) is not int or version < 1:
        raise damaged(file.path, f"its version is {version!r}")
    if version > VERSION:
        raise ModelFileError(
            f"{file.path} was saved by mpjax {by} in version {version} of the format, and this "
            f"mpjax reads up to version {VERSION}: upgrade it, or save the model with this one"
        )
    return content


def _to_json(array: ArrayRecord) -> dict[str, Any]:
    return {**dataclasses.asdict(array), "crc32": f"{array.crc32:08x}"}


def _leaf(json: Any) -> LeafRecord:
    path = json["path"]
    if not isinstance(path, list) or not 1 <= len(path) <= MAX_DEPTH:
        raise ValueError("a path is not a list of keys, or too long")
    if not all(type(key) in (str, int) for key in path):
        raise ValueError("a key in a path is neither a text nor an integer")
    arrays = {part: _array(each) for part, each in json["arrays"].items()}
    record = LeafRecord(tuple(path), json["kind"], dict(json["static"]), arrays)
    _ = record.abstract  # raises if the parts make no leaf
    return record


def _array(json: Any) -> ArrayRecord:
    record = ArrayRecord(json["name"], json["dtype"], check_shape(json["shape"]))
    if record.dtype not in _BY_NAME:
        raise ValueError(f"{record.name!r} has the unknown dtype {record.dtype!r}")
    return dataclasses.replace(record, crc32=int(json["crc32"], 16))


def _check_stored(leaves: Iterable[LeafRecord], file: SafetensorsFile) -> None:
    """Raises ValueError unless the leaves are made of all the arrays of the file, each once."""
    arrays = [array for leaf in leaves for array in leaf.arrays.values()]
    if sorted(array.name for array in arrays) != sorted(file.entries):
        raise ValueError("the arrays in the file are not those that it lists")
    for array in arrays:
        entry = file.entries[array.name]
        if (entry.dtype, entry.shape) != array.stored:
            raise ValueError(f"{array.name!r} is {entry.dtype} {entry.shape}, not {array.stored}")
