"""What Flax' own float8 ops have trained goes on with ours."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.linen import fp8_ops
from flax.training import train_state

import mpjax as mp
import mpjax_kernels as mk

LENGTH = 4
X = jax.random.normal(jax.random.key(0), (8, 16))
Y = jax.random.normal(jax.random.key(1), (8, 4))
FLAX_OP = functools.partial(nn.Fp8DotGeneral, amax_history_length=LENGTH)
FORMATS = {
    "input": jnp.float8_e4m3fn,
    "kernel": jnp.float8_e4m3fn,
    "output_grad": jnp.float8_e5m2,
}


class Net(nn.Module):
    op: type | None = None

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(32, dot_general_cls=self.op)(x))
        return nn.Dense(4, dot_general_cls=self.op, name="head")(x)


def policy(length=LENGTH, **config):
    return mp.QuantizedFloat8DTypePolicy("float8", "float32", amax_history_length=length, **config)


def loss_of(apply_fn, variables, x):
    return jnp.mean((apply_fn(variables, x) - Y) ** 2)


@jax.jit
def flax_step(state, x):
    grads = jax.grad(lambda params: loss_of(state.apply_fn, params, x))(state.params)
    return state.apply_gradients(grads=grads)


@jax.jit
def our_step(state, x):
    _, grads = state.value_and_grad(lambda variables: loss_of(state.apply_fn, variables, x))
    return state.apply_gradients(grads)


@pytest.fixture(scope="module")
def flax_state():
    """Three steps of Flax' ops, whose activations grow and shrink."""
    model = Net(FLAX_OP)
    state = train_state.TrainState.create(
        apply_fn=model.apply, params=jax.jit(model.init)(jax.random.key(2), X), tx=optax.sgd(0.1)
    )
    for factor in (1, 3, 2):
        state = flax_step(state, factor * X)
    return state


@pytest.fixture(scope="module")
def model():
    return mp.wrap(Net(), policy())


def ops(variables, layer):
    return variables["_overwrite_with_gradient"][layer]["Fp8DirectDotGeneralOp_0"]


def test_histories_and_scales_are_those_of_the_next_step_of_flax(flax_state, model):
    variables = mp.from_flax_float8(model, flax_state.params, X)
    assert set(variables) == {"params", "scaling"}
    jax.tree.map(np.testing.assert_array_equal, variables["params"], flax_state.params["params"])
    for layer in ("Dense_0", "head"):
        op = ops(flax_state.params, layer)
        for operand, dtype in FORMATS.items():
            state = variables["scaling"][layer][operand]
            np.testing.assert_array_equal(state.amax_history, op[f"{operand}_amax_history"])
            amax = jnp.max(op[f"{operand}_amax_history"])
            scale = fp8_ops.compute_scale(
                amax, op[f"{operand}_scale"], jnp.finfo(dtype).max.astype(jnp.float32)
            )
            assert state.scale.shape == () and state.scale == scale[0]
    scale = variables["scaling"]["Dense_0"]["input"].scale
    ours = mk.quantize(X, "float8_e4m3fn", scale=scale).values
    flax = fp8_ops.quantize(X, jnp.float8_e4m3fn, scale, jnp.float32)
    np.testing.assert_array_equal(ours.astype(jnp.float32), flax.astype(jnp.float32))


def test_the_forward_pass_is_that_of_flax(flax_state, model):
    variables = mp.from_flax_float8(model, flax_state.params, X)
    one_layer = {name: {"layer": of["Dense_0"]} for name, of in variables.items()}
    theirs = {name: {"layer": of["Dense_0"]} for name, of in flax_state.params.items()}

    class Layer(nn.Module):
        op: type | None = None

        @nn.compact
        def __call__(self, x):
            return nn.Dense(32, dot_general_cls=self.op, use_bias=False, name="layer")(x)

    ours = mp.wrap(Layer(), policy()).apply(one_layer, X)
    flax = Layer(FLAX_OP).apply(theirs, X)
    # The 8-bit values are equal, and float32 holds each of their products exactly. The 16 of an
    # entry may be added in another order (15 roundings), and the two scales multiplied in (2).
    scaling = variables["scaling"]["Dense_0"]
    x = mk.quantize(X, "float8_e4m3fn", scale=scaling["input"].scale)
    kernel = variables["params"]["Dense_0"]["kernel"]
    kernel = mk.quantize(kernel, "float8_e4m3fn", scale=scaling["kernel"].scale)
    sums = jnp.abs(mk.dequantize(x)) @ jnp.abs(mk.dequantize(kernel))
    assert (jnp.abs(ours - flax) <= 2 * 17 * 2.0**-24 * sums).all()
    assert jnp.max(jnp.abs(ours)) > 1


def test_training_goes_on_as_with_flax(flax_state, model):
    variables = mp.from_flax_float8(model, flax_state.params, X)
    state = mp.TrainState.create(
        apply_fn=model.apply, variables=variables, tx=optax.sgd(0.1), policy=model.policy
    )
    for factor in (1, 4, 1, 2):
        flax_state, state = flax_step(flax_state, factor * X), our_step(state, factor * X)
    expected = mp.from_flax_float8(model, flax_state.params, X)["scaling"]
    assert jax.tree.structure(expected) == jax.tree.structure(state.scaling)
    for ours, flax in zip(jax.tree.leaves(state.scaling), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, flax, rtol=1e-6)


def test_an_empty_history_keeps_the_scale_of_flax(model):
    variables = jax.jit(Net(FLAX_OP).init)(jax.random.key(2), X)
    variables = mp.from_flax_float8(model, variables, X)
    state = variables["scaling"]["head"]["kernel"]
    assert state.scale == 1 and not state.amax_history.any()


def test_an_amax_that_is_not_finite_is_left_out(flax_state, model):
    tree = jax.tree.map(lambda x: x, flax_state.params)
    op = tree["_overwrite_with_gradient"]["head"]["Fp8DirectDotGeneralOp_0"]
    op["input_amax_history"] = jnp.asarray([1.0, jnp.inf, 2.0, 0.0])
    op["input_scale"] = jnp.asarray([0.125])
    state = mp.from_flax_float8(model, tree, X)["scaling"]["head"]["input"]
    assert state.scale == 0.125
    np.testing.assert_array_equal(state.amax_history, [1, 0, 2, 0])


def test_margin_and_algorithm_are_the_policys(flax_state):
    model = mp.wrap(Net(), policy(margin=2, amax_algorithm="most_recent"))
    op = ops(flax_state.params, "head")
    state = mp.from_flax_float8(model, flax_state.params, X)["scaling"]["head"]["kernel"]
    newest = op["kernel_amax_history"][0]
    np.testing.assert_allclose(state.scale, newest / 448 * 4, rtol=2**-22)


def test_layers_in_a_stack():
    def stack(op):
        lifted = nn.vmap(
            nn.Dense,
            variable_axes={"params": 0, "scaling": 0, "_overwrite_with_gradient": 0},
            split_rngs={"params": True},
            in_axes=None,
            axis_size=3,
        )
        return lifted(4, dot_general_cls=op, name="stack")

    class Stack(nn.Module):
        op: type | None = None

        @nn.compact
        def __call__(self, x):
            return stack(self.op)(x)

    variables = jax.jit(Stack(FLAX_OP).init)(jax.random.key(2), X)
    op = ops(variables, "stack")
    op["input_amax_history"] = jnp.arange(12.0).reshape(3, 4)
    model = mp.wrap(Stack(), policy())
    state = mp.from_flax_float8(model, variables, X)["scaling"]["stack"]["input"]
    np.testing.assert_array_equal(state.amax_history, op["input_amax_history"])
    np.testing.assert_allclose(state.scale, np.asarray([3, 7, 11]) / 448, rtol=2**-22)


def test_what_does_not_fit(flax_state, model):
    with pytest.raises(ValueError, match=r"shape \(4,\) in Flax' .* \(7,\) .*_history_length=4\)"):
        mp.from_flax_float8(mp.wrap(Net(), policy(7)), flax_state.params, X)
    with pytest.raises(ValueError, match=r"hold \['params'\], but no '_overwrite_with_gradient'"):
        mp.from_flax_float8(model, {"params": flax_state.params["params"]}, X)
    only_head = mp.wrap(Net(), mp.DTypePolicyMap("float32", {"head": policy()}))
    with pytest.raises(ValueError, match=r"\(only in Flax' variables: 'Dense_0'\)"):
        mp.from_flax_float8(only_head, flax_state.params, X)
    tree = dict(flax_state.params)
    tree["_overwrite_with_gradient"] = {"head": tree["_overwrite_with_gradient"]["head"]}
    with pytest.raises(ValueError, match=r"\(only under the model's policy: 'Dense_0'\)"):
        mp.from_flax_float8(model, tree, X)
    head = tree["_overwrite_with_gradient"]["head"]
    twice = {"Fp8DirectDotGeneralOp_1": head["Fp8DirectDotGeneralOp_0"], **head}
    with pytest.raises(ValueError, match="layer 'head' has more than one float8 op"):
        mp.from_flax_float8(model, {**tree, "_overwrite_with_gradient": {"head": twice}}, X)
