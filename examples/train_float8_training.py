"""A model in training under a policy, once in Linen and once in NNX.

The training steps are all that an mpjax program has of mixed precision, and the same for every
policy: loss scale and scaling states are the business of `mp.TrainState` and `mp.nnx.Optimizer`.
"""

from functools import partial
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from byte_lm_models import ByteLM, ByteLMNNX
from byte_lm_runs import losses, make_optimizer
from byte_lm_settings import Settings
from flax import nnx

import mpjax as mp


class Training(Protocol):
    """A model, its optimizer and their states. Losses are in nats; tokens are int32 [B, T]."""

    def train_step(self, inputs: np.ndarray, targets: np.ndarray) -> float: ...
    def total_loss(self, inputs: np.ndarray, targets: np.ndarray, weights: np.ndarray) -> float: ...
    def save(self, directory: Path, step: int) -> None: ...
    def restore(self, directory: Path) -> None: ...
    @property
    def params(self) -> Any: ...
    @property
    def skipped_steps(self) -> int: ...
    @property
    def loss_scale(self) -> float: ...


class LinenTraining:
    """The Linen model under `policy`, before its first step."""

    def __init__(self, policy: str, settings: Settings):
        model = mp.wrap(ByteLM(settings.shape), policy)
        tokens = jnp.zeros((1, settings.shape.context), jnp.int32)
        self._state = mp.TrainState.create(
            apply_fn=model.apply,
            variables=jax.jit(model.init)(jax.random.key(settings.seed), tokens),
            tx=make_optimizer(settings.learning_rate, settings.steps),
            policy=model.policy,
        )

    def train_step(self, inputs: np.ndarray, targets: np.ndarray) -> float:
        self._state, loss = linen_train(self._state, inputs, targets)
        return float(loss)

    def total_loss(self, inputs: np.ndarray, targets: np.ndarray, weights: np.ndarray) -> float:
        return float(linen_total(self._state, inputs, targets, weights))

    def save(self, directory: Path, step: int) -> None:
        mp.save_checkpoint(directory, self._state, step=step, keep=2)

    def restore(self, directory: Path) -> None:
        self._state = mp.restore_checkpoint(directory, self._state)

    @property
    def params(self) -> Any:
        return self._state.params

    @property
    def skipped_steps(self) -> int:
        return int(self._state.skipped_steps)

    @property
    def loss_scale(self) -> float:
        return float(self._state.loss_scale.scale)


@partial(jax.jit, donate_argnums=0)
def linen_train(state, inputs, targets):
    def loss_fn(variables):
        return losses(state.apply_fn(variables, inputs), targets).mean()

    loss, grads = state.value_and_grad(loss_fn)
    return state.apply_gradients(grads), loss


@jax.jit
def linen_total(state, inputs, targets, weights):
    return jnp.sum(losses(state.apply_fn(state.variables, inputs), targets) * weights)


class NNXTraining:
    """The NNX model under `policy`, before its first step."""

    def __init__(self, policy: str, settings: Settings):
        self._model = mp.wrap(ByteLMNNX(settings.shape, rngs=nnx.Rngs(settings.seed)), policy)
        tx = make_optimizer(settings.learning_rate, settings.steps)
        self._optimizer = mp.nnx.Optimizer(self._model, tx, wrt=nnx.Param)

    def train_step(self, inputs: np.ndarray, targets: np.ndarray) -> float:
        return float(nnx_train(self._model, self._optimizer, inputs, targets))

    def total_loss(self, inputs: np.ndarray, targets: np.ndarray, weights: np.ndarray) -> float:
        return float(nnx_total(self._model, inputs, targets, weights))

    def save(self, directory: Path, step: int) -> None:
        mp.save_checkpoint(directory, (self._model, self._optimizer), step=step, keep=2)

    def restore(self, directory: Path) -> None:
        mp.restore_checkpoint(directory, (self._model, self._optimizer))

    @property
    def params(self) -> Any:
        return nnx.to_pure_dict(nnx.state(self._model, nnx.Param))

    @property
    def skipped_steps(self) -> int:
        return int(self._optimizer.skipped_steps[...])

    @property
    def loss_scale(self) -> float:
        held = getattr(self._model, "loss_scale", None)  # only where the policy has one
        return 1.0 if held is None else float(held.get_value().scale)


@nnx.jit
def nnx_train(model, optimizer, inputs, targets):
    def loss_fn(model):
        return losses(model(inputs), targets).mean()

    loss, grads = mp.nnx.value_and_grad(loss_fn)(model)
    optimizer.update(model, grads)
    return loss


@nnx.jit
def nnx_total(model, inputs, targets, weights):
    return jnp.sum(losses(model(inputs), targets) * weights)
