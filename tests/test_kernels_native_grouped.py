"""The native CPU kernels of int8 by int4, and in groups: exact, by every way through them."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mpjax_kernels as mk
from mpjax_kernels._native_library import native_refusal
from tests.kernels_helpers import U, normal
from tests.native_helpers import ISAS, MATRIX, elsewhere, here, product

pytestmark = pytest.mark.skipif(
    native_refusal("int4") is not None, reason=f"no native kernels: {native_refusal('int4')}"
)

CALL = 'custom_call_target="mpjax_grouped_dot"'
FORMATS = ("int8", "int4")


@dataclass(frozen=True)
class Grouped:
    """The sizes of a product of rows of int8 by a weight in groups, and what the weight is."""

    rows: int
    groups: int
    group: int
    columns: int
    format: str
    has_zero: bool
    terms_last: bool
    is_left: bool = False

    def operands(self, seed: int = 0) -> tuple[mk.QTensor, mk.QTensor, np.ndarray]:
        """Rows, a weight of at least two groups, or one, and their product, exact in float32.

        The integers are of the whole range if sums stay below 2**24; scales are powers of two.
        """
        rng, terms = np.random.default_rng(seed), self.groups * self.group
        most = int(mk.get_format(self.format).max)
        largest = min(127, 2**20 // max(1, terms * (2 * most + 1)))
        x = rng.integers(-largest, largest + 1, (self.rows, terms))
        w = rng.integers(-most - self.has_zero, most + 1, (terms, self.columns))
        by_row = rng.choice([0.5, 1.0, 2.0], (self.rows, 1)).astype(np.float32)
        scale = rng.choice([0.5, 1.0, 2.0], (self.groups, self.columns)).astype(np.float32)
        zero = rng.integers(-most - 1, most + 1, scale.shape) * self.has_zero
        q = mk.QTensor(
            jnp.asarray(w, self.format),
            jnp.asarray(scale),
            np.dtype("float32"),
            jnp.asarray(zero, jnp.int8) if self.has_zero else None,
        )
        spread = (np.repeat(part, self.group, 0) for part in (zero, scale))
        exact = x @ ((w - next(spread)) * next(spread)) * by_row
        q = mk.contiguous(q, axis=0) if self.terms_last else q
        rows = mk.QTensor(jnp.asarray(x, jnp.int8), jnp.asarray(by_row), np.dtype("float32"))
        return rows, q, exact.astype(np.float32)

    def check(self, seed: int = 0) -> None:
        """By `dot_general`."""
        rows, weight, exact = self.operands(seed)
        if self.is_left:
            found = product(weight, rows, (((0,), (1,)), ((), ()))).T
        else:
            found = product(rows, weight, MATRIX)
        np.testing.assert_array_equal(found, exact)

    def check_call(self, seed: int = 0) -> None:
        """By the call as it is, which compiles sooner."""
        rows, weight, exact = self.operands(seed)
        zero = np.zeros((0, self.columns), np.int8)
        zero = zero if weight.zero_point is None else weight.zero_point
        groups = self.group if self.terms_last else self.columns
        values = weight.values if groups % 2 == 0 else weight.values.astype(jnp.int8)
        call = jax.ffi.ffi_call("mpjax_grouped_dot", jax.ShapeDtypeStruct(exact.shape, jnp.float32))
        by_row = jnp.reshape(rows.scale, -1)
        found = call(
            *(rows.values, values, by_row, weight.scale, zero), weight_terms_last=self.terms_last
        )
        np.testing.assert_array_equal(found, exact)


cases = st.builds(
    Grouped,
    st.one_of(st.integers(1, 9), st.sampled_from([16, 17, 65, 131])),
    st.integers(1, 5),
    st.one_of(st.integers(1, 9), st.sampled_from([16, 31, 32, 64, 96, 97, 128, 130, 300])),
    st.one_of(st.integers(1, 9), st.sampled_from([31, 64, 65, 97, 128, 200])),
    st.sampled_from(FORMATS),
    st.booleans(),
    st.booleans(),
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(cases)
def test_sums_are_exact(case):
    case.check_call()


# Of each way through: few rows by registers of a group, of parts of one and of several, by lines of
# memory, and many rows by panels, of several groups, of one and of parts of one.
@pytest.mark.parametrize("terms_last", [False, True])
@pytest.mark.parametrize("rows", [1, 7, 40])
@pytest.mark.parametrize("format, group", [("int4", 32), ("int4", 600), ("int8", 16), ("int8", 64)])
def test_every_way_is_exact(format, group, rows, terms_last):
    Grouped(rows, 5, group, 198, format, False, terms_last).check()
    Grouped(rows, 5, group, 66, format, True, terms_last, is_left=True).check()


@pytest.mark.parametrize("shape", [(0, 4, 3), (2, 0, 3), (3, 5, 0), (1, 1, 1), (5, 7, 3)])
def test_empty_and_odd_shapes(shape):
    rows, terms, columns = shape
    for format in FORMATS:
        x = mk.quantize(normal(rows, terms) if rows * terms else jnp.zeros((rows, terms)), axis=1)
        w = normal(terms, columns) if terms * columns else jnp.zeros((terms, columns))
        w = mk.quantize(w, format, axis=0, symmetric=False)
        found = product(x, w, MATRIX)
        expected = mk.dot_general(x, w, MATRIX, implementation="reference")
        bound = (terms + 3) * U * (np.abs(mk.dequantize(x)) @ np.abs(mk.dequantize(w)))
        assert found.shape == (rows, columns)
        assert (np.abs(found - expected) <= bound).all()


def numbers(rng, shape) -> np.ndarray:
    """Of no round numbers in binary."""
    return rng.uniform(0.5, 2, shape).astype(np.float32)


def in_order(x, w, zero, by_row, scale) -> np.ndarray:
    """What the contract says: exact sums of groups, scaled and added in float32, then the rows'."""
    groups = scale.shape[0]
    size = x.shape[1] // groups
    total = np.zeros((x.shape[0], w.shape[1]), np.float32)
    for g in range(groups):
        terms = slice(g * size, (g + 1) * size)
        exact = (x[:, terms] @ (w[terms] - zero[g])).astype(np.float32)
        total = total + exact * scale[g]
    return total * by_row


def check_order(format: str, rows: int, terms_last: bool, has_zero: bool) -> None:
    rng = np.random.default_rng(rows)
    most = int(mk.get_format(format).max)
    x = rng.integers(-127, 128, (rows, 640))
    w = rng.integers(-most - 1, most + 1, (640, 140))
    zero = rng.integers(-most - 1, most + 1, (5, 140)) * has_zero
    by_row, scale = numbers(rng, (rows, 1)), numbers(rng, (5, 140))
    points = jnp.asarray(zero, jnp.int8) if has_zero else None
    dtype = np.dtype("float32")
    weight = mk.QTensor(jnp.asarray(w, format), jnp.asarray(scale), dtype, points)
    weight = mk.contiguous(weight, axis=0) if terms_last else weight
    found = product(
        mk.QTensor(jnp.asarray(x, jnp.int8), jnp.asarray(by_row), dtype), weight, MATRIX
    )
    np.testing.assert_array_equal(found, in_order(x, w, zero, by_row, scale))


@pytest.mark.parametrize("terms_last", [False, True])
@pytest.mark.parametrize("rows", [1, 3, 16, 70])
@pytest.mark.parametrize("format", FORMATS)
def test_groups_are_scaled_and_added_in_their_order(format, rows, terms_last):
    check_order(format, rows, terms_last, has_zero=rows == 3)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("rows", [1, 20])
def test_one_group_is_scaled_by_its_row_first_and_the_result_is_cast_once(dtype, rows):
    rng = np.random.default_rng(2)
    x, w = rng.integers(-127, 128, (rows, 34)), rng.integers(-8, 8, (34, 50))
    by_row, scale = numbers(rng, (rows, 1)), numbers(rng, (1, 50))
    weight = mk.QTensor(jnp.asarray(w, jnp.int4), jnp.asarray(scale), np.dtype("float32"))
    q = mk.QTensor(jnp.asarray(x, jnp.int8), jnp.asarray(by_row), np.dtype("float32"))
    found = product(q, weight, MATRIX, preferred_element_type=dtype)
    assert found.dtype == dtype
    exact = (x @ w).astype(np.float32)
    np.testing.assert_array_equal(found, (exact * by_row * scale).astype(dtype))


def check_largest(rows: int, terms_last: bool) -> None:
    """Every product at its largest magnitude, with every sign, in groups short and long."""
    for group in (32, 128, 2000):
        x = np.where(np.arange(rows) % 2, 127, -128).reshape(-1, 1) * np.ones((1, 2 * group), int)
        w = np.where(np.arange(130) % 2, 7, -8) * np.ones((2 * group, 1), int)
        one = np.ones((1, 1), np.float32)
        scale = jnp.ones((2, 130), jnp.float32)
        weight = mk.QTensor(jnp.asarray(w, jnp.int4), scale, np.dtype("float32"))
        weight = mk.contiguous(weight, axis=0) if terms_last else weight
        q = mk.QTensor(jnp.asarray(x, jnp.int8), jnp.asarray(one), np.dtype("float32"))
        np.testing.assert_array_equal(product(q, weight, MATRIX), (x @ w).astype(np.float32))


@pytest.mark.parametrize("terms_last", [False, True])
@pytest.mark.parametrize("rows", [2, 20])
def test_the_largest_sums_there_are(rows, terms_last):
    check_largest(rows, terms_last)


@pytest.mark.parametrize("rows", [1, 20])
@pytest.mark.parametrize("terms_last", [False, True])
def test_what_is_not_finite_reaches_its_outputs_and_no_others(rows, terms_last):
    x = mk.quantize(normal(rows, 64).at[0, 3].set(np.nan), axis=1)
    q = mk.quantize(normal(64, 300).at[5, 299].set(np.inf), "int4", axis=0, group_size=32)
    q = mk.contiguous(q, axis=0) if terms_last else q
    expected = np.zeros((rows, 300), bool)
    expected[0], expected[:, 299] = True, True
    np.testing.assert_array_equal(~np.isfinite(product(x, q, MATRIX)), expected)


def test_vmap_and_batches_are_the_stack_of_the_products():
    x, q = (
        mk.quantize(normal(3, 2, 32), axis=2),
        mk.quantize(normal(32, 24), "int4", axis=0, group_size=16),
    )

    def one(x, q):
        return product(x, q, MATRIX)

    each = jnp.stack([one(x[i], q) for i in range(3)])
    mapped = jax.jit(jax.vmap(one, (0, None)))
    assert CALL in (mapped.lower(x, q).compile().as_text() or "")
    np.testing.assert_array_equal(mapped(x, q), each)
    several = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf, leaf]), q)
    np.testing.assert_array_equal(product(x, several, (((2,), (1,)), ((0,), (0,)))), each)


HEADS = (((1, 2), (0, 1)), ((), ()))


@pytest.mark.parametrize("group_size", [(2, 8), (1, 8), (1, 4), (4, 8)])
def test_groups_may_be_of_several_contracting_axes(group_size):
    x, w = mk.quantize(normal(3, 4, 8), axis=(1, 2)), normal(4, 8, 10)
    q = mk.quantize(w, "int4", axis=(0, 1), group_size=group_size)
    expected = mk.dot_general(x, q, HEADS, implementation="reference")
    magnitude = np.abs(mk.dequantize(x)).reshape(3, 32) @ np.abs(mk.dequantize(q)).reshape(32, 10)
    assert (np.abs(product(x, q, HEADS) - expected) <= 40 * U * magnitude).all()


def test_int4_by_int4_takes_the_larger_one_as_the_weight():
    rng = np.random.default_rng(3)
    x, w = rng.integers(-8, 8, (3, 96)), rng.integers(-8, 8, (96, 40))
    one = jnp.ones((1, 1), jnp.float32)
    x4, w4 = (mk.QTensor(jnp.asarray(v, jnp.int4), one, np.dtype("float32")) for v in (x, w))
    np.testing.assert_array_equal(product(x4, w4, MATRIX), (x @ w).astype(np.float32))
    flipped = product(w4, x4, (((0,), (1,)), ((), ())))
    np.testing.assert_array_equal(flipped, (x @ w).T.astype(np.float32))


@pytest.mark.parametrize("policy", ["w4a8/16_from_float32", "w4a8_from_mixed_bfloat16"])
def test_quantized_models_make_the_calls(policy):
    """The weight and its scales are arguments of the call as they lie: nothing moves them."""
    import flax.linen as nn

    import mpjax as mp

    model = mp.wrap(nn.Dense(24), policy)
    x = normal(5, 32)
    variables = mp.quantize(model, model.init(jax.random.key(0), x), x)
    text = jax.jit(model.apply).lower(variables, x).compile().as_text() or ""
    assert text.count('target="mpjax_dynamic_grouped_dot"') == text.count('target="mpjax_') == 1
    assert "s4[32,24]" in text
    scales = f"f32[{variables['params']['kernel'].scale.shape[0]},24]"
    for line in text.splitlines():
        moved = any(f" {name}(" in line for name in ("convert", "transpose", "copy"))
        assert not (moved and ("s4[32,24]" in line or scales in line)), line


def test_scales_of_a_weight_stored_the_other_way_are_not_copied():
    x = mk.quantize(normal(1, 64), axis=1)
    q = mk.contiguous(mk.quantize(normal(64, 24), "int4", axis=0, group_size=16), axis=0)
    text = jax.jit(mk.matmul).lower(x, q).compile().as_text() or ""
    assert CALL in text
    assert not any(f" {name}(" in text for name in ("fusion", "transpose", "copy"))


def test_refusals_say_why():
    x, w = mk.quantize(normal(4, 32), axis=1), normal(32, 4)
    grouped = mk.quantize(normal(4, 32), axis=1, group_size=8)
    q = mk.quantize(w, "int4", axis=0, group_size=8)
    with pytest.raises(NotImplementedError, match="one of them must have a scale constant along"):
        product(grouped, q, MATRIX)
    with pytest.raises(NotImplementedError, match="one of them .* and no zero point"):
        product(mk.quantize(normal(4, 32), symmetric=False), q, MATRIX)
    with pytest.raises(NotImplementedError, match="a scale changes with every term"):
        product(x, mk.quantize(w, "int4", axis=0, group_size=1), MATRIX)
    several = mk.quantize(w.reshape(4, 8, 4), "int4", axis=(0, 1), group_size=(2, 4))
    with pytest.raises(NotImplementedError, match="share a scale do not lie next to each other"):
        product(mk.quantize(normal(4, 4, 8), axis=(1, 2)), several, HEADS)
    one = jnp.ones((1, 1), jnp.float32)
    row = mk.QTensor(jnp.zeros((1, 133146), jnp.int8), one, np.dtype("float32"))
    column = mk.QTensor(row.values.T, jnp.tile(one, (2, 1)), np.dtype("float32"))
    with pytest.raises(NotImplementedError, match="133146 terms: more than 133144 can overflow"):
        product(row, column, MATRIX)


SHAPES = {"x": (2, 8), "w": (8, 4), "rows": (2,), "scale": (1, 4), "zero": (0, 4), "out": (2, 4)}
DTYPES = {"x": "int8", "w": "int4", "rows": "float32", "scale": "float32", "zero": "int8"}


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"x": (3, 8)}, "lhs has not the rows of the result"),
        ({"w": (7, 4)}, "the weight has a shape that does not go with lhs"),
        ({"w": (8, 3), "scale": (1, 3), "zero": (0, 3), "out": (2, 3)}, "int4 weight, .* is odd"),
        ({"rows": (3,)}, "neither one entry nor one for each row"),
        ({"scale": (3, 4)}, "groups that divide the terms"),
        ({"scale": (0, 4)}, "groups that divide the terms"),
        ({"scale": (1, 1)}, "the scale is not"),
        ({"scale": (2, 4), "zero": (1, 4)}, "the zero points have not the shape of the scale"),
        ({"x": (1, 2, 8)}, "differ in rank"),
    ],
)
def test_a_call_that_does_not_fit_is_an_error_of_xla(changed, message):
    shapes = SHAPES | changed
    operands = [jnp.zeros(shapes[name], dtype) for name, dtype in DTYPES.items()]
    call = jax.ffi.ffi_call("mpjax_grouped_dot", jax.ShapeDtypeStruct(shapes["out"], jnp.float32))
    with pytest.raises(jax.errors.JaxRuntimeError, match=f"mpjax_grouped_dot: .*{message}"):
        jax.block_until_ready(call(*operands, weight_terms_last=False))


def test_a_group_of_int4_that_begins_within_a_byte_is_an_error_of_xla():
    shapes = SHAPES | {"x": (2, 6), "w": (4, 6), "scale": (2, 4)}
    operands = [jnp.zeros(shapes[name], dtype) for name, dtype in DTYPES.items()]
    call = jax.ffi.ffi_call("mpjax_grouped_dot", jax.ShapeDtypeStruct((2, 4), jnp.float32))
    with pytest.raises(jax.errors.JaxRuntimeError, match="a group along it, is odd"):
        jax.block_until_ready(call(*operands, weight_terms_last=True))


ELSEWHERE = """
from mpjax_kernels._native_library import _load
from tests.test_kernels_native_grouped import Grouped, check_largest, check_order
print(_load()[1] or _load()[0])
if _load()[1]:
    raise SystemExit
for terms_last in (False, True):
    for format in ("int8", "int4"):
        for rows in (1, 4, 7, 70):
            check_order(format, rows, terms_last, rows == 4)
        for group in (16, 32, 64):
            Grouped(3, 5, group, 66, format, False, terms_last).check()
    check_largest(3, terms_last)
"""


@pytest.mark.parametrize("isa", [isa for isa in ISAS if isa != here()])
def test_other_instruction_sets_compute_the_same(isa):
    done = elsewhere(ELSEWHERE, MPJAX_NATIVE_ISA=isa)
    if done.stdout.startswith("the environment has MPJAX_NATIVE_ISA="):
        pytest.skip(f"this CPU has no {isa}")
    assert (done.returncode, done.stdout) == (0, f"{isa}\n"), done.stderr
