"""Operations of a product, from the shapes and dimension numbers that the program gives it.

A multiplication and an addition are two. Of a convolution only those count that meet the image: the
TPU compiler writes batched matrix products as convolutions over padding, as wide as the batch.
"""

import math
import re
from dataclasses import dataclass

from ._hlo_program import Instruction
from ._hlo_shapes import Shape


def dot_flops(dot: Instruction, lhs: Shape) -> int:
    """`dot(lhs, rhs)`: twice the size of the result, for every term."""
    terms = math.prod(lhs.dims[axis] for axis in dot.numbers("lhs_contracting_dims"))
    return 2 * dot.shape.size * terms


def convolution_flops(call: Instruction, image: Shape, kernel: Shape, result: Shape) -> int:
    """`convolution(image, kernel)`, of which `call` has the window and the dimension labels."""
    labels = call.text("dim_labels")
    image_labels, kernel_labels, result_labels = re.split("_|->", labels)
    window = _window(call.text("window"), len(image_labels) - 2)
    positions = 1
    for axis, each in enumerate(window):
        label = str(axis)
        positions *= _met(
            each,
            image.dims[image_labels.index(label)],
            kernel.dims[kernel_labels.index(label)],
            result.dims[result_labels.index(label)],
        )
    batch = result.dims[result_labels.index("b")]  # of one batch group
    outputs = result.dims[result_labels.index("f")]
    inputs = kernel.dims[kernel_labels.index("i")]  # of one feature group
    return 2 * batch * outputs * inputs * positions


def matrix_flops(lhs: Shape, rhs: Shape, result: Shape, batch: int = 1) -> int:
    """A product of matrices [M, K] and [K, N], in either order of axes: its sizes tell K."""
    sizes = lhs.size * rhs.size // max(result.size * batch, 1)
    return 2 * result.size * math.isqrt(sizes)


@dataclass(frozen=True)
class _Axis:
    """The window along one axis of space."""

    stride: int
    low: int
    image_dilation: int
    kernel_dilation: int


def _window(text: str, axes: int) -> list[_Axis]:
    def values(name: str, default: str) -> list[str]:
        found = re.search(rf"\b{name}=([\dx_-]+)", text)
        return found[1].split("x") if found else [default] * axes

    strides, pads = values("stride", "1"), values("pad", "0_0")
    image, kernel = values("lhs_dilate", "1"), values("rhs_dilate", "1")
    return [
        _Axis(int(s), int(p.split("_")[0]), int(i), int(k))
        for s, p, i, k in zip(strides, pads, image, kernel, strict=True)
    ]


def _met(axis: _Axis, image: int, kernel: int, result: int) -> int:
    """How many pairs of an entry of the kernel and of the result meet an entry of the image."""
    met = 0
    for k in range(kernel):
        # The position in the image, between whose entries lie zeros: result * stride + offset.
        offset = k * axis.kernel_dilation - axis.low
        if axis.image_dilation == 1:
            first = max(0, -(offset // axis.stride))
            last = min(result - 1, (image - 1 - offset) // axis.stride)
            met += max(0, last - first + 1)
            continue
        end = (image - 1) * axis.image_dilation
        met += sum(
            0 <= (at := r * axis.stride + offset) <= end and at % axis.image_dilation == 0
            for r in range(result)
        )
    return met
