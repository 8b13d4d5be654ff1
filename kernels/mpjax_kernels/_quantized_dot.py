"""A product that is quantized on the way in, forward and backward, and can be trained through.

    out  = lhs   @ rhs      quantized as `formats.out`
    dlhs = g     @ rhs.T    quantized as `formats.dlhs`
    drhs = lhs.T @ g        quantized as `formats.drhs`

Rounding is passed straight through: the derivatives are those of the product of the dequantized
operands. What a given scale clipped has no derivative. Between the passes the operands are kept as
they were quantized, with one bit per entry to say what was clipped.

`rhs` was quantized per output channel, and `dlhs` sums over output channels: a scale that varies
along the axes a backward product contracts cannot be applied after it. It multiplies `g` before
that is quantized, so that the saved values are multiplied as they are:

    dlhs = (g * rhs.scale) @ rhs.values.T
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from ._arguments import result_dtype
from ._contraction import Contraction, DimensionNumbers, contraction
from ._dot_formats import DotFormats, Resolved
from ._dot_general import IMPLEMENTATIONS, multiply
from ._implementation import Operand, check_names
from ._operand import Axes, amax_of, quantize_operand
from ._probe import cotangent
from ._qtensor import QTensor, describe
from ._residual import fold, requantize, save
from ._transposed import dlhs, drhs, onto_lhs, onto_rhs
from ._varying import vary_like

Scale = Float[Array, "..."] | None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DotScales:
    """Something for each operand that a differentiable product quantizes: scales, or amaxes.

    Attributes:
        lhs: Of the left operand.
        rhs: Of the right operand.
        dlhs: Of the gradient where it is multiplied by `rhs`.
        drhs: Of the gradient where it is multiplied by `lhs`.
    """

    lhs: Scale = None
    rhs: Scale = None
    dlhs: Scale = None
    drhs: Scale = None


def quantized_dot_general(
    lhs: Float[Array, "*lhs"],
    rhs: Float[Array, "*rhs"],
    dimension_numbers: DimensionNumbers,
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
    """`jax.lax.dot_general` of arrays, quantized on the way in, and its derivative likewise.

    ::

        out  = lhs   @ rhs      quantized as `formats.out`
        dlhs = g     @ rhs.T    quantized as `formats.dlhs`
        drhs = lhs.T @ g        quantized as `formats.drhs`

    Rounding is passed straight through, and what a given scale clips gets no gradient. The
    forward pass saves the quantized operands and, where a scale is given and clips, a bit per
    entry; under `jax.checkpoint` their name is "quantization"
    (`save_only_these_names("quantization")`).

    Args:
        lhs: A floating array.
        rhs: A floating array.
        dimension_numbers: As in `jax.lax.dot_general`.
        formats: A format for each operand of each of the three products.
        scales: Scales known before (static or delayed), each as `quantize` takes it; a None, or
            None for all of them, is a scale from the amax of the operand at hand (current), and so
            is an entry of 0.
        amax_probes: Zeros of the shapes of amaxes, whose cotangents are these amaxes: of the
            operands as the forward pass quantized them, in `lhs` and `rhs`, and of the gradient
            as it meets each product, after a scale has been folded in, in `dlhs` and `drhs`.
            Where the gradient is zero throughout, so are the cotangents. A probe used in several
            products adds theirs up, in its own dtype; one that `jax.vmap` does not map, or that
            the devices of a `jax.shard_map` share, gets the largest over entries or devices.
        straight_through: Whether what a given scale clips has a gradient all the same, as is
            usual in training with delayed scaling. Otherwise it has none.
        key: A PRNG key for the operands whose format is stochastic, of which every one gets noise
            of its own.
        precision: As in `dot_general`, for all three products.
        preferred_element_type: The dtype of `out`; `jnp.result_type` of the operands if None.
            The derivatives have the dtypes of their operands.
        implementation: As in `dot_general`, for all three products.

    Returns:
        `out`, and the amaxes of the operands that were quantized, in `lhs` and `rhs`: float32, of
        the shape of the scale given, or of the scale that was found. They have no derivative.

    Raises:
        TypeError: If an operand is a QTensor or not floating, `preferred_element_type` is not
            floating, or an argument is of the wrong class.
        ValueError: If the shapes do not go together, a scale or a block does not fit, a stochastic
            format has no key, or an implementation is unknown.
        NotImplementedError: If no implementation allowed takes a product.
    """
    check_names(IMPLEMENTATIONS, implementation)
    _check_class("formats", formats, DotFormats)
    _check_class("scales", scales, DotScales | None)
    _check_class("amax_probes", amax_probes, DotScales | None)
    left, right = _floating("lhs", lhs), _floating("rhs", rhs)
    names = implementation
    how = _How(
        contraction(left.shape, right.shape, dimension_numbers),
        formats,
        precision,
        left.dtype,
        right.dtype,
        result_dtype(left, right, preferred_element_type),
        names if names is None or isinstance(names, str) else tuple(names),
        straight_through,
    )
    if key is None and formats.is_stochastic:
        raise ValueError(f"{formats} rounds stochastically: give a `key`")
    left, right = vary_like(left, right), vary_like(right, left)
    return _dot(how, left, right, scales or DotScales(), amax_probes or DotScales(), key)


@dataclass(frozen=True)
class _How:
    """What is static of a product: its axes, formats, and the dtypes of its operands and result."""

    axes: Contraction
    formats: DotFormats
    precision: jax.lax.PrecisionLike
    lhs_dtype: np.dtype
    rhs_dtype: np.dtype
    dtype: np.dtype
    implementation: str | tuple[str, ...] | None
    straight_through: bool

    @property
    def out(self) -> Resolved:
        return cast(Resolved, self.formats.out)

    @property
    def dlhs(self) -> Resolved:
        return cast(Resolved, self.formats.dlhs)

    @property
    def drhs(self) -> Resolved:
        return cast(Resolved, self.formats.drhs)

    def multiply(
        self, lhs: Operand, rhs: Operand, axes: Contraction, dtype: np.dtype
    ) -> Float[Array, "..."]:
        if isinstance(lhs, QTensor) or isinstance(rhs, QTensor):
            return multiply(lhs, rhs, axes, self.precision, dtype, self.implementation)
        return jax.lax.dot_general(lhs, rhs, axes.dimension_numbers, self.precision, dtype)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _dot(how: _How, lhs, rhs, scales: DotScales, probes: DotScales, key):
    return _forward(how, lhs, rhs, scales, probes, key)[0]


def _forward(how: _How, lhs, rhs, scales: DotScales, probes: DotScales, key):
    c, keys = how.axes, _keys(key)
    lhs_axes, rhs_axes = Axes(c.lhs_contract, c.lhs_free), Axes(c.rhs_contract, c.rhs_free)
    left = quantize_operand(lhs, how.out[0], lhs_axes, scales.lhs, keys["lhs"])
    right = quantize_operand(rhs, how.out[1], rhs_axes, scales.rhs, keys["rhs"])
    out = how.multiply(left, right, c, how.dtype)
    amaxes = DotScales(amax_of(lhs, scales.lhs, left), amax_of(rhs, scales.rhs, right))
    clips = DotScales() if how.straight_through else scales
    saved_lhs = save(lhs, left, how.drhs[0], lhs_axes, clips.lhs, keys["saved_lhs"])
    saved_rhs = save(rhs, right, how.dlhs[1], rhs_axes, clips.rhs, keys["saved_rhs"])
    seen = DotScales(
        None if probes.lhs is None else amaxes.lhs, None if probes.rhs is None else amaxes.rhs
    )
    return (out, amaxes), (saved_lhs, saved_rhs, scales, probes, seen, keys)


def _backward(how: _How, residuals, cotangents):
    saved_lhs, saved_rhs, scales, probes, seen, keys = residuals
    g, _ = cotangents  # the amaxes have no derivative
    to_lhs, to_rhs = dlhs(how.axes), drhs(how.axes)

    c = to_lhs.contraction
    axes = Axes(c.rhs_contract, c.rhs_free)
    rhs = requantize(saved_rhs.operand, how.dlhs[1], axes, how.rhs_dtype, keys["saved_rhs"])
    folded, rhs = fold(g, rhs, axes, partial(onto_lhs, c=c), how.dlhs[0])
    axes = Axes(c.lhs_contract, c.lhs_free)
    left = quantize_operand(folded, how.dlhs[0], axes, scales.dlhs, keys["dlhs"])
    amax_dlhs = amax_of(folded, scales.dlhs, left)
    grad_lhs = how.multiply(left, rhs, c, how.lhs_dtype).transpose(to_lhs.order)

    c = to_rhs.contraction
    axes = Axes(c.lhs_contract, c.lhs_free)
    lhs = requantize(saved_lhs.operand, how.drhs[0], axes, how.lhs_dtype, keys["saved_lhs"])
    folded, lhs = fold(g, lhs, axes, partial(onto_rhs, c=c), how.drhs[1])
    axes = Axes(c.rhs_contract, c.rhs_free)
    right = quantize_operand(folded, how.drhs[1], axes, scales.drhs, keys["drhs"])
    amax_drhs = amax_of(folded, scales.drhs, right)
    grad_rhs = how.multiply(lhs, right, c, how.rhs_dtype).transpose(to_rhs.order)

    observed = _observed(probes, replace(seen, dlhs=amax_dlhs, drhs=amax_drhs), g)
    return saved_lhs.masked(grad_lhs), saved_rhs.masked(grad_rhs), None, observed, None


_dot.defvjp(_forward, _backward)


def _observed(probes: DotScales, amaxes: DotScales, g: Float[Array, "*out"]) -> DotScales:
    """The amaxes as cotangents of the probes; none of an operand whose product got no gradient."""
    if probes.lhs is not None or probes.rhs is not None:
        found = next((a for a in (amaxes.dlhs, amaxes.drhs) if a is not None), g)
        used = jnp.any(found != 0)  # NaN is not zero
        operands = DotScales(amaxes.lhs, amaxes.rhs)
        operands = jax.tree.map(lambda amax: jnp.where(used, amax, 0.0), operands)
        amaxes = replace(operands, dlhs=amaxes.dlhs, drhs=amaxes.drhs)
    names = ("lhs", "rhs", "dlhs", "drhs")
    return DotScales(*(cotangent(getattr(probes, n), getattr(amaxes, n)) for n in names))


def _keys(key: Array | None) -> dict[str, Array | None]:
    """A key for each operand that may be rounded stochastically."""
    names = ("lhs", "rhs", "saved_lhs", "saved_rhs", "dlhs", "drhs")
    if key is None:
        return dict.fromkeys(names)
    return dict(zip(names, jax.random.split(key, len(names)), strict=True))


def _check_class(name: str, value: Any, expected: Any) -> None:
    if not isinstance(value, expected):
        kind = "a DotFormats" if expected is DotFormats else "a DotScales or None"
        raise TypeError(f"`{name}` must be {kind}, got {value!r}")


def _floating(name: str, operand: Float[Array, "..."]) -> Float[Array, "..."]:
    if isinstance(operand, QTensor):
        raise TypeError(
            f"`{name}` is {describe(operand)}, which is quantized already: give the array, or "
            "multiply by mpjax_kernels.dot_general, which is differentiable in an array beside it"
        )
    array = jnp.asarray(operand)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(f"`{name}` must have a floating dtype to be quantized, got {array.dtype}")
    return array
