"""mixed_float16 through planted overflows: the scales as specified, the weights as if left out.

Batches that overflow float16 are planted in a run. The weights it ends with are, bit for bit, those
of a run that never saw these batches and was given the same sequence of scales.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import mpjax as mp

POLICY = mp.DTypePolicy(
    "mixed_float16", loss_scale=mp.DynamicLossScale(initial_scale=2.0**15, period=3)
)
TX = optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.adamw(optax.linear_schedule(1e-2, 1e-3, 8)),  # which counts the steps that it takes
)
PLANTED = (1, 5, 6, 11)
# After each step: doubled by the third finite one in a row, halved by an overflow.
SCALES = [2.0**n for n in (15, 14, 14, 14, 15, 14, 13, 13, 13, 14, 14, 13)]
STEPS = len(SCALES)


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(2, name="last")(nn.relu(nn.Dense(8, name="first")(x)))


class NNXNet(nnx.Module):
    def __init__(self, rngs):
        self.first, self.last = nnx.Linear(4, 8, rngs=rngs), nnx.Linear(8, 2, rngs=rngs)

    def __call__(self, x):
        return self.last(nnx.relu(self.first(x)))


def batches() -> np.ndarray:
    x = np.random.default_rng(0).normal(size=(STEPS, 6, 4)).astype(np.float32)
    x[list(PLANTED), 2, 1] = 1e5  # Inf in float16
    return x


def loss_of(output: jax.Array) -> jax.Array:
    return jnp.mean(jnp.square(output.astype(jnp.float32) - 1))


class Linen:
    def __init__(self):
        model = mp.wrap(Net(), POLICY)
        variables = jax.jit(model.init)(jax.random.key(0), batches()[0])
        self.state = mp.TrainState.create(
            apply_fn=model.apply, variables=variables, tx=TX, policy=model.policy
        )
        self._step = jax.jit(self.pure_step)

    @staticmethod
    def pure_step(state: mp.TrainState, x: jax.Array) -> mp.TrainState:
        _, grads = state.value_and_grad(lambda variables: loss_of(state.apply_fn(variables, x)))
        return state.apply_gradients(grads)

    def step(self, x: np.ndarray) -> None:
        self.state = self._step(self.state, x)

    def with_scale(self, scale: mp.LossScaleState) -> None:
        self.state = self.state.replace(loss_scale=scale)

    @property
    def scale(self) -> mp.LossScaleState:
        return self.state.loss_scale

    @property
    def counts(self) -> tuple[int, int]:
        return int(self.state.step), int(self.state.skipped_steps)

    @property
    def kept(self) -> Any:
        return self.state.params, self.state.opt_state


class NNX:
    def __init__(self):
        self.model = mp.wrap(NNXNet(nnx.Rngs(0)), POLICY)
        self.optimizer = mp.nnx.Optimizer(self.model, TX, wrt=nnx.Param)

        @nnx.jit
        def step(model, optimizer, x):
            _, grads = mp.nnx.value_and_grad(lambda model: loss_of(model(x)))(model)
            optimizer.update(model, grads)

        self._step = step

    def step(self, x: np.ndarray) -> None:
        self._step(self.model, self.optimizer, x)

    def with_scale(self, scale: mp.LossScaleState) -> None:
        self.model.loss_scale.set_value(scale)

    @property
    def scale(self) -> mp.LossScaleState:
        return self.model.loss_scale.get_value()

    @property
    def counts(self) -> tuple[int, int]:
        return int(self.optimizer.step[...]), int(self.optimizer.skipped_steps[...])

    @property
    def kept(self) -> Any:
        return nnx.state(self.model, nnx.Param), nnx.state(self.optimizer.opt_state)


@pytest.mark.parametrize("loop", [Linen, NNX])
def test_planted_overflows_leave_no_trace_but_in_the_scale(loop):
    planted, scales = loop(), []
    for x in batches():
        scales.append(planted.scale)
        planted.step(x)
    assert [float(s.scale) for s in [*scales[1:], planted.scale]] == SCALES
    assert planted.counts == (STEPS - len(PLANTED), len(PLANTED))

    without = loop()
    for i, x in enumerate(batches()):
        if i not in PLANTED:
            without.with_scale(scales[i])
            without.step(x)
    assert without.counts == (STEPS - len(PLANTED), 0)
    found, expected = jax.tree.leaves(planted.kept), jax.tree.leaves(without.kept)
    assert len(found) == len(expected) > 8
    for a, b in zip(found, expected, strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.mark.slow
def test_a_skipped_step_leaves_other_collections_and_the_sign_of_a_zero():
    model = mp.wrap(nn.Dense(2), "mixed_bfloat16")
    params = {"kernel": jnp.full((3, 2), -0.0), "bias": jnp.zeros(2)}
    variables = {"params": params, "batch_stats": {"mean": jnp.ones(2)}}
    state = mp.TrainState.create(apply_fn=model.apply, variables=variables, tx=optax.sgd(0.1))
    changed = {"batch_stats": {"mean": jnp.full(2, 5.0)}}
    for size, mean in ((np.nan, 1), (1.0, 5)):
        x = jnp.full((4, 3), size)
        _, grads = state.value_and_grad(lambda v, x=x: jnp.mean(model.apply(v, x)))
        state = state.apply_gradients(grads, collections=changed)
        assert (state.variables["batch_stats"]["mean"] == mean).all()
        assert np.signbit(state.params["kernel"]).all()  # -0 stays -0, and then moves down
    assert (state.skipped_steps, state.step) == (1, 1)
