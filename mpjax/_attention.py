"""Dot-product attention under a policy, its softmax in float32, for Linen and NNX alike.

Flax's own switch (`force_fp32_for_softmax`, Linen only) leaves the attention weights in float32,
so that the product with the values runs in float32 too. Here both products take operands of the
compute dtype, forward and backward, and only the scores are widened:

  scores  = (query / sqrt(depth)) @ key      compute dtype, or 8 bits
  weights = softmax(float32(scores))         float32, rounded to the compute dtype
  output  = weights @ value                  compute dtype, or 8 bits

A policy with `quantize_attention=True` has the two products in 8 bits, as those of a layer.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

import mpjax_kernels as mk

Array = jax.Array
Einsum = Callable[..., Array]


def scores_of(
    equation: str, query: Array, key: Array, *, precision: Any = None, **options: Any
) -> Array:
    """`jnp.einsum` of `"...qhd,...khd->...hqk"`, where it can on a cache as it lies."""
    del equation
    return mk.attention_scores(query, key, precision=precision, **options)


def output_of(
    equation: str, weights: Array, value: Array, *, precision: Any = None, **options: Any
) -> Array:
    """`jnp.einsum` of `"...hqk,...khd->...qhd"`, likewise."""
    del equation
    return mk.attention_output(weights, value, precision=precision, **options)


PRODUCTS = ("scores", "output")  # the names of the two products, of which scaling states are kept


@dataclasses.dataclass(frozen=True)
class QuantizedAttention:
    """An attention function with other products.

    Attributes:
      attention: `linen_attention` or `nnx_attention`.
      scores_einsum: the product of query and key.
      output_einsum: the product of weights and value.
    """

    attention: Callable[..., Array]
    scores_einsum: Einsum
    output_einsum: Einsum

    @property
    def __signature__(self) -> inspect.Signature:
        """That of `attention`: Linen passes an attention function only what its signature names."""
        return inspect.signature(self.attention)

    def __call__(self, *args: Any, **kwargs: Any) -> Array:
        """Same arguments as `attention`."""
        products = {"scores_einsum": self.scores_einsum, "output_einsum": self.output_einsum}
        return self.attention(*args, **kwargs, **products)


def linen_attention(
    query: Array,
    key: Array,
    value: Array,
    bias: Array | None = None,
    mask: Array | None = None,
    broadcast_dropout: bool = True,
    dropout_rng: Array | None = None,
    dropout_rate: float = 0.0,
    deterministic: bool = False,
    dtype: Any = None,
    precision: Any = None,
    module: Any = None,
    scores_einsum: Einsum = scores_of,
    output_einsum: Einsum = output_of,
) -> Array:
    """`flax.linen.dot_product_attention` with a float32 softmax; same arguments and shapes.

    `scores_einsum` and `output_einsum` are its two products.
    """

    def scores(equation: str, query: Array, key: Array) -> Array:
        product = scores_einsum(equation, query, key, precision=precision)
        return product.astype(jnp.promote_types(product.dtype, jnp.float32))

    return nn.dot_product_attention(
        query,
        key,
        value,
        bias=bias,
        mask=mask,
        broadcast_dropout=broadcast_dropout,
        dropout_rng=dropout_rng,
        dropout_rate=dropout_rate,
        deterministic=deterministic,
        dtype=dtype,
        module=module,
        qk_attn_weights_einsum=scores,
        attn_weights_value_einsum=functools.partial(output_einsum, precision=precision),
    )


def nnx_attention(
    query: Array,
    key: Array,
    value: Array,
    bias: Array | None = None,
    mask: Array | None = None,
    broadcast_dropout: bool = True,
    dropout_rng: Array | None = None,
    dropout_rate: float = 0.0,
    deterministic: bool = False,
    dtype: Any = None,
    precision: Any = None,
    module: Any = None,
    is_causal: bool = False,
    scores_einsum: Einsum = scores_of,
    output_einsum: Einsum = output_of,
) -> Array:
    """`flax.nnx.dot_product_attention`, as `linen_attention` is Linen's."""
    groups = query.shape[-2] // key.shape[-2]
    if groups * key.shape[-2] != query.shape[-2]:
        raise ValueError(
            f"query has {query.shape[-2]} heads and key has {key.shape[-2]}: grouped-query "
            "attention needs the first to be a multiple of the second"
        )
    if groups > 1:
        key, value = (jnp.repeat(x, groups, axis=-2) for x in (key, value))
    if is_causal:
        causal = jnp.tril(jnp.ones((query.shape[-3], key.shape[-3]), bool))
        mask = causal if mask is None else jnp.logical_and(mask, causal)
    return linen_attention(
        query,
        key,
        value,
        bias,
        mask,
        broadcast_dropout,
        dropout_rng,
        dropout_rate,
        deterministic,
        dtype,
        precision,
        None if module is None else _Sower(module),
        scores_einsum,
        output_einsum,
    )


class _Sower:
    """Gives an NNX module the `sow` of a Linen one."""

    def __init__(self, module: Any):
        self._module = module

    def sow(self, collection: str, name: str, value: Array) -> None:
        del collection
        from flax import nnx

        self._module.sow(nnx.Intermediate, name, value)
