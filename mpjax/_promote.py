"""What stands in for a layer's `promote_dtype` around a quantized product."""

import dataclasses
from typing import Any

import jax.numpy as jnp


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
                f"{inputs.shape}: an 8-bit product is real. Give the layer a float policy"
            )
        bias = None if bias is None else jnp.asarray(bias, self.dtype)
        return inputs.astype(self.dtype), kernel, bias
