"""`quantize` for NNX: a layer knows its own axes, so nothing is traced."""

from collections.abc import Iterator
from typing import Any

from flax import nnx

import mpjax_kernels as mk

from .._adapters import POLICY
from .._context import Product
from .._paths import join
from .._policy import DTypePolicy
from .._products import QuantizedConv, QuantizedDotGeneral, QuantizedEinsum
from .._quantization_report import (
    QuantizationReport,
    QuantizedWeight,
    left_weight,
    quantized_weight,
)
from .._quantize import quantize_weight
from .._stored import CannotStoreError, Stored, stored_of
from ._rules import NORMS
from ._wrap import author_dtype


def quantize(
    model: nnx.Module, variables: Any = None, *args: Any, **kwargs: Any
) -> tuple[nnx.Module, QuantizationReport]:
    """See `mpjax.quantize`; returns the report in any case."""
    if variables is not None or args or kwargs:
        raise TypeError(
            "an NNX model holds its weights and knows its layers: call mp.quantize(model) with "
            "nothing else"
        )
    rows: list[QuantizedWeight] = []
    replaced: list[tuple[Any, mk.QTensor]] = []
    for path, weight, layer in _weights(model):
        value = weight.get_raw_value()
        product, stored, reason = _product_of(layer, weight, path)
        if product is None or stored is None:
            rows.append(left_weight(path, value, reason, wanted=stored is not None))
            continue
        try:
            quantized = quantize_weight(value, stored, product, path)
        except CannotStoreError as error:
            rows.append(left_weight(path, value, str(error), wanted=True))
            continue
        rows.append(quantized_weight(path, value, quantized))
        replaced.append((weight, quantized))
    for weight, quantized in replaced:  # after the last check: a NaN leaves the model as it was
        weight.set_raw_value(quantized)
    return model, QuantizationReport(tuple(rows))


def _weights(model: nnx.Module) -> Iterator[tuple[str, Any, Any]]:
    """Yields path, parameter and layer of every weight with two axes or more."""
    layers: dict[tuple[Any, ...], Any] = {}
    for path, node in nnx.iter_graph(model):
        if isinstance(node, nnx.Module) and not isinstance(node, nnx.List | nnx.Dict):
            layers[path] = node
    for path, node in nnx.iter_graph(model):
        if not isinstance(node, nnx.Param) or path[-1] == "bias":
            continue
        owner = layers[max((p for p in layers if path[: len(p)] == p), key=len)]
        if node.get_raw_value().ndim > 1 and not isinstance(owner, NORMS):  # a stack of them, then
            yield join(path), node, owner


def _product_of(layer: Any, weight: Any, path: str) -> tuple[Product | None, Stored | None, str]:
    """How a layer multiplies a weight and how that is stored, or else why it is not."""
    own = author_dtype(layer)
    policy = DTypePolicy(own) if own else getattr(type(layer), POLICY)
    stored = stored_of(policy)
    if stored is None:
        return None, None, f"its policy is {policy.name!r}"
    name = path.rpartition("/")[2]
    if isinstance(layer, nnx.Embed) and name == "embedding":
        return Product(name, weight.get_raw_value().shape[-2:], (1,)), stored, ""
    kinds = {"dot_general": QuantizedDotGeneral, "einsum_op": QuantizedEinsum}
    kinds["conv_general_dilated"] = QuantizedConv
    kind = next((k for k in kinds if isinstance(getattr(layer, k, None), kinds[k])), None)
    if name != "kernel" or kind is None:
        return None, stored, "its layer multiplies it in no product that can be quantized"
    axes = _contracting(layer)
    if isinstance(axes, str):
        return None, stored, axes
    ndim, contracting = axes
    shape = weight.get_raw_value().shape
    product = Product(name, shape[len(shape) - ndim :], contracting, kind == "conv_general_dilated")
    return product, stored, ""


def _contracting(layer: Any) -> tuple[int, tuple[int, ...]] | str:
    """The rank of a layer's kernel and the axes that its product sums over, or why not."""
    if isinstance(layer, nnx.Linear):
        return 2, (0,)
    if isinstance(layer, nnx.LinearGeneral):
        batch, inputs = len(layer.batch_axis), len(layer.in_features)
        return batch + inputs + len(layer.out_features), tuple(range(batch, batch + inputs))
    if isinstance(layer, nnx.Conv):
        ndim = len(layer.kernel_size) + 2
        return ndim, tuple(range(ndim - 1))
    if layer.einsum_str is None:
        return "its equation is given at each call: build the layer with einsum_str="
    operand, _, output = layer.einsum_str.replace(" ", "").partition("->")
    lhs, _, rhs = operand.partition(",")
    if "." in rhs:
        return f"its own term of {layer.einsum_str!r} has an ellipsis: spell its axes out"
    summed = tuple(i for i, c in enumerate(rhs) if c in lhs and c not in output)
    return len(rhs), summed
