"""The mesh axes of a `jax.shard_map`, and whether it can be differentiated from outside.

With `check_vma=True` JAX knows along which axes a value varies between devices, and a product takes
the largest amax over them. With `check_vma=False` the transpose of the `shard_map` itself sums the
cotangents of replicated inputs over devices, those of probes too, for which there is no such sum.
"""

import jax
import jax.numpy as jnp


def manual_axes() -> frozenset[str]:
    """The axes of the `shard_map`s that this is called in."""
    mesh = jax.sharding.get_abstract_mesh()
    return frozenset() if mesh.empty else frozenset(mesh.manual_axes)


def check_tracked(outside: frozenset[str]) -> None:
    """Refuses a `shard_map` with `check_vma=False` between a loss and a layer inside of it.

    Args:
      outside: the manual axes where the loss is differentiated.

    Raises:
      NotImplementedError: the layer is called in such a `shard_map`.
    """
    inside = tuple(sorted(manual_axes() - outside))
    if not inside:
        return
    varying = jax.typeof(jax.lax.pcast(jnp.zeros(()), inside, to="varying"))
    if not varying.manual_axis_type.varying:  # nothing is tracked
        raise NotImplementedError(
            "a layer with scaling state runs in a `jax.shard_map` with check_vma=False inside the "
            "loss: its transpose sums over devices what should be the largest of them. Use "
            "check_vma=True, or call value_and_grad inside the shard_map"
        )
