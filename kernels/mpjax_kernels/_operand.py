"""An operand of a differentiable product: quantized as its `OperandFormat` says."""

from dataclasses import dataclass, replace
from math import prod

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, UInt8

from ._cpu_memory import once
from ._dot_formats import OperandFormat
from ._formats import get_format
from ._granularity import granularity_of
from ._largest import largest
from ._probe import over_shared
from ._qtensor import QTensor
from ._quantize import known_scale, quantize, quantize_by


@dataclass(frozen=True)
class Axes:
    """The part that the axes of an operand play in a product."""

    contract: tuple[int, ...]
    free: tuple[int, ...]


def quantize_operand(
    x: Float[Array, "*shape"],
    how: OperandFormat | None,
    axes: Axes,
    scale: Float[Array, "..."] | None,
    key: Array | None,
) -> tuple[Array | QTensor, Float[Array, "..."] | None]:
    """Quantizes by the scale given, or one from the amax of each part that shares it.

    An operand without a format stays as it is.

    Returns:
        The operand, and the amax of each part that shares a scale, or None if it was not
        quantized: of the shape of `scale`, or of the scale that was found.

    Raises:
        ValueError: If a block does not divide an axis, or the shape of `scale` does not fit.
    """
    if how is None:
        return x, None
    key = key if how.stochastic else None
    if scale is not None:
        # What is not known yet is found in all that shares the scale, on other devices too.
        known, format = known_scale(scale, x.shape), get_format(how.format)
        q, amax = quantize_by(x, format, known, key, over=over_shared)
        return q, amax.reshape(jnp.shape(scale))
    if how.granularity == "tensor":
        unknown = jnp.zeros((1,) * x.ndim, jnp.float32)
        return quantize_by(x, get_format(how.format), unknown, key)
    q = _quantize_in_parts(x, how, axes, key)
    q = replace(q, scale=once(q.scale))
    return q, _amax(x, q.scale.shape)


def _quantize_in_parts(
    x: Float[Array, "*shape"], how: OperandFormat, axes: Axes, key: Array | None
) -> QTensor:
    if how.granularity == "channel":
        return quantize(x, how.format, axis=axes.contract, key=key)
    assert not isinstance(how.granularity, str)
    sizes = zip((axes.free[-1:], axes.contract[-1:]), how.granularity, strict=True)
    blocks = {a: size for axis, size in sizes for a in axis if size > 1}
    groups = tuple(blocks.values()) if blocks else None
    return quantize(x, how.format, axis=tuple(blocks), group_size=groups, key=key)


def _amax(x: Float[Array, "*shape"], scales: tuple[int, ...]) -> Float[Array, "*scales"]:
    blocks = granularity_of(x.shape, scales)
    split = x.astype(jnp.float32).reshape(blocks.split)
    return largest(split, blocks.reduced).reshape(scales)


def pack_unclipped(x: Float[Array, "*shape"], q: QTensor) -> UInt8[Array, " bytes"]:
    """One bit per entry: whether it was within the range of the scale."""
    blocks = granularity_of(x.shape, q.scale.shape)
    split = jnp.abs(x.astype(jnp.float32).reshape(blocks.split))
    shape = [1 if a in blocks.reduced else size for a, size in enumerate(blocks.split)]
    # An entry of exactly the range is within it, however the scale was rounded; and what is not
    # finite is not clipped: it stays visible in the gradient.
    beyond = split > (1 + 2.0**-22) * q.format.max * q.scale.reshape(shape)
    return jnp.packbits(~beyond.reshape(-1))


def unpack_unclipped(bits: UInt8[Array, " bytes"], shape: tuple[int, ...]) -> Bool[Array, "*shape"]:
    """The entries that `pack_unclipped` saw within range."""
    return jnp.unpackbits(bits, count=prod(shape)).reshape(shape).astype(jnp.bool_)


def name_saved(tree, name: str):
    """Names what a pass saves, so that a policy of `jax.checkpoint` can keep it."""
    return jax.tree.map(lambda leaf: checkpoint_name(leaf, name), tree)
