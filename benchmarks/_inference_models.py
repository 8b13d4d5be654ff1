"""The models of `inference.py`: an encoder and a decoder in plain Flax, and how each is run.

The encoder is the BERT of the examples (`bert.py`), of all-MiniLM-L6-v2's sizes. The decoder is a
pre-norm transformer that keeps its keys and values in Flax' own cache: float32 weights of 607 MB,
which no cache holds. Both have random weights: what they compute means nothing, and what it costs
is that of trained ones.
"""

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from _contest import Program, compiled, stepping

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
bert = importlib.import_module("bert")

# Tokens that are decoded before the one whose logits are compared.
PROMPT = 7


@dataclass(frozen=True)
class Encode:
    """Sentences of equal length to unit vectors."""

    batch: int
    tokens: int
    shape: Any = bert.Shape()

    unit = "sentences"

    def __str__(self) -> str:
        return f"encode {self.batch}x{self.tokens}"

    @property
    def branches(self) -> int:
        """How many branches a residual stream adds up."""
        return 2 * self.shape.depth

    def model(self) -> nn.Module:
        return bert.SentenceEncoder(self.shape)

    def published(self) -> dict[str, np.ndarray]:
        """The weights by their names in PyTorch, for another runtime."""
        return bert.random_tensors(self.shape, 0)

    def variables(self, model: nn.Module | None = None) -> Any:
        """The parameters, of whichever `model`."""
        return _encoder_variables(self.shape)

    def example(self) -> tuple[Any, ...]:
        rng = np.random.default_rng(0)
        tokens = rng.integers(0, self.shape.vocabulary, (self.batch, self.tokens), np.int32)
        return tokens, np.ones((self.batch, self.tokens), bool)

    def program(self, apply: Callable[..., Any], variables: Any) -> Program:
        return compiled(apply, variables, *self.example())


class Block(nn.Module):
    """One pre-norm transformer block that decodes."""

    heads: int

    @nn.compact
    def __call__(self, x):
        width = x.shape[-1]
        attention = nn.MultiHeadDotProductAttention(self.heads, decode=True, name="attention")
        x = x + attention(nn.LayerNorm(name="attention_norm")(x))
        inner = nn.gelu(nn.Dense(4 * width, name="up")(nn.LayerNorm(name="mlp_norm")(x)))
        return x + nn.Dense(width, name="down")(inner)


class Decoder(nn.Module):
    """Tokens int32 [B, 1] to logits [B, 1, vocabulary]; the cache moves on by one token."""

    depth: int
    width: int
    heads: int
    vocabulary: int

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(self.vocabulary, self.width, name="embed")(tokens)
        for i in range(self.depth):
            x = Block(self.heads, name=f"block_{i}")(x)
        return nn.Dense(self.vocabulary, name="head")(nn.LayerNorm(name="norm")(x))


@dataclass(frozen=True)
class Decode:
    """One token of one sequence at a time, `context` of them in the cache."""

    depth: int = 12
    width: int = 1024
    heads: int = 16
    vocabulary: int = 1024
    context: int = 128

    batch = 1
    unit = "tokens"

    def __str__(self) -> str:
        return f"decode {self.depth}x{self.width}"

    @property
    def branches(self) -> int:
        return 2 * self.depth

    def model(self) -> nn.Module:
        return Decoder(self.depth, self.width, self.heads, self.vocabulary)

    def variables(self, model: nn.Module | None = None) -> Any:
        """The parameters, and an empty cache as `model` keeps it, or the unwrapped one."""
        variables = _decoder_variables(self)
        if model is None:
            return variables
        whole = jnp.zeros((1, self.context), jnp.int32)
        cache = jax.eval_shape(model.init, jax.random.key(0), whole)["cache"]
        empty = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), cache)
        return {**variables, "cache": empty}

    def example(self) -> tuple[Any, ...]:
        return (np.zeros((1, 1), np.int32),)

    def program(self, apply: Callable[..., Any], variables: Any) -> Program:
        """A step that decodes on: the cache of every call is the next one's."""
        weights = {name: value for name, value in variables.items() if name != "cache"}

        def step(cache, weights, tokens):
            logits, updated = apply({**weights, "cache": cache}, tokens, mutable=["cache"])
            return updated["cache"], logits

        program = stepping(step, variables["cache"], weights, *self.example())
        for _ in range(PROMPT):
            program.run()
        return program


# Made once: the contenders share what they do not change.
@cache
def _encoder_variables(shape: Any) -> Any:
    return jax.device_put(bert.from_tensors(bert.random_tensors(shape, 0), shape))


@cache
def _decoder_variables(case: Decode) -> Any:
    whole = jnp.zeros((1, case.context), jnp.int32)  # sizes the cache
    return jax.jit(case.model().init)(jax.random.key(0), whole)
