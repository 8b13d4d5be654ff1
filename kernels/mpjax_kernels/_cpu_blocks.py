"""Products that decode the larger operand block by block, so that it stays small in memory.

A decoded weight takes two to eight times the memory of the stored one, and more time to write,
read and allocate than the product itself: a 4096 x 4096 float8 weight times one row takes XLA:CPU
27 ms with 64 MiB of temporary memory, and 2 ms with 1 MiB in blocks that stay in the cache.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Shaped

from ._cpu_matrices import Matrices
from ._float8_bits import from_bits
from ._qtensor import QTensor
from ._varying import vary_like

# The bytes of a decoded block. Where there are many rows the product takes most of the time, and
# it is faster with larger blocks.
_FEW_ROWS, _BLOCK, _LARGE_BLOCK = 128, 2**20, 2**23
_LEAST = 8  # a block has at least this part of them, or is larger


def is_one_block(many: Array | QTensor, rows: int, dtype: np.dtype) -> bool:
    """Whether an operand is decoded at once beside one of so many rows."""
    return many.size * dtype.itemsize <= _most(rows)


def decoded_dot(
    few: Shaped[Array, "batch rows terms"], many: Matrices
) -> Shaped[Array, "batch rows columns"]:
    """`few` times an array, summed in float32."""
    axes = ((2,), (2 if many.terms_last else 1,)), ((0,), (0,))
    return jax.lax.dot_general(few, many.values, axes, preferred_element_type=jnp.float32)


def blocked_dot(
    few: Shaped[Array, "batch rows terms"],
    many: Matrices,
    dtype: DTypeLike,
    scaled: bool = False,
) -> Shaped[Array, "batch rows columns"]:
    """`few` times the decoded values of `many`, summed in int32 or float32.

    Args:
        few: The left operand, in the dtype of the products.
        many: The right operand.
        dtype: Of the sums.
        scaled: Whether to multiply the values by their scales.
    """
    rows = few.shape[1]
    if rows == 1 and few.dtype != jnp.float32:
        few = jnp.repeat(few, 2, axis=1)  # XLA has no fast product of a single 8- or 16-bit row
    size = _block_size(many, rows, few.dtype)
    read = partial(_read, many, size=size, dtype=few.dtype, scaled=scaled)
    count = -(-many.values.shape[1] // size)
    step = _by_columns if many.terms_last else _by_terms
    out = vary_like(jnp.zeros((many.batch, few.shape[1], many.free), dtype), few, many.values)
    if many.scale is not None and scaled:
        out = vary_like(out, many.scale, many.zero_point)
    body = partial(step, few=few, many=many, read=read, size=size, count=count)
    out = jax.lax.fori_loop(np.int32(0), np.int32(many.batch * count), body, out)
    return out[:, :rows]


def _by_columns(i, out, few, many, read, size, count):
    b, start = _split(i, count)
    start = jnp.minimum(start * jnp.int32(size), jnp.int32(many.free - size))
    part = _dot(_at(few, b, 0, few.shape[1]), read(b, start), (1, 1), out.dtype)
    return jax.lax.dynamic_update_slice(out, part[None], (b, jnp.int32(0), start))


def _by_terms(i, out, few, many, read, size, count):
    b, start = _split(i, count)
    start = start * jnp.int32(size)
    zero = jnp.int32(0)
    left = jax.lax.dynamic_slice(few, (b, zero, start), (1, few.shape[1], size))[0]
    part = _dot(left, read(b, start), (1, 0), out.dtype)
    total = _at(out, b, 0, out.shape[1]) + part
    return jax.lax.dynamic_update_slice(out, total[None], (b, zero, zero))


def _split(i: Array, count: int) -> tuple[Array, Array]:
    """`i` as the matrix and the block in it, in int32 even where JAX counts in int64."""
    i, blocks = jnp.int32(i), jnp.int32(count)
    return i // blocks, i % blocks


def _dot(left: Array, right: Array, contract: tuple[int, int], dtype: DTypeLike) -> Array:
    axes = ((contract[:1], contract[1:]), ((), ()))
    return jax.lax.dot_general(left, right, axes, preferred_element_type=dtype)


def _block_size(many: Matrices, rows: int, dtype: np.dtype) -> int:
    """How much of axis 1 to decode at once."""
    _, length, width = many.values.shape
    wanted = max(1, _most(rows) // (width * dtype.itemsize))
    if length <= wanted or many.terms_last:
        return min(length, wanted)  # the last block overlaps the one before
    # Terms are added up, so blocks must not overlap, nor hold a part of a group beside another.
    group = 1 if many.scale is None or many.scale.shape[1] == 1 else length // many.scale.shape[1]
    sizes = [n for n in range(1, length + 1) if length % n == 0 and 0 in (n % group, group % n)]
    best = max(n for n in sizes if n <= wanted)
    # A prime number of terms, say, is better decoded at once than one by one.
    return best if best * _LEAST >= wanted else min(n for n in sizes if n > wanted)


def _most(rows: int) -> int:
    return _BLOCK if rows <= _FEW_ROWS else _LARGE_BLOCK


def _read(
    many: Matrices, b: Array, start: Array, size: int, dtype: DTypeLike, scaled: bool
) -> Array:
    """One block in `dtype`: the values, less the zero points, times the scales."""
    # XLA:CPU has no dynamic slice of float8, nor much of int4, and would widen all of the operand
    # before the loop, or copy its bits if it could take the bitcast out of the loop.
    values, start = jax.lax.optimization_barrier((many.values, start))
    if many.format is None or many.format.is_integer:
        block = _at(values, b, start, size).astype(dtype)
    else:
        bits = jax.lax.bitcast_convert_type(values, jnp.int8)
        block = from_bits(_at(bits, b, start, size), many.format, dtype)
    if many.zero_point is not None:
        block, zero_point = _in_groups(many, block, many.zero_point, b, start)
        block = (block - zero_point.astype(dtype)).reshape(size, -1)
    if scaled and many.scale is not None:
        block, scale = _in_groups(many, block, many.scale, b, start)
        block = (block * scale).reshape(size, -1)
    return block


def _in_groups(
    many: Matrices, block: Array, scales: Array, b: Array, start: Array
) -> tuple[Array, Array]:
    """A block with its contracted axis cut into groups, and their scales beside it."""
    size, width = block.shape
    if many.terms_last:
        groups = scales.shape[2]
        return block.reshape(size, groups, width // groups), _at(scales, b, start, size)[:, :, None]
    groups = scales.shape[1]
    if groups == 1:
        return block[None], _at(scales, b, 0, 1)[None]
    group, count = many.terms // groups, max(1, size * groups // many.terms)
    part = _at(scales, b, start // jnp.int32(group), count)
    return block.reshape(count, size // count, width), part[:, None]


def _at(x: Array, b: Array, start: Array | int, size: int) -> Array:
    """`x[b, start : start + size]`."""
    return jax.lax.dynamic_slice(x, (b, jnp.int32(start), jnp.int32(0)), (1, size, x.shape[2]))[0]
