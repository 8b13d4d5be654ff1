"""Implementations of an operation, and the choice among them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import mlir
from jaxtyping import Array

from ._qtensor import QTensor, describe

Operand = Array | QTensor


@dataclass(frozen=True)
class Implementation:
    """One way to compute an operation.

    Attributes:
        refusal: Why it does not take these arguments (those of `run`), or None if it takes them.
        run: Computes the operation from its operands, arrays and QTensors without a layout, and
            static arguments.
        platforms: Where it runs, by the names of `jax.lax.platform_dependent`; empty: everywhere.
    """

    refusal: Callable[..., str | None]
    run: Callable[..., Array]
    platforms: tuple[str, ...] = ()


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
    branches: dict[str, Callable[..., Array]] = {}
    reasons, everywhere = [], None
    for name in names:
        reason = table[name].refusal(*operands, *static)
        run = partial(_run, table[name].run, static)
        if reason is not None:
            reasons.append(f"{name!r}: {reason}")
        elif table[name].platforms:
            branches |= {platform: run for platform in table[name].platforms} | branches
        else:
            everywhere = run
            break
    if not branches:
        if everywhere is None:
            raise NotImplementedError(_no_implementation(operands, reasons))
        return everywhere(*operands)
    if everywhere is None:
        platforms = f"{', '.join(map(repr, names))} runs on {' and '.join(branches)} only"
        result = jax.eval_shape(next(iter(branches.values())), *operands)
        everywhere = partial(_refuse, (platforms, *reasons), describe_all(operands), result)
    return jax.lax.platform_dependent(*operands, **branches, default=everywhere)


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


def describe_all(operands: tuple[Operand, ...]) -> str:
    """The operands in a message: `int8[3,8] by float32[8,5]`."""
    return " by ".join(map(describe, operands))


def _run(run: Callable[..., Array], static: tuple, *operands: Operand) -> Array:
    return run(*operands, *static)


def _no_implementation(operands: tuple[Operand, ...], reasons: Sequence[str]) -> str:
    return f"no implementation allowed multiplies {describe_all(operands)}: {'; '.join(reasons)}"


def _refuse(
    reasons: tuple[str, ...], operands: str, result: jax.ShapeDtypeStruct, *_: Operand
) -> Array:
    return _refuse_p.bind(
        reasons=reasons, operands=operands, shape=result.shape, dtype=np.dtype(result.dtype)
    )


# A primitive and not an exception, because every branch is traced: only when the program is
# lowered is it known which of them is the platform's.
_refuse_p = Primitive("mpjax_kernels_refuse")


@_refuse_p.def_impl
def _refuse_eagerly(*, reasons: tuple[str, ...], operands: str, **_: Any) -> Array:
    raise NotImplementedError(
        f"no implementation allowed multiplies {operands} on {jax.default_backend()}: "
        + "; ".join(reasons)
    )


@_refuse_p.def_abstract_eval
def _refuse_shape(*, shape: tuple[int, ...], dtype: np.dtype, **_: Any):
    return ShapedArray(shape, dtype)


def _refuse_lowering(ctx: Any, *, reasons: tuple[str, ...], operands: str, **_: Any):
    platforms = ctx.platforms or ctx.module_context.platforms
    raise NotImplementedError(
        f"no implementation allowed multiplies {operands} on {', '.join(platforms)}: "
        + "; ".join(reasons)
    )


mlir.register_lowering(_refuse_p, _refuse_lowering)
