"""Decoding, byte by byte, in Linen and in NNX: one `lax.scan` that reads a prompt and goes on.

This is the only file of the example that calls mpjax. The models are the demo's, in plain Flax; a
policy says in what they compute, and in what their weights and their caches are stored.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from byte_lm_models import VOCAB, ByteLM, ByteLMNNX, Shape
from flax import nnx

import mpjax as mp

Step = Callable[[Any, jax.Array, jax.Array], tuple[Any, jax.Array]]


@dataclass
class Decoder:
    """A model that decodes.

    Attributes:
      run: `(texts, given, key, temperature)` to the byte after each position; see `decode`.
      cache_bytes: of all keys and values of one text, their scales included.
      weight_bytes: of all weights.
    """

    run: Callable[..., jax.Array]
    cache_bytes: int
    weight_bytes: int


def linen_decoder(policy: Any, params: Any, shape: Shape, top_k: int) -> Decoder:
    """The Linen model with these parameters, quantized if the policy asks for it."""
    model = mp.wrap(ByteLM(shape, decode=True), policy)
    variables = {"params": params}
    if policy.quantization_mode is not None:
        tokens = jax.ShapeDtypeStruct((1, shape.context), jnp.int32)
        variables = mp.quantize(mp.wrap(ByteLM(shape), policy), variables, tokens)

    def start(batch: int) -> Any:
        tokens = jnp.zeros((batch, shape.context), jnp.int32)
        return model.init(jax.random.key(0), tokens)["cache"]  # its parameters are not computed

    @jax.jit
    def run(params: Any, texts: jax.Array, given: Any, key: jax.Array, temperature: Any):
        step = functools.partial(linen_step, model, params)
        return decode(step, start(texts.shape[0]), texts, given, key, temperature, top_k)

    cache = jax.eval_shape(lambda: start(1))
    run_with = functools.partial(run, variables["params"])
    return Decoder(run_with, tree_bytes(cache), tree_bytes(variables["params"]))


def linen_step(
    model: Any, params: Any, cache: Any, byte: jax.Array, position: jax.Array
) -> tuple[Any, jax.Array]:
    """A `Step` of the Linen model, given what comes before the cache."""
    variables = {"params": params, "cache": cache}
    logits, updated = model.apply(variables, byte, position, mutable=["cache"])
    return updated["cache"], logits


def nnx_decoder(policy: Any, params: Any, shape: Shape, top_k: int) -> Decoder:
    """The NNX model with the parameters of the Linen one."""
    model = nnx.eval_shape(lambda: ByteLMNNX(shape, rngs=nnx.Rngs(0)))
    state = nnx.state(model, nnx.Param)
    blocks = {i: params[f"block_{i}"] for i in range(shape.depth)}
    rest = {name: value for name, value in params.items() if not name.startswith("block_")}
    nnx.replace_by_pure_dict(state, {**rest, "blocks": blocks})
    nnx.update(model, state)
    mp.wrap(model, policy)
    if policy.quantization_mode is not None:
        mp.quantize(model)
    model.set_attributes(decode=True)

    def start(graph: Any, weights: Any, batch: int) -> tuple[Any, Any]:
        model = nnx.merge(graph, weights)
        model.init_cache(batch, policy.compute_dtype)
        graph, _, cache = nnx.split(model, nnx.Param, nnx.Cache)
        return graph, cache

    @functools.partial(jax.jit, static_argnums=0)
    def run(graph: Any, weights: Any, texts: jax.Array, given: Any, key: Any, temperature: Any):
        graph, cache = start(graph, weights, texts.shape[0])
        step = functools.partial(nnx_step, graph, weights)
        return decode(step, cache, texts, given, key, temperature, top_k)

    graph, weights = nnx.split(model)
    cache = jax.eval_shape(lambda weights: start(graph, weights, 1)[1], weights)
    run_with = functools.partial(run, graph, weights)
    return Decoder(run_with, tree_bytes(cache), tree_bytes(weights))


def nnx_step(
    graph: Any, weights: Any, cache: Any, byte: jax.Array, position: jax.Array
) -> tuple[Any, jax.Array]:
    """The same of the NNX model."""
    model = nnx.merge(graph, weights, cache)
    logits = model(byte, position)
    return nnx.state(model, nnx.Cache), logits


def decode(
    step: Step,
    cache: Any,
    texts: jax.Array,
    given: jax.Array,
    key: jax.Array,
    temperature: jax.Array,
    top_k: int,
) -> jax.Array:
    """Reads the given bytes of each text, then goes on by what it chose itself.

    Args:
      step: `(cache, bytes [B, 1], position [1])` to the cache and logits [B, 1, 256].
      cache: an empty one, for B texts.
      texts: int32 [B, T]; what comes after the given bytes is not read.
      given: how many bytes of each text are read, an integer from 1 to T.
      key: of the choices; each text and position has its own.
      temperature: 0 takes the likeliest byte.
      top_k: how many of the likeliest bytes are chosen from.

    Returns:
      int32 [B, T]: the byte chosen after each position.
    """

    def body(carry: Any, x: Any) -> tuple[Any, jax.Array]:
        cache, last = carry
        position, byte = x
        byte = jnp.where(position < given, byte, last)
        cache, logits = step(cache, byte[:, None], position[None])
        chosen = choose(logits[:, 0], jax.random.fold_in(key, position), temperature, top_k)
        return (cache, chosen), chosen

    batch, length = texts.shape
    start = cache, jnp.zeros((batch,), jnp.int32)
    _, chosen = jax.lax.scan(body, start, (jnp.arange(length), texts.T))
    return chosen.T


def choose(logits: jax.Array, key: jax.Array, temperature: jax.Array, top_k: int) -> jax.Array:
    """A byte for each row of logits [B, 256]: the likeliest, or drawn from the `top_k` likeliest.

    A byte is drawn with probability `softmax(logits / temperature)` among those.
    """
    logits = logits.astype(jnp.float32)
    least = jax.lax.top_k(logits, min(top_k, VOCAB))[0][:, -1:]
    kept = jnp.where(logits >= least, logits, -jnp.inf)
    drawn = jax.random.categorical(key, kept / jnp.where(temperature > 0, temperature, 1.0))
    chosen = jnp.where(temperature > 0, drawn, jnp.argmax(logits, -1))
    return chosen.astype(jnp.int32)


def tree_bytes(tree: Any) -> int:
    """Bytes of the arrays of a tree, a count of positions left out."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree) if x.ndim)
