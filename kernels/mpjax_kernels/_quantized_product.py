"""A product that is quantized on the way in, forward and backward, and can be trained through.

    out  = lhs   @ rhs      quantized as `formats.out`
    dlhs = g     @ rhs.T    quantized as `formats.dlhs`
    drhs = lhs.T @ g        quantized as `formats.drhs`

`@` is a `dot_general` or a convolution; what differs between them is a `Products`.

Rounding is passed straight through: the derivatives are those of the product of the dequantized
operands. What a given scale clipped has no derivative. Between the passes the operands are kept as
they were quantized, with one bit per entry to say what was clipped.

`rhs` was quantized per output channel, and `dlhs` sums over output channels: a scale that varies
along the axes a backward product contracts cannot be applied after it. It multiplies `g` before
that is quantized, so that the saved values are multiplied as they are:

    dlhs = (g * rhs.scale) @ rhs.values.T
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from ._arguments import result_dtype
from ._dot_formats import DotFormats, Resolved
from ._dot_scales import DotScales, observed
from ._implementation import Operand
from ._operand import Axes, quantize_operand
from ._qtensor import QTensor, describe
from ._residual import fold, requantize, save
from ._varying import vary_like

Result = Float[Array, "..."]


class Products(Protocol):
    """A product and the two of its derivative, of operands of known shapes. Hashable.

    For each of the three: the part that the axes of its operands play, and the product of operands
    with or without a scale, in a dtype. The results of `dlhs` and `drhs` have the axes of `lhs` and
    `rhs`.
    """

    @property
    def out_axes(self) -> tuple[Axes, Axes]: ...

    @property
    def dlhs_axes(self) -> tuple[Axes, Axes]: ...

    @property
    def drhs_axes(self) -> tuple[Axes, Axes]: ...

    def out(self, lhs: Operand, rhs: Operand, dtype: np.dtype) -> Result: ...

    def dlhs(self, g: Operand, rhs: Operand, dtype: np.dtype) -> Result: ...

    def drhs(self, lhs: Operand, g: Operand, dtype: np.dtype) -> Result: ...

    def rhs_onto_g(self, scale: Float[Array, "..."]) -> Float[Array, "..."]:
        """A scale of `rhs`, of size 1 along its free axes in `dlhs`, laid out to multiply `g`."""
        ...

    def lhs_onto_g(self, scale: Float[Array, "..."]) -> Float[Array, "..."]:
        """A scale of `lhs`, of size 1 along its free axes in `drhs`, laid out to multiply `g`."""
        ...


def quantized_product(
    products: Products,
    lhs: Float[Array, "*lhs"],
    rhs: Float[Array, "*rhs"],
    formats: DotFormats,
    scales: DotScales | None,
    amax_probes: DotScales | None,
    straight_through: bool,
    key: Array | None,
    preferred_element_type: DTypeLike | None,
) -> tuple[Result, DotScales]:
    """The product of floating arrays, its derivative, and the amaxes of `lhs` and `rhs`.

    Raises:
        TypeError: If `preferred_element_type` is not floating.
        ValueError: If a scale or a block does not fit, or a stochastic format has no key.
    """
    if key is None and formats.is_stochastic:
        raise ValueError(f"{formats} rounds stochastically: give a `key`")
    dtype = result_dtype(lhs, rhs, preferred_element_type)
    how = _How(products, formats, lhs.dtype, rhs.dtype, dtype, straight_through)
    left, right = vary_like(lhs, rhs), vary_like(rhs, lhs)
    return _product(how, left, right, scales or DotScales(), amax_probes or DotScales(), key)


def check_operands(
    lhs: Any, rhs: Any, formats: Any, scales: Any, amax_probes: Any
) -> tuple[Float[Array, "*lhs"], Float[Array, "*rhs"]]:
    """The operands as floating arrays, after the classes of the other arguments were checked.

    Raises:
        TypeError: If an operand is a QTensor or not floating, or an argument of another class.
    """
    _check_class("formats", formats, DotFormats)
    _check_class("scales", scales, DotScales | None)
    _check_class("amax_probes", amax_probes, DotScales | None)
    return _floating("lhs", lhs), _floating("rhs", rhs)


@dataclass(frozen=True)
class _How:
    """What is static of a product: its axes, formats, and the dtypes of its operands and result."""

    products: Products
    formats: DotFormats
    lhs_dtype: np.dtype
    rhs_dtype: np.dtype
    dtype: np.dtype
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


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(how: _How, lhs, rhs, scales: DotScales, probes: DotScales, key):
    return _forward(how, lhs, rhs, scales, probes, key)[0]


def _forward(how: _How, lhs, rhs, scales: DotScales, probes: DotScales, key):
    keys, products = _keys(key), how.products
    out, left, right, amaxes = _multiply(how, lhs, rhs, scales, keys)
    clips = DotScales() if how.straight_through else scales
    lhs_axes, rhs_axes = products.drhs_axes[0], products.dlhs_axes[1]
    saved_lhs = save(lhs, left, how.drhs[0], lhs_axes, clips.lhs, keys["saved_lhs"])
    saved_rhs = save(rhs, right, how.dlhs[1], rhs_axes, clips.rhs, keys["saved_rhs"])
    seen = DotScales(
        None if probes.lhs is None else amaxes.lhs, None if probes.rhs is None else amaxes.rhs
    )
    return (out, amaxes), (saved_lhs, saved_rhs, scales, probes, seen, keys)


def _backward(how: _How, residuals, cotangents):
    saved_lhs, saved_rhs, scales, probes, seen, keys = residuals
    g, _ = cotangents  # the amaxes have no derivative
    operands = saved_lhs.operand, saved_rhs.operand
    grad_lhs, grad_rhs, amaxes = _multiply_gradient(how, g, *operands, scales, keys)
    amaxes = observed(probes, replace(seen, dlhs=amaxes.dlhs, drhs=amaxes.drhs), g)
    return saved_lhs.masked(grad_lhs), saved_rhs.masked(grad_rhs), None, amaxes, None


_product.defvjp(_forward, _backward)


# Both are compiled with what calls them. But a model of many layers alike traces them once.
@partial(jax.jit, static_argnums=0)
def _multiply(how: _How, lhs, rhs, scales: DotScales, keys):
    lhs_axes, rhs_axes = how.products.out_axes
    left, amax_lhs = quantize_operand(lhs, how.out[0], lhs_axes, scales.lhs, keys["lhs"])
    right, amax_rhs = quantize_operand(rhs, how.out[1], rhs_axes, scales.rhs, keys["rhs"])
    out = how.products.out(left, right, how.dtype)
    return out, left, right, DotScales(amax_lhs, amax_rhs)


@partial(jax.jit, static_argnums=0)
def _multiply_gradient(how: _How, g, lhs: Operand, rhs: Operand, scales: DotScales, keys):
    products = how.products
    g_axes, axes = products.dlhs_axes
    rhs = requantize(rhs, how.dlhs[1], axes, g.dtype, keys["saved_rhs"])
    folded, rhs = fold(g, rhs, axes, products.rhs_onto_g, how.dlhs[0])
    left, amax_dlhs = quantize_operand(folded, how.dlhs[0], g_axes, scales.dlhs, keys["dlhs"])
    grad_lhs = products.dlhs(left, rhs, how.lhs_dtype)

    axes, g_axes = products.drhs_axes
    lhs = requantize(lhs, how.drhs[0], axes, g.dtype, keys["saved_lhs"])
    folded, lhs = fold(g, lhs, axes, products.lhs_onto_g, how.drhs[1])
    right, amax_drhs = quantize_operand(folded, how.drhs[1], g_axes, scales.drhs, keys["drhs"])
    grad_rhs = products.drhs(lhs, right, how.rhs_dtype)

    return grad_lhs, grad_rhs, DotScales(dlhs=amax_dlhs, drhs=amax_drhs)


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
