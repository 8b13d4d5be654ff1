"""A scale, an amax or a probe for every operand that a differentiable product quantizes."""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ._probe import cotangent

Scale = Float[Array, "..."] | None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DotScales:
    """Something for each operand that a differentiable product quantizes: scales, or amaxes.

    Attributes:
        lhs: Of the left operand.
        rhs: Of the right operand.
        dlhs: Of the gradient where it is multiplied by `rhs`.
        drhs: Of the gradient where it is multiplied by `lhs`.
    """

    lhs: Scale = None
    rhs: Scale = None
    dlhs: Scale = None
    drhs: Scale = None


def observed(probes: DotScales, amaxes: DotScales, g: Float[Array, "*out"]) -> DotScales:
    """The amaxes as cotangents of the probes; none of an operand whose product got no gradient."""
    if probes.lhs is not None or probes.rhs is not None:
        found = next((a for a in (amaxes.dlhs, amaxes.drhs) if a is not None), g)
        used = jnp.any(found != 0)  # NaN is not zero
        operands = DotScales(amaxes.lhs, amaxes.rhs)
        operands = jax.tree.map(lambda amax: jnp.where(used, amax, 0.0), operands)
        amaxes = replace(operands, dlhs=amaxes.dlhs, drhs=amaxes.drhs)
    names = ("lhs", "rhs", "dlhs", "drhs")
    return DotScales(*(cotangent(getattr(probes, n), getattr(amaxes, n)) for n in names))
