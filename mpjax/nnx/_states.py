"""The scaling states of NNX layers: variables of their own type, in an attribute of the layer.

    model.encoder.scaling["kernel"]    a `Scaling` variable that holds a `ScalingState`

`wrap` puts them there, under policies that keep state, and `unwrap` takes them away. Being no
`nnx.Param`, they are no business of an optimizer, and a call of the model only reads them.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
from flax import errors, nnx

from .._attention import QuantizedAttention
from .._observed import ObservedScaling, ObservedWeight
from .._recipes import OPERANDS, Recipe
from .._scaling import ScalingState, init_state

ATTRIBUTE, LOSS_SCALE = "scaling", "loss_scale"


class Scaling(nnx.Variable[ScalingState]):
    """A variable that holds the `ScalingState` of one operand of a layer."""


class LossScale(nnx.Variable):
    """A variable that holds the `LossScaleState` of a model in training."""


@dataclasses.dataclass(frozen=True)
class OfLayer:
    """Stands for the states of whichever layer the product is lent to.

    Attributes:
      prefix: of the names of the states, where a layer has several products.
    """

    prefix: str = ""

    def read(self) -> Mapping[str, ScalingState]:
        """Never called: the layer binds the product to its own states first."""
        raise TypeError("a product that keeps states was called without its layer")

    def observe(self, amaxes: Mapping[str, jax.Array]) -> None:
        """Never called, as `read`."""
        raise TypeError("a product that keeps states was called without its layer")

    def write(self, states: Mapping[str, ObservedScaling]) -> None:
        """Never called, as `read`."""
        raise TypeError("a product that keeps states was called without its layer")


@dataclasses.dataclass(frozen=True)
class KernelOfLayer:
    """Stands for the kernel of whichever layer the product is lent to."""

    def write(self, weight: ObservedWeight) -> None:
        """Never called: the layer binds the product to its own kernel first."""
        raise TypeError("a product was called without its layer")


class LayerKernel:
    """`mpjax._products.Kernel` of one layer."""

    def __init__(self, layer: Any):
        self._layer = layer

    def write(self, weight: ObservedWeight) -> None:
        """Replaces the value of the parameter, of a copy of the model that batches run through."""
        vars(self._layer)["kernel"].set_value(weight)


class LayerStates:
    """`mpjax._products.States` of one layer, which a call never changes."""

    def __init__(self, layer: Any, prefix: str):
        self._layer, self._prefix = layer, prefix

    def read(self) -> Mapping[str, ScalingState]:
        """The states."""
        variables = vars(self._layer)[ATTRIBUTE]
        own = [name for name in OPERANDS if self._prefix + name in variables]
        return {name: variables[self._prefix + name].get_value() for name in own}

    def observe(self, amaxes: Mapping[str, jax.Array]) -> None:
        """Amaxes leave by `mpjax.nnx.value_and_grad` only."""

    def write(self, states: Mapping[str, ObservedScaling]) -> None:
        """Replaces states, of a copy of the model that batches run through."""
        for name, state in states.items():
            vars(self._layer)[ATTRIBUTE][self._prefix + name].set_value(state)


def bound(product: Any, layer: Any) -> Any:
    """A product, or attention with such, with the states and the kernel of the layer."""
    if isinstance(product, QuantizedAttention):
        scores, output = bound(product.scores_einsum, layer), bound(product.output_einsum, layer)
        return QuantizedAttention(product.attention, scores, output)
    states, kernel = getattr(product, "states", None), getattr(product, "kernel", None)
    if isinstance(states, OfLayer):
        product = dataclasses.replace(product, states=LayerStates(layer, states.prefix))
    if isinstance(kernel, KernelOfLayer):
        product = dataclasses.replace(product, kernel=LayerKernel(layer))
    return product


def prefixes_of(value: Any) -> list[str]:
    """The prefixes of the states that a lent value needs."""
    if isinstance(value, QuantizedAttention):
        return [*prefixes_of(value.scores_einsum), *prefixes_of(value.output_einsum)]
    states = getattr(value, "states", None)
    return [states.prefix] if isinstance(states, OfLayer) else []


def attach(layer: Any, recipe: Recipe, prefixes: Sequence[str]) -> None:
    """Gives a layer the states of a recipe; those that it has of that recipe stay."""
    known = vars(layer).get(ATTRIBUTE, {})
    states, layers = {}, stacked_axes(layer)
    for prefix in prefixes:
        for name, how, format in recipe.states:
            state = init_state(how, format, of_gradient=name == "output_grad", layers=layers)
            full_name = prefix + name
            old = known[full_name] if full_name in known else None
            same = old is not None and _structure(old.get_value()) == _structure(state)
            states[full_name] = old if same else Scaling(state)
    setattr(layer, ATTRIBUTE, nnx.Dict(states))


@contextlib.contextmanager
def outside_of_traces(name: str) -> Iterator[None]:
    """Explains Flax' refusal to change a module within a trace that it comes into from outside."""
    try:
        yield
    except errors.TraceContextError as error:
        error.add_note(
            f"{name} changes an NNX model in place, and this one was made outside of the function "
            f"that JAX is tracing: call {name} before that function"
        )
        raise


def detach(layer: Any) -> None:
    """Takes the states of a layer away."""
    if has_states(layer):
        delattr(layer, ATTRIBUTE)


def has_states(layer: Any) -> bool:
    """Whether `attach` gave this layer states."""
    container = vars(layer).get(ATTRIBUTE)
    return isinstance(container, nnx.Dict) and all(
        isinstance(x, Scaling) for x in container.values()
    )


def _structure(state: Any) -> Any:
    return jax.tree.structure(state), [x.shape for x in jax.tree.leaves(state)]


def stacked_axes(layer: Any) -> tuple[int, ...]:
    """The leading axes of a stack of layers that `nnx.vmap` made."""
    if isinstance(layer, nnx.MultiHeadAttention):
        return stacked_axes(layer.query)
    if isinstance(layer, nnx.Linear):
        own = 2
    elif isinstance(layer, nnx.LinearGeneral):
        own = len(layer.in_features) + len(layer.out_features) + len(layer.batch_axis)
    elif isinstance(layer, nnx.Einsum):
        own = len(layer.kernel_shape)
    else:
        own = len(layer.kernel_size) + 2
    shape = layer.kernel.get_raw_value().shape
    return tuple(shape[: len(shape) - own])
