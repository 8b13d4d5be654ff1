"""Ten ways in which other libraries lose scaling state or a loss scale, each as a test.

Each docstring tells the whole story: who had the bug, what went wrong and what it led to. All run
through `mp.TrainState` and through `mp.nnx.Optimizer`.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import assert_trees_equal
from scaling_helpers import (
    DENSE,
    FROZEN,
    LOOPS,
    amax,
    by_path,
    dense,
    float8,
    history,
    in_a_shard_map,
    inner_product,
    on_a_mesh,
    peaked,
    unequal_batches,
)

import mpjax as mp

# Every product is by a power of two, and a division by the loss scale stands between two fusions:
# no compiler rounds one program in another way than the next.
SGD = optax.sgd(2.0**-4, momentum=0.5)
UNSCALED = mp.loss_scaled(SGD, 1)
OF_THREE = optax.MultiSteps(FROZEN, every_k_schedule=3)


@pytest.fixture(params=["linen", "nnx"])
def api(request):
    return request.param


def gradients(loop, *batch, **options):
    """The gradients of the parameters of one step, by name."""
    return by_path(nnx.as_pure(loop.step(*batch, **options).params))


def assert_history(loop, **expected):
    """The histories of a layer are of the steps given, bit for bit, and the scales follow."""
    for name, steps in expected.items():
        state = loop.states[name]
        np.testing.assert_array_equal(state.amax_history, history(*steps))
        largest = np.float32(57344 if name == "output_grad" else 448)
        np.testing.assert_allclose(state.scale, max(steps) / largest, rtol=2.0**-23)


def test_a_growth_step_unscales_by_the_scale_that_scaled(api):
    """MPX moves the loss scale first and then divides the gradients by the new one.

    At every step at which the scale grows by 2, the gradients (and the reported loss) come out
    halved. MPX's own tests wrote `** 2**10` for `* 2**10` and so ran at a scale of 1, where nothing
    shows. Here the scale grows fourfold at each step, and gradients are those of a scale of 1.
    """
    growing = mp.DynamicLossScale(initial_scale=2.0**10, period=1, factor=4)
    loop, reference = (dense(api, tx) for tx in (mp.loss_scaled(SGD, growing), UNSCALED))
    for step in (1, 2, 3):
        x, c = peaked(step, seed=step), peaked(1, seed=step)
        assert_trees_equal(gradients(loop, x, c), gradients(reference, x, c))
        assert loop.loss_scale == 2.0**10 * 4**step
    assert_trees_equal(loop.params, reference.params)


def test_a_custom_floor_of_the_loss_scale_survives_jit(api):
    """jmp's `DynamicLossScale` flattens to its fields without `min_loss_scale`.

    So the first `jit` or `tree_map` that a loss scale passes through puts its floor back to the
    default of 1, in silence: a run that asked for a floor of 0.5, or of 16, does not have it.
    Three overflows in a jitted step, of a policy that brings its loss scale along.
    """
    loss_scale = mp.DynamicLossScale(initial_scale=4, factor=4, min_scale=0.5)
    loop = dense(api, FROZEN, mp.DTypePolicy("mixed_float16", loss_scale=loss_scale))
    seen = []
    for _ in range(3):
        loop.step(peaked(1), peaked(np.nan))
        seen.append(loop.loss_scale)
    assert seen == [1, 0.5, 0.5]
    assert loop.skipped_steps == 3


def test_a_loss_scale_does_not_divide_scaling_state(api):
    """Flax carries float8 state as if it were gradients, in `_overwrite_with_gradient`.

    `flax.training.dynamic_scale.DynamicScale.value_and_grad` divides every leaf of the gradients by
    the loss scale, and with them new scales and histories: they come out 65536 times too small, and
    the next step saturates everything. Keras had the same bug until 2025-04. And where the state is
    spared, the amax of an output's gradient is still one of the scaled loss, which jumps when the
    loss scale does. Ours are those of the true gradient.
    """
    loop = dense(api, mp.loss_scaled(FROZEN, mp.DynamicLossScale(2.0**16, period=1)))
    kernel = amax(loop.params["kernel"])
    for size in (2, 4):
        loop.step(peaked(size), peaked(3 * size))
    assert loop.loss_scale == 2.0**18
    assert_history(loop, input=(2, 4), kernel=(kernel, kernel), output_grad=(6, 12))


def twice(forward, x, c):
    """The layer runs on its input and on a negative half of it."""
    return jnp.sum(forward(x) * c + forward(-x / 2) * (c / 4))


def scanned(forward, x, c):
    """The same in a scan over one layer."""
    scales = jnp.asarray([1.0, -0.5]), jnp.asarray([1.0, 0.25])

    def body(total, scale):
        return total + jnp.sum(forward(x * scale[0]) * (c * scale[1])), None

    return jax.lax.scan(body, 0.0, scales)[0]


@pytest.mark.parametrize("loss", [twice, scanned])
def test_a_shared_layer_keeps_the_maximum_of_its_calls(api, loss):
    """Flax' documentation says that float8 amaxes of several calls add up by maximum.

    Its high-level operations stopped making use of the dtype with that addition, so autodiff sums
    the states as it sums gradients: of a layer that is called twice, or scanned over with broadcast
    variables, history and scale are about twice (L times) too large, and the lowest bits are lost.
    """
    loop = dense(api, FROZEN)
    kernel = amax(loop.params["kernel"])
    loop.step(peaked(2), peaked(3), loss=loss)
    assert_history(loop, input=(2,), kernel=(kernel,), output_grad=(3,))


def test_clipping_gradients_leaves_scaling_state_bit_identical(api):
    """MaxText clipped by the global norm of a tree that held amaxes and scales too.

    Amaxes of a hundred dominate the norm, and everything in the tree was multiplied by 1 / norm:
    gradients far too small, and scales far too small, which "ruins convergence".
    """
    clipped = dense(api, optax.chain(optax.clip_by_global_norm(1.0), FROZEN))
    reference = dense(api, FROZEN)
    for loop in (clipped, reference):
        for size in (100, 300):
            loop.step(peaked(size), peaked(2 * size))
    assert_trees_equal(clipped.states, reference.states)
    assert_history(clipped, input=(100, 300), output_grad=(200, 600))


def test_accumulation_keeps_the_maximum_of_all_microbatches(api):
    """In Marin (Levanter), accumulating gradients kept the amaxes of the last microbatch only.

    The scale was then too small for the others, whose largest values clipped without an error. A
    mean over microbatches, what plain accumulation does to state among gradients, is as wrong.
    """
    loop = dense(api, FROZEN, microbatches=4)
    x, c = peaked([2, 64, 4, 1], rows=2), peaked([4, 8, 32, 4], rows=2)
    loop.step(x.reshape(8, 8), c.reshape(8, 8))
    assert_history(loop, input=(64,), output_grad=(32 / 4,))


def test_a_scale_does_not_move_between_the_microbatches_of_an_update(api):
    """The other half of that bug: a history that rolls at each microbatch.

    It forgets N times as fast as it should, and microbatches of one step are quantized by different
    scales. Three steps of `optax.MultiSteps` are one update.
    """
    loop = dense(api, OF_THREE)
    for _ in range(3):
        loop.step(peaked(1), peaked(1))
    output = np.asarray(loop.forward(peaked(50)))
    for size in (50, 25):
        loop.step(peaked(size), peaked(size))
        assert_history(loop, input=(1,), output_grad=(1,))
        np.testing.assert_array_equal(loop.forward(peaked(50)), output)
    loop.step(peaked(5), peaked(5))
    assert_history(loop, input=(1, 50), output_grad=(1, 50))
    assert amax(loop.forward(peaked(50))) > 10 * amax(output)


@pytest.mark.parametrize("how", ["jit", "shard_map"])
def test_over_devices_the_amax_is_the_global_one(api, how):
    """Where `lax.pmean(grads)` averages a tree with float8 state, each device's amax is averaged.

    That is what data parallel training in `pmap` or `shard_map` does with Flax' float8 state: the
    mean of the devices' amaxes is below the largest, whose device clips. Without the mean each
    device has a state of its own, and weights drift apart.
    """
    loop = dense(api, FROZEN)
    around = in_a_shard_map(check_vma=True) if how == "shard_map" else None
    scaling = on_a_mesh(loop, unequal_batches(), around)
    n = len(jax.devices())
    for name, expected in (("input", (n, 2 * n)), ("output_grad", (10 * n, 10 * n))):
        for shard in scaling[name].amax_history.addressable_shards:
            np.testing.assert_array_equal(shard.data, history(*expected))


def test_a_non_finite_step_leaves_everything_but_the_loss_scale(api):
    """Flax' `DynamicScale` says whether gradients are finite, and leaves the rest to the caller.

    Its examples restore parameters and optimizer state and nothing else. Float8 state is among
    neither, so an Inf enters the history as an amax, and the scale becomes Inf or NaN for as long
    as the history is. Here the input overflows, so amaxes are Inf too.
    """
    adam = optax.adam(optax.linear_schedule(1e-2, 0.0, 10))
    loop = dense(api, mp.loss_scaled(adam, mp.DynamicLossScale(2.0**8)))
    loop.step(peaked(1), peaked(1))
    before, states = loop.kept, loop.states
    overflowed = peaked(1)
    overflowed[0, 0] = np.inf
    loop.step(overflowed, peaked(1))
    assert_trees_equal(loop.kept, before)
    assert_trees_equal(loop.states, states)
    assert (loop.skipped_steps, loop.loss_scale) == (1, 2.0**7)
    loop.step(peaked(2), peaked(1))
    assert_history(loop, input=(1, 2), output_grad=(1, 1))


class LinenCounter(nn.Module):
    """A Dense that counts its calls, as a BatchNorm keeps its averages."""

    @nn.compact
    def __call__(self, x):
        calls = self.variable("batch_stats", "calls", lambda: jnp.zeros((), jnp.int32))
        if not self.is_initializing():
            calls.value += 1
        return nn.Dense(8, name="dense")(x)


class NnxCounter(nnx.Module):
    """The same in NNX."""

    def __init__(self, rngs):
        self.dense = nnx.Linear(8, 8, rngs=rngs)
        self.calls = nnx.BatchStat(jnp.zeros((), jnp.int32))

    def __call__(self, x):
        self.calls[...] += 1
        return self.dense(x)


def linen_counting_step(state, x, c):
    def loss_fn(variables):
        out, changed = state.apply_fn(variables, x, mutable=["batch_stats"])
        return jnp.sum(out * c), changed

    (_, changed), grads = state.value_and_grad(loss_fn, has_aux=True)
    return state.apply_gradients(grads, collections=changed)


def nnx_counting_step(model, optimizer, x, c):
    _, grads = mp.nnx.value_and_grad(inner_product)(model, x, c)
    optimizer.update(model, grads)


def test_linen_and_nnx_agree_and_no_stale_state_comes_back():
    """MaxText's NNX path merged the state of before the forward pass after the optimizer's update.

    Scales and histories so stayed those of step 0, and Gemma3-27B's loss went from 13.028 to 13.002
    in 20 steps and no further. In Linen, Flax' own `TrainState.apply_gradients` drops every
    collection besides parameters and float8 state. Here the model has another one, which the
    forward pass changes: after each step it is new, and so is the scaling state.
    """
    linen = LOOPS["linen"](LinenCounter(), float8(), UNSCALED, peaked(1))
    counting = LOOPS["nnx"](NnxCounter, float8(), UNSCALED)
    nnx.update(counting.model, nnx.state(jax.tree.map(jnp.copy, linen.carry.params)))
    linen_step, nnx_step = jax.jit(linen_counting_step), nnx.jit(nnx_counting_step)
    sizes = (2.0, 3.0, 5.0)
    for step, size in enumerate(sizes, start=1):
        batch = peaked(size, seed=step), peaked(10 * size, seed=step)
        linen.carry = linen_step(linen.carry, *batch)
        nnx_step(counting.model, counting.optimizer, *batch)
        assert linen.carry.variables["batch_stats"]["calls"] == step
        assert counting.model.calls[...] == step
        for loop in (linen, counting):
            state = loop.states["dense/input"]
            np.testing.assert_array_equal(state.amax_history, history(*sizes[:step]))
            assert loop.states["dense/output_grad"].amax_history[0] == 10 * size
        assert_trees_equal(linen.states, counting.states)
        assert_trees_equal(linen.params, counting.params)


def test_each_microbatch_sees_what_the_one_before_it_changed():
    """A count of calls, such as a BatchNorm's averages or a Dropout's randomness, in NNX."""
    loop = LOOPS["nnx"](NnxCounter, float8(), FROZEN, microbatches=2)
    for step in (1, 2):
        loop.step(peaked(2), peaked(3))
        assert loop.model.calls[...] == 2 * step
    np.testing.assert_array_equal(loop.states["dense/input"].amax_history, history(2, 2))


def test_step_one_is_quantized_by_the_amax_of_step_zero(api):
    """ "Delayed scaling" has two meanings: Keras quantizes step t by amaxes of steps before t - 1.

    It uses the stored scale and computes the next one from the history before its update, so that
    the amax of step 0 has its effect at step 2, and step 1 still runs with a scale of 1. Flax and
    TransformerEngine have a lag of one step. A test of the states cannot tell these apart, and both
    ship the same one: only a value of the forward pass can.

    All inputs have one magnitude, so what saturates is all of it. The kernel's gradient is
    x_q.T @ c: that of step 1, with inputs of 100, is that of step 0, with inputs of 2.
    """
    signs = np.sign(np.random.default_rng(0).standard_normal((4, 8))).astype(np.float32)
    loop, cotangent = dense(api, FROZEN), np.ones((4, 8), np.float32)
    kernels = [gradients(loop, size * signs, cotangent)["kernel"] for size in (2, 100, 100)]
    column_sums = np.repeat(signs.sum(0)[:, None], 8, axis=1)
    assert amax(column_sums) >= 2
    for kernel, size in zip(kernels, (2, 2, 100), strict=True):
        np.testing.assert_allclose(kernel, size * column_sums, rtol=1e-6)


def test_the_layers_of_these_tests_do_quantize(api):
    """So that none of them passes because nothing was in float8 at all."""
    loop = dense(api, FROZEN)
    layer = DENSE[api] if api == "linen" else DENSE[api](nnx.Rngs(0))
    x = peaked(1)
    plain = layer.apply({"params": loop.carry.params}, x) if api == "linen" else layer(x)
    assert not np.array_equal(loop.forward(x), plain)
