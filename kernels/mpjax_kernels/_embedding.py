"""Looking up rows of a quantized table."""

from dataclasses import replace
from functools import partial

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Bool, Float, Integer, Shaped

from ._derivative import without_derivative
from ._layout import positions, stored_axes
from ._qtensor import QTensor, describe, validate, without_tiles
from ._quantize import dequantize

_MODES = (None, "fill", "clip", "wrap")

_NO_DERIVATIVE = (
    "looking up a QTensor has no derivative: its values come from rounding, which is flat. "
    "Differentiate the model before it is quantized, or with respect to other arguments"
)


def embedding_lookup(
    table: Float[Array, "v d"] | QTensor,
    indices: Integer[ArrayLike, "*batch"],
    *,
    dtype: DTypeLike | None = None,
    mode: str | None = None,
) -> Float[Array, "*batch d"]:
    """`jnp.take(table, indices, axis=0)` of a table that may be quantized.

    Of a QTensor only the rows asked for are read and dequantized, with the scales and zero points
    that belong to them; the scales may be cut in any way: per tensor, per row, per column, or per
    group of rows, columns or both. Negative indices count from the end.

    Args:
        table: An array or a QTensor of shape [V, D].
        indices: Integers of any shape.
        dtype: The floating dtype of the result; that of the table (of a QTensor its logical dtype)
            if None.
        mode: What an index out of range gives, as in `jnp.take`: a row of NaN (None or `"fill"`),
            the nearest row (`"clip"`; a negative index is out of range then), or the row counted
            around (`"wrap"`).

    Returns:
        An array of shape `indices.shape` and then D.

    Raises:
        ValueError: If the table has not two axes or no rows, or `mode` is unknown.
        TypeError: If `indices` are not integers, or the table or `dtype` is not floating.
        NotImplementedError: If the lookup in a QTensor is differentiated. That in an array is
            differentiable.
    """
    if not isinstance(table, QTensor):
        table = jnp.asarray(table)
    else:
        validate(table)
    rows = jnp.asarray(indices)
    target = table.dtype if dtype is None else jnp.dtype(dtype)
    _check(table, rows, target, mode)
    if not isinstance(table, QTensor):
        return jnp.take(table, rows, axis=0, mode=mode).astype(target)
    rows, inside = _in_range(rows, table.shape[0], mode)
    look_up = without_derivative(partial(_look_up, dtype=target), _NO_DERIVATIVE)
    found = look_up(table, rows)
    return found if inside is None else jnp.where(inside[..., None], found, jnp.nan)


def _check(table: Array | QTensor, rows: Array, dtype: np.dtype, mode: str | None) -> None:
    if len(table.shape) != 2 or not table.shape[0]:
        raise ValueError(f"`table` is {describe(table)}: it must have two axes, and rows")
    for name, wanted in (("table", table.dtype), ("dtype", dtype)):
        if not jnp.issubdtype(wanted, jnp.floating):
            raise TypeError(f"`{name}` must be floating, got {wanted}")
    if not jnp.issubdtype(rows.dtype, jnp.integer):
        raise TypeError(f"`indices` is {describe(rows)}: they must be integers")
    if mode not in _MODES:
        raise ValueError(f"unknown `mode` {mode!r}: known are {_MODES}")


def _in_range(
    rows: Integer[Array, "*batch"], size: int, mode: str | None
) -> tuple[Integer[Array, "*batch"], Bool[Array, "*batch"] | None]:
    """Indices that are in range, and which of them ask for a row that there is (None: all)."""
    signed = jnp.issubdtype(rows.dtype, jnp.signedinteger)
    if rows.dtype.itemsize < 4:  # a narrow one may not hold the size
        rows = rows.astype(jnp.int32 if signed else jnp.uint32)
    count = jnp.asarray(size, rows.dtype)
    if mode == "wrap":
        return rows % count, None
    if mode == "clip":
        return jnp.clip(rows, 0, count - 1), None
    rows = jnp.where(rows < 0, rows + count, rows) if signed else rows
    clipped = jnp.clip(rows, 0, count - 1)
    return clipped, clipped == rows


def _look_up(
    table: QTensor, rows: Integer[Array, "*batch"], dtype: np.dtype
) -> Float[Array, "*batch d"]:
    table = without_tiles(table)
    axis = positions(stored_axes(table.layout, 2))[0]  # where the rows of the table are stored
    values = _take(table.values, rows, axis)
    values = jnp.moveaxis(values, 0, -1) if axis else values
    take_scales = partial(_take_scales, rows=rows, group=table.shape[0] // table.scale.shape[0])
    zero_point = None if table.zero_point is None else take_scales(table.zero_point)
    scale = take_scales(table.scale)
    found = replace(table, values=values, scale=scale, zero_point=zero_point, layout=None)
    return dequantize(found, dtype)


def _take_scales(
    scales: Shaped[Array, "sv sd"], rows: Integer[Array, "*batch"], group: int
) -> Shaped[Array, "*batch sd"]:
    if scales.shape[0] == 1:  # the whole table's
        return scales.reshape((1,) * rows.ndim + scales.shape[1:])
    return _take(scales, rows // jnp.asarray(group, rows.dtype), 0)


def _take(x: Shaped[Array, "..."], rows: Integer[Array, "*batch"], axis: int) -> Array:
    index = (*(slice(None),) * axis, rows)
    return x.at[index].get(mode="promise_in_bounds")
