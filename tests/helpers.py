"""What several test modules share."""

import concurrent.futures
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.extend.core as jex
import numpy as np


def assert_trees_equal(actual: Any, expected: Any) -> None:
    """Same structure, dtypes and values, bit for bit (NaN equals NaN)."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True
    ):
        assert a.dtype == b.dtype, (path, a.dtype, b.dtype)
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b), err_msg=str(path))


def equations(jaxpr: Any) -> Iterator[Any]:
    """Every equation of a jaxpr, those of inner jaxprs (jit, scan, remat, custom rules) too.

    Of the branches of `jax.lax.platform_dependent`, the one that this machine takes; of a native
    kernel, what a program computes that cannot have it.
    """
    for equation in jaxpr.eqns:
        yield equation
        params = dict(equation.params)
        if equation.primitive.name == "mpjax_kernels_native_or":
            operands = [v.aval for v in equation.invars]
            params["otherwise"] = jax.make_jaxpr(params["otherwise"])(*operands)
        platforms = params.get("branches_platforms")
        if platforms is not None:
            taken = next(i for i, p in enumerate(platforms) if p is None or "cpu" in p)
            params["branches"] = params["branches"][taken]
        for value in jax.tree.leaves(
            list(params.values()), is_leaf=lambda x: isinstance(x, jex.Jaxpr | jex.ClosedJaxpr)
        ):
            if isinstance(value, jex.ClosedJaxpr):
                yield from equations(value.jaxpr)
            elif isinstance(value, jex.Jaxpr):
                yield from equations(value)


def dot_dtypes(function: Any, *args: Any) -> list[tuple[str, str]]:
    """Operand dtypes of every dot_general that `function(*args)` traces to."""
    jaxpr = jax.make_jaxpr(lambda *args: function(*args))(*args).jaxpr  # JAX caches by function
    return [
        tuple(v.aval.dtype.name for v in eqn.invars)  # pyright: ignore
        for eqn in equations(jaxpr)
        if eqn.primitive.name == "dot_general"
    ]


def in_a_thread(function: Callable[[], Any]) -> Any:
    """What `function()` returns in a new thread."""
    with concurrent.futures.ThreadPoolExecutor(1) as executor:
        return executor.submit(function).result(timeout=60)
