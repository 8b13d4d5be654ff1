"""GPTQ: the rounding error of each input's weights is made up for by the inputs after it.

With H = 2 / n sum x x^T the second moment of the inputs, and U upper triangular, U^T U = H^-1::

    for i in the order of the inputs:
        q[i]     = round(w[i])                                  on the grid of plain rounding
        w[i + 1:] -= U[i, i + 1:]^T (w[i] - q[i]) / U[i, i]

which, of all changes of the weights not yet rounded, makes the error of the outputs,
tr((w - q)^T H (w - q)), grow least. Every column of the weights goes its own way. Inputs are taken
with the largest H[i, i] first; their scales and zero points are those that plain rounding gives
the weights before anything is moved, so the order leaves no trace in the result.

The changes are made within blocks of 128 inputs first, and then of a whole block at once to all
weights after it: O(K^2 N) operations, nearly all in matrix products.

Frantar et al., GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers,
2022, https://arxiv.org/abs/2210.17323
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

import mpjax_kernels as mk

from ._gptq_factor import damped_factor
from ._output_error import exact_matmul, output_error


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class ErrorCompensated:
    """A weight as GPTQ rounds it.

    Attributes:
      quantized: QTensor [K, N], with the scales and zero points of plain rounding.
      plain_error: float32 [], tr(E^T H E) of rounding to nearest.
      error: float32 [], that of GPTQ; may be larger, and then plain rounding is better.
      damp: float32 [], the damping used: more than was asked for if H was not positive definite
        with it, and infinite, with plain rounding for a result, if it is no second moment at all.
    """

    quantized: mk.QTensor
    plain_error: Float[Array, ""]
    error: Float[Array, ""]
    damp: Float[Array, ""]


def gptq(
    weight: Float[Array, "k n"],
    moment: Float[Array, "k k"],
    format: mk.Format | str = "int4",
    *,
    axis: int | tuple[int, ...] = 0,
    group_size: int | tuple[int, ...] | None = None,
    symmetric: bool = True,
    damp: float = 0.01,
    block: int = 128,
    order: bool = True,
) -> ErrorCompensated:
    """Rounds a weight so that the error of its outputs is small on the inputs that were seen.

    Args:
      weight: [K, N].
      moment: float32 [K, K], H = 2 / n sum x x^T (`SecondMoment`). An input that was never seen,
        H[i, i] = 0, is rounded to nearest.
      format, axis, group_size, symmetric: the grid, as in `mpjax_kernels.quantize`.
      damp: what is added to the diagonal of H, in units of its mean.
      block: inputs that are rounded before the others learn of it; changes nothing but the time.
      order: whether to take inputs with large H[i, i] first, instead of as they come.

    Returns:
      The rounded weight and its errors. A NaN in `moment` never reaches the weight: see `damp`.

    Raises:
      ValueError: `moment` is not [K, K], `damp` is negative, or `mpjax_kernels.quantize` does not
        take the grid.
    """
    _check(weight, moment, damp)
    plain = mk.quantize(weight, format, axis=axis, group_size=group_size, symmetric=symmetric)
    exact, moment = weight.astype(jnp.float32), moment.astype(jnp.float32)
    inputs = weight.shape[0]
    sequence = jnp.argsort(-jnp.diagonal(moment)) if order else jnp.arange(inputs)
    factor, used = damped_factor(moment[sequence][:, sequence], damp)
    steps = _compensated(exact, plain, factor, sequence, min(block, inputs))
    values = steps if plain.zero_point is None else steps + _spread(plain.zero_point, plain.shape)
    quantized = dataclasses.replace(plain, values=values.astype(plain.values.dtype))
    return ErrorCompensated(
        quantized=quantized,
        plain_error=output_error(mk.dequantize(plain, jnp.float32) - exact, moment),
        error=output_error(mk.dequantize(quantized, jnp.float32) - exact, moment),
        damp=used,
    )


def _compensated(
    weight: Float[Array, "k n"],
    plain: mk.QTensor,
    factor: Float[Array, "k k"],
    sequence: Int[Array, " k"],
    block: int,
) -> Float[Array, "k n"]:
    """The loop above. Returns q / scale: values of the format, less the zero point."""
    inputs = weight.shape[0]
    padding = (0, -inputs % block), (0, 0)
    scale = _spread(plain.scale, plain.shape)
    zero = None if plain.zero_point is None else _spread(plain.zero_point, plain.shape)
    operands = [
        # What is rounded after the last input leaves no trace.
        jnp.pad(jnp.broadcast_to(each, (inputs, each.shape[1]))[sequence], padding)
        for each in (weight, scale, *([] if zero is None else [zero]))
    ]
    square = jnp.pad(factor, (padding[0], padding[0]))

    def one_block(number: Int[Array, ""], carry: tuple) -> tuple:
        left, found = carry
        at = number * block
        part, *grid = (jax.lax.dynamic_slice_in_dim(x, at, block) for x in (left, *operands[1:]))
        rows = jax.lax.dynamic_slice_in_dim(square, at, block)
        within = jax.lax.dynamic_slice_in_dim(rows, at, block, axis=1)
        steps, errors = _one_by_one(part, grid, within, plain.format)
        found = jax.lax.dynamic_update_slice_in_dim(found, steps, at, axis=0)
        # Rows of this block and before it change too, but are not looked at again.
        return left - exact_matmul(rows.T, errors), found

    start = operands[0], jnp.zeros_like(operands[0])
    _, found = jax.lax.fori_loop(0, len(operands[0]) // block, one_block, start)
    return jnp.zeros_like(weight).at[sequence].set(found[:inputs], unique_indices=True)


def _one_by_one(
    weight: Float[Array, "b n"], grid: list[Array], factor: Float[Array, "b b"], format: mk.Format
) -> tuple[Float[Array, "b n"], Float[Array, "b n"]]:
    """The values of a block of inputs, and the errors that the others make up for."""

    def one_input(i: Int[Array, ""], carry: tuple) -> tuple:
        left, steps, errors = carry
        scale = grid[0][i]
        known = (scale > 0) & (factor[i, i] > 0)  # not padding, nor NaN for a weight that has one
        safe = jnp.where(known, scale, 1.0)
        step = _on_grid(jnp.where(known, left[i] / safe, 0.0), format, *(g[i] for g in grid[1:]))
        error = (left[i] - step * safe) / jnp.where(factor[i, i] > 0, factor[i, i], 1.0)
        left = left - factor[i][:, None] * error
        return left, steps.at[i].set(step), errors.at[i].set(error)

    nothing = jnp.zeros_like(weight)
    _, steps, errors = jax.lax.fori_loop(0, len(weight), one_input, (weight, nothing, nothing))
    return steps, errors


def _on_grid(
    x: Float[Array, " n"], format: mk.Format, zero_point: Float[Array, " n"] | None = None
) -> Float[Array, " n"]:
    """The nearest value of the format, less the zero point."""
    if zero_point is not None:
        return jnp.clip(jnp.round(x + zero_point), format.lowest, format.max) - zero_point
    if format.is_integer:
        return jnp.clip(jnp.round(x), -format.max, format.max)
    return mk.dequantize(mk.quantize(x, format, scale=jnp.ones((), jnp.float32)))


def _spread(per_group: Array, shape: tuple[int, ...]) -> Float[Array, "..."]:
    """float32 [K, 1 or N]: the entries of groups along either axis, repeated."""
    for axis, size in enumerate(shape):
        groups = per_group.shape[axis]
        if axis == 0 or groups != 1:
            per_group = jnp.repeat(per_group, size // groups, axis=axis)
    return per_group.astype(jnp.float32)


def _check(weight: Array, moment: Array, damp: float) -> None:
    if weight.ndim != 2 or moment.shape != (weight.shape[0],) * 2:
        raise ValueError(
            f"`weight` has shape {weight.shape} and `moment` {moment.shape}: they must be [K, N] "
            "and [K, K]. Make one axis of several that the product contracts, and vmap over stacks"
        )
    if not damp >= 0:
        raise ValueError(f"`damp` is {damp}, but must not be negative")
