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


def manual_axes() -> frozenset[str]:
    """The mesh axes of the `shard_map`s that are being traced."""
    mesh = jax.sharding.get_abstract_mesh()
    return frozenset() if mesh.empty else frozenset(mesh.manual_axes)


def refuse_unchecked_shard_map(made_in: frozenset[str]) -> None:
    """Raises NotImplementedError where a probe's cotangents would be summed over devices.

    That is what the transpose of a `shard_map` with `check_vma=False` does to what the devices
    share, and a probe has no sum. `made_in` are the manual axes where the probe was made.
    """
    entered = tuple(sorted(manual_axes() - made_in))
    if not entered:
        return
    varying = jax.lax.pcast(jnp.zeros(()), entered, to="varying")
    if not jax.typeof(varying).manual_axis_type.varying:  # without the check nothing is tracked
        raise NotImplementedError(
            "a layer with scaling state runs in a `jax.shard_map` with check_vma=False inside the "
            "loss: its transpose sums over devices what should be the largest of them. Use "
            "check_vma=True, or call value_and_grad inside the shard_map"
        )


@functools.cache
def _max_dtype() -> Any:
    try:  # not before it is needed: `import mpjax` loads no Flax API
        return importlib.import_module("flax.linen.fp8_ops").fp32_max_grad
    except (ImportError, AttributeError) as error:
        raise ImportError(
            "delayed scaling needs `flax.linen.fp8_ops.fp32_max_grad`, which this version of Flax "
            "does not have: install flax>=0.12.8, or an older one if it has gone since"
        ) from error
