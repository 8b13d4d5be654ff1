"""quantized_dot_general: `jax.lax.dot_general`, quantized on the way in, and its derivative."""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from ._contraction import Contraction, DimensionNumbers, contraction
from ._dot_formats import DotFormats
from ._dot_general import IMPLEMENTATIONS, multiply
from ._dot_scales import DotScales
from ._implementation import Operand, check_names, hashable
from ._operand import Axes
from ._qtensor import QTensor
from ._quantized_product import check_operands, quantized_product
from ._transposed import dlhs, drhs, onto_lhs, onto_rhs


def quantized_dot_general(
    lhs: Float[Array, "*lhs"],
    rhs: Float[Array, "*rhs"],
    dimension_numbers: DimensionNumbers,
    formats: DotFormats,
    *,
    scales: DotScales | None = None,
    amax_probes: DotScales | None = None,
    straight_through: bool = False,
    key: Array | None = None,
    precision: jax.lax.PrecisionLike = None,
    preferred_element_type: DTypeLike | None = None,
    implementation: str | Sequence[str] | None = None,
) -> tuple[Float[Array, "*out"], DotScales]:
    """`jax.lax.dot_general` of arrays, quantized on the way in, and its derivative likewise.

    ::

        out  = lhs   @ rhs      quantized as `formats.out`
        dlhs = g     @ rhs.T    quantized as `formats.dlhs`
        drhs = lhs.T @ g        quantized as `formats.drhs`

    Rounding is passed straight through, and what a given scale clips gets no gradient. The
    forward pass saves the quantized operands and, where a scale is given and clips, a bit per
    entry; under `jax.checkpoint` their name is "quantization"
    (`save_only_these_names("quantization")`).

    Args:
        lhs: A floating array.
        rhs: A floating array.
        dimension_numbers: As in `jax.lax.dot_general`.
        formats: A format for each operand of each of the three products.
        scales: Scales known before (static or delayed), each as `quantize` takes it; a None, or
            None for all of them, is a scale from the amax of the operand at hand (current), and so
            is an entry of 0.
        amax_probes: Zeros of the shapes of amaxes, whose cotangents are these amaxes: of the
            operands as the forward pass quantized them, in `lhs` and `rhs`, and of the gradient
            as it meets each product, after a scale has been folded in, in `dlhs` and `drhs`.
            Where the gradient is zero throughout, so are the cotangents. A probe used in several
            products adds theirs up, in its own dtype; one that `jax.vmap` does not map, or that
            the devices of a `jax.shard_map` share, gets the largest over entries or devices.
        straight_through: Whether what a given scale clips has a gradient all the same, as is
            usual in training with delayed scaling. Otherwise it has none.
        key: A PRNG key for the operands whose format is stochastic, of which every one gets noise
            of its own.
        precision: As in `dot_general`, for all three products.
        preferred_element_type: The dtype of `out`; `jnp.result_type` of the operands if None.
            The derivatives have the dtypes of their operands.
        implementation: As in `dot_general`, for all three products.

    Returns:
        `out`, and the amaxes of the operands that were quantized, in `lhs` and `rhs`: float32, of
        the shape of the scale given, or of the scale that was found. They have no derivative.

    Raises:
        TypeError: If an operand is a QTensor or not floating, `preferred_element_type` is not
            floating, or an argument is of the wrong class.
        ValueError: If the shapes do not go together, a scale or a block does not fit, a stochastic
            format has no key, or an implementation is unknown.
        NotImplementedError: If no implementation allowed takes a product.
    """
    check_names(IMPLEMENTATIONS, implementation)
    left, right = check_operands(lhs, rhs, formats, scales, amax_probes)
    axes = contraction(left.shape, right.shape, dimension_numbers)
    return quantized_product(
        _Dots(axes, precision, hashable(implementation)),
        left,
        right,
        formats,
        scales,
        amax_probes,
        straight_through,
        key,
        preferred_element_type,
    )


@dataclass(frozen=True)
class _Dots:
    """The three products of a differentiable dot: `Products` of a contraction."""

    axes: Contraction
    precision: jax.lax.PrecisionLike
    implementation: str | tuple[str, ...] | None

    @property
    def out_axes(self) -> tuple[Axes, Axes]:
        return _parts(self.axes)

    @property
    def dlhs_axes(self) -> tuple[Axes, Axes]:
        return _parts(dlhs(self.axes).contraction)

    @property
    def drhs_axes(self) -> tuple[Axes, Axes]:
        return _parts(drhs(self.axes).contraction)

    def out(self, lhs: Operand, rhs: Operand, dtype: np.dtype) -> Float[Array, "*out"]:
        return self._multiply(lhs, rhs, self.axes, dtype)

    def dlhs(self, g: Operand, rhs: Operand, dtype: np.dtype) -> Float[Array, "*lhs"]:
        to_lhs = dlhs(self.axes)
        return self._multiply(g, rhs, to_lhs.contraction, dtype).transpose(to_lhs.order)

    def drhs(self, lhs: Operand, g: Operand, dtype: np.dtype) -> Float[Array, "*rhs"]:
        to_rhs = drhs(self.axes)
        return self._multiply(lhs, g, to_rhs.contraction, dtype).transpose(to_rhs.order)

    def rhs_onto_g(self, scale: Float[Array, "..."]) -> Float[Array, "..."]:
        return onto_lhs(scale, dlhs(self.axes).contraction)

    def lhs_onto_g(self, scale: Float[Array, "..."]) -> Float[Array, "..."]:
        return onto_rhs(scale, drhs(self.axes).contraction)

    def _multiply(
        self, lhs: Operand, rhs: Operand, axes: Contraction, dtype: np.dtype
    ) -> Float[Array, "..."]:
        if isinstance(lhs, QTensor) or isinstance(rhs, QTensor):
            return multiply(lhs, rhs, axes, self.precision, dtype, self.implementation)
        return jax.lax.dot_general(lhs, rhs, axes.dimension_numbers, self.precision, dtype)


def _parts(c: Contraction) -> tuple[Axes, Axes]:
    return Axes(c.lhs_contract, c.lhs_free), Axes(c.rhs_contract, c.rhs_free)
