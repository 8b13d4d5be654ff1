"""The einsum that wrapped layers dispatch to, under a quantized policy."""

from typing import Any

import jax
import jax.numpy as jnp

import mpjax_kernels as mk

from ._context import Product
from ._decisions import Decision
from ._prescaled import PreScaledWeight
from ._products import IN_8_BITS, Operand, QuantizedProduct, refuse_out_sharding


class QuantizedEinsum(QuantizedProduct):
    """`jnp.einsum(equation, activation, kernel)` in 8 bits; fields as `QuantizedDotGeneral`'s."""

    def __call__(
        self,
        equation: str,
        lhs: jax.Array,
        rhs: Operand,
        *,
        precision: Any = None,
        preferred_element_type: Any = None,
        out_sharding: Any = None,
    ) -> jax.Array:
        """Same arguments as `jnp.einsum` with two operands, the second the kernel."""
        refuse_out_sharding(out_sharding)
        lhs_axes, rhs_axes = mk.contracting_axes(equation, lhs.ndim, rhs.ndim)
        _, batch = mk.batch_axes(equation, lhs.ndim, rhs.ndim)
        summed = tuple(sorted(rhs_axes))
        size = self._size(lhs, rhs, rhs_axes, batch)
        self._observe(size, rhs, Product("kernel", tuple(rhs.shape), summed, batch=batch))
        options = {
            "precision": precision,
            "preferred_element_type": self._result_dtype(preferred_element_type),
        }
        decision = self._decision(rhs, summed, size)
        with decision.scope():
            return self._multiply(decision, equation, lhs, rhs, lhs_axes, rhs_axes, **options)

    def _multiply(
        self,
        decision: Decision,
        equation: str,
        lhs: jax.Array,
        rhs: Operand,
        lhs_axes: Any,
        rhs_axes: Any,
        **options: Any,
    ) -> jax.Array:
        if isinstance(rhs, mk.QTensor | PreScaledWeight):
            x, w = self._stored_operands(lhs, rhs, lhs_axes, rhs_axes)
            return mk.einsum(equation, x, w, implementation=IN_8_BITS, **options)
        observed = self._calibrating(lhs, rhs, lhs_axes, rhs_axes)
        if observed is not None:
            return jnp.einsum(equation, lhs, observed, **options)
        if decision.is_left:
            return jnp.einsum(equation, lhs, rhs.astype(lhs.dtype), **options)
        return self._trained(mk.quantized_einsum, equation, lhs, rhs, **options)
