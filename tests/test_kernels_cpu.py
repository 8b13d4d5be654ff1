"""The CPU implementation: its blocks, digits and bit patterns, and the programs it compiles to.

That it computes the product of every shape and pair of formats is in test_kernels_conformance.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mpjax_kernels as mk
from mpjax_kernels._cpu_digits import MOST_TERMS, digits, recombine
from mpjax_kernels._float8_bits import from_bits
from mpjax_kernels._formats import FORMATS
from tests.kernels_helpers import U, exact, matmul, normal, quantize

pytestmark = pytest.mark.usefixtures("strict_promotion")

E4M3 = "float8_e4m3fn"
FLOAT8 = [name for name in FORMATS if name.startswith("float8")]


def cpu(x, q) -> jax.Array:
    return matmul(x, q, preferred_element_type=jnp.float32, implementation="cpu")


def integers(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(-127, 128, shape).astype(np.int8)


def unit(values) -> mk.QTensor:
    """The QTensor of these values with a scale of one."""
    return mk.QTensor(
        jnp.asarray(values), jnp.ones((1,) * np.ndim(values), jnp.float32), np.dtype("float32")
    )


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("name", FLOAT8)
def test_every_finite_bit_pattern_decodes_to_its_number(name, dtype):
    bits = np.arange(256, dtype=np.uint8).view(np.int8)
    expected = bits.view(FORMATS[name].dtype).astype(np.float32)
    finite = np.isfinite(expected)
    result = jax.jit(lambda b: from_bits(b, FORMATS[name], dtype))(jnp.asarray(bits))
    assert result.dtype == dtype
    result = np.asarray(result, np.float32)
    np.testing.assert_array_equal(result[finite], expected[finite])
    np.testing.assert_array_equal(np.signbit(result[finite]), np.signbit(expected[finite]))


# [rows, terms] by [terms, columns]: one row and more than the blocks and cuts are made for, columns
# that divide into cuts and a prime number of them, terms that divide into blocks and not; and less
# than is cut at all.
@pytest.mark.parametrize(
    ("rows", "terms", "columns"),
    [(1, 1040, 1048), (16, 1031, 1033), (130, 264, 133), (1, 264, 133), (16, 264, 133)],
)
@pytest.mark.parametrize("stored", ["KN", "NK"])
@pytest.mark.parametrize("format", ["int8", "int4"])
def test_integer_sums_are_exact_in_every_form(format, stored, rows, terms, columns):
    x, w = integers(rows, terms), integers(terms, columns)
    x[0] = w[:, 0] = 127
    if format == "int4":
        w = np.clip(w, -7, 7)
    q, r = unit(x), unit(jnp.asarray(w).astype(format))
    r = mk.contiguous(r, axis=0) if stored == "NK" else r
    # An exact sum is at most 127**2 * 1040 = 2**23.999; float32 holds it.
    expected = x.astype(np.int64) @ w
    np.testing.assert_array_equal(cpu(q, r), expected)
    np.testing.assert_array_equal(cpu(r.T, q.T), expected.T)


@pytest.mark.parametrize("rows", [1, 16])
def test_a_small_weight_is_multiplied_as_it_lies(rows):
    """Neither cut into blocks, whose loop would copy all of it, nor turned."""
    x, small = unit(integers(rows, 1024)), unit(integers(1024, 1024))

    def compiled(w):
        product = jax.jit(partial(mk.matmul, implementation="cpu"))
        return product.lower(x, w).compile().as_text()

    text = compiled(small)
    assert " while(" not in text and "s8[1024,1024]{1,0} parameter" in text
    assert "s8[1024,1024]{1,0} fusion" not in text and "s8[1024,1024]{1,0} copy" not in text
    assert " while(" in compiled(unit(integers(1024, 1025)))


def test_both_operands_may_be_contracted_along_their_rows():
    """The gradient of a weight: x [M, K] and g [M, N] contracted over M."""
    x, g = integers(264, 139), integers(264, 150)
    dims = (((0,), (0,)), ((), ()))

    def product(x, g):
        return mk.dot_general(x, g, dims, implementation="cpu")

    compiled = jax.jit(product).lower(unit(x), unit(g)).compile()
    expected = x.T.astype(np.int64) @ g
    np.testing.assert_array_equal(compiled(unit(x), unit(g)), expected)
    # The left side was transposed in int8; XLA's slow form widens both operands to int32 instead.
    assert "s8[139,264]" in compiled.as_text() and "s32[264," not in compiled.as_text()


# More than 1 MiB when decoded: several blocks, of which the last overlaps the one before if the
# columns are stored first, and which hold several groups or a part of one if the terms are.
@pytest.mark.parametrize("stored", ["KN", "NK"])
@pytest.mark.parametrize("group_size", [None, 13, 520])
@pytest.mark.parametrize("left", ["bfloat16", "float32", E4M3])
@pytest.mark.parametrize("symmetric", [True, False])
def test_blocks_cover_the_operand(left, group_size, stored, symmetric):
    x, w = normal(6, 1040), normal(1040, 701)
    q = quantize(x, left, axis=1) if left == E4M3 else x.astype(left)
    if symmetric:
        r = quantize(w, E4M3, axis=0, group_size=group_size)
    else:
        options = {"axis": 0, "group_size": group_size, "symmetric": False}
        r = jax.jit(lambda w: mk.quantize(w, "int8", **options))(w)
    ws = np.asarray(mk.dequantize(r, jnp.float32), np.float64)
    r = mk.contiguous(r, axis=0) if stored == "NK" else r
    xs = exact(q) if left == E4M3 else np.asarray(q, np.float64)
    # A product, its part in 1040 sums and two scales round with at most U each, and so did ws.
    bound = (1040 + 4) * U * (np.abs(xs) @ np.abs(ws))
    assert (np.abs(np.asarray(cpu(q, r), np.float64) - xs @ ws) <= bound).all()


@pytest.mark.parametrize("stored", ["KN", "NK"])
def test_a_stack_of_matrices_is_read_block_by_block(stored):
    x, w = normal(3, 5, 1040), normal(3, 1040, 701)
    q, r = quantize(x, E4M3, axis=2), quantize(w, E4M3, axis=1)
    r = mk.contiguous(r, axis=1) if stored == "NK" else r
    dims = (((2,), (1,)), ((0,), (0,)))
    result = jax.jit(lambda q, r: mk.dot_general(q, r, dims, implementation="cpu"))(q, r)
    xs, ws = exact(q), np.asarray(mk.dequantize(r, jnp.float32), np.float64)
    bound = (1040 + 4) * U * (np.abs(xs) @ np.abs(ws))
    assert (np.abs(np.asarray(result, np.float64) - xs @ ws) <= bound).all()


def test_digits_are_within_half_a_unit_of_the_row():
    x = normal(1, 5, 513) * jnp.asarray([1.0, 1e30, 1e-30, 0.0, 1e-37])[:, None]
    x = x.at[0, 0, 0].set(-np.nextafter(np.float32(16), np.float32(0)))
    parts, scale = jax.jit(digits)(x)
    assert parts.dtype == jnp.int8 and parts.shape == (1, 15, 513) and scale.shape == (1, 5, 1)
    high, middle, low = np.split(np.asarray(parts, np.int64), 3, axis=1)
    assert scale[0, 0] == 2.0 ** (3 - 21) and high[0, 0, 0] == -64  # 16 * 2**18 / 65536
    value = (65536 * high + 256 * middle + low) * np.asarray(scale, np.float64)
    xs = np.asarray(x, np.float64)
    bound = np.maximum(np.abs(xs).max(2, keepdims=True) * 2.0**-22, 2.0**-127)
    assert (np.abs(value - xs) <= bound).all()
    assert (value[0, 3] == 0).all()


def test_digits_of_bfloat16_are_exact_down_to_a_part_of_the_row():
    x = normal(1, 3, 513).astype(jnp.bfloat16)
    parts, scale = jax.jit(digits)(x)
    high, middle, low = np.split(np.asarray(parts, np.int64), 3, axis=1)
    value, xs = (65536 * high + 256 * middle + low) * np.asarray(scale, np.float64), np.asarray(x)
    xs = xs.astype(np.float64)
    large = np.abs(xs) >= np.abs(xs).max(2, keepdims=True) * 2.0**-14
    assert large.mean() > 0.9
    np.testing.assert_array_equal(value[large], xs[large])


def test_digits_of_a_row_that_is_not_finite_are_finite_and_its_scale_is_not():
    x = normal(1, 3, 8).at[0, 0, 2].set(np.inf).at[0, 1, 3].set(np.nan)
    parts, scale = jax.jit(digits)(x)
    np.testing.assert_array_equal(np.isfinite(scale[0, :, 0]), [False, False, True])
    assert (np.asarray(parts).reshape(3, 3, 8)[:, :2] == 0).all()


def test_digits_are_for_the_default_precision():
    x, w = normal(1, 64).astype(jnp.bfloat16), mk.quantize(normal(64, 96), axis=0)

    def multiplies_integers(precision, x=x):
        arguments = {"precision": precision, "preferred_element_type": jnp.float32}
        product = partial(mk.matmul, implementation="cpu", **arguments)
        return "xi32>" in jax.jit(product).lower(x, w).as_text().split("dot_general", 1)[1][:400]

    assert multiplies_integers(None) and multiplies_integers("default")
    assert not multiplies_integers("highest")
    assert not multiplies_integers(None, x.astype(jnp.float32))  # its 24 bits are meant


def test_the_sums_of_digits_cannot_overflow():
    """The digit that is furthest from zero is -128; the furthest value of int8 is 127."""
    assert MOST_TERMS * 128 * 127 < 2**31 <= (MOST_TERMS + 1) * 128 * 127
    sums = jnp.asarray([[[3], [-2], [1]]], jnp.int32)
    assert recombine(sums) == 3 * 65536 - 2 * 256 + 1


def dots(lowered) -> list[str]:
    return [line for line in lowered.as_text().splitlines() if "stablehlo.dot_general" in line]


@pytest.mark.parametrize(("dtype", "rows"), [("bfloat16", 1), ("bfloat16", 4), ("float16", 16)])
def test_a_few_rows_of_an_array_are_multiplied_as_integers(dtype, rows):
    x, w = normal(rows, 512).astype(dtype), normal(512, 77)
    r = mk.contiguous(quantize(w, "int8", axis=0), axis=0)
    xs, ws = np.asarray(x, np.float64), np.asarray(mk.dequantize(r, jnp.float32), np.float64)
    # Half a unit of each row; the sums of digits and two sums of them round, as do two scales.
    # A digit is at most twice as large, with the others, as the number: 256 b + c < 65536 / 2.
    half = np.abs(xs).max(1, keepdims=True) * 2.0**-22 * np.abs(ws).sum(0)
    bound = half + 10 * U * ((np.abs(xs) + 2 * np.abs(xs).max(1, keepdims=True) / 64) @ np.abs(ws))
    assert (np.abs(np.asarray(cpu(x, r), np.float64) - xs @ ws) <= bound).all()
    lowered = matmul.lower(x, r, preferred_element_type=jnp.float32, implementation="cpu")
    (dot,) = dots(lowered)
    assert "xi8>" in dot and "xi32>" in dot
    more = normal(17, 512).astype(dtype)
    more = matmul.lower(more, r, preferred_element_type=jnp.float32, implementation="cpu")
    (dot,) = dots(more)
    assert "xi8>" not in dot


STEPS = {
    "w8a8": ("int8", "int8", {}),
    "w8a16": ("bfloat16", "int8", {}),
    "float8": (E4M3, E4M3, {}),
    "float8 beside bfloat16": ("bfloat16", E4M3, {}),
    "w4a8": ("int8", "int4", {}),
    "w4a16 in groups": ("bfloat16", "int4", {"group_size": 128}),
}


@pytest.mark.parametrize("stored", ["KN", "NK"])
@pytest.mark.parametrize("name", STEPS)
def test_a_decode_step_holds_no_second_copy_of_the_weight(name, stored):
    left, right, options = STEPS[name]
    size = 4096
    x = jax.ShapeDtypeStruct((1, size), jnp.bfloat16 if left == "bfloat16" else jnp.float32)

    def weight(w):
        r = mk.quantize(w, right, axis=0, **options)
        return mk.contiguous(r, axis=0) if stored == "NK" else r

    r = jax.eval_shape(weight, jax.ShapeDtypeStruct((size, size), x.dtype))

    def step(x, r):
        q = x if left == "bfloat16" else mk.quantize(x, left, axis=1)
        return mk.matmul(q, r, implementation=("cpu", "xla"))

    compiled = jax.jit(step).lower(x, r).compile()
    memory, text = compiled.memory_analysis(), compiled.as_text()
    assert memory is not None and text is not None
    assert memory.temp_size_in_bytes <= size * size / 10  # of int8
    if name in ("w8a8", "w8a16"):  # XLA's fast kernels, where they are what makes it fast
        fast = [line for line in text.splitlines() if "__ynn_fusion" in line]
        assert any("= s32[" in line for line in fast)


@pytest.mark.parametrize("stored", ["KN", "NK"])
def test_many_rows_by_groups_are_one_product_of_the_decoded_weight(stored):
    """And not a product per group, whose sums take more time to add than to compute."""
    g = quantize(normal(32, 130), "int4", axis=0, group_size=16)
    x, g = normal(128, 32), mk.contiguous(g, axis=0) if stored == "NK" else g
    w = np.asarray(mk.dequantize(g), np.float64)
    bound = 32 * U * (np.abs(np.asarray(x, np.float64)) @ np.abs(w))  # 32 terms
    assert (
        np.abs(np.asarray(cpu(x, g), np.float64) - np.asarray(x, np.float64) @ w) <= bound
    ).all()
    text = jax.jit(partial(mk.matmul, implementation="cpu")).lower(x, g).compile().as_text()
    assert text is not None
    (product,) = [line for line in text.splitlines() if " dot(" in line]
    assert "f32[128,130]" in product


def test_what_xla_multiplies_as_fast_is_refused():
    q = quantize(normal(8, 4), "int8", axis=0)
    with pytest.raises(NotImplementedError, match=r"'cpu': the larger operand is float32\[9,8\]"):
        mk.matmul(normal(9, 8), q, implementation="cpu")
    with pytest.raises(NotImplementedError, match="'cpu': .* there is nothing to do"):
        mk.matmul(quantize(normal(0, 8), "int8"), q, implementation="cpu")
    x = quantize(normal(2, 8, 6), "int8", axis=(1, 2), group_size=(4, 3))
    w = quantize(normal(8, 6, 5), "int8", axis=(0, 1))
    with pytest.raises(NotImplementedError, match="'cpu': scales vary along several contracting"):
        mk.dot_general(x, w, (((1, 2), (0, 1)), ((), ())), implementation="cpu")
    limit = 133144
    long = unit(np.zeros((1, limit + 1), np.int8))
    with pytest.raises(NotImplementedError, match=f"more than {limit} can overflow int32"):
        mk.matmul(long, unit(np.zeros((limit + 1, 1), np.int8)), implementation="cpu")
