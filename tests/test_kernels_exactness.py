"""What no approximate comparison sees: exact bounds, keys, precisions, blocks, and the last bits.

Each test holds one property of the products that results close to the right ones do not show:
that saved operands are dequantized in the dtype of the product, that every operand has noise of
its own, that `precision` reaches every dot, along which axes blocks lie, what a backward product
reuses, which sums are refused, and that nothing underflows or overflows on the way.
"""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mpjax_kernels as mk
from mpjax_kernels._contraction import contraction
from mpjax_kernels._dot_general import IMPLEMENTATIONS
from tests.helpers import equations
from tests.kernels_helpers import U, normal

pytestmark = pytest.mark.usefixtures("strict_promotion")

MATRIX = (((1,), (0,)), ((), ()))
LARGEST = float(np.finfo(np.float32).max)


def pull_back(lhs, rhs, formats, **kwargs):
    """The product and what brings its gradient to its operands, by XLA's own dots."""
    product = partial(mk.quantized_dot_general, implementation="xla", **kwargs)
    return jax.vjp(lambda x, w: product(x, w, MATRIX, formats)[0], lhs, rhs)


@partial(jax.jit, static_argnums=3)
def product_and_gradients(lhs, rhs, g, formats, key=None):
    out, pull = pull_back(lhs, rhs, formats, key=key)
    return out, *pull(g)


def dots(function, *args):
    return [
        e
        for e in equations(jax.make_jaxpr(function)(*args).jaxpr)
        if e.primitive.name == "dot_general"
    ]


def test_gradients_in_high_precision_are_float32_products_of_the_dequantized_operands():
    x, w, g = normal(9, 24), normal(24, 32), normal(9, 32)
    _, *gradients = product_and_gradients(x, w, g, mk.DotFormats(("int8", "int8")))
    exact = []
    for operand, axis in ((x, 1), (w, 0)):
        q = mk.quantize(operand, "int8", axis=axis)
        exact.append(np.asarray(q.values, np.float64) * np.asarray(q.scale, np.float64))
    x, w, g = *exact, np.asarray(g, np.float64)
    for result, a, b in zip(gradients, (g, x.T), (w.T, g), strict=True):
        # Each term is rounded when dequantized, multiplied, and added: once, once, and less than
        # once per term.
        rounded = (a.shape[1] + 2) * U * (np.abs(a) @ np.abs(b))
        assert (np.abs(result - a @ b) <= rounded).all()


def test_each_of_the_six_operands_has_noise_of_its_own():
    # The same array is each operand in turn, beside the identity, so that the result is what it
    # was quantized to.
    x, one, key = normal(16, 16), jnp.eye(16), jax.random.key(0)
    noisy = mk.OperandFormat("int8", "tensor", stochastic=True)
    high = (None, None)
    seen = [
        product_and_gradients(x, one, one, mk.DotFormats((noisy, None)), key)[0],
        product_and_gradients(one, x, one, mk.DotFormats((None, noisy)), key)[0],
        product_and_gradients(x, one, one, mk.DotFormats(high, high, (noisy, None)), key)[2].T,
        product_and_gradients(one, x, one, mk.DotFormats(high, (None, noisy)), key)[1].T,
        product_and_gradients(one, one, x, mk.DotFormats(high, (noisy, None)), key)[1],
        product_and_gradients(one, one, x, mk.DotFormats(high, high, (None, noisy)), key)[2],
    ]
    scale = float(jnp.max(jnp.abs(x))) / 127
    for values in seen:
        np.testing.assert_allclose(values, x, atol=scale * (1 + 128 * U))
    for a, b in itertools.combinations(seen, 2):
        # Two independent roundings of 256 entries differ in a third of them, on average.
        assert (np.abs(a - b) > scale / 2).sum() > 256 / 6


@pytest.mark.parametrize("precision", [jax.lax.Precision.DEFAULT, jax.lax.Precision.HIGHEST])
@pytest.mark.parametrize(
    "formats",
    [mk.DotFormats.float8(), mk.DotFormats((None, None)), mk.DotFormats((None, "int8"))],
    ids=["float8", "high precision", "weight only"],
)
def test_the_precision_is_that_of_all_three_products(formats, precision):
    x, w, g = normal(4, 8), normal(8, 3), normal(4, 3)
    forward = partial(mk.quantized_dot_general, dimension_numbers=MATRIX, formats=formats)
    forward = partial(forward, precision=precision, implementation="xla")
    _, pull = pull_back(x, w, formats, precision=precision)
    found = [e.params["precision"] for e in (*dots(forward, x, w), *dots(pull, g))]
    assert found == [(precision, precision)] * 3


def test_blocks_lie_along_the_last_free_and_the_last_contracting_axis():
    x, w = normal(4, 6, 4, 8), normal(4, 8, 4, 6)  # [free, free, k, k] and [k, k, free, free]
    formats = mk.DotFormats((mk.OperandFormat("int8", (3, 4)), mk.OperandFormat("int8", (2, 8))))
    product = partial(mk.quantized_dot_general, formats=formats, implementation="xla")
    _, amaxes = jax.jit(lambda x, w: product(x, w, (((2, 3), (0, 1)), ((), ()))))(x, w)
    blocks = np.abs(x).reshape(4, 2, 3, 4, 2, 4)
    np.testing.assert_array_equal(amaxes.lhs, blocks.max((2, 5)))
    blocks = np.abs(w).reshape(4, 1, 8, 4, 3, 2)
    np.testing.assert_array_equal(amaxes.rhs, blocks.max((2, 5)))


def test_probes_of_the_two_gradients_take_the_shapes_of_their_own_scales():
    x, w, g = normal(6, 8), normal(8, 5), normal(6, 5)
    rows, columns = jnp.full((6, 1), 0.1), jnp.full((1, 5), 0.1)
    scales = mk.DotScales(dlhs=rows, drhs=columns)
    formats = mk.DotFormats((None, None), ("int8", None), (None, "int8"))

    def product(probes):
        out, _ = mk.quantized_dot_general(
            x, w, MATRIX, formats, scales=scales, amax_probes=probes, implementation="xla"
        )
        return jnp.sum(out * g)

    zeros = mk.DotScales(dlhs=jnp.zeros_like(rows), drhs=jnp.zeros_like(columns))
    observed = jax.jit(jax.grad(product))(zeros)
    np.testing.assert_array_equal(observed.dlhs, np.abs(g).max(1, keepdims=True))
    np.testing.assert_array_equal(observed.drhs, np.abs(g).max(0, keepdims=True))


@pytest.mark.parametrize(("run", "terms"), [(4, 256), (128, 128)], ids=["short", "long"])
@pytest.mark.parametrize("side", ["dlhs", "drhs"])
def test_a_backward_product_reuses_long_runs_of_one_scale_and_quantizes_short_ones_anew(
    run, terms, side
):
    # A block of 8 contracted entries keeps the scale from being folded into the gradient, and
    # `run` entries share one along the axis that the backward product contracts.
    blocks, pair, high = mk.OperandFormat("int8", (run, 8)), ("int8", "int8"), (None, None)
    if side == "dlhs":
        x, w, formats = normal(3, 16), normal(16, 256), mk.DotFormats((None, blocks), pair, high)
    else:
        x, w, formats = normal(256, 16), normal(16, 3), mk.DotFormats((blocks, None), high, pair)
    out, pull = pull_back(x, w, formats)
    integer = [e for e in dots(pull, out) if e.invars[0].aval.dtype == jnp.int8]
    assert len(integer) == 1
    left, right = (v.aval for v in integer[0].invars)
    assert left.dtype == right.dtype == jnp.int8
    (contracted, _), _ = integer[0].params["dimension_numbers"]
    assert [left.shape[a] for a in contracted] == [terms]


def shifted(shape, zero_point):
    """The largest difference to a zero point: 255, or 127 without one."""
    one, zero = jnp.ones((1, 1)), jnp.full((1, 1), -128, jnp.int8)
    values = jnp.full(shape, 127, jnp.int8)
    return mk.QTensor(values, one, np.dtype(np.float32), zero if zero_point else None)


@pytest.mark.parametrize("implementation", ["xla", "cpu"])
@pytest.mark.parametrize(
    ("zero_points", "largest"),
    [((True, True), 255 * 255), ((True, False), 255 * 127), ((False, True), 127 * 255)],
)
def test_as_many_terms_as_zero_points_allow_are_exact_and_one_more_is_refused(
    implementation, zero_points, largest
):
    most = (2**31 - 1) // largest

    @jax.jit
    def product(lhs, rhs):
        return mk.dot_general(lhs, rhs, MATRIX, implementation=implementation)

    def operands(terms):
        return shifted((1, terms), zero_points[0]), shifted((terms, 1), zero_points[1])

    assert product(*operands(most)) == np.float32(most * largest)
    refused = f"contracts {most + 1} terms: more than {most} can overflow int32"
    with pytest.raises(NotImplementedError, match=refused):
        product(*operands(most + 1))


def test_float8_products_are_compiled_for_nvidia_gpus_in_the_highest_precision():
    # At the default precision Hopper adds them up in 14 bits.
    x = mk.quantize(normal(16, 32), "float8_e4m3fn", axis=1)
    w = mk.quantize(normal(32, 16), "float8_e4m3fn", axis=0)

    def program(precision):
        product = partial(mk.dot_general, dimension_numbers=MATRIX, implementation="gpu")
        traced = jax.jit(partial(product, precision=precision)).trace(x, w)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
        return [line for line in text.splitlines() if "stablehlo.dot_general" in line]

    for precision, expected in ((None, "HIGHEST"), (jax.lax.Precision.DEFAULT, "DEFAULT")):
        (line,) = program(precision)
        assert f"precision = [{expected}, {expected}]" in line and "f8E4M3FN" in line


@pytest.mark.parametrize("name", ["xla", "cpu", "gpu"])
@pytest.mark.parametrize("format", ["int8", "float8_e4m3fn"])
def test_the_product_of_two_scales_may_underflow_where_the_result_does_not(format, name):
    # 2**-75 * 2**-75 is zero in float32, but 2**12 terms of 2**6 * 2**6 times it are 2**-126.
    scale, terms, dtype = jnp.full((1, 1), 2.0**-75), 2**12, mk.get_format(format).dtype
    x = mk.QTensor(jnp.full((2, terms), 64, dtype), scale, np.dtype(np.float32))
    w = mk.QTensor(jnp.full((terms, 2), 64, dtype), scale, np.dtype(np.float32))
    axes = contraction(x.shape, w.shape, MATRIX)
    # Called as it is, so that the one for GPUs runs here; the scales are no constants of the
    # program, which XLA would multiply.
    run = IMPLEMENTATIONS[name].run
    product = jax.jit(lambda x, w: run(x, w, axes, None, np.dtype(np.float32)))
    np.testing.assert_array_equal(product(x, w), np.full((2, 2), 2.0**-126, np.float32))


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(("format", "levels"), [("int8", 255), ("int4", 15)])
def test_the_largest_float32_beside_a_zero_point_does_not_become_infinite(format, levels, sign):
    # The range is so little beyond the largest float32 that the scale is one ulp above
    # `LARGEST / levels`, which is a float32: without care `levels` times it would be infinite.
    ulp = float(np.spacing(np.float32(LARGEST / levels)))
    x = jnp.float32([sign * LARGEST, -sign * levels * ulp])
    q = jax.jit(partial(mk.quantize, format=format, symmetric=False))(x)
    np.testing.assert_array_equal(mk.dequantize(q), [sign * LARGEST, 0])


@pytest.mark.parametrize("other", [-1.0, -0.4 / 255, -0.3])
@pytest.mark.parametrize("format", ["int8", "int4"])
def test_what_spans_more_than_float32_is_restored_as_finite(format, other):
    x = jnp.float32(LARGEST) * jnp.float32([1, other])
    q = jax.jit(partial(mk.quantize, format=format, symmetric=False))(x)
    restored = np.asarray(mk.dequantize(q), np.float64)
    assert np.isfinite(restored).all()
    # Where half a step more would be infinite, the step below is taken.
    assert (np.abs(restored - np.asarray(x, np.float64)) <= 1.001 * float(q.scale[0])).all()
