"""`quantize` for NNX: a layer knows its own axes, so nothing is traced."""

import contextlib
import dataclasses
import difflib
import math
import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from flax import nnx

import mpjax_kernels as mk

from .._adapters import POLICY
from .._calibrated import Calibrated, round_weight
from .._calibration import Calibration, plan_of
from .._calibration_batches import first_and_all
from .._context import Observation, Product
from .._conv_product import QuantizedConv
from .._conv_transpose import QuantizedConvTranspose
from .._einsum_product import QuantizedEinsum
from .._lazy_array import on_device
from .._paths import join
from .._policy import DTypePolicy
from .._prepack import packed
from .._prescaled import is_stored
from .._products import QuantizedDotGeneral
from .._quantization_report import (
    QuantizationReport,
    QuantizedWeight,
    left_weight,
    quantized_weight,
)
from .._quantize import (
    check_donated,
    check_finite,
    check_storable,
    quantize_weight,
    release,
)
from .._roofline import ProductSize, why_plain
from .._stored import CannotStoreError, Stored, stored_of
from ._calibrate import calibrate, check_runs, scales_of
from ._given import given_values, put_values
from ._rules import NORMS
from ._states import outside_of_traces
from ._wrap import author_dtype

_KEYWORDS = ("calibration", "method", "observer", "progress", "return_report", "donate")
_KEYWORDS += ("prepack", "rows")
_MANY = 2**20  # rows of an input, where a call says nothing of them: the weight hardly counts


def quantize(
    calibration: Calibration | None,
    model: nnx.Module,
    weights: Any = None,
    *args: Any,
    donate: bool = False,
    prepack: bool = False,
    rows: int | None = None,
    **kwargs: Any,
) -> tuple[nnx.Module, QuantizationReport]:
    """See `mpjax.quantize`; returns the report in any case."""
    if kwargs and calibration is None:
        raise TypeError(_unknown(kwargs))
    if args or not (weights is None or isinstance(weights, Mapping)):
        raise TypeError(
            "an NNX model holds its weights and knows its layers: call mp.quantize(model) with "
            "nothing else, or with nested dicts of the weights to give it"
        )
    if calibration is not None and weights is not None:
        raise ValueError(
            "`calibration` runs the model, which has no weights yet: give them to it first, or "
            "leave one of `calibration` and the weights out"
        )
    rows = _MANY if rows is None else _checked(rows)
    given = {} if weights is None else given_values(model, weights)
    report: list[QuantizedWeight] = []
    plans: list[_Plan] = []
    is_judged = False  # and found not worth it: then the model works as it is
    for path, weight, layer in _weights(model):
        value = given.get(path, weight.get_raw_value())
        product, stored, reason = _product_of(layer, weight, path)
        if product is not None and stored is not None:
            left = _why_plain(layer, product, stored, value, rows)
            if left is not None:
                report.append(left_weight(path, value, left, wanted=False))
                is_judged = True
                continue
            plan = _Plan(path, weight, layer, product, stored, len(report))
            reason = plan.refusal(value)
            plans += [plan] if reason is None else []
        report.append(left_weight(path, value, reason or "", wanted=stored is not None))
    if not plans and not is_judged:
        return model, QuantizationReport(tuple(report))
    _check_before_work(plans, given, nnx.as_pure(nnx.state(model)) if donate else None)
    calibrated = None
    if calibration is not None and plans:
        calibrated = _calibrated(calibration, model, plans, kwargs)
    goes = donate and weights is None  # each float weight as it is quantized; else none before all
    made: dict[str, Any] = {}
    with outside_of_traces("mp.quantize"), _half_done(model, made if goes else {}, len(plans)):
        for plan in plans:
            value = given.pop(plan.path, plan.weight.get_raw_value())
            quantized, rounding = round_weight(calibrated, plan.path, value, plan.rounded)
            unpacked = None
            if prepack:
                quantized, unpacked = packed(quantized, plan.stored, plan.product)
            report[plan.row] = quantized_weight(plan.path, value, quantized, rounding, unpacked)
            if goes:
                plan.weight.set_raw_value(quantized)
            made[plan.path] = quantized
            if donate:
                release(value)
        scales = {} if calibrated is None else scales_of(calibrated, made)
        rest = {path: on_device(value) for path, value in given.items()}
        put_values(model, {**rest, **made, **scales})
    return model, QuantizationReport(tuple(report))


def unquantized(model: nnx.Module, weights: Any, observation: Observation) -> dict[str, str]:
    """The float weights that `quantize` would store: path -> format.

    Args:
      model: that holds them.
      weights, observation: of a call, as of Linen; not looked at.
    """
    found = {}
    for path, weight, layer in _weights(model):
        value = weight.get_raw_value()
        product, stored, _ = _product_of(layer, weight, path)
        if product is None or stored is None or is_stored(value):
            continue
        if getattr(type(layer), POLICY).profitable_on is not None:
            continue  # as `quantize` may have left it, by rows that are not known here
        with contextlib.suppress(CannotStoreError):
            check_storable(value, stored, product, path)
            found[path] = stored.format
    return found


def _unknown(kwargs: Mapping[str, Any]) -> str:
    """What is wrong with keyword arguments of no model's call."""
    name = next(iter(kwargs))
    nearest = difflib.get_close_matches(name, _KEYWORDS, n=1)
    meant = f"; did you mean `{nearest[0]}`?" if nearest else ""
    return (
        f"mp.quantize of an NNX model takes no `{name}`, but {', '.join(_KEYWORDS)}; and what its "
        f"calls take where there is a calibration{meant}"
    )


def _checked(rows: Any) -> int:
    """How many rows a call has, if it is a number of rows."""
    try:
        number = operator.index(rows)
    except TypeError:
        number = 0
    if number < 1:
        raise ValueError(
            f"`rows` is how many rows of input a call of the model has, at least 1. Received: "
            f"rows={rows!r}; left out, they are very many"
        )
    return number


def _calibrated(
    calibration: Calibration,
    model: nnx.Module,
    plans: Sequence["_Plan"],
    kwargs: Mapping[str, Any],
) -> Calibrated:
    """What the batches tell."""
    first, batches = first_and_all(calibration.batches, kwargs)
    check_runs(model, first)
    watched = {
        plan.path: plan_of(
            calibration,
            getattr(type(plan.layer), POLICY),
            plan.product,
            tuple(plan.weight.get_raw_value().shape),
        )
        for plan in plans
    }
    return calibrate(calibration, batches, model, watched)


def _check_before_work(plans: Sequence["_Plan"], given: Mapping[str, Any], donated: Any) -> None:
    """Raises for whatever would come up when some weights have been replaced already."""
    weights = {plan.path: given.get(plan.path, plan.weight.get_raw_value()) for plan in plans}
    if donated is not None:
        check_donated(weights, (donated, given))
    for path, weight in weights.items():
        check_finite(weight, path)


@contextlib.contextmanager
def _half_done(model: nnx.Module, done: Mapping[str, Any], of: int) -> Iterator[None]:
    """Whatever stops the work says which weights have changed, whose floats are gone."""
    try:
        yield
    except BaseException as error:
        if done:
            error.add_note(
                f"mp.quantize(..., donate=True) stopped after {len(done)} of {of} weights of this "
                f"{type(model).__name__}, the last of them {list(done)[-1]!r}, which stay "
                "quantized: make the model anew from its float weights. Without donate=True a "
                "model stays as it was"
            )
        raise


@dataclasses.dataclass(frozen=True)
class _Plan:
    """A weight to store: its path, its variable and layer, how, and its row in the report."""

    path: str
    weight: Any
    layer: Any
    product: Product
    stored: Stored
    row: int

    def rounded(self, value: Any) -> mk.QTensor:
        """A value, rounded to nearest."""
        return quantize_weight(value, self.stored, self.product, self.path)

    def refusal(self, value: Any) -> str | None:
        """Why it cannot be stored so, by its shape; None if it can."""
        try:
            check_storable(value, self.stored, self.product, self.path)
        except CannotStoreError as error:
            return str(error)
        return None


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
    kinds["conv_transpose"] = QuantizedConvTranspose
    kind = next((k for k in kinds if isinstance(getattr(layer, k, None), kinds[k])), None)
    if name != "kernel" or kind is None:
        return None, stored, "its layer multiplies it in no product that can be quantized"
    axes = _contracting(layer)
    if isinstance(axes, str):
        return None, stored, axes
    ndim, contracting, batch = axes
    shape = weight.get_raw_value().shape
    is_conv = kind.startswith("conv")
    return Product(name, shape[len(shape) - ndim :], contracting, is_conv, batch), stored, ""


def _why_plain(layer: Any, product: Product, stored: Stored, value: Any, rows: int) -> str | None:
    """Why a weight is not worth storing for so many rows of its layer's input, if it is not."""
    policy = getattr(type(layer), POLICY)
    if policy.profitable_on is None or stored.activation is None or isinstance(layer, nnx.Embed):
        return None
    shape, summed = product.shape, product.contracting
    terms = math.prod(shape[axis] for axis in summed)
    window = math.prod(shape[axis] for axis in summed[:-1]) if product.is_conv else 1
    batch = math.prod(shape[axis] for axis in product.batch)
    weight = math.prod(shape)
    size = ProductSize(rows * batch * terms // window, weight, rows * weight // terms, terms)
    return why_plain(
        policy.profitable_on,
        size,
        compute_dtype=policy.compute_dtype,
        format=stored.activation.format,
        weight_bytes=value.dtype.itemsize,
        is_stored=True,
        is_scale_known=policy.scheme.activations != "dynamic",
    )


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
    if isinstance(layer, nnx.ConvTranspose):
        ndim = len(layer.kernel_size) + 2
        output = ndim - 2 if layer.transpose_kernel else ndim - 1
        return ndim, tuple(axis for axis in range(ndim) if axis != output), ()
    if layer.einsum_str is None:
        return "its equation is given at each call: build the layer with einsum_str="
    operand, _, output = layer.einsum_str.replace(" ", "").partition("->")
    lhs, _, rhs = operand.partition(",")
    if "." in rhs:
        return f"its own term of {layer.einsum_str!r} has an ellipsis: spell its axes out"
    summed = tuple(i for i, c in enumerate(rhs) if c in lhs and c not in output)
    return len(rhs), summed, tuple(i for i, c in enumerate(rhs) if c in lhs and c in output)
