"""quantized_conv_general_dilated: a convolution, quantized on the way in, and its derivative."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from . import _conv_transposed
from ._conv import IMPLEMENTATIONS, convolve
from ._conv_transposed import laid_out
from ._convolution import Convolution, Padding, convolution
from ._dot_formats import DotFormats, OperandFormat, Resolved
from ._dot_scales import DotScales
from ._implementation import Operand, check_names, hashable
from ._operand import Axes
from ._qtensor import QTensor
from ._quantize import known_scale
from ._quantized_product import check_operands, quantized_product


def quantized_conv_general_dilated(
    lhs: Float[Array, "*lhs"],
    rhs: Float[Array, "*rhs"],
    window_strides: Sequence[int],
    padding: Padding,
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: jax.lax.ConvGeneralDilatedDimensionNumbers = None,
    feature_group_count: int = 1,
    batch_group_count: int = 1,
    *,
    formats: DotFormats,
    scales: DotScales | None = None,
    amax_probes: DotScales | None = None,
    straight_through: bool = False,
    key: Array | None = None,
    precision: jax.lax.PrecisionLike = None,
    preferred_element_type: DTypeLike | None = None,
    implementation: str | Sequence[str] | None = None,
) -> tuple[Float[Array, "*out"], DotScales]:
    """`jax.lax.conv_general_dilated` of arrays, quantized on the way in, and its derivative.

    ::

        out  = conv(lhs, rhs)           quantized as `formats.out`
        dlhs = conv_in_lhs.T(g, rhs)    quantized as `formats.dlhs`
        drhs = conv_in_rhs.T(lhs, g)    quantized as `formats.drhs`

    `quantized_dot_general` says what is saved, clipped and observed: it is the same here. The
    granularity "channel" is a scale per image and per output feature, and of `lhs` and `rhs` where
    a backward product quantizes them anew, per input feature. A scale that varies along an axis
    that a backward product sums over multiplies `g` before that is quantized.

    The forward product is `conv_general_dilated`'s, by the same implementations. The backward ones
    are JAX's transposes of it, of the 8-bit values in float32 with float32 sums, which the scales
    multiply afterwards: a product of two 8-bit values is exact, on hardware that multiplies in
    bfloat16 or TF32 too. Integers beyond 2**24 in a sum are rounded, as in float32.

    Args:
        lhs: Images, a floating array.
        rhs: A kernel, a floating array.
        window_strides: As in `jax.lax.conv_general_dilated`, as all up to `formats`.
        padding: The same.
        lhs_dilation: The same.
        rhs_dilation: The same.
        dimension_numbers: The same.
        feature_group_count: The same.
        batch_group_count: The same.
        formats: A format for each operand of each of the three products, in one scale per tensor
            or per channel.
        scales: Scales known before, as in `quantized_dot_general`. One may vary only as a scale
            per channel does.
        amax_probes: Zeros whose cotangents are amaxes, as in `quantized_dot_general`.
        straight_through: Whether what a given scale clips has a gradient all the same.
        key: A PRNG key for the operands whose format is stochastic.
        precision: As in `conv_general_dilated`, for all three products.
        preferred_element_type: The dtype of `out`; `jnp.result_type` of the operands if None.
        implementation: As in `conv_general_dilated`, for the forward product.

    Returns:
        `out`, and the amaxes of the operands that were quantized, in `lhs` and `rhs`: float32, of
        the shape of the scale given, or of the scale that was found. They have no derivative.

    Raises:
        TypeError: As `jax.lax.conv_general_dilated` and `quantized_dot_general`.
        ValueError: As those, or if a scale varies along an axis along which none may.
        NotImplementedError: If the granularity of a format is a block; if it is "channel" beside
            groups of the batch, or beside groups of features where a backward product quantizes
            `lhs` or `rhs` anew; or if no implementation allowed takes the forward product.
    """
    check_names(IMPLEMENTATIONS, implementation)
    left, right = check_operands(lhs, rhs, formats, scales, amax_probes)
    window = convolution(
        left.shape,
        right.shape,
        window_strides,
        padding,
        lhs_dilation,
        rhs_dilation,
        dimension_numbers,
        feature_group_count,
        batch_group_count,
    )
    products = _Convolutions(window, precision, hashable(implementation))
    _check_granularity(formats, window)
    _check_scales(scales or DotScales(), products)
    return quantized_product(
        products,
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
class _Convolutions:
    """The three products of a differentiable convolution: `Products` of a window.

    An operand has one free axis, along which its scale may vary: of the images and of the kernel
    forward, that of the batch and of output features. Groups take it away from some.
    """

    window: Convolution
    precision: jax.lax.PrecisionLike
    implementation: str | tuple[str, ...] | None

    @property
    def out_axes(self) -> tuple[Axes, Axes]:
        axes = self.window.axes
        return self._summed_but(axes.lhs_spec[0]), self._summed_but(axes.rhs_spec[0])

    @property
    def dlhs_axes(self) -> tuple[Axes, Axes]:
        axes = self.window.axes
        return self._summed_but(axes.out_spec[0]), self._summed_but(axes.rhs_spec[1])

    @property
    def drhs_axes(self) -> tuple[Axes, Axes]:
        axes = self.window.axes
        return self._summed_but(axes.lhs_spec[1]), self._summed_but(axes.out_spec[1])

    def _summed_but(self, free: int) -> Axes:
        ndim = len(self.window.lhs_shape)
        return Axes(tuple(a for a in range(ndim) if a != free), (free,))

    def out(self, lhs: Operand, rhs: Operand, dtype: np.dtype) -> Float[Array, "*out"]:
        window, precision = self.window, self.precision
        if isinstance(lhs, QTensor) or isinstance(rhs, QTensor):
            return convolve(lhs, rhs, window, precision, dtype, self.implementation)
        with jax.numpy_dtype_promotion("standard"):  # it is we who mix them, not the caller
            wide = jnp.promote_types(lhs.dtype, rhs.dtype)
        return window(lhs.astype(wide), rhs.astype(wide), precision, dtype)

    def dlhs(self, g: Operand, rhs: Operand, dtype: np.dtype) -> Float[Array, "*lhs"]:
        return _conv_transposed.dlhs(g, rhs, self.window, self.precision, dtype)

    def drhs(self, lhs: Operand, g: Operand, dtype: np.dtype) -> Float[Array, "*rhs"]:
        return _conv_transposed.drhs(lhs, g, self.window, self.precision, dtype)

    def rhs_onto_g(self, scale: Float[Array, "..."]) -> Float[Array, "..."]:
        axes = self.window.axes
        return laid_out(scale, axes.rhs_spec[0], axes.out_spec[1], scale.ndim)

    def lhs_onto_g(self, scale: Float[Array, "..."]) -> Float[Array, "..."]:
        axes = self.window.axes
        return laid_out(scale, axes.lhs_spec[0], axes.out_spec[0], scale.ndim)


def _check_granularity(formats: DotFormats, window: Convolution) -> None:
    out, dlhs, drhs = (cast(Resolved, pair) for pair in (formats.out, formats.dlhs, formats.drhs))
    for name, pair in (("out", out), ("dlhs", dlhs), ("drhs", drhs)):
        for operand in pair:
            if operand is not None and isinstance(operand.granularity, tuple):
                raise NotImplementedError(
                    f"`formats.{name}` has the granularity {operand.granularity}: the scales of a "
                    "convolution are 'tensor' or 'channel'"
                )
            if window.batch_group_count != 1 and _is_per_channel(operand):
                raise NotImplementedError(
                    f"`formats.{name}` has the granularity 'channel', but `batch_group_count` is "
                    f"{window.batch_group_count}: use 'tensor' there"
                )
    for name, saved, backward in (("dlhs", out[1], dlhs[1]), ("drhs", out[0], drhs[0])):
        anew = backward is not None and (saved is None or saved.format != backward.format)
        if window.feature_group_count != 1 and anew and _is_per_channel(backward):
            raise NotImplementedError(
                f"`formats.{name}` quantizes an operand per channel that `formats.out` does not "
                f"have in that format, but `feature_group_count` is {window.feature_group_count}: "
                "use 'tensor', or the same format in both"
            )


def _is_per_channel(operand: OperandFormat | None) -> bool:
    return operand is not None and operand.granularity == "channel"


def _check_scales(scales: DotScales, products: _Convolutions) -> None:
    (lhs, rhs), window = products.out_axes, products.window
    dlhs, drhs = products.dlhs_axes[0], products.drhs_axes[1]
    shapes = {"lhs": window.lhs_shape, "rhs": window.rhs_shape}
    for name, axes in (("lhs", lhs), ("rhs", rhs), ("dlhs", dlhs), ("drhs", drhs)):
        scale = getattr(scales, name)
        if scale is None:
            continue
        shape = known_scale(scale, shapes.get(name, window.result_shape)).shape
        free = axes.free if window.batch_group_count == 1 else ()
        if any(size != 1 for a, size in enumerate(shape) if a not in free):
            where = f"along axis {free[0]} alone" if free else "nowhere"
            raise ValueError(
                f"`scales.{name}` has shape {shape}: in a convolution like this it may vary {where}"
            )
