"""Calibration: statistics of a layer's inputs, over batches, against NumPy on all of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_trees_equal

from mpjax._input_statistics import ChannelAbsMax, ChannelMean, RowSample, SecondMoment

pytestmark = pytest.mark.usefixtures("strict_promotion")

K = 4
STATISTICS = (ChannelAbsMax(), ChannelMean(), SecondMoment(), RowSample(rows=8))
each_statistic = pytest.mark.parametrize("statistic", STATISTICS, ids=lambda s: type(s).__name__)

update = jax.jit(lambda statistic, state, x: statistic.update(state, x))
result_of = jax.jit(lambda statistic, state: statistic.result(state))

rng = np.random.default_rng(0)
BATCHES = [rng.normal(size=shape).astype(np.float32) for shape in [(5, K), (2, 3, K)]]
ROWS = np.concatenate([batch.reshape(-1, K) for batch in BATCHES])


def result(statistic, *batches):
    state = statistic.init(K)
    for batch in batches:
        state = update(statistic, state, batch)
    return np.asarray(result_of(statistic, state))


def test_channel_absmax():
    np.testing.assert_array_equal(result(ChannelAbsMax(), *BATCHES), np.abs(ROWS).max(axis=0))


def test_channel_mean():
    np.testing.assert_allclose(result(ChannelMean(), *BATCHES), np.abs(ROWS).mean(0), rtol=1e-6)


def test_second_moment():
    exact = 2 / len(ROWS) * ROWS.T.astype(np.float64) @ ROWS
    found = result(SecondMoment(), *BATCHES)
    np.testing.assert_allclose(found, exact, atol=1e-6)
    np.testing.assert_array_equal(found, found.T)


def test_means_of_the_largest_float32s_are_finite():
    x = np.full((4, K), 2.0**126, np.float32)
    assert result(ChannelMean(), x, x)[0] == 2.0**126
    x = np.full((4, K), 2.0**62, np.float32)
    assert result(SecondMoment(), x, x)[0, 0] == 2.0**125


def test_a_sample_keeps_all_rows_while_there_is_room():
    sample = result(RowSample(rows=16), *BATCHES)
    kept = sample[np.any(sample != 0, axis=1)]
    assert len(sample) == 16 and len(kept) == 11
    np.testing.assert_array_equal(np.sort(kept, axis=0), np.sort(ROWS, axis=0))


def test_a_sample_draws_evenly_without_replacement():
    batches = np.arange(1.0, 4001.0, dtype=np.float32).reshape(10, 400, 1) * np.ones(K, np.float32)
    sample = result(RowSample(rows=200), *batches)[:, 0]
    assert len(set(sample)) == 200 and set(sample) <= set(range(1, 4001))
    # Of each tenth of the rows 20 on average, with a standard deviation of 4.2: five of them.
    counts = np.bincount(((sample - 1) // 400).astype(int), minlength=10)
    assert abs(counts - 20).max() <= 21
    assert counts.sum() == 200
    np.testing.assert_array_equal(result(RowSample(rows=200), *batches)[:, 0], sample)
    assert set(result(RowSample(rows=200, seed=1), *batches)[:, 0]) != set(sample)


@each_statistic
def test_a_batch_that_is_not_finite_stays_visible_and_adds_nothing(statistic):
    before = update(statistic, statistic.init(K), ROWS)
    batch = np.ones((2048, K), np.float32)
    batch[1030, 2] = np.nan
    state = update(statistic, before, batch)
    assert (bool(before.finite), bool(state.finite)) == (True, False)
    assert np.isnan(result_of(statistic, state)).all()
    rest = [leaf for leaf in jax.tree.leaves(before) if leaf.dtype != bool]
    assert_trees_equal([leaf for leaf in jax.tree.leaves(state) if leaf.dtype != bool], rest)


@each_statistic
def test_an_empty_or_zero_batch_changes_nothing(statistic):
    before = update(statistic, statistic.init(K), ROWS)
    assert_trees_equal(update(statistic, before, jnp.zeros((3, K))), before)
    assert_trees_equal(update(statistic, before, jnp.zeros((0, K))), before)
    assert not result(statistic).any()


@each_statistic
def test_bfloat16_inputs_count_in_float32(statistic):
    x = jnp.asarray(ROWS, jnp.bfloat16)
    found = result(statistic, x)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, result(statistic, x.astype(jnp.float32)))
