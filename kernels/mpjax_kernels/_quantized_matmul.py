"""A product that quantizes its activations on the way in: `quantize` and `matmul` as one."""

from collections.abc import Sequence

import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Float

from ._dynamic_dot import check_dynamic, multiply_quantized
from ._formats import FormatLike, get_format
from ._qtensor import QTensor, describe


def quantized_matmul(
    x: Float[ArrayLike, "*batch k"],
    w: QTensor,
    format: FormatLike = "int8",
    *,
    preferred_element_type: DTypeLike | None = None,
    implementation: str | Sequence[str] | None = None,
) -> Float[Array, "*batch n"]:
    """`matmul(quantize(x, format, axis=-1), w)`: dynamic activations, a scale per row.

    The implementations are those of `dynamic_dot_general`, which does it for any contraction.

    Args:
        x: Activations of a floating dtype.
        w: A weight of shape [K, N], in either layout.
        format: What `x` is quantized to.
        preferred_element_type: The dtype of the result. If None, `jnp.result_type` of those of
            `x` and `w`.
        implementation: As in `dot_general`.

    Returns:
        An array of shape [..., N].

    Raises:
        TypeError: If `x` is not floating, `w` is no QTensor, or `preferred_element_type` is not
            floating.
        ValueError: If `w` has not two axes, the shapes do not go together, or a format or an
            implementation is unknown.
        NotImplementedError: If no implementation allowed takes the operands, or it is
            differentiated.
    """
    target, array = get_format(format), jnp.asarray(x)
    check_dynamic(array, w)
    if w.ndim != 2 or array.ndim == 0:
        raise ValueError(
            f"`x` is {describe(array)} and `w` {describe(w)}: they must be [..., K] and [K, N]"
        )
    axes = (((array.ndim - 1,), (0,)), ((), ()))
    options = None, preferred_element_type, implementation
    return multiply_quantized("quantized_matmul", array, w, axes, target, *options)
