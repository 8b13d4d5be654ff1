"""`quantize` for NNX: a layer knows its own axes, so nothing is traced."""

import functools
from collections.abc import Iterator, Mapping
from typing import Any

from flax import nnx

from .._adapters import POLICY
from .._calibrated import Calibrated, round_weight
from .._calibration import Calibration, plan_of
from .._calibration_batches import first_and_all
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
from .._quantize import check_weight, quantize_weight
from .._stored import CannotStoreError, Stored, stored_of
from ._calibrate import calibrate, check_runs, scales_of, scaling_of
from ._rules import NORMS
from ._wrap import author_dtype


def quantize(
    calibration: Calibration | None,
    model: nnx.Module,
    variables: Any = None,
    *args: Any,
    **kwargs: Any,
) -> tuple[nnx.Module, QuantizationReport]:
    """See `mpjax.quantize`; returns the report in any case."""
    if variables is not None or args or (kwargs and calibration is None):
        raise TypeError(
            "an NNX model holds its weights and knows its layers: call mp.quantize(model) with "
            "nothing else, but for calibration=batches and what goes with that"
        )
    weights = {path: (weight, layer) for path, weight, layer in _weights(model)}
    products = {path: _product_of(layer, x, path) for path, (x, layer) in weights.items()}
    calibrated = None
    if calibration is not None and any(product for product, _, _ in products.values()):
        calibrated = _calibrated(calibration, model, weights, products, kwargs)
    rows: list[QuantizedWeight] = []
    replaced: dict[str, Any] = {}
    for path, (weight, _) in weights.items():
        value = weight.get_raw_value()
        product, stored, reason = products[path]
        if product is None or stored is None:
            rows.append(left_weight(path, value, reason, wanted=stored is not None))
            continue
        plain = functools.partial(quantize_weight, stored=stored, product=product, path=path)
        try:
            replaced[path], rounding = round_weight(calibrated, path, value, plain)
        except CannotStoreError as error:
            rows.append(left_weight(path, value, str(error), wanted=True))
            continue
        rows.append(quantized_weight(path, value, replaced[path], rounding))
    scales = {} if calibrated is None else scales_of(calibrated, replaced)
    # After the last check: a NaN leaves the model as it was.
    for path, quantized in replaced.items():
        weights[path][0].set_raw_value(quantized)
    for path, variable in scaling_of(model).items():
        if path in scales:
            variable.set_raw_value(scales[path])
    return model, QuantizationReport(tuple(rows))


def _calibrated(
    calibration: Calibration,
    model: nnx.Module,
    weights: Mapping[str, Any],
    products: Mapping[str, Any],
    kwargs: Mapping[str, Any],
) -> Calibrated:
    """What the batches tell."""
    first, batches = first_and_all(calibration.batches, kwargs)
    check_runs(model, first)
    plans = {}
    for path, (product, stored, _) in products.items():
        weight, layer = weights[path]
        if product is not None and stored is not None:
            policy, value = getattr(type(layer), POLICY), weight.get_raw_value()
            check_weight(value, path)
            plans[path] = plan_of(calibration, policy, product, tuple(value.shape))
    return calibrate(calibration, batches, model, plans)


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
    ndim, contracting, batch = axes
    shape = weight.get_raw_value().shape
    is_conv = kind == "conv_general_dilated"
    return Product(name, shape[len(shape) - ndim :], contracting, is_conv, batch), stored, ""


def _contracting(layer: Any) -> tuple[int, tuple[int, ...], tuple[int, ...]] | str:
    """The rank of a layer's kernel, the axes that its product sums over and those that it shares.

    Or why there are none.
    """
    if isinstance(layer, nnx.Linear):
        return 2, (0,), ()
    if isinstance(layer, nnx.LinearGeneral):
        batch, inputs = len(layer.batch_axis), len(layer.in_features)
        summed = tuple(range(batch, batch + inputs))
        return batch + inputs + len(layer.out_features), summed, tuple(range(batch))
    if isinstance(layer, nnx.Conv):
        ndim = len(layer.kernel_size) + 2
        return ndim, tuple(range(ndim - 1)), ()
    if layer.einsum_str is None:
        return "its equation is given at each call: build the layer with einsum_str="
    operand, _, output = layer.einsum_str.replace(" ", "").partition("->")
    lhs, _, rhs = operand.partition(",")
    if "." in rhs:
        return f"its own term of {layer.einsum_str!r} has an ellipsis: spell its axes out"
    summed = tuple(i for i, c in enumerate(rhs) if c in lhs and c not in output)
    return len(rhs), summed, tuple(i for i, c in enumerate(rhs) if c in lhs and c in output)
