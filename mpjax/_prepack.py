"""Stored weights in the tiles that native kernels of this CPU read, and out of them.

`mk.prepacked` makes the tiles of one tensor. Here is which weights of a model get them, and why
others do not: a weight that something else than these kernels reads would be put in order again at
every call.
"""

import dataclasses
import functools
from typing import Any

import jax
from jax.core import Tracer

import mpjax_kernels as mk

from ._context import Product
from ._prescaled import PreScaledWeight, is_stored
from ._stored import Stored


def packed(
    weight: mk.QTensor | PreScaledWeight, stored: Stored, product: Product
) -> tuple[mk.QTensor | PreScaledWeight, str | None]:
    """A stored weight as its products read it fastest here; and why not in tiles, if it is not."""
    refusal = _refusal(weight, stored, product)
    if refusal is not None:
        return weight, refusal
    stacked = weight.ndim - len(product.shape)
    axes = tuple(stacked + axis for axis in product.contracting)
    quantized = weight.quantized if isinstance(weight, PreScaledWeight) else weight
    refusal = mk.prepacked_refusal(quantized, axes)
    return jax.block_until_ready(_packed(weight, axes)), refusal


def unpacked(leaf: Any) -> Any:
    """A leaf of a model, in no tiles: the same numbers, as everything else reads them."""
    if not is_stored(leaf) or not leaf.tiles:
        return leaf
    is_abstract = isinstance(leaf.values, jax.ShapeDtypeStruct)
    return jax.eval_shape(_unpacked, leaf) if is_abstract else _unpacked(leaf)


def reads_tiles() -> bool:
    """Whether products on the default device read tiles as they are."""
    return jax.default_backend() == "cpu" and mk.native_kernels().tiles_refusal is None


def _refusal(weight: mk.QTensor | PreScaledWeight, stored: Stored, product: Product) -> str | None:
    if jax.default_backend() != "cpu":
        return f"the default device is no CPU but a {jax.default_backend()}"
    if stored.format != "int8":
        return f"it is {stored.format}, and int8 alone is"
    if stored.activation is None or stored.activation.format != "int8":
        return "it is multiplied by floats"
    if product.is_conv or product.name == "embedding":
        return "it belongs to a convolution" if product.is_conv else "it is looked up"
    values = weight.values
    if not isinstance(values, Tracer | jax.ShapeDtypeStruct) and len(values.devices()) > 1:
        return f"it is on {len(values.devices())} devices"
    return None


@functools.partial(jax.jit, static_argnums=1)
def _packed(
    weight: mk.QTensor | PreScaledWeight, axes: tuple[int, ...]
) -> mk.QTensor | PreScaledWeight:
    if isinstance(weight, PreScaledWeight):
        return dataclasses.replace(weight, quantized=_packed(weight.quantized, axes))
    return mk.prepacked(weight, axes)


@jax.jit
def _unpacked(weight: mk.QTensor | PreScaledWeight) -> mk.QTensor | PreScaledWeight:
    if isinstance(weight, PreScaledWeight):
        return dataclasses.replace(weight, quantized=_unpacked(weight.quantized))
    return mk.without_tiles(weight)
