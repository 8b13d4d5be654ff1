"""The native CPU kernels of int8: products equal to the integers, casts equal to XLA's.

Those of float8 are in `test_kernels_native.py`, and what both share.
"""

import re
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings

import mpjax as mp
import mpjax_kernels as mk
from mpjax_kernels._granularity import granularity
from mpjax_kernels._native_library import native_refusal
from mpjax_kernels._quantize import _Quantize, _QuantizeBy
from tests.kernels_helpers import normal
from tests.native_helpers import MATRIX, Case, check_casts, product, tensor
from tests.test_kernels_native import cases

pytestmark = pytest.mark.skipif(
    native_refusal("int8") is not None, reason=f"no native kernels: {native_refusal('int8')}"
)

INT8 = mk.get_format("int8")


def whole_range(case: Case, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    left, right = (case.batch, case.rows, case.terms), (case.batch, case.terms, case.columns)
    return rng.integers(-127, 128, left), rng.integers(-127, 128, right)


def found_and_expected(case: Case, seed: int = 0) -> tuple[jax.Array, np.ndarray]:
    """The result, and the integers as float32."""
    lhs, rhs = whole_range(case, seed)
    left, right, dims = case.stored(lhs, rhs)
    found = product(tensor(left, "int8"), tensor(right, "int8"), dims)
    return found, (lhs @ rhs).astype(np.float32)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(cases)
def test_sums_are_the_integers(case):
    np.testing.assert_array_equal(*found_and_expected(case))


@pytest.mark.parametrize("terms_last", [(True, False), (True, True), (False, True), (False, False)])
@pytest.mark.parametrize(
    "rows, columns", [(200, 150), (3, 150), (200, 3), (1, 700), (21, 130), (32, 65)]
)
def test_blocks_of_a_long_sum_are_the_integers(rows, columns, terms_last):
    np.testing.assert_array_equal(*found_and_expected(Case(1, rows, 2003, columns, terms_last), 1))


@pytest.mark.parametrize("rows, columns, terms_last", [(2, 5, True), (40, 17, True), (5, 2, False)])
def test_the_largest_sums_there_are(rows, columns, terms_last):
    """The sums wrap around on the way, as unsigned bytes times signed ones, and come back."""
    terms = 133144  # 127**2 times as many is 9,593 below 2**31
    lhs = np.full((1, rows, terms), 127)
    rhs = np.where(np.arange(columns) % 2, -127, 127) * np.ones((1, terms, 1), int)
    case = Case(1, rows, terms, columns, (terms_last, terms_last))
    left, right, dims = case.stored(lhs, rhs)
    found = product(tensor(left, "int8"), tensor(right, "int8"), dims)
    np.testing.assert_array_equal(found, (lhs @ rhs).astype(np.float32))
    with pytest.raises(NotImplementedError, match="133146 terms: more than 133144 can overflow"):
        long = tensor(np.zeros((1, 133146)), "int8"), tensor(np.zeros((133146, 1)), "int8")
        product(*long, MATRIX)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("rows", [1, 20, 70])
def test_scales_are_applied_in_float32_and_the_result_is_cast_once(dtype, rows):
    rng = np.random.default_rng(2)
    lhs, rhs = rng.integers(-127, 128, (rows, 33)), rng.integers(-127, 128, (33, 50))
    by_row, by_column = rng.random((rows, 1), np.float32) / 99, rng.random((1, 50), np.float32)
    q, r = tensor(lhs, "int8", by_row), tensor(rhs, "int8", by_column)
    found = product(q, r, MATRIX, preferred_element_type=dtype)
    expected = ((lhs @ rhs).astype(np.float32) * by_row * by_column).astype(dtype)
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("rows", [2, 40])
def test_results_are_rounded_to_nearest_even(rows, dtype):
    check_casts(dtype, rows, "int8")


@pytest.mark.parametrize("rows,columns", [(40, 3), (3, 40), (1, 40)])
def test_the_scale_of_the_left_operand_comes_first_whichever_fills_the_vectors(rows, columns):
    rng = np.random.default_rng(8)
    lhs, rhs = rng.integers(-127, 128, (rows, 5)), rng.integers(-127, 128, (5, columns))
    by_row = rng.uniform(0.5, 2, (rows, 1)).astype(np.float32)
    by_column = rng.uniform(0.5, 2, (1, columns)).astype(np.float32)
    found = product(tensor(lhs, "int8", by_row), tensor(rhs, "int8", by_column), MATRIX)
    exact = (lhs @ rhs).astype(np.float32)
    np.testing.assert_array_equal(found, exact * by_row * by_column)
    assert not np.array_equal(found, exact * by_column * by_row)  # in a last bit


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize(
    "shape, axis",
    [((500, 131), 1), ((1, 4096), 1), ((3, 4, 33), 2), ((5, 4, 33), (1, 2)), ((70001,), 0)],
)
def test_rows_are_cast_to_the_bits_of_xla(shape, axis, dtype):
    """One of them is zero throughout, and one has an infinity."""
    rng = np.random.default_rng(3)
    x = np.exp(3 * rng.standard_normal(shape, np.float32)) * rng.choice([-1, 1], shape)
    x = np.clip(x, -6e4, 6e4)  # so that they are float16 too
    if shape[0] > 2 and len(shape) > 1:
        x[1], x[2].flat[17] = 0, -np.inf
    blocks = granularity(shape, axis, None)
    x = jnp.asarray(x, dtype)
    q = jax.jit(partial(mk.quantize, axis=axis))(x)
    values, scale = jax.jit(_Quantize(INT8, blocks))(x)
    np.testing.assert_array_equal(q.scale, scale)
    np.testing.assert_array_equal(q.values, values)
    assert np.isnan(q.scale).sum() == (shape[0] > 2 and len(shape) > 1) * np.isnan(scale).sum()


@pytest.mark.parametrize("given", [0.0, 0.02, -1.0, np.nan])
def test_rows_with_scales_that_are_known(given):
    """Each its own, of which 0 is one that is not known yet."""
    x, scale = normal(6, 40), jnp.full((6, 1), 0.03).at[4, 0].set(given)
    q, amax = jax.jit(partial(mk._quantize.quantize_by, format=INT8))(x, scale=scale)
    values, known, expected = jax.jit(_QuantizeBy(INT8, None))(x, scale)
    np.testing.assert_array_equal(amax, expected)
    np.testing.assert_array_equal(q.scale, known)
    np.testing.assert_array_equal(q.values, values)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_ties_go_to_even_and_large_numbers_saturate(dtype):
    x = np.arange(-140, 140, 0.25).astype(dtype)
    q = mk.quantize(jnp.asarray(x), scale=1.0)
    expected = np.clip(np.rint(x.astype(np.float32)), -127, 127)
    np.testing.assert_array_equal(q.values, expected.astype(np.int8))


def test_refusals_say_why():
    x, w = mk.quantize(normal(4, 32)), mk.quantize(normal(32, 4))
    with pytest.raises(NotImplementedError, match="float8_e4m3fn.* of float8 and of int8"):
        product(x, mk.quantize(normal(32, 4), "float8_e4m3fn"), MATRIX)
    assert product(x, w, MATRIX).shape == (4, 4)


def test_a_call_with_other_numbers_is_an_error_of_xla():
    call = jax.ffi.ffi_call("mpjax_int8_dot", jax.ShapeDtypeStruct((1, 2, 2), jnp.float32))
    one = jnp.ones((1, 1))
    int8, float8 = jnp.zeros((1, 2, 2), jnp.int8), jnp.zeros((1, 2, 2), jnp.float8_e4m3fn)
    with pytest.raises(jax.errors.JaxRuntimeError, match="mpjax_int8_dot: rhs is not int8"):
        out = call(int8, float8, one, one, lhs_terms_last=True, rhs_terms_last=False)
        jax.block_until_ready(out)


def test_a_vmapped_row_has_its_own_scale():
    x, w = normal(3, 8, 40) * jnp.asarray([1.0, 10.0, 0.1]).reshape(3, 1, 1), normal(40, 24)
    w = mk.quantize(w, axis=0)

    def layer(x):
        return mk.matmul(mk.quantize(x, axis=1), w)

    mapped = jax.jit(jax.vmap(layer))
    text = mapped.lower(x).compile().as_text() or ""
    assert text.count('target="mpjax_quantize"') == text.count('target="mpjax_int8_dot"') == 1
    np.testing.assert_array_equal(mapped(x), jnp.stack([jax.jit(layer)(one) for one in x]))


def test_a_layer_is_two_calls_of_which_products_of_the_same_rows_share_one():
    x, w = normal(16, 384), mk.quantize(normal(384, 96), axis=0)

    @jax.jit
    def layers(x, w, v):
        return [mk.matmul(mk.quantize(x, axis=1), each) for each in (w, v)]

    text = layers.lower(x, w, w.transpose().transpose()).compile().as_text() or ""
    assert text.count('target="mpjax_quantize"') == 1
    assert text.count('target="mpjax_int8_dot"') == 2
    for line in text.splitlines():
        assert not any(f" {name}(" in line for name in ("transpose", "copy", "convert", "dot"))


@pytest.mark.parametrize("policy", ["int8_from_float32", "int8_from_mixed_bfloat16"])
def test_quantized_models_make_the_calls(policy):
    """One for few rows, and two for many, which are cast once for several layers."""
    model = mp.wrap(nn.Dense(24), policy)
    few, many = normal(5, 40), normal(2048, 40)
    variables = mp.quantize(model, model.init(jax.random.key(0), few), few)
    apply = jax.jit(model.apply)
    calls = [
        re.findall(r'target="(mpjax_\w+)"', apply.lower(variables, x).compile().as_text() or "")
        for x in (few, many)
    ]
    assert calls[0] == ["mpjax_dynamic_int8_dot"]
    assert sorted(calls[1]) == ["mpjax_int8_dot", "mpjax_quantize"]
    rows = apply(variables, many)[:5]
    np.testing.assert_array_equal(apply(variables, many[:5]), rows)


def trained(x, w, g, implementation=None):
    def loss(x, w):
        options = {"implementation": implementation}
        out, _ = mk.quantized_dot_general(x, w, MATRIX, mk.DotFormats.int8(), **options)
        return jnp.sum(out * g)

    return jax.grad(loss, argnums=(0, 1))(x, w)


def test_derivatives_are_those_of_xla():
    """The same integers, whose sums are exact; scales may differ in a last bit."""
    operands = normal(64, 128), normal(128, 96), normal(64, 96)
    native = jax.jit(trained).lower(*operands).compile()
    assert (native.as_text() or "").count('target="mpjax_int8_dot"') == 2
    xla = jax.jit(partial(trained, implementation="xla"))(*operands)
    for a, b in zip(native(*operands), xla, strict=True):
        np.testing.assert_allclose(a, b, rtol=4e-7, atol=0)
