"""Data parallel training on 8 devices: every device holds the scaling state of a single one.

An amax is the largest of all devices, whether XLA splits the batch (`jit` over a mesh) or the
program does (`shard_map`, with and without JAX's check of what varies).
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import mpjax as mp

STEPS, DEVICES, BATCH, WIDTH = 20, 8, 32, 16
POLICY = mp.QuantizedFloat8DTypePolicy("float8", "float32", amax_history_length=STEPS)
LOSS_SCALE = mp.StaticLossScale(1024.0)


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(4, name="last")(nn.tanh(nn.Dense(WIDTH, name="first")(x)))


class NNXNet(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(8, WIDTH, rngs=rngs)
        self.last = nnx.Linear(WIDTH, 4, rngs=rngs)

    def __call__(self, x):
        return self.last(nnx.tanh(self.first(x)))


MODEL = mp.wrap(Net(), POLICY)
# The batch differs from step to step and from device to device.
XS = jax.random.normal(jax.random.key(1), (STEPS, BATCH, 8)) * jnp.linspace(1, 3, BATCH)[:, None]
YS = jax.random.normal(jax.random.key(2), (STEPS, BATCH, 4))


def mesh() -> Any:
    return jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Auto,))


def initial() -> mp.TrainState:
    variables = jax.jit(MODEL.init)(jax.random.key(0), XS[0])
    tx = mp.loss_scaled(optax.sgd(0.1, momentum=0.9), LOSS_SCALE)
    return mp.TrainState.create(apply_fn=MODEL.apply, variables=variables, tx=tx)


def step(state: mp.TrainState, x: jax.Array, y: jax.Array, axis: str | None = None) -> Any:
    def loss_fn(variables):
        return jnp.mean(jnp.square(state.apply_fn(variables, x) - y)) / share

    # Each device's part of the loss, so that the sum of the gradients is that of the whole.
    share = 1 if axis is None else DEVICES
    _, grads = state.value_and_grad(loss_fn)
    if axis == "data":
        grads = grads.replace(params=jax.lax.psum(grads.params, axis))
    state = state.apply_gradients(grads)
    return state, state.scaling


def run(step: Any, place: Any = lambda x: x) -> Any:
    """The state after all steps, and the scaling states after each."""
    state, states = initial(), []
    for x, y in zip(XS, YS, strict=True):
        state, scaling = step(state, place(x), place(y))
        states.append(scaling)
    return state, states


@pytest.fixture(scope="module")
def single() -> Any:
    return run(jax.jit(step))


def parallel(how: str) -> Any:
    devices = mesh()
    if how == "jit":
        sharding = NamedSharding(devices, P("data"))
        return run(jax.jit(step), lambda x: jax.device_put(x, sharding))
    # With the check, JAX sums the gradients of what the devices share by itself.
    check_vma = how == "shard_map"
    axis = "implicit" if check_vma else "data"
    mapped = jax.shard_map(
        lambda state, x, y: step(state, x, y, axis),
        mesh=devices,
        in_specs=(P(), P("data"), P("data")),
        out_specs=P(),
        check_vma=check_vma,
    )
    return run(jax.jit(mapped))


def named(states: Any) -> dict[str, Any]:
    leaves = jax.tree.leaves_with_path(states)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


UNCHECKED = pytest.param("shard_map without check_vma", marks=pytest.mark.slow)


@pytest.mark.parametrize("how", ["jit", "shard_map", UNCHECKED])
def test_every_device_holds_the_state_of_a_single_one(single, how):
    state, states = parallel(how)
    expected_state, expected = single
    assert int(state.step) == int(expected_state.step) == STEPS
    for leaf in jax.tree.leaves(state.scaling):
        copies = [np.asarray(shard.data) for shard in leaf.addressable_shards]
        assert len(copies) == DEVICES
        for copy in copies:
            np.testing.assert_array_equal(copy.view(np.uint32), copies[0].view(np.uint32))
    for found, wanted in zip(states, expected, strict=True):
        for (path, value), other in zip(named(found).items(), named(wanted).values(), strict=True):
            np.testing.assert_allclose(value, other, rtol=1e-5, err_msg=path)
        np.testing.assert_array_equal(
            found["first"]["input"].amax_history, wanted["first"]["input"].amax_history
        )
    for name in ("first", "last"):
        first, wanted = states[0][name]["kernel"], expected[0][name]["kernel"]
        np.testing.assert_array_equal(first.amax_history, wanted.amax_history)
        kernel = initial().params[name]["kernel"]
        assert first.amax_history[0] == jnp.max(jnp.abs(kernel))
    assert states[0]["first"]["input"].amax_history[0] == jnp.max(jnp.abs(XS[0]))


def test_an_nnx_model_over_a_mesh_holds_it_too():
    def train(place: Any) -> Any:
        model = mp.wrap(NNXNet(nnx.Rngs(0)), POLICY)
        optimizer = mp.nnx.Optimizer(model, optax.sgd(0.1, momentum=0.9), wrt=nnx.Param)

        @nnx.jit
        def step(model, optimizer, x, y):
            def loss_fn(model):
                return jnp.mean(jnp.square(model(x) - y))

            _, grads = mp.nnx.value_and_grad(loss_fn)(model)
            optimizer.update(model, grads)

        for x, y in zip(XS, YS, strict=True):
            step(model, optimizer, place(x), place(y))
        return model

    sharding = NamedSharding(mesh(), P("data"))
    single, parallel = train(lambda x: x), train(lambda x: jax.device_put(x, sharding))
    for layer in ("first", "last"):
        for name, variable in getattr(parallel, layer).scaling.items():
            expected = getattr(single, layer).scaling[name][...]
            found = named(variable[...])
            for path, value in named(expected).items():
                np.testing.assert_allclose(found[path], value, rtol=1e-5, err_msg=path)
    np.testing.assert_array_equal(
        parallel.first.scaling["input"][...].amax_history,
        single.first.scaling["input"][...].amax_history,
    )


def test_a_shard_map_without_check_inside_the_loss_is_refused():
    state = initial()

    def loss_fn(variables):
        mapped = jax.shard_map(
            lambda variables, x, y: jnp.mean(jnp.square(MODEL.apply(variables, x) - y))[None],
            mesh=mesh(),
            in_specs=(P(), P("data"), P("data")),
            out_specs=P("data"),
            check_vma=False,
        )
        return jnp.mean(mapped(variables, XS[0], YS[0]))

    with pytest.raises(NotImplementedError, match="check_vma=False inside the loss.*largest of"):
        jax.jit(lambda state: state.value_and_grad(loss_fn))(state)
