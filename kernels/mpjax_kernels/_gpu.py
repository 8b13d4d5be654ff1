"""Products in the form that reaches the 8-bit tensor cores of a GPU.

`[b, m, k]` by `[b, n, k]`: one axis of each kind, the contracted one last in memory on both sides,
which is the only order in which Hopper multiplies float8. A weight that is stored [N, K]
(`contiguous(w, axis=0)`) is read as it lies; another is transposed on the way, in 8 bits.
Zeros make the terms a multiple of 32 (`_tensor_cores.py` says why).

The dot takes the raw values, and the scales come after it: cuBLASLt knows no scale but a scalar,
and XLA quietly multiplies in 16 bits where it is given another.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Shaped

from ._contraction import Contraction
from ._groups import is_grouped
from ._native_or import has_explicit_axes
from ._qtensor import QTensor, describe
from ._tensor_cores import zeros_after
from ._xla import integer_dot, overflow, scaled_dot


def refusal(
    lhs: Array | QTensor, rhs: Array | QTensor, contraction: Contraction, *_: Any
) -> str | None:
    """Why it does not multiply these; None if it does."""
    for name, operand, contract in (
        ("lhs", lhs, contraction.lhs_contract),
        ("rhs", rhs, contraction.rhs_contract),
    ):
        if not isinstance(operand, QTensor):
            return f"`{name}` is {describe(operand)}: it takes two QTensors"
        if operand.format.name.endswith("fnuz"):
            return f"`{name}` is {describe(operand)}: NVIDIA GPUs have no fnuz formats"
        if is_grouped(operand, contract):
            return f"`{name}` is {describe(operand)}: its scale varies along a contracting axis"
    assert isinstance(lhs, QTensor) and isinstance(rhs, QTensor)
    names = lhs.format.name, rhs.format.name
    if lhs.format.is_integer != rhs.format.is_integer or names == ("float8_e5m2",) * 2:
        return f"no tensor core multiplies {names[0]} by {names[1]}"
    c = contraction
    kinds = c.lhs_batch, c.lhs_free, c.lhs_contract, c.rhs_free, c.rhs_contract
    if has_explicit_axes() and max(map(len, kinds)) > 1:
        return "the mesh has explicit axes, and several axes of an operand would become one"
    return overflow(lhs, rhs, contraction.terms)


def dot_general(
    lhs: QTensor,
    rhs: QTensor,
    contraction: Contraction,
    precision: jax.lax.PrecisionLike,
    dtype: np.dtype,
) -> Array:
    """Multiplies the raw values with the contracted axis last, then by the scales in float32."""
    return scaled_dot(lhs, rhs, contraction, partial(_dot, precision=precision)).astype(dtype)


def _dot(
    lhs: QTensor, rhs: QTensor, contraction: Contraction, precision: jax.lax.PrecisionLike
) -> Shaped[Array, "*out"]:
    if lhs.format.is_integer:
        return integer_dot(lhs, rhs, contraction, partial(_matrix_dot, dtype=jnp.int32))
    # At the default precision Hopper adds float8 products up in about 14 bits (DeepSeek-V3
    # Technical Report, 2024, section 3.5.2, https://arxiv.org/abs/2412.19437).
    precision = jax.lax.Precision.HIGHEST if precision is None else precision
    product = partial(_matrix_dot, dtype=jnp.float32, precision=precision)
    return product(lhs.values, rhs.values, contraction)


def _matrix_dot(
    lhs: Shaped[Array, "*lhs"],
    rhs: Shaped[Array, "*rhs"],
    contraction: Contraction,
    dtype: Any,
    precision: jax.lax.PrecisionLike = None,
) -> Shaped[Array, "*out"]:
    c = contraction
    left = _stack(lhs, c.lhs_batch, c.lhs_free, c.lhs_contract)
    right = _stack(rhs, c.rhs_batch, c.rhs_free, c.rhs_contract)
    left, right = zeros_after(left, 2), zeros_after(right, 2)
    out = jax.lax.dot_general(
        left, right, (((2,), (2,)), ((0,), (0,))), precision, preferred_element_type=dtype
    )
    return out.reshape(c.result_shape)


def _stack(x: Shaped[Array, "..."], *kinds: tuple[int, ...]) -> Shaped[Array, "b _ _"]:
    """The axes of each kind as one.

    Neighbours become one before anything moves. XLA folds the transpose of a matrix into the dot,
    but that of a weight [K, heads, depth] it writes to memory, at every step of decoding.
    """
    sizes = [math.prod(x.shape[a] for a in kind) for kind in kinds]
    runs = [run for kind in kinds for run in _neighbours(kind)]
    stored = sorted(runs)
    x = x.reshape([math.prod(x.shape[a] for a in run) for run in stored])
    return x.transpose([stored.index(run) for run in runs]).reshape(sizes)


def _neighbours(axes: tuple[int, ...]) -> list[tuple[int, ...]]:
    """The axes cut into runs that follow each other: (2, 3, 0) into (2, 3) and (0,)."""
    runs: list[tuple[int, ...]] = []
    for axis in axes:
        if runs and runs[-1][-1] == axis - 1:
            runs[-1] += (axis,)
        else:
            runs.append((axis,))
    return runs
