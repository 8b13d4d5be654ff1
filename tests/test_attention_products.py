"""The products inside attention, under a policy that quantizes the layers around them."""

import functools
import re

import flax.linen as nn
import jax
import numpy as np
import pytest
from flax import nnx

import mpjax as mp
from mpjax._attention import linen_attention, nnx_attention, output_of
from tests.native_helpers import here

FLAX = {"linen": nn.dot_product_attention, "nnx": nnx.dot_product_attention}
OURS = {"linen": linen_attention, "nnx": nnx_attention}
# [..., queries or keys, heads, depth], sizes that differ in every axis.
QUERY, KEY = (2, 3, 7, 4, 5), (2, 3, 6, 4, 5)


def normal(seed: int, shape: tuple[int, ...]) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


@pytest.mark.slow
@pytest.mark.parametrize("api", ["linen", "nnx"])
def test_float32_attention_is_flaxs(api):
    query, key, value = normal(0, QUERY), normal(1, KEY), normal(2, KEY)
    mask = jax.random.bernoulli(jax.random.key(3), 0.7, (2, 3, 4, 7, 6))
    ours, flax = (fn[api](query, key, value, mask=mask) for fn in (OURS, FLAX))
    # Six weights that sum to one times values of a few units: sums of 6 terms in another order.
    np.testing.assert_allclose(ours, flax, atol=6 * 4 * 2.0**-24)


def test_weights_are_multiplied_by_values_and_neither_is_transposed_first():
    """By XLA's product, which other platforms take."""
    weights, value = normal(0, (2, 4, 9, 6)), normal(1, (2, 6, 4, 5))
    equation = "...hqk,...khd->...qhd"
    expected = np.einsum("bhqk,bkhd->bqhd", weights, value)
    np.testing.assert_allclose(output_of(equation, weights, value), expected, atol=1e-5)
    text = jax.jit(functools.partial(output_of, equation)).trace(weights, value)
    text = text.lower(lowering_platforms=("tpu",)).as_text()
    (product,) = re.findall(r"dot_general.* : \((.*)\) -> (\S+)", text)
    assert product == ("tensor<2x4x9x6xf32>, tensor<2x6x4x5xf32>", "tensor<2x4x9x5xf32>")


@pytest.mark.parametrize("policy", ["int8_from_float32", "int8_weight_only_from_float32"])
def test_a_quantized_model_uses_it(policy):
    """The output product is [batch, heads, queries, depth], not [batch, heads, depth, queries]."""
    x = normal(0, (2, 9, 8))
    linen = mp.wrap(nn.MultiHeadDotProductAttention(4), policy)
    variables = linen.init(jax.random.key(0), x)
    other = nnx.MultiHeadAttention(4, 8, decode=False, rngs=nnx.Rngs(0))
    mp.wrap(other, policy)
    graph, state = nnx.split(other)
    traced = (
        jax.jit(linen.apply).trace(variables, x),
        jax.jit(lambda state, x: nnx.merge(graph, state)(x)).trace(state, x),
    )
    for each in traced:
        native = each.lower().compile().as_text()
        assert len(set(re.findall(r"mpjax_attention_\w+", native))) == (2 if here() else 0)
        text = each.lower(lowering_platforms=("tpu",)).as_text()
        products = [line for line in text.splitlines() if "dot_general" in line]
        assert any("-> tensor<2x4x9x2xf32>" in line for line in products)
        assert not any("-> tensor<2x4x2x7xf32>" in line for line in products)


@pytest.mark.skipif(not here(), reason="no native kernels here")
@pytest.mark.parametrize("cache", [None, "int8"])
def test_a_decoding_step_reads_its_cache_as_it_lies(cache):
    """No copy of the keys and values with their heads first, 2 x 4 x 9 x 2 or 2 x 4 x 2 x 9."""
    policy = mp.QuantizedDTypePolicy("int8", "float32", kv_cache=cache)
    linen = mp.wrap(nn.MultiHeadDotProductAttention(4, decode=True), policy)
    variables = linen.init(jax.random.key(0), normal(0, (2, 9, 8)))
    other = nnx.MultiHeadAttention(4, 8, decode=True, rngs=nnx.Rngs(0))
    mp.wrap(other, policy)
    other.init_cache((2, 9, 8))
    graph, state = nnx.split(other)
    step = normal(1, (2, 1, 8))

    def run(state, x):
        model = nnx.merge(graph, state)
        return model(x), nnx.state(model)

    apply = functools.partial(linen.apply, mutable=["cache"])
    texts = (
        jax.jit(apply).lower(variables, step).compile().as_text(),
        jax.jit(run).lower(state, step).compile().as_text(),
    )
    for text in texts:
        assert text is not None
        assert text.count('custom_call_target="mpjax_attention_scores"') == 1
        assert text.count('custom_call_target="mpjax_attention_output"') == 1
        assert not re.search(r"\[2,4,(9,2|2,9)\]|\[8,(9,2|2,9)\]", text)


@pytest.mark.skipif(not here(), reason="no native kernels here")
def test_explain_knows_the_calls_of_a_decoding_step():
    linen = mp.wrap(nn.MultiHeadDotProductAttention(4, decode=True), "int8_from_mixed_bfloat16")
    variables = linen.init(jax.random.key(0), normal(0, (2, 9, 8)))
    apply = functools.partial(linen.apply, mutable=["cache"])
    rows = mp.explain(apply, variables, normal(1, (2, 1, 8))).products
    found = {row.unit: (row.lhs, row.rhs, row.flops, row.reason) for row in rows}
    flops = 2 * 2 * 4 * 9 * 2  # two to a multiplication: batch, heads, positions, depth
    for product in ("scores", "output"):
        half = "bfloat16", "bfloat16", flops, "policy"
        assert found[f"mpjax_attention_{product}"] == half
