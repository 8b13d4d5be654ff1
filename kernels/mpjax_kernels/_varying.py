"""Values that differ between the devices of a `jax.shard_map`.

JAX tracks the mesh axes along which a value varies. A constant varies along none, so as the first
carry of a loop over values that do it has the wrong type, and so does the cotangent of a replicated
operand that was multiplied by a varying one.
"""

from typing import Any

import jax
from jaxtyping import Array, Shaped


def varying_axes(*trees: Any) -> frozenset[str]:
    """The mesh axes along which any leaf varies; none outside of `shard_map`."""
    # What is abstract (of `eval_shape`, outside of `shard_map`) may have no type of axes.
    types = [getattr(jax.typeof(x), "manual_axis_type", None) for x in jax.tree.leaves(trees)]
    return frozenset().union(*(t.varying for t in types if t is not None))


def vary_like(x: Shaped[Array, "..."], *trees: Any) -> Shaped[Array, "..."]:
    """`x`, varying along every axis along which a leaf of `trees` does.

    The transpose of this is a sum over those axes, so the cotangent of `x` comes back whole.
    """
    missing = varying_axes(*trees) - varying_axes(x)
    return jax.lax.pcast(x, tuple(sorted(missing)), to="varying") if missing else x
