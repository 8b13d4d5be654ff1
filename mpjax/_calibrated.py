"""What the batches of a calibration told: of each weight's inputs, and of each scaling state."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

import mpjax_kernels as mk

from ._calibrated_weight import Plain, calibrated_weight, smoothed_amax
from ._calibration import WeightPlan
from ._observed import ObservedScaling, ObservedWeight, stacked
from ._observers import Observer
from ._prescaled import PreScaledWeight
from ._quantization_report import PLAIN, Rounding
from ._scaling import ScalingState, init_state, observe, update


@dataclasses.dataclass(frozen=True)
class Watch:
    """What is to be observed of a model.

    Attributes:
      plans: of the weights, by path.
      scaling: the states whose scales are sought, by path.
      observer: what they are made from.
    """

    plans: Mapping[str, WeightPlan]
    scaling: Mapping[str, ScalingState]
    observer: Observer

    def start(self) -> dict[str, Any]:
        """The states of all statistics and observers before the first batch, by path."""
        states: dict[str, Any] = {
            path: {
                name: stacked(each.init(plan.view.inputs), plan.view.layers)
                for name, each in plan.statistics
            }
            for path, plan in self.plans.items()
            if plan.statistics
        }
        for path, state in self.scaling.items():
            states[path] = stacked(self.observer.init(), state.scale.shape)
        return states

    def weight(self, path: str, weight: Any, states: Mapping[str, Any]) -> Any:
        """What stands in for a weight: itself, if nothing is asked of its inputs."""
        if path not in states:
            return weight
        return ObservedWeight(weight, states[path], self.plans[path].statistics, path)

    def state(self, path: str, states: Mapping[str, Any]) -> ObservedScaling:
        """What stands in for a scaling state."""
        return ObservedScaling(self.scaling[path], states[path], self.observer, path)


def needs_scale(name: str) -> bool:
    """Whether inference uses the scale of a state: of an input, and of any operand in attention."""
    return name.endswith("input") or name.endswith("_kernel")


def states_after(leaf: ObservedWeight | ObservedScaling) -> Any:
    """What `Watch.start` has under the path of what stood in for a leaf."""
    return leaf.states if isinstance(leaf, ObservedWeight) else leaf.observed


def is_observed(leaf: Any) -> bool:
    """Whether a leaf stands in for another."""
    return isinstance(leaf, ObservedWeight | ObservedScaling)


@dataclasses.dataclass(frozen=True)
class Calibrated:
    """What was observed.

    Attributes:
      watch: what was to be.
      states: of statistics and observers, by path.
    """

    watch: Watch
    states: Mapping[str, Any]

    def scaling_of(self, path: str, weight_path: str = "", weight: Any = None) -> ScalingState:
        """A scaling state with the scale that was found for it.

        It is unchanged if nothing but zeros was seen.

        Args:
          path: of the state.
          weight_path: of the weight of the layer whose input it is of, if it is.
          weight: as it is stored now.
        """
        state = self.watch.scaling[path]
        if isinstance(weight, PreScaledWeight):
            plan, seen = self.watch.plans[weight_path], self.states[weight_path]
            return calibrated_state(state, smoothed_amax(weight, plan, seen, self.watch.observer))
        return calibrated_state(state, amax_of_stack(self.watch.observer, self.states[path], state))


def amax_of_stack(observer: Observer, states: Any, of: ScalingState) -> Float[Array, "*layers"]:
    """The amax that an observer makes for each layer of a stack."""
    layers, format = of.scale.shape, mk.get_format(of.format)
    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[len(layers) :]), states)
    return jax.lax.map(lambda each: observer.amax(each, format), flat).reshape(layers)


def calibrated_state(state: ScalingState, amax: Float[Array, "*layers"]) -> ScalingState:
    """A state whose scale is that of an amax; as it was where that is 0."""
    new = init_state(
        state.recipe, state.format, of_gradient=state.of_gradient, layers=state.scale.shape
    )
    found = update(observe(new, amax))
    known = amax > 0

    def choose(a: Array, b: Array) -> Array:
        return jnp.where(known.reshape(*known.shape, *[1] * (a.ndim - known.ndim)), a, b)

    return jax.tree.map(choose, found, state)


def round_weight(
    calibrated: Calibrated | None, path: str, weight: Any, plain: Plain
) -> tuple[Any, Rounding]:
    """A weight as it is stored, and how it came to be; without calibration rounded to nearest."""
    if calibrated is None:
        return plain(weight), PLAIN
    plan, states = calibrated.watch.plans[path], calibrated.states.get(path, {})
    return calibrated_weight(weight, plan, states, plain)
