"""What each kind of NNX layer is lent under a policy, and the registry of rules.

A rule is told a layer and its policy and returns the attributes to lend it:

    def rule(layer: nnx.Module, policy: DTypePolicy) -> dict[str, Any]: ...

Rule or none, floating arguments and the module's own parameters come in the compute dtype; `keeps`
names parameters that the layer wants as they are stored.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import lax

import mpjax_kernels as mk

from .._adapters import is_half
from .._attention import PRODUCTS, QuantizedAttention, nnx_attention
from .._cast import cast_array
from .._conv_product import QuantizedConv
from .._conv_transpose import QuantizedConvTranspose, multiplies_plainly, run_layer
from .._einsum_product import QuantizedEinsum
from .._policy import DTypePolicy
from .._products import QuantizedDotGeneral, Stateless
from .._promote import PromoteAroundKernel
from .._recipes import Recipe, attention_recipe_of, recipe_of
from .._stored_embedding import StoredEmbedding
from ._kv_cache import Call, InitCache
from ._states import KernelOfLayer, OfLayer

Attributes = Callable[[Any, DTypePolicy], dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Rule:
    """A registered function, and the names of parameters that are read as they are stored."""

    attributes: Attributes
    kept: frozenset[str]

    def keeps(self, lent: dict[str, Any]) -> frozenset[str]:
        """`kept`, and the kernel of a quantized product: it is quantized from its master copy."""
        quantized = any(isinstance(x, PromoteAroundKernel) for x in lent.values())
        return self.kept | {"kernel"} if quantized else self.kept


_RULES: dict[type, Rule] = {}


def register(*layer_types: type, keeps: Sequence[str] = ()) -> Callable[[Attributes], Attributes]:
    """Registers a rule for NNX layer types and their subclasses.

    Args:
      *layer_types: subclasses of `flax.nnx.Module`; a type registered again gets the new rule.
      keeps: names of parameters that the layer reads in their own dtype, not in the compute dtype.

    Returns:
      A decorator that returns the rule unchanged.

    Raises:
      TypeError: one of them is not an NNX module class.
    """
    for layer_type in layer_types:
        if not (isinstance(layer_type, type) and issubclass(layer_type, nnx.Module)):
            raise TypeError(
                f"`register` takes subclasses of flax.nnx.Module, but got {layer_type!r}"
            )

    def decorate(attributes: Attributes) -> Attributes:
        rule = Rule(attributes, frozenset(keeps))
        _RULES.update(dict.fromkeys(layer_types, rule))
        return attributes

    return decorate


def rule_of(base: type) -> Rule | None:
    """The rule of the nearest registered type among the bases of a module class, or None."""
    return next((_RULES[cls] for cls in base.__mro__ if cls in _RULES), None)


def computes_in(layer: nnx.Module, policy: DTypePolicy) -> dict[str, Any]:
    """The rule of layers that cast their input and parameters to `dtype` themselves."""
    del layer
    return {"dtype": jnp.dtype(policy.compute_dtype)}


@register(nnx.Embed)
def _embed(layer: Any, policy: DTypePolicy) -> dict[str, Any]:
    """A stored table is looked up, and attended to, as it is stored; a float one by Flax."""
    recipe, lent = recipe_of(policy), computes_in(layer, policy)
    if recipe is None:
        return lent
    product = QuantizedDotGeneral(policy.compute_dtype, recipe.formats, recipe.stored)
    stored, base = StoredEmbedding(product), type(layer)
    own = {"__call__": nnx.Embed.__call__, "attend": nnx.Embed.attend}
    methods = {name: _EmbedMethod(name, stored) for name in own if getattr(base, name) is own[name]}
    return lent | methods


@dataclasses.dataclass(frozen=True)
class _EmbedMethod:
    """A method of `nnx.Embed`, for a table that may be stored."""

    name: str
    stored: StoredEmbedding

    def __call__(self, layer: Any, x: Any, **kwargs: Any) -> Any:
        table = layer.embedding[...]
        if not isinstance(table, mk.QTensor):
            return getattr(nnx.Embed, self.name)(layer, x, **kwargs)
        if self.name == "__call__":
            return self.stored.look_up(table, x, **kwargs)
        return self.stored.attend(table, x, **kwargs)


def product_of(kind: Any, policy: DTypePolicy) -> Any:
    """The quantized product of a policy's layers, of one of the classes in `_products`, or None."""
    recipe = recipe_of(policy)
    if recipe is None:
        return None
    return _product(kind, policy, recipe, kernel=KernelOfLayer())


def _product(
    kind: Any, policy: DTypePolicy, recipe: Recipe, prefix: str = "", kernel: Any = None
) -> Any:
    states = OfLayer(prefix) if recipe.states else Stateless()
    return kind(
        policy.compute_dtype,
        recipe.formats,
        recipe.stored,
        states,
        kernel=kernel,
        profitable_on=recipe.profitable_on,
    )


def _with_product(attribute: str, product: Any, policy: DTypePolicy) -> dict[str, Any]:
    if product is None:
        return {}
    promote = PromoteAroundKernel(policy.compute_dtype, variadic=False)
    return {"promote_dtype": promote, attribute: product}


@register(nnx.Linear, nnx.LinearGeneral)
def _dot(layer: Any, policy: DTypePolicy) -> dict[str, Any]:
    author = layer.dot_general not in (None, lax.dot_general) or (
        getattr(layer, "dot_general_cls", None) is not None
    )
    product = None if author else product_of(QuantizedDotGeneral, policy)
    return _with_product("dot_general", product, policy)


@register(nnx.Einsum)
def _einsum(layer: Any, policy: DTypePolicy) -> dict[str, Any]:
    author = layer.einsum_op is not jnp.einsum
    product = None if author else product_of(QuantizedEinsum, policy)
    return _with_product("einsum_op", product, policy)


@register(nnx.Conv)
def _conv(layer: Any, policy: DTypePolicy) -> dict[str, Any]:
    author = layer.conv_general_dilated is not lax.conv_general_dilated
    product = None if author else product_of(QuantizedConv, policy)
    return _with_product("conv_general_dilated", product, policy)


@register(nnx.ConvTranspose)
def _conv_transpose(layer: Any, policy: DTypePolicy) -> dict[str, Any]:
    """It has no door for another product, so the product is lent a name of its own."""
    own = type(layer).__call__ is nnx.ConvTranspose.__call__ and multiplies_plainly(layer)
    product = product_of(QuantizedConvTranspose, policy) if own else None
    lent = _with_product("conv_transpose", product, policy)
    return lent | {"__call__": _call_conv_transpose} if lent else {}


def _call_conv_transpose(layer: Any, inputs: Any) -> Any:
    bias = None if layer.bias is None else layer.bias[...]
    arrays = layer.promote_dtype((inputs, layer.kernel[...], bias))
    return run_layer(layer.conv_transpose, layer, *arrays)


NORMS = (nnx.BatchNorm, nnx.LayerNorm, nnx.RMSNorm, nnx.GroupNorm, nnx.InstanceNorm)


@register(*NORMS, keeps=("scale", "bias"))
def _norm(layer: nnx.Module, policy: DTypePolicy) -> dict[str, Any]:
    """Statistics, scale, bias and running averages stay float32; the input and output do not.

    Flax's own `promote_dtype` would round the running averages to the compute dtype.
    """
    return computes_in(layer, policy) | {"promote_dtype": promote_input}


def promote_input(arrays: tuple[Any, ...], *, dtype: Any = None, **_: Any) -> tuple[Any, ...]:
    """A norm's `promote_dtype`: casts the input, the first of the arrays, and nothing else."""
    return (cast_array(arrays[0], dtype), *arrays[1:])


@register(nnx.MultiHeadAttention)
def _attention(layer: Any, policy: DTypePolicy) -> dict[str, Any]:
    """The projections are layers of their own; this one sees to the rest, and the softmax."""
    recipe = attention_recipe_of(policy)
    is_flax = layer.attention_fn is nnx.dot_product_attention
    lent: dict[str, Any] = {"__call__": Call(type(layer), policy, is_flax)}
    if policy.kv_cache is not None:
        lent["init_cache"] = InitCache(policy)
    if is_flax and recipe is not None:
        scores, output = (_product(QuantizedEinsum, policy, recipe, f"{p}_") for p in PRODUCTS)
        lent["attention_fn"] = QuantizedAttention(nnx_attention, scores, output)
    elif is_flax and (is_half(policy) or policy.quantization_mode is not None):
        lent["attention_fn"] = nnx_attention
    return lent


@register(nnx.RNNCellBase)
def _cell(layer: nnx.Module, policy: DTypePolicy) -> dict[str, Any]:
    """Once built, a cell uses `param_dtype` for one thing, `initialize_carry`."""
    del layer
    return {"param_dtype": jnp.dtype(policy.compute_dtype)}
