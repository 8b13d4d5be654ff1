"""Pallas TPU kernels for quantized products, with blocks to choose from: contenders.

    fused_rows    quantizes whole rows in VMEM and multiplies them by 8-bit blocks: the quantized
                  activation is never in memory
    grouped       multiplies several groups of terms per step, each by its scales, and adds them up
                  in VMEM

For bfloat16 by integers `grouped` is the kernel of `mpjax_kernels/_tpu.py`, here without what that
has for other sizes. Sizes must be multiples of the blocks.
"""

import dataclasses
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from mpjax_kernels import get_format
from mpjax_kernels._quantize import scale_of
from mpjax_kernels._rounding import round_to, round_to_grid

GROUP = 128
_ROWS, _TERMS = 256, 512  # that are quantized together


@dataclasses.dataclass(frozen=True)
class Blocks:
    """One step multiplies [rows, terms] by [terms, columns]."""

    rows: int
    columns: int
    terms: int


def fused_blocks(rows: int, columns: int, terms: int, vmem: int) -> list[Blocks]:
    """The candidates of `fused_rows` that fit into so many bytes of VMEM."""
    found = [
        Blocks(r, c, t)
        for r, c, t in [(1024, 512, 4096), (1024, 1024, 1024), (512, 1024, 2048), (256, 1024, 1024)]
        for r, c, t in [(min(r, rows), min(c, columns), _divisor(t, terms))]
        if rows % r == columns % c == 0 and _fused_bytes(Blocks(r, c, t), terms) <= vmem
    ]
    return list(dict.fromkeys(found))[:3]


def grouped_blocks(rows: int, columns: int, terms: int) -> list[Blocks]:
    """The candidates of `grouped`."""
    found = [
        Blocks(min(r, rows), min(c, columns), _divisor(t, terms))
        for r, c, t in [(1024, 512, 1024), (512, 1024, 1024), (512, 256, 4096)]
    ]
    return list(dict.fromkeys(b for b in found if rows % b.rows == columns % b.columns == 0))


def _divisor(most: int, terms: int) -> int:
    return max(n for n in range(GROUP, most + 1, GROUP) if terms % n == 0)


def _fused_bytes(blocks: Blocks, terms: int) -> int:
    left = blocks.rows * terms * (2 * 2 + 1)
    return left + 2 * blocks.terms * blocks.columns + blocks.rows * blocks.columns * (4 + 2 * 2)


def fused_rows(x: Any, w: Any, w_scale: Any, *, format: str, blocks: Blocks, vmem: int) -> Any:
    """bfloat16 [M, K] by 8 bits [K, N] of a scale per column [1, N], in bfloat16."""
    (rows, terms), columns, b = x.shape, w.shape[1], blocks
    target = get_format(format)
    steps = terms // b.terms
    exact = jnp.int32 if target.is_integer else jnp.float32
    return pl.pallas_call(
        partial(_fused_kernel, format=target, steps=steps),
        out_shape=jax.ShapeDtypeStruct((rows, columns), jnp.bfloat16),
        grid=(rows // b.rows, columns // b.columns, steps),
        in_specs=[
            pl.BlockSpec((b.rows, terms), lambda i, j, k: (i, 0)),
            pl.BlockSpec((b.terms, b.columns), lambda i, j, k: (k, j)),
            pl.BlockSpec((1, b.columns), lambda i, j, k: (0, j)),
        ],
        out_specs=pl.BlockSpec((b.rows, b.columns), lambda i, j, k: (i, j)),
        scratch_shapes=[
            pltpu.VMEM((b.rows, terms), target.dtype),
            pltpu.VMEM((b.rows, 1), jnp.float32),
            pltpu.VMEM((b.rows, b.columns), exact),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=vmem
        ),
        name="fused_rows",
    )(x, w, w_scale)


def _fused_kernel(
    x_ref, w_ref, w_scale_ref, out_ref, values_ref, scale_ref, sum_ref, *, format, steps
):
    step = pl.program_id(2)

    @pl.when((step == 0) & (pl.program_id(1) == 0))
    def _():
        _quantize_rows(x_ref, values_ref, scale_ref, format)

    @pl.when(step == 0)
    def _():
        sum_ref[...] = jnp.zeros_like(sum_ref)

    width = w_ref.shape[0]
    x = values_ref[:, pl.ds(pl.multiple_of(step * width, width), width)]
    sum_ref[...] += jnp.dot(x, w_ref[...], preferred_element_type=sum_ref.dtype)

    @pl.when(step == steps - 1)
    def _():
        result = sum_ref[...].astype(jnp.float32) * scale_ref[...] * w_scale_ref[...]
        out_ref[...] = result.astype(out_ref.dtype)


def _quantize_rows(x_ref, values_ref, scale_ref, format) -> None:
    """A few rows after the other, and of these some terms, so that they stay in registers."""
    (rows, terms), few = x_ref.shape, min(_ROWS, x_ref.shape[0])
    width = _divisor(_TERMS, terms)

    def quantize_some(i, carry):
        here = pl.ds(pl.multiple_of(i * few, few), few)

        def at(step):
            return here, pl.ds(pl.multiple_of(step * width, width), width)

        def largest(step, amax):
            x = x_ref[at(step)].astype(jnp.float32)
            size = jnp.where(jnp.isfinite(x), jnp.abs(x), jnp.inf)
            return jnp.maximum(amax, jnp.max(size, axis=1, keepdims=True))

        amax = jax.lax.fori_loop(0, terms // width, largest, jnp.zeros((few, 1)))
        scale = scale_of(amax, format)
        scale_ref[here, :] = scale

        def quantize(step, carry):
            x = x_ref[at(step)].astype(jnp.float32)
            ratio = jnp.where(jnp.isfinite(scale), x / scale, 0.0)
            ratio = ratio if format.is_integer else round_to_grid(ratio, format)
            values_ref[at(step)] = round_to(ratio, format)

        jax.lax.fori_loop(0, terms // width, quantize, None)

    jax.lax.fori_loop(0, rows // few, quantize_some, None)


def grouped(x: Any, w: Any, x_scale: Any, w_scale: Any, *, blocks: Blocks, vmem: int) -> Any:
    """[M, K] by [K, N], a scale of `w` per group of terms, [G, N], in bfloat16.

    `x` is bfloat16 without a scale, or 8 bits with one per row, [M, 1], or per group, [M, G].
    """
    (rows, terms), columns, b = x.shape, w.shape[1], blocks
    steps, per_step = terms // b.terms, b.terms // GROUP
    if x_scale is None:
        x_scale = jnp.ones((1, rows, 1))
    is_shared = x_scale.shape[-1] == 1
    x_scale = x_scale.reshape(rows, -1, min(per_step, x_scale.shape[-1])).transpose(1, 0, 2)
    return pl.pallas_call(
        partial(_grouped_kernel, steps=steps, shares_scale=is_shared),
        out_shape=jax.ShapeDtypeStruct((rows, columns), jnp.bfloat16),
        grid=(rows // b.rows, columns // b.columns, steps),
        in_specs=[
            pl.BlockSpec((b.rows, b.terms), lambda i, j, k: (i, k)),
            pl.BlockSpec((b.terms, b.columns), lambda i, j, k: (k, j)),
            pl.BlockSpec(
                (None, b.rows, x_scale.shape[2]),
                lambda i, j, k: (0 if is_shared else k, i, 0),
            ),
            pl.BlockSpec((per_step, 1, b.columns), lambda i, j, k: (k, 0, j)),
        ],
        out_specs=pl.BlockSpec((b.rows, b.columns), lambda i, j, k: (i, j)),
        scratch_shapes=[pltpu.VMEM((b.rows, b.columns), jnp.float32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=vmem
        ),
        name="grouped",
    )(x, w, x_scale, w_scale[:, None, :])


def _grouped_kernel(
    x_ref, w_ref, x_scale_ref, w_scale_ref, out_ref, sum_ref, *, steps, shares_scale
):
    step = pl.program_id(2)

    @pl.when(step == 0)
    def _():
        sum_ref[...] = jnp.zeros_like(sum_ref)

    exact = jnp.int32 if x_ref.dtype == jnp.int8 else jnp.float32
    total = sum_ref[...]
    for group, terms in enumerate(_groups(x_ref.shape[1])):
        # 4 bits are widened in VMEM; float8 is multiplied as it is.
        w = w_ref[terms, :]
        w = w.astype(x_ref.dtype) if w.dtype == jnp.int4 else w
        product = jnp.dot(x_ref[:, terms], w, preferred_element_type=exact)
        product = product.astype(jnp.float32) * w_scale_ref[group]
        total += product if shares_scale else product * x_scale_ref[:, group : group + 1]
    sum_ref[...] = total

    @pl.when(step == steps - 1)
    def _():
        result = sum_ref[...] * x_scale_ref[...] if shares_scale else sum_ref[...]
        out_ref[...] = result.astype(out_ref.dtype)


def _groups(terms: int) -> Iterator[slice]:
    return (slice(start, start + GROUP) for start in range(0, terms, GROUP))
