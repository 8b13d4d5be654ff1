"""Scaling: where the scale of a quantized operand comes from, and the state that it takes.

  current   the amax of the operand at hand                                   no state
  delayed   the amaxes of the steps before: a history, one amax per step      a `ScalingState`
  static    the first amax that was observed, or calibrated, and kept         a `ScalingState`

State is a pure pair. `observe` merges an amax into a state by maximum: of a microbatch, of a second
call of a shared layer, of a device. `update` is called once per optimizer step:

    amax_history = roll(amax_history, -1), amax_history[0] = observed
    scale        = max(amax_history) / format.max * 2**margin

The forward pass of step t so uses amaxes of steps before t. A scale of 0 stands for an empty
history, for which the kernels take the current amax. What was observed as 0 (nothing ran, or no
gradient came) or as not finite leaves the state as it was.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

import mpjax_kernels as mk

_ALGORITHMS = ("max", "most_recent")


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class CurrentScaling:
    """The scale comes from the amax of the operand at hand: nothing is kept.

    Attributes:
      granularity: `"tensor"`, one scale per operand, or `"channel"`, one per row of an activation
        and per output channel of a weight.
    """

    granularity: Literal["tensor", "channel"] = "tensor"


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class DelayedScaling:
    """The scale comes from the amaxes of the steps before, one scale per tensor.

        scale = amax / format.max * 2**margin

    Attributes:
      amax_history_length: steps that the history looks back on, at least 1.
      margin: powers of two by which the scale is larger than the amaxes ask for: room for the next
        step's to grow.
      algorithm: `"max"`, the largest of the history, or `"most_recent"`, its newest entry.

    Raises:
      TypeError: `amax_history_length` is not an integer, or `margin` not a number.
      ValueError: one of them is out of range, or the algorithm is unknown.

    References:
      Micikevicius et al., FP8 Formats for Deep Learning, 2022, https://arxiv.org/abs/2209.05433
    """

    amax_history_length: int = 1024
    margin: float = 0
    algorithm: str = "max"

    def __post_init__(self):
        check_history_length(self.amax_history_length)
        check_margin(self.margin)
        check_algorithm(self.algorithm)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class StaticScaling:
    """The scale comes from the first update that has an amax, and stays.

    Attributes:
      margin: as in `DelayedScaling`.
    """

    margin: float = 0

    def __post_init__(self):
        check_margin(self.margin)


Scaling = CurrentScaling | DelayedScaling | StaticScaling


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Probe:
    """What a state carries while a loss is differentiated.

    Attributes:
      zeros: of the shape of `observed`; their cotangents are amaxes that add up by maximum.
      units: float32, the same shape: what the operand is multiplied by, which is the loss scale
        for the gradient of an output.
      manual_axes: the axes of the `shard_map` that the loss is differentiated in, if in any.
    """

    zeros: Any
    units: Float[Array, "*layers"]
    manual_axes: frozenset[str] = dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class ScalingState:
    """What is known of one operand of a layer; a stack of layers has leading axes.

    Attributes:
      amax_history: float32 [..., amax_history_length], the newest amax first; static: no entries.
      scale: float32 [...], `x ~ values * scale`; 0 while nothing is known.
      observed: float32 [...], the largest amax since the last update; 0 if there was none.
      probe: how amaxes leave the backward pass, while `mpjax.value_and_grad` runs; else None.
      recipe: the `DelayedScaling` or `StaticScaling`.
      format: name of the format that the operand is quantized to.
      of_gradient: whether the operand is the gradient of a layer's output.
    """

    amax_history: Float[Array, "*layers steps"]
    scale: Float[Array, "*layers"]
    observed: Float[Array, "*layers"]
    probe: Probe | None = None
    recipe: DelayedScaling | StaticScaling = dataclasses.field(metadata={"static": True})
    format: str = dataclasses.field(metadata={"static": True})
    of_gradient: bool = dataclasses.field(metadata={"static": True})

    @property
    def scale_at_hand(self) -> Float[Array, "*layers"]:
        """The scale of the operand as it is multiplied, in units of the loss scale."""
        return self.scale if self.probe is None else self.scale * self.probe.units

    def __getitem__(self, index: Any) -> "ScalingState":
        """The states at an index into a stack of layers; `[...]` is the whole."""
        return jax.tree.map(lambda x: x[index], self)


def init_state(
    recipe: DelayedScaling | StaticScaling,
    format: str,
    *,
    of_gradient: bool = False,
    layers: tuple[int, ...] = (),
) -> ScalingState:
    """A state that knows nothing yet.

    Args:
      recipe: how it will be updated.
      format: name of the format of the operand.
      of_gradient: whether the operand is a gradient.
      layers: leading axes, for a stack of layers.
    """
    steps = recipe.amax_history_length if isinstance(recipe, DelayedScaling) else 0
    return ScalingState(
        amax_history=jnp.zeros((*layers, steps), jnp.float32),
        scale=jnp.zeros(layers, jnp.float32),
        observed=jnp.zeros(layers, jnp.float32),
        recipe=recipe,
        format=format,
        of_gradient=of_gradient,
    )


def observe(state: ScalingState, amax: Float[Array, "*layers"]) -> ScalingState:
    """`state` with one more amax, merged by maximum; neither history nor scale changes."""
    return dataclasses.replace(state, observed=jnp.maximum(state.observed, amax))


@jax.jit
def update(state: ScalingState, when: Bool[Array, ""] | bool = True) -> ScalingState:
    """The state of the next step: what was observed enters the history, and the scale follows.

    What was observed as 0 or as not finite changes neither. Where there is no step, as `when`
    says, nothing changes.
    """
    recipe, observed = state.recipe, state.observed
    seen = jnp.isfinite(observed) & (observed > 0) & when
    if isinstance(recipe, StaticScaling):
        history, amax = state.amax_history, observed
        seen &= state.scale == 0
    else:
        old = state.amax_history
        parts = (observed[..., None], old[..., 2:], old[..., :1])  # a roll, but for the oldest
        rolled = jnp.concatenate(parts, axis=-1)[..., : recipe.amax_history_length]
        history = jnp.where(seen[..., None], rolled, old)
        amax = history[..., 0] if recipe.algorithm == "most_recent" else jnp.max(history, axis=-1)
    scale = scale_from(amax, state.format, recipe.margin)
    return dataclasses.replace(
        state,
        amax_history=history,
        scale=jnp.where(seen, scale, state.scale),
        observed=jnp.where(when, 0, observed),
    )


def scale_from(
    amax: Float[Array, "*layers"], format: str, margin: float
) -> Float[Array, "*layers"]:
    """`amax / format.max * 2**margin`, kept among the normal float32 numbers."""
    limits, largest = jnp.finfo(jnp.float32), mk.get_format(format).max
    scale = amax / np.float32(largest / 2.0**margin)
    return jnp.clip(scale, limits.tiny, limits.max / largest / 2)


def update_scaling(tree: Any, *, when: Bool[Array, ""] | bool = True) -> Any:
    """Updates every `ScalingState` in a tree; the rest of it stays as it is.

    For loops without `TrainState`, once per optimizer step: `variables = update_scaling(variables)`
    with variables whose states have observed (`apply(..., mutable=["scaling"])`, or
    `observe_scaling`).

    Args:
      tree: any pytree, such as Linen's variables or the collection `scaling`.
      when: bool[], whether there is a step: False changes nothing.

    Returns:
      A tree of the same structure.
    """
    return map_states(lambda state: update(state, when), tree)


def observe_scaling(tree: Any, observed: Any) -> Any:
    """Merges amaxes, such as `Gradients.observed`, into the states of a tree by maximum.

    Args:
      tree: a tree of `ScalingState`s, such as the collection `scaling`.
      observed: the same tree with an amax, float32, in the place of each state.

    Returns:
      The tree with states that have observed more.

    Raises:
      TypeError: `observed` holds states.
    """
    if any(map(is_state, jax.tree.leaves(observed, is_leaf=is_state))):
        raise TypeError(
            "`observed` holds scaling states, but should hold amaxes, such as Gradients.observed: "
            "the states come first, observe_scaling(variables['scaling'], grads.observed)"
        )
    return map_states(observe, tree, observed)


def is_state(x: Any) -> bool:
    """Whether `x` is a `ScalingState`."""
    return isinstance(x, ScalingState)


def map_states(function: Callable[..., Any], tree: Any, *others: Any) -> Any:
    """`jax.tree.map` over the states of a tree; other leaves stay as they are."""

    def each(leaf: Any, *rest: Any) -> Any:
        return function(leaf, *rest) if is_state(leaf) else leaf

    return jax.tree.map(each, tree, *others, is_leaf=is_state)


def check_history_length(length: Any) -> None:
    """Raises TypeError or ValueError for what cannot be the length of a history."""
    if isinstance(length, bool) or not isinstance(length, int):
        raise TypeError(
            "`amax_history_length` must be an integer. "
            f"Received: amax_history_length={length!r} (of type {type(length)})"
        )
    if length <= 0:
        raise ValueError(
            f"`amax_history_length` must be at least 1. Received: amax_history_length={length}"
        )


def check_margin(margin: Any) -> None:
    """Raises TypeError or ValueError for what cannot be a margin."""
    if isinstance(margin, bool) or not isinstance(margin, int | float):
        raise TypeError(f"`margin` must be a number. Received: margin={margin!r}")
    if not -64 <= margin <= 64:  # NaN is not
        raise ValueError(
            f"`margin` is a power of two between -64 and 64. Received: margin={margin}"
        )


def check_algorithm(algorithm: Any) -> None:
    """Raises ValueError for an unknown way to read a history."""
    if algorithm not in _ALGORITHMS:
        raise ValueError(
            f"`amax_algorithm` must be one of {_ALGORITHMS}. Received: amax_algorithm={algorithm!r}"
        )
