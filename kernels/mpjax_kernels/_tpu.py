"""Products by the Pallas TPU kernels: what they take, and in which form they take it."""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from ._contraction import Contraction
from ._formats import Format
from ._qtensor import QTensor, describe
from ._quantize import quantize
from ._storage import spread
from ._tpu_blocks import LANES, Blocks, fused_blocks
from ._tpu_fused import fused_matmul
from ._tpu_matmul import scaled_matmul
from ._varying import varying_axes
from ._xla import overflow

_FORMATS = ("int8", "int4", "float8_e4m3fn", "float8_e5m2")
_ACTIVATION_FORMATS = ("int8", "float8_e4m3fn", "float8_e5m2")


def refusal(
    lhs: Array | QTensor, rhs: Array | QTensor, contraction: Contraction, *_: Any
) -> str | None:
    """Why the kernel does not multiply these; None if it does."""
    c = contraction
    if not isinstance(lhs, QTensor) or not isinstance(rhs, QTensor):
        name, array = ("rhs", rhs) if isinstance(lhs, QTensor) else ("lhs", lhs)
        return f"`{name}` is {describe(array)}: it multiplies two QTensors"
    reason = (
        _shard_map_refusal(lhs, rhs)
        or _operand_refusal("lhs", lhs, c.lhs_contract)
        or _operand_refusal("rhs", rhs, c.rhs_contract)
        or _pair_refusal(lhs.format, rhs.format)
    )
    groups = {_groups(lhs, c.lhs_contract), _groups(rhs, c.rhs_contract)} - {1}
    if reason is None and len(groups) > 1:
        return f"the scales of `lhs` and `rhs` vary along K in different groups, {sorted(groups)}"
    # With groups, only the sum of a block is one of integers.
    return reason or (None if groups else overflow(lhs, rhs, c.terms))


def dot_general(
    lhs: QTensor,
    rhs: QTensor,
    contraction: Contraction,
    precision: Any,
    dtype: np.dtype,
    *,
    blocks: Blocks | None = None,
    interpret: Any = False,
) -> Float[Array, "*out"]:
    """The product of two QTensors by `scaled_matmul`, as a batch of matrices.

    A right operand is taken as it is stored whether its contracting axes come before its free
    axes or after them; other orders are transposed first.
    """
    del precision  # products of 8-bit values are exact in float32, where they are summed
    c = contraction
    if 0 in (*c.lhs_shape, *c.rhs_shape):
        return jnp.zeros(c.result_shape, dtype)
    transposed = c.rhs_contract != () and c.rhs_contract[-1] == len(c.rhs_shape) - 1
    right = (c.rhs_free, c.rhs_contract) if transposed else (c.rhs_contract, c.rhs_free)
    left = _matrices(lhs.values, c.lhs_batch, c.lhs_free, c.lhs_contract)
    left_scale = _scales(lhs, c.lhs_batch, c.lhs_free, c.lhs_contract)
    right_scale = _scales(rhs, c.rhs_batch, c.rhs_free, c.rhs_contract)
    result = scaled_matmul(
        left.astype(jnp.int8) if lhs.format.is_integer else left,
        _matrices(rhs.values, c.rhs_batch, *right),
        left_scale[..., None],
        right_scale[..., None, :],
        _kernel_dtype(dtype),
        transposed=transposed,
        blocks=blocks,
        interpret=interpret,
    )
    return result.reshape(c.result_shape).astype(dtype)


def fused_refusal(
    x: Array, w: QTensor, contraction: Contraction, format: Format, dtype: np.dtype
) -> str | None:
    """Why the fused kernel does not quantize `x` and multiply it by `w`; None if it does."""
    del dtype
    if format.name not in _ACTIVATION_FORMATS:
        return f"it quantizes to one of {', '.join(_ACTIVATION_FORMATS)}, not to {format.name}"
    q = jax.eval_shape(partial(quantize, format=format, axis=-1), x)
    return refusal(q, w, contraction)


def fused(
    x: Float[Array, "*batch k"],
    w: QTensor,
    contraction: Contraction,
    format: Format,
    dtype: np.dtype,
    *,
    blocks: Blocks | None = None,
    interpret: Any = False,
) -> Float[Array, "*batch n"]:
    """`quantize(x, format, axis=-1)` times a weight of two axes, by `fused_matmul`.

    Where not even a few rows of `x` fit into VMEM, they are quantized before the product.
    """
    c = contraction
    if 0 in (*c.lhs_shape, *c.rhs_shape):
        return jnp.zeros(c.result_shape, dtype)
    wide = x if x.dtype == jnp.bfloat16 else x.astype(jnp.float32)
    scale = _scales(w, (), c.rhs_free, c.rhs_contract)[0]
    blocks = blocks or fused_blocks(c.rows, c.columns, c.terms, scale.shape[0], wide.dtype.itemsize)
    if blocks is None:
        return dot_general(quantize(x, format, axis=-1), w, c, None, dtype, interpret=interpret)
    result = fused_matmul(
        wide.reshape(c.rows, c.terms),
        w.values,
        scale[:, None, :],
        format,
        _kernel_dtype(dtype),
        transposed=c.rhs_contract == (1,),
        blocks=blocks,
        interpret=interpret,
    )
    return result.reshape(c.result_shape).astype(dtype)


def _shard_map_refusal(lhs: QTensor, rhs: QTensor) -> str | None:
    if varying_axes(lhs, rhs):
        return "inside `jax.shard_map` a Pallas kernel needs `check_vma=False`"
    return None


def _operand_refusal(name: str, q: QTensor, contract: tuple[int, ...]) -> str | None:
    if q.format.name not in _FORMATS:
        return f"`{name}` is {describe(q)}: it takes {', '.join(_FORMATS)}"
    if q.zero_point is not None:
        return f"`{name}` is {describe(q)}: it takes no zero point"
    grouped = [a for a in contract if q.scale.shape[a] != 1]
    if not grouped or q.size == 0:
        return None
    if len(contract) > 1:
        return f"`{name}` is {describe(q)}: its scale varies along one of several contracting axes"
    group = q.shape[grouped[0]] // q.scale.shape[grouped[0]]
    if group % LANES == 0:
        return None
    return f"`{name}` is {describe(q)}: a scale per {group} terms, which {LANES} does not divide"


def _pair_refusal(lhs: Format, rhs: Format) -> str | None:
    if lhs.is_integer == rhs.is_integer:
        return None
    return f"it multiplies integers, or float8 formats, but not {lhs.name} by {rhs.name}"


def _groups(q: QTensor, contract: tuple[int, ...]) -> int:
    return math.prod(q.scale.shape[a] for a in contract)


def _kernel_dtype(dtype: np.dtype) -> np.dtype:
    """What the kernel writes: TPUs have no float64, and float16 on some only."""
    return jnp.dtype(dtype if dtype == jnp.bfloat16 else jnp.float32)


def _matrices(
    values: Shaped[Array, "..."],
    batch: tuple[int, ...],
    first: tuple[int, ...],
    second: tuple[int, ...],
) -> Shaped[Array, "b _ _"]:
    sizes = (math.prod(values.shape[a] for a in axes) for axes in (batch, first, second))
    return values.transpose(batch + first + second).reshape(tuple(sizes))


def _scales(
    q: QTensor, batch: tuple[int, ...], free: tuple[int, ...], contract: tuple[int, ...]
) -> Float[Array, "b g _"]:
    """The scales spelled out along batch and free axes, with the groups of terms before those."""
    wide = tuple(q.scale.shape[a] if a in contract else size for a, size in enumerate(q.shape))
    return _matrices(jnp.broadcast_to(spread(q.scale, wide), wide), batch, contract, free)
