"""Calibration: observers of activations, and the histogram that three of them keep."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_trees_equal
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import mpjax as mp
import mpjax_kernels as mk
from mpjax._clip_search import divergence
from mpjax._histogram import BINS, Histogram, add_to_histogram, empty_histogram

pytestmark = pytest.mark.usefixtures("strict_promotion")

OBSERVERS = (mp.AbsMax(), mp.MovingAverage(), mp.Percentile(), mp.MSE(), mp.Entropy())
each_observer = pytest.mark.parametrize("observer", OBSERVERS, ids=lambda o: type(o).__name__)
each_format = pytest.mark.parametrize(
    "format", [mk.int8, mk.int4, mk.float8_e4m3fn], ids=lambda f: f.name
)

update = jax.jit(lambda observer, state, x: observer.update(state, x))
amax_of = jax.jit(lambda observer, state, format: observer.amax(state, format))
add = jax.jit(add_to_histogram)
divergence_of = jax.jit(divergence, static_argnums=2)
rounded_by = jax.jit(lambda x, scale, format: mk.dequantize(mk.quantize(x, format, scale=scale)))


SMALL = np.array([1, 0.5, -0.25, 3], np.float32)


def after(observer, *batches):
    state = observer.init()
    for batch in batches:
        state = update(observer, state, batch)
    return state


def amax(observer, *batches, format=mk.int8) -> float:
    return float(amax_of(observer, after(observer, *batches), format))


def heavy_tailed(rows: int = 4096) -> np.ndarray:
    """Laplace numbers of mean size 1, and one outlier of 100."""
    x = np.random.default_rng(0).laplace(size=(rows, 4)).astype(np.float32)
    x[7, 1] = -100
    return x


def squared_error(x: np.ndarray, clip: float, format: mk.Format) -> float:
    rounded = rounded_by(x, np.float32(clip / format.max), format)
    return float(np.mean((np.asarray(rounded, np.float64) - x) ** 2))


# -- the histogram

magnitudes = st.floats(2.0**-60, 2.0**60, width=32) | st.just(0.0)


@settings(max_examples=40, deadline=None)
@given(st.lists(arrays(np.float32, 5, elements=magnitudes), min_size=1, max_size=5))
def test_the_counts_are_those_of_all_the_data_at_once(batches):
    with jax.numpy_dtype_promotion("strict"):
        histogram = empty_histogram()
        for sign, batch in enumerate(batches):
            histogram = add(histogram, jnp.asarray(batch if sign % 2 else -batch))
    told = [batch for batch in batches if batch.any()]
    x = np.concatenate(told) if told else np.zeros(0, np.float32)
    exponent = math.frexp(x.max())[1] if told else -100
    index = np.floor(np.ldexp(x[x > 0].astype(np.float64), 13 - exponent)).astype(int)
    np.testing.assert_array_equal(histogram.counts, np.bincount(index, minlength=BINS))
    assert float(histogram.zeros) == np.sum(x == 0)
    assert (int(histogram.exponent), float(histogram.amax)) == (exponent, x.max(initial=0))


def test_the_ends_of_float32_have_bins():
    largest, smallest = np.finfo(np.float32).max, np.finfo(np.float32).tiny
    histogram = add(add(empty_histogram(), jnp.float32([smallest])), jnp.float32([largest, 1.0]))
    assert int(histogram.exponent) == 128
    assert float(histogram.counts[0]) == 2 and float(histogram.counts[-1]) == 1
    assert float(histogram.upper_edges[-1]) == largest


def test_a_bin_counts_on_where_a_float32_stops():
    full = empty_histogram()
    full = Histogram(
        counts=full.counts.at[BINS // 2].set(2.0**25),
        zeros=full.zeros,
        amax=jnp.float32(1),
        exponent=jnp.int32(1),
        finite=full.finite,
    )
    assert float(add(full, jnp.ones(1024)).counts[BINS // 2]) == 2.0**25 + 1024


# -- what each observer makes of it


def test_absmax_is_the_largest_of_all_batches():
    assert amax(mp.AbsMax(), jnp.float32([1, -3]), jnp.float32([2, 0])) == 3


def test_the_moving_average_forgets_by_its_decay():
    batches = [jnp.float32([a, -a / 2]) for a in (8, 2, 4)]
    assert amax(mp.MovingAverage(0.5), *batches) == pytest.approx((8 / 4 + 2 / 2 + 4) / 1.75, 1e-6)
    assert amax(mp.MovingAverage(1.0), *batches) == pytest.approx(14 / 3, 1e-6)


@pytest.mark.parametrize("percent", [12.5, 50.0, 99.90234375])
def test_percentiles_are_within_a_bin_of_numpys(percent):
    x = np.random.default_rng(1).normal(size=(3, 1024)).astype(np.float32)
    x[0] *= np.float32(1e-3)  # so that the range grows, and numbers near 0 change their bins
    x[1, :100] = 0
    histogram = empty_histogram()
    for batch in x:
        histogram = add(histogram, batch)
    found = float(amax_of(mp.Percentile(percent), histogram, mk.int8))
    exact = np.percentile(np.abs(x), percent, method="inverted_cdf")
    width = 2.0 ** math.frexp(np.abs(x).max())[1] / BINS
    assert exact <= found <= exact + width
    assert width <= np.abs(x).max() / 4096


def test_all_percent_is_the_absmax_exactly():
    assert amax(mp.Percentile(100), heavy_tailed()) == 100.0


def test_a_percentile_among_zeros_is_not_taken_for_unknown():
    assert 0 < amax(mp.Percentile(50), jnp.float32([0, 0, 0, 1])) <= 1 / 4096


@each_format
def test_mse_finds_a_clip_within_a_bin_of_the_best_candidate(format):
    x = heavy_tailed()
    found = amax(mp.MSE(), x, format=format)
    rms = [squared_error(x, 100 * 2 ** (-i / 16), format) ** 0.5 for i in range(0, 128, 4)]
    width = 128 / BINS
    assert squared_error(x, found, format) ** 0.5 <= min(rms) + width


def test_mse_leaves_numbers_of_the_format_as_they_are():
    x = jnp.arange(-7, 8, dtype=jnp.float32)  # int4 represents each of them if 7 is the amax
    assert amax(mp.MSE(), x, format=mk.int4) == 7.0


def divergence_by_loops(counts: np.ndarray, kept: int, levels: int) -> float:
    """KL(P || Q) where `levels` integers represent the centers of the first bins."""
    p = np.array(counts[:kept], np.float64)
    p[-1] += counts[kept:].sum()
    value = [round((i + 0.5) / kept * levels) for i in range(kept)]
    q = np.zeros(kept)
    for i in range(kept):
        if p[i] > 0:
            alike = [j for j in range(kept) if value[j] == value[i]]
            q[i] = sum(counts[j] for j in alike) / sum(p[j] > 0 for j in alike)
    if (q[p > 0] == 0).any():
        return math.inf
    p, q = p / p.sum(), q / q.sum()
    return sum(p[i] * math.log(p[i] / q[i]) for i in range(kept) if p[i] > 0)


def test_the_divergence_agrees_with_one_written_out():
    counts = np.array([9, 7, 8, 5, 0, 4, 4, 2, 3, 0, 1, 2, 0, 0, 0, 0, 0, 1, 0, 0], np.float32)
    kept = [8, 9, 10, 11, 13, 15, 17, 18, 19, 20]  # no multiples of 7, where centers are ties
    found = [float(divergence_of(jnp.asarray(counts), jnp.int32(k), mk.int4)) for k in kept]
    np.testing.assert_allclose(found, [divergence_by_loops(counts, k, 7) for k in kept], atol=1e-6)


def test_the_divergence_is_infinite_where_only_outliers_are_left():
    counts = jnp.float32([5, 3, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2])
    assert divergence_by_loops(np.asarray(counts), 9, 7) == math.inf
    assert float(divergence_of(counts, jnp.int32(9), mk.int4)) == math.inf


def test_entropy_takes_the_clip_of_least_divergence():
    x = heavy_tailed()
    found = amax(mp.Entropy(), x, format=mk.int4)
    counts = np.histogram(np.abs(x), 2048, (0, 128))[0]
    kept = round(found * 2048 / 128)
    least = min(divergence_by_loops(counts, k, 7) for k in range(16, 160, 2))
    assert found == kept * 128 / 2048
    # Less than a per cent, since a center in the middle of two values may be rounded to either.
    assert divergence_by_loops(counts, kept, 7) <= least * 1.01


@pytest.mark.parametrize("observer", [mp.Percentile(99.9), mp.MSE(), mp.Entropy()], ids=str)
def test_clipping_rounds_heavy_tails_better_than_the_absmax(observer):
    # Steps of 100 / 7 leave nearly nothing of variance 2; the outlier, clipped, adds 100**2 / n.
    x = heavy_tailed()
    plain = squared_error(x, amax(mp.AbsMax(), x), mk.int4)
    assert squared_error(x, amax(observer, x, format=mk.int4), mk.int4) <= 0.35 * plain


# -- the protocol


@each_observer
def test_a_batch_that_is_not_finite_stays_visible_and_adds_nothing(observer):
    before = after(observer, heavy_tailed())
    for bad in (np.nan, np.inf, -np.inf):
        batch = np.ones((4096, 4), np.float32)
        batch[3, 2] = bad
        state = update(observer, before, batch)
        assert (bool(before.finite), bool(state.finite)) == (True, False)
        assert np.isnan(amax_of(observer, state, mk.int8))
        state = update(observer, state, np.zeros((4096, 4), np.float32))
        assert np.isnan(amax_of(observer, state, mk.int8))
        rest = [leaf for leaf in jax.tree.leaves(before) if leaf.dtype != bool]
        assert_trees_equal([v for v in jax.tree.leaves(state) if v.dtype != bool], rest)


@each_observer
def test_an_empty_or_zero_batch_changes_nothing(observer):
    before = after(observer, SMALL)
    assert_trees_equal(update(observer, before, np.zeros(4, np.float32)), before)
    assert_trees_equal(update(observer, before, np.zeros(0, np.float32)), before)
    assert amax(observer) == 0.0


@pytest.mark.parametrize("observer", [mp.MovingAverage(), mp.Entropy()], ids=str)
def test_a_stack_of_layers_is_a_vmap(observer):
    x = SMALL * np.array([[1], [2], [100]], np.float32)
    states = jax.jit(jax.vmap(lambda x: observer.update(observer.init(), x)))(x)
    found = jax.jit(jax.vmap(lambda state: observer.amax(state, mk.int8)))(states)
    alone = [amax_of(observer, update(observer, observer.init(), row), mk.int8) for row in x]
    np.testing.assert_array_equal(found, jnp.stack(alone))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_every_floating_dtype_counts_in_float32(dtype):
    for observer in (mp.MovingAverage(), mp.Entropy()):
        with jax.enable_x64(dtype == "float64"):
            state = update(observer, observer.init(), jnp.asarray(SMALL, dtype))
            found = amax_of(observer, state, mk.int8)
        assert found.dtype == jnp.float32
        assert float(found) == amax(observer, SMALL)


def test_a_float64_beyond_float32_counts_as_infinite():
    with jax.enable_x64(True):
        assert not update(mp.AbsMax(), mp.AbsMax().init(), jnp.asarray([1e300])).finite


def test_observers_are_values():
    assert hash(mp.Percentile(99.0)) == hash(mp.Percentile(99.0))
    assert mp.Percentile(99.0) == mp.Percentile(99.0) != mp.Percentile(99.5)
    assert jax.tree.leaves(OBSERVERS) == []


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: mp.Percentile(0), "`percent` is 0, but must be more than 0 and at most 100"),
        (lambda: mp.Percentile(100.5), "`percent` is 100.5, but"),
        (lambda: mp.Percentile(math.nan), "`percent` is nan, but"),
        (lambda: mp.MovingAverage(0.0), "`decay` is 0.0, but must be more than 0 and at most 1"),
        (lambda: mp.MovingAverage(1.01), "`decay` is 1.01, but"),
    ],
)
def test_parameters_out_of_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
