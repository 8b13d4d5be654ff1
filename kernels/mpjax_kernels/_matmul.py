"""matmul: an einsum whose equation follows from the ranks."""

from collections.abc import Sequence

import jax
import numpy as np
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array

from ._einsum import einsum
from ._qtensor import QTensor


def matmul(
    a: ArrayLike | QTensor,
    b: ArrayLike | QTensor,
    *,
    precision: jax.lax.PrecisionLike = None,
    preferred_element_type: DTypeLike | None = None,
    implementation: str | Sequence[str] | None = None,
) -> Array:
    """`jnp.matmul` of two operands that may be quantized.

    Args:
        a: An array or a QTensor of shape [..., M, K] or [K].
        b: An array or a QTensor of shape [..., K, N] or [K].
        precision: As in `dot_general`.
        preferred_element_type: As in `dot_general`.
        implementation: As in `dot_general`.

    Returns:
        An array of shape [..., M, N], without M if `a` is 1-D and without N if `b` is; the
        leading axes broadcast.

    Raises:
        ValueError: If an operand has no axes, or the shapes do not go together.
        NotImplementedError: For the reasons of `dot_general`.
    """
    if np.ndim(a) == 0 or np.ndim(b) == 0:
        raise ValueError(f"matmul needs axes: `a` has {np.ndim(a)} and `b` has {np.ndim(b)}")
    left = "k" if np.ndim(a) == 1 else "...mk"
    right = "k" if np.ndim(b) == 1 else "...kn"
    sizes = np.shape(a)[-1], np.shape(b)[-1 if np.ndim(b) == 1 else -2]
    if sizes[0] != sizes[1]:  # in an einsum a size of 1 would broadcast
        raise ValueError(
            f"`a` has shape {np.shape(a)} but `b` has {np.shape(b)}: "
            f"contracting {sizes[0]} with {sizes[1]}"
        )
    out = "..." + "m" * (np.ndim(a) > 1) + "n" * (np.ndim(b) > 1)
    return einsum(
        f"{left},{right}->{out}",
        a,
        b,
        precision=precision,
        preferred_element_type=preferred_element_type,
        implementation=implementation,
    )
