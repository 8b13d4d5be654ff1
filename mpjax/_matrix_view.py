"""Weights of any axes as matrices [K, N], which is how GPTQ, AWQ and SmoothQuant see them."""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

import mpjax_kernels as mk

from ._context import Product


@dataclasses.dataclass(frozen=True)
class MatrixView:
    """A stack of weights [*layers, ...] as [S, K, N]: S layers, K inputs, N outputs.

    Inputs and outputs are in the order of the weight's axes, so that a group of neighbours in the
    last contracted axes is a group of neighbours in K.

    Attributes:
      layers: the leading axes.
      product: how a layer multiplies its weight.
    """

    layers: tuple[int, ...]
    product: Product

    @property
    def _order(self) -> tuple[int, ...]:
        """The axes of the whole weight: layers, contracted, free."""
        first, ndim = len(self.layers), len(self.product.shape)
        summed = sorted(self.product.contracting)
        free = [axis for axis in range(ndim) if axis not in summed]
        return (*range(first), *(first + axis for axis in (*summed, *free)))

    @property
    def inputs(self) -> int:
        """K."""
        return math.prod(self.product.shape[axis] for axis in self.product.contracting)

    def matrices(self, weight: Float[Array, "..."]) -> Float[Array, "s k n"]:
        """The weight as [S, K, N]."""
        return jnp.transpose(weight, self._order).reshape(math.prod(self.layers), self.inputs, -1)

    def quantized(self, matrices: mk.QTensor, like: mk.QTensor) -> mk.QTensor:
        """A QTensor [S, K, N] with the axes of the weight.

        Args:
          matrices: what a method made.
          like: the weight rounded plainly, or its shapes: whose scales share the same entries.
        """

        def back(x: Any, shape: tuple[int, ...]) -> Any:
            ordered = x.reshape([shape[axis] for axis in self._order])
            return jnp.transpose(ordered, sorted(range(len(shape)), key=self._order.__getitem__))

        zero = matrices.zero_point
        return mk.QTensor(
            back(matrices.values, like.shape),
            back(matrices.scale, like.scale.shape),
            like.dtype,
            None if zero is None else back(zero, like.scale.shape),
        )

    def per_input(self, scales: Float[Array, "s k"]) -> Float[Array, "..."]:
        """A number per input as an array of the weight's rank, of size 1 along free axes."""
        product = self.product
        summed = product.contracting
        own = [size if axis in summed else 1 for axis, size in enumerate(product.shape)]
        return scales.reshape(*self.layers, *own)  # contracted axes are in the order of K
