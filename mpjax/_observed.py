"""What stands in for weights and scaling states while batches run for calibration.

A wrapped model computes with float weights then, in the compute dtype of its policy, and

  ObservedWeight    a weight, with statistics of the inputs that it is multiplied by
  ObservedScaling   a scaling state, with an observer of the operand whose scale it holds

are in the places of the leaves that they observe. Being leaves of the parameters and of the
scaling states, they pass through whatever a model's own `nn.scan`, `vmap` or `remat`, or the
transforms of NNX, do with those: each layer of a stack gets statistics of its own, and a layer that
is called twice those of both calls.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ._context import calibration_in_progress
from ._observers import Observer
from ._scaling import ScalingState


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class ObservedWeight:
    """A float weight, and statistics of what it is multiplied by.

    Attributes:
      weight: the array.
      states: of the statistics, by their names.
      statistics: names and statistics (static).
      path: of the weight in messages (static).
    """

    weight: Float[Array, "..."]
    states: Mapping[str, Any]
    statistics: tuple[tuple[str, Any], ...] = dataclasses.field(metadata={"static": True})
    path: str = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight."""
        return tuple(self.weight.shape)

    @property
    def ndim(self) -> int:
        """The number of axes of the weight."""
        return len(self.weight.shape)

    @property
    def dtype(self) -> Any:
        """The dtype of the weight."""
        return self.weight.dtype

    def __getitem__(self, index: Any) -> "ObservedWeight":
        return jax.tree.map(lambda x: x[index], self)

    def with_input(
        self, x: Float[Array, "..."], lhs_axes: Sequence[int], rhs_axes: Sequence[int]
    ) -> "ObservedWeight":
        """The same, with one more input in the statistics.

        Args:
          x: the input.
          lhs_axes: the axes of `x` that the product sums over.
          rhs_axes: the axes of the weight, in the same order.
        """
        _meet(self.path)
        order = [axis for _, axis in sorted(zip(rhs_axes, lhs_axes, strict=True))]
        rest = [axis for axis in range(x.ndim) if axis not in order]
        moved = jax.lax.stop_gradient(jnp.transpose(x, (*rest, *order)))
        rows = moved.reshape(*moved.shape[: len(rest)], -1)
        states = {name: _updated(each, self.states[name], rows) for name, each in self.statistics}
        return dataclasses.replace(self, states=states)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class ObservedScaling:
    """A scaling state, and an observer of the operand that it is of.

    Attributes:
      state: as it is; a stack of layers has leading axes.
      observed: the observer's state.
      observer: makes an amax of it (static).
      path: of the operand in messages (static).
    """

    state: ScalingState
    observed: Any
    observer: Observer = dataclasses.field(metadata={"static": True})
    path: str = dataclasses.field(metadata={"static": True})

    @property
    def recipe(self) -> Any:
        """As the state's."""
        return self.state.recipe

    @property
    def format(self) -> str:
        """As the state's."""
        return self.state.format

    def __getitem__(self, index: Any) -> "ObservedScaling":
        return jax.tree.map(lambda x: x[index], self)

    def with_operand(self, x: Float[Array, "..."]) -> "ObservedScaling":
        """The same, with one more operand observed."""
        _meet(self.path)
        observed = _updated(self.observer, self.observed, jax.lax.stop_gradient(x))
        return dataclasses.replace(self, observed=observed)


@functools.partial(jax.jit, static_argnums=0)  # layers alike are traced once
def _updated(observer: Any, state: Any, x: Float[Array, "..."]) -> Any:
    return observer.update(state, x)


def stacked(state: Any, layers: tuple[int, ...]) -> Any:
    """The state of an observer or a statistic, for each layer of a stack."""
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (*layers, *x.shape)), state)


def _meet(path: str) -> None:
    observation = calibration_in_progress()
    if observation is not None and path not in observation.observed:
        observation.observed.append(path)
