"""Few rows, quantized and multiplied in one native call: the bits of the two it stands for."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import export

import mpjax_kernels as mk
from tests.kernels_helpers import normal, quantize
from tests.native_helpers import here

pytestmark = pytest.mark.skipif(not here(), reason="there are no native kernels")

CALL = "mpjax_dynamic_int8_dot"
ROWS = (((1,), (0,)), ((), ()))


def in_two(x, w, axes=ROWS, dtype=None):
    q = mk.quantize(x, axis=axes[0][0])
    return mk.dot_general(
        q, w, axes, implementation="native", preferred_element_type=dtype or x.dtype
    )


def in_one(x, w, axes=ROWS, dtype=None):
    return mk.dynamic_dot_general(
        x, w, axes, implementation="native", preferred_element_type=dtype or x.dtype
    )


def calls(function, *args):
    text = jax.jit(function).lower(*args).compile().as_text() or ""
    return sorted(re.findall(r'custom_call_target="(mpjax_\w+)"', text))


SIZES = st.one_of(st.integers(0, 40), st.sampled_from([63, 64, 65, 127, 191, 257]))


@settings(deadline=None, max_examples=30)
@given(
    rows=st.integers(0, 20),
    terms=SIZES,
    columns=SIZES,
    dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
    result=st.sampled_from(["float32", "bfloat16", "float16"]),
    terms_last=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_it_has_the_bits_of_two_calls(rows, terms, columns, dtype, result, terms_last, seed):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, terms)) * 10.0 ** rng.integers(-3, 3, (rows, 1))
    x = jnp.asarray(x, dtype)
    w = quantize(jnp.asarray(rng.standard_normal((terms, columns)), jnp.float32), axis=0)
    w = mk.contiguous(w, axis=0) if terms_last else w
    one, two = (jax.jit(partial(f, dtype=result))(x, w) for f in (in_one, in_two))
    assert one.dtype == result
    np.testing.assert_array_equal(one, two)


WEIGHTS = {
    "int4": {"format": "int4"},
    "int4 in groups": {"format": "int4", "group_size": 16},
    "int4 with zero points": {"format": "int4", "group_size": 32, "symmetric": False},
    "int8 in groups": {"format": "int8", "group_size": 16},
}


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("terms_last", [False, True])
@pytest.mark.parametrize("rows", [1, 5, 40])
def test_so_it_has_by_int4_and_in_groups(weight, terms_last, rows):
    x, w = (
        normal(rows, 96).astype(jnp.bfloat16),
        mk.quantize(normal(96, 50), axis=0, **WEIGHTS[weight]),
    )
    w = mk.contiguous(w, axis=0) if terms_last else w
    assert calls(in_one, x, w) == ["mpjax_dynamic_grouped_dot"]
    np.testing.assert_array_equal(jax.jit(in_one)(x, w), jax.jit(in_two)(x, w))


def test_by_int4_it_takes_no_terms_batches_and_layers():
    w = mk.quantize(normal(3, 64, 48), "int4", axis=1, group_size=32)
    x = normal(3, 2, 64)
    axes = (((2,), (1,)), ((0,), (0,)))
    one, two = (jax.jit(partial(f, axes=axes))(x, w) for f in (in_one, in_two))
    np.testing.assert_array_equal(one, two)
    np.testing.assert_array_equal(jax.jit(jax.vmap(in_one))(x, w), two)
    nothing = mk.quantize(jnp.zeros((0, 48)), "int4", axis=0)
    np.testing.assert_array_equal(jax.jit(in_one)(jnp.zeros((2, 0)), nothing), jnp.zeros((2, 48)))


@pytest.mark.parametrize(
    ("x", "w", "axes"),
    [
        ((3, 5, 40), (40, 24), (((2,), (0,)), ((), ()))),
        ((40, 5), (24, 40), (((0,), (1,)), ((), ()))),
        ((5, 4, 10), (4, 10, 24), (((1, 2), (0, 1)), ((), ()))),
        ((3, 5, 40), (3, 40, 24), (((2,), (1,)), ((0,), (0,)))),
    ],
)
def test_any_contraction(x, w, axes):
    x, w = normal(*x), normal(*w)
    w = mk.quantize(w, axis=axes[0][1])
    assert calls(partial(in_one, axes=axes), x, w) == [CALL]
    one, two = (jax.jit(partial(f, axes=axes))(x, w) for f in (in_one, in_two))
    np.testing.assert_array_equal(one, two)


def test_a_row_that_is_not_finite_is_alone():
    x = normal(3, 40).at[1, 7].set(jnp.inf)
    w = mk.quantize(normal(40, 24), axis=0)
    out = jax.jit(in_one)(x, w)
    assert np.isnan(out[1]).all()
    np.testing.assert_array_equal(out[::2], jax.jit(in_one)(x[::2], w))


def test_many_rows_are_two_calls():
    w = mk.quantize(normal(64, 24), axis=0)
    assert calls(in_one, normal(1024, 64), w) == [CALL]
    assert calls(in_one, normal(1025, 64), w) == ["mpjax_int8_dot", "mpjax_quantize"]


def test_other_formats_are_two_calls():
    w = mk.quantize(normal(64, 24), "float8_e4m3fn", axis=0)
    product = partial(mk.quantized_matmul, format="float8_e4m3fn")
    assert CALL not in calls(product, normal(3, 64), w)


def test_it_goes_through_vmap_and_scan():
    x, w = normal(4, 3, 40), mk.quantize(normal(4, 40, 24), axis=1)
    mapped = jax.jit(jax.vmap(in_one))
    expected = jnp.stack([jax.jit(in_two)(x[i], w[i]) for i in range(4)])
    np.testing.assert_array_equal(mapped(x, w), expected)
    shared = jax.jit(jax.vmap(in_one, (0, None)))(x, w[1])
    np.testing.assert_array_equal(shared[1], expected[1])

    def layers(x, w):
        return jax.lax.scan(lambda _, layer: (None, in_one(*layer)), None, (x, w))[1]

    scanned = jax.jit(layers)(x, w)
    np.testing.assert_array_equal(scanned, expected)


def test_an_exported_program_has_none():
    x, w = normal(3, 40), mk.quantize(normal(40, 24), axis=0)
    product = jax.jit(mk.quantized_matmul)
    exported = export.export(product)(x, w)
    assert CALL not in exported.mlir_module()
    np.testing.assert_array_equal(exported.call(x, w), product(x, w))


@pytest.mark.parametrize(
    ("operands", "message"),
    [
        (("int32[2,3]", "int8[3,4]", "float32[4]"), "lhs is not float32, bfloat16 or float16"),
        (("float32[2]", "int8[3,4]", "float32[4]"), "lhs has fewer than two axes"),
        (("float32[2,3]", "float32[3,4]", "float32[4]"), "rhs is not int8"),
        (("float32[2,3]", "int8[2,4]", "float32[4]"), "rhs has a shape that does not go"),
        (("float32[2,3]", "int8[3,4]", "float32[3]"), "the scale of rhs has neither one entry"),
    ],
)
def test_a_wrong_call_is_an_error(operands, message):
    def zeros(name):
        dtype, _, sizes = name.rstrip("]").partition("[")
        return jnp.zeros([int(size) for size in sizes.split(",")], dtype)

    call = jax.ffi.ffi_call(CALL, jax.ShapeDtypeStruct((2, 4), jnp.float32))
    with pytest.raises(jax.errors.JaxRuntimeError, match=f"{CALL}: {message}"):
        jax.block_until_ready(call(*map(zeros, operands), rhs_terms_last=False))
