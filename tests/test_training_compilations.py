"""A training step compiles once: over steps, skipped ones too, and for whoever starts anew."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import mpjax as mp

OPTIMIZERS = {
    "adam": optax.adam(1e-3),
    "multi_steps": optax.MultiSteps(optax.adam(1e-3), 2),
    "loss_scaled": mp.loss_scaled(optax.adam(1e-3), mp.DynamicLossScale(period=2)),
}
BATCHES = [np.full((2, 4), size, np.float32) for size in (1, 2, np.nan, 3)]
POLICY = "float8_from_mixed_float16"


@pytest.mark.parametrize("tx", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_linen(tx):
    model, traces = mp.wrap(nn.Dense(4), POLICY), []

    @jax.jit
    def step(state, x):
        traces.append(x.shape)
        _, grads = state.value_and_grad(lambda variables: jnp.mean(state.apply_fn(variables, x)))
        return state.apply_gradients(grads)

    for seed in (0, 1):
        variables = model.init(jax.random.key(seed), BATCHES[0])
        state = mp.TrainState.create(apply_fn=model.apply, variables=variables, tx=tx)
        for batch in BATCHES:
            state = step(state, batch)
        assert state.skipped_steps == 1
    assert len(traces) == step._cache_size() == 1


@pytest.mark.parametrize("tx", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_nnx(tx):
    traces = []

    @nnx.jit
    def step(model, optimizer, x):
        traces.append(x.shape)
        _, grads = mp.nnx.value_and_grad(lambda model: jnp.mean(model(x)))(model)
        optimizer.update(model, grads)

    for seed in (0, 1):
        model = mp.wrap(nnx.Linear(4, 4, rngs=nnx.Rngs(seed)), POLICY)
        optimizer = mp.nnx.Optimizer(model, tx, wrt=nnx.Param)
        for batch in BATCHES:
            step(model, optimizer, batch)
        assert optimizer.skipped_steps[...] == 1
    assert len(traces) == 1
