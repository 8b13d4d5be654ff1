"""A dtype whose addition is the maximum, for cotangents that are amaxes.

Where a value is used several times (a shared layer, a scan over one layer) autodiff adds its
cotangents up. The sum of two amaxes means nothing; their maximum is what scaling needs. Flax has an
extended dtype with that rule. It is not part of Flax's public interface, so this is the one file
that knows of it.
"""

import functools
import importlib
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def probe_of(zeros: Float[Array, "*shape"]) -> Any:
    """Zeros as a probe: its cotangents add up by maximum, and start at -Inf.

    It can only be made, and taken apart, where JAX traces (under `jit`).
    """
    return jax.lax.convert_element_type(zeros, _max_dtype())


def amax_of(cotangent: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """The amaxes that a probe's cotangent stands for; 0 where there was none, NaN stays NaN."""
    return jnp.maximum(cotangent, 0.0)


@functools.cache
def _max_dtype() -> Any:
    try:  # not before it is needed: `import mpjax` loads no Flax API
        return importlib.import_module("flax.linen.fp8_ops").fp32_max_grad
    except (ImportError, AttributeError) as error:
        raise ImportError(
            "delayed scaling needs `flax.linen.fp8_ops.fp32_max_grad`, which this version of Flax "
            "does not have: install flax>=0.12.8, or an older one if it has gone since"
        ) from error
