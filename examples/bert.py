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

    def tensor(name: str, *dims: int) -> np.ndarray:
        if name not in tensors:
            raise ValueError(f"the weights have no tensor `{name}`: they are not those of a BERT")
        if tensors[name].shape != dims:
            raise ValueError(f"`{name}` has shape {tensors[name].shape}, but should have {dims}")
        return tensors[name].astype(np.float32)

    def dense(name: str, into: int, out: int) -> dict[str, np.ndarray]:
        weight = np.ascontiguousarray(tensor(f"{name}.weight", out, into).T)
        return {"kernel": weight, "bias": tensor(f"{name}.bias", out)}

    def norm(name: str) -> dict[str, np.ndarray]:
        return {
            "scale": tensor(f"{name}.weight", shape.width),
            "bias": tensor(f"{name}.bias", shape.width),
        }

    def embed(name: str, rows: int) -> dict[str, np.ndarray]:
        return {"embedding": tensor(f"embeddings.{name}_embeddings.weight", rows, shape.width)}

    width, heads = shape.width, (shape.heads, shape.width // shape.heads)

    def layer(name: str) -> dict[str, Any]:
        attention = {
            each: _split_output(dense(f"{name}.attention.self.{each}", width, width), heads)
            for each in ("query", "key", "value")
        }
        out = dense(f"{name}.attention.output.dense", width, width)
        attention["out"] = out | {"kernel": out["kernel"].reshape(*heads, width)}
        return {
            "attention": attention,
            "attention_norm": norm(f"{name}.attention.output.LayerNorm"),
            "up": dense(f"{name}.intermediate.dense", width, shape.inner),
            "down": dense(f"{name}.output.dense", shape.inner, width),
            "mlp_norm": norm(f"{name}.output.LayerNorm"),
        }

    params = {
        "words": embed("word", shape.vocabulary),
        "positions": embed("position", shape.positions),
        "types": embed("token_type", 2),
        "norm": norm("embeddings.LayerNorm"),
    }
    layers = {f"layer_{i}": layer(f"encoder.layer.{i}") for i in range(shape.depth)}
    return {"params": params | layers}


def _split_output(dense: dict[str, np.ndarray], heads: tuple[int, int]) -> dict[str, np.ndarray]:
    kernel, bias = dense["kernel"], dense["bias"]
    return {"kernel": kernel.reshape(len(kernel), *heads), "bias": bias.reshape(heads)}
