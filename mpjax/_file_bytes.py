"""Arrays as the bytes that a file of weights holds, and back."""

import zlib
from typing import Any

import jax
import ml_dtypes
import numpy as np

from ._file_header import ArrayRecord
from ._safetensors import SafetensorsFile, damaged


def to_bytes(array: Any) -> np.ndarray:
    """The bytes that are stored of an array, uint8 [nbytes]."""
    # An array on a device keeps the copy on the host that NumPy was given; of a copy, both go.
    host = np.asarray(array.copy() if isinstance(array, jax.Array) else array)
    if host.dtype.byteorder == ">":
        host = host.astype(host.dtype.newbyteorder("<"))
    if host.dtype == ml_dtypes.int4:
        return _pack(host.reshape(-1))
    return np.ascontiguousarray(host).reshape(-1).view(np.uint8)


def read_array(file: SafetensorsFile, record: ArrayRecord) -> np.ndarray:
    """An array from a file.

    Raises:
      ModelFileError: its bytes are not those that were saved.
    """
    data = file.read(record.name)
    if zlib.crc32(data.data) != record.crc32:
        raise damaged(file.path, f"the bytes of {record.name!r} have changed since it was saved")
    if record.is_packed:
        return _unpack(data, record.shape)
    dtype, shape = record.stored
    return data.view(dtype).reshape(shape)


def _pack(values: np.ndarray) -> np.ndarray:
    """int4 [n] to uint8 [ceil(n / 2)]: the first of two in the low bits."""
    nibbles = np.zeros(values.size + values.size % 2, np.uint8)
    nibbles[: values.size] = values.astype(np.int8).view(np.uint8) & 0xF
    return nibbles[::2] | nibbles[1::2] << 4


def _unpack(data: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """uint8 [ceil(n / 2)] to int4 of a shape of n values."""
    nibbles = np.stack([data & 0xF, data >> 4], axis=-1).reshape(-1).view(np.int8)
    signed = (nibbles ^ 8) - 8  # two's complement of 4 bits
    return signed[: int(np.prod(shape, dtype=np.int64))].astype(ml_dtypes.int4).reshape(shape)
