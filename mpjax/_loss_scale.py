"""Loss scales as configuration: what a policy asks for, and the rule by which the scale moves.

`init` makes the state that training carries, `update` the next one; both are pure.

float16 has a smallest normal number of 6.1e-5, so small gradients vanish. The loss is multiplied
by S before the backward pass and the gradients are divided by S after it:

    grads = grad(S * loss) / S
"""

import dataclasses
import math
import numbers
from collections.abc import Mapping
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32

from ._loss_scale_state import LossScaleState

# TensorFlow's names of the same numbers, so that its configs load.
_TF_DYNAMIC_NAMES = {
    "initial_loss_scale": "initial_scale",
    "increment_period": "period",
    "multiplier": "factor",
}
_TF_STATIC_NAMES = {"loss_scale_value": "scale"}
_FLOAT32_MAX = float(np.finfo(np.float32).max)
_FLOAT32_TINY = float(np.finfo(np.float32).tiny)
_INT32_MAX = np.iinfo(np.int32).max


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class DynamicLossScale:
    """A loss scale that grows while gradients are finite and shrinks when they are not.

    After `period` consecutive finite steps S becomes `S * factor` (if float32 holds that); after a
    non-finite step S becomes `max(S / factor, min_scale)`, the step is skipped and the count of
    finite steps starts again. Defaults are those of TensorFlow 2.4.

    Args:
        initial_scale: S at the first step.
        period: Finite steps in a row before S grows.
        factor: What S is multiplied and divided by, greater than 1.
        min_scale: The floor of S.

    Raises:
        ValueError: If a value is not a number, or out of its range, or not a number of float32.

    References:
        Micikevicius et al., Mixed Precision Training (2018), https://arxiv.org/abs/1710.03740
    """

    initial_scale: float = 2.0**15
    period: int = 2000
    factor: float = 2.0
    min_scale: float = 1.0

    def __post_init__(self):
        for name in ("initial_scale", "factor", "min_scale"):
            object.__setattr__(self, name, _finite_float(name, getattr(self, name)))
        if not isinstance(self.period, int) or isinstance(self.period, bool) or self.period < 1:
            raise ValueError(f"`period` must be a positive integer. Received: {self.period!r}")
        if self.period > _INT32_MAX:
            raise ValueError(f"`period` must be at most {_INT32_MAX}. Received: {self.period}")
        if self.min_scale <= 0:
            raise ValueError(f"`min_scale` must be positive. Received: {self.min_scale}")
        if self.min_scale < _FLOAT32_TINY:
            raise ValueError(
                f"`min_scale` must be at least {_FLOAT32_TINY:.8e}, the smallest normal number of "
                f"float32. Received: {self.min_scale}"
            )
        if np.float32(self.factor) <= 1:
            raise ValueError(f"`factor` must be greater than 1. Received: {self.factor}")
        if self.initial_scale < self.min_scale:
            raise ValueError(
                f"`initial_scale` must not be below `min_scale`. Received: "
                f"initial_scale={self.initial_scale}, min_scale={self.min_scale}"
            )

    def init(self) -> LossScaleState:
        """Returns the state of the first step."""
        return _initial(self.initial_scale, self)

    def update(self, state: LossScaleState, finite: Bool[Array, ""]) -> LossScaleState:
        """Returns the state after a step, which `finite` says had finite gradients or not."""
        # XLA multiplies by the reciprocal of a constant: `scale / 1.7` would have other bits under
        # jit than outside. Behind the barrier the factor is no constant.
        factor = jax.lax.optimization_barrier(jnp.float32(self.factor))
        counted = state.finite_steps + 1
        grow = counted >= self.period
        grown = state.scale * factor
        grown = jnp.where(grow & jnp.isfinite(grown), grown, state.scale)
        shrunk = jnp.maximum(state.scale / factor, np.float32(self.min_scale))
        return LossScaleState(
            scale=jnp.where(finite, grown, shrunk),
            finite_steps=jnp.where(finite & ~grow, counted, 0),
            config=self,
        )

    def multiplier(self, state: LossScaleState) -> Float32[Array, ""]:
        """Returns what the loss is multiplied by, and the gradients are divided by."""
        return state.scale

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments as a JSON-serializable dict."""
        return dataclasses.asdict(self)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Builds the loss scale from `get_config()`'s dict, or from TensorFlow 2.4's."""
        return cls(**_rename(config, _TF_DYNAMIC_NAMES))


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class StaticLossScale:
    """A loss scale that stays the same number throughout training.

    Args:
        scale: The number, at least 1.

    Raises:
        ValueError: If `scale` is not a finite number of at least 1.
    """

    scale: float

    def __post_init__(self):
        scale = _finite_float("scale", self.scale)
        if scale < 1:
            raise ValueError(f"`scale` must be at least 1. Received: {self.scale!r}")
        object.__setattr__(self, "scale", scale)

    def init(self) -> LossScaleState:
        """Returns the state of every step."""
        return _initial(self.scale, self)

    def update(self, state: LossScaleState, finite: Bool[Array, ""]) -> LossScaleState:
        """Returns `state`: the scale does not move."""
        del finite
        return state

    def multiplier(self, state: LossScaleState) -> Float32[Array, ""]:
        """Returns what the loss is multiplied by, and the gradients are divided by."""
        return state.scale

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments as a JSON-serializable dict."""
        return dataclasses.asdict(self)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Builds the loss scale from `get_config()`'s dict, or from TensorFlow 2.4's."""
        return cls(**_rename(config, _TF_STATIC_NAMES))


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class NoLossScale:
    """The loss scale of training that scales no loss: 1 at every step.

    What training makes of a policy whose `loss_scale` is None, so that no loop asks whether there
    is one.
    """

    def init(self) -> LossScaleState:
        """Returns the state of every step."""
        return _initial(1.0, self)

    def update(self, state: LossScaleState, finite: Bool[Array, ""]) -> LossScaleState:
        """Returns `state`: the scale does not move."""
        del finite
        return state

    def multiplier(self, state: LossScaleState) -> Float32[Array, ""]:
        """Returns 1 as a constant, so that XLA neither multiplies nor divides."""
        del state
        return jnp.ones((), jnp.float32)

    def get_config(self) -> dict[str, Any]:
        """Returns an empty dict: there is nothing to choose."""
        return {}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Builds the loss scale from `get_config()`'s dict."""
        return cls(**config)


LossScale = DynamicLossScale | StaticLossScale | NoLossScale

_CLASSES: dict[str, type[LossScale]] = {
    "DynamicLossScale": DynamicLossScale,
    "StaticLossScale": StaticLossScale,
    "FixedLossScale": StaticLossScale,
    "NoLossScale": NoLossScale,
}


def get_loss_scale(identifier: Any) -> LossScale | None:
    """Returns the loss scale that `identifier` names.

    Args:
        identifier: `"dynamic"`, a number, a loss scale, a serialized loss scale, or None.

    Raises:
        ValueError: If `identifier` is none of these.
    """
    if identifier is None or isinstance(identifier, LossScale):
        return identifier
    if identifier == "dynamic":
        return DynamicLossScale()
    if isinstance(identifier, numbers.Real) and not isinstance(identifier, bool):
        return StaticLossScale(float(identifier))
    if isinstance(identifier, Mapping) and identifier.get("class_name") in _CLASSES:
        return _CLASSES[identifier["class_name"]].from_config(identifier.get("config", {}))
    raise ValueError(
        f"Could not interpret loss scale identifier: {identifier!r}. Use 'auto', 'dynamic', a "
        "number of at least 1, None, a DynamicLossScale or a StaticLossScale."
    )


def training_loss_scale(identifier: Any) -> LossScale:
    """Returns the loss scale that `identifier` names, as training takes it: None is `NoLossScale`.

    Raises:
        ValueError: If `identifier` names no loss scale.
    """
    loss_scale = get_loss_scale(identifier)
    return NoLossScale() if loss_scale is None else loss_scale


def serialize_loss_scale(loss_scale: LossScale | None) -> dict[str, Any] | None:
    """Returns a JSON-serializable dict from which `get_loss_scale` restores `loss_scale`."""
    if loss_scale is None:
        return None
    return {"class_name": type(loss_scale).__name__, "config": loss_scale.get_config()}


def _initial(scale: float, config: LossScale) -> LossScaleState:
    return LossScaleState(
        scale=jnp.asarray(scale, jnp.float32), finite_steps=jnp.zeros((), jnp.int32), config=config
    )


def _finite_float(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise ValueError(
            f"`{name}` must be a Python int or float. Received: {value!r} (of type {type(value)})"
        )
    if not math.isfinite(value):
        raise ValueError(f"`{name}` must be finite. Received: {value!r}")
    number = float(value)
    if abs(number) > _FLOAT32_MAX:
        raise ValueError(f"`{name}` must be finite in float32. Received: {value!r}")
    return number


def _rename(config: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    return {names.get(key, key): value for key, value in config.items()}
