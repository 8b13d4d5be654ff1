"""Every number format: its values, error bounds, saturation, groups and stochastic rounding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import mpjax_kernels as mk
from mpjax_kernels._float8_bits import cast as float8_cast
from mpjax_kernels._formats import FORMATS
from mpjax_kernels._rounding import round_to
from tests.kernels_helpers import U, normal, quantize

pytestmark = [
    pytest.mark.usefixtures("strict_promotion"),
    pytest.mark.parametrize("name", FORMATS),
]

FLOAT32_MAX = np.finfo(np.float32).max
TINY = 2.0**-126  # the smallest normal float32

dequantize = jax.jit(mk.dequantize, static_argnums=1)


@functools.cache
def grid(name: str) -> np.ndarray:
    """All values that a format uses, sorted, from the bit patterns of its dtype."""
    format = mk.get_format(name)
    if format.is_integer:
        return np.arange(-format.max, format.max + 1)
    values = np.arange(256, dtype=np.uint8).view(format.dtype).astype(np.float64)
    return np.unique(values[np.isfinite(values)])


def error_bound(x: np.ndarray, q: mk.QTensor) -> np.ndarray:
    """Half the distance between neighbours, and float32 rounding.

    The quotient and the product round by at most U each, and the first of them again by the
    error of the format: three U of |x|, plus U of the smallest step. Hardware may flush what is
    below TINY to zero.
    """
    format, scale = q.format, np.asarray(q.scale, np.float64)
    x = np.abs(x.astype(np.float64))
    if format.is_integer:
        return scale * (0.5 + 2 * format.max * U) + TINY
    smallest = format.smallest * scale
    return np.maximum(format.epsilon * x, smallest) / 2 + 3 * U * x + U * smallest + TINY


def test_a_format_describes_its_dtype(name):
    format = mk.get_format(name)
    values = grid(name)
    assert getattr(mk, name) is format and format.dtype == name
    assert (values[-1], -values[0]) == (format.max, format.max)
    assert values[values > 0][0] == format.smallest
    assert values[values > 1][0] - 1 == format.epsilon
    assert format.bits == (4 if name == "int4" else 8)


finite = st.floats(width=32, allow_nan=False, allow_infinity=False, allow_subnormal=False)
# From the tiniest to the largest step of any format, beside floats of any size.
moderate = st.floats(-1e5, 1e5, width=32, allow_subnormal=False)


@settings(max_examples=30, deadline=None)
@given(x=arrays(np.float32, (3, 4), elements=finite | moderate))
@example(x=np.full((3, 4), FLOAT32_MAX))
@example(x=np.outer([1, TINY, 0], [1, 0.5, 0.3, 0.7]).astype(np.float32))
@example(x=np.geomspace(1e-6, 1, 12, dtype=np.float32).reshape(3, 4))
def test_the_error_is_at_most_half_a_step(name, x):
    with jax.numpy_dtype_promotion("strict"):
        q = quantize(x, name, axis=1)
        restored = np.asarray(dequantize(q, jnp.float32), np.float64)
    assert np.isfinite(restored).all()
    assert (np.abs(restored - x) <= error_bound(x, q)).all()
    values = np.asarray(q.values, np.float64)
    assert np.isin(values, grid(name)).all()


def test_rounds_every_midpoint_to_even_and_its_neighbours_to_the_nearest(name):
    values = grid(name).astype(np.float32)
    middle = (values[1:] + values[:-1]) / 2  # exact: a value has at most 7 bits
    below, above = (np.nextafter(middle, np.float32(end)) for end in (-np.inf, np.inf))
    even = middle.astype(mk.get_format(name).dtype)  # ml_dtypes rounds floats to even
    if mk.get_format(name).is_integer:
        even = np.round(middle)
    expected = np.concatenate([values, values[:-1], values[1:], even.astype(np.float32)])
    q = quantize(np.concatenate([values, below, above, middle]), name)
    assert q.scale == 1
    np.testing.assert_array_equal(q.values.astype(jnp.float32), expected)


@pytest.mark.parametrize("exponent", [-100, -3, 0, 60])
@pytest.mark.parametrize("stochastic", [False, True])
def test_what_the_format_holds_is_restored_exactly(name, exponent, stochastic, key):
    x = (grid(name) * 2.0**exponent).astype(np.float32)
    q = quantize(x, name, key=key if stochastic else None)
    assert q.scale == 2.0**exponent
    np.testing.assert_array_equal(dequantize(q), x)


@pytest.mark.parametrize("stochastic", [False, True])
def test_nothing_overflows(name, stochastic, key):
    key = key if stochastic else None
    # Quotients a little above `max`, from a scale that was rounded down, and the largest float32s.
    amax = np.concatenate([np.linspace(1, 2, 500), [FLOAT32_MAX, FLOAT32_MAX / 3, 2 * TINY]])
    x = np.stack([amax, -amax], 1).astype(np.float32)
    q = quantize(x, name, axis=1, key=key)
    largest = np.abs(q.values.astype(jnp.float32))
    assert np.isfinite(largest).all() and largest.max() == mk.get_format(name).max
    assert np.isfinite(dequantize(q)).all()


def test_the_cast_has_the_bits_of_ml_dtypes(name):
    format = mk.get_format(name)
    if format.is_integer:
        pytest.skip("integers are rounded before the cast")
    every = (np.arange(2**16, dtype=np.uint32) << 16).view(np.float32)  # of bfloat16
    values = grid(name).astype(np.float32)
    ties = (values[1:] + values[:-1]) / 2
    x = np.concatenate([every[np.isfinite(every)], values, ties, -ties])
    x = np.concatenate([x, np.nextafter(x, np.float32(-1e38)), np.nextafter(x, np.float32(1e38))])
    x = np.clip(x, -format.max, format.max)
    found = np.asarray(float8_cast(x, format))
    np.testing.assert_array_equal(found.view(np.uint8), x.astype(format.dtype).view(np.uint8))


@pytest.mark.parametrize("stochastic", [False, True])
def test_rounding_saturates(name, stochastic, key):
    format = mk.get_format(name)
    x = format.max * jnp.float32([1.001, 1.1, 3, 1e30])
    values = round_to(jnp.concatenate([x, -x]), format, key if stochastic else None)
    np.testing.assert_array_equal(values.astype(jnp.float32), [format.max] * 4 + [-format.max] * 4)


def test_zeros_subnormals_and_non_finite_rows(name):
    x = np.float32(
        [[0, -0.0], [1, 0], [2.0**-149, 0], [3 * 2.0**-128, TINY], [1, np.inf], [np.nan, 1]]
    )
    q = quantize(x, name, axis=1)
    restored = np.asarray(dequantize(q))
    assert q.scale[0, 0] == 1
    np.testing.assert_array_equal(restored[:2], x[:2])
    assert (np.abs(restored[2:4] - x[2:4]) < TINY).all()
    np.testing.assert_array_equal(np.isnan(q.scale[:, 0]), [False] * 4 + [True] * 2)
    np.testing.assert_array_equal(np.isnan(restored).all(1), [False] * 4 + [True] * 2)
    assert np.isfinite(q.values.astype(jnp.float32)).all()  # the scale carries it


@pytest.mark.parametrize(
    ("axis", "group_size", "scales"),
    [
        (0, None, (1, 6)),
        (0, -1, (1, 6)),
        (0, 2, (4, 6)),
        (-1, 3, (8, 2)),
        (1, 1, (8, 6)),
        ((0, 1), (4, 3), (2, 2)),
        ((1, 0), (3, -1), (1, 2)),
        (None, (8, 2), (1, 3)),
    ],
)
def test_a_group_is_quantized_as_if_it_were_alone(name, axis, group_size, scales):
    x = np.asarray(normal(8, 6))
    q = quantize(x, name, axis=axis, group_size=group_size)
    values, scale = np.asarray(q.values), np.asarray(q.scale)
    assert q.scale.shape == scales
    mk.validate(q)
    rows, columns = 8 // scales[0], 6 // scales[1]
    for i, j in np.ndindex(scales):
        block = (slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns))
        alone = quantize(x[block], name)
        assert scale[i, j] == alone.scale
        np.testing.assert_array_equal(values[block], alone.values)


def test_group_sizes_that_do_not_fit_are_refused(name):
    x = normal(100, 6)
    with pytest.raises(ValueError, match="`group_size` 64 does not divide axis 0 of size 100: pad"):
        mk.quantize(x, name, axis=0, group_size=64)
    with pytest.raises(ValueError, match="`group_size` 4 does not divide axis 1 of size 6"):
        mk.quantize(x, name, axis=(0, 1), group_size=(4, 4))
    with pytest.raises(ValueError, match=r"`group_size` is 2 but `axis` has 2 axes \(0, 1\): give"):
        mk.quantize(x, name, group_size=2)
    with pytest.raises(ValueError, match="`group_size` 0 of axis 0 is neither positive nor -1"):
        mk.quantize(x, name, axis=0, group_size=0)


def test_stochastic_rounding_takes_a_neighbour_and_is_unbiased(name, key):
    samples = 2**14
    values = grid(name)
    # One number between each pair of neighbours, a scale of exactly 1 from the largest.
    fractions = np.random.default_rng(0).uniform(size=values.size - 1)
    x = (values[:-1] + fractions * np.diff(values)).astype(np.float32)
    rows = np.broadcast_to(np.append(x, np.float32(values[-1])), (samples, values.size))
    q = quantize(rows, name, axis=1, key=key)
    assert (q.scale == 1).all()
    rounded = np.asarray(q.values[:, :-1].astype(jnp.float32), np.float64)
    assert ((rounded == values[:-1]) | (rounded == values[1:])).all()
    # A sample is a coin between two values a step apart: its variance is at most step**2 / 4, so
    # the mean of n has a standard deviation of at most step / (2 sqrt(n)). Six of them are
    # exceeded once in 5e8; up to 250 numbers are tried, always with the same key.
    deviation = np.abs(rounded.mean(0) - x) / np.diff(values)
    assert deviation.max() <= 6 / (2 * np.sqrt(samples))
    # Independent noise: the covariance of two neighbours in a row is zero, of two coins of
    # variance at most 1/4 estimated to within 1 / (4 sqrt(n)).
    coins = rounded == values[1:]
    centred = coins - (x - values[:-1]) / np.diff(values)
    assert np.abs((centred[:, 1:] * centred[:, :-1]).mean(0)).max() <= 6 / (4 * np.sqrt(samples))


def test_stochastic_rounding_follows_its_key(name, key):
    x = normal(64, 16)
    first, again, other = (quantize(x, name, axis=1, key=k) for k in (key, key, jax.random.key(1)))
    nearest = quantize(x, name, axis=1)
    np.testing.assert_array_equal(first.values, again.values)
    assert (first.values != other.values).any()
    np.testing.assert_array_equal(first.scale, nearest.scale)
    raw = quantize(x, name, axis=1, key=jax.random.PRNGKey(0))
    np.testing.assert_array_equal(raw.values, first.values)
    vmapped = jax.vmap(lambda x, k: mk.quantize(x, name, key=k))(x, jax.random.split(key, 64))
    mk.validate(vmapped[0])


def test_a_derivative_is_refused(name, key):
    for k in (None, key):
        with pytest.raises(NotImplementedError, match="no useful derivative"):
            jax.grad(lambda x, k=k: mk.dequantize(mk.quantize(x, name, key=k)).sum())(normal(3, 4))


def test_every_floating_dtype_and_empty_arrays(name):
    for dtype in ("float16", "bfloat16", "float32"):
        x = normal(4, 3).astype(dtype)
        q = mk.quantize(x, name, axis=0)
        assert (q.dtype, q.values.dtype, mk.dequantize(q).dtype) == (x.dtype, name, x.dtype)
    for shape in ((0,), (0, 3), (3, 0)):
        q = mk.quantize(jnp.zeros(shape), name, axis=0, group_size=1)
        assert q.scale.shape == mk.dequantize(q).shape == shape
