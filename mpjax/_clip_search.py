"""Where to clip |x|, given its histogram, so that a format loses the least."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

import mpjax_kernels as mk

from ._histogram import Histogram

_CLIPS = 128
_CLIPS_PER_OCTAVE = 16
_ENTROPY_BINS = 2048
_AT_ONCE = 8  # candidates: a divisor of how many there are, or the rest is compiled apart


def percentile(histogram: Histogram, percent: float) -> Float[Array, ""]:
    """The least upper edge of a bin above which no more than 100 - percent of the numbers lie."""
    above = jnp.cumsum(histogram.counts[::-1])[::-1] - histogram.counts
    total = jnp.sum(histogram.counts) + histogram.zeros
    # Counted from the top, where counts are small: a rank from the bottom is not exact in float32.
    enough = above <= total * ((100 - percent) / 100)
    return histogram.upper_edges[jnp.argmax(enough)]


def least_squares_clip(histogram: Histogram, format: mk.Format) -> Float[Array, ""]:
    """The clip with the least squared rounding error, numbers taken as the centers of their bins.

    Of 128 candidates, amax * 2**(-i / 16). The distance of a number to the nearest value of a
    format changes no faster than the number, so the root of the mean squared error is right within
    half a width for each, and that of the clip found within a width of the best candidate's.
    """
    amax = jnp.where(histogram.amax > 0, histogram.amax, 1.0)
    width = histogram.width / amax
    index = jnp.arange(histogram.counts.shape[0]).astype(jnp.float32)
    centers = jnp.minimum((index + 0.5) * width, 1.0)
    clips = 2.0 ** (-jnp.arange(_CLIPS, dtype=jnp.float32) / _CLIPS_PER_OCTAVE)

    def error(clip: Float[Array, ""]) -> Float[Array, ""]:
        away = centers - _rounded(centers, clip, format)
        return jnp.sum(histogram.counts * away**2)

    errors = jax.lax.map(error, clips, batch_size=_AT_ONCE)
    return histogram.amax * clips[jnp.argmin(errors)]


def least_divergence_clip(histogram: Histogram, format: mk.Format) -> Float[Array, ""]:
    """The upper edge of the bin after which to clip for the least `divergence`.

    The bins are merged to 2048. Candidates keep more bins than the format has magnitudes.
    """
    counts = histogram.counts.reshape(_ENTROPY_BINS, -1).sum(axis=1)
    width = histogram.width * (histogram.counts.shape[0] // _ENTROPY_BINS)
    kept = jnp.arange(2 ** (format.bits - 1), _ENTROPY_BINS) + 1
    divergences = jax.lax.map(lambda k: divergence(counts, k, format), kept, batch_size=_AT_ONCE)
    reached = (kept - 1).astype(jnp.float32) * width <= histogram.amax
    best = kept[jnp.argmin(jnp.where(reached, divergences, jnp.inf))]
    return jnp.minimum(best.astype(jnp.float32) * width, histogram.amax)


def divergence(
    counts: Float[Array, " bins"], kept: Int[Array, ""], format: mk.Format
) -> Float[Array, ""]:
    """KL(P || Q) of what is left of a histogram when a format represents the first `kept` bins.

    P are those bins, the last with all that lies beyond. Q are the same without what lies beyond,
    but bins whose centers round to one value of the format share their counts evenly, among those
    that are not empty in P. Infinite if Q is 0 where P is not. (In TensorRT as many bins share
    counts each time, which is this but for where the first and the last of them begin.)
    """
    bins = counts.shape[0]
    index = jnp.arange(bins)
    inside = jnp.where(index < kept, counts, 0.0)
    p = inside + jnp.where(index == kept - 1, jnp.sum(counts) - jnp.sum(inside), 0.0)
    centers = (index.astype(jnp.float32) + 0.5) / kept.astype(jnp.float32)
    value = _rounded(centers, jnp.ones((), jnp.float32), format)
    group = jnp.cumsum(jnp.diff(value, prepend=value[:1]) > 0)
    total, filled = jax.ops.segment_sum(
        jnp.stack([inside, (p > 0).astype(jnp.float32)], axis=1), group, bins
    ).T
    q = total[group] / jnp.maximum(filled[group], 1.0)
    p, q = p / jnp.sum(p), q / jnp.maximum(jnp.sum(jnp.where(p > 0, q, 0.0)), 1.0)
    ratio = jnp.where(p > 0, p, 1.0) / jnp.where(p > 0, q, 1.0)
    return jnp.sum(p * jnp.log(ratio))


def _rounded(
    x: Float[Array, " bins"], clip: Float[Array, ""], format: mk.Format
) -> Float[Array, " bins"]:
    return mk.dequantize(mk.quantize(x, format, scale=clip / format.max))
