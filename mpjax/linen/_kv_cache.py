"""Decoding by Linen attention with a cache in 8 bits: variables of the collection `cache`.

Flax' own code writes to a float array in the middle of `__call__`. So for a call that decodes the
layer is lent `decode=False` and this attention function, which gets the projected query, key and
value of the new position, and sees to the cache where Flax would have.
"""

import inspect
from typing import Any

import jax
import jax.numpy as jnp

from .._attention import linen_attention
from .._kv_cache import DecodingStep, empty_cache
from ._layer import Layer

COLLECTION = "cache"
REMEDY = "by `init` of the wrapped model"


class Decoding:
    """The attention function of a layer that decodes under a policy with a `kv_cache`."""

    def __init__(self, layer: Layer, attention: Any):
        self._layer, self._attention = layer, attention

    @property
    def __signature__(self) -> inspect.Signature:
        """Linen passes an attention function only what its signature names."""
        return inspect.signature(linen_attention)

    def __call__(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        *,
        mask: jax.Array | None = None,
        **options: Any,
    ) -> jax.Array:
        """One step; while the cache is being made, attention of all positions, as in Flax."""
        module: Any = self._layer.module
        is_initialized = module.has_variable(COLLECTION, "cached_key")
        keys, values = self._declare("cached_key", key), self._declare("cached_value", value)
        index = self._variable("cache_index", jnp.zeros, (), jnp.int32)
        if not is_initialized:
            return self._attention(query, key, value, mask=mask, **options)
        step = DecodingStep(
            linen_attention, self._layer.policy, f"layer '{self._layer.full_path}'", REMEDY
        )
        caches = keys.value, values.value
        out, *updated = step(caches, index.value, query, key, value, mask, **options)
        keys.value, values.value = updated
        index.value = index.value + 1
        return out

    def _declare(self, name: str, x: jax.Array) -> Any:
        return self._variable(name, empty_cache, x.shape, x.dtype, self._layer.policy)

    def _variable(self, name: str, *init: Any) -> Any:
        module = self._layer.module
        return type(module).variable(module, COLLECTION, name, *init)
