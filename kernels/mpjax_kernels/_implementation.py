"""Implementations of an operation, and the choice among them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import jax
import numpy as np
from jax.core import ShapedArray, Tracer
from jax.extend.core import Primitive
from jax.interpreters import mlir
from jaxtyping import Array

from ._native_or import native_or
from ._qtensor import QTensor, describe
from ._varying import vary_like

Operand = Array | QTensor

_NO_CALL = (
    "the program is for several devices, for another platform or for export, and cannot hold a "
    "native call"
)


@dataclass(frozen=True)
class _Run:
    """An implementation with its static arguments: hashable, so that it is compiled once."""

    function: Callable[..., Array]
    static: tuple
    options: tuple[tuple[str, Any], ...] = ()

    def __call__(self, *operands: Operand) -> Array:
        return self.function(*operands, *self.static, **dict(self.options))


@dataclass(frozen=True)
class Implementation:
    """One way to compute an operation.

    Attributes:
        refusal: Why it does not take these arguments (those of `run`), or None if it takes them.
        run: Computes the operation from its operands, arrays and QTensors without a layout, and
            static arguments.
        platforms: Where it runs, by the names of `jax.lax.platform_dependent`; empty: everywhere.
        is_native: Whether it calls kernels that XLA cannot look into, where a program may have
            such calls; they run on one platform.
        tuned: Of a native one: for a kind of device (None if it is not known) and the static
            arguments, further arguments of `run`; or, in a string, why those that come after it
            are to run there.
    """

    refusal: Callable[..., str | None]
    run: Callable[..., Array]
    platforms: tuple[str, ...] = ()
    is_native: bool = False
    tuned: Callable[..., Mapping[str, Any] | str] | None = None


def choose(
    table: Mapping[str, Implementation],
    implementation: str | Sequence[str] | None,
    operands: tuple[Operand, ...],
    *static: Any,
) -> Array:
    """Computes an operation by the first implementation that takes the operands.

    One that is bound to platforms becomes a branch for those, and the search goes on for the
    others. JAX takes the branch when it lowers the program, so a program compiled on a CPU for
    another platform is that platform's.

    Args:
        table: The implementations by name, in the order in which they are tried.
        implementation: None for the whole table, a name, or names in the order to try.
        operands: Arrays and QTensors, traced.
        *static: Further arguments of the implementation.

    Raises:
        ValueError: If a name is unknown.
        NotImplementedError: If none takes the operands; or, when the program is lowered, if none
            that does runs on the platform.
    """
    names = check_names(table, implementation)
    branches: dict[str, _Run] = {}
    reasons, everywhere = [], None
    for i, name in enumerate(names):
        reason = table[name].refusal(*operands, *static)
        run = _Run(table[name].run, static)
        if reason is not None:
            reasons.append(f"{name!r}: {reason}")
        elif table[name].is_native:
            rest = {other: table[other] for other in names[i + 1 :]}
            return _native(table[name], _Rest(name, tuple(rest.items()), static), operands)
        elif table[name].platforms:
            branches = {place: run for place in table[name].platforms} | branches
        else:
            everywhere = run
            break
    if everywhere is None and branches:
        reasons.insert(0, f"{', '.join(map(repr, names))} runs on {' and '.join(branches)} only")
    if not any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(operands)):
        return _now(branches, everywhere, operands, reasons)
    if branches:
        return _when_lowered(branches, everywhere, operands, reasons)
    if everywhere is None:
        raise NotImplementedError(_no_implementation(describe_all(operands), reasons))
    return everywhere(*operands)


@dataclass(frozen=True)
class _Rest:
    """The choice among the implementations that come after a native one."""

    name: str
    table: tuple[tuple[str, Implementation], ...]
    static: tuple
    reason: str = _NO_CALL

    def __call__(self, *operands: Operand) -> Array:
        if not self.table:
            reasons = [f"{self.name!r}: {self.reason}"]
            raise NotImplementedError(_no_implementation(describe_all(operands), reasons))
        return choose(dict(self.table), None, operands, *self.static)


@dataclass(frozen=True)
class _OfLeaves:
    """A function of operands as one of their leaves, with a tuple for its result."""

    function: _Run | _Rest
    tree: Any

    def __call__(self, *leaves: Array) -> tuple[Array]:
        return (self.function(*jax.tree.unflatten(self.tree, leaves)),)


@dataclass(frozen=True)
class _Tuned:
    """For a kind of device, a native implementation as it is tuned for that, or the rest."""

    native: Implementation
    rest: _Rest
    tree: Any

    def __call__(self, kind: str | None) -> _OfLeaves:
        assert self.native.tuned is not None
        found = self.native.tuned(kind, *self.rest.static)
        if isinstance(found, str):
            return _OfLeaves(replace(self.rest, reason=found), self.tree)
        run = _Run(self.native.run, self.rest.static, tuple(found.items()))
        return _OfLeaves(run, self.tree)


def _native(native: Implementation, rest: _Rest, operands: tuple[Operand, ...]) -> Array:
    """A native kernel where the program may have it, and otherwise the choice among the rest."""
    leaves, tree = jax.tree.flatten(operands)
    run = _Run(native.run, rest.static)
    result = jax.eval_shape(run, *operands)
    functions = _OfLeaves(run, tree), _OfLeaves(rest, tree)
    by_kind = None if native.tuned is None else _Tuned(native, rest, tree)
    platform = native.platforms[0]
    return native_or(*functions, [result], *leaves, platform=platform, by_kind=by_kind)[0]


def _now(
    branches: Mapping[str, _Run],
    everywhere: _Run | None,
    operands: tuple[Operand, ...],
    reasons: Sequence[str],
) -> Array:
    """Runs on values, on the platform where they are, compiled once for all calls like this."""
    platform = _platform(operands)
    run = branches.get(platform, everywhere)
    if run is None:
        place = platform if branches else None
        raise NotImplementedError(_no_implementation(describe_all(operands), reasons, place))
    return _compiled(run)(*operands)


def _when_lowered(
    branches: Mapping[str, _Run],
    everywhere: _Run | None,
    operands: tuple[Operand, ...],
    reasons: Sequence[str],
) -> Array:
    """A branch for each platform, and for the others `everywhere`, or an error."""
    others = everywhere
    if others is None:
        result = jax.eval_shape(next(iter(branches.values())), *operands)
        others = partial(_refuse, tuple(reasons), describe_all(operands), result)
    return jax.lax.platform_dependent(*operands, **branches, default=others)


def check_names(
    table: Mapping[str, Implementation], implementation: str | Sequence[str] | None
) -> tuple[str, ...]:
    """The names that `implementation` stands for.

    Raises:
        TypeError: If it is no name, sequence of names or None.
        ValueError: If one is not in the table.
    """
    known = tuple(table)
    if implementation is None:
        return known
    if not isinstance(implementation, Sequence):
        raise TypeError(
            f"`implementation` must be a name, a sequence of names or None, got "
            f"{implementation!r}: known are {sorted(table)}"
        )
    names = (implementation,) if isinstance(implementation, str) else tuple(implementation)
    if not names or not all(name in known for name in names):
        raise ValueError(f"unknown `implementation` {implementation!r}: known are {sorted(table)}")
    return names


def hashable(implementation: str | Sequence[str] | None) -> str | tuple[str, ...] | None:
    """Names that were checked, so that they can be a static argument."""
    given = implementation
    return given if given is None or isinstance(given, str) else tuple(given)


def describe_all(operands: tuple[Operand, ...]) -> str:
    """The operands in a message: `int8[3,8] by float32[8,5]`."""
    return " by ".join(map(describe, operands))


@lru_cache(maxsize=1024)
def _compiled(run: _Run) -> Callable[..., Array]:
    return jax.jit(run)


def _platform(operands: tuple[Operand, ...]) -> str:
    """Where values are, by the names of `jax.lax.platform_dependent`."""
    arrays = [leaf for leaf in jax.tree.leaves(operands) if isinstance(leaf, jax.Array)]
    platform = next(iter(arrays[0].devices())).platform if arrays else jax.default_backend()
    return "cuda" if platform == "gpu" else platform


def _no_implementation(operands: str, reasons: Sequence[str], platform: str | None = None) -> str:
    where = "" if platform is None else f" on {platform}"
    return f"no implementation allowed multiplies {operands}{where}: {'; '.join(reasons)}"


def _refuse(
    reasons: tuple[str, ...], named: str, result: jax.ShapeDtypeStruct, *operands: Operand
) -> Array:
    refused = _refuse_p.bind(
        reasons=reasons, operands=named, shape=result.shape, dtype=np.dtype(result.dtype)
    )
    return vary_like(refused, operands)


# A primitive and not an exception, because every branch is traced: only when the program is
# lowered is it known which of them is the platform's.
_refuse_p = Primitive("mpjax_kernels_refuse")


@_refuse_p.def_impl
def _refuse_eagerly(*, reasons: tuple[str, ...], operands: str, **_: Any) -> Array:
    raise NotImplementedError(_no_implementation(operands, reasons, jax.default_backend()))


@_refuse_p.def_abstract_eval
def _refuse_shape(*, shape: tuple[int, ...], dtype: np.dtype, **_: Any):
    return ShapedArray(shape, dtype)


def _refuse_lowering(ctx: Any, *, reasons: tuple[str, ...], operands: str, **_: Any):
    platforms = ctx.platforms or ctx.module_context.platforms
    raise NotImplementedError(_no_implementation(operands, reasons, ", ".join(platforms)))


mlir.register_lowering(_refuse_p, _refuse_lowering)
