"""A Pallas TPU kernel: rows of bfloat16 by a weight of integers with a scale per group of terms.

A step multiplies a block of rows by a block of the weight group by group, on the matrix unit. Each
group's product meets its scales as it leaves the unit and is added to the sum in VMEM:

    sum += (x[:, group] @ w[group]) * scale[group]        in float32

XLA makes one pass of it too, but of more instructions, as the schedules of libtpu tell
(`benchmarks/results/tpu_kernels.jsonl`). Where scales do not vary along the contracted axis, we
know of no kernel that is faster than XLA on all chips.
"""

import math
import re
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.export import is_symbolic_dim
from jaxtyping import Array, BFloat16, Float, Int

from ._contraction import Contraction
from ._qtensor import QTensor, describe
from ._storage import spread
from ._tpu_tuned import FEW, FOR_ANY, SMALLEST, TUNED
from ._varying import varying_axes

SUBLANES, LANES = 16, 128  # a tile of bfloat16
# Beside fewer rows XLA is faster on all TPUs that were compared.
FEWEST_ROWS = min(map(min, (FOR_ANY, *TUNED.values())))


@dataclass(frozen=True)
class Blocks:
    """The sizes of one step: `[rows, terms] x [terms, columns]`, the terms in whole groups."""

    rows: int
    columns: int
    terms: int


# Of the 16 MiB that a kernel may use unless it asks for more; the rest is for what is not counted.
VMEM = 14 * 2**20
LARGEST = Blocks(rows=512, columns=256, terms=4096)  # of which any product fits


def tuned(kind: str | None, contraction: Contraction, *_: Any) -> dict[str, Blocks] | str:
    """The largest blocks for a kind of TPU, or why XLA's product is to run there."""
    rows = contraction.rows
    names = [name for name in TUNED if kind is not None and re.fullmatch(name, kind)]
    entry = TUNED[names[0]] if names else FOR_ANY
    if rows < min(entry):
        device = "a TPU of any kind" if kind is None else repr(kind)
        return f"`lhs` has {rows} rows: XLA is faster beside fewer than {min(entry)} on {device}"
    return {"largest": Blocks(*entry[max(fewest for fewest in entry if fewest <= rows)])}


def vmem_bytes(blocks: Blocks, bits: int, group: int, result_bytes: int) -> int:
    """What a step needs: two buffers of what comes and goes, a sum, and what of a group is wide."""
    rows, columns, terms = blocks.rows, blocks.columns, blocks.terms
    coming = 2 * rows * terms * 2 + 2 * terms * columns * bits // 8
    return coming + group * columns * 2 + rows * columns * (4 + 4 + 2 * result_bytes)


def blocks_for(
    rows: int, columns: int, terms: int, group: int, largest: Blocks = LARGEST
) -> Blocks:
    """The blocks of a product with a scale per so many terms."""
    if group > largest.terms:
        largest = LARGEST
    groups, most = terms // group, largest.terms // group
    per_step = max(n for n in range(1, min(most, groups) + 1) if groups % n == 0)
    each = math.ceil(rows / math.ceil(rows / largest.rows))
    even = math.ceil(each / SUBLANES) * SUBLANES
    return Blocks(even, min(largest.columns, columns), per_step * group)


def refusal(
    lhs: Array | QTensor, rhs: Array | QTensor, contraction: Contraction, *_: Any
) -> str | None:
    """Why the kernel does not multiply these; None if it does."""
    c = contraction
    if isinstance(lhs, QTensor) or lhs.dtype != jnp.bfloat16:
        return f"`lhs` is {describe(lhs)}: it takes an array of bfloat16"
    if not isinstance(rhs, QTensor) or not rhs.format.is_integer or rhs.zero_point is not None:
        return f"`rhs` is {describe(rhs)}: it takes integers without a zero point"
    if any(map(is_symbolic_dim, (*c.lhs_shape, *c.rhs_shape))):
        return "a size is symbolic"
    if rhs.ndim != 2 or len(c.rhs_contract) != 1 or c.lhs_contract != (lhs.ndim - 1,):
        return "it takes [..., K] by two axes, of which one is contracted"
    group = _group(rhs, c)
    if rhs.scale.shape[c.rhs_contract[0]] == 1 or group % LANES or group > LARGEST.terms:
        return (
            f"`rhs` is {describe(rhs)}: it takes a scale per group of a multiple of {LANES} terms, "
            f"of {LARGEST.terms} at most"
        )
    is_compared = rhs.format.bits == 4 and c.terms * c.columns >= SMALLEST
    fewest = FEWEST_ROWS if is_compared else max(FEWEST_ROWS, FEW)
    if c.rows < fewest or c.columns == 0:
        return (
            f"`lhs` has {c.rows} rows: it takes {fewest} or more beside {describe(rhs)}, fewer "
            f"than {FEW} beside int4 of {SMALLEST} entries or more only"
        )
    if varying_axes(lhs, rhs):
        return "inside `jax.shard_map` a Pallas kernel needs `check_vma=False`"
    return None


def _group(rhs: QTensor, c: Contraction) -> int:
    axis = c.rhs_contract[0]
    return rhs.shape[axis] // max(1, rhs.scale.shape[axis])


def dot_general(
    lhs: BFloat16[Array, "*batch k"],
    rhs: QTensor,
    contraction: Contraction,
    precision: Any,
    dtype: np.dtype,
    *,
    largest: Blocks = LARGEST,
    interpret: Any = False,
) -> Float[Array, "*batch n"]:
    """The product of operands that `refusal` lets pass; `interpret` as in `pallas_call`."""
    del precision  # products of bfloat16 by 8 bits are exact in float32, in which they are summed
    c, group = contraction, _group(rhs, contraction)
    # TPUs have no float64, and float16 on some only.
    made = jnp.dtype(dtype if dtype == jnp.bfloat16 else jnp.float32)
    blocks = blocks_for(c.rows, c.columns, c.terms, group, largest)
    if vmem_bytes(blocks, rhs.format.bits, group, made.itemsize) > VMEM:
        blocks = blocks_for(c.rows, c.columns, c.terms, group)
    # A scale for every group and column: blocks of a weight may share one over several columns.
    wide = tuple(rhs.scale.shape[a] if a in c.rhs_contract else s for a, s in enumerate(rhs.shape))
    scale = jnp.broadcast_to(spread(rhs.scale, wide), wide)
    transposed = c.rhs_contract == (1,)
    result = grouped_matmul(
        lhs.reshape(c.rows, c.terms),
        rhs.values,
        scale.T if transposed else scale,
        made,
        transposed=transposed,
        blocks=blocks,
        interpret=interpret,
    )
    return result.reshape(c.result_shape).astype(dtype)


def grouped_matmul(
    lhs: BFloat16[Array, "m k"],
    rhs: Int[Array, "_ _"],
    scale: Float[Array, "g n"],
    dtype: np.dtype,
    *,
    transposed: bool,
    blocks: Blocks,
    interpret: Any = False,
) -> Float[Array, "m n"]:
    """The kernel. What a block holds beyond the edge of rows or columns reaches no result.

    Args:
        lhs: Activations.
        rhs: int8 or int4, [K, N], or [N, K] if `transposed`.
        scale: Of G groups of terms.
        dtype: bfloat16 or float32.
        transposed: Whether K is the last axis of `rhs`.
        blocks: The size of a step; its terms divide K, and hold whole groups.
        interpret: As in `pallas_call`, for tests.
    """
    (rows, terms), (groups, columns), b = lhs.shape, scale.shape, blocks
    group, steps = terms // groups, terms // b.terms
    return pl.pallas_call(
        partial(_kernel, steps=steps, group=group, transposed=transposed),
        out_shape=jax.ShapeDtypeStruct((rows, columns), dtype),
        grid=(math.ceil(rows / b.rows), math.ceil(columns / b.columns), steps),
        in_specs=[
            pl.BlockSpec((b.rows, b.terms), lambda i, j, k: (i, k)),
            pl.BlockSpec((b.columns, b.terms), lambda i, j, k: (j, k))
            if transposed
            else pl.BlockSpec((b.terms, b.columns), lambda i, j, k: (k, j)),
            pl.BlockSpec((b.terms // group, 1, b.columns), lambda i, j, k: (k, 0, j)),
        ],
        out_specs=pl.BlockSpec((b.rows, b.columns), lambda i, j, k: (i, j)),
        scratch_shapes=[pltpu.VMEM((b.rows, b.columns), jnp.float32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        interpret=interpret,
        # XLA and `mpjax.explain` know of what is inside only what this says.
        cost_estimate=pl.CostEstimate(
            flops=2 * rows * columns * terms,
            bytes_accessed=2 * rows * terms + rhs.size + rows * columns * dtype.itemsize,
            transcendentals=0,
        ),
        name="mpjax_grouped_matmul",
    )(lhs, rhs, scale[:, None, :])


def _kernel(
    lhs_ref: Any,
    rhs_ref: Any,
    scale_ref: Any,
    out_ref: Any,
    sum_ref: Any,
    *,
    steps: int,
    group: int,
    transposed: bool,
) -> None:
    step, axis = pl.program_id(2), 1 if transposed else 0

    @pl.when(step == 0)
    def _():
        sum_ref[...] = jnp.zeros_like(sum_ref)

    total = sum_ref[...]
    for i in range(lhs_ref.shape[1] // group):
        terms = slice(i * group, (i + 1) * group)
        rhs = rhs_ref[:, terms] if transposed else rhs_ref[terms, :]
        product = jax.lax.dot_general(
            lhs_ref[:, terms],
            rhs.astype(jnp.bfloat16),  # which holds integers of 8 bits
            (((1,), (axis,)), ((), ())),
            preferred_element_type=jnp.float32,
        )
        total += product * scale_ref[i]
    sum_ref[...] = total

    @pl.when(step == steps - 1)
    def _():
        out_ref[...] = total.astype(out_ref.dtype)
