"""The two convolutions of a convolution's derivative, of 8-bit values or of arrays.

They are JAX's own transposes of the forward convolution, which know of strides, dilation, padding
and groups. JAX transposes a convolution only where all its dtypes are one, so the values of a
QTensor are widened to float32, which holds them and their products exactly, and the sums are
float32: the numbers are those of 8-bit operands. At the default precision hardware that rounds the
factors of a float32 convolution, to bfloat16 (TPUs) or TF32 (GPUs), rounds none of those values,
so this costs what a convolution in those formats does. No platform of XLA has a float8 one in
general.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ._convolution import Convolution
from ._implementation import Operand
from ._qtensor import QTensor
from ._storage import decode, expand_scale
from ._varying import vary_like


def dlhs(
    g: Operand, rhs: Operand, window: Convolution, precision: jax.lax.PrecisionLike, dtype: np.dtype
) -> Float[Array, "*lhs"]:
    """The derivative of a convolution in its images: `g` and the kernel, over output features.

    The scale of `g` may vary per image, that of `rhs` per input feature.
    """
    axes, wide = window.axes, _common(g, rhs, dtype)
    kernel = _values(rhs, wide)
    images = vary_like(jnp.zeros(window.lhs_shape, wide), g, rhs)
    (sums,) = jax.linear_transpose(lambda x: window(x, kernel, precision), images)(_values(g, wide))
    sums = scaled(sums, g, axes.out_spec[0], axes.lhs_spec[0])
    return scaled(sums, rhs, axes.rhs_spec[1], axes.lhs_spec[1]).astype(dtype)


def drhs(
    lhs: Operand, g: Operand, window: Convolution, precision: jax.lax.PrecisionLike, dtype: np.dtype
) -> Float[Array, "*rhs"]:
    """The derivative of a convolution in its kernel: the images and `g`, over the batch and space.

    The scale of `lhs` may vary per input feature, that of `g` per output feature.
    """
    axes, wide = window.axes, _common(lhs, g, dtype)
    images = _values(lhs, wide)
    kernel = vary_like(jnp.zeros(window.rhs_shape, wide), lhs, g)
    (sums,) = jax.linear_transpose(lambda w: window(images, w, precision), kernel)(_values(g, wide))
    sums = scaled(sums, lhs, axes.lhs_spec[1], axes.rhs_spec[1])
    return scaled(sums, g, axes.out_spec[1], axes.rhs_spec[0]).astype(dtype)


def scaled(
    sums: Float[Array, "..."], operand: Operand, axis: int, onto: int
) -> Float[Array, "..."]:
    """Sums of values times a scale that may vary along `axis`, which is the axis `onto` of them."""
    if not isinstance(operand, QTensor):
        return sums
    return sums * laid_out(expand_scale(operand), axis, onto, sums.ndim)


def laid_out(scale: Float[Array, "..."], axis: int, onto: int, ndim: int) -> Float[Array, "..."]:
    """A scale that may vary along `axis` alone, as one of `ndim` axes that varies along `onto`."""
    shape = [1] * ndim
    shape[onto] = scale.shape[axis]
    return scale.reshape(shape)


def _common(lhs: Operand, rhs: Operand, dtype: np.dtype) -> np.dtype:
    """The dtype that both are multiplied in."""
    if isinstance(lhs, QTensor) or isinstance(rhs, QTensor):
        return np.dtype(np.float32)
    with jax.numpy_dtype_promotion("standard"):  # it is we who mix them, not the caller
        return jnp.result_type(lhs.dtype, rhs.dtype, dtype)


def _values(operand: Operand, dtype: np.dtype) -> Float[Array, "..."]:
    if not isinstance(operand, QTensor):
        return operand.astype(dtype)
    values = decode(operand, dtype)
    if not operand.format.is_integer:
        return values
    # XLA:GPU takes a convolution of converted int8 for one of int8, which is wrong in groups
    # (`_conv_gpu.py`), and `jax.vmap` makes groups.
    kept = jax.lax.optimization_barrier
    return jax.lax.platform_dependent(values, cuda=kept, default=lambda same: same)
