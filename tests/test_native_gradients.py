"""Gradients come from native CPU kernels, as the product does: how many calls, and which numbers.

Where equality is asserted, operands are integers whose amax along every axis is 127 (int8), or 7
and so of three bits (float8: E4M3 and E5M2 end at 7 times a power of two). Then scales are powers
of two, nothing is rounded, float32 sums are exact, and derivatives are those of the integers.
"""

import re
from collections import Counter
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import mpjax as mp
import mpjax_kernels as mk
from mpjax_kernels._native_library import native_refusal
from tests.kernels_helpers import U, normal
from tests.native_helpers import MATRIX
from tests.scaling_helpers import LinenLoop, linen_step, mean_squared_error

FLOAT8, INT8, BY_ARRAY = "mpjax_float8_dot", "mpjax_int8_dot", "mpjax_weight_dot"
AMAX = {"float8": 7, "int8": 127}
NEEDS = {"float8": "float8_e4m3fn", "int8": "int8"}


def case(family: str, *values: Any, slow: bool = False) -> Any:
    """A case that needs native kernels of a family of formats."""
    refusal = native_refusal(NEEDS[family])
    needs = pytest.mark.skipif(refusal is not None, reason=f"no native {family} here: {refusal}")
    return pytest.param(family, *values, marks=[needs, pytest.mark.slow] if slow else [needs])


def products(compiled: Any) -> tuple[Counter, int]:
    """The native products of a program, by name, and how many dots XLA computes itself."""
    text = str(compiled.as_text())
    calls = re.findall(r'custom_call_target="(mpjax_\w+_dot)"', text)
    return Counter(calls), len(re.findall(r" (?:dot|convolution)\(", text))


def integers(amax: int, *shape: int) -> np.ndarray:
    """float32 integers whose amax is this one, of them all and along any of the axes."""
    x = np.random.default_rng(sum(shape)).integers(-amax, amax + 1, shape)
    return np.where(np.indices(shape).sum(0) % min(shape) == 0, amax, x).astype(np.float32)


def gradients(formats: mk.DotFormats, dims: Any, implementation: str | None = None) -> Any:
    """A compiled function of operands and the gradient of their product."""

    def product_and_gradients(lhs, rhs, g):
        def product(lhs, rhs):
            options = {"implementation": implementation}
            return mk.quantized_dot_general(lhs, rhs, dims, formats, **options)[0]

        out, pull = jax.vjp(product, lhs, rhs)
        return out, *pull(g)

    return jax.jit(product_and_gradients)


# The shapes of lhs, rhs, dimension numbers: a layer on rows and on sequences, one with a tied
# weight [N, K], attention's products (batched) and projections (two free axes, two contracted).
SHAPES = {
    "matrix": ((24, 64), (64, 40), MATRIX),
    "one row": ((1, 64), (64, 40), MATRIX),
    "sequence": ((3, 8, 64), (64, 40), (((2,), (0,)), ((), ()))),
    "tied": ((24, 64), (40, 64), (((1,), (1,)), ((), ()))),
    "batched": ((2, 4, 24, 16), (2, 4, 20, 16), (((3,), (3,)), ((0, 1), (0, 1)))),
    "heads": ((3, 8, 64), (64, 4, 16), (((2,), (0,)), ((), ()))),
    "from heads": ((3, 8, 4, 16), (4, 16, 40), (((2, 3), (0, 1)), ((), ()))),
}


SHOWN_BY_OTHERS = ("one row", "heads", "from heads")
SHAPE_CASES = [
    case(family, name, "channel", slow=name in SHOWN_BY_OTHERS)
    for family in AMAX
    for name in SHAPES
]
SHAPE_CASES += [case(family, "sequence", "tensor") for family in AMAX]


@pytest.mark.parametrize(("family", "shapes", "granularity"), SHAPE_CASES)
def test_both_derivatives_are_native_and_those_of_the_integers(family, shapes, granularity):
    lhs_shape, rhs_shape, dims = SHAPES[shapes]
    lhs, rhs = integers(AMAX[family], *lhs_shape), integers(AMAX[family], *rhs_shape)
    exact = jax.jit(partial(jax.lax.dot_general, dimension_numbers=dims))
    g = integers(AMAX[family], *exact(lhs, rhs).shape)
    formats = getattr(mk.DotFormats, family)(granularity=granularity)
    compiled = gradients(formats, dims).lower(lhs, rhs, g).compile()
    assert products(compiled) == ({FLOAT8 if family == "float8" else INT8: 3}, 0)
    out, pull = jax.vjp(exact, lhs, rhs)
    for found, expected in zip(compiled(lhs, rhs, g), (out, *pull(g)), strict=True):
        np.testing.assert_array_equal(found, expected)


E4M3, E5M2 = "float8_e4m3fn", "float8_e5m2"
# Formats, and how many of the products are of two QTensors and of one by an array: weights alone in
# 8 bits, gradients as they are, one of them so.
MIXED = {
    "float8, weight only": (mk.DotFormats((None, E4M3), (None, E4M3), (E4M3, None)), 0, 3),
    "int8, weight only": (mk.DotFormats((None, "int8"), (None, "int8"), ("int8", None)), 0, 3),
    "float8, float gradient": (mk.DotFormats((E4M3, E4M3), (None, E4M3), (E4M3, None)), 1, 2),
    "int8, float gradient": (mk.DotFormats(("int8", "int8"), (None, "int8"), ("int8", None)), 1, 2),
    "float8, float d rhs": (mk.DotFormats((E4M3, E4M3), (E5M2, E4M3), (E4M3, None)), 2, 1),
    "int8, float d lhs": (mk.DotFormats(("int8", "int8"), (None, "int8"), ("int8", "int8")), 2, 1),
    "float8": (mk.DotFormats.float8(), 3, 0),
    "int8": (mk.DotFormats.int8(), 3, 0),
}
MIXED_CASES = [
    case(name.split(",")[0], name, "bfloat16", slow=" d " not in name)
    for name in MIXED
    if name not in AMAX
]
MIXED_CASES += [case(family, family, "float32") for family in AMAX]


@pytest.mark.parametrize(("family", "name", "dtype"), MIXED_CASES)
def test_derivatives_of_mixed_operands_are_native_and_those_of_the_reference(family, name, dtype):
    """Within the error of float32 sums of exact products, in any order, and that of the result."""
    formats, of_two, by_array = MIXED[name]
    lhs, rhs, g = (normal(*s).astype(dtype) for s in ((24, 64), (64, 40), (24, 40)))
    compiled = gradients(formats, MATRIX).lower(lhs, rhs, g).compile()
    calls = {FLOAT8 if family == "float8" else INT8: of_two, BY_ARRAY: by_array}
    assert products(compiled) == (Counter(calls), 0)
    reference = gradients(formats, MATRIX, "reference")
    sizes = reference(*map(jnp.abs, (lhs, rhs, g)))
    results = compiled(lhs, rhs, g), reference(lhs, rhs, g), sizes, (64, 40, 24)
    for found, expected, size, terms in zip(*results, strict=True):
        found, expected, size = (np.asarray(a, np.float64) for a in (found, expected, size))
        rounding = 0 if dtype == "float32" else 2.0**-8
        assert (np.abs(found - expected) <= (2 * (terms + 7) * U + rounding) * size).all()


POLICIES = {
    "float8_from_float32": 3,
    "float8_current_from_mixed_bfloat16": 3,
    "float8/row_from_mixed_bfloat16": 3,
    "int8_from_float32": 1,
    "int8_delayed_from_mixed_bfloat16": 1,
}


def in_linen(policy: str, x: np.ndarray, kernel: np.ndarray) -> Any:
    """A jitted function of variables, an input and the output's gradient."""
    model = mp.wrap(nn.Dense(kernel.shape[1], use_bias=False), policy)
    variables = mp.init_scaling(model, {"params": {"kernel": jnp.asarray(kernel)}}, x)

    @jax.jit
    def derivatives(variables, x, g):
        def loss(variables, x):
            out = model.apply(variables, x)
            return jnp.sum(out.astype(jnp.float32) * g), out

        grads, out = jax.grad(loss, argnums=(0, 1), has_aux=True)(variables, x)
        return out, grads[1], grads[0]["params"]["kernel"]

    return derivatives, variables


def in_nnx(policy: str, x: np.ndarray, kernel: np.ndarray) -> Any:
    """The same."""
    model = nnx.Linear(*kernel.shape, use_bias=False, rngs=nnx.Rngs(0))
    model.kernel.set_value(jnp.asarray(kernel))
    graph, state = nnx.split(mp.wrap(model, policy))

    @jax.jit
    def derivatives(state, x, g):
        def loss(state, x):
            out = nnx.merge(graph, state)(x)
            return jnp.sum(out.astype(jnp.float32) * g), out

        grads, out = jax.grad(loss, argnums=(0, 1), has_aux=True)(state, x)
        return out, grads[1], grads[0]["kernel"].get_value()

    return derivatives, state


@pytest.mark.parametrize("api", [in_linen, in_nnx])
@pytest.mark.parametrize(
    ("family", "policy"), [case(p[:6] if p[0] == "f" else "int8", p) for p in POLICIES]
)
def test_a_layer_has_as_many_native_products_as_its_policy_has_8_bit_ones(family, policy, api):
    """int8 gradients are not rounded, so the products they are in are XLA's, of floats."""
    amax = AMAX[family]
    x, kernel, g = (integers(amax, *shape) for shape in ((24, 64), (64, 40), (24, 40)))
    function, variables = api(policy, x, kernel)
    compiled = function.lower(variables, x, g).compile()
    of_both = POLICIES[policy]
    assert products(compiled) == ({FLOAT8 if family == "float8" else INT8: of_both}, 3 - of_both)
    rounded = partial(np.asarray, dtype=jnp.bfloat16 if "bfloat16" in policy else np.float32)
    out, to_x, to_kernel = compiled(variables, x, g)
    np.testing.assert_array_equal(out, rounded(x @ kernel))
    np.testing.assert_array_equal(to_x, rounded(g @ kernel.T).astype(np.float32))
    np.testing.assert_array_equal(to_kernel, x.T @ g)


@pytest.mark.parametrize(("family", "of_two", "of_xla"), [case("float8", 5, 0), case("int8", 2, 3)])
def test_a_training_step_of_two_layers_leaves_no_8_bit_product_to_xla(family, of_two, of_xla):
    """Three products each, but the first layer's input needs no gradient."""
    module = nn.Sequential((nn.Dense(40), nn.relu, nn.Dense(32)))
    x, target = normal(24, 64), normal(24, 32)
    loop = LinenLoop(module, f"{family}_from_mixed_bfloat16", optax.adam(1e-3), x)
    step = jax.jit(partial(linen_step, loss=mean_squared_error), donate_argnums=0)
    compiled = step.lower(loop.carry, x, target).compile()
    assert products(compiled) == ({FLOAT8 if family == "float8" else INT8: of_two}, of_xla)
