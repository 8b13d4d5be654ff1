"""The public convolution: one contract, several implementations of it."""

from collections.abc import Sequence
from functools import partial

import jax
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array

from . import _conv_cpu, _conv_native, _conv_reference, _conv_xla
from ._arguments import as_operand, result_dtype
from ._convolution import Convolution, Padding, convolution
from ._derivative import linear_in_arrays, without_derivative
from ._implementation import Implementation, Operand, check_names, choose
from ._layout import stored_axes
from ._qtensor import QTensor
from ._storage import as_stored

# In the order they are tried when none is named. The last one takes everything.
IMPLEMENTATIONS = {
    "native": Implementation(_conv_native.refusal, _conv_native.conv, ("cpu",), is_native=True),
    "cpu": Implementation(_conv_cpu.refusal, _conv_cpu.conv, ("cpu",)),
    "xla": Implementation(_conv_xla.refusal, _conv_xla.conv),
    "reference": Implementation(_conv_reference.refusal, _conv_reference.conv),
}

_NO_DERIVATIVE = (
    "the convolution of two QTensors has no derivative: their values come from rounding, which is "
    "flat. To train through quantized convolutions use "
    "mpjax_kernels.quantized_conv_general_dilated; differentiate the model before it is quantized, "
    "or keep one operand an array (the convolution is differentiable in that one)"
)


def conv_general_dilated(
    lhs: Array | QTensor,
    rhs: Array | QTensor,
    window_strides: Sequence[int],
    padding: Padding,
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: jax.lax.ConvGeneralDilatedDimensionNumbers = None,
    feature_group_count: int = 1,
    batch_group_count: int = 1,
    precision: jax.lax.PrecisionLike = None,
    preferred_element_type: DTypeLike | None = None,
    *,
    implementation: str | Sequence[str] | None = None,
) -> Array:
    """`jax.lax.conv_general_dilated` whose operands may be quantized.

    For images [N, H, W, C] the scales that can be applied after the sum are one, or one per image:
    `quantize(x, axis=(1, 2, 3))`. For a kernel [KH, KW, I, O] they are one, or one per output
    feature: `quantize(w, axis=(0, 1, 2))`.

    Implementations, in the order they are tried:

    - `"native"`: two QTensors of int8, on CPUs, where the package was built with native kernels and
      a program may call them, as a product of patches: features all together, up to 128 taps.
    - `"cpu"`: two QTensors of integers, on CPUs: the sums of `"xla"`, laid out as XLA:CPU runs
      them fast.
    - `"xla"`: operands with such scales. Two QTensors of integers without zero points accumulate
      exactly in int32; two of float8 in float32; an array keeps its dtype, the values of a QTensor
      beside it are converted to that. Scales are applied in float32 after the sum.
    - `"reference"`: anything. Dequantizes to float32 and convolves in full float32.

    Two plain arrays go to `jax.lax.conv_general_dilated` whatever `implementation` says.

    Args:
        lhs: Images, an array or a QTensor.
        rhs: A kernel, an array or a QTensor.
        window_strides: As in `jax.lax.conv_general_dilated`, as all that follow.
        padding: The same.
        lhs_dilation: The same.
        rhs_dilation: The same.
        dimension_numbers: The same.
        feature_group_count: The same.
        batch_group_count: The same.
        precision: As there, for what `"xla"` multiplies in floating point; see `dot_general`.
        preferred_element_type: The dtype of the result. If None, `jnp.result_type` of the two
            dtypes (for a QTensor its logical dtype), the same on every platform.
        implementation: None tries them in order; a name allows that one only; a sequence of
            names tries those in order.

    Returns:
        An array with the axes that `dimension_numbers` asks for.

    Raises:
        TypeError, ValueError: If the arguments do not go together, as in
            `jax.lax.conv_general_dilated`; if an implementation is unknown; or if the dtype asked
            for is not floating, and an operand is a QTensor.
        NotImplementedError: If no implementation allowed takes these operands, with every reason;
            or if a convolution of two QTensors is differentiated. That of an array and a QTensor
            is differentiable in the array.
    """
    check_names(IMPLEMENTATIONS, implementation)
    left, right = as_operand(lhs), as_operand(rhs)
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
    if not isinstance(left, QTensor) and not isinstance(right, QTensor):
        return window(left, right, precision, preferred_element_type)
    dtype = result_dtype(left, right, preferred_element_type)
    product = partial(convolve, window=window, precision=precision, dtype=dtype)
    if isinstance(left, QTensor) and isinstance(right, QTensor):
        product = partial(product, implementation=implementation)
        return without_derivative(product, _NO_DERIVATIVE)(left, right)
    named = partial(product, implementation=implementation)
    return linear_in_arrays(named, named)(left, right)


def convolve(
    lhs: Operand,
    rhs: Operand,
    window: Convolution,
    precision: jax.lax.PrecisionLike,
    dtype: np.dtype,
    implementation: str | Sequence[str] | None,
) -> Array:
    """The convolution of valid operands, one of them a QTensor, with no rule for its derivative."""
    orders = [stored_axes(o.layout if isinstance(o, QTensor) else None, o.ndim) for o in (lhs, rhs)]
    operands = tuple(as_stored(o) if isinstance(o, QTensor) else o for o in (lhs, rhs))
    return choose(
        IMPLEMENTATIONS, implementation, operands, window.reordered(*orders), precision, dtype
    )
