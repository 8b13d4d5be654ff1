"""A Pallas TPU kernel: the product of two quantized matrices, rescaled as it is written."""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Shaped

from ._tpu_blocks import Blocks, product_blocks


def scaled_matmul(
    lhs: Shaped[Array, "b m k"],
    rhs: Shaped[Array, "b _ _"],
    lhs_scale: Float[Array, "b g m 1"],
    rhs_scale: Float[Array, "b h 1 n"],
    dtype: np.dtype,
    *,
    transposed: bool,
    blocks: Blocks | None = None,
    interpret: Any = False,
) -> Float[Array, "b m n"]:
    """`(lhs @ rhs) * lhs_scale * rhs_scale`, or the sum of that over groups of terms.

    A grid step multiplies one block of each operand. int8 is summed in int32 and float8 in
    float32, in VMEM; the last step along K applies the scales in float32 and writes the result.
    With a scale per group, each step applies its group's scales and the sum is one of float32.
    What a block holds beyond the edge of an array is masked where it would reach a result.

    Args:
        lhs: int8 or float8 values.
        rhs: int8, int4 or float8 values, [B, K, N], or [B, N, K] if `transposed`.
        lhs_scale: Its scales, for G groups of terms or for all of them (G = 1).
        rhs_scale: Likewise; the larger of G and H is a multiple of the other, which is 1 or equal.
        dtype: bfloat16 or float32.
        transposed: Whether K is the last axis of `rhs`.
        blocks: The size of a step; None chooses.
        interpret: As in `pallas_call`, for tests.
    """
    batch, rows, terms = lhs.shape
    columns = rhs.shape[1 if transposed else 2]
    groups = max(lhs_scale.shape[1], rhs_scale.shape[1])
    blocks = blocks or product_blocks(rows, columns, terms, groups)
    steps = math.ceil(terms / blocks.terms)
    grid = (batch, math.ceil(rows / blocks.rows), math.ceil(columns / blocks.columns), steps)
    sum_dtype = accumulator_dtype(lhs.dtype, groups)
    return pl.pallas_call(
        partial(_kernel, terms=terms, grouped=groups > 1, transposed=transposed),
        out_shape=jax.ShapeDtypeStruct((batch, rows, columns), dtype),
        grid=grid,
        in_specs=_in_specs(blocks, steps, lhs_scale.shape[1], rhs_scale.shape[1], transposed),
        out_specs=pl.BlockSpec((None, blocks.rows, blocks.columns), lambda b, i, j, k: (b, i, j)),
        scratch_shapes=[pltpu.VMEM((blocks.rows, blocks.columns), sum_dtype)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary")
        ),
        interpret=interpret,
        name="scaled_matmul",
    )(lhs, rhs, lhs_scale, rhs_scale)


def _in_specs(
    blocks: Blocks, steps: int, lhs_groups: int, rhs_groups: int, transposed: bool
) -> list[pl.BlockSpec]:
    """Which blocks a grid step reads: of batch b, rows i, columns j and terms k."""
    rows, columns, terms = blocks.rows, blocks.columns, blocks.terms
    return [
        pl.BlockSpec((None, rows, terms), lambda b, i, j, k: (b, i, k)),
        pl.BlockSpec((None, columns, terms), lambda b, i, j, k: (b, j, k))
        if transposed
        else pl.BlockSpec((None, terms, columns), lambda b, i, j, k: (b, k, j)),
        pl.BlockSpec(
            (None, None, rows, 1), lambda b, i, j, k: (b, group_of(k, lhs_groups, steps), i, 0)
        ),
        pl.BlockSpec(
            (None, None, 1, columns), lambda b, i, j, k: (b, group_of(k, rhs_groups, steps), 0, j)
        ),
    ]


def group_of(step: Array, groups: int, steps: int) -> Array | int:
    """Which group of terms a step along K is in, where as many steps make each group."""
    return 0 if groups == 1 else jax.lax.div(step, jnp.int32(steps // groups))


def accumulator_dtype(values: np.dtype, groups: int) -> np.dtype:
    """int32 if the sums of integers stay unscaled until the last."""
    exact = groups == 1 and jnp.issubdtype(values, jnp.integer)
    return jnp.dtype(jnp.int32 if exact else jnp.float32)


def _kernel(
    lhs_ref: Any,
    rhs_ref: Any,
    lhs_scale_ref: Any,
    rhs_scale_ref: Any,
    out_ref: Any,
    sum_ref: Any,
    *,
    terms: int,
    grouped: bool,
    transposed: bool,
) -> None:
    step = pl.program_id(3)

    @pl.when(step == 0)
    def _():
        sum_ref[...] = jnp.zeros_like(sum_ref)

    width = lhs_ref.shape[1]
    lhs = lhs_ref[...]
    if terms % width:
        lhs = mask_terms(lhs, 1, terms - step * width)
    product = block_dot(lhs, rhs_ref[...], terms, step, transposed=transposed)
    if grouped:
        product = product.astype(jnp.float32) * lhs_scale_ref[...] * rhs_scale_ref[...]
    sum_ref[...] += product

    @pl.when(step == pl.num_programs(3) - 1)
    def _():
        result = sum_ref[...].astype(jnp.float32)
        if not grouped:
            result = result * lhs_scale_ref[...] * rhs_scale_ref[...]
        out_ref[...] = result.astype(out_ref.dtype)


def block_dot(
    lhs: Shaped[Array, "m k"],
    rhs: Shaped[Array, "_ _"],
    terms: int,
    step: Array,
    *,
    transposed: bool,
) -> Shaped[Array, "m n"]:
    """One block's product, in int32 or float32. `lhs` is zero beyond the edge of K."""
    axis = 1 if transposed else 0
    integer = jnp.issubdtype(lhs.dtype, jnp.integer)
    if integer:
        rhs = rhs.astype(jnp.int8)  # int4 is widened in VMEM; its garbage is multiplied by zero
    elif terms % rhs.shape[axis]:
        rhs = mask_terms(rhs, axis, terms - step * rhs.shape[axis])  # float8 garbage may be NaN
    return jax.lax.dot_general(
        lhs,
        rhs,
        (((1,), (axis,)), ((), ())),
        preferred_element_type=jnp.int32 if integer else jnp.float32,
    )


def mask_terms(values: Shaped[Array, "_ _"], axis: int, left: Array) -> Shaped[Array, "_ _"]:
    """Zeroes what lies at or beyond `left` along an axis."""
    index = jax.lax.broadcasted_iota(jnp.int32, values.shape, axis)
    return jnp.where(index < left, values, jnp.zeros_like(values))
