"""What rounding the weights and the inputs of a layer does to its outputs."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

import mpjax_kernels as mk

from ._stored import Activation, Stored, cut


def output_error(error: Float[Array, "k n"], moment: Float[Array, "k k"]) -> Float[Array, ""]:
    """tr(E^T H E): of an error E in the weights, twice its mean square over the outputs' rows.

    Args:
      error: float32 [K, N], what is added to the weights.
      moment: float32 [K, K], H = 2 / n sum x x^T.
    """
    return jnp.sum(error * exact_matmul(moment, error))


def exact_matmul(a: Float[Array, "m k"], b: Float[Array, "k n"]) -> Float[Array, "m n"]:
    """The product in float32, which a TPU would else round to bfloat16."""
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def weight_as_stored(weight: Float[Array, "k n"], stored: Stored) -> mk.QTensor:
    """A weight, rounded as `mpjax.quantize` rounds it."""
    axis, group_size = cut(stored, weight.shape, (0,))
    return mk.quantize(
        weight, stored.format, axis=axis, group_size=group_size, symmetric=stored.symmetric
    )


def input_as_multiplied(
    x: Float[Array, "rows k"], activation: Activation | None, amax: Float[Array, ""]
) -> Float[Array, "rows k"]:
    """Inputs as the product with a stored weight sees them.

    Args:
      x: float32 [rows, K].
      activation: how they are quantized; None leaves them.
      amax: float32 [], of the static scale, where there is one per tensor.
    """
    if activation is None:
        return x
    if activation.granularity == "tensor":
        scale = jnp.where(amax > 0, amax, 1.0) / mk.get_format(activation.format).max
        q = mk.quantize(x, activation.format, scale=scale)
    else:
        size = None if activation.granularity == "row" else activation.granularity
        q = mk.quantize(x, activation.format, axis=1, group_size=size)
    return mk.dequantize(q)
