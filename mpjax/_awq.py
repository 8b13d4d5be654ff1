"""AWQ: input channels that matter are scaled up before the weights are rounded.

    x w ~ (x / s) Q(s w),   s[k] = (mean |x[:, k]|)**alpha

A row of the weights that is larger in its group is rounded more finely, relative to its size. alpha
is searched for, on [0, 1]; alpha 0 is plain rounding, so that AWQ is never worse on the inputs that
it was calibrated with. Errors are those of the outputs, by the second moment of the inputs.

Lin et al., AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration, 2023,
https://arxiv.org/abs/2306.00978
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

import mpjax_kernels as mk

from ._output_error import output_error, weight_as_stored
from ._stored import Stored

ALPHAS = tuple(i / 19 for i in range(20))
SHRINKS = tuple(1 - i / 20 for i in range(11))

# A channel that is hardly ever used would get a scale near 0, and float32 has no room for its
# inverse.
_SMALLEST_RATIO = 1e-4


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class ActivationAware:
    """A weight as AWQ rounds it.

    Attributes:
      quantized: QTensor [K, N] of `scales[:, None] * weight`.
      scales: float32 [K]: what inputs are divided by.
      alpha: float32 [].
      plain_error: float32 [], tr(E^T H E) of rounding to nearest.
      error: float32 [], that of AWQ; equal if nothing better was found.
    """

    quantized: mk.QTensor
    scales: Float[Array, " k"]
    alpha: Float[Array, ""]
    plain_error: Float[Array, ""]
    error: Float[Array, ""]


def awq_scales(x_mean: Float[Array, " k"], alpha: Float[Array, ""]) -> Float[Array, " k"]:
    """s = x_mean**alpha, divided by the geometric mean of its largest and its smallest entry.

    Args:
      x_mean: float32 [K], the mean |x| of each channel; less than 1e-4 of the largest counts as
        that, and if all are 0 every scale is 1.
      alpha: float32 [], in [0, 1].
    """
    largest = jnp.max(x_mean, initial=0.0)
    ratio = jnp.where(largest > 0, x_mean / jnp.where(largest > 0, largest, 1.0), 1.0)
    scales = jnp.maximum(ratio, _SMALLEST_RATIO) ** alpha
    return scales / jnp.sqrt(jnp.max(scales, initial=0.0) * jnp.min(scales, initial=1.0))


def awq(
    weight: Float[Array, "k n"],
    x_mean: Float[Array, " k"],
    moment: Float[Array, "k k"],
    stored: Stored,
    *,
    alphas: tuple[float, ...] = ALPHAS,
    clip: bool = False,
) -> ActivationAware:
    """The scales, one alpha of a grid for all, that make the least error in the outputs.

    Args:
      weight: [K, N].
      x_mean: float32 [K], the mean |x| of each input channel (`ChannelMean`).
      moment: float32 [K, K], H = 2 / n sum x x^T (`SecondMoment`).
      stored: how the weight is stored.
      alphas: the grid; without 0 the result may be worse than plain rounding, and says so.
      clip: whether to search for a smaller range of each group too, if that makes the error less.

    Raises:
      ValueError: `clip` of a weight that has no scales for each output channel.
    """
    weight, moment = weight.astype(jnp.float32), moment.astype(jnp.float32)

    def error(scales: Float[Array, " k"], quantized: mk.QTensor) -> Float[Array, ""]:
        rounded = mk.dequantize(quantized) / scales[:, None]
        return output_error(rounded - weight, moment)

    def error_of(alpha: Float[Array, ""]) -> Float[Array, ""]:
        scales = awq_scales(x_mean, alpha)
        return error(scales, weight_as_stored(weight * scales[:, None], stored))

    grid = jnp.asarray(alphas, jnp.float32)
    errors = jax.lax.map(error_of, grid)
    alpha, least = grid[jnp.argmin(errors)], jnp.min(errors)
    scales = awq_scales(x_mean, alpha)
    scaled = weight * scales[:, None]
    quantized = weight_as_stored(scaled, stored)
    if clip:
        clipped = weight_as_stored(_clipped(scaled, _moment_of(moment, scales), stored), stored)
        after = error(scales, clipped)
        better = after < least
        quantized = jax.tree.map(lambda new, old: jnp.where(better, new, old), clipped, quantized)
        least = jnp.minimum(after, least)
    return ActivationAware(
        quantized=quantized,
        scales=scales,
        alpha=alpha,
        plain_error=error(jnp.ones_like(scales), weight_as_stored(weight, stored)),
        error=least,
    )


def _moment_of(moment: Float[Array, "k k"], scales: Float[Array, " k"]) -> Float[Array, "k k"]:
    """The second moment of x / scales."""
    return moment / scales / scales[:, None]


def _clipped(
    weight: Float[Array, "k n"], moment: Float[Array, "k k"], stored: Stored
) -> Float[Array, "k n"]:
    """The weight with each group clipped where that makes the error of the group alone least."""
    if stored.granularity not in ("channel", "group"):
        raise ValueError(
            f"`clip` searches for a range of each group of an output channel, but the weight has "
            f"scales per {stored.granularity}: leave `clip` out"
        )
    size = weight.shape[0] if stored.granularity == "channel" else stored.group_size or 1
    groups = weight.reshape(-1, size, weight.shape[1])
    index = jnp.arange(groups.shape[0])
    moments = moment.reshape(len(groups), size, len(groups), size)[index, :, index, :]
    amax = jnp.max(jnp.abs(groups), axis=1, keepdims=True)

    def at(shrink: Float[Array, ""]) -> Float[Array, "groups size n"]:
        return jnp.clip(groups, -amax * shrink, amax * shrink)

    def error(shrink: Float[Array, ""]) -> Float[Array, "groups n"]:
        rounded = mk.dequantize(weight_as_stored(at(shrink).reshape(weight.shape), stored))
        away = rounded.reshape(groups.shape) - groups
        precision = jax.lax.Precision.HIGHEST
        return jnp.sum(away * jnp.matmul(moments, away, precision=precision), axis=1)

    shrinks = jnp.asarray(SHRINKS, jnp.float32)
    best = shrinks[jnp.argmin(jax.lax.map(error, shrinks), axis=0)]
    return at(best[:, None, :]).reshape(weight.shape)
