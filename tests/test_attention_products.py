"""The products inside attention, under a policy that quantizes the layers around them."""

import flax.linen as nn
import jax
import numpy as np
import pytest
from flax import nnx

import mpjax as mp
from mpjax._attention import linen_attention, nnx_attention, weighted_values

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
    weights, value = normal(0, (2, 4, 7, 6)), normal(1, (2, 6, 4, 5))
    equation = "...hqk,...khd->...qhd"
    expected = np.einsum("bhqk,bkhd->bqhd", weights, value)
    np.testing.assert_allclose(weighted_values(equation, weights, value), expected, atol=1e-5)
    (dot,) = [
        eqn
        for eqn in jax.make_jaxpr(lambda w, v: weighted_values(equation, w, v))(weights, value).eqns
        if eqn.primitive.name in ("dot_general", "jit", "pjit")
        and any(v.aval.shape == (2, 4, 7, 5) for v in eqn.outvars)
    ]
    assert [v.aval.shape for v in dot.invars] == [weights.shape, value.shape]


@pytest.mark.parametrize("policy", ["int8_from_float32", "int8_weight_only_from_float32"])
def test_a_quantized_model_uses_it(policy):
    """The output product is [batch, heads, queries, depth], not [batch, heads, depth, queries]."""
    x = normal(0, (2, 7, 8))
    linen = mp.wrap(nn.MultiHeadDotProductAttention(4), policy)
    variables = linen.init(jax.random.key(0), x)
    other = nnx.MultiHeadAttention(4, 8, decode=False, rngs=nnx.Rngs(0))
    mp.wrap(other, policy)
    graph, state = nnx.split(other)
    texts = (
        jax.jit(linen.apply).lower(variables, x).as_text(),
        jax.jit(lambda state, x: nnx.merge(graph, state)(x)).lower(state, x).as_text(),
    )
    for text in texts:
        products = [line for line in text.splitlines() if "dot_general" in line]
        assert any("-> tensor<2x4x7x2xf32>" in line for line in products)
        assert not any("-> tensor<2x4x2x7xf32>" in line for line in products)
