"""quantized_einsum: an einsum of two arrays as one `quantized_dot_general`."""

from collections.abc import Sequence
from typing import cast

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from ._arguments import result_dtype
from ._dot_formats import DotFormats
from ._dot_general import IMPLEMENTATIONS
from ._dot_scales import DotScales, Scale
from ._einsum import pairing, simplify
from ._equation import Equation, parse
from ._implementation import check_names
from ._labelled import Labelled
from ._quantized_dot import quantized_dot_general
from ._quantized_product import check_operands


def quantized_einsum(
    equation: str,
    lhs: Float[Array, "*lhs"],
    rhs: Float[Array, "*rhs"],
    formats: DotFormats,
    *,
    scales: DotScales | None = None,
    amax_probes: DotScales | None = None,
    straight_through: bool = False,
    key: Array | None = None,
    precision: jax.lax.PrecisionLike = None,
    preferred_element_type: DTypeLike | None = None,
    implementation: str | Sequence[str] | None = None,
) -> tuple[Float[Array, "*out"], DotScales]:
    """`jnp.einsum` of two arrays, quantized on the way in, and its derivative likewise.

    It is one `quantized_dot_general`, which says what the arguments mean that are not explained
    here, and its result with the axes in the order that the equation asks for. Before anything is
    quantized, a label that an operand has twice becomes its diagonal (as the first axis), one that
    an operand has alone is summed in float32, and an axis of size 1 that broadcasts goes away.

    Args:
        equation: E.g. `"bqhd,bkhd->bhqk"`, `"...i,ij->...j"` or `"ij,jk"`, for two operands.
        lhs: A floating array.
        rhs: A floating array.
        formats: A format for each operand of each of the three products. "channel" is one scale
            for every entry of the axes that a product does not sum over.
        scales: Scales known before. Scalars, or of the axes of the operand as it is quantized; of
            the gradient in the order `batch, free of lhs, free of rhs`, the result's own order.
        amax_probes: Zeros of the shapes of amaxes, of axes as those of `scales`.
        straight_through: Whether what a given scale clips has a gradient all the same.
        key: A PRNG key for the operands whose format is stochastic.
        precision: As in `dot_general`, for all three products.
        preferred_element_type: The dtype of `out`; `jnp.result_type` of the operands if None.
        implementation: As in `dot_general`, for all three products.

    Returns:
        `out`, and the amaxes of the operands as they were quantized, in `lhs` and `rhs`.

    Raises:
        TypeError: If `equation` is no string, or as in `quantized_dot_general`.
        ValueError: If the equation or the shapes make no sense, it is not for two operands, a scale
            has not the axes of the operand as it is quantized, or as in `quantized_dot_general`.
        NotImplementedError: If a scale or a probe of the gradient has axes, and the equation asks
            for another order than the product has; or as in `quantized_dot_general`.
    """
    check_names(IMPLEMENTATIONS, implementation)
    if not isinstance(equation, str):
        raise TypeError(f"`equation` must be a string, as in 'ij,jk->ik', got {equation!r}")
    arrays = check_operands(lhs, rhs, formats, scales, amax_probes)
    labels = parse(equation, [x.shape for x in arrays])
    dtype = result_dtype(*arrays, preferred_element_type)
    left, right = simplify(labels, arrays, jnp.dtype(jnp.float32))
    numbers, result = pairing(left.labels, right.labels, {*labels.output}, labels.output)
    for name, given in (("scales", scales), ("amax_probes", amax_probes)):
        _check_axes(name, given or DotScales(), labels, (left, right), result)
    out, amaxes = quantized_dot_general(
        cast(Array, left.operand),
        cast(Array, right.operand),
        numbers,
        formats,
        scales=scales,
        amax_probes=amax_probes,
        straight_through=straight_through,
        key=key,
        precision=precision,
        preferred_element_type=dtype,
        implementation=implementation,
    )
    return jnp.transpose(out, [result.index(label) for label in labels.output]), amaxes


def _check_axes(
    name: str, given: DotScales, equation: Equation, terms: Sequence[Labelled], result: str
) -> None:
    for operand, written, term in zip(("lhs", "rhs"), equation.inputs, terms, strict=True):
        shape = _shape(getattr(given, operand))
        if len(written) != len(term.labels) and len(shape) not in (0, len(term.labels)):
            raise ValueError(
                f"`{name}.{operand}` has shape {shape}, but of the axes {written!r} of "
                f"`{operand}` {term.labels!r} are left when it is quantized: give one of that "
                "rank, or a scalar"
            )
    for gradient in ("dlhs", "drhs"):
        shape = _shape(getattr(given, gradient))
        if shape and result != equation.output:
            raise NotImplementedError(
                f"`{name}.{gradient}` has shape {shape}: the gradient is multiplied with the axes "
                f"{result!r}, which {equation.text} gives another order; give a scalar, or let the "
                "equation end in that order"
            )


def _shape(scale: Scale) -> tuple[int, ...]:
    return () if scale is None else jnp.shape(scale)
