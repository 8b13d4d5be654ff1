"""Asymmetric quantization, static scales, and tensors stored in another order."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

import mpjax_kernels as mk
from mpjax_kernels import _groups
from tests.kernels_helpers import U, matmul, normal, quantize

pytestmark = pytest.mark.usefixtures("strict_promotion")

finite = st.floats(width=32, allow_nan=False, allow_infinity=False, allow_subnormal=False)
tensors = arrays(np.float32, array_shapes(max_dims=2, max_side=5), elements=finite)
MAX = np.finfo(np.float32).max


def represented(q: mk.QTensor) -> np.ndarray:
    values = np.asarray(q.values, np.float64) - np.asarray(q.zero_point, np.float64)
    return values * np.asarray(q.scale, np.float64)


@settings(max_examples=30, deadline=None)
@given(tensors, st.sampled_from(["int8", "int4"]))
@example(np.asarray([[MAX, 1.0]], np.float32), "int8")
@example(np.asarray([[MAX, -MAX]], np.float32), "int8")
@example(np.asarray([[-3.5, 11.5]], np.float32), "int4")
def test_with_a_zero_point_the_error_is_at_most_half_a_scale(x, name):
    with jax.numpy_dtype_promotion("strict"):
        q = quantize(x, name, axis=0, symmetric=False)
        mk.validate(q)
        restored = np.asarray(mk.dequantize(q), np.float64)
    levels = 2**q.format.bits - 1
    # Two roundings of a number of up to `levels` scales, and one more in the zero point.
    bound = (0.5 + 3 * levels * U) * np.asarray(q.scale, np.float64)
    assert (np.abs(represented(q) - x) <= bound).all()
    assert np.isfinite(restored).all()
    assert (restored[x == 0] == 0).all()
    values = np.asarray(q.values, np.int32)
    assert values.min() >= q.format.lowest and values.max() <= q.format.max


def test_a_zero_point_uses_the_whole_range():
    x = jnp.float32([0, 1, 2, 15])
    q = mk.quantize(x, "int4", symmetric=False)
    np.testing.assert_array_equal(q.values, [-8, -7, -6, 7])
    assert (q.scale[0], q.zero_point[0]) == (1, -8)
    np.testing.assert_array_equal(mk.dequantize(q), x)
    assert repr(q) == "QTensor(int4[4], scale float32[1], zero_point int8[1])"
    assert q.nbytes == 2 + 5


def test_zeros_constants_and_what_is_not_finite():
    x = jnp.float32([[0, 0, 0], [5, 5, 5], [-5, -5, -5], [1, np.nan, 2], [1, -np.inf, 2]])
    q = mk.quantize(x, axis=1, symmetric=False)
    assert q.scale[0, 0] == 1
    restored = np.asarray(mk.dequantize(q))
    np.testing.assert_allclose(restored[:3], x[:3], rtol=4 * U)
    assert np.isnan(restored[3:]).all()


@pytest.mark.slow
def test_stochastic_rounding_beside_a_zero_point_is_unbiased(key):
    x = jnp.full((100, 200), 0.3).at[0, 0].set(-10).at[0, 1].set(245.0)  # scale 1
    q = mk.quantize(x, symmetric=False, key=key)
    restored = np.asarray(mk.dequantize(q))[1:]
    assert set(np.unique(restored)) == {0, 1}
    assert abs(restored.mean() - 0.3) < 4 * np.sqrt(0.3 * 0.7 / restored.size)


@pytest.mark.slow
@pytest.mark.parametrize("index", [0, slice(1, 3), (Ellipsis, slice(0, 2)), (1, None, 2)])
def test_indexing_and_transposing_keep_zero_points(index):
    q = mk.quantize(normal(4, 3, 6) + 1, axis=1, symmetric=False)
    np.testing.assert_array_equal(mk.dequantize(q[index]), mk.dequantize(q)[index])
    np.testing.assert_array_equal(mk.dequantize(q.T), mk.dequantize(q).T)
    jitted = jax.jit(lambda q: q)(q)
    assert jax.tree.structure(jitted) == jax.tree.structure(q)
    rows = jax.vmap(mk.dequantize)(q)
    np.testing.assert_array_equal(rows, mk.dequantize(q))


@pytest.mark.parametrize("name", ["int8", "int4", "float8_e4m3fn", "float8_e5m2"])
def test_a_given_scale_is_used_and_what_is_beyond_it_saturates(name):
    limit, scale = mk.get_format(name).max, jnp.float32(0.25)
    x = jnp.float32([[0.25, 0.5, 3 * 0.25 * limit], [0, -0.25, -1e9]])
    q = mk.quantize(x, name, scale=scale)
    assert q.scale.shape == (1, 1) and q.scale[0, 0] == 0.25
    np.testing.assert_array_equal(mk.dequantize(q)[:, :2], x[:, :2])
    np.testing.assert_array_equal(mk.dequantize(q)[:, 2], [0.25 * limit, -0.25 * limit])
    rows = mk.quantize(x, name, scale=jnp.float32([[0.25], [0.5]]))
    np.testing.assert_array_equal(rows.scale, [[0.25], [0.5]])
    bad = mk.quantize(x.at[1, 0].set(np.nan), name, scale=jnp.float32([[0.25], [0.25]]))
    np.testing.assert_array_equal(jnp.isnan(bad.scale), [[False], [True]])
    for wrong in (-1.0, np.nan, np.inf):
        broken = mk.quantize(x, name, scale=jnp.float32(wrong))
        assert not np.isfinite(mk.dequantize(broken)).any()


def test_what_does_not_go_together_is_refused():
    x = jnp.ones((4, 6))
    with pytest.raises(ValueError, match="`symmetric=False` needs an integer format: float8_e5m2"):
        mk.quantize(x, "float8_e5m2", symmetric=False)
    scale = jnp.float32(1)
    for kwargs in ({"axis": 0}, {"axis": 0, "group_size": 2}, {"symmetric": False}):
        with pytest.raises(ValueError, match="`scale` says by its shape which entries share one"):
            mk.quantize(x, scale=scale, **kwargs)
    with pytest.raises(ValueError, match=r"`scale` has shape \(3, 1\), but `x` has \(4, 6\)"):
        mk.quantize(x, scale=jnp.ones((3, 1)))
    with pytest.raises(TypeError, match=r"`scale` must be floating, got int32\[\]"):
        mk.quantize(x, scale=jnp.int32(1))
    q = mk.quantize(x, symmetric=False)
    for zero_point, error, message in (
        (jnp.zeros((1, 1), jnp.int32), TypeError, "must be int8, beside integer values"),
        (jnp.zeros((4, 1), jnp.int8), ValueError, "must have the shape of `scale`"),
    ):
        with pytest.raises(error, match=message):
            mk.validate(replace(q, zero_point=zero_point))
    floating = mk.quantize(x, "float8_e4m3fn")
    with pytest.raises(TypeError, match="must be int8, beside integer values"):
        mk.validate(replace(floating, zero_point=q.zero_point))


@pytest.mark.slow
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("axis", [0, 1, (0, 1), (2, 0), -1])
def test_contiguous_changes_where_numbers_lie_and_nothing_else(axis, symmetric):
    q = quantize(normal(4, 6, 8), axis=(0, 1), group_size=(2, 3), symmetric=symmetric)
    c = mk.contiguous(q, axis)
    mk.validate(c)
    assert (c.shape, c.ndim, c.size, c.nbytes) == (q.shape, q.ndim, q.size, q.nbytes)
    last = axis if isinstance(axis, tuple) else (axis,)
    assert c.values.shape[-len(last) :] == tuple(q.shape[a] for a in last)
    expected = mk.dequantize(q)
    np.testing.assert_array_equal(mk.dequantize(c), expected)
    np.testing.assert_array_equal(mk.dequantize(c.T), expected.T)
    for index in (slice(2), (Ellipsis, 3), (slice(None), slice(3, 6))):
        np.testing.assert_array_equal(mk.dequantize(c[index]), expected[index])
    again = mk.contiguous(c, axis=2)
    assert again.layout is None
    np.testing.assert_array_equal(again.values, q.values)


def test_a_stack_keeps_its_layout_inside_scan_vmap_and_a_loop():
    q = quantize(normal(3, 16, 5), axis=1)
    c = mk.contiguous(q, axis=1)
    assert repr(c) == "QTensor(int8[3,16,5], scale float32[3,1,5], layout (-1, -2))"
    assert c.values.shape == (3, 5, 16) and c[1].layout == (-1, -2)
    x = normal(2, 16)
    expected = jnp.stack([matmul(x, q[i]) for i in range(3)])
    _, scanned = jax.lax.scan(lambda carry, w: (carry, matmul(x, w)), None, c)
    for result in (
        scanned,
        jax.vmap(partial(matmul, x))(c),
        jnp.stack([matmul(x, c[i]) for i in range(3)]),
    ):
        np.testing.assert_allclose(result, expected, rtol=20 * U, atol=1e-6)


def test_layouts_that_are_none_are_refused():
    q = mk.quantize(jnp.ones((4, 6)))
    for layout in ((-1,) * 2, (-2,), (0, 1), (-3, -2, -1)):
        with pytest.raises(ValueError, match=r"`layout` .* of a tensor of 2 axes must hold"):
            mk.validate(replace(q, layout=layout))
    with pytest.raises(ValueError, match="`axis` is 2, but `q` has 2 axes"):
        mk.contiguous(q, 2)
    with pytest.raises(ValueError, match="names an axis of `q` twice"):
        mk.contiguous(q, (0, -2))


@pytest.mark.parametrize("left", ["int8", "float8_e4m3fn"])
def test_groups_added_one_by_one_give_what_they_give_at_once(left, monkeypatch):
    q = quantize(normal(2, 3, 64), left, axis=2, group_size=16)
    r = mk.contiguous(quantize(normal(2, 64, 8), "int8", axis=1, group_size=8), axis=1)
    dims = (((2,), (1,)), ((0,), (0,)))
    product = partial(mk.dot_general, q, r, dims, implementation="xla")
    at_once = product()
    monkeypatch.setattr(_groups, "_AT_ONCE", 0)
    assert "scan" in str(jax.make_jaxpr(product)())
    spelled = (
        np.repeat(np.asarray(r.scale, np.float64), 8, 1),
        np.repeat(np.asarray(q.scale), 16, 2),
    )
    magnitude = (np.abs(np.asarray(q.values, np.float64)) * spelled[1]) @ (
        np.abs(np.asarray(r.values, np.float64)).swapaxes(1, 2) * spelled[0]
    )
    assert (np.abs(product() - at_once) <= 2 * 70 * U * magnitude).all()


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_a_zero_point_halves_the_error_of_a_one_sided_tensor(name):
    w = jnp.abs(normal(256, 16))
    error = {
        symmetric: jnp.mean(
            jnp.abs(mk.dequantize(quantize(w, name, axis=0, symmetric=symmetric)) - w)
        )
        for symmetric in (True, False)
    }
    assert error[False] < 0.55 * error[True]
