"""The sums of a convolution in the forms that cuDNN has, through XLA on NVIDIA GPUs.

float8: cuDNN has none, and XLA widens the operands to float32, which at full precision no tensor
core multiplies. bfloat16 holds these values as they are, and so does TF32: their products are
exact, and sums are float32.

int8: cuDNN has it, but in groups it is wrong without an error (JAX 0.11.2 on an H200;
https://github.com/openxla/xla/issues/49123). Groups are convolved in float32, which is exact while
no sum leaves 24 bits, or else one by one.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Float, Int8, Shaped

from ._convolution import Convolution

# Sums of products of two int8 that float32 holds whatever their signs.
_EXACT_TERMS = 2**24 // 128**2


def widened_sums(
    lhs: Shaped[Array, "*lhs"], rhs: Shaped[Array, "*rhs"], window: Convolution
) -> Float[Array, "*out"]:
    """The convolution of two arrays that bfloat16 holds exactly, summed in float32."""
    precision = jax.lax.Precision.DEFAULT  # TF32, which holds them too
    return window(lhs.astype(jnp.bfloat16), rhs.astype(jnp.bfloat16), precision, jnp.float32)


def int8_sums(
    lhs: Int8[Array, "*lhs"], rhs: Int8[Array, "*rhs"], window: Convolution
) -> Float[Array, "*out"]:
    """The convolution of two arrays of int8: exact sums, as float32."""
    groups = max(window.feature_group_count, window.batch_group_count)
    if groups == 1:
        return _ungrouped(lhs, rhs, window)
    if window.terms <= _EXACT_TERMS:
        return widened_sums(lhs, rhs, window)
    cut = window.axes.lhs_spec[1 if window.feature_group_count > 1 else 0]
    lefts = jnp.split(lhs, groups, cut)
    rights = jnp.split(rhs, groups, window.axes.rhs_spec[0])
    one = replace(
        window,
        lhs_shape=lefts[0].shape,
        rhs_shape=rights[0].shape,
        feature_group_count=1,
        batch_group_count=1,
    )
    sums = [_ungrouped(x, w, one) for x, w in zip(lefts, rights, strict=True)]
    return jnp.concatenate(sums, window.axes.out_spec[1])


def _ungrouped(
    lhs: Int8[Array, "*lhs"], rhs: Int8[Array, "*rhs"], window: Convolution
) -> Float[Array, "*out"]:
    def sums(lhs: Array, rhs: Array) -> Array:
        # cuDNN's result is float32: XLA must see that nobody reads the integers.
        return window(lhs, rhs, None, jnp.int32).astype(jnp.float32)

    apart = custom_vmap(sums)

    @apart.def_vmap
    def _(axis_size, mapped, lhs, rhs):
        del axis_size
        if all(mapped):  # `jax.vmap` would make groups of them
            return jax.lax.map(lambda both: apart(*both), (lhs, rhs)), True
        return jax.vmap(sums, [0 if each else None for each in mapped])(lhs, rhs), True

    return apart(lhs, rhs)
