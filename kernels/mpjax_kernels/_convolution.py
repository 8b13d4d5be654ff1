"""A convolution: which axes of two operands are what, and how the window moves."""

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jax.lax import ConvDimensionNumbers
from jax.typing import DTypeLike
from jaxtyping import Array

from ._layout import positions

Padding = str | Sequence[tuple[int, int]]


@dataclass(frozen=True)
class Convolution:
    """The arguments of `jax.lax.conv_general_dilated`, made canonical.

    Attributes:
        lhs_shape: The shape of the images.
        rhs_shape: The shape of the kernel.
        axes: The axes of the images (batch, features, then space), of the kernel (output
            features, input features, then space) and of the result, as the images'.
        window_strides: How far the window moves, per axis of space, as all that follow.
        padding: The zeros before and after.
        lhs_dilation: The distance of neighbours in the image.
        rhs_dilation: The distance of neighbours in the kernel.
        feature_group_count: Into how many groups the features are cut.
        batch_group_count: Into how many groups the batch is cut.
    """

    lhs_shape: tuple[int, ...]
    rhs_shape: tuple[int, ...]
    axes: ConvDimensionNumbers
    window_strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    lhs_dilation: tuple[int, ...]
    rhs_dilation: tuple[int, ...]
    feature_group_count: int
    batch_group_count: int

    @property
    def terms(self) -> int:
        """How many products are summed, at most."""
        return math.prod(self.rhs_shape) // max(self.rhs_shape[self.axes.rhs_spec[0]], 1)

    @property
    def result_shape(self) -> tuple[int, ...]:
        """The shape of the result."""
        shapes = (jax.ShapeDtypeStruct(s, jnp.float32) for s in (self.lhs_shape, self.rhs_shape))
        return jax.eval_shape(self, *shapes).shape

    def __call__(
        self,
        lhs: Array,
        rhs: Array,
        precision: jax.lax.PrecisionLike = None,
        dtype: DTypeLike | None = None,
    ) -> Array:
        """The convolution of two arrays, by XLA."""
        return jax.lax.conv_general_dilated(
            lhs,
            rhs,
            self.window_strides,
            self.padding,
            self.lhs_dilation,
            self.rhs_dilation,
            self.axes,
            self.feature_group_count,
            self.batch_group_count,
            precision,
            dtype,
        )

    def reordered(self, lhs_axes: tuple[int, ...], rhs_axes: tuple[int, ...]) -> "Convolution":
        """The same convolution of operands whose axes are put in the orders given."""
        left, right = positions(lhs_axes), positions(rhs_axes)
        return replace(
            self,
            lhs_shape=tuple(self.lhs_shape[a] for a in lhs_axes),
            rhs_shape=tuple(self.rhs_shape[a] for a in rhs_axes),
            axes=ConvDimensionNumbers(
                tuple(left[a] for a in self.axes.lhs_spec),
                tuple(right[a] for a in self.axes.rhs_spec),
                self.axes.out_spec,
            ),
        )


def convolution(
    lhs_shape: tuple[int, ...],
    rhs_shape: tuple[int, ...],
    window_strides: Sequence[int],
    padding: Padding,
    lhs_dilation: Sequence[int] | None,
    rhs_dilation: Sequence[int] | None,
    dimension_numbers: jax.lax.ConvGeneralDilatedDimensionNumbers,
    feature_group_count: int,
    batch_group_count: int,
) -> Convolution:
    """Makes a `Convolution`; whether the shapes go together, JAX says.

    Raises:
        TypeError, ValueError: As `jax.lax.conv_general_dilated`.
    """
    axes = jax.lax.conv_dimension_numbers(lhs_shape, rhs_shape, dimension_numbers)
    ones = (1,) * (len(lhs_shape) - 2)
    strides = _per_axis("window_strides", window_strides, ones)
    before = ones if lhs_dilation is None else _per_axis("lhs_dilation", lhs_dilation, ones)
    apart = ones if rhs_dilation is None else _per_axis("rhs_dilation", rhs_dilation, ones)
    if isinstance(padding, str):
        if before != ones:
            raise ValueError(
                f"`padding` {padding!r} with `lhs_dilation` {before}: a transposed convolution "
                "needs its padding in numbers"
            )
        image = [lhs_shape[a] for a in axes.lhs_spec[2:]]
        kernel = [rhs_shape[a] for a in axes.rhs_spec[2:]]
        padding = _in_numbers(padding, image, kernel, strides, apart)
    result = Convolution(
        lhs_shape,
        rhs_shape,
        axes,
        strides,
        _pairs(padding, ones),
        before,
        apart,
        feature_group_count,
        batch_group_count,
    )
    _ = result.result_shape  # JAX checks the shapes when it infers that of the result
    return result


def _in_numbers(
    padding: str,
    image: Sequence[int],
    kernel: Sequence[int],
    strides: tuple[int, ...],
    apart: tuple[int, ...],
) -> Sequence[tuple[int, int]]:
    window = [(k - 1) * d + 1 if k else 0 for k, d in zip(kernel, apart, strict=True)]
    return jax.lax.padtype_to_pads(image, window, strides, padding)


def _per_axis(name: str, value: Sequence[int], ones: tuple[int, ...]) -> tuple[int, ...]:
    try:
        result = tuple(map(operator.index, value))
    except TypeError:
        result = None
    if result is None or len(result) != len(ones):
        error = TypeError if result is None else ValueError
        raise error(f"`{name}` is {value!r}: it must hold an int per axis of space, as in {ones}")
    return result


def _pairs(
    padding: Sequence[tuple[int, int]], ones: tuple[int, ...]
) -> tuple[tuple[int, int], ...]:
    try:
        return tuple((operator.index(low), operator.index(high)) for low, high in padding)
    except (TypeError, ValueError):
        example = tuple((one, one) for one in ones)
        raise TypeError(
            f"`padding` is {padding!r}: it must be 'SAME', 'SAME_LOWER', 'VALID' or the zeros "
            f"(before, after) per axis of space, as in {example}"
        ) from None
