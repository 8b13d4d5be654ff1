"""A cache of keys and values in 8 bits: what is refused, and how a policy asks for one."""

import json

import jax.numpy as jnp
import pytest
from flax import errors

import mpjax as mp
from mpjax._kv_cache import empty_cache
from tests.test_kv_cache import (
    BATCH,
    DECODER,
    HEADS,
    KEY,
    LENGTH,
    PARAMS,
    WIDTH,
    X,
    each_format,
    fresh,
    nnx_attention,
    step,
    step_of,
    wrapped,
)


def test_many_positions_at_once_and_another_batch_are_refused():
    model = wrapped()
    variables = {"params": PARAMS, "cache": fresh(model)}
    shape = r"\(2, 1, 4, 8\).*but got \({}, {}, 4, 8\).*`init` of the wrapped model"
    with pytest.raises(ValueError, match="one position at a time.*" + shape.format(2, 6)):
        model.apply(variables, X, mutable=["cache"])
    with pytest.raises(ValueError, match="make another cache.*|" + shape.format(1, 1)):
        model.apply(variables, X[:1, :1], mutable=["cache"])
    one = X[:, :1].reshape(BATCH, 1, HEADS, -1)
    caches = (empty_cache((BATCH, LENGTH, *one.shape[2:]), one.dtype, model.policy),) * 2
    with pytest.raises(ValueError, match=r"but got \(2, 2, 4, 8\) and \(2, 1, 4, 8\)"):
        step(caches, 0, jnp.concatenate([one, one], 1), one, one)
    with pytest.raises(errors.ModifyScopeVariableError):
        model.apply(variables, X[:, :1])
    layer = nnx_attention(model.policy)
    with pytest.raises(ValueError, match="cache not initialized, call ``init_cache`` first"):
        layer(X[:, :1])
    layer.init_cache((BATCH, LENGTH, WIDTH))
    with pytest.raises(ValueError, match="a MultiHeadAttention decodes one position at a time"):
        layer(X)


@pytest.mark.parametrize(
    ("made", "read", "held", "wanted"),
    [
        (None, "int8", r"float32\[2, 6, 4, 8\]", "int8"),
        ("int8", None, r"QTensor\(int8\[2,6,4,8\].*kv_cache=None", "floats"),
        ("float8", "int8", r"QTensor\(float8_e4m3fn", "int8"),
    ],
)
def test_a_cache_of_another_policy_is_refused(made, read, held, wanted):
    message = f"holds {held}.*stores {wanted}: make the cache under the policy that reads it, by "
    cache = fresh(wrapped(made))
    with pytest.raises(TypeError, match="the cache of layer ''.*" + message + "`init`"):
        step_of(wrapped(read))(cache, X[:, :1])
    layer = nnx_attention(mp.DTypePolicy("float32", kv_cache=made))
    layer.init_cache((BATCH, LENGTH, WIDTH))
    mp.wrap(layer, mp.DTypePolicy("float32", kv_cache=read))
    with pytest.raises(TypeError, match="a MultiHeadAttention " + message + "`init_cache`"):
        layer(X[:, :1])
    layer.init_cache((BATCH, LENGTH, WIDTH))
    layer(X[:, :1])


def test_an_attention_function_of_the_authors_is_refused_where_it_decodes():
    def own(query, key, value, mask=None, **options):
        return value

    policy = mp.DTypePolicy("float32", kv_cache="int8")
    message = r"decodes by an attention function of its own.*without kv_cache='int8'"
    with pytest.raises(NotImplementedError, match="layer '' " + message):
        mp.wrap(DECODER.clone(attention_fn=own), policy).init(KEY, X)
    layer = nnx_attention(policy, attention_fn=own)
    layer.init_cache((BATCH, LENGTH, WIDTH))
    with pytest.raises(NotImplementedError, match="a MultiHeadAttention " + message):
        layer(X[:, :1])
    assert layer(X, decode=False).shape == X.shape


# The policy


@each_format
def test_the_cache_is_a_field_of_every_policy_outside_its_name(kv_cache):
    for policy in (
        mp.DTypePolicy("mixed_bfloat16", kv_cache=kv_cache),
        mp.QuantizedDTypePolicy("int8", "mixed_bfloat16", kv_cache=kv_cache),
        mp.QuantizedFloat8DTypePolicy("float8", "mixed_bfloat16", kv_cache=kv_cache),
    ):
        without = mp.get_policy(policy.name)
        assert policy.name == without.name and without.kv_cache is None
        assert policy != without and hash(policy) != hash(without)
        assert "kv_cache" not in without.get_config()
        assert policy.get_config()["kv_cache"] == kv_cache
        assert mp.deserialize(json.loads(json.dumps(mp.serialize(policy)))) == policy
    entries = {"block_1": mp.DTypePolicy("float32", kv_cache=kv_cache)}
    policies = mp.DTypePolicyMap("float32", entries)
    assert policies["block_1"].kv_cache == kv_cache and policies["block_2"].kv_cache is None
    assert mp.deserialize(json.loads(json.dumps(mp.serialize(policies)))) == policies


@pytest.mark.parametrize("kv_cache", ["int4", "float8_e5m2", True, 8])
def test_an_unknown_format_of_the_cache_is_refused(kv_cache):
    message = (
        rf"`kv_cache` is {kv_cache!r}: .* one of \('int8', 'float8'\), or, with None, as floats"
    )
    with pytest.raises(ValueError, match=message):
        mp.QuantizedDTypePolicy("int8", "mixed_bfloat16", kv_cache=kv_cache)
    with pytest.raises(ValueError, match=message):
        mp.DTypePolicy("float32", kv_cache=kv_cache)
