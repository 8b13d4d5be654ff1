"""The two products of dot-product attention, for one or a few queries as for many.

A cache holds keys and values position by position, each with all of its heads. XLA:CPU brings the
positions of a head together first, which takes it longer than the products of a decoding step, a
query or two by all of them; the native kernels (`native/attention.cc`) read them as they lie.
Other platforms take XLA's.

What is stored in 8 bits is never dequantized as a whole: the scale of a key multiplies the scores,
as it is constant along the axis that they sum over, and the scale of a value multiplies the weight
that meets it.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from . import _native_attention
from ._einsum import einsum
from ._qtensor import QTensor, describe
from ._quantize import quantize

_IN_8_BITS = ("cpu", "gpu", "xla")  # never "reference", which would dequantize


def attention_scores(
    query: Float[Array, "*batch q heads depth"],
    key: Float[Array, "*batch length kv_heads depth"] | QTensor,
    *,
    quantized: bool = False,
    precision: jax.lax.PrecisionLike = None,
    preferred_element_type: DTypeLike | None = None,
) -> Float[Array, "*batch heads q length"]:
    """`query @ key`, head by head.

    Args:
        query: Its heads are a multiple of the key's, of which as many neighbours share one.
        key: An array, or a QTensor with a scale per position and head.
        quantized: Whether the query is quantized to the format of a QTensor, by a scale per
            position and head.
        precision: As in `dot_general`.
        preferred_element_type: The dtype of the result; if None, that of the operands.

    Raises:
        TypeError: If `quantized` is asked for and the key is an array.
        ValueError: If the shapes do not go together.
    """
    _check("query", query, key, quantized, *query.shape[-2:])
    run = _Scores(quantized, precision, _dtype(query, key, preferred_element_type))
    *batch, rows, heads, _ = query.shape
    if quantized or not _native_attention.takes(query, key, run.dtype):
        return run(query, key)
    out = jax.ShapeDtypeStruct((*batch, heads, rows, key.shape[-3]), run.dtype)
    return _native_attention.product_or(run, "mpjax_attention_scores", out, query, key)


def attention_output(
    weights: Float[Array, "*batch heads q length"],
    value: Float[Array, "*batch length kv_heads depth"] | QTensor,
    *,
    quantized: bool = False,
    precision: jax.lax.PrecisionLike = None,
    preferred_element_type: DTypeLike | None = None,
) -> Float[Array, "*batch q heads depth"]:
    """`weights @ value`, head by head; arguments and errors as of `attention_scores`."""
    *batch, heads, rows, _ = weights.shape
    _check("weights", weights, value, quantized, heads, None)
    run = _Output(quantized, precision, _dtype(weights, value, preferred_element_type))
    if quantized or not _native_attention.takes(weights, value, run.dtype):
        return run(weights, value)
    out = jax.ShapeDtypeStruct((*batch, rows, heads, value.shape[-1]), run.dtype)
    return _native_attention.product_or(run, "mpjax_attention_output", out, weights, value)


@dataclasses.dataclass(frozen=True)
class _ByXla:
    """A product as XLA computes it; attributes as the arguments of `attention_scores`."""

    quantized: bool
    precision: Any
    dtype: np.dtype


class _Scores(_ByXla):
    def __call__(self, query: Array, key: Array | QTensor) -> Array:
        heads, depth = key.shape[-2:]
        options = {"precision": self.precision, "preferred_element_type": self.dtype}
        if not isinstance(key, QTensor) and heads == query.shape[-2]:
            return jnp.einsum("...qhd,...khd->...hqk", query, key, **options)
        shared = query.shape[-2] // max(1, heads)
        grouped: Any = query.reshape(*query.shape[:-2], heads, shared, depth)
        if self.quantized:
            assert isinstance(key, QTensor)
            grouped = quantize(grouped, key.format, axis=-1)
        equation = "...qhgd,...khd->...hgqk"
        scores = einsum(equation, grouped, key, **options, implementation=_IN_8_BITS)
        return scores.reshape(*query.shape[:-3], query.shape[-2], *scores.shape[-2:])


class _Output(_ByXla):
    def __call__(self, weights: Array, value: Array | QTensor) -> Array:
        heads, depth = value.shape[-2:]
        options: dict[str, Any] = {"precision": self.precision}
        if not isinstance(value, QTensor) and heads == weights.shape[-3]:
            # Heads are moved afterwards: JAX would multiply the transposes of both, for which
            # XLA:CPU takes up to twice as long.
            options |= {"preferred_element_type": self.dtype}
            product = jnp.einsum("...hqk,...khd->...hqd", weights, value, **options)
            return jnp.swapaxes(product, -3, -2)
        *batch, all_heads, rows, length = weights.shape
        grouped = weights.reshape(*batch, heads, all_heads // max(1, heads), rows, length)
        equation = "...hgqk,...khd->...qhgd"
        if isinstance(value, QTensor):
            output = self._scaled(equation, grouped, value, options)
        else:
            output = einsum(equation, grouped, value, preferred_element_type=self.dtype, **options)
        return output.reshape(*batch, rows, all_heads, depth).astype(self.dtype)

    def _scaled(
        self, equation: str, weights: Array, value: QTensor, options: dict[str, Any]
    ) -> Array:
        """Weights times scales are brought to a largest of 1 before they are rounded.

        float16 does not hold numbers as small as they can be.
        """
        scale = jnp.swapaxes(value.scale[..., 0], -1, -2)[..., :, None, None, :]
        scaled = weights.astype(jnp.float32) * scale
        top = jnp.max(scaled, axis=-1, keepdims=True)
        top = jnp.where(top == 0, 1.0, top)
        scaled: Any = (scaled / top).astype(weights.dtype)
        output = einsum(
            equation,
            quantize(scaled, value.format, axis=-1) if self.quantized else scaled,
            dataclasses.replace(value, scale=jnp.ones((1,) * value.ndim, jnp.float32)),
            preferred_element_type=jnp.float32,
            implementation=_IN_8_BITS,
            **options,
        )
        return output * jnp.moveaxis(top, -2, -4)


def _dtype(lhs: Array, rhs: Array | QTensor, preferred: DTypeLike | None) -> np.dtype:
    if preferred is not None:
        return jnp.dtype(preferred)
    return lhs.dtype if isinstance(rhs, QTensor) else jnp.result_type(lhs, rhs)


def _check(
    name: str, lhs: Array, rhs: Array | QTensor, quantized: bool, heads: int, depth: int | None
) -> None:
    cached = "key" if name == "query" else "value"
    length = None if depth is not None else lhs.shape[-1]
    if quantized and not isinstance(rhs, QTensor):
        raise TypeError(f"`{cached}` is {describe(rhs)}: `quantized` is for products of QTensors")
    fits = (
        lhs.ndim == rhs.ndim >= 3
        and lhs.shape[:-3] == rhs.shape[:-3]
        and heads % max(1, rhs.shape[-2]) == 0
        and depth in (None, rhs.shape[-1])
        and length in (None, rhs.shape[-3])
    )
    if not fits:
        order = "[..., q, heads, depth]" if name == "query" else "[..., heads, q, length]"
        raise ValueError(
            f"`{name}` {order} of shape {lhs.shape} and `{cached}` [..., length, kv_heads, depth] "
            f"of shape {rhs.shape} do not go together: the batch axes and sizes of one name must "
            "be equal, and the heads a multiple of kv_heads"
        )
    if isinstance(rhs, QTensor) and rhs.scale.shape != (*rhs.shape[:-1], 1):
        raise ValueError(
            f"`{cached}` is {describe(rhs)} with a scale of shape {rhs.scale.shape}: it must have "
            f"one per position and head, {(*rhs.shape[:-1], 1)}, as `quantize(..., axis=-1)` gives"
        )
