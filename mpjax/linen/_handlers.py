"""What each kind of Linen layer does under a policy, and the registry of handlers.

A handler is called in place of a layer's method:

    def handler(layer: Layer, call, args, kwargs):
        return call(*args, **kwargs)

where `call` is the layer's own method, its floating arguments cast to the compute dtype. The
default handler makes the layer read its parameters in the compute dtype, which is all that Dense,
Conv, Embed and a user's own layers need: Flax computes in the dtype in which its operands arrive.
"""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

import mpjax_kernels as mk

from .._adapters import is_half
from .._attention import PRODUCTS, QuantizedAttention, linen_attention
from .._cast import in_dtypes_of
from .._conv_product import QuantizedConv
from .._conv_transpose import QuantizedConvTranspose, multiplies_plainly, run_layer
from .._decisions import NONE, Decision, left
from .._einsum_product import QuantizedEinsum
from .._kv_cache import check_cache, refuse_own_attention
from .._products import QuantizedDotGeneral, Stateless
from .._promote import PromoteAroundKernel
from .._recipes import Recipe, attention_recipe_of, recipe_of
from .._stored_embedding import StoredEmbedding, observe_embedding
from ._kv_cache import REMEDY, Decoding
from ._layer import Layer, author_dtype, lent
from ._states import LayerKernel, LayerStates

Call = Callable[..., Any]
Handler = Callable[[Layer, Call, tuple[Any, ...], Mapping[str, Any]], Any]

_HANDLERS: dict[type, Handler] = {}


def register(*layer_types: type) -> Callable[[Handler], Handler]:
    """Registers a handler for Linen layer types and their subclasses.

    Args:
      *layer_types: subclasses of `flax.linen.Module`; a type registered again gets the new handler.

    Returns:
      A decorator that returns the handler unchanged.

    Raises:
      TypeError: one of them is not a Linen module class.
    """
    for layer_type in layer_types:
        if not (isinstance(layer_type, type) and issubclass(layer_type, nn.Module)):
            raise TypeError(
                f"`register` takes subclasses of flax.linen.Module, but got {layer_type!r}"
            )

    def decorate(handler: Handler) -> Handler:
        _HANDLERS.update(dict.fromkeys(layer_types, handler))
        return handler

    return decorate


def handler_of(module: nn.Module) -> Handler | None:
    """The handler of the nearest registered type among the module's bases, or None."""
    return next((_HANDLERS[cls] for cls in type(module).__mro__ if cls in _HANDLERS), None)


def default(layer: Layer, call: Call, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Runs the layer with its parameters read in the compute dtype."""
    with lent(layer.module, param=layer.param(), variable=layer.variable("params")):
        return call(*args, **kwargs)


def _left(
    decision: Decision, layer: Layer, call: Call, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Any:
    """`default`, in a program that says why, if the policy would have the layer quantized."""
    with (decision if layer.policy.quantization_mode is not None else NONE).scope():
        return default(layer, call, args, kwargs)


register(nn.PReLU)(default)


@register(nn.ConvLocal)
def _conv_local(layer: Layer, call: Call, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """A window of weights for each position: there is no 8-bit product for it."""
    return _left(left("refused"), layer, call, args, kwargs)


def product_fields(layer: Layer) -> dict[str, Any] | None:
    """The fields of the quantized product of a layer; None where it multiplies as it is."""
    recipe = recipe_of(layer.policy)
    if recipe is None:
        return None
    return _fields(layer, recipe) | {"path": layer.full_path, "kernel": LayerKernel(layer)}


def _fields(layer: Layer, recipe: Recipe, prefix: str = "") -> dict[str, Any]:
    return {
        "compute_dtype": layer.policy.compute_dtype,
        "formats": recipe.formats,
        "stored": recipe.stored,
        "profitable_on": recipe.profitable_on,
        "states": LayerStates(layer, recipe, prefix) if recipe.states else Stateless(),
    }


@register(nn.BatchNorm, nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.InstanceNorm)
def _norm(layer: Layer, call: Call, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Statistics, scale and bias stay float32, as Flax does given `dtype=`; the output does not."""
    with lent(
        layer.module, param=layer.param(keeps=("scale", "bias")), dtype=layer.policy.compute_dtype
    ):
        return call(*args, **kwargs)


@register(nn.Dense, nn.DenseGeneral)
def _dot(layer: Layer, call: Call, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    module: Any = layer.module
    author = module.dot_general is not None or module.dot_general_cls is not None
    fields = product_fields(layer)
    if fields is None or author:
        return _left(left("author"), layer, call, args, kwargs)
    return _with_product(layer, call, args, kwargs, dot_general=QuantizedDotGeneral(**fields))


@register(nn.Conv)
def _conv(layer: Layer, call: Call, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    module: Any = layer.module
    author = module.conv_general_dilated is not None or module.conv_general_dilated_cls is not None
    fields = product_fields(layer)
    if fields is None or author:
        return _left(left("author"), layer, call, args, kwargs)
    return _with_product(layer, call, args, kwargs, conv_general_dilated=QuantizedConv(**fields))


@register(nn.ConvTranspose)
def _conv_transpose(
    layer: Layer, call: Call, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Any:
    """Like `nn.Einsum` it has no door for another product."""
    fields = product_fields(layer)
    if fields is None or layer.method != "__call__" or not multiplies_plainly(layer.module):
        return _left(left("refused"), layer, call, args, kwargs)
    return _quantized_conv_transpose(layer, QuantizedConvTranspose(**fields), *args, **kwargs)


def _quantized_conv_transpose(layer: Layer, product: QuantizedConvTranspose, inputs: Any) -> Any:
    module: Any = layer.module
    window = (module.kernel_size,) if isinstance(module.kernel_size, int) else module.kernel_size
    features = (inputs.shape[-1], module.features)
    shape = (*window, *(features[::-1] if module.transpose_kernel else features))
    param = layer.param(keeps=("kernel",))
    kernel = param("kernel", module.kernel_init, shape, module.param_dtype)
    bias = None
    if module.use_bias:
        bias = param("bias", module.bias_init, (module.features,), module.param_dtype)
    promote = PromoteAroundKernel(layer.policy.compute_dtype, variadic=True)
    return run_layer(product, module, *promote(inputs, kernel, bias))


def _with_product(
    layer: Layer, call: Call, args: tuple[Any, ...], kwargs: Mapping[str, Any], **product: Any
) -> Any:
    """Runs the layer with a quantized product, and its kernel as it is stored."""
    with lent(
        layer.module,
        param=layer.param(keeps=("kernel",)),
        promote_dtype=PromoteAroundKernel(layer.policy.compute_dtype, variadic=True),
        **product,
    ):
        return call(*args, **kwargs)


@register(nn.Embed)
def _embed(layer: Layer, call: Call, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """A stored table is looked up, and attended to, as it is stored; a float one by Flax."""
    module: Any = layer.module
    recipe = recipe_of(layer.policy)
    if recipe is None or layer.method not in ("__call__", "attend"):
        return default(layer, call, args, kwargs)
    observe_embedding(layer.full_path, module.embedding.shape)
    if not isinstance(module.embedding, mk.QTensor):
        return _left(left("unquantized"), layer, call, args, kwargs)
    product = QuantizedDotGeneral(layer.policy.compute_dtype, recipe.formats, recipe.stored)
    stored = StoredEmbedding(product)
    run = stored.look_up if layer.method == "__call__" else stored.attend
    return run(module.embedding, *args, *kwargs.values())


@register(nn.Einsum)
def _einsum(layer: Layer, call: Call, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """`nn.Einsum` has no door for another einsum, so its few lines are written out here."""
    fields = product_fields(layer)
    if fields is None or layer.method != "__call__":
        return default(layer, call, args, kwargs)
    return _quantized_einsum(layer, QuantizedEinsum(**fields), *args, **kwargs)


def _quantized_einsum(
    layer: Layer, einsum: QuantizedEinsum, inputs: Any, einsum_str: str | None = None
) -> Any:
    module: Any = layer.module
    equation = nn.merge_param("einsum_str", module.einsum_str, einsum_str).replace(" ", "")
    param = layer.param(keeps=("kernel",))
    kernel = param("kernel", module.kernel_init, module.shape, module.param_dtype)
    inputs = jnp.asarray(inputs, layer.policy.compute_dtype)
    y = einsum(equation, inputs, kernel, preferred_element_type=module.preferred_element_type)
    if module.use_bias:
        shape, broadcast = module._get_bias_shape(equation, inputs, kernel)
        bias = param("bias", module.bias_init, shape, module.param_dtype)
        y += jnp.reshape(bias.astype(y.dtype), broadcast)
    return y


@register(nn.MultiHeadDotProductAttention)
def _attention(layer: Layer, call: Call, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The projections are layers of their own; this sees to the rest, the softmax and the cache."""
    module: Any = layer.module
    author = (
        module.attention_fn is not nn.dot_product_attention
        or module.qk_attn_weights_einsum_cls is not None
    )
    recipe = attention_recipe_of(layer.policy)
    attention = {}
    if not author and recipe is not None:
        scores, output = (QuantizedEinsum(**_fields(layer, recipe, f"{p}_")) for p in PRODUCTS)
        attention = {"attention_fn": QuantizedAttention(linen_attention, scores, output)}
    elif not author and (is_half(layer.policy) or layer.policy.quantization_mode is not None):
        attention = {"attention_fn": linen_attention}
    if module.decode and layer.method == "__call__":
        attention |= _decoding(layer, author, attention.get("attention_fn", linen_attention))
    variable = layer.variable("params", "cache")
    with lent(module, param=layer.param(), variable=variable, **attention):
        return call(*args, **kwargs)


def _decoding(layer: Layer, author: bool, attention: Any) -> dict[str, Any]:
    """What a layer that decodes is lent for a cache in 8 bits; nothing for one of floats."""
    module, name = layer.module, f"layer '{layer.full_path}'"
    if layer.policy.kv_cache is None:
        if module.has_variable("cache", "cached_key"):
            cached = module.get_variable("cache", "cached_key")
            check_cache(cached, layer.policy, name, REMEDY)
        return {}
    if author:
        refuse_own_attention(name, layer.policy)
    return {"decode": False, "attention_fn": Decoding(layer, attention)}


@register(nn.RNN)
def _rnn(layer: Layer, call: Call, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The carry that `nn.RNN` makes enters its scan in the compute dtype."""
    cell: Any = layer.module.cell  # pyright: ignore[reportAttributeAccessIssue]
    if author_dtype(cell) is not None:
        return default(layer, call, args, kwargs)
    own_initialize_carry = cell.initialize_carry

    def initialize_carry(*args: Any, **kwargs: Any) -> Any:
        return layer.cast(own_initialize_carry(*args, **kwargs))

    with lent(cell, initialize_carry=initialize_carry):
        return default(layer, call, args, kwargs)


@register(nn.RNNCellBase)
def _cell(layer: Layer, call: Call, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Under a user's own `nn.scan` the carry leaves in the dtype in which it came."""
    if layer.method != "__call__":
        return default(layer, call, args, kwargs)
    carry, output = default(layer, call, args, kwargs)
    came = kwargs["carry"] if "carry" in kwargs else args[0]
    return in_dtypes_of(carry, came), output
