"""Single policies: names, modes, configs, equality, and what jax sees of them."""

import copy
import dataclasses
import json
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mpjax as mp
from mpjax._policy_map import freeze

POLICIES = {
    "DTypePolicy": mp.DTypePolicy("mixed_bfloat16"),
    "FloatDTypePolicy": mp.FloatDTypePolicy("float32"),
    "jmp": mp.DTypePolicy("params=float64,compute=bfloat16,output=float32"),
    "loss_scale": mp.DTypePolicy("float16", loss_scale=mp.DynamicLossScale(8.0, 3, 4.0, 0.5)),
    "no_loss_scale": mp.DTypePolicy("mixed_float16", loss_scale=None),
    "QuantizedDTypePolicy": mp.QuantizedDTypePolicy("int8_static", "mixed_bfloat16"),
    "int4": mp.QuantizedDTypePolicy("int4/64", "mixed_float16", symmetric=False, loss_scale=16),
    "QuantizedFloat8DTypePolicy": mp.QuantizedFloat8DTypePolicy("float8", "mixed_bfloat16", 123),
    "float8_row": mp.QuantizedFloat8DTypePolicy("float8/row", "bfloat16", output_dtype="float32"),
    "DTypePolicyMap": mp.DTypePolicyMap(
        "mixed_bfloat16",
        {
            "head": mp.DTypePolicy("float16", loss_scale=2),
            "blocks_.*": mp.QuantizedFloat8DTypePolicy("float8", "mixed_bfloat16", 123),
        },
    ),
    "FrozenDTypePolicyMap": freeze(mp.DTypePolicyMap(None, {"b": "float16", "a": "float32"})),
}
STATICS = {
    **POLICIES,
    "DynamicLossScale": mp.DynamicLossScale(8.0, 3),
    "StaticLossScale": mp.StaticLossScale(4),
    "Mode": mp.modes()[0],
}
each_policy = pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES.keys())
each_static = pytest.mark.parametrize("value", STATICS.values(), ids=STATICS.keys())


def quantized_classes():
    return [mp.QuantizedDTypePolicy, mp.QuantizedFloat8DTypePolicy]


# -- every class of the family


def test_the_round_trips_below_cover_every_public_policy_class():
    family = {mp.DTypePolicy, mp.FloatDTypePolicy, mp.DTypePolicyMap, mp.FrozenDTypePolicyMap}
    assert {type(policy) for policy in POLICIES.values()} == family.union(quantized_classes())


@each_policy
def test_config_round_trip_through_json(policy):
    config = json.loads(json.dumps(mp.serialize(policy)))
    written = copy.deepcopy(config)
    restored = mp.deserialize(config)
    assert type(restored) is type(policy)
    assert restored == policy
    assert mp.get_policy(config) == policy
    assert type(policy).from_config(policy.get_config()) == policy
    assert config == written


@each_static
@pytest.mark.parametrize(
    "duplicate",
    [copy.copy, copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))],
    ids=["copy", "deepcopy", "pickle"],
)
def test_copies_are_equal(value, duplicate):
    copied = duplicate(value)
    assert type(copied) is type(value)
    assert copied == value
    assert repr(copied) == repr(value)


@each_static
def test_is_a_pytree_without_leaves(value):
    leaves, treedef = jax.tree.flatten(value)
    assert leaves == []
    assert jax.tree.unflatten(treedef, []) == value
    assert jax.tree.map(lambda leaf: 1 / 0, value) == value


@each_static
def test_is_frozen_and_hashable_unless_it_is_the_map(value):
    if isinstance(value, mp.DTypePolicyMap):
        with pytest.raises(TypeError, match="unhashable type: 'DTypePolicyMap'"):
            hash(value)
        return
    assert hash(value) == hash(copy.deepcopy(value))
    with pytest.raises(dataclasses.FrozenInstanceError, match="cannot assign to field"):
        value.name = "float64"


@each_policy
def test_passes_through_jit_vmap_and_scan(policy):
    def cast(policy, x):
        return policy, x.astype(policy.compute_dtype)

    x = jnp.arange(6.0).reshape(2, 3)
    returned, y = jax.jit(cast)(policy, x)
    assert returned == policy
    assert y.dtype == policy.compute_dtype
    assert jax.vmap(cast, in_axes=(None, 0), out_axes=(None, 0))(policy, x)[0] == policy
    assert jax.lax.scan(cast, policy, x)[0] == policy


@pytest.mark.parametrize(
    "spellings",
    [
        ["mixed_bfloat16", "params=float32,compute=bfloat16", " c = bf16 , p = f32 "],
        ["mixed_float16", "compute=float16", "p=f32,c=f16,o=f16"],
        ["bfloat16", "p=bf16", "params=bfloat16,compute=bfloat16,output=bfloat16", jnp.bfloat16],
        ["params=float64,compute=float32", "o=f32,c=f32,p=f64"],
        [
            "int8_static_from_mixed_bfloat16",
            "int8_static_from_p=f32,c=bf16",
            mp.QuantizedDTypePolicy("int8", "mixed_bfloat16", activations="static"),
        ],
        [
            "int4_from_float32",
            "int4/-1_from_float32",
            "int4/None_from_float32",
            mp.QuantizedDTypePolicy("int4", "p=f32", group_size=-1, symmetric=True),
        ],
        [
            "float8/row_from_float32",
            "float8/row_from_p=f32",
            mp.QuantizedFloat8DTypePolicy("float8", "float32", granularity="row"),
        ],
        ["float32", mp.DTypePolicy("float32", output_dtype=jnp.float32, loss_scale=None)],
    ],
    ids=lambda spellings: spellings[0],
)
def test_spellings_of_one_policy_are_equal_and_cost_one_trace(spellings):
    traces = []

    @jax.jit
    def cast(policy, x):
        traces.append(policy)
        return x.astype(policy.compute_dtype)

    policies = [mp.get_policy(spelling) for spelling in spellings]
    for policy in policies:
        assert policy == policies[0]
        assert policy.name == policies[0].name
        assert hash(policy) == hash(policies[0])
        cast(policy, jnp.ones(2))
    assert len(traces) == 1
    cast(mp.DTypePolicy("float8_e5m2"), jnp.ones(2))
    assert len(traces) == 2


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (mp.DTypePolicy("mixed_float16"), mp.FloatDTypePolicy("mixed_float16")),
        (
            mp.QuantizedDTypePolicy("float8", "float32", granularity="row"),
            mp.get_policy("float8/row_from_float32"),
        ),
    ],
)
def test_two_classes_of_one_policy_are_equal(one, other):
    assert type(one) is not type(other)
    assert one == other and other == one
    assert hash(one) == hash(other)


def test_policies_that_differ_anywhere_are_unequal():
    different = [
        mp.DTypePolicy("mixed_float16"),
        mp.DTypePolicy("float16"),
        mp.DTypePolicy("mixed_float16", loss_scale=None),
        mp.DTypePolicy("mixed_float16", loss_scale=2),
        mp.DTypePolicy("mixed_float16", output_dtype="float32"),
        mp.QuantizedDTypePolicy("int4", "mixed_float16"),
        mp.QuantizedDTypePolicy("int4", "float16"),
        mp.QuantizedDTypePolicy("int4", "mixed_float16", symmetric=False),
        mp.QuantizedDTypePolicy("int4/128", "mixed_float16"),
        mp.QuantizedFloat8DTypePolicy("float8", "mixed_float16"),
        mp.QuantizedFloat8DTypePolicy("float8", "mixed_float16", 123),
        "mixed_float16",
    ]
    assert len(set(different)) == len(different)


# -- names and dtypes


@pytest.mark.parametrize("cls", [mp.DTypePolicy, mp.FloatDTypePolicy])
@pytest.mark.parametrize(
    ("name", "compute", "variable"),
    [
        ("float32", "float32", "float32"),
        ("float64", "float64", "float64"),
        ("bfloat16", "bfloat16", "bfloat16"),
        ("mixed_float16", "float16", "float32"),
        ("mixed_bfloat16", "bfloat16", "float32"),
        ("uint8", "uint8", "uint8"),
        ("int8", "int8", "int8"),
        ("bool", "bool", "bool"),
        ("complex64", "complex64", "complex64"),
        ("float8_e4m3fn", "float8_e4m3fn", "float8_e4m3fn"),
    ],
)
def test_name_gives_the_dtypes(cls, name, compute, variable):
    policy = cls(name)
    assert (policy.name, policy.compute_dtype, policy.variable_dtype) == (name, compute, variable)
    assert policy.source_name == name
    assert policy.output_dtype == compute
    assert policy.quantization_mode is None
    assert repr(policy) == f'<DTypePolicy "{name}">'
    assert policy.get_config() == {"name": name}


@pytest.mark.parametrize(
    "name",
    ["", "abc", "_infer", "@mixed_float16!", "mixed_float16" * 100, "mixed_float15"]
    + ["half", "f4", "float", "object", "str", "datetime64", "float128", "f4,f4", "zeros", "int8 "],
)
def test_unknown_names_are_refused(name):
    with pytest.raises(ValueError, match="Cannot convert '.*' to a mixed precision DTypePolicy"):
        mp.DTypePolicy(name)
    with pytest.raises(ValueError, match="Cannot convert '.*' to a mixed precision DTypePolicy"):
        mp.QuantizedDTypePolicy("int8", name)


@pytest.mark.parametrize("dtype", [np.float16, jnp.float16, np.dtype("float16")])
def test_a_dtype_is_no_name(dtype):
    with pytest.raises(TypeError, match=r"not a DType. Instead, pass DType.name. Got: float16"):
        mp.DTypePolicy(dtype)


@pytest.mark.parametrize("name", [5, b"float32", list, mp.DTypePolicy("float32")])
def test_other_objects_are_no_names(name):
    with pytest.raises(TypeError, match="'name' must be a string, such as 'mixed_float16'. Rec"):
        mp.DTypePolicy(name)
    with pytest.raises(TypeError, match="'name' must be a string, such as 'mixed_float16'. Rec"):
        mp.QuantizedDTypePolicy("int8", name)


def test_float32_vars_policies_have_been_removed():
    with pytest.raises(ValueError, match="'_float32_vars' have been removed.*'infer_float32_vars'"):
        mp.DTypePolicy("infer_float32_vars")
