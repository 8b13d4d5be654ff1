"""The demo's model, twice: the same byte-level transformer in plain Linen and in plain NNX.

Nothing in this file knows of mpjax, and that is its point: `mp.wrap` must change how these
modules compute without an edit here. `dtype` is Flax's own field, as on any Flax layer: the demo
leaves it at None; `benchmarks/compile_time.py` sets it to bfloat16 to have a peer without mpjax.

A block is pre-norm: `x + attention(norm(x))`, then `x + mlp(norm(x))`. The last matrix of each
branch starts at zero, so a block starts as the identity: after 500 steps, in one run, that was
worth 0.2 bits per byte. Positions are learned, the head is a Dense of its own (not tied to the
embedding), and the output is logits [B, T, 256].

To decode, a model is given one byte at a time, with its position, and its attention layers keep
what they saw: in Linen those of `ByteLM(shape, decode=True)`, whose parameters are the same; in NNX
after `model.set_attributes(decode=True)` and `model.init_cache(batch)`.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

VOCAB = 256


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of the model: `context` bytes seen, `depth` blocks of width `width`."""

    context: int = 128
    width: int = 256
    depth: int = 4
    heads: int = 4


class Block(nn.Module):
    """One pre-norm transformer block, Linen."""

    heads: int
    dtype: Any = None
    decode: bool = False

    @nn.compact
    def __call__(self, x, mask):
        width = x.shape[-1]
        attention = nn.MultiHeadDotProductAttention(
            self.heads,
            dtype=self.dtype,
            out_kernel_init=nn.initializers.zeros,
            decode=self.decode,
            name="attention",
        )
        up = nn.Dense(4 * width, dtype=self.dtype, name="up")
        down = nn.Dense(width, dtype=self.dtype, kernel_init=nn.initializers.zeros, name="down")
        x = x + attention(nn.LayerNorm(dtype=self.dtype, name="attention_norm")(x), mask=mask)
        return x + down(nn.gelu(up(nn.LayerNorm(dtype=self.dtype, name="mlp_norm")(x))))


class ByteLM(nn.Module):
    """Bytes [B, T] at positions [T] (None: from 0) to logits of the next [B, T, 256], Linen."""

    shape: Shape = Shape()
    dtype: Any = None
    decode: bool = False

    @nn.compact
    def __call__(self, tokens, position=None):
        width = self.shape.width
        position = jnp.arange(tokens.shape[-1]) if position is None else position
        x = nn.Embed(VOCAB, width, dtype=self.dtype, name="embedding")(tokens)
        x = x + nn.Embed(self.shape.context, width, dtype=self.dtype, name="position")(position)
        mask = nn.make_causal_mask(tokens)
        for i in range(self.shape.depth):
            block = Block(self.shape.heads, self.dtype, self.decode, name=f"block_{i}")
            x = block(x, mask)
        x = nn.LayerNorm(dtype=self.dtype, name="norm")(x)
        return nn.Dense(VOCAB, dtype=self.dtype, name="head")(x)


class NNXBlock(nnx.Module):
    """One pre-norm transformer block, NNX."""

    def __init__(self, width: int, heads: int, dtype: Any = None, *, rngs: nnx.Rngs):
        self.attention_norm = nnx.LayerNorm(width, dtype=dtype, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(
            heads,
            width,
            dtype=dtype,
            out_kernel_init=nnx.initializers.zeros,
            decode=False,
            rngs=rngs,
        )
        self.mlp_norm = nnx.LayerNorm(width, dtype=dtype, rngs=rngs)
        self.up = nnx.Linear(width, 4 * width, dtype=dtype, rngs=rngs)
        self.down = nnx.Linear(
            4 * width, width, dtype=dtype, kernel_init=nnx.initializers.zeros, rngs=rngs
        )

    def __call__(self, x, mask):
        x = x + self.attention(self.attention_norm(x), mask=mask)
        return x + self.down(jax.nn.gelu(self.up(self.mlp_norm(x))))


class ByteLMNNX(nnx.Module):
    """Bytes [B, T] at positions [T] (None: from 0) to logits of the next [B, T, 256], NNX."""

    def __init__(self, shape: Shape | None = None, dtype: Any = None, *, rngs: nnx.Rngs):
        shape = shape or Shape()
        self.embedding = nnx.Embed(VOCAB, shape.width, dtype=dtype, rngs=rngs)
        self.position = nnx.Embed(shape.context, shape.width, dtype=dtype, rngs=rngs)
        self.blocks = nnx.List(
            NNXBlock(shape.width, shape.heads, dtype, rngs=rngs) for _ in range(shape.depth)
        )
        self.norm = nnx.LayerNorm(shape.width, dtype=dtype, rngs=rngs)
        self.head = nnx.Linear(shape.width, VOCAB, dtype=dtype, rngs=rngs)

    def init_cache(self, batch: int, dtype: Any = jnp.float32) -> None:
        """Empty caches for as many positions as there are."""
        for block in self.blocks:
            block.attention.init_cache((batch, *self.position.embedding.shape), dtype)

    def __call__(self, tokens, position=None):
        position = jnp.arange(tokens.shape[-1]) if position is None else position
        x = self.embedding(tokens) + self.position(position)
        mask = nnx.make_causal_mask(tokens)
        for block in self.blocks:
            x = block(x, mask)
        return self.head(self.norm(x))
