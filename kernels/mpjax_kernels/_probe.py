"""Probes: zeros whose cotangents are amaxes, which is how an amax leaves a backward pass.

A probe may be of a dtype whose addition is another (maximum, say): its cotangent is given to it in
that dtype, and whoever made it decides how the amaxes of several products become one.
"""

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Float

from ._largest import largest, largest_of_devices
from ._varying import varying_axes

Probe = Float[Array, "..."] | None


def cotangent(probe: Probe, amax: Float[Array, "..."] | None) -> Probe:
    """The cotangent of a probe: the amax, over all that the probe stands for.

    A probe that `vmap` does not map stands for every entry of the mapped axis, and one that the
    devices of a `shard_map` share for all of them.

    Raises:
        ValueError: If there is no amax, or it has another shape.
    """
    if probe is None:
        return None
    shape = jnp.shape(probe)
    if amax is None or amax.shape != shape:
        found = "none, for it is not quantized" if amax is None else f"amaxes of {amax.shape}"
        raise ValueError(
            f"a probe in `amax_probes` has shape {shape}, but its operand has {found}: "
            "give zeros of that shape, or None"
        )
    return jax.lax.convert_element_type(over_shared(amax, probe), probe.dtype)


def over_shared(amax: Float[Array, "..."], like: Float[Array, "..."]) -> Float[Array, "..."]:
    """The largest amax of all that share `like`: entries that `vmap` maps, devices."""
    return _over_devices(_over_batch(amax, like), like)


@custom_vmap
def _over_batch(amax: Float[Array, "..."], like: Float[Array, "..."]) -> Float[Array, "..."]:
    """`amax`; the largest along an axis that `vmap` maps in it and not in `like`."""
    del like
    return amax


@_over_batch.def_vmap
def _over_batch_mapped(size: int, mapped: list[bool], amax, like):
    amax_is_mapped, like_is_mapped = mapped
    if like_is_mapped:
        shape = (size, *like.shape[1:])
        return (amax if amax_is_mapped else jnp.broadcast_to(amax, shape)), True
    return _over_batch(largest(amax, 0) if amax_is_mapped else amax, like), False


def _over_devices(amax: Float[Array, "..."], like: Probe) -> Float[Array, "..."]:
    # All manual axes, not only those along which JAX tracks `amax` to vary: `check_vma=False`
    # tracks none.
    mesh = jax.sharding.get_abstract_mesh()
    manual = frozenset() if mesh.empty else frozenset(mesh.manual_axes)
    shared = tuple(sorted(manual - varying_axes(like)))
    if not shared:
        return amax
    untracked = tuple(a for a in shared if a not in varying_axes(amax))
    amax = jax.lax.pcast(amax, untracked, to="varying") if untracked else amax
    return largest_of_devices(amax, shared)
