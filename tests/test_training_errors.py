"""What training says to input that cannot be right, before any work."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

import mpjax as mp

X = jnp.ones((4, 3))
MODEL = mp.wrap(nn.Dense(2), "mixed_float16")
VARIABLES = nn.Dense(2).init(jax.random.key(0), X)


def created(**options) -> mp.TrainState:
    given = {"apply_fn": MODEL.apply, "variables": VARIABLES, "tx": optax.sgd(0.1)}
    return mp.TrainState.create(**given | options)


def test_the_loss_scale_is_that_of_the_wrapped_model_unless_another_is_given():
    assert created().loss_scale.scale == created(policy=MODEL.policy).loss_scale.scale == 2.0**15
    assert created(policy="mixed_float16").loss_scale.scale == 2.0**15
    assert created(policy="mixed_bfloat16").loss_scale.scale == 1
    assert created(tx=mp.loss_scaled(optax.sgd(0.1), None)).loss_scale.scale == 1
    assert created(tx=mp.loss_scaled(optax.sgd(0.1), 8)).loss_scale.scale == 8
    assert created(apply_fn=nn.Dense(2).apply).loss_scale.scale == 1


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"policy": "mixed_flaot16"}, ValueError, "mixed_flaot16"),
        ({"policy": 7}, ValueError, "Cannot interpret `dtype` argument.*dtype=7"),
        ({"tx": "adam"}, TypeError, "`tx` must be an optax.GradientTransformation.*'adam'"),
        ({"variables": VARIABLES["params"]}, TypeError, r"with 'params'.*got \['kernel', 'bias'\]"),
    ],
)
def test_what_a_train_state_cannot_be_made_of(options, error, message):
    with pytest.raises(error, match=message):
        created(**options)


def test_a_loss_scale_inside_a_chain_would_divide_twice():
    inside = optax.chain(optax.clip(1.0), mp.loss_scaled(optax.sgd(0.1)))
    with pytest.raises(ValueError, match="a part of `tx` is an mp.loss_scaled optimizer"):
        created(tx=inside)
    model = mp.wrap(nnx.Linear(3, 2, rngs=nnx.Rngs(0)), "mixed_float16")
    with pytest.raises(ValueError, match="a part of `tx` is an mp.loss_scaled optimizer"):
        mp.nnx.Optimizer(model, inside, wrt=nnx.Param)
    assert not hasattr(model, "loss_scale")


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda loss: (loss, {}), "returned a tuple; for .loss, aux., give has_aux=True"),
        (lambda loss: None, "returned a NoneType"),
        (lambda loss: {"loss": loss}, "returned a dict"),
        (lambda loss: loss[None], r"returned float32\[1\]"),
        (lambda loss: 3, r"floating scalar, but it returned int32\[\]"),
    ],
)
def test_what_a_loss_cannot_return(returned, message):
    state = created()

    def loss_fn(variables):
        return returned(jnp.sum(state.apply_fn(variables, X).astype(jnp.float32)))

    with pytest.raises(TypeError, match=message):
        state.value_and_grad(loss_fn)


def test_an_nnx_model_that_is_quantized_is_not_trained():
    model = mp.wrap(nnx.Linear(3, 2, rngs=nnx.Rngs(0)), "int8_from_float32")
    mp.quantize(model)

    def loss_fn(model, x):
        return jnp.sum(model(x))

    message = "'kernel' is quantized .*: train the float weights, and call mp.quantize afterwards"
    with pytest.raises(ValueError, match=message):
        mp.nnx.value_and_grad(loss_fn)(model, X)
    with pytest.raises(ValueError, match=message):
        mp.nnx.accumulate_gradients(loss_fn, 1)(model, X)
    bias_only = nnx.PathContains("bias")
    loss, grads = mp.nnx.value_and_grad(loss_fn, wrt=bias_only)(model, X)
    assert list(grads.params) == ["bias"]


def test_gradients_of_something_else():
    state = created()
    grads = jax.tree.map(jnp.ones_like, state.params)
    with pytest.raises(TypeError, match="`grads` must be the mp.Gradients.*Got dict"):
        state.apply_gradients(grads)
    message = r"\[\"\['other'\]\"\] are no parameters, \[\"\['bias'\]\", \"\['kernel'\]\"\] have no"
    with pytest.raises(ValueError, match=message):
        state.apply_gradients(mp.Gradients({"other": X}, {}))
    with pytest.raises(TypeError, match=r"`collections` holds \['params'\]"):
        state.apply_gradients(mp.Gradients(grads, {}), collections={"params": grads})


@pytest.mark.parametrize(
    ("batch", "microbatches", "error", "message"),
    [
        (X, 3, ValueError, r"`batch` has shape \(4, 3\).*multiple of microbatches=3"),
        ({"x": X[:0]}, 2, ValueError, r"`batch\['x'\]` has shape \(0, 3\)"),
        ({}, 2, ValueError, r"`batch` holds no array to take microbatches of: \{\}"),
        (X, 0, ValueError, "`microbatches` must be at least 1. Received: 0"),
        (X, 2.0, TypeError, "`microbatches` must be an integer. Received: 2.0"),
    ],
)
def test_batches_that_have_no_such_parts(batch, microbatches, error, message):
    with pytest.raises(error, match=message):
        created().accumulate_gradients(lambda variables, part: 0.0, batch, microbatches)


def test_states_and_amaxes_the_wrong_way_round():
    model = mp.wrap(nn.Dense(2), "float8_from_float32")
    scaling = jax.jit(model.init)(jax.random.key(0), X)["scaling"]
    with pytest.raises(TypeError, match="`observed` holds scaling states.*the states come first"):
        mp.observe_scaling(jax.tree.map(jnp.ones_like, scaling), scaling)


def test_quantized_weights_cannot_be_trained():
    model = mp.wrap(nn.Dense(2), "int8_from_float32")
    quantized = mp.quantize(model, VARIABLES, X)
    with pytest.raises(ValueError, match=r"'params\['kernel'\]' is quantized.*train the float"):
        created(apply_fn=model.apply, variables=quantized)


def test_a_file_is_no_folder_of_checkpoints(tmp_path):
    path = tmp_path / "file"
    path.write_text("")
    with pytest.raises(NotADirectoryError, match="is a file: give a folder for checkpoints"):
        mp.save_checkpoint(path, created())
