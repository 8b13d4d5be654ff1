"""Which wrapped model is running, as part of the key of every JAX cache.

While a wrapped model runs, `active` holds the `Frame` of its policy. It is made by
`jax.make_user_context`, so its value takes part in the key of jit's caches: a function (or a class
under `nn.jit`) that was traced under one policy is never reused under another.
"""

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator
from typing import Any

import jax

active = jax.make_user_context(None)


@dataclasses.dataclass(eq=False)
class Observation:
    """What a trace met, kept for the caller of `observe`; compared by identity.

    Attributes:
      policies: absolute layer path -> the policy that it resolved to, in order of first call.
      products: absolute layer path -> how the layer's weight entered a quantized product.
      ranks: absolute path of a parameter -> its number of axes as its layer sees it.
      calibrating: whether batches run for calibration: products multiply floats.
      left: name of a weight -> why its policy leaves it as it is.
      observed: while calibrating, paths of what observed an operand, in order of first call.
    """

    policies: dict[str, Any] = dataclasses.field(default_factory=dict)
    products: dict[str, "Product"] = dataclasses.field(default_factory=dict)
    ranks: dict[str, int] = dataclasses.field(default_factory=dict)
    left: dict[str, str] = dataclasses.field(default_factory=dict)
    calibrating: bool = False
    observed: list[str] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Product:
    """A weight's role in one quantized product.

    Attributes:
      name: of the parameter.
      shape: of the weight as the product sees it.
      contracting: the axes that the product sums over.
      is_conv: whether the product is a convolution.
      batch: the axes that it shares with the other operand and keeps.
      left: why its policy leaves the weight as it is; None if it is to be quantized.
    """

    name: str
    shape: tuple[int, ...]
    contracting: tuple[int, ...]
    is_conv: bool = False
    batch: tuple[int, ...] = ()
    left: str | None = None


@dataclasses.dataclass(frozen=True)
class Frame:
    """The policy in force, the path of the module it was wrapped around, and who is watching."""

    policy: Any
    root: tuple[str, ...] = ()
    observation: Observation | None = None


_observation: contextvars.ContextVar[Observation | None] = contextvars.ContextVar(
    "mpjax_observation", default=None
)


def current_observation() -> Observation | None:
    """The observation that frames opened now report to, or None."""
    return _observation.get()


def calibration_in_progress() -> Observation | None:
    """The observation of a calibration whose batches are running, or None."""
    frame = active.value
    observation = None if frame is None else frame.observation
    return observation if observation is not None and observation.calibrating else None


@contextlib.contextmanager
def observe(observation: Observation | None = None) -> Iterator[Observation]:
    """Collects what the layers of wrapped models do while a function is traced.

    The observation is part of each frame opened inside, hence of jit's cache keys: a layer whose
    trace was cached before is traced again, and so is seen.
    """
    observation = Observation() if observation is None else observation
    token = _observation.set(observation)
    try:
        yield observation
    finally:
        _observation.reset(token)
