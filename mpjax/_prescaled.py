"""A stored weight whose inputs are multiplied by a number per channel first.

    y = (x * pre_quant_scale) @ weight

SmoothQuant and AWQ move part of the size of an input channel into the rows of the weight; this is
what takes it out of the activation again, before that is quantized. It is kept inside the weight,
and not folded into the layer before, because it is then right for every model: a layer before may
feed others too, be a residual sum, or not be linear. As the weight's own leaf it goes wherever the
weight goes: through scans that lift parameters, files, exports, shardings and graph operations. It
costs a multiplication that XLA fuses into the quantization.

It is no `QTensor`, so that a product that has never heard of it fails instead of leaving it out.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

import mpjax_kernels as mk


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class PreScaledWeight:
    """A quantized weight, and what its inputs are multiplied by before they are quantized.

    The weight that it stands for is `dequantize(quantized) * pre_quant_scale`.

    Attributes:
      quantized: the weight, its rows divided by `pre_quant_scale`.
      pre_quant_scale: float32, of the rank of the weight; size 1 along the axes that the product
        does not sum over, the size of the weight along the others and along stacked layers.
    """

    quantized: mk.QTensor
    pre_quant_scale: Float[Array, "*scales"]

    @property
    def values(self) -> Any:
        """As the QTensor's."""
        return self.quantized.values

    @property
    def scale(self) -> Any:
        """As the QTensor's."""
        return self.quantized.scale

    @property
    def zero_point(self) -> Any:
        """As the QTensor's."""
        return self.quantized.zero_point

    @property
    def layout(self) -> Any:
        """As the QTensor's."""
        return self.quantized.layout

    @property
    def tiles(self) -> Any:
        """As the QTensor's."""
        return self.quantized.tiles

    @property
    def stored_axes(self) -> tuple[int, ...]:
        """As the QTensor's."""
        return self.quantized.stored_axes

    @property
    def format(self) -> mk.Format:
        """As the QTensor's."""
        return self.quantized.format

    @property
    def dtype(self) -> Any:
        """The logical dtype."""
        return self.quantized.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight."""
        return self.quantized.shape

    @property
    def ndim(self) -> int:
        """The number of axes of the weight."""
        return self.quantized.ndim

    @property
    def size(self) -> int:
        """The number of entries of the weight."""
        return self.quantized.size

    @property
    def nbytes(self) -> int:
        """The bytes of all its arrays, two int4 values to a byte."""
        return self.quantized.nbytes + self.pre_quant_scale.size * 4

    def __getitem__(self, index: Any) -> "PreScaledWeight":
        """Basic indexing, as of a QTensor; `[...]` is the whole."""
        if index is Ellipsis:
            return self
        parts = index if isinstance(index, tuple) else (index,)
        if any(not isinstance(part, int) for part in parts) or len(parts) > self.ndim - 2:
            raise TypeError(f"{self!r} can be indexed by [...] and by the number of a layer only")
        return PreScaledWeight(self.quantized[parts], self.pre_quant_scale[parts])

    def __repr__(self) -> str:
        shape = ",".join(map(str, getattr(self.pre_quant_scale, "shape", ())))
        return f"PreScaledWeight({self.quantized!r}, pre_quant_scale float32[{shape}])"


def is_stored(x: Any) -> bool:
    """Whether `x` is a weight that `mpjax.quantize` stored."""
    return isinstance(x, mk.QTensor | PreScaledWeight)


def prescaled(
    x: Float[Array, "..."],
    scale: Float[Array, "*scales"],
    lhs_axes: Sequence[int],
    rhs_axes: Sequence[int],
) -> Float[Array, "..."]:
    """An activation times the scale of the weight that it is multiplied by, in float32.

    Args:
      x: the activation.
      scale: as `PreScaledWeight.pre_quant_scale` of one layer.
      lhs_axes: the axes of `x` that the product sums over.
      rhs_axes: the axes of the weight, in the same order.
    """
    contracted = jnp.transpose(scale, (*rhs_axes, *_rest(scale.ndim, rhs_axes)))
    contracted = contracted.reshape(contracted.shape[: len(rhs_axes)])
    order = sorted(range(len(lhs_axes)), key=lambda i: lhs_axes[i])
    shape = [x.shape[axis] if axis in lhs_axes else 1 for axis in range(x.ndim)]
    return x.astype(jnp.float32) * jnp.transpose(contracted, order).reshape(shape)


def _rest(ndim: int, axes: Sequence[int]) -> list[int]:
    return [axis for axis in range(ndim) if axis not in axes]
