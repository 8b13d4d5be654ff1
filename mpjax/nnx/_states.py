"""The scaling states of NNX layers: variables of their own type, in an attribute of the layer.

    model.encoder.scaling["kernel"]    a `Scaling` variable that holds a `ScalingState`

`wrap` puts them there, under policies that keep state, and `unwrap` takes them away. Being no
`nnx.Param`, they are no business of an optimizer, and a call of the model only reads them.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx

from .._recipes import Recipe
from .._scaling import ScalingState, init_state

ATTRIBUTE, LOSS_SCALE = "scaling", "loss_scale"


class Scaling(nnx.Variable[ScalingState]):
    """A variable that holds the `ScalingState` of one operand of a layer."""


class LossScale(nnx.Variable):
    """A variable that holds the `LossScaleState` of a model in training."""


@dataclasses.dataclass(frozen=True)
class OfLayer:
    """Stands for the states of whichever layer the product is lent to."""

    def read(self) -> Mapping[str, ScalingState]:
        """Never called: the layer binds the product to its own states first."""
        raise TypeError("a product that keeps states was called without its layer")

    def observe(self, amaxes: Mapping[str, jax.Array]) -> None:
        """Never called, as `read`."""
        raise TypeError("a product that keeps states was called without its layer")


class LayerStates:
    """`mpjax._products.States` of one layer, which a call never changes."""

    def __init__(self, layer: Any):
        self._layer = layer

    def read(self) -> Mapping[str, ScalingState]:
        """The states."""
        variables = vars(self._layer)[ATTRIBUTE]
        return {name: variable.get_value() for name, variable in variables.items()}

    def observe(self, amaxes: Mapping[str, jax.Array]) -> None:
        """Amaxes leave by `mpjax.nnx.value_and_grad` only."""


def bound(product: Any, layer: Any) -> Any:
    """A product that keeps states, with those of the layer; anything else as it is."""
    if isinstance(getattr(product, "states", None), OfLayer):
        return dataclasses.replace(product, states=LayerStates(layer))
    return product


def attach(layer: Any, recipe: Recipe, layers: tuple[int, ...]) -> None:
    """Gives a layer the states of a recipe; those that it has of that recipe stay."""
    known = vars(layer).get(ATTRIBUTE, {})
    states = {}
    for name, how, format in recipe.states:
        state = init_state(how, format, of_gradient=name == "output_grad", layers=layers)
        same = name in known and _structure(known[name].get_value()) == _structure(state)
        states[name] = known[name] if same else Scaling(state)
    setattr(layer, ATTRIBUTE, nnx.Dict(states))


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
