"""Whether 8 bits pay in one product: its roofline on a target, with and without quantization."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Self

import jax.numpy as jnp

from ._target import Target


@dataclasses.dataclass(frozen=True)
class ProductSize:
    """The sizes of one product, convolutions included.

    Attributes:
        activation: Entries of the activation.
        weight: Entries of the weight.
        output: Entries of the output.
        terms: Products that are summed to one entry of the output.
    """

    activation: int
    weight: int
    output: int
    terms: int

    @classmethod
    def of_dot(
        cls,
        activation: Sequence[Any],
        weight: Sequence[Any],
        contracting: Sequence[int],
        batch: Sequence[int] = (),
    ) -> Self:
        """Of a `dot_general` of two shapes, given those axes of the weight."""
        x, w = math.prod(activation), math.prod(weight)
        terms = math.prod(weight[axis] for axis in contracting)
        shared = terms * math.prod(weight[axis] for axis in batch)
        return cls(x, w, x // shared * (w // terms) if shared else 0, terms)

    @classmethod
    def of_conv(
        cls,
        activation: Sequence[Any],
        weight: Sequence[Any],
        contracting: Sequence[int],
        output: Sequence[Any],
    ) -> Self:
        """Of a convolution of two shapes that makes a third."""
        terms = math.prod(weight[axis] for axis in contracting)
        return cls(math.prod(activation), math.prod(weight), math.prod(output), terms)

    @property
    def is_known(self) -> bool:
        """Whether no size is symbolic, as in an export."""
        return all(isinstance(n, int) for n in dataclasses.astuple(self))


@dataclasses.dataclass(frozen=True)
class Roofline:
    """The least time of a product on a target, in seconds; see `roofline`.

    Attributes:
        plain: In the compute dtype.
        quantized: In 8 bits, with what quantizing the operands and scaling the result take.
    """

    plain: float
    quantized: float

    @property
    def pays(self) -> bool:
        """Whether 8 bits are no slower."""
        return self.quantized <= self.plain


def roofline(
    target: Target,
    size: ProductSize,
    *,
    compute_dtype: str,
    format: str,
    weight_bytes: int,
    is_stored: bool = False,
    is_scale_known: bool = False,
) -> Roofline:
    """Returns the least time of a product on a target, with and without quantization.

    A pass over memory takes its bytes by the bandwidth, a product the longer of that and its
    operations by the rate of its dtype. With x, w, y the entries of activation, weight and output,
    n = y * terms the multiplications, and b the bytes of an entry (of w, as it is kept):

        plain     max(2 n / rate(compute dtype), (b x + b w + b y) / bandwidth)
        8 bits    for x, and for w if it is not stored in 8 bits already
                      b x / bandwidth              to find the scale, unless it is known before
                      (b x + x) / bandwidth        to read, round and write
                  max(2 n / rate(8 bits), (x + w + b y) / bandwidth)
                  (4 y + 4 y) / bandwidth          to write the sums, and read them to be scaled,
                                                   which TPUs do on the way out of the product

    So where memory is the limit, as in decoding, a stored weight saves (b - 1) w bytes. Where
    arithmetic is, the product gains 2 n (1 / rate - 1 / rate8), which pays for the passes over x if

        columns > (2 b + 1) / bandwidth / (2 / rate - 2 / rate8)

    (from bfloat16 about 2,800 columns on v6e, 1,200 on v5e, 1,600 on TPU7x, 1,000 on an H200; from
    float32 77 on a CPU with VNNI), and likewise, with rows, for the passes over a weight that is
    quantized at every call. That the compiler may fuse a cast with what made x is not counted, nor
    is the time to start a kernel: both are floors, by the target's published figures.

    Args:
        target: The hardware.
        size: The sizes of the product.
        compute_dtype: Of the activation, of the product without quantization, and of the output.
        format: The 8-bit dtype.
        weight_bytes: Of one entry of the weight as it is kept without quantization.
        is_stored: Whether the weight is in 8 bits already, and not quantized at every call.
        is_scale_known: Whether the scales are known before (delayed and static scaling).
    """
    width, operations = jnp.dtype(compute_dtype).itemsize, 2 * size.output * size.terms
    x, w, y = size.activation, size.weight, size.output
    finds = 0 if is_scale_known else 1
    casts = ((finds + 1) * width + 1) * x
    casts += 0 if is_stored else ((finds + 1) * weight_bytes + 1) * w
    scales = 0 if target.platform == "tpu" else 8 * y
    plain = width * (x + y) + weight_bytes * w
    narrow = x + w + width * y

    def product(dtype: str, moved: int) -> float:
        return max(operations / target.rate(dtype), moved / target.bandwidth)

    passes = (casts + scales) / target.bandwidth
    return Roofline(product(compute_dtype, plain), passes + product(format, narrow))


def why_plain(target: Target, size: ProductSize, **how: Any) -> str | None:
    """Says why 8 bits do not pay, given the arguments of `roofline`; None if they do."""
    if not size.is_known:  # an export: what was not worth storing stays as it is
        return "the number of rows is symbolic"
    times = roofline(target, size, **how)
    if times.quantized <= times.plain:
        return None
    rows, columns = size.output * size.terms // size.weight, size.weight // size.terms
    return (
        f"8 bits cost time on {target.name}: {rows} rows of {size.terms} by {columns} columns take "
        f"{_text(times.quantized)} with the casts, {_text(times.plain)} without (roofline)"
    )


def _text(seconds: float) -> str:
    """Three digits, in the largest unit below."""
    unit = min(max(math.floor(math.log10(seconds) / 3), -4), 0)
    return f"{seconds / 1000**unit:.3g} {({0: 's', -1: 'ms', -2: 'us', -3: 'ns', -4: 'ps'})[unit]}"
