"""The safetensors format: named arrays in one file, behind a JSON header.

    8 bytes     the length of the header, little-endian
    header      {"__metadata__": {str: str}, name: {"dtype", "shape", "data_offsets"}, ...}
    the rest    the arrays, row-major and little-endian, without gaps

Read and written here, and not by the package of that name: as of 0.8 it gives no float8 to NumPy,
has no int4, needs every array in memory to write them, and takes a name that occurs twice.

What a file says is not trusted: nothing is allocated that the file's length does not bear out.

References:
  https://github.com/huggingface/safetensors#format
"""

import contextlib
import dataclasses
import json
import math
import os
import stat
from collections.abc import Iterator, Mapping
from io import BufferedReader
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from ._file_path import path_of

_MAX_HEADER = 100_000_000  # bytes, the format's own limit
_MAX_RANK = 32
_METADATA = "__metadata__"
_ALIGNMENT = 64  # bytes

# The format's names of dtypes.
DTYPES = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "U16": np.dtype(np.uint16),
    "U32": np.dtype(np.uint32),
    "U64": np.dtype(np.uint64),
    "I8": np.dtype(np.int8),
    "I16": np.dtype(np.int16),
    "I32": np.dtype(np.int32),
    "I64": np.dtype(np.int64),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
    "C64": np.dtype(np.complex64),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E4M3FNUZ": np.dtype(ml_dtypes.float8_e4m3fnuz),
    "F8_E5M2FNUZ": np.dtype(ml_dtypes.float8_e5m2fnuz),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
BY_NAME = {dtype.name: dtype for dtype in DTYPES.values()}


class ModelFileError(ValueError):
    """A file that no model can be loaded from: damaged, foreign, too new, or of another model."""


def damaged(path: Path, why: str) -> ModelFileError:
    """The error for a file that cannot be trusted."""
    return ModelFileError(f"{path} is damaged ({why}): get the file, or save the model, again")


def damaged_header(path: Path, error: Exception) -> ModelFileError:
    """The same, of an error that came up while its header was read."""
    lacks = isinstance(error, KeyError)
    return damaged(path, f"its header lacks {error}" if lacks else f"its header: {error}")


@dataclasses.dataclass(frozen=True)
class Entry:
    """Where an array is in a file.

    Attributes:
      dtype: of the array.
      shape: of the array.
      start: of its bytes, from the beginning of the file.
      stop: of its bytes.
    """

    dtype: np.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclasses.dataclass(frozen=True)
class SafetensorsFile:
    """An open file whose header has been checked.

    Attributes:
      path: of the file.
      entries: its arrays, by name.
      metadata: the text in its header.
    """

    path: Path
    entries: Mapping[str, Entry]
    metadata: Mapping[str, str]
    _file: BufferedReader

    def read(self, name: str) -> np.ndarray:
        """The bytes of an array, uint8 [nbytes]; ModelFileError if the file ends before them."""
        entry = self.entries[name]
        data = _aligned(entry.stop - entry.start)
        self._file.seek(entry.start)
        if self._file.readinto(data.data) != data.size:
            raise damaged(self.path, f"it ends inside {name!r}")
        return data

    def array(self, name: str) -> np.ndarray:
        """An array, of its own dtype and shape."""
        entry = self.entries[name]
        return self.read(name).view(entry.dtype).reshape(entry.shape)

    @property
    def stamp(self) -> tuple[int, ...]:
        """Which file it is, and in which state: it changes when someone writes to it."""
        status = os.fstat(self._file.fileno())
        return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


@contextlib.contextmanager
def open_safetensors(path: str | Path) -> Iterator[SafetensorsFile]:
    """Opens a file and checks its header.

    Raises:
      FileNotFoundError: there is no such file.
      ModelFileError: it is not a safetensors file, or a damaged one.
      TypeError: `path` is no path.
    """
    path = path_of(path)
    if not path.exists():
        raise FileNotFoundError(f"there is no file {path}")
    if not stat.S_ISREG(path.stat().st_mode):  # a pipe would wait for its writer
        kind = "a directory" if path.is_dir() else "not a regular file"
        raise ModelFileError(f"{path} is {kind}: give the path of one file of weights")
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        header, start = _read_header(path, file, size)
        metadata = header.pop(_METADATA, {})
        if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
            raise damaged(path, f"its {_METADATA} is not a dict of texts")
        try:
            entries = {name: _entry(name, each, start) for name, each in header.items()}
            _check_covers(entries, start, size)
        except (KeyError, TypeError, ValueError) as error:
            raise damaged_header(path, error) from error
        yield SafetensorsFile(path, entries, metadata, file)


def _aligned(size: int) -> np.ndarray:
    """Room for so many bytes that JAX, on a CPU, can take as an array without copying it."""
    room = np.empty(size + _ALIGNMENT, np.uint8)
    start = -room.ctypes.data % _ALIGNMENT
    return room[start : start + size]


@contextlib.contextmanager
def reopened(
    path: Path, stamp: tuple[int, ...], entries: Mapping[str, Entry]
) -> Iterator[SafetensorsFile]:
    """Opens a file whose header was checked before.

    Args:
      path: of the file.
      stamp: `SafetensorsFile.stamp`, as it was then.
      entries: the arrays of interest.

    Raises:
      FileNotFoundError: it is gone.
      ModelFileError: it is another file, or has changed.
    """
    with path.open("rb") as file:
        again = SafetensorsFile(path, entries, {}, file)
        if again.stamp != stamp:
            raise damaged(path, "it has changed since it was opened")
        yield again


def encode_header(
    arrays: Mapping[str, tuple[np.dtype, tuple[int, ...]]], metadata: Mapping[str, str]
) -> bytes:
    """What comes before the arrays in a file.

    Args:
      arrays: dtype and shape of each array, in the order in which they are in the file.
      metadata: text of any kind.

    Raises:
      ValueError: there is more to say than the format has room for.
    """
    header: dict[str, Any] = {_METADATA: dict(metadata)}
    start = 0
    for name, (dtype, shape) in arrays.items():
        stop = start + math.prod(shape) * dtype.itemsize
        offsets = [start, stop]
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": offsets}
        start = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the arrays are aligned
    if len(text) > _MAX_HEADER:
        raise ValueError(
            f"the header of {len(arrays)} arrays takes {len(text)} bytes, more than the "
            f"{_MAX_HEADER} of the safetensors format: save the model in parts"
        )
    return len(text).to_bytes(8, "little") + text


def strict_json(text: bytes) -> Any:
    """Parses JSON in UTF-8; ValueError for names that occur twice, NaN, or too deep a nesting."""
    try:
        return json.loads(
            text.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant
        )
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def check_shape(shape: Any) -> tuple[int, ...]:
    """A shape from JSON; ValueError if an array cannot have it."""
    if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape):
        raise ValueError("a shape is not a list of sizes")
    # Beside a 0 any other size takes no bytes, but overflows in whoever multiplies them.
    if len(shape) > _MAX_RANK or math.prod(max(n, 1) for n in shape) >= 2**48:
        raise ValueError("a shape is too large")
    return tuple(shape)


def _read_header(path: Path, file: BufferedReader, size: int) -> tuple[dict[str, Any], int]:
    """The JSON of the header, and where the arrays start."""
    if size == 0:
        raise ModelFileError(f"{path} is empty: get the file, or save the model, again")
    length = int.from_bytes(file.read(8), "little")
    if size < 10 or length > _MAX_HEADER or file.read(1) != b"{":
        raise ModelFileError(
            f"{path} is not a safetensors file, as mpjax.save and others write: it does not start "
            "with a header. Check the path, or get the file again"
        )
    if length > size - 8:
        raise damaged(path, f"it has {size} bytes, fewer than its header of {length}")
    try:
        header = strict_json(b"{" + file.read(length - 1))
    except ValueError as error:
        raise damaged_header(path, error) from error
    return header, 8 + length


def _entry(name: str, json: Any, start: int) -> Entry:
    dtype, shape = json["dtype"], check_shape(json["shape"])
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"{name!r} has the unknown dtype {dtype!r}")
    offsets = json["data_offsets"]
    if not isinstance(offsets, list) or [type(n) for n in offsets] != [int, int]:
        raise ValueError(f"the offsets of {name!r} are not two integers")
    if not 0 <= offsets[0] <= offsets[1]:
        raise ValueError(f"the offsets of {name!r} are {offsets}")
    nbytes = math.prod(shape) * DTYPES[dtype].itemsize
    if offsets[1] - offsets[0] != nbytes:
        raise ValueError(f"{name!r} has {offsets[1] - offsets[0]} bytes, but its shape {nbytes}")
    return Entry(DTYPES[dtype], shape, start + offsets[0], start + offsets[1])


def _check_covers(entries: Mapping[str, Entry], start: int, size: int) -> None:
    """Raises ValueError unless the arrays follow each other from `start` to the end of the file."""
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.start != start:
            raise ValueError(f"{name!r} starts at byte {entry.start}, but should at {start}")
        start = entry.stop
    if start != size:
        raise ValueError(f"the arrays end at byte {start}, the file at {size}")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name occurs twice")
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")
