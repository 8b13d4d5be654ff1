"""einsum and matmul of two operands, each reduced to one dot_general and a transpose."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array

from ._dot_general import dot_general
from ._qtensor import QTensor


def einsum(
    equation: str,
    lhs: Array | QTensor,
    rhs: Array | QTensor,
    *,
    precision: jax.lax.PrecisionLike = None,
    preferred_element_type: DTypeLike | None = None,
    implementation: str | Sequence[str] | None = None,
) -> Array:
    """`jnp.einsum` of two operands that may be quantized.

    Axes under an ellipsis broadcast as in NumPy. An axis of an array that is in neither the
    other operand nor the output is summed first.

    Args:
        equation: E.g. `"bqhd,bkhd->bhqk"`, `"...i,ij->...j"` or `"ij,jk"`.
        lhs: An array or a QTensor.
        rhs: An array or a QTensor.
        precision: As in `dot_general`.
        preferred_element_type: As in `dot_general`.
        implementation: As in `dot_general`.

    Returns:
        An array with the axes that the equation asks for.

    Raises:
        ValueError: If the equation or the shapes make no sense.
        NotImplementedError: If an operand has a label twice (a diagonal), a QTensor would
            have to be summed, or for the reasons of `dot_general`.
    """
    lhs = lhs if isinstance(lhs, QTensor) else jnp.asarray(lhs)
    rhs = rhs if isinstance(rhs, QTensor) else jnp.asarray(rhs)
    left, right, out = _parse(equation, lhs.ndim, rhs.ndim)
    sizes = dict(zip(left, lhs.shape, strict=True)), dict(zip(right, rhs.shape, strict=True))
    lhs, left = _drop_broadcast(lhs, left, sizes[1])
    rhs, right = _drop_broadcast(rhs, right, sizes[0])
    lhs, left = _sum_unused(equation, lhs, left, {*right, *out})
    rhs, right = _sum_unused(equation, rhs, right, {*left, *out})
    batch = [label for label in left if label in right and label in out]
    contract = [label for label in left if label in right and label not in out]
    result = dot_general(
        lhs,
        rhs,
        (_positions(contract, left, right), _positions(batch, left, right)),
        precision,
        preferred_element_type,
        implementation=implementation,
    )
    labels = batch + [label for label in left + right if label not in batch + contract]
    return jnp.transpose(result, [labels.index(label) for label in out])


def contracting_axes(
    equation: str, lhs_ndim: int, rhs_ndim: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The axes of each operand that an einsum equation contracts with the other.

    They are the axes along which an operand's scales must be constant, so those to quantize over:
    for `"...k,kn->...n"` and operands of 3 and 2 axes, `((2,), (0,))`.

    Raises:
        ValueError: If the equation makes no sense for operands of these ranks.
        NotImplementedError: If an operand has a label twice.
    """
    left, right, out = _parse(equation, lhs_ndim, rhs_ndim)
    contract = [label for label in left if label in right and label not in out]
    lhs_axes, rhs_axes = _positions(contract, left, right)
    return tuple(lhs_axes), tuple(rhs_axes)


def matmul(
    a: Array | QTensor,
    b: Array | QTensor,
    *,
    precision: jax.lax.PrecisionLike = None,
    preferred_element_type: DTypeLike | None = None,
    implementation: str | Sequence[str] | None = None,
) -> Array:
    """`jnp.matmul` of two operands that may be quantized.

    Args:
        a: An array or a QTensor of shape [..., M, K] or [K].
        b: An array or a QTensor of shape [..., K, N] or [K].
        precision: As in `dot_general`.
        preferred_element_type: As in `dot_general`.
        implementation: As in `dot_general`.

    Returns:
        An array of shape [..., M, N], without M if `a` is 1-D and without N if `b` is; the
        leading axes broadcast.

    Raises:
        ValueError: If an operand has no axes, or the shapes do not go together.
        NotImplementedError: For the reasons of `dot_general`.
    """
    if np.ndim(a) == 0 or np.ndim(b) == 0:
        raise ValueError(f"matmul needs axes: `a` has {np.ndim(a)} and `b` has {np.ndim(b)}")
    left = "k" if np.ndim(a) == 1 else "...mk"
    right = "k" if np.ndim(b) == 1 else "...kn"
    out = "..." + "m" * (np.ndim(a) > 1) + "n" * (np.ndim(b) > 1)
    return einsum(
        f"{left},{right}->{out}",
        a,
        b,
        precision=precision,
        preferred_element_type=preferred_element_type,
        implementation=implementation,
    )


def _parse(equation: str, lhs_ndim: int, rhs_ndim: int) -> tuple[list[str], list[str], list[str]]:
    """One label per axis of `lhs`, `rhs` and the output; see `_labels` for the ellipsis."""
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    terms = inputs.split(",")
    if len(terms) != 2:
        raise ValueError(f"`equation` {equation!r} must have two operands, it has {len(terms)}")
    left = _labels(equation, terms[0], lhs_ndim)
    right = _labels(equation, terms[1], rhs_ndim)
    hidden = max(_hidden(left), _hidden(right), key=len)
    if not arrow:
        output = "..." + "".join(sorted(c for c in inputs if inputs.count(c) == 1 and c.isalpha()))
    before, ellipsis, after = output.partition("...")
    out = [*before, *(hidden if ellipsis else []), *after]
    if len(set(out)) != len(out) or not {*out} <= {*left, *right} or (hidden and not ellipsis):
        raise ValueError(
            f"`equation` {equation!r}: the output must hold labels of the operands, each once, "
            "and an ellipsis if they have one"
        )
    return left, right, out


def _labels(equation: str, term: str, ndim: int) -> list[str]:
    """One label per axis; those under the ellipsis are "0.", "1.", ..., counted from its right."""
    before, ellipsis, after = term.partition("...")
    named = [*before, *after]
    count = ndim - len(named)
    if not all(label.isalpha() for label in named):
        raise ValueError(f"`equation` {equation!r} has something that is no label in {term!r}")
    if count < 0 or (count and not ellipsis):
        raise ValueError(f"`equation` {equation!r}: {term!r} does not describe {ndim} axes")
    if len(set(named)) != len(named):
        raise NotImplementedError(f"`equation` {equation!r}: {term!r} takes a diagonal")
    return [*before, *(f"{i}." for i in reversed(range(count))), *after]


def _hidden(labels: list[str]) -> list[str]:
    return [label for label in labels if label.endswith(".")]


def _drop_broadcast(
    operand: Array | QTensor, labels: list[str], other: dict[str, int]
) -> tuple[Array | QTensor, list[str]]:
    """Takes away the axes of size 1 under the ellipsis that the other operand widens."""
    wide = {label for label in _hidden(labels) if other.get(label, 1) != 1}
    drop = [label in wide and operand.shape[i] == 1 for i, label in enumerate(labels)]
    kept = [label for label, gone in zip(labels, drop, strict=True) if not gone]
    return operand[tuple(0 if gone else slice(None) for gone in drop)], kept


def _sum_unused(
    equation: str, operand: Array | QTensor, labels: list[str], used: set[str]
) -> tuple[Array | QTensor, list[str]]:
    axes = tuple(i for i, label in enumerate(labels) if label not in used)
    if not axes:
        return operand, labels
    if isinstance(operand, QTensor):
        raise NotImplementedError(
            f"`equation` {equation!r} sums axes {axes} of {operand!r}: dequantize it first"
        )
    return jnp.sum(operand, axis=axes), [label for label in labels if label in used]


def _positions(names: list[str], left: list[str], right: list[str]) -> tuple[list[int], list[int]]:
    return [left.index(name) for name in names], [right.index(name) for name in names]
