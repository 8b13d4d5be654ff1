"""Ragged products as a loop over experts.

Where there is no ragged instruction, XLA makes a dense product of G times the rows, all but a part
of them zero. A loop that multiplies all rows by one expert after the other does as many operations,
none for an expert without rows, and never holds more than one of them.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer

from ._contraction import Contraction
from ._dot_general import IMPLEMENTATIONS, multiply
from ._implementation import Operand
from ._qtensor import QTensor, in_order
from ._reference import dot_general as reference_dot_general
from ._varying import vary_like

# Those of dot_general that run on CPUs, but for its reference.
_FAST = tuple(
    name
    for name, each in IMPLEMENTATIONS.items()
    if name != "reference" and (not each.platforms or "cpu" in each.platforms)
)


def refusal(lhs: Operand, rhs: Operand, sizes: Array, *_: Any) -> str | None:
    """Why the product of all rows and one expert is not one for `dot_general` to do fast."""
    one = jax.eval_shape(lambda rhs: jax.tree.map(lambda x: x[0], _per_expert(rhs)), rhs)
    return IMPLEMENTATIONS["xla"].refusal(lhs, one, _rows_by_expert(lhs, rhs))


def no_refusal(*_: Any) -> None:
    """The reference takes everything."""


def ragged_dot(
    lhs: Operand,
    rhs: Operand,
    sizes: Integer[Array, " g"],
    precision: jax.lax.PrecisionLike,
    dtype: np.dtype,
) -> Float[Array, "m n"]:
    """Multiplies expert by expert as `dot_general` does, without its reference."""
    product = partial(
        multiply,
        axes=_rows_by_expert(lhs, rhs),
        precision=precision,
        dtype=dtype,
        implementation=_FAST,
    )
    return _loop(lhs, rhs, sizes, product, dtype)


def reference_ragged_dot(
    lhs: Operand,
    rhs: Operand,
    sizes: Integer[Array, " g"],
    precision: jax.lax.PrecisionLike,
    dtype: np.dtype,
) -> Float[Array, "m n"]:
    """Dequantizes one expert after the other and multiplies in full float32. Takes everything."""
    product = partial(
        reference_dot_general,
        contraction=_rows_by_expert(lhs, rhs),
        precision=precision,
        dtype=dtype,
    )
    return _loop(lhs, rhs, sizes, product, dtype)


def _rows_by_expert(lhs: Operand, rhs: Operand) -> Contraction:
    """All rows [M, K] times one expert [K, N]."""
    return Contraction(lhs.shape, rhs.shape[1:], (1,), (0,), (), ())


def _loop(
    lhs: Operand,
    rhs: Operand,
    sizes: Integer[Array, " g"],
    product: Callable[..., Float[Array, "m n"]],
    dtype: np.dtype,
) -> Float[Array, "m n"]:
    ends = jnp.cumsum(sizes)
    row = jnp.arange(lhs.shape[0], dtype=ends.dtype)[:, None]

    def add_expert(result, expert):
        rhs, start, end = expert
        mine = (start <= row) & (row < end)
        result = jax.lax.cond(
            start < end,
            lambda rhs: jnp.where(mine, product(lhs, rhs), result),
            lambda rhs: result,
            rhs,
        )
        return result, None

    nothing = vary_like(jnp.zeros((lhs.shape[0], rhs.shape[2]), dtype), lhs, rhs, sizes)
    return jax.lax.scan(add_expert, nothing, (_per_expert(rhs), ends - sizes, ends))[0]


def _per_expert(rhs: Operand) -> Operand:
    """The experts with a scale of its own for each, so that a loop can go over them."""
    if not isinstance(rhs, QTensor):
        return rhs
    if rhs.layout is not None and len(rhs.layout) == 3:
        rhs = in_order(rhs)
    times = rhs.shape[0] // rhs.scale.shape[0]
    zero_point = None if rhs.zero_point is None else jnp.repeat(rhs.zero_point, times, axis=0)
    return replace(rhs, scale=jnp.repeat(rhs.scale, times, axis=0), zero_point=zero_point)
