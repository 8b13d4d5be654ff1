"""SmoothQuant and AWQ: their formulas, their search, and what they gain over plain rounding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from calibration_helpers import layer, second_moment, trace_error
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import mpjax_kernels as mk
from mpjax._awq import awq, awq_scales
from mpjax._smoothquant import smooth_scales, smoothquant
from mpjax._stored import Activation, Stored

pytestmark = pytest.mark.usefixtures("strict_promotion")

STATIC = Stored("int8", "channel", None, True, Activation("int8", "tensor"))
DYNAMIC = Stored("int8", "channel", None, True, Activation("int8", "row"))
WEIGHT_ONLY = Stored("int8", "channel", None, True, None)
BLOCKS = Stored("float8_e4m3fn", "block", 64, True, Activation("float8_e4m3fn", 64))
GROUPS = Stored("int4", "group", 64, True, None)
ASYMMETRIC = Stored("int4", "group", 64, False, None)

smooth = jax.jit(smoothquant, static_argnums=(3, 4))
aware = jax.jit(awq, static_argnames=("stored", "alphas", "clip"))
dequantize = jax.jit(mk.dequantize)
scales_of = jax.jit(smooth_scales)


@functools.partial(jax.jit, static_argnames=("format", "axis", "group_size", "symmetric"))
def rounded(x, format="int8", **how):
    return mk.dequantize(mk.quantize(x, format, **how))


def amaxes(x: np.ndarray) -> np.ndarray:
    return np.abs(x).max(axis=0)


# -- SmoothQuant


def test_smooth_scales_are_the_formula():
    x, w = jnp.float32([4, 16, 1]), jnp.float32([1, 4, 0.25])
    np.testing.assert_allclose(smooth_scales(x, w), [2, 2, 2], rtol=1e-6)
    np.testing.assert_allclose(smooth_scales(x, w, 1.0), x, rtol=1e-6)
    np.testing.assert_allclose(smooth_scales(x, w, 0.0), 1 / w, rtol=1e-6)
    np.testing.assert_allclose(
        smooth_scales(x, w, 0.75), [4**0.75, 16**0.75 / 4**0.25, 4**0.25], rtol=1e-6
    )


def test_a_channel_without_inputs_or_weights_keeps_its_size():
    x, w = jnp.float32([0, 5, 0, 9]), jnp.float32([7, 0, 0, 4])
    np.testing.assert_allclose(smooth_scales(x, w), [1, 1, 1, 1.5], rtol=1e-6)


sizes = st.just(0.0) | st.floats(2.0**-126, float(np.finfo(np.float32).max), width=32)


@settings(max_examples=40, deadline=None)
@given(
    arrays(np.float32, 6, elements=sizes), arrays(np.float32, 6, elements=sizes), st.floats(0, 1)
)
def test_smooth_scales_are_positive_and_finite(x, w, alpha):
    with jax.numpy_dtype_promotion("strict"):
        scales = np.asarray(scales_of(x, w, np.float32(alpha)))
    assert (scales > 0).all() and np.isfinite(scales).all()


def test_half_makes_inputs_and_weights_alike():
    x, w = layer(64, 32, outliers=True)
    s = np.asarray(scales_of(amaxes(x), np.abs(w).max(axis=1)))
    np.testing.assert_allclose(amaxes(x / s), np.abs(w * s[:, None]).max(axis=1), rtol=1e-5)
    np.testing.assert_allclose((x / s) @ (w * s[:, None]), x @ w, atol=1e-5)


# Measured: 0.06, 0.11 and 0.34 of the error of plain rounding.
@pytest.mark.parametrize(
    ("stored", "ratio"),
    [(STATIC, 0.2), (DYNAMIC, 0.3), (WEIGHT_ONLY, 0.5)],
    ids=["static", "row", "none"],
)
def test_smoothing_pays_where_inputs_have_outliers(stored, ratio):
    x, w = layer(128, 48, outliers=True)
    found = smooth(w, amaxes(x), x[:128], stored)
    assert float(found.error) <= ratio * float(found.plain_error)
    # The errors are those of outputs, computed here once more.
    for s, error in [
        (np.asarray(found.scales), found.error),
        (np.ones(128, np.float32), found.plain_error),
    ]:
        weight = rounded(w * s[:, None], axis=0)
        inputs = x[:128] / s
        if stored is STATIC:
            inputs = rounded(inputs, scale=np.max(amaxes(x) / s) / np.float32(127))
        elif stored is DYNAMIC:
            inputs = rounded(inputs, axis=1)
        exact = x[:128].astype(np.float64) @ w
        away = np.asarray(inputs, np.float64) @ np.asarray(weight) - exact
        assert float(error) == pytest.approx(np.sum(away**2), rel=1e-3)


def test_smoothing_says_when_it_does_not_pay():
    # float8 rounds relative to each number, so there is nothing to smooth.
    x, w = layer(128, 64, outliers=True)
    found = smooth(w, amaxes(x), x[:64], BLOCKS)
    assert float(found.error) > 1.05 * float(found.plain_error) > 0


# -- AWQ


def test_awq_scales_are_the_formula():
    mean = jnp.float32([4, 1, 0.25])
    np.testing.assert_allclose(awq_scales(mean, jnp.float32(0.5)), [2, 1, 0.5], rtol=1e-6)
    np.testing.assert_array_equal(awq_scales(mean, jnp.float32(0)), [1, 1, 1])
    np.testing.assert_array_equal(awq_scales(jnp.zeros(3), jnp.float32(0.5)), [1, 1, 1])
    # less than 1e-4 of the largest counts as that
    np.testing.assert_allclose(
        awq_scales(jnp.float32([1, 0]), jnp.float32(1)), [100, 0.01], rtol=1e-5
    )


def search_by_loops(w, x, alphas, group):
    """The alpha of least output error, and the error of each, int4 symmetric."""
    mean, errors = np.abs(x).mean(axis=0), []
    for alpha in alphas:
        s = mean**alpha
        s /= np.sqrt(s.max() * s.min())
        groups = (w * s[:, None]).reshape(-1, group, w.shape[1])
        scale = np.abs(groups).max(axis=1, keepdims=True) / 7
        rounded = (np.round(groups / scale) * scale).reshape(w.shape) / s[:, None]
        errors.append(2 * np.mean(np.sum((x @ (rounded - w)) ** 2, axis=1)))
    return alphas[int(np.argmin(errors))], errors


def test_the_search_agrees_with_one_written_out():
    x, w = (each.astype(np.float64) for each in layer(8, 3, 64, outliers=True))
    alphas = (0.0, 0.25, 0.5, 0.75, 1.0)
    alpha, errors = search_by_loops(w, x, alphas, 4)
    stored = Stored("int4", "group", 4, True, None)
    mean = np.abs(x).mean(axis=0).astype(np.float32)
    found = aware(np.float32(w), mean, second_moment(x), stored, alphas=alphas)
    assert float(found.alpha) == alpha > 0
    np.testing.assert_allclose(
        [found.plain_error, found.error], [errors[0], min(errors)], rtol=1e-4
    )


# Measured: 0.31, 0.22 and 0.23 of the error of plain rounding.
@pytest.mark.parametrize(
    ("stored", "clip", "ratio"),
    [(GROUPS, False, 0.5), (GROUPS, True, 0.3), (ASYMMETRIC, True, 0.35)],
    ids=["scaled", "clipped", "asymmetric"],
)
def test_awq_pays_where_inputs_have_outliers(stored, clip, ratio):
    x, w = layer(128, 48, outliers=True)
    moment = second_moment(x)
    found = aware(w, np.abs(x).mean(axis=0), moment, stored, clip=clip)
    assert float(found.error) <= ratio * float(found.plain_error)
    mk.validate(found.quantized)
    restored = np.asarray(dequantize(found.quantized)) / np.asarray(found.scales)[:, None]
    assert float(found.error) == pytest.approx(trace_error(restored - w, moment), rel=1e-4)
    plain = rounded(w, "int4", axis=0, group_size=64, symmetric=stored.symmetric)
    expected = trace_error(np.asarray(plain) - w, moment)
    assert float(found.plain_error) == pytest.approx(expected, rel=1e-4)


def test_awq_is_plain_rounding_where_nothing_is_better():
    w = np.random.default_rng(0).integers(-7, 8, (8, 3)).astype(np.float32)
    w[0] = 7  # so that the scale is 1, and rounding exact
    stored = Stored("int4", "channel", None, True, None)
    mean = np.arange(1, 9, dtype=np.float32)
    found = aware(w, mean, np.eye(8, dtype=np.float32), stored)
    assert (float(found.alpha), float(found.error), float(found.plain_error)) == (0, 0, 0)
    np.testing.assert_array_equal(np.asarray(found.quantized.values, np.int32), w)
    worse = aware(w, mean, np.eye(8, dtype=np.float32), stored, alphas=(1.0,))
    assert float(worse.error) > 0 == float(worse.plain_error)


def test_clipping_needs_a_scale_for_each_output_channel():
    with pytest.raises(ValueError, match="scales per block: leave `clip` out"):
        aware(jnp.ones((128, 64)), jnp.ones(128), jnp.eye(128), BLOCKS, clip=True)
