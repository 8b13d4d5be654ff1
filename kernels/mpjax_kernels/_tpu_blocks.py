"""The blocks that the Pallas TPU kernels cut their operands into."""

import math
from dataclasses import dataclass

# A kernel may use 16 MiB of VMEM unless it asks for more; this leaves room for what the compiler
# keeps there itself.
_VMEM_BYTES = 12 * 2**20

# 8-bit values are stored in tiles of 32 x 128, and wider ones in tiles that divide those.
SUBLANES, LANES = 32, 128

# Large enough that the matrix unit of a v5e waits for no operand. `terms` must not exceed 1040:
# where the hardware has no int8 product (TPU7x), the compiler makes each block's product one of
# bfloat16 with a float32 sum, and 1040 * 127**2 is the last sum below 2**24 and so exact.
_MOST_ROWS, _MOST_COLUMNS, _MOST_TERMS = 512, 1024, 1024


@dataclass(frozen=True)
class Blocks:
    """The sizes of one step: `[rows, terms] x [terms, columns]`."""

    rows: int
    columns: int
    terms: int


def product_blocks(rows: int, columns: int, terms: int, groups: int = 1) -> Blocks:
    """The blocks of a product of two quantized matrices.

    Args:
        rows: M.
        columns: N.
        terms: K.
        groups: How many scales there are along K; a block never crosses from one to the next.
    """
    per_block = _even(terms, _MOST_TERMS, LANES) if groups == 1 else group_block(terms // groups)
    return Blocks(
        _even(rows, _MOST_ROWS, SUBLANES), _even(columns, _MOST_COLUMNS, LANES), per_block
    )


def fused_blocks(
    rows: int, columns: int, terms: int, groups: int, bytes_per_term: int
) -> Blocks | None:
    """The blocks of a product that holds whole rows of its left operand in VMEM.

    Args:
        rows: M.
        columns: N.
        terms: K.
        groups: How many scales there are along K.
        bytes_per_term: The bytes of an entry of the left operand before it is quantized.

    Returns:
        The blocks, or None if not even a few whole rows fit.
    """
    blocks = product_blocks(rows, columns, terms, groups)
    most = blocks.rows
    while _fused_bytes(blocks, terms, bytes_per_term) > _VMEM_BYTES:
        most = (most // 2) // SUBLANES * SUBLANES
        if most == 0:
            return None
        blocks = Blocks(_even(rows, most, SUBLANES), blocks.columns, blocks.terms)
    return blocks


def group_block(group: int) -> int:
    """The largest block of terms, in whole lanes, that divides a group of them."""
    lanes = group // LANES
    return LANES * max(n for n in range(1, _MOST_TERMS // LANES + 1) if lanes % n == 0)


def _fused_bytes(blocks: Blocks, terms: int, bytes_per_term: int) -> int:
    width = math.ceil(terms / blocks.terms) * blocks.terms
    left = blocks.rows * width * (2 * bytes_per_term + 1)  # two buffers, and the quantized rows
    right = 2 * blocks.terms * blocks.columns
    result = blocks.rows * blocks.columns * 4 * 3  # two buffers and the accumulator
    return left + right + result


def _even(size: int, most: int, unit: int) -> int:
    """A block that covers `size` in the fewest and then the most even steps of `most`."""
    if size <= unit and unit == SUBLANES:
        return size  # a few rows: a block may always be as large as the array
    steps = math.ceil(size / most)
    return math.ceil(size / steps / unit) * unit
