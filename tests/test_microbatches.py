"""A language model on 16 microbatches of 1 has the histories of one batch of 16.

Rounding to 8 bits can turn a difference in the last bit of a float32 sum into one of a whole step,
so this compares at float32 activations, where such ties are rare, and from known scales: in a first
step every microbatch takes scales from its own amaxes.
"""

import importlib
from typing import Any

import jax
import numpy as np
import optax
import pytest

import mpjax as mp

models = importlib.import_module("examples.byte_lm_models")
MODEL = mp.wrap(
    models.ByteLM(models.Shape(context=8, width=32, depth=1, heads=2)), "float8_from_float32"
)
BATCHES = jax.random.randint(jax.random.key(0), (4, 16, 9), 0, 256)


def loss_fn(variables: Any, tokens: jax.Array) -> jax.Array:
    logits = MODEL.apply(variables, tokens[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


@jax.jit
def whole(state: mp.TrainState, batch: jax.Array) -> Any:
    loss, grads = state.value_and_grad(lambda variables: loss_fn(variables, batch))
    return state.apply_gradients(grads), loss


@jax.jit
def in_parts(state: mp.TrainState, batch: jax.Array) -> Any:
    loss, grads = state.accumulate_gradients(loss_fn, batch, 16)
    return state.apply_gradients(grads), loss


@pytest.fixture(scope="module")
def initial() -> mp.TrainState:
    variables = jax.jit(MODEL.init)(jax.random.key(1), BATCHES[0, :1, :-1])
    return mp.TrainState.create(
        apply_fn=MODEL.apply, variables=variables, tx=optax.adam(1e-3), policy=MODEL.policy
    )


def histories(state: mp.TrainState) -> Any:
    return jax.tree.map(
        lambda scaling: np.asarray(scaling.amax_history),
        state.scaling,
        is_leaf=lambda x: isinstance(x, mp.ScalingState),
    )


def assert_first_layer_equal(found: mp.TrainState, expected: mp.TrainState) -> None:
    for operand in ("input", "kernel"):
        layer = histories(found)["block_0"]["attention"]["query"][operand]
        wanted = histories(expected)["block_0"]["attention"]["query"][operand]
        np.testing.assert_array_equal(layer, wanted)
        assert np.count_nonzero(wanted) > 1


def test_histories_are_those_of_the_whole_batch(initial):
    state = initial  # in whose first step a projection that begins at zero lets no gradient through
    for batch in BATCHES[:-1]:
        state, _ = whole(state, batch)
    (found, found_loss), (expected, loss) = (step(state, BATCHES[-1]) for step in (in_parts, whole))
    np.testing.assert_allclose(found_loss, loss, rtol=1e-6)
    assert_first_layer_equal(found, expected)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5),
        histories(found),
        histories(expected),
    )
    assert int(found.step) == int(expected.step) == len(BATCHES)
