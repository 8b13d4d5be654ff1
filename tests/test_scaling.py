"""Scaling as pure functions, and the history of a training run worked out by hand in NumPy."""

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import assert_trees_equal
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scaling_helpers import LOOPS, amax, float8, mean_squared_error, peaked

import mpjax as mp
from mpjax._scaling import init_state, observe, update

FLOAT32 = np.finfo(np.float32)
E4M3, E5M2 = "float8_e4m3fn", "float8_e5m2"
LARGEST = {E4M3: np.float32(448), E5M2: np.float32(57344), "int8": np.float32(127)}


def assert_scale(found: Any, expected: Any) -> None:
    """Equal but for the last bit: compiled, a division is a product with the reciprocal."""
    np.testing.assert_array_max_ulp(np.asarray(found), np.asarray(expected), maxulp=1)


def observed(state, *steps):
    """The state after steps that observed these amaxes."""
    for step in steps:
        state = update(observe(state, jnp.float32(step)))
    return state


# -- init, observe, update


@pytest.mark.parametrize("layers", [(), (3,)])
def test_a_new_state_knows_nothing(layers):
    state = init_state(mp.DelayedScaling(4), E5M2, of_gradient=True, layers=layers)
    assert state.amax_history.shape == (*layers, 4)
    assert state.scale.shape == state.observed.shape == layers
    assert all(x.dtype == jnp.float32 and not np.any(x) for x in jax.tree.leaves(state))
    assert (state.format, state.of_gradient, state.probe) == (E5M2, True, None)


def test_observe_is_a_maximum_and_changes_nothing_else():
    before = observed(init_state(mp.DelayedScaling(3), E4M3), 5.0)
    after = before
    for value in (2.0, 7.0, 3.0):
        after = observe(after, jnp.float32(value))
    assert after.observed == 7
    assert_trees_equal((after.amax_history, after.scale), (before.amax_history, before.scale))


def test_the_history_rolls_and_its_oldest_entry_drops_out():
    """Newest first, then from the oldest to the one before: what `roll(history, -1)` leaves."""
    state = init_state(mp.DelayedScaling(3), E4M3)
    rows = []
    for step in (8.0, 4.0, 2.0, 1.0, 1.5):
        state = observed(state, step)
        rows.append(state.amax_history.tolist())
        assert_scale(state.scale, np.float32(max(rows[-1])) / np.float32(448))
        assert state.observed == 0
    assert rows == [[8, 0, 0], [4, 0, 8], [2, 8, 4], [1, 4, 2], [1.5, 2, 1]]


@pytest.mark.parametrize("format, largest", LARGEST.items())
def test_the_scale_takes_the_largest_amax_to_the_largest_value_of_the_format(format, largest):
    state = observed(init_state(mp.DelayedScaling(2), format), 3.0)
    assert_scale(state.scale, np.float32(3) / largest)


@pytest.mark.parametrize("margin", [0, 1, -2, 0.5])
def test_a_margin_is_a_power_of_two_of_room(margin):
    state = observed(init_state(mp.DelayedScaling(2, margin=margin), E4M3), 3.0)
    np.testing.assert_allclose(state.scale, 3 / 448 * 2.0**margin, rtol=2.0**-22)


def test_most_recent_forgets_what_the_history_keeps():
    state = init_state(mp.DelayedScaling(3, algorithm="most_recent"), E4M3)
    state = observed(state, 8.0, 2.0)
    np.testing.assert_array_equal(state.amax_history, [2, 0, 8])
    assert_scale(state.scale, np.float32(2) / np.float32(448))


def test_static_scaling_keeps_the_first_amax():
    state = init_state(mp.StaticScaling(margin=1), E4M3)
    for step, scale in ((0.0, 0), (np.nan, 0), (7.0, 2 * 7 / 448), (14.0, 2 * 7 / 448)):
        state = observed(state, step)
        assert state.scale == scale
        assert state.amax_history.shape == (0,)


@pytest.mark.parametrize("nothing", [0.0, -0.0, np.nan, np.inf])
@pytest.mark.parametrize("recipe", [mp.DelayedScaling(3), mp.StaticScaling()], ids=lambda r: str(r))
def test_what_is_no_amax_leaves_the_state_as_it_was(recipe, nothing):
    new = init_state(recipe, E4M3)
    assert_trees_equal(observed(new, nothing), new)
    known = observed(new, 5.0)
    assert_trees_equal(observed(known, nothing), known)


def test_a_non_finite_amax_among_finite_ones_is_not_lost():
    """NaN survives `observe`: a step that saw one does not move the history."""
    state = init_state(mp.DelayedScaling(3), E4M3)
    for amaxes in ((1.0, np.nan), (np.nan, 1.0), (1.0, np.inf)):
        seen = functools.reduce(observe, map(jnp.float32, amaxes), state)
        assert_trees_equal(update(seen), state)


@pytest.mark.parametrize("margin", [-64, 0, 64])
@pytest.mark.parametrize("size", [FLOAT32.tiny, FLOAT32.max])
@pytest.mark.parametrize("format", list(LARGEST))
def test_a_scale_is_a_normal_number_whose_products_are_finite(format, size, margin):
    """2**-126 at least, for smaller ones flush to zero; and the largest value stays a number."""
    state = observed(init_state(mp.DelayedScaling(1, margin=margin), format), size)
    assert state.scale >= FLOAT32.tiny
    assert np.isfinite(np.asarray(state.scale) * LARGEST[format])
    quotient = float(size) / float(LARGEST[format])
    exact = quotient * 2.0**margin
    if quotient >= FLOAT32.tiny and exact <= float(FLOAT32.max) / float(LARGEST[format]) / 2:
        np.testing.assert_allclose(state.scale, max(exact, FLOAT32.tiny), rtol=2.0**-22)


def test_a_subnormal_amax_gives_the_smallest_scale_or_counts_as_zero():
    """Hardware may flush it, but no scale that is half known comes of it."""
    state = observed(init_state(mp.DelayedScaling(1), E4M3), 1e-40)
    assert float(state.scale) in (0, float(FLOAT32.tiny))
    assert (state.scale > 0) == (state.amax_history[0] > 0)


def test_a_stack_of_layers_is_each_layer_alone():
    recipe = mp.DelayedScaling(2)
    stack, alone = init_state(recipe, E4M3, layers=(3,)), [init_state(recipe, E4M3)] * 3
    for row in ([1, 2, 3], [4, 0, np.inf], [0.5, 1, 8]):
        stack = update(observe(stack, jnp.asarray(row, jnp.float32)))
        alone = [observed(state, x) for state, x in zip(alone, row, strict=True)]
    for i, state in enumerate(alone):
        assert_trees_equal(stack[i], state)


def by_definition(recipe, format, amaxes):
    """History and scale in NumPy."""
    history, scale = np.zeros(recipe.amax_history_length, np.float32), np.float32(0)
    for step in amaxes:
        found = np.max(np.asarray([0, *step], np.float32))
        if not np.isfinite(found) or found <= 0:
            continue
        history = np.roll(history, -1)
        history[0] = found
        largest = history[0] if recipe.algorithm == "most_recent" else history.max()
        scale = largest / LARGEST[format] * np.float32(2.0**recipe.margin)
        scale = np.clip(scale, FLOAT32.tiny, FLOAT32.max / LARGEST[format] / 2)
    return history, scale


RECIPES = [
    mp.DelayedScaling(1),
    mp.DelayedScaling(2, margin=1),
    mp.DelayedScaling(4, margin=-1),
    mp.DelayedScaling(3, algorithm="most_recent"),
]
ADAM = optax.adam(1e-2)
AMAXES = st.one_of(
    st.sampled_from([0.0, math.inf, math.nan, float(FLOAT32.max), float(FLOAT32.tiny)]),
    st.floats(2.0**-100, 2.0**100, width=32),
)


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(RECIPES),
    st.sampled_from(list(LARGEST)),
    st.lists(st.lists(AMAXES, max_size=3), max_size=6),
)
@example(RECIPES[1], E5M2, [[1.0, 3.0], [], [math.nan], [2.0]])
def test_any_sequence_is_that_of_the_definition(recipe, format, amaxes):
    state = init_state(recipe, format)
    for step in amaxes:
        state = update(functools.reduce(observe, map(jnp.float32, step), state))
    history, scale = by_definition(recipe, format, amaxes)
    np.testing.assert_array_equal(state.amax_history, history)
    np.testing.assert_allclose(state.scale, scale, rtol=2.0**-23)


def test_trees_keep_what_is_no_state():
    state = init_state(mp.DelayedScaling(2), E4M3)
    tree = {"params": jnp.ones(3), "scaling": {"a": {"input": state}}}
    seen = mp.observe_scaling(tree["scaling"], {"a": {"input": jnp.float32(4)}})
    assert seen["a"]["input"].observed == 4
    after = mp.update_scaling({**tree, "scaling": seen})
    np.testing.assert_array_equal(after["scaling"]["a"]["input"].amax_history, [4, 0])
    assert after["params"] is tree["params"]


def test_a_state_is_a_pytree_whose_recipe_is_static():
    state = observed(init_state(mp.DelayedScaling(2, margin=1), E5M2, of_gradient=True), 3.0)
    leaves, structure = jax.tree.flatten(state)
    assert len(leaves) == 3
    assert_trees_equal(jax.tree.unflatten(structure, leaves), state)
    assert jax.jit(lambda x: x)(state).recipe == mp.DelayedScaling(2, margin=1)


# -- five Adam steps of a Dense(32), by hand


def quantized(x, scale, format):
    """The values of `x` in a format, as float32, by a scale; 0 stands for the current amax's."""
    dtype, largest = np.dtype(getattr(ml_dtypes, format)), LARGEST[format]
    scale = scale or np.float32(amax(x) / largest)
    values = np.clip(x / scale, -largest, largest).astype(dtype).astype(np.float32)
    return values, scale


def by_hand(kernel, bias, batches, margin, algorithm, learning_rate=1e-2):
    """Amaxes, histories and scales of each step, in NumPy.

    The forward pass is `y = x_q @ w_q * x_s * w_s + b`, the loss `mean((y - target)**2)`, the
    gradient of the kernel `x_q.T @ g_q * x_s * g_s`.
    """
    formats = {"input": E4M3, "kernel": E4M3, "output_grad": E5M2}
    histories = {name: np.zeros(3, np.float32) for name in formats}
    scales = dict.fromkeys(formats, np.float32(0))
    moments = {name: (0.0, 0.0) for name in ("kernel", "bias")}
    params = {"kernel": kernel, "bias": bias}
    rows = []
    for t, (x, target) in enumerate(batches, start=1):
        x_q, x_s = quantized(x, scales["input"], E4M3)
        w_q, w_s = quantized(params["kernel"], scales["kernel"], E4M3)
        y = (x_q @ w_q) * (x_s * w_s) + params["bias"]
        g = np.float32(2) * (y - target) / np.float32(y.size)
        g_q, g_s = quantized(g, scales["output_grad"], E5M2)
        grads = {"kernel": (x_q.T @ g_q) * (x_s * g_s), "bias": g.sum(0)}
        for name, of in (("input", x), ("kernel", params["kernel"]), ("output_grad", g)):
            histories[name] = np.roll(histories[name], -1)
            histories[name][0] = amax(of)
            largest = histories[name].max() if algorithm == "max" else histories[name][0]
            scales[name] = np.float32(largest / LARGEST[formats[name]] * 2.0**margin)
        for name, grad in grads.items():
            first, second = moments[name]
            first, second = 0.9 * first + 0.1 * grad, 0.999 * second + 0.001 * grad**2
            moments[name] = first, second
            step = first / (1 - 0.9**t) / (np.sqrt(second / (1 - 0.999**t)) + 1e-8)
            params[name] = (params[name] - learning_rate * step).astype(np.float32)
        rows.append({name: (histories[name].copy(), scales[name]) for name in formats})
    return rows


@pytest.mark.parametrize("api", list(LOOPS))
@pytest.mark.parametrize(
    "margin, algorithm", [(0, "max"), (1, "max"), (0, "most_recent"), (1, "most_recent")]
)
def test_five_adam_steps_are_those_worked_out_by_hand(api, margin, algorithm):
    """Inputs grow, then shrink, so that entries drop out and delayed scales clip."""
    module = {"linen": nn.Dense(32), "nnx": lambda rngs: nnx.Linear(16, 32, rngs=rngs)}[api]
    policy = float8(margin=margin, amax_algorithm=algorithm)
    generator = np.random.default_rng(0)
    batches = [
        (
            size * generator.standard_normal((8, 16), np.float32),
            generator.standard_normal((8, 32), np.float32),
        )
        for size in (1, 4, 2, 0.5, 0.25)
    ]
    loop = LOOPS[api](module, policy, ADAM, batches[0][0])
    params = loop.params
    expected = by_hand(params["kernel"], params["bias"], batches, margin, algorithm)
    for batch, row in zip(batches, expected, strict=True):
        loop.step(*batch, loss=mean_squared_error)
        for name, (history, scale) in row.items():
            np.testing.assert_allclose(loop.states[name].amax_history, history, rtol=1e-6)
            np.testing.assert_allclose(loop.states[name].scale, scale, rtol=1e-6)


# -- the forward pass of step t uses amaxes of steps before t


@pytest.mark.parametrize("api", list(LOOPS))
def test_the_first_step_takes_the_current_amax_and_the_second_that_of_the_first(api):
    """The kernel is the identity, so the output is the input as it was quantized."""
    module = {"linen": nn.Dense(8), "nnx": lambda rngs: nnx.Linear(8, 8, rngs=rngs)}[api]
    loop = LOOPS[api](module, float8(), optax.sgd(0.0), peaked(1))
    if api == "linen":
        params = {"kernel": jnp.eye(8), "bias": jnp.zeros(8)}
        loop.carry = loop.carry.replace(variables={**loop.carry.variables, "params": params})
    else:
        loop.model.kernel[...] = jnp.eye(8)
    outputs = {}
    for size in (2, 100):
        outputs[size] = np.asarray(loop.forward(peaked(size)))
        loop.step(peaked(size), peaked(1))
    np.testing.assert_allclose(amax(outputs[2]), 2, rtol=1e-6)
    assert_scale(loop.states["kernel"].scale, np.float32(1) / np.float32(448))
    np.testing.assert_allclose(amax(outputs[100]), 2, rtol=1e-6)  # 448 * (2 / 448)
    np.testing.assert_allclose(outputs[100], np.clip(peaked(100), -2, 2), rtol=1e-6)
    np.testing.assert_allclose(amax(loop.forward(peaked(100))), 100, rtol=1e-6)
