"""`quantize` for NNX: a layer knows its own axes, so nothing is traced."""

from collections.abc import Iterator
from typing import Any

from flax import nnx

from .._paths import join
from .._products import QuantizedDotGeneral, QuantizedEinsum
from .._quantize import nothing_to_quantize, quantize_weight
from ._wrap import policy_of


def quantize(model: nnx.Module, variables: Any = None, *args: Any, **kwargs: Any) -> nnx.Module:
    """See `mpjax.quantize`."""
    if variables is not None or args or kwargs:
        raise TypeError(
            "an NNX model holds its weights and knows its layers: call mp.quantize(model) with "
            "nothing else"
        )
    kernels = list(_kernels(model))
    if not kernels:
        raise nothing_to_quantize(type(model).__name__, policy_of(model))
    quantized = [  # all of them before the first is replaced: a NaN leaves the model as it was
        quantize_weight(kernel.get_raw_value(), contracting, path)
        for path, kernel, contracting in kernels
    ]
    for (_, kernel, _), value in zip(kernels, quantized, strict=True):
        kernel.set_raw_value(value)
    return model


def _kernels(model: nnx.Module) -> Iterator[tuple[str, Any, tuple[int, ...]]]:
    """Yields path, kernel and contracting axes (counted from the end) of each quantized layer."""
    layer: Any
    for path, layer in nnx.iter_modules(model):
        product = getattr(layer, "dot_general", None) or getattr(layer, "einsum_op", None)
        if isinstance(product, QuantizedDotGeneral | QuantizedEinsum):
            name = join((*path, "kernel"))
            yield name, layer.kernel, _contracting(layer, name)


def _contracting(layer: Any, name: str) -> tuple[int, ...]:
    if isinstance(layer, nnx.Linear):
        return (-2,)
    if isinstance(layer, nnx.LinearGeneral):
        inputs, outputs = len(layer.in_features), len(layer.out_features)
        return tuple(range(-inputs - outputs, -outputs))
    if layer.einsum_str is None:
        raise NotImplementedError(
            f"'{name}' is used with an equation given at each call; build the layer with "
            "einsum_str= to quantize it"
        )
    operand, _, output = layer.einsum_str.replace(" ", "").partition("->")
    lhs, _, rhs = operand.partition(",")
    if "." in rhs:
        raise NotImplementedError(
            f"'{name}' has an ellipsis in its own term of {layer.einsum_str!r}: spell its axes out"
        )
    return tuple(i - len(rhs) for i, c in enumerate(rhs) if c in lhs and c not in output)
