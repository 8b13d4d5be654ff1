"""SmoothQuant: outliers of the inputs moved into the weights, where they hurt less.

    x w = (x / s) (s w),   s[k] = amax |x[:, k]|**alpha / amax |w[k, :]|**(1 - alpha)

alpha is the share of the difficulty that moves to the weights: 0 makes all rows of the weights
alike, 1 all channels of the inputs.

Xiao et al., SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language
Models, 2022, https://arxiv.org/abs/2211.10438
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float

import mpjax_kernels as mk

from ._output_error import exact_matmul, input_as_multiplied, weight_as_stored
from ._stored import Stored

_FLOAT32 = np.finfo(np.float32)

ALPHAS = tuple(i / 20 for i in range(5, 20))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Smoothed:
    """The scales of SmoothQuant, and whether they help.

    Attributes:
      scales: float32 [K]: inputs are divided by it, rows of the weight multiplied.
      alpha: float32 [].
      plain_error: float32 [], the squared error of the sample's outputs without scales.
      error: float32 [], with them; may be larger, and then they are better left out.
    """

    scales: Float[Array, " k"]
    alpha: Float[Array, ""]
    plain_error: Float[Array, ""]
    error: Float[Array, ""]


def smooth_scales(
    x_amax: Float[Array, " k"], w_amax: Float[Array, " k"], alpha: Float[ArrayLike, ""] = 0.5
) -> Float[Array, " k"]:
    """s = x_amax**alpha / w_amax**(1 - alpha), and 1 for a channel where either is 0.

    Args:
      x_amax: float32 [K], the largest |x| of each input channel.
      w_amax: float32 [K], the largest |w| of each row.
      alpha: in [0, 1].

    Returns:
      float32 [K], finite and positive.
    """
    known = (x_amax >= _FLOAT32.tiny) & (w_amax >= _FLOAT32.tiny)
    x, w = jnp.where(known, x_amax, 1.0), jnp.where(known, w_amax, 1.0)
    alpha = jnp.asarray(alpha, jnp.float32)
    return jnp.clip(x**alpha / w ** (1 - alpha), _FLOAT32.tiny, _FLOAT32.max)


def smoothquant(
    weight: Float[Array, "k n"],
    x_amax: Float[Array, " k"],
    sample: Float[Array, "rows k"],
    stored: Stored,
    alphas: tuple[float, ...] = ALPHAS,
) -> Smoothed:
    """The scales that make the least error on a sample of inputs, one alpha of a grid for all.

    The error is that of the layer as it will run, inputs quantized as `stored` says: by one static
    scale, amax = max(x_amax / s), or by their own amaxes.

    Args:
      weight: float32 [K, N].
      x_amax: float32 [K], the largest |x| of each input channel (`ChannelAbsMax`).
      sample: float32 [rows, K], inputs (`RowSample`).
      stored: how the weight is stored, and its inputs.
      alphas: the grid.
    """
    weight, sample = weight.astype(jnp.float32), sample.astype(jnp.float32)
    w_amax = jnp.max(jnp.abs(weight), axis=1, initial=0.0)
    exact = exact_matmul(sample, weight)

    def error(scales: Float[Array, " k"]) -> Float[Array, ""]:
        amax = jnp.max(x_amax / scales, initial=0.0)
        x = input_as_multiplied(sample / scales, stored.activation, amax)
        w = mk.dequantize(weight_as_stored(weight * scales[:, None], stored))
        return jnp.sum((exact_matmul(x, w) - exact) ** 2)

    grid = jnp.asarray(alphas, jnp.float32)
    errors = jax.lax.map(lambda alpha: error(smooth_scales(x_amax, w_amax, alpha)), grid)
    best = jnp.argmin(errors)
    return Smoothed(
        scales=smooth_scales(x_amax, w_amax, grid[best]),
        alpha=grid[best],
        plain_error=error(jnp.ones_like(w_amax)),
        error=errors[best],
    )
