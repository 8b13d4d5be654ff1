"""Observers: what the static scale of an activation is made from, one amax per tensor.

  AbsMax           the largest |x|: nothing saturates, and one outlier coarsens every other number
  MovingAverage    the average of the largest |x| of each batch: saturates some batches' outliers
  Percentile       |x| that so many percent of the numbers do not exceed
  MSE              the clip with the least squared rounding error in the format
  Entropy          the clip whose rounded histogram diverges least from that of the numbers

All have one protocol, and the last three one state, a `Histogram`:

    state = observer.init()
    state = observer.update(state, x)         # for every batch, in jit
    amax = observer.amax(state, format)       # float32 []; scale = amax / format.max

A batch that is empty or all zero changes nothing, and amax is 0 until something else was seen. A
batch with a NaN or an infinity makes amax NaN: `state.finite` says so before.
"""

import dataclasses
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

import mpjax_kernels as mk

from ._clip_search import least_divergence_clip, least_squares_clip, percentile
from ._finite import amax_of, choose, nan_unless
from ._histogram import Histogram, add_to_histogram, empty_histogram


class Observer(Protocol):
    """What makes an amax of batches. Frozen and hashable; its state is a pytree of arrays."""

    def init(self) -> Any:
        """The state before the first batch."""
        ...

    def update(self, state: Any, x: Float[Array, "..."]) -> Any:
        """The state after the batch `x`, of any shape and any floating dtype."""
        ...

    def amax(self, state: Any, format: mk.Format) -> Float[Array, ""]:
        """What the largest value of `format` is to represent; NaN if a batch was not finite."""
        ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class AmaxState:
    """The state of `AbsMax` and of `MovingAverage`.

    Attributes:
      amax: float32 [], the amax so far; 0 if there is none.
      weight: float32 [], the sum of the weights of the batches averaged.
      finite: bool [], whether every batch was finite.
    """

    amax: Float[Array, ""]
    weight: Float[Array, ""]
    finite: Bool[Array, ""]


class _OfAmax:
    """The part of the protocol that keeps an amax, whatever the format."""

    def init(self) -> AmaxState:
        """The state before the first batch."""
        zero = jnp.zeros((), jnp.float32)
        return AmaxState(amax=zero, weight=zero, finite=jnp.ones((), jnp.bool_))

    def amax(self, state: AmaxState, format: mk.Format) -> Float[Array, ""]:
        """The amax, whatever the format."""
        return nan_unless(state.finite, state.amax)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class AbsMax(_OfAmax):
    """The largest |x| of all batches."""

    def update(self, state: AmaxState, x: Float[Array, "..."]) -> AmaxState:
        """The state after the batch `x`."""
        amax = amax_of(x)
        after = dataclasses.replace(state, amax=jnp.maximum(state.amax, amax))
        return choose(amax, after, state)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class MovingAverage(_OfAmax):
    """The average of the largest |x| of each batch, the newest batches weighing most.

    With `a[t]` the largest |x| of batch t of n::

        amax = sum(decay**(n - t) * a[t]) / sum(decay**(n - t))

    So the first batch weighs no more than others of its age, and `decay=1` is the plain average.

    Attributes:
      decay: by which a batch weighs less for each that came after it; in (0, 1].

    Raises:
      ValueError: `decay` is out of range.
    """

    decay: float = 0.99

    def __post_init__(self):
        if not 0 < self.decay <= 1:
            raise ValueError(f"`decay` is {self.decay}, but must be more than 0 and at most 1")

    def update(self, state: AmaxState, x: Float[Array, "..."]) -> AmaxState:
        """The state after the batch `x`."""
        amax = amax_of(x)
        weight = state.weight * self.decay + 1.0
        average = state.amax + (amax - state.amax) / weight
        after = dataclasses.replace(state, amax=average, weight=weight)
        return choose(amax, after, state)


class _OfHistogram:
    """The part of the protocol that keeps a histogram."""

    def init(self) -> Histogram:
        """The state before the first batch."""
        return empty_histogram()

    def update(self, state: Histogram, x: Float[Array, "..."]) -> Histogram:
        """The state after the batch `x`."""
        return add_to_histogram(state, x)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Percentile(_OfHistogram):
    """The |x| that `percent` percent of all numbers do not exceed.

    From a histogram: at least `numpy.percentile(|x|, percent, method="inverted_cdf")` of all the
    data, and more by at most the width of a bin, amax / 4096; but that the rank is a float32, which
    may take one of two neighbors for the other. Zeros count as numbers, except those of a batch
    that is all zero, and the amax is not 0 unless all are.

    Attributes:
      percent: in (0, 100]; 100 is `AbsMax`.

    Raises:
      ValueError: `percent` is out of range.
    """

    percent: float = 99.99

    def __post_init__(self):
        if not 0 < self.percent <= 100:
            raise ValueError(
                f"`percent` is {self.percent}, but must be more than 0 and at most 100: "
                "99.99 leaves out one number in 10,000"
            )

    def amax(self, state: Histogram, format: mk.Format) -> Float[Array, ""]:
        """The percentile, whatever the format."""
        return nan_unless(state.finite, percentile(state, self.percent))


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class MSE(_OfHistogram):
    """The clip with the least squared error of rounding to the format, saturation included.

        amax = argmin over a of sum (x - saturate(round(x / s)) * s)**2,  s = a / format.max

    Of 128 candidates that are 1/16 of an octave apart, the largest |x| the first of them, by a
    histogram: the root of the mean squared error is within a bin's width, amax / 4096, of the
    best candidate's.
    """

    def amax(self, state: Histogram, format: mk.Format) -> Float[Array, ""]:
        """The clip that is best in `format`."""
        return nan_unless(state.finite, least_squares_clip(state, format))


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Entropy(_OfHistogram):
    """The clip that loses the least information, by the histogram of |x| before and after.

        amax = argmin over a of KL(P || Q)

    P is the histogram with all beyond `a` in its last bin; in Q, the bins that round to one value
    of the format share what they hold. 2048 bins; zeros are left out, since rounding keeps them.

    References:
      Migacz, 8-bit Inference with TensorRT, GPU Technology Conference 2017
    """

    def amax(self, state: Histogram, format: mk.Format) -> Float[Array, ""]:
        """The clip that is best in `format`."""
        return nan_unless(state.finite, least_divergence_clip(state, format))
