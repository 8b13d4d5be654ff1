"""A histogram of |x| over any number of batches, in constant memory.

The bins divide [0, 2**exponent) evenly, and there are a power of two of them. A batch that reaches
further makes the range a power of two longer, and bins are merged with their neighbors: every old
bin lies inside one new bin, so that after any number of batches the counts are those that all the
data at once would give. What is lost is only where in its bin a number was: at most one width,

    width = 2**exponent / bins <= 2 * amax / bins

which is amax / 4096 for the 8192 bins used. Finding the bin of a number is exact, since it takes
no more than a product with a power of two. Zeros are counted apart: every format represents them.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ._finite import amax_of, choose

BINS = 2**13

# Numbers below 2**-100 / bins all go to the first bin, so that no power of two leaves float32.
_LOWEST_EXPONENT = -100


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Histogram:
    """How often |x| fell into each bin.

    Attributes:
      counts: float32 [bins]; exact to 2**24, from there each batch rounds them by 2**-24.
      zeros: float32 [], how many numbers were 0, which no bin counts.
      amax: float32 [], the largest |x|.
      exponent: int32 [], the bins divide [0, 2**exponent).
      finite: bool [], whether every batch was finite. One that is not adds nothing else.
    """

    counts: Float[Array, " bins"]
    zeros: Float[Array, ""]
    amax: Float[Array, ""]
    exponent: Int[Array, ""]
    finite: Bool[Array, ""]

    @property
    def width(self) -> Float[Array, ""]:
        """The width of a bin."""
        return power_of_two(self.exponent - _log2(self.counts.shape[0]))

    @property
    def upper_edges(self) -> Float[Array, " bins"]:
        """Where each bin ends, or `amax` where that is less."""
        index = jnp.arange(1, self.counts.shape[0] + 1).astype(jnp.float32)
        return jnp.minimum(index * self.width, self.amax)


def empty_histogram(bins: int = BINS) -> Histogram:
    """A histogram of nothing; `bins` is a power of two."""
    return Histogram(
        counts=jnp.zeros(bins, jnp.float32),
        zeros=jnp.zeros((), jnp.float32),
        amax=jnp.zeros((), jnp.float32),
        exponent=jnp.full((), _LOWEST_EXPONENT, jnp.int32),
        finite=jnp.ones((), jnp.bool_),
    )


def add_to_histogram(histogram: Histogram, x: Float[Array, "..."]) -> Histogram:
    """The histogram of what it held and of `x`, unless that is zero, empty or not finite.

    Args:
      histogram: what was counted before.
      x: floating, any shape, fewer than 2**31 entries.
    """
    amax = amax_of(x)
    exponent = jnp.maximum(histogram.exponent, _exponent_above(amax))
    counted = _count(jnp.abs(x.astype(jnp.float32)).ravel(), exponent, histogram.counts.shape[0])
    kept = _merged(histogram.counts, exponent - histogram.exponent)
    zeros = (x.size - jnp.sum(counted)).astype(jnp.float32)
    grown = Histogram(
        counts=kept + counted.astype(jnp.float32),
        zeros=histogram.zeros + zeros,
        amax=jnp.maximum(histogram.amax, amax),
        exponent=exponent,
        finite=histogram.finite,
    )
    return choose(amax, grown, histogram)


def power_of_two(exponent: Int[Array, ""]) -> Float[Array, ""]:
    """2**exponent in float32, exact on all hardware; exponent in [-126, 127]."""
    return jax.lax.bitcast_convert_type((exponent + 127) << 23, jnp.float32)


def _exponent_above(amax: Float[Array, ""]) -> Int[Array, ""]:
    """The least integer e with amax < 2**e, for a normal number: its exponent bits."""
    return (jax.lax.bitcast_convert_type(amax, jnp.int32) >> 23) - 126


def _count(
    magnitude: Float[Array, " entries"], exponent: Int[Array, ""], bins: int
) -> Int[Array, " bins"]:
    index = (magnitude * power_of_two(_log2(bins) - exponent)).astype(jnp.int32)
    index = jnp.where(magnitude > 0, index, bins)  # where `drop` leaves it out
    # In integers: a float32 count of one batch would stop at 2**24.
    return jnp.zeros(bins, jnp.int32).at[index].add(1, mode="drop")


def _merged(counts: Float[Array, " bins"], doublings: Int[Array, ""]) -> Float[Array, " bins"]:
    index = jnp.arange(counts.shape[0], dtype=jnp.int32) >> jnp.minimum(doublings, 31)
    return jnp.zeros_like(counts).at[index].add(counts)


def _log2(bins: int) -> int:
    return bins.bit_length() - 1
