"""The transposed convolution in 8 bits: a convolution of the image with zeros between its pixels.

    y = conv_general_dilated(x, w, strides=1, lhs_dilation=strides)

With `transpose_kernel` the kernel is that of the convolution whose transpose it is: its output
features are the axis before the last, and it is read backwards.
"""

from collections.abc import Sequence
from typing import Any

import jax

import mpjax_kernels as mk

from ._conv_product import QuantizedConv

Padding = str | int | Sequence[Any]


class QuantizedConvTranspose(QuantizedConv):
    """`lax.conv_transpose(activation, kernel)`, features last, in 8 bits; fields as the others'."""

    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        lhs: jax.Array,
        rhs: jax.Array | mk.QTensor,
        strides: Sequence[int],
        padding: Padding,
        rhs_dilation: Sequence[int],
        transpose_kernel: bool,
        precision: Any = None,
        preferred_element_type: Any = None,
    ) -> jax.Array:
        """Arguments as of `jax.lax.conv_transpose`."""
        space = lhs.ndim - 2
        inputs, outputs = (-1, -2) if transpose_kernel else (-2, -1)
        axes = jax.lax.ConvDimensionNumbers(
            (0, space + 1, *range(1, space + 1)),
            (space + 2 + outputs, space + 2 + inputs, *range(space)),
            (0, space + 1, *range(1, space + 1)),
        )
        sizes = [(k - 1) * d + 1 for k, d in zip(rhs.shape[:space], rhs_dilation, strict=True)]
        return super().__call__(
            lhs,
            rhs[(slice(None, None, -1),) * space] if transpose_kernel else rhs,
            (1,) * space,
            _pads(padding, sizes, strides),
            lhs_dilation=strides,
            rhs_dilation=rhs_dilation,
            dimension_numbers=axes,
            precision=precision,
            preferred_element_type=preferred_element_type,
        )


def multiplies_plainly(layer: Any) -> bool:
    """Whether a ConvTranspose of Flax does what is written out here, and no more."""
    return layer.mask is None and (
        not isinstance(layer.padding, str) or layer.padding in ("SAME", "VALID")
    )


def run_layer(
    product: QuantizedConvTranspose,
    layer: Any,
    x: jax.Array,
    kernel: jax.Array | mk.QTensor,
    bias: Any,
) -> jax.Array:
    """What Flax' ConvTranspose does with its arrays, which it gives no door to.

    Args:
      product: of one batch of images and the kernel.
      layer: the Linen or NNX layer, for its settings.
      x: [*batch, *space, inputs], with any number of batch axes.
      kernel: [*window, inputs, outputs], or [*window, outputs, inputs] with `transpose_kernel`.
      bias: [outputs], or None.

    Returns:
      [*batch, *space, outputs].
    """
    window = layer.kernel_size
    space = 1 if isinstance(window, int) else len(window)
    batch = x.shape[: x.ndim - space - 1]
    y = product(
        x.reshape(-1, *x.shape[len(batch) :]),
        kernel,
        _each(layer.strides, space),
        layer.padding,
        _each(layer.kernel_dilation, space),
        layer.transpose_kernel,
        precision=layer.precision,
        preferred_element_type=layer.preferred_element_type,
    )
    y = y if bias is None else y + bias
    return y.reshape(*batch, *y.shape[1:])


def _each(value: int | Sequence[int] | None, space: int) -> tuple[int, ...]:
    """A setting per axis of space; None is 1."""
    value = 1 if value is None else value
    return (value,) * space if isinstance(value, int) else tuple(value)


def _pads(padding: Padding, sizes: Sequence[int], strides: Sequence[int]) -> list[tuple[int, int]]:
    """The zeros before and after along each axis of space, as `lax.conv_transpose` adds them.

    Args:
      padding: of the convolution that is transposed, if a text; else of the dilated image.
      sizes: of the window, dilated.
      strides: of the convolution that is transposed.
    """
    if isinstance(padding, str):
        return [_pad(padding, k, s) for k, s in zip(sizes, strides, strict=True)]
    each = (padding,) * len(sizes) if isinstance(padding, int) else padding
    return [(pad, pad) if isinstance(pad, int) else tuple(pad) for pad in each]


def _pad(padding: str, size: int, stride: int) -> tuple[int, int]:
    if padding == "VALID":
        return size - 1, max(size, stride) - 1
    before = size - 1 if stride > size - 1 else -(-(size + stride - 2) // 2)
    return before, size + stride - 2 - before
