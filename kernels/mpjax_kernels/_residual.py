"""What a quantized product keeps for its derivative, and how it is multiplied there."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from ._dot_formats import OperandFormat
from ._groups import is_grouped
from ._implementation import Operand
from ._operand import Axes, name_saved, pack_unclipped, quantize_operand, unpack_unclipped
from ._qtensor import QTensor
from ._quantize import dequantize
from ._storage import expand_scale

# What Transformer Engine and MaxText call it, so that their policies keep ours too.
CHECKPOINT_NAME = "quantization"

# A dot per run of fewer entries than this costs more than quantizing the operand anew.
_SHORTEST_RUN = 32


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Saved:
    """What the backward pass needs of an operand, and which entries were not clipped."""

    operand: Array | QTensor
    unclipped: UInt8[Array, " bytes"] | None

    def masked(self, gradient: Float[Array, "..."]) -> Float[Array, "..."]:
        if self.unclipped is None:
            return gradient
        unclipped = unpack_unclipped(self.unclipped, gradient.shape)
        return jnp.where(unclipped, gradient, jnp.zeros((), gradient.dtype))


def save(
    x, operand: Operand, backward, axes: Axes, scale: Float[Array, "..."] | None, key
) -> Saved:
    """Keeps an operand as it was multiplied, or as the backward product, of `axes`, will."""
    unclipped = None
    if isinstance(operand, QTensor):
        unclipped = None if scale is None else pack_unclipped(x, operand)
    else:
        operand, _ = quantize_operand(x, backward, axes, None, key)
    return name_saved(Saved(operand, unclipped), CHECKPOINT_NAME)


def requantize(
    operand: Operand, how: OperandFormat | None, axes: Axes, dtype: np.dtype, key: Array | None
) -> Operand:
    """A saved operand as a backward product multiplies it, which contracts other axes."""
    if not isinstance(operand, QTensor):
        return operand
    if how is None:
        return dequantize(operand, dtype)
    runs = [(operand.shape[a], operand.scale.shape[a]) for a in axes.contract]
    long = all(count == 1 or size >= _SHORTEST_RUN * count for size, count in runs)
    foldable = all(operand.scale.shape[a] == 1 for a in axes.free)
    if operand.format == how.format and (long or foldable):
        return operand
    return quantize_operand(dequantize(operand, jnp.float32), how, axes, None, key)[0]


def fold(
    g: Float[Array, "*out"],
    other: Operand,
    axes: Axes,
    onto: Callable[[Float[Array, "..."]], Float[Array, "..."]],
    how: OperandFormat | None,
) -> tuple[Float[Array, "*out"], Operand]:
    """Moves a scale of `other` that varies along its contracting axes, and no free one, to `g`."""
    if not isinstance(other, QTensor) or not is_grouped(other, axes.contract):
        return g, other
    if any(other.scale.shape[a] != 1 for a in axes.free):
        return g, other
    folded = g.astype(jnp.float32) * onto(expand_scale(other))
    one = jnp.ones((1,) * other.ndim, jnp.float32)
    # A scale can bring a float16 below what it holds, so that stays float32.
    high = how is None and g.dtype != jnp.float16
    return folded.astype(g.dtype if high else jnp.float32), replace(other, scale=one)
