"""The scales that others give a quantized weight, as those of a QTensor."""

import math

import numpy as np

BLOCK_SIZE = 128


def scale_like(
    scale: np.ndarray, shape: tuple[int, ...], *, blocks: bool, block_size: int | None
) -> np.ndarray:
    """A scale or zero point with the rank of its weight, and a divisor of its size on each axis.

        scale         weight       what shares a scale
        [], [1]       [out, in]    everything
        [out]         [out, in]    an output channel
        [out, 1]      [out, in]    an output channel
        [out, n]      [out, in]    in / n neighbors of an output channel
        [m, n]        [out, in]    a block, where m = ceil(out / block_size), and n likewise

    More leading axes stand for a stack of weights. A block at the edge may be smaller, and then
    its axis gets scales for `gcd(size, block_size)` entries each, repeated.

    Args:
      scale: of one of these shapes.
      shape: of the weight.
      blocks: whether the last two axes are cut in blocks in any case.
      block_size: None: 128, unless groups of another size fit as well.

    Raises:
      ValueError: the shape is another one, or has two meanings.
    """
    ndim = len(shape)
    if scale.size == 1:
        return scale.reshape((1,) * ndim)
    if not blocks and scale.shape == shape[: scale.ndim]:
        scale = scale.reshape(scale.shape + (1,) * (ndim - scale.ndim))
    counts = scale.shape
    if len(counts) != ndim or ndim < 2:
        raise ValueError(_misfit(counts, shape))
    cut = [axis for axis in range(ndim) if counts[axis] not in (1, shape[axis])]
    if blocks or len(cut) > 1:
        cut = [ndim - 2, ndim - 1]
        blocks = True
    if any(counts[a] not in (1, shape[a]) for a in range(ndim) if a not in cut):
        raise ValueError(_misfit(counts, shape))
    for axis in cut:
        scale = _cut(scale, axis, shape, blocks, block_size)
    return scale


def _cut(
    scale: np.ndarray, axis: int, shape: tuple[int, ...], blocks: bool, block_size: int | None
) -> np.ndarray:
    """`scale` with as many entries along an axis as divide it."""
    size, count, block = shape[axis], scale.shape[axis], block_size or BLOCK_SIZE
    is_block = count == -(-size // block)
    is_group = not blocks and size % count == 0 and block_size in (None, size // count)
    if size % block == 0 or count == 1:
        is_group |= is_block
    elif is_block and is_group:
        raise ValueError(
            f"a scale of shape {scale.shape} for a weight {shape} may mean groups of "
            f"{size // count} or blocks of {block}: pass block_size={size // count} or {block}"
        )
    elif is_block:
        each = math.gcd(size, block)
        return np.repeat(scale, block // each, axis)[(slice(None),) * axis + (slice(size // each),)]
    if not is_group:
        raise ValueError(_misfit(scale.shape, shape, block))
    return scale


def _misfit(counts: tuple[int, ...], shape: tuple[int, ...], block: int = BLOCK_SIZE) -> str:
    return (
        f"a scale of shape {counts} does not fit a weight {shape}: it should be one number, one "
        f"per output channel or group, or one per block of {block} x {block} (see block_size=)"
    )
