"""`mp.loss_scaled`: what a step does to any optimizer, and what a skipped step leaves alone.

Gradients here are chosen, not computed, where only their arithmetic matters: `scaled(state, g)` is
what the backward pass of the scaled loss returns when the gradient of the loss is g.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import PartitionSpec as P

import mpjax as mp
from mpjax._loss_scaled import split_loss_scaled

PARAMS = {"b": np.float32([1, 2]), "w": np.float32([[1, -2], [3, 4]])}
GRADS = {"b": np.float32([0.5, -3]), "w": np.float32([[2, 0.25], [-1, 7]])}


def params():
    return jax.tree.map(jnp.asarray, PARAMS)


def scaled(opt_state, grads=GRADS, bad=None):
    """Gradients of the scaled loss; `bad` replaces one entry of the last leaf."""
    scale = mp.loss_scale_of(opt_state).scale
    grads = jax.tree.map(lambda g: jnp.asarray(g) * scale.astype(g.dtype), grads)
    if bad is not None:
        grads["w"] = grads["w"].at[1, 0].set(bad)
    return grads


def bits(tree) -> list[tuple[str, bytes]]:
    return [(str(x.dtype), np.asarray(x).tobytes()) for x in jax.tree.leaves(tree)]


def test_the_growth_step_unscales_by_the_scale_that_scaled():
    """Regression. Another library's gradient function moves the loss scale before it unscales:
    it scales the loss by S, finds the gradients finite, lets S grow to 2 S and divides by 2 S. So
    on every growth step (one of 2000 by default) all gradients come out halved, while every other
    step is right, and a test over a few steps never sees it. With a period of 1 each step grows
    the scale. All scales are powers of two, so the division is exact and each update must equal
    that of the unscaled optimizer bit for bit."""
    inner = optax.sgd(2.0**-10)
    tx = mp.loss_scaled(inner, mp.DynamicLossScale(8, period=1))

    def loss(p):
        return jnp.sum(p["w"] ** 2) * jnp.sum(p["b"] ** 3)

    expected, p = params(), params()
    plain_state, state = inner.init(expected), tx.init(p)
    for step in range(4):
        assert float(state.loss_scale.scale) == 8 * 2**step
        updates, plain_state = inner.update(jax.grad(loss)(expected), plain_state, expected)
        expected = optax.apply_updates(expected, updates)
        grads = jax.grad(lambda p, s=state: s.loss_scale.scale_loss(loss(p)))(p)
        updates, state = tx.update(grads, state, p)
        p = optax.apply_updates(p, updates)
        assert bits(p) == bits(expected)
    assert bool(mp.all_finite(p))
    assert bits(p) != bits(params())


INNERS = {
    "chain": optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2)),
    "schedule": optax.adamw(optax.linear_schedule(1.0, 0.0, 10)),
    "masked": optax.masked(optax.adam(1.0), {"b": False, "w": True}),
    "inject_hyperparams": optax.inject_hyperparams(optax.adamw)(
        learning_rate=optax.linear_schedule(1.0, 0.0, 10)
    ),
    "MultiSteps": optax.MultiSteps(optax.adam(1.0), 2).gradient_transformation(),
    "adafactor": optax.adafactor(1e-2),
}


@pytest.mark.parametrize(
    ("name", "bad"), list(zip(INNERS, [np.inf, -np.inf, np.nan] * 2, strict=True))
)
def test_a_non_finite_step_changes_nothing_but_the_scale_and_the_count(name, bad):
    tx = mp.loss_scaled(INNERS[name], mp.DynamicLossScale(64))
    update = jax.jit(tx.update)
    p, state = params(), tx.init(params())
    updates, state = update(scaled(state), state, p)
    p = optax.apply_updates(p, updates)
    skipped, after = update(scaled(state, bad=bad), state, p)
    assert bits(optax.apply_updates(p, skipped)) == bits(p)
    assert jax.tree.structure(skipped) == jax.tree.structure(updates)
    assert bits(skipped) == bits(jax.tree.map(jnp.zeros_like, updates))
    assert bits(after.inner_state) == bits(state.inner_state)
    assert (float(state.loss_scale.scale), int(state.loss_scale.finite_steps)) == (64, 1)
    assert (float(after.loss_scale.scale), int(after.loss_scale.finite_steps)) == (32, 0)
    assert (int(state.skipped_steps), int(after.skipped_steps)) == (0, 1)


@pytest.mark.parametrize("name", INNERS)
def test_with_skipped_steps_left_out_the_optimizer_is_the_unwrapped_one(name):
    """Four finite steps and two overflows end where four steps of the inner optimizer end."""
    inner, tx = INNERS[name], mp.loss_scaled(INNERS[name], mp.DynamicLossScale(64, period=2))
    update, plain_update = jax.jit(tx.update), jax.jit(inner.update)
    expected, p = params(), params()
    plain_state, state = inner.init(expected), tx.init(p)
    grads = jax.tree.map(jnp.asarray, GRADS)
    for bad in (None, np.nan, None, None, np.inf, None):
        updates, state = update(scaled(state, bad=bad), state, p)
        p = optax.apply_updates(p, updates)
        if bad is None:
            updates, plain_state = plain_update(grads, plain_state, expected)
            expected = optax.apply_updates(expected, updates)
    assert int(state.skipped_steps) == 2
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6),
        (p, state.inner_state),
        (expected, plain_state),
    )


@pytest.mark.parametrize("loss_scale", [None, 4])
def test_a_scale_that_does_not_move_skips_too(loss_scale):
    tx = mp.loss_scaled(optax.adam(1.0), loss_scale)
    state = tx.init(params())
    updates, after = tx.update(scaled(state, bad=np.nan), state, params())
    assert not any(np.any(u) for u in jax.tree.leaves(updates))
    assert bits(after.inner_state) == bits(state.inner_state)
    assert int(after.skipped_steps) == 1
    assert float(after.loss_scale.scale) == (loss_scale or 1.0)


def test_schedules_do_not_advance_on_a_skipped_step():
    tx = mp.loss_scaled(INNERS["inject_hyperparams"])
    state = tx.init(params())
    rates, counts = [], []
    for bad in (None, np.inf, np.nan, None, None):
        _, state = tx.update(scaled(state, bad=bad), state, params())
        rates.append(round(float(state.inner_state.hyperparams["learning_rate"]), 6))
        counts.append(int(state.inner_state.count))
    assert counts == [1, 1, 1, 2, 3]
    assert rates == [1.0, 1.0, 1.0, 0.9, 0.8]


def test_clipping_inside_sees_unscaled_gradients():
    """A gradient of norm 5 under a scale of 1024, clipped to 10, comes through untouched."""
    tx = mp.loss_scaled(optax.chain(optax.clip_by_global_norm(10.0), optax.sgd(1.0)), 1024)
    state = tx.init(params())
    grads = {"b": np.float32([3, 4]), "w": np.zeros((2, 2), np.float32)}
    updates, _ = tx.update(scaled(state, grads), state, params())
    assert updates["b"].tolist() == [-3, -4]


def test_multi_steps_inside_leaves_an_overflowing_microbatch_out_of_the_mean():
    steps = optax.MultiSteps(optax.sgd(1.0), 2).gradient_transformation()
    tx = mp.loss_scaled(steps, mp.DynamicLossScale(8))
    state, seen = tx.init(params()), []
    for factor, bad in ((1, None), (1, np.inf), (3, None)):
        grads = jax.tree.map(lambda g, f=factor: g * f, GRADS)
        updates, state = tx.update(scaled(state, grads, bad), state, params())
        seen.append(updates["b"].tolist())
    assert seen == [[0, 0], [0, 0], [-2 * 0.5, -2 * -3]]
    assert (int(state.skipped_steps), int(state.inner_state.gradient_step)) == (1, 1)


def test_multi_steps_outside_is_refused_because_an_overflow_never_leaves_it():
    """optax.MultiSteps clears its accumulator as 0 * accumulator, which is NaN after an Inf."""
    inner = mp.loss_scaled(optax.sgd(1.0))
    state = optax.MultiSteps(inner, 2).init(params())
    with pytest.raises(ValueError, match="whose accumulator stays NaN after one overflow. Write"):
        mp.loss_scale_of(optax.chain(optax.identity()).init(params()) + (state,))


def test_extra_arguments_reach_an_optimizer_that_takes_them():
    plateau = optax.contrib.reduce_on_plateau(factor=0.5, patience=1, accumulation_size=1)
    tx = mp.loss_scaled(optax.chain(optax.sgd(1.0), plateau))
    state, seen = tx.init(params()), []
    for _ in range(4):
        updates, state = tx.update(scaled(state), state, params(), value=jnp.float32(3))
        seen.append(updates["b"].tolist()[1])
    assert seen == [3.0, 1.5, 0.75, 0.375]
    assert int(optax.tree_utils.tree_get(state, "skipped_steps")) == 0


def test_extra_arguments_do_not_reach_an_optimizer_that_takes_none():
    takes_none = optax.GradientTransformation(optax.init_empty_state, lambda g, s, p: (g, s))
    tx = mp.loss_scaled(takes_none)
    state = tx.init(params())
    updates, _ = tx.update(scaled(state), state, params(), value=jnp.float32(3))
    assert updates["b"].tolist() == [0.5, -3.0]


def test_a_step_compiles_once_and_never_waits_for_the_host():
    """Ten steps, two of which overflow, run one program under jit, where asking an array for its
    value is an error, and the guard refuses whatever Python would hand over step by step."""
    tx = mp.loss_scaled(INNERS["chain"], mp.DynamicLossScale(64, period=3))

    @jax.jit
    def step(p, state, factor):
        def loss(p):
            return state.loss_scale.scale_loss(factor * jnp.sum(p["w"] ** 2) + jnp.sum(p["b"]))

        updates, state = tx.update(jax.grad(loss)(p), state, p)
        return optax.apply_updates(p, updates), state

    p, state = params(), tx.init(params())
    factors = [jnp.float32(np.inf if i in (2, 7) else 1.0) for i in range(10)]
    with jax.transfer_guard("disallow"):
        for factor in factors:
            p, state = step(p, state, factor)
    assert step._cache_size() == 1
    assert int(state.skipped_steps) == 2
    assert float(state.loss_scale.scale) == 32  # 64, x: 32, three finite: 64, x: 32
    assert bool(mp.all_finite(p))


def test_float16_gradients_below_float16_reach_the_optimizer():
    """Two factors of 2**-14: the gradient 2**-28 is below float16's smallest number, 2**-24."""

    def loss(w):
        return (w * jnp.float16(2**-14)) * jnp.float16(2**-14)

    w = jnp.float16(1.0)
    assert float(jax.grad(loss)(w)) == 0.0
    tx = mp.loss_scaled(optax.sgd(2.0**20))
    state = tx.init(w)
    grads = jax.grad(lambda w: state.loss_scale.scale_loss(loss(w)))(w)
    assert (grads.dtype, float(grads)) == (jnp.float16, 2.0**-13)
    updates, _ = tx.update(grads, state, w)
    assert (updates.dtype, float(updates)) == (jnp.float32, -(2.0**-8))
    w = optax.apply_updates(w, updates)
    assert (w.dtype, float(w)) == (jnp.float16, 1 - 2.0**-8)


def assert_equal_programs(found: Any, expected: Any) -> None:
    """Equal dtypes, and values but for the last bit: XLA fuses the two programs differently."""
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        if jnp.issubdtype(a.dtype, jnp.floating):
            np.testing.assert_array_max_ulp(np.asarray(a), np.asarray(b), maxulp=1)
        else:
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", ["chain", "schedule", "inject_hyperparams", "MultiSteps"])
def test_float16_parameters_train_as_if_they_were_float32(name):
    tx = mp.loss_scaled(INNERS[name], 8)
    half = jax.tree.map(lambda x: jnp.asarray(x, jnp.float16), (PARAMS, GRADS))
    (half_params, half_grads), update = half, jax.jit(tx.update)
    state, half_state = tx.init(params()), tx.init(half_params)
    for bad in (None, np.inf, None):
        updates, state = update(scaled(state, bad=bad), state, params())
        found, half_state = update(scaled(half_state, half_grads, bad), half_state, half_params)
        assert_equal_programs(found, updates)
        assert_equal_programs(half_state, state)
    assert any(np.any(u) for u in jax.tree.leaves(updates))


def test_float32_gradients_of_bfloat16_parameters():
    """Adam's bfloat16 moments become float32 when a float32 gradient arrives, skipped or not."""
    tx = mp.loss_scaled(optax.adam(1.0), 8)
    brain = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), PARAMS)
    state = tx.init(brain)
    assert state.inner_state[0].mu["b"].dtype == jnp.bfloat16
    _, state = tx.update(scaled(state, bad=np.inf), state, brain)
    assert state.inner_state[0].mu["b"].dtype == jnp.float32
    assert state.inner_state[0].mu["b"].tolist() == [0, 0]
    _, state = tx.update(scaled(state), state, brain)
    np.testing.assert_allclose(state.inner_state[0].mu["b"], 0.1 * GRADS["b"], rtol=1e-6)


def test_devices_agree_on_a_skipped_step():
    """Only the second of two devices overflows: after `pmean` both skip and hold one state."""
    tx = mp.loss_scaled(optax.adam(1.0), mp.DynamicLossScale(8, period=1))
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def step(factor, p, state):
        grads = jax.tree.map(lambda g: jax.lax.pmean(g * factor[0], "data"), scaled(state))
        updates, state = tx.update(grads, state, p)
        return optax.apply_updates(p, updates), state

    step = jax.jit(jax.shard_map(step, mesh=mesh, in_specs=(P("data"), P(), P()), out_specs=P()))
    p, state = step(jnp.float32([1, np.inf]), params(), tx.init(params()))
    assert bits(p) == bits(params())
    assert (float(state.loss_scale.scale), int(state.skipped_steps)) == (4, 1)
    p, state = step(jnp.float32([1, 1]), p, state)
    assert bits(p) != bits(params())
    assert (float(state.loss_scale.scale), int(state.skipped_steps)) == (8, 1)


def test_the_state_may_be_donated():
    tx = mp.loss_scaled(optax.adam(1.0))
    state = tx.init(params())
    update = jax.jit(tx.update, donate_argnums=1)
    for _ in range(3):
        _, state = update(scaled(state), state, params())
    assert int(state.loss_scale.finite_steps) == 3


def test_the_state_passes_through_a_checkpoint(tmp_path):
    tx = mp.loss_scaled(optax.adam(1.0), mp.DynamicLossScale(period=2, min_scale=0.5))
    state = tx.init(params())
    for bad in (None, np.inf, None, None, None):
        _, state = tx.update(scaled(state, bad=bad), state, params())
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", tx.init(params()))
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    assert bits(restored) == bits(state)
    assert (float(restored.loss_scale.scale), int(restored.loss_scale.finite_steps)) == (2**15, 1)


# -- telling a loss-scaled optimizer, and finding its scale


def test_a_loss_scaled_optimizer_is_recognized_and_taken_apart():
    inner = optax.adam(1.0)
    tx = mp.loss_scaled(inner, 4)
    assert mp.is_loss_scaled(tx)
    assert split_loss_scaled(tx) == (inner, mp.StaticLossScale(4))
    assert tx == mp.loss_scaled(inner, 4) and hash(tx) == hash(mp.loss_scaled(inner, 4))
    assert tx != mp.loss_scaled(inner, 8)
    for other in (inner, optax.chain(tx), None, "adam"):
        assert not mp.is_loss_scaled(other)
    with pytest.raises(ValueError, match="`optimizer` is not one of mp.loss_scaled. Received: "):
        split_loss_scaled(inner)


def test_wrapping_twice_is_an_error():
    tx = mp.loss_scaled(optax.adam(1.0))
    message = "is already loss scaled: its gradients would be divided by two scales"
    with pytest.raises(ValueError, match=f"`optimizer` {message}"):
        mp.loss_scaled(tx)
    with pytest.raises(ValueError, match=f"A part of `optimizer` {message}"):
        mp.loss_scaled(optax.chain(optax.clip(1.0), tx)).init(params())


def test_the_loss_scale_is_found_in_any_state():
    tx = optax.chain(optax.identity(), optax.masked(mp.loss_scaled(optax.sgd(1.0), 4), True))
    state = tx.init(params())
    assert mp.loss_scale_of(state).config == mp.StaticLossScale(4)
    assert mp.loss_scale_of(mp.loss_scale_of(state)).config == mp.StaticLossScale(4)
    message = r"`opt_state` holds {} loss scales instead of one. Make it with the `init` of"
    with pytest.raises(ValueError, match=message.format(0)):
        mp.loss_scale_of(optax.adam(1.0).init(params()))
    with pytest.raises(ValueError, match=message.format(2)):
        mp.loss_scale_of({"a": state, "b": state})


@pytest.mark.parametrize(
    "optimizer",
    [
        None,
        optax.adam,
        "adam",
        (lambda p: (), lambda g, s: (g, s)),
        optax.MultiSteps(INNERS["chain"], 2),
    ],
)
def test_what_is_no_optimizer_is_refused(optimizer):
    message = "`optimizer` must be an optax.GradientTransformation, such as optax.adamw"
    with pytest.raises(TypeError, match=message) as error:
        mp.loss_scaled(optimizer)
    assert f"(of type {type(optimizer)})" in str(error.value)


@pytest.mark.parametrize("loss_scale", ["abc", True, [2]])
def test_an_unknown_loss_scale_is_refused(loss_scale):
    with pytest.raises(ValueError, match="Could not interpret loss scale identifier: "):
        mp.loss_scaled(optax.adam(1.0), loss_scale)
