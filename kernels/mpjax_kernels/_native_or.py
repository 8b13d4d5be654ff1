"""A choice that is made when a program is lowered: a kernel of ours, or what XLA can compute.

Only then is it known what the program is for. XLA cannot partition a call of ours, so a program
for several devices has none (but inside of `jax.shard_map`, where every device runs its own); an
exported one has none, because it would not run elsewhere; and other platforms never have one.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import jax
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir
from jax.sharding import AxisType
from jaxtyping import Array

from ._varying import vary_like


def native_or(
    native: Callable[..., tuple[Array, ...]],
    otherwise: Callable[..., tuple[Array, ...]],
    results: Sequence[jax.ShapeDtypeStruct],
    *operands: Array,
    all_mapped: bool = False,
    platform: str = "cpu",
    by_kind: Callable[[str | None], Callable[..., tuple[Array, ...]]] | None = None,
) -> tuple[Array, ...]:
    """`native(*operands)` where it can run, else `otherwise(*operands)`.

    Args:
        native: Computes arrays by calls of kernels that XLA cannot look into; hashable.
        otherwise: Computes the same without; hashable.
        results: The shapes and dtypes of what both return.
        *operands: Arrays.
        platform: Where they run.
        all_mapped: Whether `jax.vmap` takes `otherwise` unless it maps all operands.
        by_kind: Gives what is to run in place of `native` on a kind of device: a `device_kind`, or
            None, if it is not known or under `jax.vmap`; hashable.
    """
    shapes = tuple((tuple(r.shape), jax.numpy.dtype(r.dtype)) for r in results)
    options = {"native": native, "otherwise": otherwise, "results": shapes}
    out = _native_or_p.bind(
        *operands, **options, all_mapped=all_mapped, platform=platform, by_kind=by_kind
    )
    return tuple(vary_like(each, operands) for each in out)


def has_explicit_axes() -> bool:
    """Whether the mesh that this is traced under has axes whose sharding is part of types."""
    return AxisType.Explicit in jax.sharding.get_abstract_mesh().axis_types


def is_partly_manual() -> bool:
    """Whether this is traced in a `shard_map` over some axes of the mesh and not over others."""
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and 0 < len(mesh.manual_axes) < len(mesh.axis_names)


_native_or_p = Primitive("mpjax_kernels_native_or")
_native_or_p.multiple_results = True


@dataclass(frozen=True)
class _Mapped:
    """A function under `jax.vmap`, whose results are all mapped."""

    function: Callable[..., tuple[Array, ...]]
    axes: tuple[int | None, ...]

    def __call__(self, *operands: Array) -> tuple[Array, ...]:
        return jax.vmap(self.function, self.axes)(*operands)


@cache
def _compiled(params: tuple[tuple[str, Any], ...]) -> Callable[..., Any]:
    return jax.jit(partial(_native_or_p.bind, **dict(params)))


@_native_or_p.def_impl
def _run(*operands: Array, **params: Any):
    return _compiled(tuple(params.items()))(*operands)


@_native_or_p.def_abstract_eval
def _shapes(*_: Any, results: tuple, **__: Any):
    return [ShapedArray(shape, dtype) for shape, dtype in results]


def _batch(operands, axes, *, native, otherwise, results, all_mapped, platform, by_kind):
    axes = tuple(a if isinstance(a, int) else None for a in axes)
    native = native if by_kind is None else by_kind(None)
    if all_mapped and None in axes:
        return jax.vmap(otherwise, axes)(*operands), (0,) * len(results)
    size = next(x.shape[a] for x, a in zip(operands, axes, strict=True) if a is not None)
    mapped = tuple(((size, *shape), dtype) for shape, dtype in results)
    functions = {"native": _Mapped(native, axes), "otherwise": _Mapped(otherwise, axes)}
    options = {"results": mapped, "all_mapped": all_mapped, "platform": platform, "by_kind": None}
    out = _native_or_p.bind(*operands, **functions, **options)
    return out, (0,) * len(results)


batching.primitive_batchers[_native_or_p] = _batch


def _lower(
    ctx: Any, *operands: Any, native: Any, otherwise: Any, platform: str, by_kind: Any, **_: Any
):
    if not _runs_here(ctx, platform):
        function = otherwise
    else:
        function = native if by_kind is None else by_kind(_device_kind(ctx, platform))
    return mlir.lower_fun(function, multiple_results=True)(ctx, *operands)


def _device_kind(ctx: Any, platform: str) -> str | None:
    """What JAX calls the devices that are compiled for; None if it has none of this platform.

    The backend is theirs, be they at hand or a topology to compile for, and is in the key of JAX's
    cache of lowered programs. (It tells the devices themselves to primitives of its own only.)
    """
    backend = ctx.module_context.backend
    devices = () if backend is None else backend.devices()
    return devices[0].device_kind if devices and devices[0].platform == platform else None


def _runs_here(ctx: Any, platform: str) -> bool:
    """Whether what is lowered is for one such device, or for one at a time, of this process."""
    module = ctx.module_context
    if (
        tuple(ctx.platforms or module.platforms) != (platform,)
        or module.lowering_parameters.for_export
    ):
        return False
    mesh = getattr(module.axis_context, "mesh", None)
    if mesh is None:  # a program under `jax.jit`, outside of `jax.shard_map`
        return getattr(module.axis_context, "num_devices", None) == 1
    return mesh.size == 1 or set(mesh.axis_names) == set(module.axis_context.manual_axes)


mlir.register_lowering(_native_or_p, _lower)
