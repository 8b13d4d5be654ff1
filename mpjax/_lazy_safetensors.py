"""Safetensors files as trees of arrays that are read one by one.

one file           "model.safetensors"
a set of them      "model.safetensors.index.json", {"weight_map": {name: file beside it}}
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import jax.numpy as jnp
import numpy as np

from ._file_bytes import read_array
from ._file_header import ArrayRecord, Header, nest, was_saved_by_mpjax
from ._file_leaves import LeafParts, put_together
from ._lazy_array import LazyArray, nested
from ._paths import join
from ._safetensors import (
    Entry,
    ModelFileError,
    SafetensorsFile,
    damaged,
    damaged_header,
    open_safetensors,
    reopened,
    strict_json,
)

INDEX = ".index.json"


def open_files(path: Path, separator: str | None) -> dict[str, Any]:
    """The tree of a file or, by their index, of several.

    Raises:
      FileNotFoundError, ModelFileError: as `mpjax.open_weights`.
    """
    if path.name.endswith(INDEX):
        leaves = _of_index(path)
    else:
        with open_safetensors(path) as file:
            if was_saved_by_mpjax(file):
                return _of_mpjax(file)
            leaves = dict(_of_file(file))
    if separator is None:
        separator = "/" if any("/" in name for name in leaves) else "."
    try:
        return nested(leaves.items(), separator)
    except ValueError as error:
        raise ModelFileError(f"the names in {path} make no tree: {error}") from None


def _of_file(file: SafetensorsFile) -> Iterator[tuple[str, LazyArray]]:
    for name, entry in file.entries.items():
        yield name, LazyArray(name, entry.shape, entry.dtype, _Read.of(file, name))


def _of_index(path: Path) -> dict[str, LazyArray]:
    """The arrays of the files that an index lists, each where the index says."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        where = strict_json(path.read_bytes())["weight_map"]
        if not all(isinstance(file, str) and Path(file).name == file for file in where.values()):
            raise ValueError("a file of it is not beside it")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise damaged_header(path, error) from error
    leaves = {}
    for each in dict.fromkeys(where.values()):
        with open_safetensors(path.parent / each) as file:
            if was_saved_by_mpjax(file):
                raise ModelFileError(f"{file.path} is a file of mpjax.save: open it by itself")
            found = dict(_of_file(file))
        listed = {name for name, file in where.items() if file == each}
        if listed != set(found):
            odd = sorted(listed ^ set(found))[0]
            where_it_is = "lacks" if odd in listed else "has, and its index does not list,"
            raise damaged(path.parent / each, f"it {where_it_is} {odd!r}")
        leaves |= found
    return leaves


def _of_mpjax(file: SafetensorsFile) -> dict[Any, Any]:
    """The tree of a file of float weights that `mpjax.save` wrote, with its checksums.

    Scaling states and random keys, which are small, are in it as they are.
    """
    leaves = []
    for leaf in Header.of(file).leaves:
        if leaf.kind == "qtensor":
            raise ModelFileError(
                f"{file.path} holds '{join(leaf.path)}' quantized already: load it with mpjax.load"
            )
        lazy = {part: _of_record(file, record) for part, record in leaf.arrays.items()}
        if leaf.kind == "array":
            leaves.append((leaf.path, lazy["value"]))
            continue
        arrays = {part: jnp.asarray(array.read()) for part, array in lazy.items()}
        leaves.append((leaf.path, put_together(LeafParts(leaf.kind, leaf.static, arrays))))
    return nest(leaves)


def _of_record(file: SafetensorsFile, record: ArrayRecord) -> LazyArray:
    dtype = record.abstract.dtype
    return LazyArray(record.name, record.shape, dtype, _Read.of(file, record.name, record))


@dataclasses.dataclass(frozen=True)
class _Read:
    """Reads one array of a file that was opened before, if it is still that file."""

    path: Path
    stamp: tuple[int, ...]
    name: str
    entry: Entry
    record: ArrayRecord | None

    @classmethod
    def of(cls, file: SafetensorsFile, name: str, record: ArrayRecord | None = None) -> Self:
        return cls(file.path, file.stamp, name, file.entries[name], record)

    def __call__(self) -> np.ndarray:
        with reopened(self.path, self.stamp, {self.name: self.entry}) as file:
            return file.array(self.name) if self.record is None else read_array(file, self.record)
