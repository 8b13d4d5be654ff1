"""The native CPU kernels: exact, or off by what float32 sums are.

The conformance suite runs them too, on every shape and pair of formats that they take.
"""

import functools
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mpjax_kernels as mk
from mpjax_kernels._native_library import native_refusal
from mpjax_kernels._quantize import _QuantizeBy
from tests.kernels_helpers import normal
from tests.native_helpers import (
    FORMATS,
    ISAS,
    MATRIX,
    Case,
    check_casts,
    elsewhere,
    here,
    integers,
    product,
    tensor,
)

pytestmark = pytest.mark.skipif(
    native_refusal() is not None, reason=f"no native kernels here: {native_refusal()}"
)

sizes = st.one_of(st.integers(0, 9), st.sampled_from([16, 17, 31, 48, 49, 64, 65, 97, 131]))
cases = st.builds(
    Case, st.integers(0, 3), sizes, sizes, sizes, st.tuples(st.booleans(), st.booleans())
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(cases, st.tuples(*[st.sampled_from(sorted(FORMATS))] * 2))
def test_sums_of_integers_are_exact(case, formats):
    """At most 131 terms of at most 64: every partial sum is an integer below 2**24."""
    lhs, rhs = case.operands(np.random.default_rng(0))
    left, right, dims = case.stored(lhs, rhs)
    found = product(tensor(left, formats[0]), tensor(right, formats[1]), dims)
    np.testing.assert_array_equal(found, lhs @ rhs)


@pytest.mark.parametrize("terms_last", [(True, False), (True, True), (False, False)])
@pytest.mark.parametrize("rows, columns", [(200, 150), (3, 150), (200, 3)])
def test_blocks_of_a_long_sum_are_exact(rows, columns, terms_last):
    case = Case(1, rows, 2003, columns, terms_last)  # 2003 * 64 < 2**24
    lhs, rhs = case.operands(np.random.default_rng(1))
    left, right, dims = case.stored(lhs, rhs)
    found = product(tensor(left, "float8_e4m3fn"), tensor(right, "float8_e5m2"), dims)
    np.testing.assert_array_equal(found, lhs @ rhs)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("terms_last", [True, False])
def test_every_bit_pattern_is_decoded(format, terms_last):
    """Subnormal numbers, both zeros, infinities and NaN among them."""
    numbers = np.arange(256, dtype=np.uint8).view(FORMATS[format])
    column = numbers.reshape((256, 1) if terms_last else (1, 256))
    dims = ((1 if terms_last else 0,), (0,)), ((), ())
    found = product(tensor(column, format), tensor(np.ones((1, 20)), format), dims)
    expected = np.broadcast_to(numbers.astype(np.float32)[:, None], (256, 20))
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_scales_are_applied_in_float32_and_the_result_is_cast_once(dtype):
    rng = np.random.default_rng(2)
    lhs, rhs = integers(rng, (70, 33)), integers(rng, (33, 50))
    rows, columns = rng.random((70, 1), np.float32), rng.random((1, 50), np.float32)
    q, r = tensor(lhs, "float8_e4m3fn", rows), tensor(rhs, "float8_e4m3fn", columns)
    found = product(q, r, MATRIX, preferred_element_type=dtype)
    expected = ((lhs @ rhs).astype(np.float32) * rows * columns).astype(dtype)
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("rows", [2, 40])
def test_results_are_rounded_to_nearest_even(rows, dtype):
    check_casts(dtype, rows, "float8_e4m3fn")


def test_a_scale_that_only_both_make_small_does_not_underflow():
    small = np.full((1, 1), 2.0**-100, np.float32)
    q, r = (
        tensor(np.full((1, 1), 256.0), "float8_e5m2", small),
        tensor(np.full((1, 20), 2.0**15), "float8_e5m2", small),
    )
    assert float(product(q, r, MATRIX)[0, 0]) == 0.0  # 2**-177 is no float32
    q = replace(q, scale=jnp.full((1, 1), 2.0**-60, jnp.float32))
    np.testing.assert_array_equal(product(q, r, MATRIX), np.full((1, 20), 2.0**-137, np.float32))


@pytest.mark.parametrize("format", FORMATS)
def test_all_bfloat16_numbers_are_cast_as_numpy_does(format):
    numbers = np.arange(2**16, dtype=np.uint16).view(ml_dtypes.bfloat16)
    numbers = numbers[np.isfinite(numbers.astype(np.float32))]
    for scale in (1.0, 0.3):
        q = mk.quantize(jnp.asarray(numbers), format, scale=scale)
        with np.errstate(over="ignore"):
            ratio = numbers.astype(np.float32) / np.float32(scale)
        largest = mk.get_format(format).max
        expected = np.clip(ratio, -largest, largest).astype(FORMATS[format])
        np.testing.assert_array_equal(np.asarray(q.values).view(np.uint8), expected.view(np.uint8))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("scale", [0.0, 3e-3, -1.0, np.nan, np.inf])
@pytest.mark.parametrize("bad", [None, np.nan, -np.inf])
def test_quantizing_gives_the_bits_of_xla(scale, format, dtype, bad):
    """A large array, so that it is cut into chunks; 0 is a scale that is not known yet."""
    rng = np.random.default_rng(3)
    x = np.exp(3 * rng.standard_normal(70001, np.float32)) * rng.choice([-1, 1], 70001)
    x = np.clip(x, -6e4, 6e4)  # so that they are float16 too
    x[50000] = x[50000] if bad is None else bad
    known = jnp.full((1,), scale, jnp.float32)
    operands = jnp.asarray(x, dtype), known
    by = jax.jit(partial(_quantize_by_both, format=mk.get_format(format)))
    (values, found, amax), (other_values, other_found, other_amax) = by(*operands)
    # XLA may multiply by the inverse of a constant, or divide a product, for an unknown scale.
    rounding = 2**-23 if scale == 0 else 0
    np.testing.assert_allclose(found, other_found, rtol=2 * rounding)
    np.testing.assert_array_equal(amax, other_amax)
    assert np.isnan(found).all() == (bad is not None or not scale >= 0)
    same = np.asarray(values).view(np.uint8) == np.asarray(other_values).view(np.uint8)
    # So ratios that are nearly between two values are rounded to the other one: few are.
    assert np.mean(~same) <= (1e-3 if scale == 0 else 0)


def _quantize_by_both(x, scale, format):
    q, amax = mk._quantize.quantize_by(x, format, scale)
    return (q.values, q.scale, amax), _QuantizeBy(format, None)(x, scale)


@pytest.mark.parametrize("rows,columns", [(40, 3), (3, 40)])
def test_the_scale_of_the_left_operand_comes_first_whichever_fills_the_vectors(rows, columns):
    rng = np.random.default_rng(8)
    lhs, rhs = integers(rng, (rows, 1)), integers(rng, (1, columns))
    by_row = rng.uniform(0.5, 2, (rows, 1)).astype(np.float32)
    by_column = rng.uniform(0.5, 2, (1, columns)).astype(np.float32)
    found = product(
        tensor(lhs, "float8_e4m3fn", by_row), tensor(rhs, "float8_e4m3fn", by_column), MATRIX
    )
    exact = (lhs @ rhs).astype(np.float32)
    np.testing.assert_array_equal(found, exact * by_row * by_column)
    assert not np.array_equal(found, exact * by_column * by_row)  # in a last bit


@pytest.mark.parametrize("shape", [(0,), (3, 0), (1,), (5, 7)])
def test_zeros_have_scale_one(shape):
    q = mk.quantize(jnp.zeros(shape), "float8_e4m3fn")
    np.testing.assert_array_equal(q.scale, 1)
    np.testing.assert_array_equal(np.asarray(q.values, np.float32), np.zeros(shape))


def test_subnormal_numbers_are_kept():
    tiny = float(np.finfo(np.float32).tiny)
    q = mk.quantize(jnp.asarray([tiny / 2, -tiny / 4]), "float8_e4m3fn")
    np.testing.assert_array_equal(q.scale, np.float32(tiny))
    np.testing.assert_array_equal(np.asarray(q.values, np.float32), [0.5, -0.25])


def test_a_nan_reaches_every_output():
    x = normal(64, 64).at[3, 5].set(jnp.nan)
    q, r = mk.quantize(x, "float8_e4m3fn"), mk.quantize(normal(64, 40), "float8_e4m3fn")
    assert np.isnan(product(q, r, MATRIX)).all()


def call(lhs, rhs, out, scale=(1, 1)):
    """The call itself, with arguments that nothing checked."""
    e4m3 = partial(jnp.zeros, dtype=jnp.float8_e4m3fn)
    result = jax.ShapeDtypeStruct(out, jnp.float32)
    function = jax.ffi.ffi_call("mpjax_float8_dot", result)
    scales = jnp.ones(scale), jnp.ones((1, 1))
    return function(e4m3(lhs), e4m3(rhs), *scales, lhs_terms_last=True, rhs_terms_last=False)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (((1, 2, 3), (1, 4, 5), (1, 2, 5)), "rhs has a shape that does not go with"),
        (((1, 2, 3), (1, 3, 5), (1, 2, 6)), "rhs has a shape that does not go with"),
        (((1, 2, 3), (1, 3, 5), (1, 9, 5)), "lhs has a shape that does not go with"),
        (((2, 3), (3, 5), (1, 2, 5)), "differ in rank"),
        (((3, 2, 3), (1, 3, 5), (2, 2, 5)), "lhs has a shape that does not go with"),
        (((1, 2, 3), (1, 3, 5), (1, 2, 5), (1, 3)), "the scale of lhs has neither one entry"),
    ],
)
def test_a_call_that_does_not_fit_is_an_error_of_xla(arguments, message):
    with pytest.raises(jax.errors.JaxRuntimeError, match=message):
        jax.block_until_ready(call(*arguments))


def test_refusals_say_why():
    q, x = mk.quantize(normal(4, 8), "float8_e4m3fn", axis=1, group_size=4), normal(8, 4)
    r = mk.quantize(x, "float8_e4m3fn")
    with pytest.raises(NotImplementedError, match="a scale varies along a contracting axis"):
        product(q, r, MATRIX)
    with pytest.raises(NotImplementedError, match="`rhs` is .*fnuz.*: both must be QTensors of"):
        product(mk.quantize(normal(4, 8)), mk.quantize(x, "float8_e4m3fnuz"), MATRIX)


@functools.cache
def best() -> str:
    """The instruction set of a process that names none, as this one may."""
    program = "import mpjax_kernels._native_library as n; print(n._load()[0])"
    return elsewhere(program, MPJAX_NATIVE_ISA="").stdout.rstrip()


ELSEWHERE = """
import numpy as np, jax, jax.numpy as jnp, mpjax_kernels as mk
from mpjax_kernels._native_library import native_refusal, _load
from tests.native_helpers import Case, check_casts, product, tensor
print(native_refusal() or native_refusal("int8") or _load()[0])
if native_refusal():
    raise SystemExit
for case in (
    Case(1, 37, 131, 53, (True, False)),
    Case(2, 70, 65, 9, (False, True)),
    Case(1, 3, 131, 53, (True, True)),
):
    lhs, rhs = case.operands(np.random.default_rng(0))
    left, right, dims = case.stored(lhs, rhs)
    for formats in (("float8_e4m3fn", "float8_e5m2"), ("int8", "int8")):
        found = product(tensor(left, formats[0]), tensor(right, formats[1]), dims)
        np.testing.assert_array_equal(found, lhs @ rhs)
        for dtype in ("bfloat16", "float16"):
            check_casts(dtype, case.rows, formats[0])
    x = jnp.asarray(np.random.default_rng(1).standard_normal(1000), jnp.float32)
    for format in ("float8_e4m3fn", "int8"):
        q = mk.quantize(x, format)
        print(np.asarray(q.values).view(np.uint8).sum(), float(q.scale[0]))
"""


@pytest.mark.parametrize("isa", [isa for isa in ISAS if isa != here()])
def test_other_instruction_sets_compute_the_same(isa):
    """All that this CPU has; what it has not is refused by name."""
    done = elsewhere(ELSEWHERE, MPJAX_NATIVE_ISA=isa)
    if done.stdout.startswith("the environment has MPJAX_NATIVE_ISA="):
        assert f"the best here is {best()}, and there are " in done.stdout
        pytest.skip(f"this CPU has no {isa}")
    assert done.returncode == 0, done.stderr
    x = jnp.asarray(np.random.default_rng(1).standard_normal(1000), jnp.float32)
    lines = []
    for format in ("float8_e4m3fn", "int8"):
        q = mk.quantize(x, format)
        lines.append(f"{np.asarray(q.values).view(np.uint8).sum()} {float(q.scale[0])}")
    assert done.stdout.splitlines() == [isa, *lines * 3]


def test_an_instruction_set_that_there_is_not_is_refused_by_name():
    program = "import mpjax_kernels._native_library as n; print(n.native_refusal())"
    done = elsewhere(program, MPJAX_NATIVE_ISA="avx1024")
    assert done.stdout == (
        "the environment has MPJAX_NATIVE_ISA=avx1024, which is unknown: the best here is "
        f"{best()}, and there are {', '.join(ISAS)}\n"
    )
    assert "RuntimeWarning: no native kernels are used: the environment has" in done.stderr


def test_the_environment_turns_them_off():
    program = "import mpjax_kernels._native_library as n; print(n.native_refusal())"
    done = elsewhere(program, MPJAX_NATIVE="0")
    assert done.stdout == "the environment has MPJAX_NATIVE=0\n", done.stderr
