"""quantize and dequantize: error bounds, special numbers, dtypes and refusals."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

import mpjax_kernels as mk
from mpjax_kernels._formats import FORMATS

pytestmark = pytest.mark.usefixtures("strict_promotion")

# The error in units of the scale: half a step of the grid, and two float32 roundings (of the
# quotient and of values * scale), each at most 127 * 2**-24.
BOUND = 0.5 + 2 * 127 * 2.0**-24
TINY = 2.0**-126  # the smallest normal float32

finite = st.floats(width=32, allow_nan=False, allow_infinity=False, allow_subnormal=False)
tensors = arrays(np.float32, array_shapes(max_dims=2, max_side=5), elements=finite)


# One compiled program a shape instead of one per operation and shape.
quantize = jax.jit(mk.quantize, static_argnames="axis")
dequantize = jax.jit(mk.dequantize, static_argnums=1)


def error_in_scales(x: np.ndarray, q: mk.QTensor) -> np.ndarray:
    restored = np.asarray(dequantize(q, jnp.float32), np.float64)
    return np.abs(restored - x.astype(np.float64)) / np.asarray(q.scale, np.float64)


@settings(max_examples=30, deadline=None)
@given(tensors, st.data())
@example(np.asarray([[100 * TINY, TINY]], np.float32), None)
@example(np.asarray([[np.finfo(np.float32).max, -1.0]], np.float32), None)
def test_error_is_at_most_half_a_scale(x, data):
    axis = data.draw(st.sampled_from([None, *range(x.ndim)])) if data else None
    with jax.numpy_dtype_promotion("strict"):
        q = quantize(x, axis=axis)
        assert error_in_scales(x, q).max(initial=0.0) <= BOUND
    assert np.abs(np.asarray(q.values, np.int32)).max(initial=0) <= 127


@settings(max_examples=20, deadline=None)
@given(tensors)
def test_the_largest_entry_uses_the_whole_range(x):
    amax = np.abs(x).max()
    expected = 0 if amax == 0 else 127 if amax >= 127 * TINY else round(float(amax) / TINY)
    assert np.abs(np.asarray(quantize(x).values, np.int32)).max() == expected


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_every_floating_dtype_keeps_its_logical_dtype(dtype):
    with jax.enable_x64(dtype == "float64"):
        x = jnp.linspace(-3, 5, 60, dtype=jnp.float32).reshape(12, 5).astype(dtype)
        q = mk.quantize(x, axis=0)
        assert (q.dtype, q.values.dtype, q.scale.dtype) == (x.dtype, jnp.int8, jnp.float32)
        assert mk.dequantize(q).dtype == x.dtype
        # a float64 is first rounded to float32: another 127 * 2**-24 at most
        assert error_in_scales(np.asarray(x), q).max() <= BOUND + 127 * 2.0**-24


@pytest.mark.parametrize(
    ("axis", "scale_shape"),
    [(None, (1, 1, 1)), (0, (1, 3, 4)), (-1, (2, 3, 1)), ((0, -1), (1, 3, 1)), ((), (2, 3, 4))],
)
def test_axis_means_the_axes_that_share_a_scale(axis, scale_shape, key):
    x = jax.random.normal(key, (2, 3, 4))
    q = mk.quantize(x, axis=axis)
    assert q.scale.shape == scale_shape
    amax = jnp.max(jnp.abs(x), axis=axis, keepdims=True)
    np.testing.assert_array_equal(q.scale, amax / 127)


def test_rounds_half_to_even():
    x = jnp.float32([127, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5])  # scale 1
    np.testing.assert_array_equal(mk.quantize(x).values, [127, 0, 2, 2, 0, -2, -2])


def test_zeros_are_exact_and_have_scale_one():
    q = mk.quantize(jnp.float32([[0, -0.0, 0], [1, 2, 3]]), axis=1)
    assert q.scale[0, 0] == 1
    np.testing.assert_array_equal(mk.dequantize(q)[0], [0, 0, 0])


@pytest.mark.parametrize("amax", [2.0**-149, 2.0**-130, 3.0 * 2.0**-128, 2.0**-126, 2.0**-121])
def test_subnormals_give_finite_numbers_within_the_documented_bound(amax):
    x = np.asarray([amax, -amax / 2, 0], np.float32)
    q = mk.quantize(x)
    restored = np.asarray(mk.dequantize(q), np.float64)
    assert np.isfinite(q.scale).all() and np.isfinite(restored).all()
    # where hardware flushes subnormals to zero, the error is the number itself
    assert np.abs(restored - x.astype(np.float64)).max() < TINY


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_non_finite_entry_stays_visible_in_its_channel_only(bad):
    x = jnp.ones((4, 3), jnp.float32).at[2, 1].set(bad)
    q = mk.quantize(x, axis=0)
    np.testing.assert_array_equal(jnp.isnan(q.scale), [[False, True, False]])
    np.testing.assert_array_equal(jnp.isnan(mk.dequantize(q)).all(0), [False, True, False])
    np.testing.assert_array_equal(mk.dequantize(q)[:, 0], np.ones(4))


def test_float64_beyond_float32_is_visible():
    with jax.enable_x64(True):
        assert jnp.isnan(mk.quantize(jnp.asarray([1e300], jnp.float64)).scale).all()


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0), (2, 0, 5)])
@pytest.mark.parametrize("axis", [None, 0])
def test_empty_arrays(shape, axis):
    q = mk.quantize(jnp.zeros(shape), axis=axis)
    assert mk.dequantize(q).shape == shape
    np.testing.assert_array_equal(q.scale, np.ones(q.scale.shape))


def test_dequantize_repeats_the_scale_of_a_group():
    q = mk.QTensor(jnp.ones((6, 2), jnp.int8), jnp.float32([[2], [3]]), np.dtype("float32"))
    np.testing.assert_array_equal(mk.dequantize(q)[:, 0], [2, 2, 2, 3, 3, 3])


def test_traces_like_any_function(key):
    x = jax.random.normal(key, (2, 5, 3))
    expected = mk.quantize(x, axis=(1,))
    for transform in (jax.jit, jax.vmap, jax.checkpoint):
        axis = (0,) if transform is jax.vmap else (1,)
        q = transform(lambda x, axis=axis: mk.quantize(x, axis=axis))(x)
        np.testing.assert_array_equal(q.values, expected.values)
        np.testing.assert_array_equal(q.scale, expected.scale)
    _, q = jax.lax.scan(lambda carry, row: (carry, mk.quantize(row, axis=0)), None, x)
    np.testing.assert_array_equal(q.values, expected.values)


def test_refusals():
    x = jnp.ones((2, 3))
    with pytest.raises(TypeError, match="`x` must have a floating dtype .* got int32"):
        mk.quantize(jnp.ones(3, jnp.int32))
    with pytest.raises(TypeError, match="got complex64"):
        mk.quantize(jnp.ones(3, jnp.complex64))
    with pytest.raises(
        ValueError, match=r"unknown `format` 'int3': known formats are \['float8_e4m3fn', "
    ):
        mk.quantize(x, "int3")
    with pytest.raises(ValueError, match="`axis` is 2, but `x` has 2 axes"):
        mk.quantize(x, axis=2)
    with pytest.raises(ValueError, match=r"`axis` is \(1, -1\), which names an axis of `x` twice"):
        mk.quantize(x, axis=(1, -1))
    with pytest.raises(TypeError, match="`dtype` must be floating to dequantize .* got int32"):
        mk.dequantize(mk.quantize(x), jnp.int32)


@pytest.mark.parametrize("format", [["int8"], None, 8, 8.0])
def test_a_format_of_another_type_is_refused(format):
    message = f"`format` must be a name, a dtype or a Format, got {format!r}: known formats are ["
    with pytest.raises(TypeError, match=re.escape(message)):
        mk.quantize(jnp.ones(3), format)


@pytest.mark.parametrize("group_size", [2.0, "2", (2.0,), (None,), True])
def test_a_group_size_that_is_no_int_is_refused(group_size):
    message = f"`group_size` must be an int or a sequence of ints, got {group_size!r}"
    with pytest.raises(TypeError, match=re.escape(message)):
        mk.quantize(jnp.ones(4), axis=0, group_size=group_size)


@pytest.mark.parametrize("axis", [1.0, "1", (0, 1.0), np.array([1.0])])
def test_an_axis_that_is_no_int_is_refused(axis):
    message = f"`axis` must be an int or a sequence of ints, got {axis!r}"
    with pytest.raises(TypeError, match=re.escape(message)):
        mk.quantize(jnp.ones((2, 3)), axis=axis)
    with pytest.raises(TypeError, match=re.escape(message)):
        mk.contiguous(mk.quantize(jnp.ones((2, 3))), axis)


@pytest.mark.parametrize("kind", [list, tuple, np.array])
def test_any_sequence_of_ints_names_axes_and_group_sizes(kind):
    x = jnp.arange(24.0).reshape(4, 6)
    q = mk.quantize(x, axis=kind([0, 1]), group_size=kind([2, 3]))
    # The largest entry of a block is its last: rows 1 and 3, columns 2 and 5.
    np.testing.assert_allclose(q.scale * 127, [[8, 11], [20, 23]], rtol=2.0**-23)
    assert mk.quantize(x, axis=np.int64(1), group_size=np.int32(2)).scale.shape == (4, 3)


def test_a_dtype_stands_for_the_format_of_its_name():
    for format in FORMATS.values():
        assert mk.get_format(getattr(jnp, format.name)) is format
        assert mk.get_format(format.dtype) is format
    assert mk.get_format(np.int8) is mk.int8
    assert mk.quantize(jnp.ones(3), jnp.float8_e4m3fn).values.dtype == jnp.float8_e4m3fn
    assert mk.DotFormats((jnp.int8, np.dtype("int8"))) == mk.DotFormats(("int8", "int8"))
    with pytest.raises(ValueError, match=r"unknown `format` dtype\('int16'\): known formats are"):
        mk.get_format(np.dtype("int16"))
    with pytest.raises(ValueError, match="unknown `format` <class 'float'>: known formats are"):
        mk.get_format(float)


def test_formats_are_looked_up_by_name_or_given():
    assert mk.get_format("int8") is mk.get_format(mk.int8) is mk.int8
    assert hash(mk.Format("int8", np.dtype("int8"), 8, 127.0)) == hash(mk.int8)
    np.testing.assert_array_equal(mk.quantize(jnp.ones(3), mk.int8).values, [127] * 3)


def through_grad(f, x):
    return jax.grad(f)(x)


def through_jit(f, x):
    return jax.jit(jax.grad(f))(x)


def through_remat(f, x):
    return jax.grad(jax.checkpoint(f))(x)


def through_vmap(f, x):
    return jax.vmap(jax.grad(f))(x[None])


def through_scan(f, x):
    return jax.grad(lambda x: jax.lax.scan(lambda c, r: (c + f(r[None]), None), 0.0, x)[0])(x)


def through_linearize(f, x):
    return jax.linearize(f, x)


@pytest.mark.parametrize(
    "transform",
    [through_grad, through_jit, through_remat, through_vmap, through_scan, through_linearize],
)
def test_a_derivative_is_refused_instead_of_zero(transform, key):
    x = jax.random.normal(key, (4, 3))

    def loss(x):
        return jnp.sum(mk.dequantize(mk.quantize(x, axis=1)))

    with pytest.raises(NotImplementedError, match="use mpjax_kernels.quantized_dot_general"):
        transform(loss, x)
    transform(lambda x: loss(jax.lax.stop_gradient(x)) * jnp.sum(x), x)
