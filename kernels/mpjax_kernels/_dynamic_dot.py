"""dynamic_dot_general: `dot_general` of an array that is quantized on its way in, and a weight."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Float

from . import _native_dynamic
from ._arguments import result_dtype
from ._contraction import Contraction, DimensionNumbers, contraction
from ._derivative import without_derivative
from ._dot_general import IMPLEMENTATIONS as PRODUCTS
from ._formats import Format, FormatLike, get_format
from ._implementation import Implementation, choose
from ._qtensor import QTensor, describe, validate
from ._quantize import quantize
from ._storage import as_stored


def dynamic_dot_general(
    x: Float[ArrayLike, "*lhs"],
    w: QTensor,
    dimension_numbers: DimensionNumbers,
    format: FormatLike = "int8",
    *,
    precision: jax.lax.PrecisionLike = None,
    preferred_element_type: DTypeLike | None = None,
    implementation: str | Sequence[str] | None = None,
) -> Float[Array, "*out"]:
    """`dot_general(quantize(x, format, axis=contracting axes), w)`: a scale for each row of `x`.

    The implementations are those of `dot_general`, in its order, and quantize first; few rows of
    int8 are quantized and multiplied in one call by `"native"`.

    Args:
        x: Activations of a floating dtype.
        w: A quantized weight, in any layout.
        dimension_numbers: As in `jax.lax.dot_general`.
        format: What `x` is quantized to.
        precision: As in `dot_general`.
        preferred_element_type: The dtype of the result. If None, `jnp.result_type` of those of
            `x` and `w`.
        implementation: As in `dot_general`.

    Returns:
        An array, whose axes are those that `jax.lax.dot_general` gives it.

    Raises:
        TypeError: If `x` is not floating, `w` is no QTensor, or `preferred_element_type` is not
            floating.
        ValueError: If the shapes do not go together, or a format or an implementation is unknown.
        NotImplementedError: If no implementation allowed takes the operands, or it is
            differentiated.
    """
    return multiply_quantized(
        "dynamic_dot_general",
        jnp.asarray(x),
        w,
        dimension_numbers,
        get_format(format),
        precision,
        preferred_element_type,
        implementation,
    )


def multiply_quantized(
    name: str,
    x: Array,
    w: QTensor,
    dimension_numbers: DimensionNumbers,
    format: Format,
    precision: jax.lax.PrecisionLike,
    preferred_element_type: DTypeLike | None,
    implementation: str | Sequence[str] | None,
) -> Array:
    """The product, by a function that calls itself `name` in an error."""
    check_dynamic(x, w)
    axes = contraction(x.shape, w.shape, dimension_numbers)
    axes = axes.reordered(tuple(range(x.ndim)), w.stored_axes)
    dtype = result_dtype(x, w, preferred_element_type)

    def product(x: Array, w: QTensor) -> Array:
        return choose(IMPLEMENTATIONS, implementation, (x, w), _How(axes, format, precision, dtype))

    refusal = (
        f"{name} has no derivative: it rounds its activations, which is flat. To train through "
        "quantized products use mpjax_kernels.quantized_dot_general, or a policy of mpjax; "
        "differentiate the model before it is quantized"
    )
    return without_derivative(product, refusal)(x, as_stored(w, in_tiles=True))


def check_dynamic(x: Array, w: QTensor) -> None:
    """Checks the operands of a product that quantizes the left one.

    Raises:
        TypeError, ValueError: As `dynamic_dot_general`.
    """
    if not isinstance(w, QTensor):
        raise TypeError(f"`w` must be a QTensor, got {describe(w)}")
    validate(w)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"`x` must have a floating dtype to be quantized, got {x.dtype}")


@dataclass(frozen=True)
class _How:
    """The static arguments of a product: those of `_dot_general.py`, and what `x` becomes."""

    axes: Contraction
    format: Format
    precision: jax.lax.PrecisionLike
    dtype: np.dtype

    def quantized(self, x: Array) -> QTensor:
        return quantize(x, self.format, axis=self.axes.lhs_contract)


def _refusal(name: str, x: Array, w: QTensor, how: _How) -> str | None:
    q = jax.eval_shape(how.quantized, x)
    return PRODUCTS[name].refusal(q, w, how.axes, how.precision, how.dtype)


def _run(name: str, x: Array, w: QTensor, how: _How) -> Array:
    if name == "native" and _native_dynamic.takes(x, w, how.format):
        return _native_dynamic.dot_general(x, w, how.axes, how.dtype)
    return PRODUCTS[name].run(how.quantized(x), w, how.axes, how.precision, how.dtype)


IMPLEMENTATIONS = {
    name: Implementation(
        partial(_refusal, name), partial(_run, name), product.platforms, product.is_native
    )
    for name, product in PRODUCTS.items()
}
