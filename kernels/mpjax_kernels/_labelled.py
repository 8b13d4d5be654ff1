"""An operand of an einsum with a label for each of its axes, and what is done to one alone."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from ._qtensor import QTensor, in_order
from ._quantize import dequantize


@dataclass(frozen=True)
class Labelled:
    """An operand and one character for every axis of it."""

    operand: Array | QTensor
    labels: str


def diagonal(term: Labelled) -> Labelled:
    """Takes the diagonal over every label that is there more than once; the axis comes first.

    A diagonal of a QTensor holds the stored numbers with the scales they have, so it is exact. The
    label has one scale if each of its axes has one, and else a scale per entry.
    """
    for label in dict.fromkeys(term.labels):
        axes = tuple(i for i, c in enumerate(term.labels) if c == label)
        if len(axes) > 1:
            rest = term.labels.replace(label, "")
            term = Labelled(_diagonal(term.operand, axes), label + rest)
    return term


def _diagonal(operand: Array | QTensor, axes: tuple[int, ...]) -> Array | QTensor:
    if not isinstance(operand, QTensor):
        return _pick(operand, axes)
    q = in_order(operand)
    zero_point = None if q.zero_point is None else _pick_scales(q.zero_point, q.shape, axes)
    scale = _pick_scales(q.scale, q.shape, axes)
    return replace(q, values=_pick(q.values, axes), scale=scale, zero_point=zero_point)


def _pick_scales(scales: Array, shape: tuple[int, ...], axes: tuple[int, ...]) -> Array:
    """One scale for the diagonal where each axis has one, and else one for every entry."""
    if any(scales.shape[a] != 1 for a in axes):
        for a in axes:
            scales = jnp.repeat(scales, shape[a] // scales.shape[a], axis=a)
    return _pick(scales, axes)


def _pick(array: Array, axes: tuple[int, ...]) -> Array:
    """The diagonal over axes of one size, as the first axis."""
    index = jnp.arange(array.shape[axes[0]])
    front = jnp.moveaxis(array, axes, range(len(axes)))
    return front[(index,) * len(axes)]


def drop_broadcast(term: Labelled, sizes: Mapping[str, int]) -> Labelled:
    """Takes away the axes of size 1 whose label is wider in another operand."""
    pairs = zip(term.operand.shape, term.labels, strict=True)
    gone = [size == 1 and sizes[label] != 1 for size, label in pairs]
    index = tuple(0 if g else slice(None) for g in gone)
    kept = "".join(label for label, g in zip(term.labels, gone, strict=True) if not g)
    return Labelled(term.operand[index], kept) if any(gone) else term


def sum_axes(term: Labelled, labels: set[str], dtype: np.dtype) -> Labelled:
    """Sums the axes of these labels, a QTensor dequantized to float32 first.

    Args:
        term: The operand.
        labels: The labels to sum; others than its own are ignored.
        dtype: The dtype of the result of the einsum: an array narrower than it is widened first.
    """
    axes = tuple(i for i, label in enumerate(term.labels) if label in labels)
    if not axes:
        return term
    if isinstance(term.operand, QTensor):
        array = dequantize(term.operand, jnp.float32)
    else:
        with jax.numpy_dtype_promotion("standard"):  # it is we who mix them, not the caller
            wide = jnp.promote_types(term.operand.dtype, dtype)
        array = term.operand.astype(wide)
    kept = "".join(label for label in term.labels if label not in labels)
    return Labelled(jnp.sum(array, axis=axes), kept)
