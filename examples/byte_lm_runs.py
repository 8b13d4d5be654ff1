"""One model under one policy: train, score, quantize. The same five methods in Linen and in NNX.

This is the only file of the demo that calls mpjax, and it calls two functions: `mp.wrap`, which
puts a model under a policy, and `mp.quantize`, which makes its weights int8. The rest is optax and
`jit` as in any Flax program; the loss is computed in float32, outside the model, because logits
come out in the policy's compute dtype.
"""

from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from byte_lm_models import ByteLM, ByteLMNNX, Shape
from flax import nnx

import mpjax as mp

INT8 = "int8_from_mixed_bfloat16"


class Run(Protocol):
    """A model under a policy. Losses are in nats; tokens are int32 [B, T]."""

    def train_step(self, inputs: np.ndarray, targets: np.ndarray) -> float: ...
    def total_loss(self, inputs: np.ndarray, targets: np.ndarray, weights: np.ndarray) -> float: ...
    def logits(self, tokens: np.ndarray) -> np.ndarray: ...
    def weights(self) -> Any: ...
    def quantized(self) -> "Run": ...


def make_optimizer(learning_rate: float, steps: int) -> optax.GradientTransformation:
    """AdamW, gradients clipped at norm 1; a tenth of the steps to warm up, then a cosine."""
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, learning_rate, steps // 10, steps, end_value=0.02 * learning_rate
    )
    return optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.95, weight_decay=0.01)
    )


def losses(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Cross-entropy of each byte in nats, float32 [B, T]."""
    return optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), targets)


class LinenRun:
    """The Linen model under `policy`, with weights drawn from `seed`."""

    def __init__(self, policy: str, shape: Shape, seed: int, tx: optax.GradientTransformation):
        self.shape = shape
        self._model = mp.wrap(ByteLM(shape), policy)
        tokens = jnp.zeros((1, shape.context), jnp.int32)
        self._variables = jax.jit(self._model.init)(jax.random.key(seed), tokens)
        self._moments = tx.init(self._variables)
        self._train = jax.jit(partial(linen_train, self._model, tx), donate_argnums=(0, 1))
        self._compile_forward()

    def _compile_forward(self) -> None:
        self._apply = jax.jit(self._model.apply)
        self._total = jax.jit(partial(linen_total, self._model))

    def train_step(self, inputs: np.ndarray, targets: np.ndarray) -> float:
        self._variables, self._moments, loss = self._train(
            self._variables, self._moments, inputs, targets
        )
        return float(loss)

    def total_loss(self, inputs: np.ndarray, targets: np.ndarray, weights: np.ndarray) -> float:
        return float(self._total(self._variables, inputs, targets, weights))

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        return np.asarray(self._apply(self._variables, tokens), np.float32)

    def weights(self) -> Any:
        return self._variables

    def quantized(self) -> "LinenRun":
        """The same weights as int8, for inference; this run keeps its own."""
        run = object.__new__(LinenRun)
        run.shape = self.shape
        run._model = mp.wrap(ByteLM(self.shape), INT8)
        tokens = jax.ShapeDtypeStruct((1, self.shape.context), jnp.int32)
        run._variables = mp.quantize(run._model, self._variables, tokens)
        run._compile_forward()
        return run


def linen_train(model, tx, variables, moments, inputs, targets):
    loss, gradients = jax.value_and_grad(
        lambda variables: losses(model.apply(variables, inputs), targets).mean()
    )(variables)
    updates, moments = tx.update(gradients, moments, variables)
    return optax.apply_updates(variables, updates), moments, loss


def linen_total(model, variables, inputs, targets, weights):
    return jnp.sum(losses(model.apply(variables, inputs), targets) * weights)


class NNXRun:
    """The NNX model under `policy`, with weights drawn from `seed`."""

    def __init__(self, policy: str, shape: Shape, seed: int, tx: optax.GradientTransformation):
        self._model = mp.wrap(ByteLMNNX(shape, rngs=nnx.Rngs(seed)), policy)
        self._optimizer = nnx.Optimizer(self._model, tx, wrt=nnx.Param)

    def train_step(self, inputs: np.ndarray, targets: np.ndarray) -> float:
        return float(nnx_train(self._model, self._optimizer, inputs, targets))

    def total_loss(self, inputs: np.ndarray, targets: np.ndarray, weights: np.ndarray) -> float:
        return float(nnx_total(self._model, inputs, targets, weights))

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        return np.asarray(nnx_call(self._model, tokens), np.float32)

    def weights(self) -> Any:
        return nnx.state(self._model)

    def quantized(self) -> "NNXRun":
        """The same weights as int8, for inference; quantizing is in place, so it takes a clone."""
        run = object.__new__(NNXRun)
        run._model = mp.wrap(nnx.clone(self._model), INT8)
        mp.quantize(run._model)
        return run


@nnx.jit
def nnx_train(model, optimizer, inputs, targets):
    loss, gradients = nnx.value_and_grad(lambda model: losses(model(inputs), targets).mean())(model)
    optimizer.update(model, gradients)
    return loss


@nnx.jit
def nnx_total(model, inputs, targets, weights):
    return jnp.sum(losses(model(inputs), targets) * weights)


@nnx.jit
def nnx_call(model, tokens):
    return model(tokens)
