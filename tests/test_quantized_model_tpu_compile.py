"""A whole quantized model by the real TPU compiler: every dense product multiplies int8."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax import export as jax_export

import mpjax as mp
from tests.test_kernels_tpu_compile import compiled, compiler

__all__ = ["compiled", "compiler"]  # fixtures
pytestmark = pytest.mark.tpu_compile

WIDTH, VOCABULARY, LENGTH = 256, 512, 128
TOKENS = jax.ShapeDtypeStruct((4, LENGTH), jnp.int32)
DENSE = 4 + 2 + 1  # projections of the attention, a pair of Dense, the tied head


class Transformer(nn.Module):
    """One block between a table and that table again."""

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(VOCABULARY, WIDTH, name="embed")
        x = embed(tokens)
        x += nn.MultiHeadDotProductAttention(2, name="attention")(nn.LayerNorm()(x))
        x += nn.Dense(WIDTH, name="down")(nn.gelu(nn.Dense(4 * WIDTH, name="up")(x)))
        return embed.attend(x)


class TransformerNNX(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs)
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, WIDTH, decode=False, rngs=rngs)
        self.up = nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs)
        self.down = nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens)
        x += self.attention(self.norm(x))
        x += self.down(nnx.gelu(self.up(x)))
        return self.embed.attend(x)


def program(api, policy):
    """A function and its abstract arguments: the quantized model, of which no weight is made."""
    if api == "linen":
        model = mp.wrap(Transformer(), policy)
        variables = jax.eval_shape(model.init, jax.random.key(0), TOKENS)
        quantized = jax.eval_shape(lambda v: mp.quantize(model, v, TOKENS), variables)
        return model.apply, quantized, TOKENS
    model = nnx.eval_shape(lambda: mp.quantize(mp.wrap(TransformerNNX(nnx.Rngs(0)), policy)))
    graph, state = nnx.split(model)
    return lambda state, x: nnx.merge(graph, state)(x), nnx.as_pure(state), TOKENS


def products(text):
    """The dtypes of the operands of every matrix product in an optimized program."""
    dtypes = dict(re.findall(r"(%[\w.-]+) = (\w+)\[", text))
    pairs = re.findall(r" (?:convolution|dot)\((%[\w.-]+), (%[\w.-]+)\)", text)
    return sorted((dtypes[a], dtypes[b]) for a, b in pairs)


@pytest.mark.parametrize("chip", ["v5e", "v6e"])
@pytest.mark.parametrize("api", ["linen", "nnx"])
def test_every_dense_product_multiplies_int8(compiled, chip, api):
    policy = mp.QuantizedDTypePolicy("int8", "mixed_bfloat16")
    found = products(compiled(chip, *program(api, policy)).as_text())
    int8 = [pair for pair in found if pair == ("s8", "s8")]
    assert len(int8) == DENSE
    # The two products inside of the attention, of activations alone, are the rest.
    assert len(found) == DENSE + 2 and {"s8"}.isdisjoint(found[0] + found[1])


@pytest.mark.parametrize("api", ["linen", "nnx"])
def test_these_checks_notice_a_float_product(compiled, api):
    policy = mp.DTypePolicyMap("int8_from_mixed_bfloat16", {"up": "mixed_bfloat16"})
    found = products(compiled("v5e", *program(api, policy)).as_text())
    assert found.count(("s8", "s8")) == DENSE - 1 and len(found) == DENSE + 2


@pytest.mark.parametrize("chip", ["v5e", "v6e"])
def test_an_export_made_on_a_cpu_compiles(compiled, chip):
    model = mp.wrap(Transformer(), "int8_from_mixed_bfloat16")
    tokens = jnp.zeros(TOKENS.shape, TOKENS.dtype)
    quantized = mp.quantize(model, model.init(jax.random.key(0), tokens), tokens)
    blob = mp.export(model, quantized, tokens, platforms=("tpu",))
    exported = jax_export.deserialize(bytearray(blob))
    assert products(compiled(chip, exported.call, TOKENS).as_text()).count(("s8", "s8")) == DENSE
