"""A BERT that turns sentences into vectors, in plain Flax Linen; nothing here knows of mpjax.

    x = norm(words[token] + positions[i] + types[0])
    x = norm(x + attention(x)),  x = norm(x + down(gelu(up(x))))      in each layer
    embedding = m / |m|,  m the mean of x over the tokens of the sentence

Norms come after the residual sum, with an epsilon of 1e-12, and gelu is the exact one, by erf: what
the published weights were trained with. `from_tensors` maps those, by the names and the layout that
PyTorch gave them, to the parameters of `SentenceEncoder`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

EPSILON = 1e-12


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of a BERT, by default of all-MiniLM-L6-v2: 22.6 million weights."""

    vocabulary: int = 30522
    positions: int = 512
    width: int = 384
    inner: int = 1536
    depth: int = 6
    heads: int = 12


class Layer(nn.Module):
    """One post-norm transformer layer."""

    shape: Shape

    @nn.compact
    def __call__(self, x, mask):
        attention = nn.MultiHeadDotProductAttention(self.shape.heads, name="attention")
        x = nn.LayerNorm(EPSILON, name="attention_norm")(x + attention(x, mask=mask))
        inner = nn.gelu(nn.Dense(self.shape.inner, name="up")(x), approximate=False)
        x = x + nn.Dense(self.shape.width, name="down")(inner)
        return nn.LayerNorm(EPSILON, name="mlp_norm")(x)


class SentenceEncoder(nn.Module):
    """Tokens int32 [B, T] and their mask, bool [B, T], to unit vectors, float32 [B, width].

    The mask is False where a sentence is padded; each has one token at least.
    """

    shape: Shape = Shape()

    @nn.compact
    def __call__(self, tokens, mask):
        shape = self.shape
        x = nn.Embed(shape.vocabulary, shape.width, name="words")(tokens)
        x = x + nn.Embed(shape.positions, shape.width, name="positions")(
            jnp.arange(tokens.shape[1])
        )
        x = x + nn.Embed(2, shape.width, name="types")(jnp.zeros_like(tokens))
        x = nn.LayerNorm(EPSILON, name="norm")(x)
        for i in range(shape.depth):
            x = Layer(shape, name=f"layer_{i}")(x, mask[:, None, None, :])
        # The mean of a sentence is taken in float32, whatever its layers compute in.
        mean = jnp.mean(x.astype(jnp.float32), axis=1, where=mask[:, :, None])
        return mean / jnp.linalg.norm(mean, axis=1, keepdims=True)


def from_tensors(tensors: Mapping[str, np.ndarray], shape: Shape) -> dict[str, Any]:
    """The variables of `SentenceEncoder(shape)` from the tensors of a BERT of Hugging Face.

    A weight there is [out, in], here [in, out], and the heads of attention have an axis of their
    own. The pooler, which no sentence vector passes through, is left out.

    Raises:
      ValueError: a tensor is missing, or has another shape.
    """
    published = _Published(tensors, shape.width)
    params = {
        "words": published.embed("word", shape.vocabulary),
        "positions": published.embed("position", shape.positions),
        "types": published.embed("token_type", 2),
        "norm": published.norm("embeddings.LayerNorm"),
    }
    layers = range(shape.depth)
    blocks = {f"layer_{i}": _layer(published, f"encoder.layer.{i}", shape) for i in layers}
    return {"params": params | blocks}


def _layer(published: "_Published", name: str, shape: Shape) -> dict[str, Any]:
    width, heads = shape.width, (shape.heads, shape.width // shape.heads)
    attention = {}
    for each in ("query", "key", "value"):
        dense = published.dense(f"{name}.attention.self.{each}", width, width)
        kernel, bias = dense["kernel"], dense["bias"]
        attention[each] = {"kernel": kernel.reshape(width, *heads), "bias": bias.reshape(heads)}
    out = published.dense(f"{name}.attention.output.dense", width, width)
    attention["out"] = out | {"kernel": out["kernel"].reshape(*heads, width)}
    return {
        "attention": attention,
        "attention_norm": published.norm(f"{name}.attention.output.LayerNorm"),
        "up": published.dense(f"{name}.intermediate.dense", width, shape.inner),
        "down": published.dense(f"{name}.output.dense", shape.inner, width),
        "mlp_norm": published.norm(f"{name}.output.LayerNorm"),
    }


def random_tensors(shape: Shape, seed: int) -> dict[str, np.ndarray]:
    """The tensors of a BERT by their names in PyTorch: Gaussians, of variance 1 / inputs."""
    rng, width = np.random.default_rng(seed), shape.width
    tensors: dict[str, np.ndarray] = {}

    def dense(name: str, into: int, out: int) -> None:
        tensors[f"{name}.weight"] = rng.normal(0, into**-0.5, (out, into)).astype(np.float32)
        tensors[f"{name}.bias"] = rng.normal(0, 0.1, out).astype(np.float32)

    def norm(name: str) -> None:
        tensors[f"{name}.weight"] = rng.normal(1, 0.1, width).astype(np.float32)
        tensors[f"{name}.bias"] = rng.normal(0, 0.1, width).astype(np.float32)

    tables = {"word": shape.vocabulary, "position": shape.positions, "token_type": 2}
    for name, rows in tables.items():
        table = rng.normal(0, 1, (rows, width)).astype(np.float32)
        tensors[f"embeddings.{name}_embeddings.weight"] = table
    norm("embeddings.LayerNorm")
    for i in range(shape.depth):
        layer = f"encoder.layer.{i}"
        for each in ("self.query", "self.key", "self.value", "output.dense"):
            dense(f"{layer}.attention.{each}", width, width)
        norm(f"{layer}.attention.output.LayerNorm")
        dense(f"{layer}.intermediate.dense", width, shape.inner)
        dense(f"{layer}.output.dense", shape.inner, width)
        norm(f"{layer}.output.LayerNorm")
    return tensors


@dataclasses.dataclass(frozen=True)
class _Published:
    """Published tensors, read as the parameters of Flax's layers."""

    tensors: Mapping[str, np.ndarray]
    width: int

    def tensor(self, name: str, *dims: int) -> np.ndarray:
        if name not in self.tensors:
            raise ValueError(f"the weights have no tensor `{name}`: they are not those of a BERT")
        found = self.tensors[name]
        if found.shape != dims:
            raise ValueError(f"`{name}` has shape {found.shape}, but should have {dims}")
        return found.astype(np.float32)

    def dense(self, name: str, inputs: int, outputs: int) -> dict[str, np.ndarray]:
        weight = self.tensor(f"{name}.weight", outputs, inputs)
        return {
            "kernel": np.ascontiguousarray(weight.T),
            "bias": self.tensor(f"{name}.bias", outputs),
        }

    def norm(self, name: str) -> dict[str, np.ndarray]:
        return {
            "scale": self.tensor(f"{name}.weight", self.width),
            "bias": self.tensor(f"{name}.bias", self.width),
        }

    def embed(self, name: str, rows: int) -> dict[str, np.ndarray]:
        return {"embedding": self.tensor(f"embeddings.{name}_embeddings.weight", rows, self.width)}
