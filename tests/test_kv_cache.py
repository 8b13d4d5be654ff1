"""Decoding with a cache in 8 bits: what it computes and what it stores."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx

import mpjax as mp
import mpjax_kernels as mk
from mpjax._attention import linen_attention
from mpjax._kv_cache import DecodingStep, empty_cache, write
from tests.helpers import assert_trees_equal

BATCH, LENGTH, HEADS, DEPTH = 2, 6, 4, 8
WIDTH = HEADS * DEPTH
KEY = jax.random.key(0)
X = jax.random.normal(jax.random.key(1), (BATCH, LENGTH, WIDTH))
PLAIN = nn.MultiHeadDotProductAttention(HEADS, bias_init=nn.initializers.normal(0.2))
DECODER = PLAIN.clone(decode=True)
PARAMS = PLAIN.init(KEY, X)["params"]

each_format = pytest.mark.parametrize("kv_cache", ["int8", "float8"])


def wrapped(kv_cache="int8", source="float32"):
    return mp.wrap(DECODER, mp.DTypePolicy(source, kv_cache=kv_cache))


@functools.cache
def fresh(model):
    return jax.jit(model.init)(KEY, X)["cache"]


def step_of(model):
    def step(cache, x, mask=None):
        variables = {"params": PARAMS, "cache": cache}
        out, updated = model.apply(variables, x, mask=mask, mutable=["cache"])
        return updated["cache"], out

    return step


def decode(model, x=X):
    """The outputs of one position after another, and the cache that they leave."""
    run = jax.jit(functools.partial(jax.lax.scan, step_of(model)))
    cache, outputs = run(fresh(model), jnp.moveaxis(x, 1, 0)[:, :, None])
    return jnp.moveaxis(outputs[:, :, 0], 0, 1), cache


def nnx_attention(policy=None, **options):
    layer = nnx.MultiHeadAttention(HEADS, WIDTH, decode=True, rngs=nnx.Rngs(0), **options)
    if not options:
        params = nnx.state(layer, nnx.Param)
        nnx.replace_by_pure_dict(params, PARAMS)
        nnx.update(layer, params)
    return layer if policy is None else mp.wrap(layer, policy)


def projected(name):
    kernel, bias = (np.float64(PARAMS[name][leaf]) for leaf in ("kernel", "bias"))
    return np.einsum("btw,whd->bthd", np.float64(X), kernel) + bias


def error_of(x, kv_cache):
    """How far the entries of keys or values may be off, [batch, length, heads, depth]."""
    amax = np.abs(x).max(-1, keepdims=True)
    e = amax * 0.5 / 127 if kv_cache == "int8" else np.maximum(np.abs(x) / 16, amax / 448 / 1024)
    return e * (1 + 1e-5)


def bound_of(kv_cache):
    """How far the output may be from that of the floats, [batch, length, width].

    Entries of keys that are off by `e` make scores off by `d = |query| @ e / sqrt(depth)` at most.
    That changes the odds of any set of positions by exp(2 d) at most, so its weight by tanh(d / 2),
    and the output by that times the range of the values, 2 amax. Values are off by their own `e`,
    under weights of sum 1.
    """
    query, key, value = (projected(name) for name in ("query", "key", "value"))
    causal = np.tril(np.ones((LENGTH, LENGTH)))[:, :, None]  # position, seen position, head
    score = np.einsum("bthd,bkhd->btkh", np.abs(query), error_of(key, kv_cache)) / np.sqrt(DEPTH)
    moved = np.tanh((score * causal).max(2) / 2)[..., None]
    head = 2 * moved * np.maximum.accumulate(np.abs(value), axis=1)
    head += np.maximum.accumulate(error_of(value, kv_cache), axis=1)
    return np.einsum("bthd,hdw->btw", head, np.abs(np.float64(PARAMS["out"]["kernel"])))


@each_format
def test_decoding_is_within_the_bound_of_the_whole_forward_pass(kv_cache):
    whole = PLAIN.apply({"params": PARAMS}, X, mask=nn.make_causal_mask(X[..., 0]))
    np.testing.assert_allclose(decode(DECODER)[0], whole, atol=1e-5)  # Flax' own
    outputs, cache = decode(wrapped(kv_cache))
    error, bound = np.abs(outputs - whole), bound_of(kv_cache)
    assert (error <= bound + 1e-5).all()
    assert error.max() > bound.max() / 100  # the bound says something, and something was rounded
    assert cache["cached_key"].shape == cache["cached_value"].shape == (BATCH, LENGTH, HEADS, DEPTH)
    assert cache["cached_key"].scale.shape == (BATCH, LENGTH, HEADS, 1)
    assert cache["cache_index"] == LENGTH


@pytest.mark.parametrize(
    ("kv_cache", "source", "rounding"),
    [("int8", "mixed_bfloat16", 2e-2), ("float8", "float32", 2.0**-20)],
)
def test_it_is_attention_to_the_dequantized_cache(kv_cache, source, rounding):
    outputs, cache = decode(wrapped(kv_cache, source))
    key, value = (mk.dequantize(cache[n], jnp.float32) for n in ("cached_key", "cached_value"))
    for name, floats in (("key", key), ("value", value)):
        exact = projected(name)
        allowed = error_of(exact, kv_cache) + rounding * np.abs(exact).max()
        assert (np.abs(floats - exact) <= allowed).all()
    query = jnp.float32(projected("query"))
    mask = nn.make_causal_mask(X[..., 0])
    heads = nn.dot_product_attention(query, key, value, mask=mask)
    expected = jnp.einsum("bthd,hdw->btw", heads, PARAMS["out"]["kernel"]) + PARAMS["out"]["bias"]
    # bfloat16: five roundings of 2^-9 of entries up to the largest, and the root of 32 terms.
    atol = (2e-5 if source == "float32" else 5 * 2.0**-9) * float(jnp.abs(expected).max())
    np.testing.assert_allclose(np.float32(outputs), expected, atol=atol)


@pytest.mark.parametrize(
    "policy",
    [
        mp.DTypePolicy("mixed_float16", kv_cache="float8"),
        mp.QuantizedDTypePolicy("int8", "mixed_bfloat16", kv_cache="int8"),
        mp.QuantizedDTypePolicy("int8", "float32", kv_cache="int8", quantize_attention=True),
    ],
    ids=lambda policy: policy.name,
)
def test_linen_and_nnx_store_and_compute_the_same(policy):
    outputs, cache = decode(mp.wrap(DECODER, policy))
    layer = nnx_attention(policy)
    layer.init_cache(X.shape, outputs.dtype)
    step = nnx.jit(lambda layer, x: layer(x))
    found = jnp.concatenate([step(layer, X[:, i : i + 1]) for i in range(LENGTH)], 1)
    np.testing.assert_array_equal(found, outputs)
    held = {name: getattr(layer, name).get_value() for name in cache}
    assert_trees_equal(held, dict(cache))


def test_grouped_queries_attend_to_the_head_of_their_group_in_a_subclass_too():
    class Own(nnx.MultiHeadAttention):
        def __call__(self, x, **options):
            return super().__call__(x, **options) * 2

    layer = Own(HEADS, WIDTH, num_kv_heads=2, rngs=nnx.Rngs(3))
    layer.init_cache((1, LENGTH, WIDTH))
    graph = nnx.clone(layer)
    mp.wrap(graph, mp.DTypePolicy("float32", kv_cache="int8"))
    graph.init_cache((1, LENGTH, WIDTH))
    assert graph.cached_key is not None and graph.cached_key.shape == (1, LENGTH, 2, DEPTH)
    step = nnx.jit(lambda layer, x: layer(x, decode=True))
    for i in range(3):
        exact, found = (step(each, X[:1, i : i + 1]) for each in (layer, graph))
        assert 0 < jnp.abs(found - exact).max() < 0.02 * jnp.abs(exact).max()
    assert graph.decode is layer.decode is None
    run = nnx.jit(lambda layer, x: layer(x, decode=False, is_causal=True))
    np.testing.assert_allclose(run(layer, X[:1]), run(graph, X[:1]), atol=1e-5)  # without a cache


@pytest.mark.slow
@each_format
def test_one_head_or_position_does_not_cost_another_its_precision(kv_cache):
    policy = mp.DTypePolicy("float32", kv_cache=kv_cache)
    x = jax.random.normal(KEY, (BATCH, LENGTH, HEADS, DEPTH))
    planted = x.at[0, 2, 1, 3].set(1e6).at[1, 4, 0].set(0).at[1, 5, 2, 0].set(jnp.nan)

    @jax.jit
    def filled(x):
        cache = empty_cache(x.shape, jnp.float32, policy)
        for i in range(LENGTH):
            cache = write(cache, x[:, i : i + 1], jnp.int32(i))
        return cache

    plain, found = filled(x), filled(planted)
    changed = jnp.zeros((BATCH, LENGTH, HEADS), bool)
    changed = changed.at[0, 2, 1].set(True).at[1, 4, 0].set(True).at[1, 5, 2].set(True)
    for leaf in ("values", "scale"):
        before, after = (getattr(cache, leaf)[~changed] for cache in (plain, found))
        np.testing.assert_array_equal(np.float32(before), np.float32(after))
    assert found.scale[0, 2, 1, 0] == pytest.approx(1e6 / found.format.max, rel=1e-6)
    assert found.scale[1, 4, 0, 0] == 1 and not np.float32(found.values[1, 4, 0]).any()
    assert np.isnan(found.scale[1, 5, 2, 0])


@jax.jit
def step(caches, index, query, key, value):
    policy = mp.DTypePolicy(query.dtype.name, kv_cache="int8")
    run = DecodingStep(linen_attention, policy, "a layer", "here")
    return run(caches, index, query, key, value, None)


def test_a_nan_stays_visible_in_its_head_and_nowhere_else():
    policy = mp.DTypePolicy("float32", kv_cache="int8")
    caches = (empty_cache((1, LENGTH, HEADS, DEPTH), jnp.float32, policy),) * 2
    heads = X[:1, :, None].reshape(1, LENGTH, HEADS, DEPTH)
    for i in range(LENGTH):
        x = heads[:, i : i + 1]
        key = x.at[0, 0, 1, 0].set(jnp.nan) if i == 2 else x
        value = x.at[0, 0, 3, 0].set(jnp.inf) if i == 4 else x
        out, *caches = step(tuple(caches), i, x, key, value)
        lost = {h for h in range(HEADS) if not np.isfinite(out[0, 0, h]).all()}
        assert lost == ({1} if i >= 2 else set()) | ({3} if i >= 4 else set())


def test_values_too_small_for_float16_times_weights_survive():
    shape = (1, 64, 1, 8)
    caches = (empty_cache(shape, jnp.float16, mp.DTypePolicy("float16", kv_cache="int8")),) * 2
    query, small = jnp.zeros((1, 1, 1, 8), jnp.float16), jnp.float16(1e-5)
    for i in range(64):
        out, *caches = step(tuple(caches), i, query, query, query + small)
    # 1/64 * 1e-5 / 127 is below float16's least number, 6e-8; the mean of 64 equal values is not.
    np.testing.assert_allclose(np.float32(out), np.float32(small), rtol=2.0**-6)


@pytest.mark.parametrize("quantized", [False, True])
def test_weights_that_are_all_zero_give_zeros(quantized):
    """As dropout can leave them; the largest, by which they are divided, is zero then."""
    values = mk.quantize(jnp.ones((1, LENGTH, HEADS, DEPTH)), axis=-1)
    weights = jnp.zeros((1, HEADS, 1, LENGTH)).at[0, 0].set(0.5)
    output = mk.attention_output(weights, values, quantized=quantized)
    expected = np.zeros((1, 1, HEADS, DEPTH))
    expected[0, 0, 0] = LENGTH / 2
    np.testing.assert_allclose(output, expected, rtol=1e-6)


@pytest.mark.parametrize("quantized", [False, True])
def test_products_have_the_operands_and_the_precision_asked_for(quantized):
    """As a TPU has them, where precision means something."""
    cache = mk.quantize(jnp.ones((1, LENGTH, HEADS, DEPTH)), axis=-1)
    query, weights = jnp.ones((1, 1, HEADS, DEPTH)), jnp.ones((1, HEADS, 1, LENGTH))
    for function, x in ((mk.attention_scores, query), (mk.attention_output, weights)):
        run = jax.jit(functools.partial(function, quantized=quantized, precision="highest"))
        text = run.trace(x, cache).lower(lowering_platforms=("tpu",)).as_text()
        (product,) = (line for line in text.splitlines() if "dot_general" in line)
        operands = re.findall(r"tensor<[\dx]+x(\w+)>", product)
        assert operands == (["i8", "i8", "i32"] if quantized else ["f32", "f32", "f32"])
        assert quantized or "precision = [HIGHEST, HIGHEST]" in product


def test_beyond_the_end_the_last_position_is_written_again_as_in_flax():
    more = jnp.concatenate([X, X[:, :2] + 1], 1)
    outputs, cache = decode(wrapped(), more)
    expected, floats = decode(DECODER, more)
    assert cache["cache_index"] == floats["cache_index"] == LENGTH + 2
    bound = float(jnp.abs(expected).max()) / 50
    np.testing.assert_allclose(outputs, expected, atol=bound)
    np.testing.assert_allclose(
        mk.dequantize(cache["cached_value"])[:, -1], floats["cached_value"][:, -1], atol=bound
    )


def test_a_mask_and_sown_weights_are_those_of_flax():
    mask = (jnp.arange(LENGTH) != 1)[None, None, None]  # nobody sees position 1
    model = wrapped("int8")
    cache, floats = fresh(model), fresh(DECODER)
    quantized, exact = jax.jit(step_of(model)), jax.jit(step_of(DECODER))
    for i in range(3):
        x = X[:, i : i + 1]
        cache, found = quantized(cache, x, mask)
        floats, expected = exact(floats, x, mask)
        if i != 1:
            np.testing.assert_allclose(found, expected, atol=jnp.abs(expected).max() / 50)
    sown = {"mutable": ["cache", "intermediates"], "sow_weights": True}
    _, state = model.apply({"params": PARAMS, "cache": cache}, X[:, :1], **sown)
    (weights,) = state["intermediates"]["attention_weights"]
    assert weights.shape == (BATCH, HEADS, 1, LENGTH)
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)


def test_one_program_decodes_all_positions_in_the_memory_it_was_given():
    model = wrapped()
    cache = jax.tree.map(jnp.copy, fresh(model))
    run = jax.jit(step_of(model), donate_argnums=0)
    for i in range(LENGTH):
        before = cache
        cache, _ = run(cache, X[:, i : i + 1])
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before))
    assert run._cache_size() == 1
    assert_trees_equal(cache, decode(model)[1])


@each_format
def test_a_compiled_step_holds_no_float_copy_of_the_cache(kv_cache):
    layer = nn.MultiHeadDotProductAttention(8, decode=True)
    model = mp.wrap(layer, mp.DTypePolicy("mixed_bfloat16", kv_cache=kv_cache))
    length, width = 1024, 512
    x = jax.ShapeDtypeStruct((4, length, width), jnp.float32)
    variables = jax.eval_shape(model.init, KEY, x)
    one = jax.ShapeDtypeStruct((4, 1, width), jnp.float32)
    run = jax.jit(lambda v, x: model.apply(v, x, mutable=["cache"]))
    program = run.lower(variables, one).compile()
    size = 4 * length * width
    cached = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(variables["cache"]) if x.ndim)
    assert cached == 2 * size * (1 + 4 / (width // 8))
    for entries in _array_sizes(program.as_text(), ("f16", "bf16", "f32")):
        assert entries < size / 4
    # Keys and values are written to a copy, as nothing is donated here, and turned, in 8 bits each:
    # four copies in 8 bits. (Flax' own step takes eight times as much as one, in bfloat16.)
    memory = program.memory_analysis()
    assert memory is not None and memory.temp_size_in_bytes < 4.5 * size


def _array_sizes(text, dtypes):
    for dtype, shape in re.findall(r" = (\w+)\[([\d,]+)\]", text):
        if dtype in dtypes:
            yield np.prod([int(n) for n in shape.split(",")])


class Stack(nn.Module):
    decode: bool = True

    @nn.compact
    def __call__(self, x):
        body = nn.scan(
            lambda layer, x, _: (x + layer(x), None),
            variable_axes={"params": 0, "cache": 0},
            split_rngs={"params": True},
            length=3,
        )
        layer = nn.MultiHeadDotProductAttention(HEADS, decode=self.decode, name="layers")
        return body(layer, x, None)[0]


@pytest.mark.slow
def test_scanned_layers_beams_and_vmap_have_caches_of_their_own():
    model = mp.wrap(Stack(), mp.DTypePolicy("float32", kv_cache="int8"))
    variables = jax.jit(model.init)(KEY, X)
    keys = variables["cache"]["layers"]["cached_key"]
    assert keys.shape == (3, BATCH, LENGTH, HEADS, DEPTH)
    assert keys.scale.shape == (3, BATCH, LENGTH, HEADS, 1)

    @functools.partial(jax.jit, static_argnums=0)
    def run(model, variables, x):
        out, updated = model.apply(variables, x, mutable=["cache"])
        return out, {**variables, **updated}

    floats = jax.jit(Stack().init)(KEY, X)
    for i in range(3):
        out, variables = run(model, variables, X[:, i : i + 1])
        exact, floats = run(Stack(), floats, X[:, i : i + 1])
        np.testing.assert_allclose(out, exact, atol=0.02 * jnp.abs(exact).max())

    def reordered(order):
        beams = jnp.array(order)
        take = jax.tree.map(lambda x: x[:, beams] if x.ndim > 1 else x, variables["cache"])
        return run(model, {**variables, "cache": take}, X[beams, 3:4])[0]

    np.testing.assert_array_equal(reordered([1, 1]), reordered([0, 1])[jnp.array([1, 1])])

    single = jax.tree.map(lambda x: x[:, :, None] if x.ndim > 1 else x, variables["cache"])
    axes = jax.tree.map(lambda x: 1 if x.ndim > 1 else None, single)
    by_vmap = jax.vmap(lambda c, x: run(model, {**variables, "cache": c}, x)[0], (axes, 0))
    found = by_vmap(single, X[:, None, 3:4])[:, 0]
    np.testing.assert_allclose(found, reordered([0, 1]), atol=1e-6)


def test_a_cache_is_saved_and_restored_bit_for_bit(tmp_path):
    model = wrapped("float8")
    _, cache = decode(model)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "orbax", cache)
        checkpointer.wait_until_finished()
        assert_trees_equal(checkpointer.restore(tmp_path / "orbax", fresh(model)), cache)
    mp.save(tmp_path / "cache.safetensors", {"params": PARAMS, "cache": cache}, policy=model.policy)
    loaded = mp.load(tmp_path / "cache.safetensors")
    assert_trees_equal(loaded["cache"], dict(cache))
    assert mp.load_policy(tmp_path / "cache.safetensors") == model.policy


def test_quantized_weights_decode_too():
    model = mp.wrap(DECODER, mp.QuantizedDTypePolicy("int8", "float32", kv_cache="int8"))
    cache = fresh(model)
    variables = {"params": PARAMS, "cache": cache}
    quantized = mp.quantize(model, variables, X[:, :1], mutable=["cache"])
    assert quantized["params"]["key"]["kernel"].format.name == "int8"
    assert_trees_equal(quantized["cache"], cache)
    run = jax.jit(functools.partial(model.apply, mutable=["cache"]))
    np.testing.assert_array_equal(run(quantized, X[:, :1])[0], run(variables, X[:, :1])[0])
