"""Products of tensors whose scales vary along a contracting axis: one dot per group.

Every contracting axis is cut into runs along which both scales are constant. The dot of each run
is multiplied by its scales, and the runs are added up: all at once, with the runs as a batch axis,
or one after the other where that would take too much memory.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
from jax.export import is_symbolic_dim
from jaxtyping import Array, Float, Shaped

from ._contraction import Contraction
from ._qtensor import QTensor
from ._varying import vary_like

# Beyond this many partial results, 32 MiB of float32, the groups are added one after the other.
_AT_ONCE = 2**23


def is_grouped(operand: Array | QTensor, contract: tuple[int, ...]) -> bool:
    """Whether the scale of an operand varies along a contracting axis."""
    return isinstance(operand, QTensor) and any(operand.scale.shape[a] != 1 for a in contract)


def grouped_dot(
    lhs: Array | QTensor,
    rhs: Array | QTensor,
    contraction: Contraction,
    product: Callable[[Array | QTensor, Array | QTensor, Contraction], Float[Array, "*out"]],
    *,
    at_once: bool | None = None,
) -> Float[Array, "*out"]:
    """The sum over groups of `product`, which takes scales constant along contracting axes.

    Args:
        lhs: An array or a QTensor.
        rhs: An array or a QTensor.
        contraction: Their axes.
        product: Multiplies one group.
        at_once: Whether the groups are a batch axis of one product; None decides by its size.
    """
    c = contraction
    runs = tuple(_runs(lhs, a, rhs, b) for a, b in zip(c.lhs_contract, c.rhs_contract, strict=True))
    lhs, rhs = _stack(lhs, c.lhs_contract, runs), _stack(rhs, c.rhs_contract, runs)
    groups = math.prod(runs)
    one = replace(c, lhs_shape=lhs.shape[1:], rhs_shape=rhs.shape[1:])
    if at_once is None:
        known = not any(map(is_symbolic_dim, c.result_shape))
        at_once = known and groups * math.prod(c.result_shape) <= _AT_ONCE
    if at_once:
        # Batch axes come first in the result, so the groups are its first axis.
        return jnp.sum(product(lhs, rhs, _with_batch(one, lhs.shape, rhs.shape)), axis=0)
    total, _ = jax.lax.scan(
        lambda total, pair: (total + product(*pair, one), None),
        vary_like(jnp.zeros(c.result_shape, jnp.float32), lhs, rhs),
        (lhs, rhs),
    )
    return total


def has_scale_per_term(
    lhs: Array | QTensor, rhs: Array | QTensor, contraction: Contraction
) -> bool:
    """Whether a scale changes with every term, so that there is nothing to sum before scaling."""
    c = contraction
    pairs = zip(c.lhs_contract, c.rhs_contract, strict=True)
    return c.terms > 1 and c.terms == math.prod(_runs(lhs, a, rhs, b) for a, b in pairs)


def groups_are_runs(weight: QTensor, contract: tuple[int, ...]) -> bool:
    """Whether groups along all contracting axes are runs of terms, in the order they are stored.

    So they are where an axis that a group spans in part has a scale per entry in the axes before,
    and one scale in those after: as [heads, features, N] in groups of whole heads.
    """
    in_run = False
    for axis in sorted(contract):
        if in_run and weight.scale.shape[axis] != 1:
            return False
        in_run = in_run or weight.scale.shape[axis] != weight.shape[axis]
    return True


def _runs(lhs: Array | QTensor, a: int, rhs: Array | QTensor, b: int) -> int:
    """Into how many equal runs a pair of contracting axes is cut."""
    size = lhs.shape[a]
    scales = [o.scale.shape[i] for o, i in ((lhs, a), (rhs, b)) if isinstance(o, QTensor)]
    return size // math.gcd(*(size // s for s in scales)) if size else 1


def _stack(
    operand: Array | QTensor, contract: tuple[int, ...], runs: tuple[int, ...]
) -> Array | QTensor:
    """The runs of the contracting axes as one new first axis."""
    cut = partial(_stack_array, contract=contract, runs=runs)
    if not isinstance(operand, QTensor):
        return cut(operand)
    zero_point = None if operand.zero_point is None else cut(operand.zero_point)
    return replace(
        operand, values=cut(operand.values), scale=cut(operand.scale), zero_point=zero_point
    )


def _stack_array(
    x: Shaped[Array, "..."], contract: tuple[int, ...], runs: tuple[int, ...]
) -> Shaped[Array, "..."]:
    split = list(x.shape)
    for a, count in sorted(zip(contract, runs, strict=True), reverse=True):
        if x.shape[a] < count:  # of a scale, which several runs share
            x = jnp.repeat(x, count // x.shape[a], axis=a)
        split[a : a + 1] = count, x.shape[a] // count
    # Each contracting axis has become two, and so moved by one for each of them before it.
    first = [a + sum(other < a for other in contract) for a in contract]
    rest = [a for a in range(len(split)) if a not in first]
    x = x.reshape(split).transpose(*first, *rest)
    return x.reshape(math.prod(runs), *x.shape[len(runs) :])


def _with_batch(c: Contraction, lhs: tuple[int, ...], rhs: tuple[int, ...]) -> Contraction:
    """The contraction of operands with one more, batched, axis in front."""

    def after(axes: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(a + 1 for a in axes)

    return Contraction(
        lhs,
        rhs,
        after(c.lhs_contract),
        after(c.rhs_contract),
        (0, *after(c.lhs_batch)),
        (0, *after(c.rhs_batch)),
    )
