"""Shapes as XLA prints them: `bf16[64,1024]{1,0:T(8,128)(2,1)S(1)}`.

In braces stand the axes from the fastest, then the tiles (`T`) that an axis is padded to, and the
memory space (`S`). No space is the accelerator's main memory; 1 is a TPU's VMEM.
"""

import dataclasses
import functools
import math
import re

MAIN_MEMORY = 0

# Bits of a value; `pred` is stored as a byte.
_BITS = {"pred": 8, "token": 0, "opaque": 0}
# XLA's names of those that our users know by another.
_NAMES = {
    "s": "int",
    "u": "uint",
    "f": "float",
    "bf": "bfloat",
    "c": "complex",
    "f8": "float8_",
    "f4": "float4_",
}


@dataclasses.dataclass(frozen=True)
class Shape:
    """One array of a program.

    Attributes:
      dtype: XLA's name of it, `"bf16"`.
      dims: the lengths of its axes.
      order: the axes from the one that changes fastest.
      tile: what the last axes (as stored) are padded to multiples of.
      space: the memory space; 0 is main memory.
    """

    dtype: str
    dims: tuple[int, ...]
    order: tuple[int, ...] = ()
    tile: tuple[int, ...] = ()
    space: int = MAIN_MEMORY

    @property
    def size(self) -> int:
        """The number of values."""
        return math.prod(self.dims)

    @property
    def bits(self) -> int:
        """Of one value."""
        return bits_of(self.dtype)

    @property
    def bytes(self) -> int:
        """Of the values alone."""
        return math.ceil(self.size * self.bits / 8)

    @property
    def padded_bytes(self) -> int:
        """Of the values as they lie in memory, whole tiles."""
        stored = [self.dims[axis] for axis in reversed(self.order)] or list(self.dims)
        tile = self.tile[-len(stored) :] if stored else ()
        for i in range(1, len(tile) + 1):
            stored[-i] = math.ceil(stored[-i] / tile[-i]) * tile[-i]
        return math.ceil(math.prod(stored) * self.bits / 8)


@functools.cache
def bits_of(dtype: str) -> int:
    """Bits of one value of a dtype, by XLA's name of it."""
    if dtype in _BITS:
        return _BITS[dtype]
    found = re.match(r"[a-z]+(\d+)", dtype)
    if found is None:
        raise ValueError(f"an XLA program has a dtype {dtype!r}, of which the size is not known")
    return int(found[1])


def dtype_name(dtype: str) -> str:
    """JAX' name of a dtype: `"int8"` for `s8`, `"float8_e4m3fn"` for `f8e4m3fn`."""
    if dtype == "pred":
        return "bool"
    narrow = re.fullmatch(r"(f8|f4)(e\w+)", dtype)
    found = narrow or re.fullmatch(r"(s|u|f|bf|c)(\d+)", dtype)
    return f"{_NAMES[found[1]]}{found[2]}" if found else dtype


_ARRAY = re.compile(r"([a-z][a-z0-9]*)\[([^\]]*)\](?:\{([^}]*)\})?")


def shapes_in(text: str) -> tuple[Shape, ...]:
    """The arrays of a printed shape, those of a tuple one after the other."""
    return tuple(_shape(*found) for found in _ARRAY.findall(text))


def _shape(dtype: str, dims: str, layout: str) -> Shape:
    order, _, marks = layout.partition(":")
    tile = re.match(r"T\(([\d,]+)\)", marks)
    space = re.search(r"S\((\d+)\)", marks)
    return Shape(
        dtype,
        # `<=8` is an axis of a length known at run time only: its bound.
        tuple(int(length.strip().removeprefix("<=")) for length in dims.split(",") if length),
        tuple(int(axis) for axis in order.split(",") if axis.strip()),
        tuple(map(int, tile[1].split(","))) if tile else (),
        int(space[1]) if space else MAIN_MEMORY,
    )
