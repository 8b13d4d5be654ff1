"""What better weights need to know of a layer's inputs x [..., K], over any number of batches.

  ChannelAbsMax    the largest |x| of each input channel            [K]       SmoothQuant
  ChannelMean      the mean |x| of each input channel               [K]       AWQ
  SecondMoment     H = 2 / n sum x x^T                              [K, K]    GPTQ, AWQ
  RowSample        rows drawn evenly from all that were seen        [rows, K] SmoothQuant

The protocol is that of an observer: `init(channels)`, `update(state, x)` for every batch, in jit,
and `result(state)`, which is NaN throughout if a batch was not finite. A batch that is empty or all
zero changes nothing. Everything is float32; means are kept as means, so that nothing overflows,
and each batch rounds them by 2**-24 or so.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

from ._finite import amax_of, choose, nan_unless


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class StatisticState:
    """A statistic of the rows seen so far.

    Attributes:
      value: float32 [K] or [K, K].
      rows: float32 [], how many rows it is of.
      finite: bool [], whether every batch was finite.
    """

    value: Float[Array, "..."]
    rows: Float[Array, ""]
    finite: Bool[Array, ""]


def _nothing(shape: tuple[int, ...]) -> StatisticState:
    return StatisticState(
        value=jnp.zeros(shape, jnp.float32),
        rows=jnp.zeros((), jnp.float32),
        finite=jnp.ones((), jnp.bool_),
    )


def _rows(x: Float[Array, "... k"]) -> Float[Array, "rows k"]:
    return x.reshape(-1, x.shape[-1]).astype(jnp.float32)


def _averaged(state: StatisticState, batch: Float[Array, "..."], rows: int) -> StatisticState:
    """The state whose mean is over `rows` more, over which the mean is `batch`."""
    total = state.rows + rows
    value = state.value + (batch - state.value) * (rows / jnp.maximum(total, 1.0))
    return dataclasses.replace(state, value=value, rows=total)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class ChannelAbsMax:
    """The largest |x| of each input channel: float32 [K]."""

    def init(self, channels: int) -> StatisticState:
        """The state before the first batch."""
        return _nothing((channels,))

    def update(self, state: StatisticState, x: Float[Array, "... k"]) -> StatisticState:
        """The state after the batch `x`."""
        rows = _rows(x)
        value = jnp.maximum(state.value, jnp.max(jnp.abs(rows), axis=0, initial=0.0))
        after = dataclasses.replace(state, value=value, rows=state.rows + rows.shape[0])
        return choose(amax_of(x), after, state)

    def result(self, state: StatisticState) -> Float[Array, " k"]:
        """float32 [K]."""
        return nan_unless(state.finite, state.value)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class ChannelMean:
    """The mean |x| of each input channel: float32 [K]."""

    def init(self, channels: int) -> StatisticState:
        """The state before the first batch."""
        return _nothing((channels,))

    def update(self, state: StatisticState, x: Float[Array, "... k"]) -> StatisticState:
        """The state after the batch `x`."""
        rows = _rows(x)
        # A factor before the sum, so that it does not overflow.
        mean = jnp.sum(jnp.abs(rows) * (1.0 / max(rows.shape[0], 1)), axis=0)
        return choose(amax_of(x), _averaged(state, mean, rows.shape[0]), state)

    def result(self, state: StatisticState) -> Float[Array, " k"]:
        """float32 [K]."""
        return nan_unless(state.finite, state.value)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class SecondMoment:
    """H = 2 / n sum x x^T over the n rows x seen: float32 [K, K].

    The mean squared error of the outputs, when an error E [K, N] is added to the weights, is
    tr(E^T H E) / 2.
    """

    def init(self, channels: int) -> StatisticState:
        """The state before the first batch."""
        return _nothing((channels, channels))

    def update(self, state: StatisticState, x: Float[Array, "... k"]) -> StatisticState:
        """The state after the batch `x`."""
        rows = _rows(x)
        # Here too: a long sum of products is larger than their mean.
        scaled = rows * (2.0 / max(rows.shape[0], 1))
        moment = jnp.matmul(scaled.T, rows, precision=jax.lax.Precision.HIGHEST)
        return choose(amax_of(x), _averaged(state, moment, rows.shape[0]), state)

    def result(self, state: StatisticState) -> Float[Array, "k k"]:
        """float32 [K, K], symmetric."""
        return nan_unless(state.finite, (state.value + state.value.T) / 2)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleState:
    """A sample of the rows seen so far.

    Attributes:
      sample: float32 [rows, K], in no order; zeros where fewer rows were seen.
      priority: float32 [rows], the random number of each, -1 for none.
      batches: int32 [], how many were drawn from.
      finite: bool [], whether every batch was finite.
    """

    sample: Float[Array, "rows k"]
    priority: Float[Array, " rows"]
    batches: Int[Array, ""]
    finite: Bool[Array, ""]


def _drawn(seed: int, batch: Int[Array, ""], rows: int) -> Float[Array, " rows"]:
    """A number in [0, 1) for each row of a batch, the same each time.

    A hash and not `jax.random`, which a model of many layers takes twice as long to compile with.
    """
    first = _hashed(batch.astype(jnp.uint32) + _hashed(jnp.uint32(seed % 2**32)))
    bits = _hashed(first + jnp.arange(rows, dtype=jnp.uint32))
    return (bits >> 8).astype(jnp.float32) * 2.0**-24


def _hashed(x: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """Wellons' lowbias32, https://nullprogram.com/blog/2018/07/31/."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class RowSample:
    """Rows drawn evenly, without replacement, from all that were seen: float32 [rows, K].

    Every row gets a random number, and those with the largest are kept. While fewer rows were seen
    than are kept, the others are zero, which adds nothing to an error.

    Attributes:
      rows: how many are kept.
      seed: of the random numbers; the same rows are drawn from the same batches.
    """

    rows: int = 256
    seed: int = 0

    def init(self, channels: int) -> SampleState:
        """The state before the first batch."""
        return SampleState(
            sample=jnp.zeros((self.rows, channels), jnp.float32),
            priority=jnp.full(self.rows, -1.0, jnp.float32),
            batches=jnp.zeros((), jnp.int32),
            finite=jnp.ones((), jnp.bool_),
        )

    def update(self, state: SampleState, x: Float[Array, "... k"]) -> SampleState:
        """The state after the batch `x`."""
        rows = x.reshape(-1, x.shape[-1])
        drawn = _drawn(self.seed, state.batches, rows.shape[0])
        drawn, best = jax.lax.top_k(drawn, min(self.rows, rows.shape[0]))
        sample = jnp.concatenate([state.sample, rows[best].astype(jnp.float32)])
        priority, kept = jax.lax.top_k(jnp.concatenate([state.priority, drawn]), self.rows)
        after = SampleState(
            sample=sample[kept],
            priority=priority,
            batches=state.batches + 1,
            finite=state.finite,
        )
        return choose(amax_of(x), after, state)

    def result(self, state: SampleState) -> Float[Array, "rows k"]:
        """float32 [rows, K]."""
        return nan_unless(state.finite, state.sample)
