"""What XLA:CPU writes to memory instead of computing it again wherever it is read."""

import jax
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Shaped


def in_memory(x: Shaped[Array, "*shape"]) -> Shaped[Array, "*shape"]:
    """`x`, stored in the order of its axes.

    XLA:CPU fuses what is elementwise into every operation that reads it, and a transpose into a
    dot; an optimization barrier does not keep it from that, but a constraint of the layout does.
    """
    return with_layout_constraint(x, Layout(tuple(range(x.ndim))))


def once(x: Shaped[Array, "*shape"]) -> Shaped[Array, "*shape"]:
    """`x`, computed once on CPUs: for what is small, and read by many loops."""
    return jax.lax.platform_dependent(x, cpu=in_memory, default=lambda y: y)
