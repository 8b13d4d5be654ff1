"""The cache of keys and values in 8 bits, for Flax attention that decodes position by position.

Flax keeps two float arrays of shape [batch..., length, heads, depth]. Under `kv_cache=` of a policy
each is a `QTensor` of that shape, with a scale per position and head, so that no head and no
position costs another its precision:

  values  int8 or E4M3   [batch..., length, heads, depth]
  scale   float32        [batch..., length, heads, 1]

A step quantizes the new key and value, once, and writes them in their place. What is stored is
multiplied as it is, and never dequantized as a whole: the scale of a key multiplies the scores, as
it is constant along the axis that they sum over, and the scale of a value multiplies the weight
that meets it:

  scores[h, k] = (query[h] @ keys.values[k, h]) * keys.scale[k, h]
  output[h]    = sum_k (weights[h, k] * values.scale[k, h]) * values.values[k, h]
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

import mpjax_kernels as mk

from ._policy import CACHE_FORMATS, DTypePolicy
from ._recipes import attention_recipe_of

Array = jax.Array


def empty_cache(shape: Sequence[int], dtype: Any, policy: DTypePolicy) -> mk.QTensor:
    """Zeros [batch..., length, heads, depth] as the policy stores them; `dtype` is the logical one.

    Raises:
      ValueError: the policy stores floats.
    """
    if policy.kv_cache is None:
        raise ValueError(f"{policy!r} stores its cache as floats: it has no kv_cache")
    values = jnp.zeros(shape, mk.get_format(CACHE_FORMATS[policy.kv_cache]).dtype)
    return mk.QTensor(values, jnp.ones((*shape[:-1], 1), jnp.float32), jnp.dtype(dtype))


def check_cache(cache: Any, policy: DTypePolicy, layer: str, remedy: str) -> None:
    """Checks that a cache is stored as the policy of its layer stores it.

    Raises:
      TypeError: it is not; the message names both, and the remedy.
    """
    found = cache.format.name if isinstance(cache, mk.QTensor) else None
    wanted = None if policy.kv_cache is None else CACHE_FORMATS[policy.kv_cache]
    if found != wanted:
        held = repr(cache) if found else f"{cache.dtype}{list(cache.shape)}"
        raise TypeError(
            f"the cache of {layer} holds {held}, but its policy, {policy!r} with kv_cache="
            f"{policy.kv_cache!r}, stores {wanted or 'floats'}: make the cache under the policy "
            f"that reads it, {remedy}"
        )


def refuse_own_attention(layer: str, policy: DTypePolicy) -> None:
    """Raises for a layer whose author chose the attention function, which reads a float cache."""
    raise NotImplementedError(
        f"{layer} decodes by an attention function of its own, which cannot read a cache that is "
        f"stored in 8 bits: give the layer a policy without kv_cache={policy.kv_cache!r}"
    )


@dataclasses.dataclass(frozen=True)
class DecodingStep:
    """Attention of one new position to a cache.

    Attributes:
      attention: `linen_attention` or `nnx_attention`.
      policy: of the layer, with a `kv_cache`.
      layer: its name in messages.
      remedy: how a cache is made, in messages.
    """

    attention: Callable[..., Array]
    policy: DTypePolicy
    layer: str
    remedy: str

    def __call__(
        self,
        caches: tuple[Any, Any],
        index: Array,
        query: Array,
        key: Array,
        value: Array,
        mask: Array | None,
        **options: Any,
    ) -> tuple[Array, mk.QTensor, mk.QTensor]:
        """Writes the position into the caches, and attends to all up to it.

        As in Flax, an index beyond the end writes the last position again.

        Args:
          caches: of keys and of values, [batch..., length, kv_heads, depth].
          index: the position, an integer scalar.
          query: [batch..., 1, heads, depth], the heads a multiple of the cache's.
          key: [batch..., 1, kv_heads, depth].
          value: as the key.
          mask: broadcastable to [batch..., heads, 1, length], or None.
          **options: further arguments of `attention`.

        Returns:
          The output, [batch..., 1, heads, depth], and both caches as they are now.

        Raises:
          TypeError: the caches are not stored as the policy stores them.
          ValueError: they have another shape, or there is more than one new position.
        """
        for cache in caches:
            check_cache(cache, self.policy, self.layer, self.remedy)
        self._check_shapes(caches[0].shape, query.shape, key.shape)
        keys, values = (write(c, x, index) for c, x in zip(caches, (key, value), strict=True))
        seen = jnp.arange(keys.shape[-3]) <= index
        mask = seen if mask is None else jnp.logical_and(mask, seen)
        quantized = attention_recipe_of(self.policy) is not None

        def scores(equation: str, query: Array, key: Array, precision: Any = None) -> Array:
            del equation, key  # the new key is in the cache
            options = {"precision": precision, "preferred_element_type": jnp.float32}
            return mk.attention_scores(query, keys, quantized=quantized, **options)

        def output(equation: str, weights: Array, value: Array, precision: Any = None) -> Array:
            del equation, value
            return mk.attention_output(weights, values, quantized=quantized, precision=precision)

        products = {"scores_einsum": scores, "output_einsum": output}
        return self.attention(query, key, value, mask=mask, **products, **options), keys, values

    def _check_shapes(self, cache: Any, query: Any, key: Any) -> None:
        expected = (*cache[:-3], 1, *cache[-2:])
        if key != expected or query[:-2] != expected[:-2]:
            raise ValueError(
                f"{self.layer} decodes one position at a time: for a cache of shape {cache} "
                f"[batch..., length, heads, depth] its query and key have shape {expected} (a "
                f"query may have more heads), but got {query} and {key}. Feed a prompt position by "
                f"position; for another batch make another cache, {self.remedy}"
            )


def write(cache: mk.QTensor, x: Array, index: Array) -> mk.QTensor:
    """The cache with `x`, [batch..., 1, heads, depth], quantized, at a position."""
    new = mk.quantize(x, cache.format, axis=-1)
    zero = jnp.zeros((), index.dtype)
    start = (*[zero] * (cache.ndim - 3), index, zero, zero)
    # XLA:CPU would widen a float8 cache to float16 to write into it, but has no need to for int8.
    old, new_bits = (jax.lax.bitcast_convert_type(q.values, jnp.int8) for q in (cache, new))
    values = jax.lax.dynamic_update_slice(old, new_bits, start)
    return dataclasses.replace(
        cache,
        values=jax.lax.bitcast_convert_type(values, cache.values.dtype),
        scale=jax.lax.dynamic_update_slice(cache.scale, new.scale, start),
    )
