"""Decoding by NNX attention with a cache in 8 bits: the layer's own `nnx.Cache` variables.

Flax' own code writes to a float array in the middle of `__call__`. So a call that decodes runs it
for a stand-in of the layer, which says that it does not decode, and whose attention function gets
the projected query, key and value of the new position, and sees to the cache.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from .._attention import nnx_attention
from .._kv_cache import DecodingStep, check_cache, empty_cache, refuse_own_attention
from .._policy import DTypePolicy

REMEDY = "by `init_cache` of the wrapped layer"


@dataclasses.dataclass(frozen=True)
class Call:
    """`__call__` of an attention layer under a policy.

    Attributes:
      base: the class of the layer before it was wrapped.
      policy: of the layer.
      is_flax: whether the layer attends by Flax' own attention function.
    """

    base: Any
    policy: DTypePolicy
    is_flax: bool

    def __call__(self, layer: Any, *args: Any, **kwargs: Any) -> Any:
        """Same arguments as the layer's."""
        decode = kwargs.get("decode")
        if not (layer.decode if decode is None else decode):
            return self.base.__call__(layer, *args, **kwargs)
        if self.policy.kv_cache is None:
            if layer.cached_key is not None:
                check_cache(layer.cached_key.get_value(), self.policy, _name(layer), REMEDY)
            return self.base.__call__(layer, *args, **kwargs)
        if not self.is_flax:
            refuse_own_attention(_name(layer), self.policy)
        if decode is not None:
            kwargs["decode"] = False
        return self.base.__call__(_Decoding(layer, self.policy), *args, **kwargs)


@dataclasses.dataclass(frozen=True)
class InitCache:
    """`init_cache` of an attention layer under a policy with a `kv_cache`."""

    policy: DTypePolicy

    def __call__(self, layer: Any, input_shape: Sequence[int], dtype: Any = jnp.float32) -> None:
        """Same arguments as Flax'; `dtype` is what the 8 bits stand for."""
        shape = (*input_shape[:-1], layer.num_kv_heads, layer.head_dim)
        layer.cached_key = nnx.Cache(empty_cache(shape, dtype, self.policy))
        layer.cached_value = nnx.Cache(empty_cache(shape, dtype, self.policy))
        layer.cache_index = nnx.Cache(jnp.zeros((), jnp.int32))


class _Decoding:
    """A layer for the length of one call; all but what is defined here is the layer's."""

    decode = False

    def __init__(self, layer: Any, policy: DTypePolicy):
        object.__setattr__(self, "_layer", layer)
        object.__setattr__(self, "_policy", policy)

    @property
    def __class__(self) -> type:  # so that `super()` works in a method of a subclass
        return type(self._layer)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._layer, name, value)

    def attention_fn(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        *,
        mask: jax.Array | None = None,
        is_causal: bool = False,
        **options: Any,
    ) -> jax.Array:
        """One step; it is causal in any case."""
        del is_causal
        layer = self._layer
        keys, values, index = layer.cached_key, layer.cached_value, layer.cache_index
        if keys is None or values is None or index is None:
            raise ValueError("Autoregressive cache not initialized, call ``init_cache`` first.")
        step = DecodingStep(nnx_attention, self._policy, _name(layer), REMEDY)
        caches = keys.get_value(), values.get_value()
        out, *updated = step(caches, index[...], query, key, value, mask, **options)
        keys.set_value(updated[0])
        values.set_value(updated[1])
        index[...] += 1
        return out


def _name(layer: Any) -> str:
    return f"a {type(layer).__name__}"
