"""Seven invariants of scaling state, each in Linen and in NNX.

1. The optimizer never sees it, clipping never touches it, a loss scale never divides it, an average
   over devices never averages it.
2. Of N microbatches history[0] is the largest amax, and the scale moves once.
3. Shared modules, scan, remat and vmap: maximum, never sum; no roll for a module that did not run,
   or whose output got no gradient.
4. Evaluation and a non-finite step leave it as it is, bit for bit.
5. Linen and NNX hold equal state after k steps.
6. Over the devices of a mesh, amax is the global one.
7. A file restores it bit for bit.

The loss is mostly `sum(model(x) * c)`: the gradient of the model's output is c, so that every amax
is known before the step runs.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import assert_trees_equal
from jax.sharding import PartitionSpec as P
from scaling_helpers import (
    FROZEN,
    LOOPS,
    OPERANDS,
    amax,
    by_path,
    dense,
    float8,
    history,
    in_a_shard_map,
    inner_product,
    mean_squared_error,
    on_a_mesh,
    peaked,
    unequal_batches,
)

import mpjax as mp

# Every product in these is by a power of two, so that no fusion rounds it in another way.
SGD = optax.sgd(2.0**-4, momentum=0.5)
UNSCALED = mp.loss_scaled(SGD, 1)  # by a division too, which stands between two fusions
GROWING = mp.loss_scaled(SGD, mp.DynamicLossScale(initial_scale=8, period=2, factor=4))
OF_THREE = optax.MultiSteps(FROZEN, every_k_schedule=3)
DEVICES = len(jax.devices())


@pytest.fixture(params=["linen", "nnx"])
def api(request):
    return request.param


class LinenMlp(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(8, name="head")(nn.relu(nn.Dense(16, name="body")(x)))


class NnxMlp(nnx.Module):
    def __init__(self, rngs):
        self.body = nnx.Linear(8, 16, rngs=rngs)
        self.head = nnx.Linear(16, 8, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.relu(self.body(x)))


MLP = {"linen": LinenMlp(), "nnx": NnxMlp}


def mlp(api, tx, policy=None, **options):
    return LOOPS[api](MLP[api], policy or float8(), tx, peaked(1), **options)


def batches(steps, scale=1.0):
    return [(peaked(scale * (1 + i), seed=i), peaked(1, seed=9 - i)) for i in range(steps)]


# -- 1. what gradients go through


def spy(seen):
    """An optimizer that notes the trees it is given, and changes nothing."""

    def init(params):
        seen.append(params)
        return optax.EmptyState()

    def update(updates, state, params=None):
        seen.extend((updates, params))
        return updates, state

    return optax.GradientTransformation(init, update)


def test_the_optimizer_sees_no_scaling_state_and_clipping_changes_none(api):
    """A norm of 1e-3 would shrink amaxes of 100 by five orders of magnitude."""
    seen = []
    decay = optax.add_decayed_weights(0.5)
    loop = dense(api, optax.chain(spy(seen), optax.clip_by_global_norm(1e-3), decay, FROZEN))
    kernel = amax(loop.params["kernel"])
    for size in (100, 300):
        grads = loop.step(peaked(size), peaked(2 * size))
        assert amax(by_path(nnx.as_pure(grads.params))["kernel"]) > 1e-3
    expected = {"input": (100, 300), "kernel": (kernel, kernel), "output_grad": (200, 600)}
    for name, state in loop.states.items():
        np.testing.assert_array_equal(state.amax_history, history(*expected[name]))
        largest = np.float32(57344 if name == "output_grad" else 448)
        np.testing.assert_allclose(state.scale, expected[name][-1] / largest, rtol=2.0**-23)
    assert len(seen) == 3  # compiled once: the parameters of init, gradients and parameters
    for tree in seen:
        leaves = jax.tree.leaves_with_path(tree)
        names = [key.key for path, _ in leaves for key in path if hasattr(key, "key")]
        assert sorted(names) == ["bias", "kernel"] and len(leaves) == 2


@pytest.fixture(scope="module")
def unscaled():
    """A loop after four steps with a loss scale of 1, per API."""
    return functools.cache(lambda api: trained(mlp(api, UNSCALED)))


def trained(loop):
    for batch in batches(4, scale=0.25):
        loop.step(*batch, loss=mean_squared_error)
    return loop


@pytest.mark.parametrize(
    "tx, last", [pytest.param("static", 2.0**15, marks=pytest.mark.slow), ("growing", 128)]
)
def test_a_loss_scale_changes_no_bit(api, unscaled, tx, last):
    """Powers of two: amaxes, scales, 8-bit values and weights are those of a loss scale of 1."""
    loop = trained(mlp(api, {"static": mp.loss_scaled(SGD, 2.0**15), "growing": GROWING}[tx]))
    assert loop.loss_scale == last
    assert_trees_equal(loop.states, unscaled(api).states)
    assert_trees_equal(loop.params, unscaled(api).params)


# -- 2. microbatches


def test_accumulation_observes_the_largest_of_all_microbatches(api):
    """The loss is a mean over microbatches, so the gradient of each output is a quarter."""
    loop = dense(api, FROZEN, microbatches=4)
    kernel = amax(loop.params["kernel"])
    x, c = peaked([1, 8, 2, 4], rows=2), peaked([4, 2, 16, 8], rows=2)
    for step in (1, 2):
        loop.step(x.reshape(8, 8) / step, c.reshape(8, 8))
    expected = {"input": (8, 4), "kernel": (kernel, kernel), "output_grad": (4, 4)}
    for name, state in loop.states.items():
        np.testing.assert_array_equal(state.amax_history, history(*expected[name]))
        assert state.observed == 0


def test_accumulated_gradients_are_those_of_the_batch(api):
    """In a layer whose quantized values are exact, so that no rounding hides a factor.

    Amaxes of 7 make the scale of the inputs 1/64, of which all entries are few multiples.
    """

    def loss(forward, x, c):
        return jnp.mean(jnp.sum(forward(x) * c, axis=-1))

    x, c = peaked([7] * 4, rows=2).reshape(8, 8), peaked([7] * 4, rows=2).reshape(8, 8)
    parts, whole = dense(api, FROZEN, microbatches=4), dense(api, FROZEN)
    found = [nnx.as_pure(loop.step(x, c, loss=loss).params) for loop in (parts, whole)]
    for path, grad in by_path(found[0]).items():
        np.testing.assert_allclose(grad, by_path(found[1])[path], rtol=1e-6)


def test_microbatches_give_the_histories_of_the_whole_batch(api):
    """Once scales are known: at the first step each microbatch is quantized by its own amaxes."""
    whole, parts = mlp(api, GROWING), mlp(api, GROWING, microbatches=2)
    (x, y), *later = batches(3)
    whole.step(x, y, loss=mean_squared_error)
    if api == "linen":
        parts.carry = whole.carry
    else:
        parts.model, parts.optimizer = nnx.clone((whole.model, whole.optimizer))
    for batch in later:
        for loop in (whole, parts):
            loop.step(*batch, loss=mean_squared_error)
    for path, state in parts.states.items():
        expected = whole.states[path].amax_history
        np.testing.assert_allclose(state.amax_history, expected, rtol=1e-5)
        if path == "body/input":
            np.testing.assert_array_equal(state.amax_history, expected)


def test_multi_steps_roll_when_the_optimizer_does(api):
    """Two steps of three microbatches each; in between states only observe."""
    loop = dense(api, OF_THREE)
    sizes = [2, 8, 4, 1, 16, 2]
    for i, size in enumerate(sizes, start=1):
        loop.step(peaked(size), peaked(3 * size))
        full, part = sizes[: i - i % 3], sizes[i - i % 3 : i]
        steps = [max(full[j : j + 3]) for j in range(0, len(full), 3)]
        state = loop.states["input"]
        np.testing.assert_array_equal(state.amax_history, history(*steps))
        assert state.scale == np.float32(max(steps, default=0)) / np.float32(448)
        assert state.observed == max(part, default=0)
        np.testing.assert_array_equal(
            loop.states["output_grad"].amax_history, history(*(3 * s for s in steps))
        )


def test_a_loop_by_hand_observes_each_part_and_updates_once():
    loop = dense("linen", FROZEN)
    variables, apply = loop.carry.variables, loop.model.apply

    @jax.jit
    def observed(variables, x, c):
        gradients = mp.value_and_grad(lambda v: inner_product(functools.partial(apply, v), x, c))
        return gradients(variables)[1].observed

    for size in (2, 8, 4):
        seen = observed(variables, peaked(size), peaked(3 * size))
        variables = {**variables, "scaling": mp.observe_scaling(variables["scaling"], seen)}
        assert not np.any(variables["scaling"]["output_grad"].amax_history)
    scaling = mp.update_scaling(variables)["scaling"]
    np.testing.assert_array_equal(scaling["input"].amax_history, history(8))
    np.testing.assert_array_equal(scaling["output_grad"].amax_history, history(24))
    expected = np.float32(24) / np.float32(57344)
    np.testing.assert_array_max_ulp(np.asarray(scaling["output_grad"].scale), expected, maxulp=1)


# -- 3. shared modules, lifted transforms, modules without a gradient


class LinenLayers(nn.Module):
    """Three calls of one Dense, or of a stack of three."""

    how: str
    stacked: bool

    @nn.compact
    def __call__(self, xs):
        layer = nn.Dense(8, name="dense")
        axes = {"params": 0, "scaling": 0} if self.stacked else {}
        if self.how == "scan":
            body = nn.scan(
                lambda layer, carry, x: (carry, layer(x)),
                variable_axes=axes,
                variable_broadcast=() if self.stacked else ("params", "scaling"),
                split_rngs={"params": self.stacked},
            )
            return body(layer, (), xs)[1]
        if self.how == "vmap":
            body = nn.vmap(
                lambda layer, x: layer(x),
                variable_axes=axes or {"params": None, "scaling": None},
                split_rngs={"params": self.stacked},
            )
            return body(layer, xs)
        body = {"calls": lambda f: f, "remat": nn.remat}[self.how](lambda layer, x: layer(x))
        return jnp.stack([body(layer, x) for x in xs])


class NnxLayers(nnx.Module):
    """Three calls of one Linear, or of a stack of three."""

    def __init__(self, how, stacked, rngs):
        def make(rngs):
            return nnx.Linear(8, 8, rngs=rngs)

        if stacked:
            make = nnx.split_rngs(splits=3)(nnx.vmap(make))
        self.dense, self.how, self.stacked = make(rngs), how, stacked

    def __call__(self, xs):
        def call(layer, x):
            return layer(x)

        axes = (0 if self.stacked else None, 0)
        if self.how == "scan":
            return nnx.scan(call, in_axes=axes, out_axes=0)(self.dense, xs)
        if self.how == "vmap":
            return nnx.vmap(call, in_axes=axes, out_axes=0)(self.dense, xs)
        body = {"calls": lambda f: f, "remat": nnx.remat}[self.how](call)
        return jnp.stack([body(self.dense, x) for x in xs])


def layers(api, how, stacked):
    make = {"linen": LinenLayers, "nnx": lambda *args: functools.partial(NnxLayers, *args)}[api]
    return LOOPS[api](make(how, stacked), float8(), FROZEN, peaked([1, 1, 1]))


@pytest.mark.parametrize("how", ["calls", "remat", "scan", "vmap"])
def test_a_layer_that_runs_three_times_observes_the_maximum(api, how):
    """A sum would be 7, three times the kernel's amax, and 19.

    At the second step the largest output gets no gradient, so it is not looked at, and at the
    third none does.
    """
    loop = layers(api, how, stacked=False)
    kernel = amax(loop.params["dense/kernel"])
    loop.step(peaked([1, 4, 2]), peaked([8, 5, 6]))
    loop.step(peaked([1, 4, 2]), peaked([8, 0, 6]))
    before = loop.states
    expected = {"input": (4, 2), "kernel": (kernel, kernel), "output_grad": (8, 8)}
    for name in OPERANDS:
        np.testing.assert_array_equal(
            before[f"dense/{name}"].amax_history, history(*expected[name])
        )
    loop.step(peaked([1, 4, 2]), peaked([0, 0, 0]))
    assert_trees_equal(loop.states, before)


@pytest.mark.parametrize("how", ["scan", "vmap"])
def test_the_layers_of_a_stack_have_states_of_their_own(api, how):
    """At the second step the layer in the middle gets no gradient: only the others roll."""
    loop = layers(api, how, stacked=True)
    kernels = [amax(kernel) for kernel in loop.params["dense/kernel"]]
    loop.step(peaked([1, 4, 2]), peaked([8, 5, 6]))
    loop.step(peaked([3, 3, 3]), peaked([7, 0, 7]))
    first = {"input": (1, 4, 2), "kernel": kernels, "output_grad": (8, 5, 6)}
    then = {"input": (3, 3, 3), "kernel": kernels, "output_grad": (7, 7, 7)}
    for name in OPERANDS:
        steps = zip(first[name], then[name], strict=True)
        rows = [history(a) if i == 1 else history(a, b) for i, (a, b) in enumerate(steps)]
        state = loop.states[f"dense/{name}"]
        np.testing.assert_array_equal(state.amax_history, np.stack(rows))
        largest = np.float32(57344 if name == "output_grad" else 448)
        np.testing.assert_allclose(state.scale, np.max(rows, axis=1) / largest, rtol=2.0**-23)


class LinenBranches(nn.Module):
    @nn.compact
    def __call__(self, x, gate, idle=False):
        y = nn.Dense(8, name="used")(x) + gate * nn.Dense(8, name="zeroed")(x)
        stopped = nn.Dense(8, name="stopped")(x)
        y += jax.lax.stop_gradient(stopped) if idle else stopped
        return y if idle else y + nn.Dense(8, name="skipped")(x)


class NnxBranches(nnx.Module):
    def __init__(self, rngs):
        for name in ("used", "zeroed", "stopped", "skipped"):
            setattr(self, name, nnx.Linear(8, 8, rngs=rngs))

    def __call__(self, x, gate, idle=False):
        y = self.used(x) + gate * self.zeroed(x)
        stopped = self.stopped(x)
        y += jax.lax.stop_gradient(stopped) if idle else stopped
        return y if idle else y + self.skipped(x)


def all_branches(forward, x, gate, c):
    return jnp.sum(forward(x, gate) * c)


def only_used(forward, x, gate, c):
    return jnp.sum(forward(x, gate, idle=True) * c)


def test_a_module_without_a_gradient_is_not_rolled(api):
    """Neither one that did not run, nor one whose output was stopped or multiplied by zero."""
    module = {"linen": LinenBranches(), "nnx": NnxBranches}[api]
    loop = LOOPS[api](module, float8(), FROZEN, peaked(1), 1.0)
    loop.step(peaked(2), 1.0, peaked(3), loss=all_branches)
    before = loop.states
    assert len(before) == 12 and all(state.amax_history[0] > 0 for state in before.values())
    loop.step(peaked(4), 0.0, peaked(5), loss=only_used)
    after = loop.states
    for path, state in after.items():
        if not path.startswith("used/"):
            assert_trees_equal(state, before[path])
    np.testing.assert_array_equal(after["used/input"].amax_history, history(2, 4))
    np.testing.assert_array_equal(after["used/output_grad"].amax_history, history(3, 5))


# -- 4. evaluation and non-finite steps


def test_evaluation_changes_nothing(api):
    """And gives the same output again, of inputs larger than any before too."""
    loop = dense(api, FROZEN)
    loop.step(peaked(1), peaked(1))
    before, x = loop.kept, peaked(50)
    outputs = [np.asarray(loop.forward(x)) for _ in range(2)]
    np.testing.assert_array_equal(*outputs)
    assert_trees_equal(loop.kept, before)


def test_a_mutable_collection_returns_what_was_observed_and_no_update():
    loop = dense("linen", FROZEN)
    loop.step(peaked(1), peaked(1))
    variables, before = loop.carry.variables, loop.states
    _, updates = loop.model.apply(variables, peaked(50), mutable=["scaling"])
    kernel = amax(loop.params["kernel"])
    for name, observed in (("input", 50), ("kernel", kernel), ("output_grad", 0)):
        state = updates["scaling"][name]
        assert state.observed == observed
        assert_trees_equal(state.amax_history, before[name].amax_history)
        assert_trees_equal(state.scale, before[name].scale)


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_a_non_finite_step_changes_no_bit(api, poison):
    """Neither its own batch, nor what it leaves to the steps after it."""
    loop, clean = (mlp(api, GROWING) for _ in range(2))
    (x, y), later = batches(2)
    for each in (loop, clean):
        each.step(x, y, loss=mean_squared_error)
    before = loop.kept
    poisoned = y.copy()
    poisoned[1, 2] = poison
    loop.step(3 * x, poisoned, loss=mean_squared_error)
    assert_trees_equal(loop.kept, before)
    assert (loop.skipped_steps, loop.loss_scale) == (1, 2)
    for each in (loop, clean):
        each.step(*later, loss=mean_squared_error)
    assert_trees_equal(loop.kept, clean.kept)


def test_a_non_finite_microbatch_of_multi_steps_is_not_observed(api):
    loop = dense(api, OF_THREE)
    for size, factor in ((2, 1), (8, np.nan), (4, 1), (1, 1)):
        loop.step(peaked(size), factor * peaked(3 * size))
    np.testing.assert_array_equal(loop.states["input"].amax_history, history(4))
    np.testing.assert_array_equal(loop.states["output_grad"].amax_history, history(12))
    assert loop.skipped_steps == 1


# -- 5. Linen and NNX


@pytest.mark.parametrize("microbatches", [0, 2])
def test_linen_and_nnx_hold_equal_state(microbatches):
    loops = [mlp(api, GROWING, microbatches=microbatches) for api in LOOPS]
    params = loops[0].carry.params
    nnx.update(loops[1].model, nnx.state(jax.tree.map(jnp.copy, params)))
    for batch in batches(4):
        for loop in loops:
            loop.step(*batch, loss=mean_squared_error)
    assert_trees_equal(loops[0].states, loops[1].states)
    assert_trees_equal(loops[0].params, loops[1].params)


# -- 6. devices


def assert_global(loop, scaling):
    """Every device holds the states of the whole batches, and the same bits."""
    n, kernel = DEVICES, amax(loop.params["kernel"])
    expected = {
        "input": (n, 2 * n),
        "kernel": (kernel, kernel),
        "output_grad": (10 * n, 10 * n),
    }
    assert sorted(scaling) == sorted(OPERANDS)
    for name, state in scaling.items():
        assert len(state.amax_history.addressable_shards) == n
        for shard in state.amax_history.addressable_shards:
            np.testing.assert_array_equal(shard.data, history(*expected[name]))
        copies = {np.asarray(shard.data).tobytes() for shard in state.scale.addressable_shards}
        assert len(copies) == 1


def test_under_jit_over_a_mesh_amaxes_are_global(api):
    loop = dense(api, FROZEN)
    assert_global(loop, on_a_mesh(loop, unequal_batches()))


@pytest.mark.parametrize("check_vma", [True, False])
def test_in_a_shard_map_amaxes_are_global_and_never_averaged(api, check_vma):
    """Each device differentiates its own part, and `pmean` averages the gradients."""
    loop = dense(api, FROZEN)
    assert_global(loop, on_a_mesh(loop, unequal_batches(), in_a_shard_map(check_vma)))


def sharded_loss(check_vma):
    """The loss as the sum over devices of a `shard_map` inside of it."""

    def around(mesh, loss_fn):
        def sharded(carry, batch):
            graph, state = split(carry)

            def one(state, batch):
                return jax.lax.psum(loss_fn(merge(graph, state), batch), "data")

            return jax.shard_map(
                one, mesh=mesh, in_specs=(P(), P("data")), out_specs=P(), check_vma=check_vma
            )(state, batch)

        return sharded

    def split(carry):
        return nnx.split(carry) if isinstance(carry, nnx.Module) else (None, carry)

    def merge(graph, state):
        return state if graph is None else nnx.merge(graph, state)

    return around


def test_a_shard_map_inside_the_loss_has_global_amaxes(api):
    loop, loss = dense(api, FROZEN), sharded_loss(check_vma=True)
    assert_global(loop, on_a_mesh(loop, unequal_batches(), around_loss=loss))


@pytest.mark.skipif(DEVICES < 2, reason="one device has nothing to sum over")
def test_a_shard_map_inside_the_loss_without_check_vma_is_refused(api):
    loop, loss = dense(api, FROZEN), sharded_loss(check_vma=False)
    with pytest.raises(NotImplementedError, match="check_vma=False inside the loss: its transpose"):
        on_a_mesh(loop, unequal_batches(), around_loss=loss)


# -- 7. files


def saved(tree, path):
    np.savez(path, *map(np.asarray, jax.tree.leaves(tree)))


def restored(tree, path):
    with np.load(path) as file:
        leaves = [jnp.asarray(file[f"arr_{i}"]) for i in range(len(file.files))]
    return jax.tree.unflatten(jax.tree.structure(tree), leaves)


def test_a_file_restores_states_and_the_steps_after_bit_for_bit(api, tmp_path):
    loop, other = (mlp(api, GROWING, seed=seed) for seed in (0, 1))
    first, then = batches(4)[:2], batches(4)[2:]
    for batch in first:
        loop.step(*batch, loss=mean_squared_error)
    if api == "linen":
        saved(loop.carry, tmp_path / "state.npz")
        other.carry = restored(other.carry, tmp_path / "state.npz")
    else:
        saved(nnx.as_pure(nnx.state((loop.model, loop.optimizer))), tmp_path / "state.npz")
        like = nnx.as_pure(nnx.state((other.model, other.optimizer)))
        nnx.update((other.model, other.optimizer), restored(like, tmp_path / "state.npz"))
    assert_trees_equal(other.states, loop.states)
    for batch in then:
        for each in (loop, other):
            each.step(*batch, loss=mean_squared_error)
    assert_trees_equal(other.kept, loop.kept)
    assert (other.loss_scale, loop.loss_scale) == (128, 128)
