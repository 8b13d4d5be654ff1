"""The quantized products that wrapped layers dispatch to: pure functions in dataclasses' clothing.

A Dense, DenseGeneral or attention projection computes `y = x @ w`. Under an int8 policy (w8a8):

  x_q, x_s = quantize(x)   int8, one float32 scale per row: amax over the contracting axes / 127,
                           taken anew at every call (dynamic), after the cast to the compute dtype
  w_q, w_s = quantize(w)   int8, one float32 scale per output channel; done once by `mp.quantize`,
                           or here when the weight still is a float array
  y = (x_q @ w_q) * x_s * w_s     int8 x int8 accumulates in int32; scales after the dot, in float32

The objects are frozen and hashable, because Flax hashes a layer's fields under `nn.jit`.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

import mpjax_kernels as mk

from ._context import Product, active

Operand = jax.Array | mk.QTensor

# All but "reference": int8 x int8 or an error, and never a float32 product in silence.
_IN_INT8 = ("cpu", "gpu", "xla")


def _observe(path: str | None, kernel: Operand, contracting: tuple[int, ...]) -> None:
    frame = active.value
    if path is not None and frame is not None and frame.observation is not None:
        product = Product(tuple(kernel.shape), tuple(sorted(contracting)))
        known = frame.observation.products.setdefault(path, product)
        if known.contracting != product.contracting:
            raise NotImplementedError(
                f"layer '{path}' contracts its kernel over axes {known.contracting} in one call "
                f"and over {product.contracting} in another; one int8 weight cannot have a scale "
                "per output channel for both: give the layer a policy that is not quantized"
            )


def _refuse_out_sharding(out_sharding: Any) -> None:
    if out_sharding is not None:
        raise NotImplementedError(
            f"`out_sharding` = {out_sharding} on an int8 layer is not built yet; constrain the "
            "output with `jax.lax.with_sharding_constraint`, or leave this layer unquantized"
        )


@dataclasses.dataclass(frozen=True)
class Int8DotGeneral:
    """`lax.dot_general(activation, kernel)` in int8; the kernel an array or an int8 `QTensor`.

    Attributes:
      compute_dtype: dtype of the result, unless `preferred_element_type` asks for another.
      path: the layer's path, under which the product is reported to `observe`; None: not reported.
    """

    compute_dtype: str
    path: str | None = None

    def __call__(
        self,
        lhs: jax.Array,
        rhs: Operand,
        dimension_numbers: Any,
        precision: Any = None,
        preferred_element_type: Any = None,
        out_sharding: Any = None,
    ) -> jax.Array:
        """Same arguments as `jax.lax.dot_general`; int8 products are exact whatever `precision`."""
        _refuse_out_sharding(out_sharding)
        (lhs_axes, rhs_axes), _ = dimension_numbers
        _observe(self.path, rhs, tuple(rhs_axes))
        if not isinstance(rhs, mk.QTensor):
            rhs = mk.quantize(rhs, "int8", axis=tuple(rhs_axes))
        lhs_q = mk.quantize(lhs, "int8", axis=tuple(lhs_axes))
        return mk.dot_general(
            lhs_q,
            rhs,
            dimension_numbers,
            precision=precision,
            preferred_element_type=jnp.dtype(preferred_element_type or self.compute_dtype),
            implementation=_IN_INT8,
        )


@dataclasses.dataclass(frozen=True)
class Int8Einsum:
    """`jnp.einsum(equation, activation, kernel)` in int8; fields as `Int8DotGeneral`'s."""

    compute_dtype: str
    path: str | None = None

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
        _refuse_out_sharding(out_sharding)
        lhs_axes, rhs_axes = mk.contracting_axes(equation, lhs.ndim, rhs.ndim)
        _observe(self.path, rhs, rhs_axes)
        if not isinstance(rhs, mk.QTensor):
            rhs = mk.quantize(rhs, "int8", axis=rhs_axes)
        lhs_q = mk.quantize(lhs, "int8", axis=lhs_axes)
        return mk.einsum(
            equation,
            lhs_q,
            rhs,
            precision=precision,
            preferred_element_type=jnp.dtype(preferred_element_type or self.compute_dtype),
            implementation=_IN_INT8,
        )


@dataclasses.dataclass(frozen=True)
class PromoteAroundKernel:
    """A layer's `promote_dtype(inputs, kernel, bias)` that leaves the kernel as it is stored.

    A kernel that is not quantized yet is quantized from its master copy, so that the outputs are
    those of the quantized variables, bit for bit.

    Attributes:
      dtype: name of the dtype that inputs (integers too, as Flax does) and bias are cast to.
      variadic: Linen passes the arrays one by one, NNX passes one tuple.
    """

    dtype: str
    variadic: bool

    def __call__(self, *args: Any, dtype: Any = None, inexact: bool = True) -> tuple[Any, ...]:
        """Casts; the layer's own `dtype` argument is what this object stands in for."""
        del dtype, inexact
        inputs, kernel, bias = args if self.variadic else args[0]
        inputs = jnp.asarray(inputs)
        if jnp.issubdtype(inputs.dtype, jnp.complexfloating):
            raise TypeError(
                f"a layer with a quantized policy got {inputs.dtype} inputs of shape "
                f"{inputs.shape}: an int8 product is real. Give the layer a float policy"
            )
        bias = None if bias is None else jnp.asarray(bias, self.dtype)
        return inputs.astype(self.dtype), kernel, bias
