"""The Keras and TensorFlow pages on dtype policies, statement by statement.

Every test quotes the lines that it translates. `keras.layers.Dense(10)` becomes
`mp.wrap(nn.Dense(10))`, `layer.dtype_policy` becomes `model.policy`, and `keras.config.*`,
`keras.dtype_policies.*` and `keras.mixed_precision.*` become `mp.*`. The pages:

https://keras.io/api/mixed_precision/policy/
https://www.tensorflow.org/versions/r2.4/api_docs/python/tf/keras/mixed_precision/experimental/Policy
"""

import concurrent.futures
import contextvars
import inspect
import json
from collections.abc import Callable, MutableMapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import mpjax as mp
import mpjax_kernels as mk
from tests.helpers import assert_trees_equal, dot_dtypes, in_a_thread

X = jnp.linspace(-1, 1, 6).reshape(2, 3)
TOKENS = jnp.arange(10).reshape(2, 5)
KEY = jax.random.key(0)

each_api = pytest.mark.parametrize("api", ["linen", "nnx"])


def filled(shapes: Any) -> Any:
    """Arrays for shapes; a random initialization would be compiled in every test."""

    def fill(shape: Any) -> Any:
        values = np.cos(np.arange(np.prod(shape.shape)))
        return jnp.asarray(values.reshape(shape.shape), shape.dtype)

    return jax.tree.map(fill, shapes)


def linen_variables(module: Any, x: Any = X) -> Any:
    return filled(jax.eval_shape(module.init, KEY, x))


def nnx_module(create: Callable[[], Any]) -> Any:
    graphdef, shapes = nnx.split(nnx.eval_shape(create))
    return nnx.merge(graphdef, filled(shapes))


def dense(api: str, **fields: Any) -> Any:
    """`keras.layers.Dense(10)`."""
    if api == "linen":
        return nn.Dense(10, **fields)
    return nnx_module(lambda: nnx.Linear(3, 10, rngs=nnx.Rngs(0), **fields))


def call(layer: Any, x: Any = X) -> Any:
    """The output of a layer, from the same weights whatever the policy."""
    if isinstance(layer, nn.Module):
        return jax.jit(layer.apply)(linen_variables(layer, x), x)
    graphdef, weights = nnx.split(layer)
    return jax.jit(lambda weights, x: nnx.merge(graphdef, weights)(x))(weights, x)


class Encoder(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(16, 8, name="embed")(tokens)
        y = nn.LayerNorm(name="norm")(x)
        x += nn.MultiHeadDotProductAttention(2, name="attention")(y)
        return nn.Dense(4, name="head")(x)


class NNXEncoder(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(16, 8, rngs=rngs)
        self.norm = nnx.LayerNorm(8, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
        self.head = nnx.Linear(8, 4, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens)
        return self.head(x + self.attention(self.norm(x)))


# -- DTypePolicy, FloatDTypePolicy, QuantizedDTypePolicy, QuantizedFloat8DTypePolicy


@each_api
def test_the_example_of_each_class(api):
    """
    >>> keras.config.set_dtype_policy("mixed_float16")
    >>> layer1 = keras.layers.Dense(10)
    >>> layer1.dtype_policy # layer1 will automatically use mixed precision
    <DTypePolicy "mixed_float16">
    >>> # Can optionally override layer to use float32
    >>> # instead of mixed precision.
    >>> layer2 = keras.layers.Dense(10, dtype="float32")
    >>> layer2.dtype_policy
    <DTypePolicy "float32">
    >>> # Set policy back to initial float32.
    >>> keras.config.set_dtype_policy('float32')
    """
    mp.set_dtype_policy("mixed_float16")
    layer1 = mp.wrap(dense(api))
    assert repr(layer1.policy) == '<DTypePolicy "mixed_float16">'
    layer2 = mp.wrap(dense(api), "float32")
    assert repr(layer2.policy) == '<DTypePolicy "float32">'
    mp.set_dtype_policy("float32")
    assert call(layer1).dtype == jnp.float16
    assert call(layer2).dtype == jnp.float32
    assert repr(mp.wrap(dense(api)).policy) == '<DTypePolicy "float32">'


@pytest.mark.parametrize(
    ("cls", "signature"),
    [
        (mp.DTypePolicy, "name=None"),
        (mp.FloatDTypePolicy, "name=None"),
        (mp.QuantizedDTypePolicy, "mode, source_name=None"),
        (mp.QuantizedFloat8DTypePolicy, "mode, source_name=None, amax_history_length=1024"),
        (mp.DTypePolicyMap, "default_policy=None, policy_map=None"),
        (mp.dtype_policy, ""),
        (mp.set_dtype_policy, "policy"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_signatures(cls, signature):
    """
    keras.dtype_policies.DTypePolicy(name=None)
    keras.dtype_policies.FloatDTypePolicy(name=None)
    keras.dtype_policies.QuantizedDTypePolicy(mode, source_name=None)
    keras.dtype_policies.QuantizedFloat8DTypePolicy(
        mode, source_name=None, amax_history_length=1024
    )
    keras.dtype_policies.DTypePolicyMap(default_policy=None, policy_map=None)
    keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    """
    positional = [
        str(parameter.replace(annotation=inspect.Parameter.empty))
        for parameter in inspect.signature(cls).parameters.values()
        if parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    ]
    assert ", ".join(positional) == signature


@each_api
@pytest.mark.parametrize(
    ("name", "compute", "variable"),
    [
        ("float32", "float32", "float32"),
        ("bfloat16", "bfloat16", "bfloat16"),
        ("mixed_float16", "float16", "float32"),
        ("mixed_bfloat16", "bfloat16", "float32"),
        ("int8_from_mixed_bfloat16", "bfloat16", "float32"),
    ],
)
def test_a_policy_determines_the_computation_and_variable_dtypes(api, name, compute, variable):
    """
    A dtype policy determines a layer's computation and variable dtypes.

    name: The policy name, which determines the compute and variable dtypes. Can be any dtype
    name, such as "float32" or "float64", which causes both the compute and variable dtypes will
    be that dtype. Can also be the string "mixed_float16" or "mixed_bfloat16", which causes the
    compute dtype to be float16 or bfloat16 and the variable dtype to be float32.

    An NNX module has made its variables before `wrap` sees it: they keep the dtype they have.
    """
    float64 = mp.DTypePolicy("float64")  # `test_errors.py` wraps with it
    assert float64.compute_dtype == float64.variable_dtype == "float64"
    layer = mp.wrap(dense(api), name)
    assert (layer.policy.compute_dtype, layer.policy.variable_dtype) == (compute, variable)
    assert call(layer).dtype == compute
    if api == "linen":
        params = jax.eval_shape(layer.init, KEY, X)["params"]
        assert {w.dtype.name for w in params.values()} == {variable}


@each_api
def test_each_layer_has_a_policy(api):
    """Each layer has a policy."""
    model, variables = encoder(api, "mixed_bfloat16")
    policies = mp.layer_policies(model, *variables)
    projections = [f"attention/{name}" for name in ("key", "out", "query", "value")]
    assert sorted(policies) == sorted([*projections, "embed", "head", "norm"])
    assert set(policies.values()) == {mp.DTypePolicy("mixed_bfloat16")}


@each_api
@pytest.mark.parametrize("name", ["mixed_float16", "mixed_bfloat16"])
def test_passed_to_a_layer_or_set_globally(api, name):
    """
    Policies can be passed to the dtype argument of layer constructors, or a global policy can be
    set with keras.config.set_dtype_policy.

    Mixed precision can be enabled by passing "mixed_float16" or "mixed_bfloat16" to
    keras.mixed_precision.set_dtype_policy().
    """
    passed = mp.wrap(dense(api), name)
    mp.set_dtype_policy(name)
    taken = mp.wrap(dense(api))
    assert passed.policy == taken.policy == mp.dtype_policy()
    y = call(taken)
    assert y.dtype == name.removeprefix("mixed_")
    assert_trees_equal(call(passed), y)


@each_api
@pytest.mark.parametrize(
    "policy",
    [
        mp.DTypePolicy("float32"),
        mp.FloatDTypePolicy("mixed_float16"),
        mp.DTypePolicy("mixed_bfloat16"),
        mp.QuantizedDTypePolicy("int8", "mixed_bfloat16"),
    ],
    ids=str,
)
def test_a_name_is_equivalent_to_the_policy(api, policy):
    """
    In the example above, passing dtype="float32" to the layer is equivalent to passing
    dtype=keras.config.DTypePolicy("float32"). In general, passing a dtype policy name to a layer
    is equivalent to passing the corresponding policy, so it is never necessary to explicitly
    construct a DTypePolicy object.
    """
    by_name, by_policy = mp.wrap(dense(api), policy.name), mp.wrap(dense(api), policy)
    assert by_name.policy == by_policy.policy == policy
    assert type(by_name) is type(by_policy)
    assert_trees_equal(call(by_name), call(by_policy))
    assert mp.DTypePolicyMap(policy.name, {"a": policy.name}) == mp.DTypePolicyMap(
        policy, {"a": policy}
    )
    with mp.dtype_policy_scope(policy.name):
        assert mp.dtype_policy() == policy
    mp.set_dtype_policy(policy.name)
    assert mp.dtype_policy() == policy == mp.get_policy(policy.name)


@each_api
@pytest.mark.parametrize("override", ["dtype=", "nested wrap"])
def test_a_layer_inside_a_model_can_be_overridden(api, override):
    """
    >>> # Can optionally override layer to use float32
    >>> # instead of mixed precision.
    >>> layer2 = keras.layers.Dense(10, dtype="float32")
    """
    if override == "dtype=":
        layer2 = dense(api, dtype=jnp.float32)
    else:
        layer2 = mp.wrap(dense(api), "float32")

    class Model(nn.Module):
        layer2: Any

        @nn.compact
        def __call__(self, x):
            return self.layer2(nn.Dense(3, name="layer1")(x))

    class NNXModel(nnx.Module):
        def __init__(self):
            self.layer1 = nnx.Linear(3, 3, rngs=nnx.Rngs(0))
            self.layer2 = layer2

        def __call__(self, x):
            return self.layer2(self.layer1(x))

    mp.set_dtype_policy("mixed_float16")
    model: Any = mp.wrap(Model(layer2) if api == "linen" else NNXModel())
    variables = [linen_variables(model), X] if api == "linen" else []
    assert call(model).dtype == jnp.float32
    assert dot_dtypes(lambda: call(model)) == [("float16",) * 2, ("float32",) * 2]
    assert {k: repr(p) for k, p in mp.layer_policies(model, *variables).items()} == {
        "layer1": '<DTypePolicy "mixed_float16">',
        "layer2": '<DTypePolicy "float32">',
    }


# -- DTypePolicyMap


def test_the_example_of_the_map():
    """
    >>> from keras.src import dtype_policies
    >>> bfloat16 = dtype_policies.DTypePolicy("bfloat16")
    >>> float16 = dtype_policies.DTypePolicy("float16")
    >>> float32 = dtype_policies.DTypePolicy("float32")
    >>> policy_map = DTypePolicyMap(default_policy=float32)
    >>> policy_map["encoder/layer_0/dense"] = bfloat16
    >>> policy_map["encoder/.*"] = float16
    >>> policy_map["decoder"] = bfloat16
    >>> policy_map["encoder/layer_0/dense"].name
    'bfloat16'
    >>> policy_map["encoder/attention/query"].name
    'float16'
    >>> policy_map["decoder/attention"].name
    'float32'
    >>> policy_map["encoder/attention/.*"] = bfloat16
    "encoder/attention/query" now matches two patterns: "encoder/.*", "encoder/attention/.*"
    >>> try:
    ... policy_map["encoder/attention/query"]
    ... except ValueError as e:
    ... print(e)
    Path 'encoder/attention/query' matches multiple dtype policy ..
    """
    bfloat16 = mp.DTypePolicy("bfloat16")
    float16 = mp.DTypePolicy("float16")
    float32 = mp.DTypePolicy("float32")
    policy_map = mp.DTypePolicyMap(default_policy=float32)
    policy_map["encoder/layer_0/dense"] = bfloat16
    policy_map["encoder/.*"] = float16
    policy_map["decoder"] = bfloat16
    assert policy_map["encoder/layer_0/dense"].name == "bfloat16"
    assert policy_map["encoder/attention/query"].name == "float16"
    assert policy_map["decoder/attention"].name == "float32"
    policy_map["encoder/attention/.*"] = bfloat16
    message = (
        "^Path 'encoder/attention/query' matches multiple dtype policy .*"
        r"'encoder/\.\*', 'encoder/attention/\.\*'"
    )
    with pytest.raises(ValueError, match=message):
        policy_map["encoder/attention/query"]


def test_the_map_is_dict_like_and_maps_paths_to_policies():
    """
    Dict-like object mapping layer paths to DTypePolicy instances.

    Internally, DTypePolicyMap uses a string as a key and a DTypePolicy as the value.
    """
    policy_map = mp.DTypePolicyMap("float32", {"head": "bfloat16"})
    assert isinstance(policy_map, MutableMapping)
    assert dict(policy_map) == {"head": mp.DTypePolicy("bfloat16")}
    assert policy_map.pop("head") == mp.DTypePolicy("bfloat16") and len(policy_map) == 0


def test_arguments_of_the_map():
    """
    default_policy: DTypePolicy instance specifying the default dtype policy. If not specified,
    the value will default to keras.config.dtype_policy().
    policy_map: ... DTypePolicy instances. Defaults to None
    """
    assert mp.DTypePolicyMap().default_policy == mp.dtype_policy() == mp.DTypePolicy("float32")
    mp.set_dtype_policy("mixed_bfloat16")
    assert mp.DTypePolicyMap().default_policy == mp.dtype_policy()
    assert len(mp.DTypePolicyMap()) == 0
    assert mp.DTypePolicyMap(None, None) == mp.DTypePolicyMap()


@each_api
@pytest.mark.parametrize("key", ["attention/query", "attention/qu.*", ".*/query"])
def test_keys_are_the_paths_of_layers_or_expressions(api, key):
    """
    Typically, the key used for querying is the Layer.path. However, it is also possible to set a
    regex as the key.
    """
    model, variables = encoder(api, mp.DTypePolicyMap("mixed_bfloat16", {key: "float32"}))
    policies = mp.layer_policies(model, *variables)
    assert policies.pop("attention/query").name == "float32"
    assert {policy.name for policy in policies.values()} == {"mixed_bfloat16"}
    assert all(model.policy[path] == policy for path, policy in policies.items())


def encoder(api: str, policy: Any) -> tuple[Any, list[Any]]:
    """A wrapped encoder and, for Linen, its variables."""
    if api == "nnx":
        return mp.wrap(nnx_module(lambda: NNXEncoder(nnx.Rngs(0))), policy), []
    return mp.wrap(Encoder(), policy), [linen_variables(Encoder(), TOKENS)]


def output(model: Any, variables: list[Any]) -> Any:
    if isinstance(model, nn.Module):
        return jax.jit(model.apply)(*variables, TOKENS)
    return nnx.jit(lambda m: m(TOKENS))(model)


def quantized(model: Any, variables: list[Any]) -> tuple[Any, Any]:
    """The model's output from quantized weights, and its weights."""
    if isinstance(model, nn.Module):
        variables = [mp.quantize(model, *variables, TOKENS)]
        return output(model, variables), variables[0]["params"]
    mp.quantize(model)
    return output(model, []), nnx.to_pure_dict(nnx.state(model))


MIXED = {
    "attention/(query|key|value)": "int8_from_mixed_bfloat16",
    "head": "int8_from_mixed_bfloat16",
}


def get_config(model: Any, variables: list[Any]) -> dict[str, Any]:
    """`MyMultiHeadAttention.get_config`, of any model."""
    config = {"name": "encoder"}
    dtype_policy_map = mp.DTypePolicyMap()
    for path, policy in mp.layer_policies(model, *variables).items():
        if policy.quantization_mode is not None:
            dtype_policy_map[path] = policy
    if len(dtype_policy_map) > 0:
        config.update({"dtype": mp.serialize(dtype_policy_map)})
    return config


@each_api
def test_the_get_config_example(api):
    """
    DTypePolicyMap can be used in get_config in layers and subclasses to support a complex
    configurations of dtype policies. For example, we can modify get_config in
    layers.MultiHeadAttention as follows to support the mixing of dtype policies, such as
    quantization.

    @keras.saving.register_keras_serializable("MyPackage")
    class MyMultiHeadAttention(keras.layers.MultiHeadAttention):
        def get_config(self):
            config = super().get_config()
            dtype_policy_map = dtype_policies.DTypePolicyMap()
            for layer in self._flatten_layers():
                if layer.dtype_policy.quantization_mode is not None:
                    dtype_policy_map[layer.path] = layer.dtype_policy
            if len(dtype_policy_map) > 0:
                config.update({"dtype": dtype_policy_map})
            return config
    """
    mp.set_dtype_policy("mixed_bfloat16")
    model, variables = encoder(api, mp.DTypePolicyMap(None, MIXED))
    policies = mp.layer_policies(model, *variables)
    assert {path: p.name for path, p in policies.items()} == {
        "attention/key": "int8_from_mixed_bfloat16",
        "attention/out": "mixed_bfloat16",
        "attention/query": "int8_from_mixed_bfloat16",
        "attention/value": "int8_from_mixed_bfloat16",
        "embed": "mixed_bfloat16",
        "head": "int8_from_mixed_bfloat16",
        "norm": "mixed_bfloat16",
    }
    text = json.dumps(get_config(model, variables))
    loaded = mp.deserialize(json.loads(text)["dtype"])
    assert isinstance(loaded, mp.DTypePolicyMap)
    assert sorted(loaded) == ["attention/key", "attention/query", "attention/value", "head"]
    again, _ = encoder(api, loaded)
    assert list(mp.layer_policies(again, *variables).items()) == list(policies.items())
    y, weights = quantized(model, variables)
    assert_trees_equal(quantized(again, variables), (y, weights))
    assert y.dtype == jnp.bfloat16
    int8 = [w for w in jax.tree.leaves(weights, is_leaf=is_qtensor) if is_qtensor(w)]
    assert len(int8) == 4


def is_qtensor(x: Any) -> bool:
    return isinstance(x, mk.QTensor)


@each_api
def test_a_map_filled_with_every_layer_wraps_to_the_same_result(api):
    """... to support the mixing of dtype policies, such as quantization."""
    default = mp.DTypePolicy("mixed_bfloat16", output_dtype="float32")
    policy = mp.DTypePolicyMap(default, {**MIXED, "norm": "float32", "embed": "float16"})
    model, variables = encoder(api, policy)
    policies = mp.layer_policies(model, *variables)
    filled = mp.DTypePolicyMap(default, dict(policies))
    assert len(filled) == 7
    loaded = mp.deserialize(json.loads(json.dumps(mp.serialize(filled))))
    again, _ = encoder(api, loaded)
    assert list(mp.layer_policies(again, *variables).items()) == list(policies.items())
    assert_trees_equal(output(again, variables), output(model, variables))


@each_api
def test_a_single_layer_is_its_own_only_path(api):
    """dtype_policy_map[layer.path] = layer.dtype_policy"""
    layer = mp.wrap(dense(api), "int8_from_mixed_bfloat16")
    variables = [linen_variables(nn.Dense(10))] if api == "linen" else []
    filled = mp.DTypePolicyMap("float32", dict(mp.layer_policies(layer, *variables)))
    assert dict(filled) == {"": layer.policy}
    again = mp.wrap(dense(api), mp.deserialize(mp.serialize(filled)))
    assert mp.layer_policies(again, *variables) == {"": layer.policy}
    assert_trees_equal(call(again), call(layer))


@pytest.mark.parametrize("api", ["linen", "linen, jit", "nnx"])
def test_layers_are_listed_in_the_models_own_order(api):
    """for layer in self._flatten_layers(): ..."""

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3, name="last")(nn.Dense(3, name="middle")(nn.Dense(3, name="one")(x)))

    class NNXModel(nnx.Module):
        def __init__(self):
            self.one = nnx.Linear(3, 3, rngs=nnx.Rngs(0))
            self.middle = nnx.Linear(3, 3, rngs=nnx.Rngs(0))
            self.last = nnx.Linear(3, 3, rngs=nnx.Rngs(0))

    model: Any = mp.wrap(NNXModel() if api == "nnx" else Model(), "float32")
    if api == "nnx":
        policies = mp.layer_policies(model)
    else:
        init = jax.jit(model.init) if "jit" in api else model.init
        policies = mp.layer_policies(model, init(KEY, X), X)
    assert list(policies) == ["one", "middle", "last"]


# -- dtype_policy, set_dtype_policy


def test_dtype_policy_returns_the_default_policy_object():
    """Returns the current default dtype policy object."""
    assert mp.dtype_policy() == mp.DTypePolicy("float32")
    policy = mp.DTypePolicy("mixed_float16", loss_scale=128)
    mp.set_dtype_policy(policy)
    assert mp.dtype_policy() is policy


@each_api
def test_set_dtype_policy_sets_it_globally(api):
    """
    Sets the default dtype policy globally.

    >>> keras.config.set_dtype_policy("mixed_float16")

    Globally is in the whole process: threads that run already see it, and set it for others.
    """
    with concurrent.futures.ThreadPoolExecutor(1) as executor:
        assert executor.submit(mp.dtype_policy).result().name == "float32"
        mp.set_dtype_policy("mixed_float16")
        layer = executor.submit(lambda: mp.wrap(dense(api))).result()
    assert repr(layer.policy) == '<DTypePolicy "mixed_float16">'
    in_a_thread(lambda: mp.set_dtype_policy("mixed_bfloat16"))
    assert repr(mp.wrap(dense(api)).policy) == '<DTypePolicy "mixed_bfloat16">'


@each_api
def test_none_is_resolved_once_in_wrap(api):
    """
    >>> keras.config.set_dtype_policy("mixed_float16")
    >>> layer1 = keras.layers.Dense(10)
    >>> # Set policy back to initial float32.
    >>> keras.config.set_dtype_policy('float32')
    """
    traces = []

    def run(layer, x):
        traces.append(layer)
        return layer(x)

    mp.set_dtype_policy("mixed_float16")
    layer = mp.wrap(dense(api))
    compiled = nnx.jit(run) if api == "nnx" else jax.jit(lambda _, x: run(bound, x))
    bound = layer.bind(linen_variables(nn.Dense(10))) if api == "linen" else layer
    carried = layer if api == "nnx" else None
    y = compiled(carried, X)
    mp.set_dtype_policy("float32")
    assert layer.policy.name == "mixed_float16"
    assert call(layer).dtype == compiled(carried, X).dtype == y.dtype == jnp.float16
    with mp.dtype_policy_scope("mixed_bfloat16"):
        assert_trees_equal(compiled(carried, X), y)
        copied = layer.clone() if api == "linen" else nnx.clone(layer)
        assert call(copied).dtype == jnp.float16
    assert len(traces) == 1


def test_a_function_that_wraps_keeps_the_policy_it_was_traced_under():
    """
    >>> # Set policy back to initial float32.
    >>> keras.config.set_dtype_policy('float32')
    """
    variables = linen_variables(nn.Dense(10))
    compiled = jax.jit(lambda variables, x: mp.wrap(nn.Dense(10)).apply(variables, x))
    mp.set_dtype_policy("mixed_bfloat16")
    assert compiled(variables, X).dtype == jnp.bfloat16
    mp.set_dtype_policy("float32")
    assert compiled(variables, X).dtype == jnp.bfloat16
    assert mp.wrap(nn.Dense(10)).apply(variables, X).dtype == jnp.float32


@each_api
def test_a_scope_belongs_to_its_context(api):
    """
    The pages have no scope. `dtype_policy_scope` is one of a context: a thread started inside
    does not see it, unless it runs in a copy of the context.
    """

    def wrapped_policy():
        return mp.wrap(dense(api)).policy.name

    with mp.dtype_policy_scope("mixed_bfloat16"):
        assert wrapped_policy() == "mixed_bfloat16"
        assert in_a_thread(wrapped_policy) == "float32"
        context = contextvars.copy_context()
        assert in_a_thread(lambda: context.run(wrapped_policy)) == "mixed_bfloat16"
        layer = mp.wrap(dense(api))
    assert wrapped_policy() == "float32"
    assert in_a_thread(lambda: call(layer).dtype) == jnp.bfloat16


@each_api
def test_a_quantized_global_policy_leaves_other_layers_in_its_source_precision(api):
    """
    Policies can be passed to the dtype argument of layer constructors, or a global policy can be
    set with keras.config.set_dtype_policy.

    The pages do not say what a quantized one means for a layer that cannot be quantized.
    """
    mp.set_dtype_policy("int8_from_mixed_bfloat16")
    model, variables = encoder(api, None)
    source, _ = encoder(api, "mixed_bfloat16")
    assert model.policy == mp.QuantizedDTypePolicy("int8", "mixed_bfloat16")
    for name, x in {"embed": TOKENS, "norm": jnp.linspace(-1, 1, 80).reshape(2, 5, 8)}.items():
        y, expected = (call(part(m, name), x) for m in (model, source))
        assert y.dtype == jnp.bfloat16
        assert_trees_equal(y, expected)
    y = output(model, variables)
    assert y.dtype == jnp.bfloat16
    quantized_y, weights = quantized(model, variables)
    # A float kernel is quantized where it is used, alike; a table only where it is stored.
    error, size = (np.linalg.norm(np.asarray(a, np.float32)) for a in (quantized_y - y, y))
    assert error < 0.02 * size
    assert is_qtensor(weights["embed"]["embedding"])
    assert weights["norm"]["scale"].dtype == jnp.float32
    for layer in (weights["head"], *weights["attention"].values()):
        assert is_qtensor(layer["kernel"]) and layer["bias"].dtype == jnp.float32


def part(model: Any, name: str) -> Any:
    """One layer of the encoder, under the model's policy."""
    if isinstance(model, nnx.Module):
        return getattr(model, name)
    layer: Any = {"embed": nn.Embed(16, 8), "norm": nn.LayerNorm()}[name]
    return mp.wrap(layer, model.policy)


# -- tf.keras.mixed_precision.experimental.Policy


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("mixed_float16", mp.DynamicLossScale()),
        ("float16", None),
        ("float32", None),
        ("mixed_bfloat16", None),
    ],
)
@each_api
def test_auto_means_dynamic_for_mixed_float16_only(api, name, expected):
    """
    'mixed_float16' or 'mixed_bfloat16': The compute dtype is float16 or bfloat16, while the
    variable dtype is float32. With 'mixed_float16', a dynamic loss scale is used.

    loss_scale: ... Defaults to "auto". In the "auto" case: 1) if name is "mixed_float16", then
    use loss_scale="dynamic". 2) otherwise, do not use a loss scale.
    """
    assert mp.DTypePolicy(name).loss_scale == expected
    assert mp.DTypePolicy(name, loss_scale="auto") == mp.DTypePolicy(name)
    assert mp.wrap(dense(api), name).policy.loss_scale == expected


LOSS_SCALES = [
    (mp.DynamicLossScale(2.0**10, 100), mp.DynamicLossScale(2.0**10, 100)),
    (mp.StaticLossScale(128), mp.StaticLossScale(128.0)),
    (128, mp.StaticLossScale(128.0)),
    ("dynamic", mp.DynamicLossScale()),
    (None, None),
]


@pytest.mark.parametrize(("loss_scale", "expected"), LOSS_SCALES, ids=str)
@pytest.mark.parametrize("name", ["float16", "mixed_float16"])
def test_the_loss_scale_argument_survives_the_config(name, loss_scale, expected):
    """
    loss_scale: A tf.compat.v1.mixed_precision.LossScale, an int (which uses a FixedLossScale),
    the string "dynamic" (which uses a DynamicLossScale), or None (which uses no loss scale).
    loss_scale: Returns the loss scale of this Policy.
    Methods: from_config, get_config

    When deserializing objects with an experimental policy ... the policy will be deserialized as
    the non-experimental tf.keras.mixed_precision.Policy, and the loss scale will silently be
    dropped. (Here it is kept.)
    """
    policy = mp.DTypePolicy(name, loss_scale=loss_scale)
    assert policy.loss_scale == expected
    assert policy.name == name
    config = json.loads(json.dumps(policy.get_config()))
    assert mp.DTypePolicy.from_config(config) == policy
    restored = mp.deserialize(json.loads(json.dumps(mp.serialize(policy))))
    assert restored == policy and restored.loss_scale == expected
    mapped = mp.DTypePolicyMap(policy, {"head": policy})
    restored = mp.deserialize(json.loads(json.dumps(mp.serialize(mapped))))
    assert restored.loss_scale == expected
    assert restored["head"].loss_scale == expected  # pyright: ignore[reportIndexIssue]


@each_api
def test_layers_do_not_use_the_loss_scale(api):
    """
    Only tf.keras.Models, not layers, use the loss scale, and it is only used during Model.fit,
    Model.train_on_batch, and other similar methods.
    """

    def output_and_gradient(loss_scale):
        layer = mp.wrap(dense(api), mp.DTypePolicy("mixed_float16", loss_scale=loss_scale))
        loss = jax.value_and_grad(lambda x: call(layer, x).astype(jnp.float32).sum())
        return jax.jit(loss)(X)

    unscaled = output_and_gradient(None)
    assert_trees_equal(output_and_gradient("dynamic"), unscaled)
    assert_trees_equal(output_and_gradient(1024), unscaled)


@each_api
@pytest.mark.parametrize("half", ["float16", "bfloat16"])
def test_compute_dtype_is_that_of_inputs_and_outputs_of_the_products(api, half):
    """
    compute_dtype: The compute dtype of this policy. This is the dtype layers will do their
    computations in. Typically layers output tensors with the compute dtype as well.

    The compute dtype is the dtype of the inputs and outputs of the TensorFlow ops that the layer
    executes. ... a tf.keras.layers.Dense layer, when run on a GPU with a float16 compute dtype,
    will pass float16 inputs to tf.linalg.matmul.
    """
    layer = mp.wrap(dense(api), f"mixed_{half}")
    assert layer.policy.compute_dtype == half
    assert call(layer).dtype == half
    variables = linen_variables(nn.Dense(10)) if api == "linen" else None
    run = layer if variables is None else lambda x: layer.apply(variables, x)
    assert dot_dtypes(run, X) == [(half, half)]


def test_products_may_use_float32_inside():
    """
    But, tf.linalg.matmul will do use float32 intermediate math. The performance benefit of
    float16 is still apparent, ... while still keeping intermediate computations in float32.
    """
    layer = mp.wrap(nn.Dense(1, use_bias=False), "mixed_float16")
    ones = {"params": {"kernel": jnp.ones((4096, 1))}}
    # adding ones in float16 gets stuck at 2048, where the spacing becomes 2
    assert layer.apply(ones, jnp.ones((1, 4096))) == 4096


@pytest.mark.parametrize("name", ["float16", "bfloat16", "mixed_bfloat16"])
def test_variable_dtype_is_what_layers_create_their_variables_in(name):
    """
    variable_dtype: The variable dtype of this policy. This is the dtype layers will create their
    variables in, unless a layer explicitly chooses a different dtype.
    """

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(2, name="own", param_dtype=jnp.float16)(nn.Dense(3, name="free")(x))

    model = mp.wrap(Model(), name)
    params = jax.eval_shape(model.init, KEY, X)["params"]
    assert {w.dtype.name for w in params["free"].values()} == {model.policy.variable_dtype}
    assert {w.dtype.name for w in params["own"].values()} == {"float16"}


@each_api
def test_layers_cast_variables_to_the_compute_dtype(api, strict_promotion):
    """
    If this is different than Policy.compute_dtype, Layers will cast variables to the compute
    dtype to avoid type errors.
    """

    class Linear(nn.Module):
        @nn.compact
        def __call__(self, x):
            return x @ self.param("w", nn.initializers.ones, (3, 4))

    class NNXLinear(nnx.Module):
        def __init__(self):
            self.w = nnx.Param(jnp.ones((3, 4)))

        def __call__(self, x):
            return x @ self.w[...]

    x = X.astype(jnp.bfloat16)
    plain: Any = Linear() if api == "linen" else NNXLinear()
    with pytest.raises(jax.dtypes.TypePromotionError, match="no available implicit dtype promot"):
        call(plain, x)
    assert call(mp.wrap(plain, "mixed_bfloat16"), x).dtype == jnp.bfloat16


@each_api
def test_regularizers_run_in_the_variable_dtype(api):
    """Variable regularizers are run in the variable dtype, not the compute dtype."""
    value = 1 + 2**-8  # bfloat16 rounds it to 1
    layer = mp.wrap(dense(api), "mixed_bfloat16")

    def penalty(weights):
        return sum(jnp.sum(w**2) for w in jax.tree.leaves(weights))

    def loss(weights):
        if api == "linen":
            y = layer.apply({"params": weights}, X)
        else:
            model = nnx.merge(nnx.graphdef(layer), weights)
            assert model.kernel[...].dtype == model.bias[...].dtype == jnp.float32
            y = model(X)
        return 0 * y.astype(jnp.float32).sum() + penalty(weights)

    weights = (
        linen_variables(nn.Dense(10))["params"] if api == "linen" else nnx.state(layer, nnx.Param)
    )
    weights = jax.tree.map(lambda w: jnp.full_like(w, value), weights)
    l2, gradients = jax.jit(jax.value_and_grad(loss))(weights)
    # 40 weights; every sum fits the 24 bits of float32
    assert l2.dtype == jnp.float32 and l2 == 40 * value**2 != 40
    assert_trees_equal(gradients, jax.tree.map(lambda w: 2 * w, weights))
