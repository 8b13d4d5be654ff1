"""The native CPU kernels of weights: an array by 8 bits or int4, exact or off by what sums are."""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mpjax_kernels as mk
from mpjax_kernels._native_library import FLOAT8, native_refusal
from tests.kernels_helpers import U, normal
from tests.native_helpers import (
    ISAS,
    MATRIX,
    check_casts,
    elsewhere,
    here,
    integers,
    product,
)

pytestmark = pytest.mark.skipif(
    native_refusal("int4") is not None, reason=f"no native kernels: {native_refusal('int4')}"
)

CALL = 'custom_call_target="mpjax_weight_dot"'
INTEGERS = ("int8", "int4")
FORMATS = (*INTEGERS, *FLOAT8)
ARRAYS = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Weighed:
    """The sizes of a product of an array by a weight, and what the weight is."""

    rows: int
    groups: int
    group: int
    columns: int
    format: str
    array: str
    has_zero: bool
    terms_last: bool

    def operands(self, seed: int = 0) -> tuple[jax.Array, mk.QTensor, np.ndarray]:
        """An array, a weight, and their product, exact in float32.

        Numbers of the array are at most 3, those of the weight less their zero points 255, and
        scales powers of two from 1/2 to 2: sums of a thousand terms are below 2**24 halves.
        """
        rng, terms = np.random.default_rng(seed), self.groups * self.group
        x = rng.integers(-3, 4, (self.rows, terms))
        most, has_zero = int(mk.get_format(self.format).max), self.has_zero
        if self.format in FLOAT8:
            most, has_zero = 8, False
            w = integers(rng, (terms, self.columns))
        else:
            w = rng.integers(-most - has_zero, most + 1, (terms, self.columns))
        scale = rng.choice([0.5, 1.0, 2.0], (self.groups, self.columns))
        zero = rng.integers(-most - 1, most + 1, scale.shape) * has_zero
        q = mk.QTensor(
            jnp.asarray(w, self.format),
            jnp.asarray(scale, jnp.float32),
            np.dtype("float32"),
            jnp.asarray(zero, jnp.int8) if has_zero else None,
        )
        spread = (np.repeat(part, self.group, 0) for part in (zero, scale))
        exact = x @ ((w - next(spread)) * next(spread))
        q = mk.contiguous(q, axis=0) if self.terms_last else q
        return jnp.asarray(x, self.array), q, exact.astype(np.float32)


cases = st.builds(
    Weighed,
    st.one_of(st.integers(0, 9), st.sampled_from([17, 65, 131])),
    st.integers(1, 4),
    st.one_of(st.integers(2, 9), st.sampled_from([16, 31, 32, 64, 97])),
    st.one_of(st.integers(0, 9), st.sampled_from([31, 64, 65, 97, 128, 256, 300])),
    st.sampled_from(FORMATS),
    st.sampled_from(ARRAYS),
    st.booleans(),
    st.booleans(),
)


def check(case: Weighed, seed: int = 0) -> None:
    x, q, exact = case.operands(seed)
    found = product(x, q, MATRIX, preferred_element_type="float32")
    np.testing.assert_array_equal(found, exact)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(cases)
def test_sums_of_integers_are_exact(case):
    check(case)


@pytest.mark.slow
@settings(max_examples=500, deadline=None, derandomize=True)
@given(cases, st.integers(1, 2**20))
def test_sums_of_many_more_shapes_are_exact(case, seed):
    check(case, seed)


@pytest.mark.parametrize("terms_last", [False, True])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("rows, columns", [(1, 1030), (2, 514), (4, 130), (200, 150)])
def test_blocks_of_a_long_sum_are_exact(rows, columns, format, terms_last):
    """More terms than are decoded at once, more columns than one thread takes."""
    check(Weighed(rows, 1, 998, columns, format, "bfloat16", False, terms_last))
    check(Weighed(rows, 2, 499, columns, format, "float32", True, terms_last))
    check(Weighed(rows, 2, 499, columns, format, "float16", False, terms_last))


@pytest.mark.parametrize("format", FLOAT8)
@pytest.mark.parametrize("terms_last", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5])
def test_every_bit_pattern_of_float8_is_decoded(format, terms_last, rows):
    """Subnormal numbers, both zeros, infinities and NaN among them."""
    numbers = np.arange(256, dtype=np.uint8).view(jnp.dtype(format))
    values = np.zeros((18, 256), numbers.dtype)  # more terms than few
    values[17] = numbers
    q = mk.QTensor(jnp.asarray(values), jnp.ones((1, 1)), np.dtype("float32"))
    q = mk.contiguous(q, axis=0) if terms_last else q
    expected = np.broadcast_to(0.5 * numbers.astype(np.float32), (rows, 256))
    for dtype in ARRAYS:
        x = jnp.full((rows, 18), 0.5, dtype)
        found = product(x, q, MATRIX, preferred_element_type="float32")
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("format", INTEGERS)
@pytest.mark.parametrize("terms_last", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5])
def test_every_value_is_decoded(format, terms_last, rows):
    lowest = -int(mk.get_format(format).max) - 1
    values = jnp.arange(lowest, -lowest).reshape(1, -1) * jnp.ones((16, 1), jnp.int32)
    q = mk.QTensor(values.astype(format), jnp.ones((1, 1)), np.dtype("float32"))
    q = mk.contiguous(q, axis=0) if terms_last else q
    for dtype in ARRAYS:
        found = product(jnp.full((rows, 16), 0.5, dtype), q, MATRIX, preferred_element_type=dtype)
        assert found.dtype == dtype
        np.testing.assert_array_equal(found, jnp.broadcast_to(8 * values[0], found.shape))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("rows", [1, 20])
def test_one_scale_is_applied_in_float32_and_the_result_is_cast_once(dtype, rows):
    rng = np.random.default_rng(2)
    x, w = rng.integers(-9, 10, (rows, 33)), rng.integers(-127, 128, (33, 50))
    scale = rng.random((1, 50), np.float32)
    q = mk.QTensor(jnp.asarray(w, jnp.int8), jnp.asarray(scale), np.dtype("float32"))
    found = product(jnp.asarray(x, jnp.float32), q, MATRIX, preferred_element_type=dtype)
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, ((x @ w).astype(np.float32) * scale).astype(dtype))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(
    "rows, format, array",
    [(2, "int4", "float32"), (2, "int8", "bfloat16"), (40, "int8", "float32")],
)
def test_results_are_rounded_to_nearest_even(rows, format, array, dtype):
    check_casts(dtype, rows, format, array)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("rows", [1, 4, 7])
def test_what_is_not_finite_reaches_its_outputs_and_no_others(rows, format):
    x = normal(rows, 64).at[0, 3].set(np.nan).at[-1, 9].set(np.inf)
    q = mk.quantize(normal(64, 300).at[5, 299].set(np.inf), format, axis=0, group_size=32)
    expected = np.zeros((rows, 300), bool)
    expected[[0, -1]], expected[:, 299] = True, True
    np.testing.assert_array_equal(~np.isfinite(product(x, q, MATRIX)), expected)


def test_vmap_and_batches_are_the_stack_of_the_products():
    x, w = normal(3, 2, 32), normal(32, 24)
    q = mk.quantize(w, "int4", axis=0, group_size=16)

    def one(x, q):
        return product(x, q, MATRIX)

    each = jnp.stack([one(row, q) for row in x])
    mapped = jax.jit(jax.vmap(one, (0, None)))
    assert CALL in mapped.lower(x, q).compile().as_text()
    np.testing.assert_array_equal(mapped(x, q), each)
    several = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf, -leaf]), q)
    several = replace(several, scale=jnp.abs(several.scale))
    signs = np.reshape([1, 1, -1], (3, 1, 1))
    np.testing.assert_array_equal(jax.vmap(one)(x, several), signs * each)
    batched = product(x, several, (((2,), (1,)), ((0,), (0,))))
    np.testing.assert_array_equal(batched, signs * each)


def test_a_weight_on_the_left_and_an_array_stored_the_other_way():
    x, w = normal(40, 6), normal(40, 10)
    q, dims = mk.quantize(w, axis=0), (((0,), (0,)), ((), ()))
    found = product(q, x, dims)
    np.testing.assert_array_equal(found, product(x, q, dims).T)
    exact = np.asarray(mk.dequantize(q), np.float64).T @ np.asarray(x, np.float64)
    bound = 50 * U * (np.abs(np.asarray(mk.dequantize(q))).T @ np.abs(np.asarray(x)))
    assert (np.abs(found - exact) <= bound).all()


@pytest.mark.parametrize(
    "policy, weight",
    [
        ("int8_weight_only_from_float32", "s8[32,24]"),
        ("int8_weight_only_from_mixed_float16", "s8[32,24]"),
        ("int4/16_from_mixed_bfloat16", "s4[32,24]"),
    ],
)
def test_quantized_models_make_the_calls(policy, weight):
    """The weight is an argument of the call as it lies: nothing decodes or moves it."""
    import flax.linen as nn

    import mpjax as mp

    model = mp.wrap(nn.Dense(24), policy)
    x = normal(5, 32)
    variables = mp.quantize(model, model.init(jax.random.key(0), x), x)
    text = jax.jit(model.apply).lower(variables, x).compile().as_text() or ""
    assert text.count(CALL) == 1
    assert weight in text
    for line in text.splitlines():
        assert not (weight in line and (" convert(" in line or " transpose(" in line)), line


HEADS = (((1, 2), (0, 1)), ((), ()))


@pytest.mark.parametrize("group_size", [(2, 8), (1, 8), (1, 4), (4, 8)])
def test_groups_may_be_of_several_contracting_axes(group_size):
    x, w = normal(3, 4, 8), normal(4, 8, 10)
    q = mk.quantize(w, "int4", axis=(0, 1), group_size=group_size)
    found, w = product(x, q, HEADS), np.asarray(mk.dequantize(q)).reshape(32, 10)
    x = np.asarray(x).reshape(3, 32)
    assert (np.abs(found - x.astype(float) @ w) <= 50 * U * (np.abs(x) @ np.abs(w))).all()


def test_an_array_has_a_derivative():
    x, q, g = normal(3, 32), mk.quantize(normal(32, 8), "int4", axis=0, group_size=16), normal(3, 8)
    slope = jax.grad(lambda x: jnp.sum(mk.matmul(x, q) * g))(x)
    w = np.asarray(mk.dequantize(q))
    bound = 20 * U * (np.abs(g) @ np.abs(w).T)
    assert (np.abs(slope - np.asarray(g) @ w.T) <= bound).all()
    half_square = jax.grad(lambda x: jnp.sum(mk.matmul(x, q) ** 2) / 2)
    _, along = jax.jvp(half_square, (x,), (jnp.cos(x),))
    np.testing.assert_allclose(along, np.cos(x) @ w @ w.T, rtol=1e-4, atol=1e-4)


def test_refusals_say_why():
    x, w = normal(4, 32), normal(32, 4)
    with pytest.raises(NotImplementedError, match="int32.* by QTensor.*: an array must be one of"):
        product(x.astype(jnp.int32), mk.quantize(w), MATRIX)
    with pytest.raises(NotImplementedError, match="float8_e4m3fnuz.*: an array must be one of"):
        product(x, mk.quantize(w, "float8_e4m3fnuz"), MATRIX)
    with pytest.raises(NotImplementedError, match="a scale changes with every term"):
        product(x, mk.quantize(w, axis=0, group_size=1), MATRIX)
    q = mk.quantize(w.reshape(4, 8, 4), axis=(0, 1), group_size=(2, 4))
    with pytest.raises(NotImplementedError, match="share a scale do not lie next to each other"):
        product(x.reshape(4, 4, 8), q, HEADS)


SHAPES = {"x": (2, 6), "w": (6, 4), "scale": (1, 4), "zero": (0, 4), "out": (2, 4)}


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"x": (3, 6)}, "lhs has not the rows of the result"),
        ({"w": (5, 4)}, "the weight has a shape that does not go with lhs"),
        ({"w": (6, 3), "scale": (1, 3), "zero": (0, 3), "out": (2, 3)}, "int4 weight is odd"),
        ({"scale": (4, 4)}, "groups that divide the terms"),
        ({"scale": (0, 4)}, "groups that divide the terms"),
        ({"scale": (1, 1)}, "the scale is not"),
        ({"scale": (2, 4), "zero": (1, 4)}, "the zero points have not the shape of the scale"),
        ({"x": (1, 2, 6)}, "differ in rank"),
        ({k: (2 if k == "x" else 3, *v) for k, v in SHAPES.items()}, "batches do not go together"),
    ],
)
def test_a_call_that_does_not_fit_is_an_error_of_xla(changed, message):
    shapes = SHAPES | changed
    dtypes = {"x": jnp.float32, "w": jnp.int4, "scale": jnp.float32, "zero": jnp.int8}
    out = jax.ShapeDtypeStruct(shapes["out"], jnp.float32)
    operands = [jnp.zeros(shapes[name], dtype) for name, dtype in dtypes.items()]
    call = jax.ffi.ffi_call("mpjax_weight_dot", out)
    with pytest.raises(jax.errors.JaxRuntimeError, match=f"mpjax_weight_dot: .*{message}"):
        jax.block_until_ready(call(*operands, weight_terms_last=False))


ELSEWHERE = """
from mpjax_kernels._native_library import _load
from tests.test_kernels_native_weight import Weighed, check
print(_load()[1] or _load()[0])
if _load()[1]:
    raise SystemExit
for array in ("float32", "bfloat16", "float16"):
    for format in ("int8", "int4", "float8_e4m3fn", "float8_e5m2"):
        for terms_last in (False, True):
            check(Weighed(1, 2, 31, 300, format, array, True, terms_last))
            check(Weighed(9, 3, 64, 65, format, array, False, terms_last))
"""


@pytest.mark.parametrize("isa", [isa for isa in ISAS if isa != here()])
def test_other_instruction_sets_compute_the_same(isa):
    done = elsewhere(ELSEWHERE, MPJAX_NATIVE_ISA=isa)
    if done.stdout.startswith("the environment has MPJAX_NATIVE_ISA="):
        pytest.skip(f"this CPU has no {isa}")
    assert (done.returncode, done.stdout) == (0, f"{isa}\n"), done.stderr
