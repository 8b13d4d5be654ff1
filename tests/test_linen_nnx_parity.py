"""Linen and NNX compute the same numbers from the same weights, under every policy."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import mpjax as mp
from examples.byte_lm_models import ByteLM, ByteLMNNX, Shape

TINY = Shape(context=8, width=16, depth=2, heads=2)
TOKENS = jnp.arange(16).reshape(2, 8) * 7 % 256


def to_nnx(params: dict[str, Any]) -> dict[str, Any]:
    """The Linen model's parameters under the NNX model's names."""
    blocks = {i: params[f"block_{i}"] for i in range(TINY.depth)}
    rest = {k: v for k, v in params.items() if not k.startswith("block_")}
    return {**rest, "blocks": blocks}


@pytest.fixture(scope="module")
def variables():
    variables = jax.jit(ByteLM(TINY).init)(jax.random.key(0), TOKENS)
    # biases and norms start as zeros and ones, which would hide how they are cast
    leaves, treedef = jax.tree.flatten(variables)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noisy = [x + 0.1 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(treedef, noisy)


@pytest.fixture
def model(variables):
    model = ByteLMNNX(TINY, rngs=nnx.Rngs(1))
    state = nnx.state(model)
    nnx.replace_by_pure_dict(state, to_nnx(variables["params"]))
    nnx.update(model, state)
    return model


@pytest.mark.parametrize(
    "policy", ["mixed_bfloat16", "mixed_float16", "bfloat16", "int8_from_mixed_bfloat16"]
)
def test_equal_outputs_from_equal_weights(policy, variables, model):
    linen = jax.jit(mp.wrap(ByteLM(TINY), policy).apply)(variables, TOKENS)
    other = nnx.jit(lambda m, t: m(t))(mp.wrap(model, policy), TOKENS)
    assert linen.dtype == other.dtype
    np.testing.assert_array_equal(np.asarray(linen), np.asarray(other))


def test_float32_differs_only_as_flaxs_own_attention_does(variables, model):
    linen = jax.jit(mp.wrap(ByteLM(TINY), "float32").apply)(variables, TOKENS)
    other = nnx.jit(lambda m, t: m(t))(mp.wrap(model, "float32"), TOKENS)
    # Flax NNX scales the scores after the product, Linen the query before it
    np.testing.assert_allclose(linen, other, rtol=1e-4, atol=1e-4)


def test_quantized_weights_are_equal(variables, model):
    linen = mp.wrap(ByteLM(TINY), "int8_from_mixed_bfloat16")
    quantized = mp.quantize(linen, variables, jax.ShapeDtypeStruct(TOKENS.shape, TOKENS.dtype))
    mp.quantize(mp.wrap(model, "int8_from_mixed_bfloat16"))
    expected = to_nnx(quantized["params"])
    actual = nnx.to_pure_dict(nnx.state(model))
    for path, a in jax.tree_util.tree_leaves_with_path(actual):
        b = expected
        for key in path:
            b = getattr(b, key.name) if hasattr(key, "name") else b[key.key]
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b), err_msg=str(path))
    y = jax.jit(linen.apply)(quantized, TOKENS)
    np.testing.assert_array_equal(np.asarray(y), nnx.jit(lambda m, t: m(t))(model, TOKENS))
