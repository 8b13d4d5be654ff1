"""Three models that `explain` was not written against, with their operations counted by hand."""

import dataclasses
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

import mpjax as mp

# The examples are scripts that import each other by name.
sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
_bert = importlib.import_module("bert")
sys.path.pop(0)

BATCH, LENGTH = 8, 64
BERT = _bert.Shape(vocabulary=64, positions=LENGTH, width=128, inner=256, depth=2, heads=4)
IMAGE, CHANNELS, CLASSES = 16, 32, 128
TOKENS, WIDTH, EXPERTS, INNER = 512, 256, 4, 128


@dataclasses.dataclass(frozen=True)
class Case:
    """A quantized model as a function, its abstract arguments, and its operations by hand.

    Attributes:
      quantized: operations of the layers that the policy quantizes.
      others: of what it does not reach.
    """

    fn: Callable[..., Any]
    args: tuple[Any, ...]
    quantized: int
    others: int


def minilm(policy):
    """The sentence encoder of the examples, of two layers, with random weights."""
    model = mp.wrap(_bert.SentenceEncoder(BERT), policy)
    variables = _bert.from_tensors(_bert.random_tensors(BERT, 0), BERT)
    tokens = jax.ShapeDtypeStruct((BATCH, LENGTH), jnp.int32)
    mask = jax.ShapeDtypeStruct((BATCH, LENGTH), jnp.bool_)
    stored = jax.eval_shape(lambda v: mp.quantize(model, v, tokens, mask), variables)
    weights = BERT.depth * (4 * BERT.width**2 + 2 * BERT.width * BERT.inner)
    scores = BERT.depth * 2 * BATCH * LENGTH**2 * BERT.width  # and as much for the values
    return Case(model.apply, (stored, tokens, mask), 2 * BATCH * LENGTH * weights, 2 * scores)


class CNN(nn.Module):
    """Two convolutions, the second without padding, and a dense layer."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(CHANNELS, (3, 3), padding="VALID", name="first")(x))
        x = nn.relu(nn.Conv(CHANNELS, (3, 3), strides=2, padding="VALID", name="second")(x))
        return nn.Dense(CLASSES, name="head")(x.reshape(x.shape[0], -1))


def cnn(policy):
    """A small convolutional network."""
    model = mp.wrap(CNN(), policy)
    x = jax.ShapeDtypeStruct((BATCH, IMAGE, IMAGE, CHANNELS), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    stored = jax.eval_shape(lambda v: mp.quantize(model, v, x), variables)
    first, second = IMAGE - 2, (IMAGE - 2 - 3) // 2 + 1
    window = 9 * CHANNELS**2
    terms = (first**2 + second**2) * window + second**2 * CHANNELS * CLASSES
    return Case(model.apply, (stored, x), 2 * BATCH * terms, 0)


class Experts(nnx.Module):
    """A router, experts by `jax.lax.ragged_dot` in the user's own words, and a head."""

    def __init__(self, rngs):
        self.router = nnx.Linear(WIDTH, EXPERTS * 32, rngs=rngs)
        make = nnx.initializers.lecun_normal()
        self.experts = nnx.Param(make(rngs.params(), (EXPERTS, WIDTH, INNER)))
        self.head = nnx.Linear(INNER, CLASSES, rngs=rngs)

    def __call__(self, x):
        scores = self.router(x).reshape(x.shape[0], EXPERTS, 32).sum(-1)
        chosen = jnp.argmax(scores, axis=-1)
        order = jnp.argsort(chosen)
        sizes = jnp.bincount(chosen, length=EXPERTS)
        x = jax.lax.ragged_dot(x[order].astype(jnp.bfloat16), self.experts[...], sizes)
        return self.head(x[jnp.argsort(order)])


def experts(policy):
    """A mixture of experts in NNX; its ragged product is in no layer that a policy knows."""

    def make():
        model = mp.wrap(Experts(nnx.Rngs(0)), policy)
        return mp.quantize(model, return_report=True)[0]

    x = jax.ShapeDtypeStruct((TOKENS, WIDTH), jnp.float32)
    dense = WIDTH * EXPERTS * 32 + INNER * CLASSES
    ragged = 2 * TOKENS * WIDTH * INNER
    return Case(nnx.eval_shape(make), (x,), 2 * TOKENS * dense, ragged)


MODELS = {"minilm": minilm, "cnn": cnn, "experts": experts}
