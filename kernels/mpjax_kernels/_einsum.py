"""einsum, reduced to diagonals, sums, and one dot_general for every two operands."""

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import opt_einsum
from jax.typing import DTypeLike
from jaxtyping import Array

from ._arguments import refuse_integer_result
from ._contraction import DimensionNumbers
from ._dot_general import IMPLEMENTATIONS, dot_general
from ._equation import Equation, interleaved, label_sizes, parse
from ._implementation import check_names
from ._labelled import Labelled, diagonal, drop_broadcast, sum_axes
from ._qtensor import QTensor, validate
from ._quantize import dequantize

Path = Sequence[tuple[int, ...]]


def einsum(
    equation: Any,
    *operands: Any,
    optimize: bool | str | Path = "auto",
    precision: jax.lax.PrecisionLike = None,
    preferred_element_type: DTypeLike | None = None,
    implementation: str | Sequence[str] | None = None,
) -> Array:
    """`jnp.einsum` of any number of operands that may be quantized.

    Every equation of `jnp.einsum` means here what it means there: diagonals, sums, ellipses,
    outputs left out, and axes of size 1 that broadcast. Before anything is multiplied, a label
    that an operand has twice becomes its diagonal (of a QTensor another QTensor, exactly), and
    one that a single operand has alone is summed (of a QTensor in float32, dequantized). Then two
    operands at a time are multiplied by `dot_general`, in the order `optimize` finds; what comes
    out is an array of the dtype of the result, as in `jnp.einsum`.

    Plain arrays alone go to `jnp.einsum` whatever `implementation` says.

    Args:
        equation: E.g. `"bqhd,bkhd->bhqk"`, `"...i,ij->...j"`, `"ij,jk"` or `"ii->i"`.
        *operands: Arrays and QTensors. With lists of labels: `einsum(x, [0, 1], w, [1, 2], [0])`.
        optimize: As in `jnp.einsum`: how to find the order in which operands are multiplied.
        precision: As in `dot_general`.
        preferred_element_type: The dtype of the result and of what is multiplied on. If None,
            `jnp.result_type` of the operands (for a QTensor its logical dtype).
        implementation: As in `dot_general`, for every product that has a QTensor.

    Returns:
        An array with the axes that the equation asks for.

    Raises:
        ValueError: If the equation or the shapes make no sense.
        TypeError: If `preferred_element_type` is not floating, and an operand is a QTensor or one
            array is floating and another not.
        NotImplementedError: If `optimize` is a path that multiplies three operands at once, or
            for the reasons of `dot_general`.
    """
    check_names(IMPLEMENTATIONS, implementation)
    if not isinstance(equation, str):
        operands, equation = interleaved((equation, *operands))
    arrays = [x if isinstance(x, QTensor) else jnp.asarray(x) for x in operands]
    labels = parse(equation, [x.shape for x in arrays])
    if not any(isinstance(x, QTensor) for x in arrays):
        return _plain(labels, arrays, optimize, precision, preferred_element_type)
    dtype = _result_dtype(arrays, preferred_element_type)
    multiply = partial(
        dot_general,
        precision=precision,
        preferred_element_type=dtype,
        implementation=implementation,
    )
    product = _contract(simplify(labels, arrays, dtype), labels, optimize, multiply)
    operand, order = product.operand, [product.labels.index(label) for label in labels.output]
    array = dequantize(operand, dtype) if isinstance(operand, QTensor) else operand
    return jnp.transpose(array, order).astype(dtype)


def contracting_axes(
    equation: str, lhs_ndim: int, rhs_ndim: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The axes of each operand that an einsum equation contracts with the other.

    They are the axes along which an operand's scales must be constant, so those to quantize over:
    for `"...k,kn->...n"` and operands of 3 and 2 axes, `((2,), (0,))`.

    Raises:
        ValueError: If the equation makes no sense for two operands of these ranks.
    """
    labels = parse(equation, [(1,) * lhs_ndim, (1,) * rhs_ndim])
    left, right = labels.inputs
    contract = [c for c in dict.fromkeys(left) if c in right and c not in labels.output]
    lhs_axes, rhs_axes = (
        tuple(i for c in contract for i, label in enumerate(term) if label == c)
        for term in (left, right)
    )
    return lhs_axes, rhs_axes


def batch_axes(equation: str, lhs_ndim: int, rhs_ndim: int) -> tuple[tuple[int, ...], ...]:
    """The axes of each operand that an einsum equation has in common with the other and keeps.

    For `"bsd,bdk->bsk"` it is `((0,), (0,))`.

    Raises:
        ValueError: If the equation makes no sense for two operands of these ranks.
    """
    labels = parse(equation, [(1,) * lhs_ndim, (1,) * rhs_ndim])
    left, right = labels.inputs
    shared = [c for c in dict.fromkeys(left) if c in right and c in labels.output]
    return tuple(
        tuple(i for c in shared for i, label in enumerate(term) if label == c)
        for term in (left, right)
    )


def _plain(
    equation: Equation,
    arrays: Sequence[Any],
    optimize: bool | str | Path,
    precision: jax.lax.PrecisionLike,
    preferred: DTypeLike | None,
) -> Array:
    for lhs, rhs in itertools.combinations(arrays, 2):
        refuse_integer_result(lhs, rhs, preferred)
    text = ",".join(equation.inputs) + "->" + equation.output
    path: Any = optimize
    return jnp.einsum(
        text, *arrays, optimize=path, precision=precision, preferred_element_type=preferred
    )


def _result_dtype(operands: Sequence[Array | QTensor], preferred: DTypeLike | None) -> np.dtype:
    if preferred is not None:
        dtype = jnp.dtype(preferred)
    else:  # from the arrays themselves, since a Python number takes the dtype of the others
        dtype = jnp.result_type(*(x.dtype if isinstance(x, QTensor) else x for x in operands))
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"a product with a QTensor has a floating dtype, not {dtype}")
    return dtype


def simplify(
    equation: Equation, operands: Sequence[Array | QTensor], dtype: np.dtype
) -> list[Labelled]:
    """The operands without repeated labels, broadcast axes, and axes to be summed alone."""
    for operand in operands:
        if isinstance(operand, QTensor):
            validate(operand)
    sizes = label_sizes(equation, [x.shape for x in operands])
    terms = [
        drop_broadcast(diagonal(Labelled(x, term)), sizes)
        for x, term in zip(operands, equation.inputs, strict=True)
    ]
    alone = Equation(tuple(t.labels for t in terms), equation.output, equation.text).used_once()
    return [sum_axes(t, alone, dtype) for t in terms]


def _contract(
    terms: list[Labelled],
    equation: Equation,
    optimize: bool | str | Path,
    multiply: Callable[..., Array],
) -> Labelled:
    """Multiplies two operands at a time, until one is left."""
    for step in _path(terms, equation, optimize):
        chosen = [terms.pop(i) for i in sorted(step, reverse=True)]
        if len(chosen) == 2:
            rhs, lhs = chosen
            needed = {*equation.output}.union(*(t.labels for t in terms))
            terms.append(_product(lhs, rhs, needed, equation.output, multiply))
        else:
            terms += chosen
    (result,) = terms
    return result


def _path(terms: list[Labelled], equation: Equation, optimize: bool | str | Path) -> Path:
    """The operands that each step takes from the list; what it makes goes to the end."""
    if optimize is False:
        return [(0, 1)] * (len(terms) - 1)
    if isinstance(optimize, bool | str):
        text = ",".join(t.labels for t in terms) + "->" + equation.output
        how: Any = "optimal" if optimize is True else optimize
        shapes = [t.operand.shape for t in terms]
        optimize = cast(Path, opt_einsum.contract_path(text, *shapes, shapes=True, optimize=how)[0])
    path = [tuple(step) for step in optimize]
    if any(len(step) > 2 for step in path):
        raise NotImplementedError(
            f"`optimize` {path} multiplies more than two operands at once: use a path of pairs"
        )
    if len(terms) - sum(len(step) - 1 for step in path) != 1:
        raise ValueError(
            f"`optimize` {path} does not make one of the {len(terms)} operands of {equation.text}"
        )
    return path


def _product(
    lhs: Labelled, rhs: Labelled, needed: set[str], output: str, multiply: Callable[..., Array]
) -> Labelled:
    """One dot_general, over the labels that nothing else needs."""
    numbers, labels = pairing(lhs.labels, rhs.labels, needed, output)
    other_numbers, other_labels = pairing(rhs.labels, lhs.labels, needed, output)
    if labels != output == other_labels:  # the other way round there is nothing to transpose
        lhs, rhs, numbers, labels = rhs, lhs, other_numbers, other_labels
    return Labelled(multiply(lhs.operand, rhs.operand, numbers), labels)


def pairing(lhs: str, rhs: str, needed: set[str], output: str) -> tuple[DimensionNumbers, str]:
    """The dot_general of operands with these labels, over those not needed; and its result's."""
    shared = [label for label in lhs if label in rhs]
    batch = [label for label in output if label in shared]
    batch += [label for label in shared if label in needed and label not in batch]
    contract = [label for label in shared if label not in batch]
    (lhs_contract, lhs_batch), (rhs_contract, rhs_batch) = (
        tuple([labels.index(label) for label in group] for group in (contract, batch))
        for labels in (lhs, rhs)
    )
    free = [label for labels in (lhs, rhs) for label in labels if label not in shared]
    return ((lhs_contract, rhs_contract), (lhs_batch, rhs_batch)), "".join([*batch, *free])
