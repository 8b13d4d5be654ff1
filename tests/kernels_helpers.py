"""What the tests of the kernels share: inputs, compiled calls and exact values."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

import mpjax_kernels as mk
from mpjax_kernels._dot_general import IMPLEMENTATIONS

U = 2.0**-24  # float32 rounds with a relative error of at most U


# The implementations of dot_general that run on a CPU and take any format; "native" is for 8 bits.
HERE = [
    name
    for name, i in IMPLEMENTATIONS.items()
    if not i.is_native and (not i.platforms or "cpu" in i.platforms)
]


def normal(*shape: int) -> jax.Array:
    """Random numbers from NumPy: jax.random would compile a program for every shape."""
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape, np.float32))


@functools.partial(jax.jit, static_argnums=(2, 3))
def quantize_both(x, w, x_axis=None, w_axis=None) -> tuple[mk.QTensor, mk.QTensor]:
    return mk.quantize(x, axis=x_axis), mk.quantize(w, axis=w_axis)


# One compiled program instead of one per operation: eager dispatch is slow on a cold cache.
quantize = jax.jit(mk.quantize, static_argnames=("format", "axis", "group_size", "symmetric"))
matmul = jax.jit(mk.matmul, static_argnames=("implementation", "preferred_element_type"))


def exact(q: mk.QTensor) -> np.ndarray:
    """The number that a QTensor stands for, without the float32 rounding of dequantize."""
    return np.asarray(q.values, np.float64) * np.asarray(q.scale, np.float64)
