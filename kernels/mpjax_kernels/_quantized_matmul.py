"""A product that quantizes its activations on the way in: `quantize` and `matmul` as one."""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Float

from ._arguments import result_dtype
from ._contraction import Contraction, contraction
from ._derivative import without_derivative
from ._dot_general import IMPLEMENTATIONS as PRODUCTS
from ._formats import Format, FormatLike, get_format
from ._implementation import Implementation, choose
from ._layout import stored_axes
from ._qtensor import QTensor, describe, validate
from ._quantize import quantize
from ._storage import as_stored

_NO_DERIVATIVE = (
    "quantized_matmul has no derivative: it rounds its activations, which is flat. "
    "Differentiate the model before it is quantized"
)


def quantized_matmul(
    x: Float[ArrayLike, "*batch k"],
    w: QTensor,
    format: FormatLike = "int8",
    *,
    preferred_element_type: DTypeLike | None = None,
    implementation: str | Sequence[str] | None = None,
) -> Float[Array, "*batch n"]:
    """`matmul(quantize(x, format, axis=-1), w)`: dynamic activations, a scale per row.

    The implementations are those of `dot_general`, in its order, and quantize first.

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
    _check(array, w)
    stored = stored_axes(w.layout, 2)
    axes = contraction(array.shape, w.shape, (((array.ndim - 1,), (0,)), ((), ())))
    axes = axes.reordered(tuple(range(array.ndim)), stored)
    dtype = result_dtype(array, w, preferred_element_type)

    def product(array: Array, w: QTensor) -> Array:
        return choose(IMPLEMENTATIONS, implementation, (array, w), axes, target, dtype)

    return without_derivative(product, _NO_DERIVATIVE)(array, as_stored(w))


def _check(x: Array, w: QTensor) -> None:
    if not isinstance(w, QTensor):
        raise TypeError(f"`w` must be a QTensor, got {describe(w)}")
    validate(w)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"`x` must have a floating dtype to be quantized, got {x.dtype}")
    if w.ndim != 2 or x.ndim == 0:
        raise ValueError(
            f"`x` is {describe(x)} and `w` {describe(w)}: they must be [..., K] and [K, N]"
        )


def _refusal(
    name: str, x: Array, w: QTensor, axes: Contraction, format: Format, dtype: np.dtype
) -> str | None:
    q = jax.eval_shape(partial(quantize, format=format, axis=-1), x)
    return PRODUCTS[name].refusal(q, w, axes, None, dtype)


def _quantize_then(
    name: str, x: Array, w: QTensor, axes: Contraction, format: Format, dtype: np.dtype
) -> Array:
    return PRODUCTS[name].run(quantize(x, format, axis=-1), w, axes, None, dtype)


IMPLEMENTATIONS = {
    name: Implementation(
        partial(_refusal, name),
        partial(_quantize_then, name),
        product.platforms,
        product.is_native,
    )
    for name, product in PRODUCTS.items()
}
