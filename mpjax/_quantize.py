"""`quantize`: float weights in, weights of 8 or 4 bits out, for the same wrapped model."""

import functools
import warnings
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

import mpjax_kernels as mk

from ._calibration_request import ask, split_method
from ._context import Product
from ._observers import Observer
from ._prescaled import is_stored
from ._quantization_report import QuantizationReport
from ._stored import CannotStoreError, Stored, cut
from ._wrap import policies_of, wrapped_adapter_of


def quantize(
    model: Any,
    variables: Any = None,
    *args: Any,
    calibration: Any = None,
    method: Any = None,
    observer: Observer | None = None,
    progress: bool | None = None,
    return_report: bool = False,
    **kwargs: Any,
) -> Any:
    """Turns the weights of a wrapped model's quantized layers into 8 or 4 bits.

    The weight of every Dense, DenseGeneral, Einsum, Conv, Embed and attention projection whose
    policy is quantized becomes a `mpjax_kernels.QTensor`, and every other weight stays what it is:

        mode                weight                          the activation it is multiplied by
        int8                int8, per output channel        int8, per row, at every call
        int8_static         int8, per output channel        int8, by the scale in `scaling`
        int8_weight_only    int8, per output channel        in the compute dtype
        int4/128            int4, per 128 inputs            in the compute dtype
        float8              E4M3, per tensor                E4M3, by the scale in `scaling`
        float8_current      E4M3, per tensor                E4M3, per tensor, at every call
        float8/row          E4M3, per output channel        E4M3, per row, at every call
        float8/128x128      E4M3, per block of 128 x 128    E4M3, per 128 of a row, at every call
        gptq/4/128          as int4/128, by GPTQ            in the compute dtype
        awq/4/128           as int4/128, by AWQ             in the compute dtype

    (`int8_delayed` as `int8_static`.) The wrapped model applies the result. int8 products
    accumulate in int32, float8 in float32. No float copy of a quantized weight is kept.

    With `calibration`, batches run through the float model, in the compute dtype and under jit, and
    one of them is held at a time. They decide

        static and delayed scales   the `scaling` states get what `observer` makes of the inputs
        method="smoothquant"        a multiplier per input channel that suits weight and activation
        method="awq"                the same for weights alone, where activations stay floats
        method="gptq"               which of its neighbours a weight is rounded to

    Of a method and rounding to nearest, each layer (of a stack, too) keeps the one whose outputs
    are closer to the float ones on these batches; the report has both errors. A multiplier is
    stored with the weight. Methods are for dense layers, einsums and attention projections;
    convolutions, tables and products with batch axes are rounded to nearest, as the report says.

    Args:
      model: a wrapped Linen or NNX module, under a policy such as `"int8_from_mixed_bfloat16"`.
      variables: Linen: the variables to quantize, `{"params": ..., ...}`, as `apply` takes them.
        NNX: nothing, the model holds its weights.
      *args: Linen: the arguments of one call, `x`. Arrays may be `jax.ShapeDtypeStruct`s: the call
        is traced to meet the layers, never run. With `calibration` they may be left out, and the
        first batch serves. NNX: nothing.
      calibration: an iterable of batches, in any number, such as a generator. A batch is what the
        model is called with: a tuple of positional arguments, a dict of keyword arguments, or
        anything else as the one argument (so a dict or tuple that is itself the argument goes into
        a tuple). Each shape is compiled once. Give the arguments of inference (`train=False`).
      method: how weights are rounded: `"smoothquant"`, `"awq"` or `"gptq"`; None: to nearest, or
        as the policy says. Linen: a function, or the name of a method of the model, is instead
        what Flax' `apply` calls in place of `__call__`; beside a method of rounding it may stand
        in the batches, `{"x": x, "method": "encode"}`.
      observer: what static scales are made from: `AbsMax()` (the default), `Percentile()`,
        `MSE()`, `MovingAverage()` or `Entropy()`. What SmoothQuant has smoothed is judged by the
        256 rows that it keeps as a sample, but for `AbsMax()`, which is exact.
      progress: whether to show a bar (needs tqdm); None: where it is installed and standard error
        is a terminal.
      return_report: whether to return a `QuantizationReport` too, which says of every weight how
        it is stored, or why it was left. Without it, weights that were left although their policy
        quantizes them are warned of.
      **kwargs: Linen: keyword arguments of the call (`train=False`, `method=`, `rngs=`, ...).

    Returns:
      Linen: new variables of the same structure, with `QTensor`s in place of the weights (or
      `PreScaledWeight`s, a QTensor and the multiplier of its inputs), and the collection
      `scaling` where there are static scales.
      NNX: the same model, its weights replaced in place.
      With `return_report=True`, a pair of that and the `QuantizationReport`.

    Raises:
      ValueError: the model is not wrapped or its policy quantizes nothing; the variables belong to
        another model, are quantized already, or hold a NaN or an infinity (named by its path). Of
        `calibration`: it is empty, has a batch without rows or with a NaN, or makes one in a layer
        (batch, layer and operand are named), nothing needs it, or it is needed and missing; a
        `method` is unknown, ambiguous or not the policy's. Nothing is changed then.
      TypeError: `model` is not a Flax module, arguments are missing, or `calibration` or `observer`
        is something else.
      NotImplementedError: the model uses a kernel in a way that no stored weight can follow, such
        as a weight normalization of it, or a stack of layers along another axis than the first;
        or, with `calibration`, shares it between the steps of a scan or vmap.
      ImportError: `progress=True` without tqdm.

    Warns:
      UserWarning: weights were left in their source precision, see `return_report`.

    References:
      Xiao et al., SmoothQuant, 2022, https://arxiv.org/abs/2211.10438
      Lin et al., AWQ, 2023, https://arxiv.org/abs/2306.00978
      Frantar et al., GPTQ, 2022, https://arxiv.org/abs/2210.17323
    """
    adapter = wrapped_adapter_of(model)
    method, called = split_method(method, model)
    kwargs = kwargs if called is None else {**kwargs, "method": called}
    policies = policies_of(adapter.policy_of(model))
    asked = ask(policies, calibration, method, observer, progress, variables)
    quantized, report = adapter.quantize(asked, model, variables, *args, **kwargs)
    if not report.quantized:
        raise _nothing_to_quantize(report, type(model).__name__, adapter.policy_of(model))
    if return_report:
        return quantized, report
    if report.left:
        left = "".join(f"\n  {each.path}: {each.reason}" for each in report.left)
        warnings.warn(
            f"{len(report.left)} weights of {type(model).__name__} stay in their source precision "
            f"although their policy quantizes them:{left}\nmp.quantize(..., return_report=True) "
            "returns this list instead; a policy map can give these layers a float policy",
            stacklevel=2,
        )
    return quantized


def _nothing_to_quantize(report: QuantizationReport, model: str, policy: Any) -> ValueError:
    if any(each.quantization_mode is not None for each in policies_of(policy)):
        reasons = "".join(f"; {each.path}: {each.reason}" for each in report.left)
        return ValueError(
            f"nothing to quantize: the policy of {model}, {policy!r}, reaches no layer that can be "
            "quantized: a dense layer, an einsum, a convolution, an embedding or an attention "
            f"projection of Flax{reasons}"
        )
    return ValueError(
        f"nothing to quantize: the policy of {model}, {policy!r}, has no quantization mode. Wrap "
        "the model with one that has, such as 'int8_from_mixed_bfloat16'"
    )


def quantize_weight(weight: Any, stored: Stored, product: Product, path: str) -> mk.QTensor:
    """One float weight as its policy stores it.

    Args:
      weight: floating array; the leading axes that `product` does not see each get their scales,
        so a stack of layers [layers, K, N] keeps those of every layer.
      stored: how it is stored.
      product: how its layer multiplies it.
      path: the weight's name in messages.

    Raises:
      CannotStoreError: the weight cannot be cut as `stored` asks.
      ValueError: the weight is quantized already, or holds a NaN or an infinity.
    """
    check_weight(weight, path)
    if product.is_conv and stored.granularity not in ("tensor", "channel"):
        raise CannotStoreError(
            "the scales of a convolution are one, or one per output feature, not one per group"
        )
    axis, group_size = cut(stored, product.shape, product.contracting)
    return _stored(jnp.asarray(weight), stored.format, axis, group_size, stored.symmetric)


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _stored(weight: Any, format: str, axis: Any, group_size: Any, symmetric: bool) -> mk.QTensor:
    return mk.quantize(weight, format, axis=axis, group_size=group_size, symmetric=symmetric)


def check_weight(weight: Any, path: str) -> None:
    """Raises ValueError if a weight is stored already, or holds a NaN or an infinity.

    Of what a tracer holds nothing is known.
    """
    if is_stored(weight):
        raise ValueError(f"'{path}' is quantized already ({weight!r}): quantize the float weights")
    if isinstance(weight, Tracer):
        return
    bad = int(_non_finite(weight))
    if bad:
        raise ValueError(
            f"'{path}' has {bad} of {weight.size} values that are NaN or infinite; a weight "
            "like that cannot be quantized: restore it from a checkpoint before they appeared"
        )


@jax.jit
def _non_finite(weight: jax.Array) -> jax.Array:
    return jnp.sum(~jnp.isfinite(weight), dtype=jnp.int32)
