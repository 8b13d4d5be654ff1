"""`quantize`: float weights in, weights of 8 or 4 bits out, for the same wrapped model."""

import collections
import dataclasses
import functools
import warnings
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.sharding import NamedSharding

import mpjax_kernels as mk

from ._calibration_request import ask, split_method
from ._checkpoint_leaves import committed
from ._context import Product
from ._lazy_array import LazyArray, in_memory
from ._observers import Observer
from ._placement import shardings_of_parts
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
    donate: bool = False,
    prepack: bool = False,
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
        w4a8/128            int4, per 128 inputs            int8, per row, at every call
        float8              E4M3, per tensor                E4M3, by the scale in `scaling`
        float8_current      E4M3, per tensor                E4M3, per tensor, at every call
        float8/row          E4M3, per output channel        E4M3, per row, at every call
        float8/128x128      E4M3, per block of 128 x 128    E4M3, per 128 of a row, at every call
        gptq/4/128          as int4/128, by GPTQ            in the compute dtype
        awq/4/128           as int4/128, by AWQ             in the compute dtype

    (`int8_delayed` as `int8_static`.) The wrapped model applies the result. int8 products
    accumulate in int32, float8 in float32. No float copy of a quantized weight is kept.

    Weights are quantized one after the other, so that beside the float weights and the result
    memory holds one layer. Less is needed where the floats go as they are quantized: they are
    donated (float weights plus one layer), or still on disk (quantized weights plus one layer):

        qvars = mp.quantize(model, {"params": mp.open_weights("model.safetensors")}, x)

        model = mp.wrap(nnx.eval_shape(lambda: Net(nnx.Rngs(0))), policy)     # NNX, without values
        mp.quantize(model, mp.open_weights("model.safetensors"))

    `jax.eval_shape(lambda v: mp.quantize(model, v, x), variables)` gives the shapes of the result.

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
      variables: Linen: the variables to quantize, `{"params": ..., ...}`, as `apply` takes them;
        leaves may be `LazyArray`s of `mpjax.open_weights`. NNX: nothing, the model holds its
        weights; or nested dicts of those to give it, by path, lazy ones too: all that it has not.
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
      donate: whether the buffers of float weights are deleted as soon as they are quantized (all
        are checked first), whoever else holds them: `variables` cannot be used any more, and an NNX
        model that is stopped half-way (Ctrl-C, no memory) stays half quantized. NumPy arrays and
        what is traced stay.
      prepack: whether int8 weights that are multiplied by int8 are stored as the native kernels of
        this machine's CPU read them (`mpjax_kernels.prepacked`), which saves most where calls have
        few rows. Results are the same. `mpjax.load`, on a machine that does not read them, and
        `mpjax.export` put them in order. Other weights, those of convolutions, tables of embeddings
        and what is split over devices stay as they are, as does everything on GPUs and TPUs: the
        report says of each weight whether it is prepacked, or why not.
      **kwargs: Linen: keyword arguments of the call (`train=False`, `method=`, `rngs=`, ...). NNX:
        `rows=`, how many rows (tokens) of input a call has, by which a model that was wrapped with
        `when="profitable"` judges its layers, as a Linen model does by `x`; left out: very many.

    Returns:
      Linen: new variables of the same structure, with `QTensor`s in place of the weights.
      NNX: the same model, its weights replaced in place, all of them once the last is quantized:
        whatever stops it before that, Ctrl-C too, leaves the model as it was (see `donate`).
      With `return_report=True`, a pair of that and the `QuantizationReport`.

    Raises:
      ValueError: the model is not wrapped or its policy quantizes nothing; the variables belong to
        another model, are quantized already, or hold a NaN or an infinity (named by its path); an
        opened file lacks a weight, or has one that the model has not. Of `calibration`: it is
        empty, has a batch without rows or with a NaN, or makes one in a layer (batch, layer and
        operand are named), nothing needs it, or it is needed and missing; a `method` is unknown,
        ambiguous or not the policy's. `rows` is no number of rows; or a Linen call has none, where
        the model was wrapped with `when="profitable"`. Nothing is changed then.
      ModelFileError: a file of weights is damaged, or has changed since it was opened.
      TypeError: `model` is not a Flax module, arguments are missing, or `calibration` or `observer`
        is something else.
      NotImplementedError: the model uses a kernel in a way that no stored weight can follow, such
        as a weight normalization of it, or a stack of layers along another axis than the first;
        or, with `calibration`, shares it between the steps of a scan or vmap.
      ImportError: `progress=True` without tqdm.

    Warns:
      UserWarning: weights were left in their source precision, or `prepack` changed none, see
        `return_report`.

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
    quantized, report = adapter.quantize(
        asked, model, variables, *args, donate=donate, prepack=prepack, **kwargs
    )
    if not report.quantized and not any(is_profitable_only(each) for each in policies):
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
    if prepack and report.quantized and not report.prepacked:
        warnings.warn(
            f"prepack=True found no weight of {type(model).__name__} to prepack, which computes "
            f"the same without: {report.why_none_prepacked}",
            stacklevel=2,
        )
    return quantized


def is_profitable_only(policy: Any) -> bool:
    """Whether a policy may leave every layer as it is."""
    return getattr(policy, "profitable_on", None) is not None


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
      weight: floating array, also a lazy one; the leading axes that `product` does not see each
        get their scales, so a stack of layers [layers, K, N] keeps those of every layer.
      stored: how it is stored.
      product: how its layer multiplies it.
      path: the weight's name in messages.

    Raises:
      CannotStoreError: the weight cannot be cut as `stored` asks.
      ValueError: the weight is quantized already, or holds a NaN or an infinity.
    """
    axis, group_size = check_storable(weight, stored, product, path)
    if isinstance(weight, jax.ShapeDtypeStruct):
        raise ValueError(
            f"'{path}' has no values ({weight}): give weights, such as mp.open_weights(path), or "
            "trace mp.quantize by jax.eval_shape"
        )
    array = jnp.asarray(in_memory(weight))
    check_finite(array, path)
    q = _stored(array, stored.format, axis, group_size, stored.symmetric)
    # Waited for, so that no two layers are in memory at once.
    return jax.block_until_ready(_placed_like(array, q, path))


def check_storable(
    weight: Any, stored: Stored, product: Product, path: str
) -> tuple[tuple[int, ...], tuple[int, ...] | None]:
    """The axes that share a scale and their group sizes; raises as `quantize_weight` of shapes."""
    if is_stored(weight):
        raise ValueError(f"'{path}' is quantized already ({weight!r}): quantize the float weights")
    if product.is_conv and stored.granularity not in ("tensor", "channel"):
        raise CannotStoreError(
            "the scales of a convolution are one, or one per output feature, not one per group"
        )
    return cut(stored, product.shape, product.contracting)


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _stored(weight: Any, format: str, axis: Any, group_size: Any, symmetric: bool) -> mk.QTensor:
    return mk.quantize(weight, format, axis=axis, group_size=group_size, symmetric=symmetric)


def _placed_like(weight: jax.Array, q: mk.QTensor, path: str) -> mk.QTensor:
    """The stored weight where the float one is: the values cut as it, the scales where they can."""
    sharding = None if isinstance(weight, Tracer) else committed(weight)
    if not isinstance(sharding, NamedSharding):
        return q
    names = [name for name in ("values", "scale", "zero_point") if getattr(q, name) is not None]
    parts = {name: getattr(q, name) for name in names}
    places = shardings_of_parts(sharding, q, parts, path)
    return dataclasses.replace(q, **{n: jax.device_put(x, places[n]) for n, x in parts.items()})


def check_finite(weight: Any, path: str) -> None:
    """Raises ValueError if a float weight that is in memory holds a NaN or an infinity."""
    if isinstance(weight, LazyArray | Tracer | jax.ShapeDtypeStruct) or is_stored(weight):
        return
    with jax.ensure_compile_time_eval():  # values are there, also while a function is traced
        if jnp.isfinite(_nan_of(jnp.asarray(weight))):
            return
        bad = int(_non_finite(jnp.asarray(weight)))
    raise ValueError(
        f"'{path}' has {bad} of {weight.size} values that are NaN or infinite; a weight "
        "like that cannot be quantized: restore it from a checkpoint before they appeared"
    )


def check_donated(weights: Mapping[str, Any], tree: Any) -> None:
    """Raises ValueError if a weight by path that is to be freed has another place in a tree."""
    places = collections.Counter(id(leaf) for leaf in jax.tree.leaves(tree))
    for path, weight in weights.items():
        if places[id(weight)] > 1:
            raise ValueError(
                f"`donate` is True, but the array at '{path}' is in the model more than once, so "
                "freeing it would take it from the others: leave `donate` out, or copy the array"
            )


def release(weight: Any) -> None:
    """Frees a float weight that was donated."""
    if isinstance(weight, jax.Array) and not isinstance(weight, Tracer):
        weight.delete()


@jax.jit
def _nan_of(weight: jax.Array) -> jax.Array:
    """0, or NaN if an entry is not finite; in one pass that keeps nothing."""
    return jnp.sum(weight - weight, dtype=jnp.float32)


@jax.jit
def _non_finite(weight: jax.Array) -> jax.Array:
    return jnp.sum(~jnp.isfinite(weight), dtype=jnp.int32)
