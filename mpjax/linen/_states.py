"""The scaling states of a Linen layer: variables of the collection `scaling`, beside `params`.

    variables["scaling"]["encoder"]["Dense_0"]["kernel"]    a `ScalingState`

A forward pass reads them. It writes what it observed, and nothing else, if the caller made the
collection mutable; an update is the training loop's.
"""

from collections.abc import Mapping
from typing import Any

import jax

from .._observed import ObservedScaling, ObservedWeight
from .._recipes import Recipe
from .._scaling import ScalingState, init_state, observe
from ._layer import Layer

COLLECTION = "scaling"


class LayerStates:
    """`mpjax._products.States` of a bound layer, or of one of its products by a prefix."""

    def __init__(self, layer: Layer, recipe: Recipe, prefix: str = ""):
        self._layer, self._recipe, self._prefix = layer, recipe, prefix
        self._variables: dict[str, Any] = {}

    def read(self) -> Mapping[str, ScalingState]:
        """The states; declares them where the collection may change."""
        if not self._variables:
            self._variables = {
                name: self._declare(name, recipe, format)
                for name, recipe, format in self._recipe.states
            }
        return {name: variable.value for name, variable in self._variables.items()}

    def observe(self, amaxes: Mapping[str, jax.Array]) -> None:
        """Merges amaxes into the variables, if their collection is mutable."""
        module = self._layer.module
        if not module.is_mutable_collection(COLLECTION) or module.is_initializing():
            return
        for name, amax in amaxes.items():
            variable = self._variables[name]
            variable.value = observe(variable.value, jax.lax.stop_gradient(amax))

    def write(self, states: Mapping[str, ObservedScaling]) -> None:
        """Replaces states, while batches run for calibration."""
        for name, state in states.items():
            self._variables[name].value = state

    def _declare(self, name: str, recipe: Any, format: str) -> Any:
        module, full_name = self._layer.module, self._prefix + name
        if not module.has_variable(COLLECTION, full_name):
            self._require_mutable()

        def init() -> ScalingState:
            return init_state(recipe, format, of_gradient=name == "output_grad")

        variable = type(module).variable(module, COLLECTION, full_name, init)
        self._check(full_name, variable.value, recipe, format)
        return variable

    def _require_mutable(self) -> None:
        module, path = self._layer.module, self._layer.full_path
        if module.is_mutable_collection(COLLECTION):
            return
        scaling = self._layer.policy.name
        if module.is_initializing():
            raise ValueError(
                f"layer '{path}' keeps scaling state ({scaling}), but its collection 'scaling' is "
                "not lifted: add it to the nn.scan or nn.vmap around the layer, "
                "variable_axes={'params': 0, 'scaling': 0} for layers with parameters of their "
                "own, variable_broadcast=('params', 'scaling') for shared ones (nn.vmap: "
                "variable_axes={'params': None, 'scaling': None}). Or train with current scaling, "
                "which keeps no state: scaling='current'"
            )
        raise ValueError(
            f"layer '{path}' keeps scaling state ({scaling}), but the variables have none for it: "
            "pass all that `init` returned, {'params': ..., 'scaling': ...}. Where nn.scan or "
            "nn.vmap lift 'params', lift the collection 'scaling' too. For weights that were "
            "trained without, mp.init_scaling(model, variables, x) adds it, and "
            "mp.quantize(model, variables, calibration=batches) static scales"
        )

    def _check(self, name: str, state: Any, recipe: Any, format: str) -> None:
        is_state = isinstance(state, ScalingState | ObservedScaling)
        known = (state.recipe, state.format) if is_state else None
        if known != (recipe, format):
            raise ValueError(
                f"the scaling state of '{self._layer.full_path}/{name}' was made for {known}, but "
                f"the policy of the layer asks for {(recipe, format)}: make a new one with "
                "mp.init_scaling(model, {'params': ...}, x)"
            )


class LayerKernel:
    """`mpjax._products.Kernel` of a bound layer."""

    def __init__(self, layer: Layer):
        self._module = layer.module

    def write(self, weight: ObservedWeight) -> None:
        """Replaces the parameter; `params` is mutable while batches run for calibration."""
        self._module.put_variable("params", "kernel", weight)
