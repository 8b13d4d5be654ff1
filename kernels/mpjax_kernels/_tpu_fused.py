"""A Pallas TPU kernel: quantize activations in VMEM, multiply and rescale, in one pass."""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Shaped

from ._formats import Format
from ._quantize import scale_of
from ._rounding import round_to, round_to_grid
from ._tpu_blocks import Blocks
from ._tpu_matmul import accumulator_dtype, block_dot, group_of, mask_terms


def fused_matmul(
    x: Float[Array, "m k"],
    rhs: Shaped[Array, "_ _"],
    rhs_scale: Float[Array, "g 1 n"],
    format: Format,
    dtype: np.dtype,
    *,
    transposed: bool,
    blocks: Blocks,
    interpret: Any = False,
) -> Float[Array, "m n"]:
    """`quantize(x, format, axis=1) @ rhs`, without the quantized `x` ever leaving VMEM.

    Whole rows of `x` are brought in at once. The first step that sees them finds each row's amax
    and scale and quantizes it; that and all later steps multiply the result by a block of `rhs`.

    Args:
        x: Activations, bfloat16 or float32.
        rhs: int8, int4 or float8 values, [K, N], or [N, K] if `transposed`.
        rhs_scale: Its scales, for G groups of terms or for all of them (G = 1).
        format: What `x` is quantized to.
        dtype: bfloat16 or float32.
        transposed: Whether K is the last axis of `rhs`.
        blocks: The size of a step, as `fused_blocks` chooses it.
        interpret: As in `pallas_call`, for tests.
    """
    rows, terms = x.shape
    columns, groups = rhs_scale.shape[2], rhs_scale.shape[0]
    steps = math.ceil(terms / blocks.terms)
    size = blocks.rows, blocks.columns
    return pl.pallas_call(
        partial(_kernel, terms=terms, format=format, grouped=groups > 1, transposed=transposed),
        out_shape=jax.ShapeDtypeStruct((rows, columns), dtype),
        grid=(math.ceil(rows / blocks.rows), math.ceil(columns / blocks.columns), steps),
        in_specs=_in_specs(blocks, steps, groups, transposed),
        out_specs=pl.BlockSpec(size, lambda i, j, k: (i, j)),
        scratch_shapes=[
            pltpu.VMEM((steps, blocks.rows, blocks.terms), format.dtype),
            pltpu.VMEM((blocks.rows, 1), jnp.float32),
            pltpu.VMEM(size, accumulator_dtype(format.dtype, groups)),
        ],
        # The quantized rows are kept from one block of columns to the next: only rows can be
        # shared out between cores.
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary")
        ),
        interpret=interpret,
        name="quantized_matmul",
    )(x, rhs, rhs_scale)


def _in_specs(blocks: Blocks, steps: int, groups: int, transposed: bool) -> list[pl.BlockSpec]:
    """Which blocks a grid step reads: of rows i, columns j and terms k."""
    rows, columns, terms = blocks.rows, blocks.columns, blocks.terms
    return [
        pl.BlockSpec((rows, steps * terms), lambda i, j, k: (i, 0)),
        pl.BlockSpec((columns, terms), lambda i, j, k: (j, k))
        if transposed
        else pl.BlockSpec((terms, columns), lambda i, j, k: (k, j)),
        pl.BlockSpec((None, 1, columns), lambda i, j, k: (group_of(k, groups, steps), 0, j)),
    ]


def _kernel(
    x_ref: Any,
    rhs_ref: Any,
    rhs_scale_ref: Any,
    out_ref: Any,
    values_ref: Any,
    scale_ref: Any,
    sum_ref: Any,
    *,
    terms: int,
    format: Format,
    grouped: bool,
    transposed: bool,
) -> None:
    step = pl.program_id(2)

    @pl.when((step == 0) & (pl.program_id(1) == 0))
    def _():
        _quantize_rows(x_ref, values_ref, scale_ref, terms, format)

    @pl.when(step == 0)
    def _():
        sum_ref[...] = jnp.zeros_like(sum_ref)

    product = block_dot(values_ref[step], rhs_ref[...], terms, step, transposed=transposed)
    if grouped:
        product = product.astype(jnp.float32) * scale_ref[...] * rhs_scale_ref[...]
    sum_ref[...] += product

    @pl.when(step == pl.num_programs(2) - 1)
    def _():
        result = sum_ref[...].astype(jnp.float32)
        if not grouped:
            result = result * scale_ref[...] * rhs_scale_ref[...]
        out_ref[...] = result.astype(out_ref.dtype)


def _quantize_rows(x_ref: Any, values_ref: Any, scale_ref: Any, terms: int, format: Format) -> None:
    """What `quantize(x, format, axis=1)` does, one block of terms at a time."""
    steps, rows, width = values_ref.shape

    def block(step: Array) -> Float[Array, "m k"]:
        x = x_ref[:, pl.ds(pl.multiple_of(step * width, width), width)].astype(jnp.float32)
        return mask_terms(x, 1, terms - step * width) if terms % width else x

    def largest(step: Array, amax: Float[Array, "m 1"]) -> Float[Array, "m 1"]:
        x = block(step)
        # Inf for NaN, so that nothing depends on what a maximum makes of NaN.
        size = jnp.where(jnp.isfinite(x), jnp.abs(x), jnp.inf)
        return jnp.maximum(amax, jnp.max(size, axis=1, keepdims=True))

    amax = jax.lax.fori_loop(0, steps, largest, jnp.zeros((rows, 1), jnp.float32))
    scale = scale_of(amax, format)
    scale_ref[...] = scale

    def quantize(step: Array, carry: None) -> None:
        ratio = jnp.where(jnp.isfinite(scale), block(step) / scale, 0.0)
        if not format.is_integer:
            ratio = round_to_grid(ratio, format)
        values_ref[step] = round_to(ratio, format)

    jax.lax.fori_loop(0, steps, quantize, None)
