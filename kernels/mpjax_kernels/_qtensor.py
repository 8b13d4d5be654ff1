"""The quantized tensor: small values, and the scales that give them their size back."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int8, Shaped

from ._formats import Format, get_format
from ._granularity import fits
from ._indexing import full_index, scale_index
from ._layout import Layout, Tiles, is_layout, is_tiles, joined, positions, stored_axes, whole_shape

_REMEDY = (
    "use mpjax_kernels.dot_general / matmul / einsum, "
    "or dequantize it with mpjax_kernels.dequantize. "
    "(A weight that mpjax.quantize made is applied by the model as mpjax.wrap returned it.)"
)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False, repr=False)
class QTensor:
    """A tensor `x ~ (values - zero_point) * scale`, as `quantize` makes it.

    Invariants, checked by `validate` and not on construction, since JAX also builds this class
    around tracers, `ShapeDtypeStruct`s, shardings and None:

    - `values` has the storage dtype of a known format and, but for `layout` and `tiles`, the shape
      of the tensor;
    - `values` are finite and `|values| <= format.max`; only beside a zero point does int8 hold
      -128 and int4 -8;
    - `scale` is float32 and has the rank of the tensor;
    - along each axis, `scale` has size 1 (the axis shares a scale), the size of the tensor (a
      scale per entry) or a divisor of it (a scale per group of neighbours);
    - `scale` is positive, or NaN where the tensor was not finite;
    - `zero_point` is None (zero, everywhere) or int8 of the shape of `scale`, and then the format
      is an integer one;
    - `layout` is None or the trailing axes, each once, counted from the end;
    - `tiles` cuts axes that are in `layout`, into tiles of a size that divides them.

    An axis that `jax.vmap` or `jax.lax.scan` maps over must have a scale per entry, as in
    `quantize(w, axis=1)` for a stack of weights `w` of shape [layers, K, N], and no place in
    `layout`.

    Attributes:
        values: The stored numbers.
        scale: What they are multiplied by.
        dtype: The logical dtype: the dtype that `dequantize` returns (static).
        zero_point: The value that stands for zero.
        layout: The order in which the trailing axes of `values` are stored (static): `(-1, -2)`
            for a weight of shape [K, N] stored as [N, K]. `scale` and `zero_point` keep the
            order of the tensor. See `contiguous`.
        tiles: The axes that are cut into tiles, counted from the end, each with the size of a tile,
            whose entries come last in `values` (static). See `prepacked`.
    """

    values: Shaped[Array, "*stored"]
    scale: Float[Array, "*scales"]
    dtype: np.dtype = field(metadata={"static": True})
    zero_point: Int8[Array, "*scales"] | None = None
    layout: Layout = field(default=None, metadata={"static": True})
    tiles: Tiles = field(default=(), metadata={"static": True})

    @property
    def format(self) -> Format:
        """The format of the stored values; TypeError if their dtype is that of none."""
        try:
            return get_format(self.values.dtype.name)
        except ValueError:
            raise TypeError(
                f"the values of {self!r} are of no known format, as after "
                "`jax.tree.map(lambda x: x.astype(...), variables)`: cast floats before they are "
                "quantized, or leave QTensors out"
            ) from None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the tensor."""
        return whole_shape(self.values.shape, self.layout, self.tiles)

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return len(self.values.shape) - len(self.tiles)

    @property
    def stored_axes(self) -> tuple[int, ...]:
        """The axes of the tensor in the order in which `values` has them, those of tiles aside."""
        return stored_axes(self.layout, self.ndim)

    @property
    def size(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """The bytes of `values`, `scale` and `zero_point` together, two int4 values to a byte.

        What the format needs, not what a backend allocates: it may unpack int4 in memory.
        """
        per_scale = 4 if self.zero_point is None else 5
        return -(-self.size * self.format.bits // 8) + per_scale * math.prod(self.scale.shape)

    @property
    def T(self) -> "QTensor":
        """The tensor with its axes reversed."""
        return self.transpose()

    def transpose(self, *axes: Any) -> "QTensor":
        """The tensor with its axes permuted, as `numpy.ndarray.transpose`, stored in that order."""
        order = axes[0] if len(axes) == 1 and not isinstance(axes[0], int) else axes or None
        return _each(partial(jnp.transpose, axes=order), in_order(self))

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
        source = self if _keeps(index, self.layout) else in_order(self)
        zero_point = None if self.zero_point is None else self.zero_point[at]
        return replace(
            source, values=source.values[index], scale=self.scale[at], zero_point=zero_point
        )

    def __repr__(self) -> str:
        values = self.values
        if self.layout is not None:
            values = jax.ShapeDtypeStruct(self.shape, values.dtype)
        parts = [describe(values), f"scale {describe(self.scale)}"]
        if self.zero_point is not None:
            parts.append(f"zero_point {describe(self.zero_point)}")
        if self.layout is not None:
            parts.append(f"layout {self.layout}")
        if self.tiles:
            parts.append(f"tiles {self.tiles}")
        return f"QTensor({', '.join(parts)})"

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise TypeError(f"{self!r} cannot be used as an array: {_REMEDY}")

    # NumPy and JAX ask for these when they meet a foreign object; an operator with a Python
    # number asks only the object itself.
    __array__ = __jax_array__ = __iter__ = __neg__ = __pos__ = __abs__ = _refuse
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = _refuse
    __truediv__ = __rtruediv__ = __pow__ = __rpow__ = __matmul__ = __rmatmul__ = _refuse
    __floordiv__ = __rfloordiv__ = __mod__ = __rmod__ = __divmod__ = __rdivmod__ = _refuse
    __lt__ = __le__ = __gt__ = __ge__ = __bool__ = __float__ = __int__ = _refuse


def validate(q: QTensor) -> None:
    """Checks what can be checked of a QTensor's invariants without looking at its numbers.

    Raises:
        TypeError: If `q` is no QTensor, `values` has the dtype of no known format, `scale` is not
            float32, `zero_point` not int8, or the logical dtype is not floating.
        ValueError: If the shape of `scale` or `zero_point`, or `layout`, does not fit `values`.
    """
    if not isinstance(q, QTensor):
        raise TypeError(f"`q` must be a QTensor, got {describe(q)}: quantize it first")
    if not is_layout(q.layout, q.ndim):
        raise ValueError(
            f"`layout` {q.layout} of a tensor of {q.ndim} axes must hold its trailing axes, each "
            "once, counted from the end, as in (-1, -2)"
        )
    sizes = tuple(size for _, size in q.tiles)
    if not is_tiles(q.tiles, q.layout) or tuple(q.values.shape[q.ndim :]) != sizes:
        raise ValueError(
            f"`tiles` {q.tiles} of {describe(q.values)} must name axes of `layout` {q.layout}, "
            "each once, with the size that `values` has last, as in ((-1, 16), (-2, 4))"
        )
    try:
        get_format(q.values.dtype.name)
    except ValueError as error:
        raise TypeError(f"`values` of {q!r} is stored in no known format: {error}") from None
    if q.scale.dtype != jnp.float32:
        raise TypeError(f"`scale` of {q!r} must be float32")
    if not jnp.issubdtype(q.dtype, jnp.floating):
        raise TypeError(f"`dtype` of {q!r} must be floating, got {q.dtype}")
    if len(q.scale.shape) != q.ndim or not all(map(fits, q.shape, q.scale.shape)):
        raise ValueError(
            f"`scale` of {q!r} must have the rank of `values`, "
            "and along each axis size 1, the size of `values` or a divisor of it"
        )
    if q.zero_point is not None:
        if q.zero_point.dtype != jnp.int8 or not q.format.is_integer:
            raise TypeError(f"`zero_point` of {q!r} must be int8, beside integer values")
        if q.zero_point.shape != q.scale.shape:
            raise ValueError(f"`zero_point` of {q!r} must have the shape of `scale`")


def in_order(q: QTensor) -> QTensor:
    """The same tensor, stored in the order of its axes."""
    if q.layout is None:
        return q
    values = joined(q.values, q.layout, q.tiles)
    values = jnp.transpose(values, positions(stored_axes(q.layout, q.ndim)))
    return replace(q, values=values, layout=None, tiles=())


def without_tiles(q: QTensor) -> QTensor:
    """The same tensor in the same layout, in no tiles."""
    return q if not q.tiles else replace(q, values=joined(q.values, q.layout, q.tiles), tiles=())


def _each(change: Callable[[Array], Array], q: QTensor) -> QTensor:
    zero_point = None if q.zero_point is None else change(q.zero_point)
    return replace(q, values=change(q.values), scale=change(q.scale), zero_point=zero_point)


def _keeps(index: tuple, layout: Layout) -> bool:
    """Whether a full index leaves every axis that the layout names as it is."""
    return layout is None or all(item == slice(None) for item in index[-len(layout) :])


def describe(leaf: Any) -> str:
    """A short name for an array in a message, e.g. `int8[256,512]`; a QTensor's repr."""
    if isinstance(leaf, QTensor):
        return repr(leaf)
    if hasattr(leaf, "shape") and hasattr(leaf, "dtype"):
        return f"{leaf.dtype.name}[{','.join(map(str, leaf.shape))}]"
    return type(leaf).__name__  # a sharding, None, or whatever else a tree.map put there
