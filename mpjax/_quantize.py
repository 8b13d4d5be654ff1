"""`quantize`: float weights in, int8 weights out, for the same wrapped model."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

import mpjax_kernels as mk

from ._quantized_policy import QuantizedDTypePolicy
from ._wrap import policies_of, wrapped_adapter_of


def quantize(model: Any, variables: Any = None, *args: Any, **kwargs: Any) -> Any:
    """Turns the weights of a wrapped model's quantized layers into int8.

    The kernel of every Dense, DenseGeneral, Einsum and attention projection whose policy is
    quantized becomes a `mpjax_kernels.QTensor` with one float32 scale per output channel,

        scale = max |w| over the contracting axes / 127,    values = round(w / scale)

    and every other weight stays what it is. The wrapped model applies the result: activations are
    quantized per row at each call, products accumulate in int32. No float copy of a quantized
    weight is kept.

    Args:
      model: a wrapped Linen or NNX module, under a policy such as `"int8_from_mixed_bfloat16"`.
      variables: Linen: the variables to quantize, `{"params": ..., ...}`, as `apply` takes them.
        NNX: nothing, the model holds its weights.
      *args: Linen: the arguments of one call, `x`. Arrays may be `jax.ShapeDtypeStruct`s: the call
        is traced to meet the layers, never run. NNX: nothing.
      **kwargs: Linen: keyword arguments of the call (`train=False`, `method=`, `rngs=`, ...).

    Returns:
      Linen: new variables of the same structure, with `QTensor`s in place of the kernels.
      NNX: the same model, its kernels replaced in place.

    Raises:
      ValueError: the model is not wrapped or its policy quantizes nothing; the variables belong to
        another model, are quantized already, or hold a NaN or an infinity (named by its path).
      TypeError: `model` is not a Flax module, or arguments are missing.
      NotImplementedError: a policy has another mode than `"int8"`, or the model uses a kernel in a
        way that int8 cannot follow, such as a weight normalization of it, or a stack of layers
        along another axis than the first.
    """
    adapter = wrapped_adapter_of(model)
    for policy in policies_of(adapter.policy_of(model)):
        if isinstance(policy, QuantizedDTypePolicy) and policy.mode != "int8":
            raise NotImplementedError(
                f"weights are stored in int8 only so far, but a policy of {type(model).__name__} "
                f"is {policy!r}: it trains (weights are quantized at every call). Wrap the model "
                "with 'int8_from_mixed_bfloat16' to store them"
            )
    return adapter.quantize(model, variables, *args, **kwargs)


def nothing_to_quantize(model: str, policy: Any) -> ValueError:
    """The error for a model in which no layer is both quantizable and under a quantized policy."""
    if any(each.quantization_mode is not None for each in policies_of(policy)):
        return ValueError(
            f"nothing to quantize: the policy of {model}, {policy!r}, reaches no layer that can be "
            "quantized: a dense layer, an einsum or an attention projection of Flax"
        )
    return ValueError(
        f"nothing to quantize: the policy of {model}, {policy!r}, has no quantization mode. Wrap "
        "the model with one that has, such as 'int8_from_mixed_bfloat16'"
    )


def quantize_weight(weight: Any, contracting: tuple[int, ...], path: str) -> mk.QTensor:
    """One float weight as int8, a scale per output channel.

    Args:
      weight: floating array; leading axes that are not among `contracting` each get their scales,
        so a stack of layers [layers, K, N] keeps one scale per layer and channel.
      contracting: axes that the product sums over, counted from the end (negative).
      path: the weight's name in messages.

    Raises:
      ValueError: the weight is quantized already, or holds a NaN or an infinity.
    """
    if isinstance(weight, mk.QTensor):
        raise ValueError(f"'{path}' is quantized already ({weight!r}): quantize the float weights")
    if not isinstance(weight, Tracer | jax.ShapeDtypeStruct):
        finite = jnp.isfinite(weight)
        if not bool(finite.all()):
            bad = int(weight.size - finite.sum())
            raise ValueError(
                f"'{path}' has {bad} of {weight.size} values that are NaN or infinite; a weight "
                "like that cannot be quantized: restore it from a checkpoint before they appeared"
            )
    return mk.quantize(jnp.asarray(weight), "int8", axis=contracting)
