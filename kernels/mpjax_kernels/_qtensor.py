"""The quantized tensor: small values, and the scales that give them their size back."""

import math
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Shaped

from ._derivative import without_derivative
from ._formats import Format, get_format
from ._indexing import full_index, scale_index

_REMEDY = (
    "use mpjax_kernels.dot_general / matmul / einsum, "
    "or dequantize it with mpjax_kernels.dequantize. "
    "(A weight that mpjax.quantize made is applied by the model as mpjax.wrap returned it.)"
)

_NO_DERIVATIVE = (
    "the values of a QTensor have no derivative: they come from rounding, which is flat, and their "
    "dtype has no room for one. Differentiate the model before it is quantized, or with respect to "
    "other arguments"
)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False, repr=False)
class QTensor:
    """A tensor `x ~ values * scale`, as `quantize` makes it.

    Invariants, checked by `validate` and not on construction, since JAX also builds this class
    around tracers, `ShapeDtypeStruct`s, shardings and None:

    - `values` has the storage dtype of a known format and the shape of the tensor;
    - `values` are finite and `|values| <= format.max`: int8 never holds -128, int4 never -8;
    - `scale` is float32 and has the rank of `values`;
    - along each axis, `scale` has size 1 (the axis shares a scale), the size of `values` (a
      scale per entry) or a divisor of it (a scale per group of neighbours);
    - `scale` is positive, or NaN where the tensor was not finite.

    An axis that `jax.vmap` or `jax.lax.scan` maps over must have a scale per entry, as in
    `quantize(w, axis=1)` for a stack of weights `w` of shape [layers, K, N].

    Attributes:
        values: The stored numbers.
        scale: What they are multiplied by.
        dtype: The logical dtype: the dtype that `dequantize` returns (static).
    """

    values: Shaped[Array, "*shape"]
    scale: Float[Array, "*scales"]
    dtype: np.dtype = field(metadata={"static": True})

    @property
    def format(self) -> Format:
        """The format of the stored values."""
        return get_format(self.values.dtype.name)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the tensor, that of `values`."""
        return self.values.shape

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """The bytes of `values` and `scale` together, two int4 values to a byte.

        What the format needs, not what a backend allocates: it may unpack int4 in memory.
        """
        return -(-self.size * self.format.bits // 8) + 4 * math.prod(self.scale.shape)

    @property
    def T(self) -> "QTensor":
        """The tensor with its axes reversed."""
        return self.transpose()

    def transpose(self, *axes: Any) -> "QTensor":
        """The tensor with its axes permuted, as `numpy.ndarray.transpose`."""
        order = axes[0] if len(axes) == 1 and not isinstance(axes[0], int) else axes or None
        return replace(
            self,
            values=jnp.transpose(self.values, order),
            scale=jnp.transpose(self.scale, order),
        )

    def __getitem__(self, index: Any) -> "QTensor":
        """Basic indexing: ints, slices, None and Ellipsis. `q[...]` is `q` itself.

        Raises:
            TypeError: If `index` is an array of indices or a mask.
            NotImplementedError: If an axis with one scale per group is cut inside a group.
        """
        if index is Ellipsis:
            return self
        index = full_index(index, self.shape)
        at = scale_index(index, self.shape, self.scale.shape)
        return replace(self, values=self.values[index], scale=self.scale[at])

    def __repr__(self) -> str:
        return f"QTensor({describe(self.values)}, scale {describe(self.scale)})"

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise TypeError(f"{self!r} cannot be used as an array: {_REMEDY}")

    # NumPy and JAX ask for these when they meet a foreign object; an operator with a Python
    # number asks only the object itself.
    __array__ = __jax_array__ = __iter__ = __neg__ = __abs__ = _refuse
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = _refuse
    __truediv__ = __rtruediv__ = __pow__ = __rpow__ = __matmul__ = __rmatmul__ = _refuse
    __lt__ = __le__ = __gt__ = __ge__ = __bool__ = __float__ = __int__ = _refuse


def validate(q: QTensor) -> None:
    """Checks what can be checked of a QTensor's invariants without looking at its numbers.

    Raises:
        TypeError: If `values` has the dtype of no known format, `scale` is not float32, or
            the logical dtype is not floating.
        ValueError: If the shape of `scale` does not fit that of `values`.
    """
    try:
        get_format(q.values.dtype.name)
    except ValueError as error:
        raise TypeError(f"`values` of {q!r} is stored in no known format: {error}") from None
    if q.scale.dtype != jnp.float32:
        raise TypeError(f"`scale` of {q!r} must be float32")
    if not jnp.issubdtype(q.dtype, jnp.floating):
        raise TypeError(f"`dtype` of {q!r} must be floating, got {q.dtype}")
    if len(q.scale.shape) != q.ndim or not all(map(_fits, q.shape, q.scale.shape)):
        raise ValueError(
            f"`scale` of {q!r} must have the rank of `values`, "
            "and along each axis size 1, the size of `values` or a divisor of it"
        )


def decode(q: QTensor, dtype: DTypeLike) -> Float[Array, "*shape"]:
    """The values, without the scale, in a wider floating dtype; a derivative is refused."""
    convert = partial(jnp.asarray, dtype=dtype)
    if not q.format.is_integer:  # integers cannot carry a derivative
        convert = without_derivative(convert, _NO_DERIVATIVE)
    return convert(q.values)


def expand_scale(q: QTensor) -> Float[Array, "*scales"]:
    """The scale with every group spelled out: each axis has size 1 or that of the values."""
    scale = q.scale
    for axis, (size, scales) in enumerate(zip(q.shape, scale.shape, strict=True)):
        if scales not in (1, size):
            scale = jnp.repeat(scale, size // scales, axis=axis)
    return scale


def _fits(size: int, scales: int) -> bool:
    return scales in (1, size) or (scales > 0 and size % scales == 0)


def describe(leaf: Any) -> str:
    """A short name for an array in a message, e.g. `int8[256,512]`; a QTensor's repr."""
    if isinstance(leaf, QTensor):
        return repr(leaf)
    if hasattr(leaf, "shape") and hasattr(leaf, "dtype"):
        return f"{leaf.dtype.name}[{','.join(map(str, leaf.shape))}]"
    return type(leaf).__name__  # a sharding, None, or whatever else a tree.map put there
