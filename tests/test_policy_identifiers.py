"""get_policy and deserialize: what names a policy, and the configs that others wrote."""

import jax.numpy as jnp
import numpy as np
import pytest

import mpjax as mp
from mpjax._policy_map import freeze


@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        (jnp.bfloat16, "bfloat16"),
        (np.float32, "float32"),
        (np.dtype("int8"), "int8"),
        (jnp.dtype("float8_e4m3fn"), "float8_e4m3fn"),
        (float, "float32"),
        (bool, "bool"),
    ],
)
def test_get_policy_takes_dtypes(dtype, name):
    assert mp.get_policy(dtype) == mp.DTypePolicy(name)


@pytest.mark.parametrize(
    "policy",
    [
        mp.DTypePolicy("float32"),
        mp.get_policy("float8_from_float32"),
        mp.DTypePolicyMap("float32"),
        freeze(mp.DTypePolicyMap("float32")),
    ],
    ids=repr,
)
def test_get_policy_returns_a_policy_itself(policy):
    assert mp.get_policy(policy) is policy


@pytest.mark.parametrize("name", ["int8", "int8_abc_", "int4", "float8_e4m3fn", "awq_abc"])
def test_get_policy_wants_a_source_for_a_mode(name):
    with pytest.raises(ValueError, match="Cannot convert `policy` into a valid pair .*source_name"):
        mp.get_policy(name)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mixed_bfloat15", "Cannot convert 'mixed_bfloat15'"),
        ("int8_from_mixed_bfloat15", "Cannot convert 'mixed_bfloat15'"),
        ("int8_from_", "Cannot convert ''"),
        ("int8_from_int8_from_float32", "Cannot convert `policy` into a valid pair"),
        ("int7_from_float32", "Invalid quantization mode.*mode=int7"),
    ],
)
def test_get_policy_refuses_other_strings(name, message):
    with pytest.raises(ValueError, match=message):
        mp.get_policy(name)


@pytest.mark.parametrize("identifier", [123, [], {}, {"config": {}}, list, np.ones(2)])
def test_get_policy_refuses_other_objects(identifier):
    with pytest.raises(ValueError, match="Cannot interpret `dtype` argument"):
        mp.get_policy(identifier)


@pytest.mark.parametrize(
    ("class_name", "config", "expected"),
    [
        ("DTypePolicy", {"name": "mixed_float16"}, mp.DTypePolicy("mixed_float16")),
        ("FloatDTypePolicy", {"name": "float32"}, mp.DTypePolicy("float32")),
        ("QuantizedDTypePolicy", {"mode": "int8", "source_name": "float32"})
        + (mp.QuantizedDTypePolicy("int8", "float32"),),
        ("QuantizedDTypePolicy", {"mode": "int4", "source_name": "float32"})
        + (mp.QuantizedDTypePolicy("int4/-1", "float32"),),
        (
            "QuantizedFloat8DTypePolicy",
            {"mode": "float8", "source_name": "mixed_float16", "amax_history_length": 123},
            mp.QuantizedFloat8DTypePolicy("float8", "mixed_float16", 123),
        ),
        ("Int4DTypePolicy", {"mode": "int4/128", "source_name": "float32"})
        + (mp.QuantizedDTypePolicy("int4/128", "float32"),),
        ("GPTQDTypePolicy", {"mode": "gptq/4/128", "source_name": "float32"})
        + (mp.QuantizedDTypePolicy("gptq/4/128", "float32"),),
        ("AWQDTypePolicy", {"mode": "awq/4/-1", "source_name": "float32"})
        + (mp.QuantizedDTypePolicy("awq/4/-1", "float32"),),
        (
            "DTypePolicyMap",
            {
                "default_policy": "mixed_bfloat16",
                "policy_map": {
                    "head": {
                        "module": "keras",
                        "class_name": "DTypePolicy",
                        "config": {"name": "float32"},
                        "registered_name": None,
                    }
                },
            },
            mp.DTypePolicyMap("mixed_bfloat16", {"head": "float32"}),
        ),
    ],
)
def test_configs_of_keras_load(class_name, config, expected):
    written = {
        "module": "keras",
        "class_name": class_name,
        "config": config,
        "registered_name": None,
    }
    assert mp.deserialize(written) == expected


def test_unknown_configs_are_refused():
    with pytest.raises(ValueError, match="Unknown policy class_name='TernaryDTypePolicy'"):
        mp.deserialize({"class_name": "TernaryDTypePolicy", "config": {"mode": "ternary"}})
    with pytest.raises(ValueError, match="Cannot deserialize a policy: expected a dict"):
        mp.deserialize({"name": "float32"})
    with pytest.raises(ValueError, match="Cannot deserialize a policy: expected a dict"):
        mp.deserialize(None)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="unexpected keyword argument 'dtype'"):
        mp.deserialize({"class_name": "DTypePolicy", "config": {"dtype": "float32"}})
    with pytest.raises(ValueError, match="Cannot serialize 'float32': it is not a policy"):
        mp.serialize("float32")  # pyright: ignore[reportArgumentType]


# -- jmp strings and the output dtype


@pytest.mark.parametrize(
    ("text", "name", "variable", "compute", "output"),
    [
        ("params=float32,compute=bfloat16,output=float32", "mixed_bfloat16")
        + ("float32", "bfloat16", "float32"),
        ("p=f32, c=f16, o=f32", "mixed_float16", "float32", "float16", "float32"),
        ("params=float16", "float16", "float16", "float16", "float16"),
        ("output=bfloat16", "float32", "float32", "float32", "bfloat16"),
        ("compute=float64", "params=float32,compute=float64", "float32", "float64", "float64"),
        ("p=bf16,c=f32", "params=bfloat16,compute=float32", "bfloat16", "float32", "float32"),
    ],
)
def test_jmp_strings(text, name, variable, compute, output):
    policy = mp.get_policy(text)
    assert policy.name == name
    assert (policy.variable_dtype, policy.compute_dtype) == (variable, compute)
    assert policy.output_dtype == output
    assert mp.DTypePolicy(policy.name, output_dtype=output) == policy


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("parms=float32", "Unknown key 'parms' in policy 'parms=float32'"),
        ("params=float32,", "Unknown key '' in policy"),
        ("params=float33", "Unknown dtype 'float33' in policy 'params=float33'"),
        ("params=", "Unknown dtype '' in policy"),
        ("params=int8", "Unknown dtype 'int8' in policy"),
        ("p=f32,params=bf16", "Key 'params' appears twice in policy"),
    ],
)
def test_jmp_strings_name_what_is_wrong(text, message):
    with pytest.raises(ValueError, match=message):
        mp.get_policy(text)


def test_output_dtype_is_kept_where_it_differs_from_the_compute_dtype():
    policy = mp.DTypePolicy("mixed_bfloat16", output_dtype=jnp.float32)
    assert policy.output_dtype == "float32"
    assert policy.get_config() == {"name": "mixed_bfloat16", "output_dtype": "float32"}
    same = mp.DTypePolicy("mixed_bfloat16", output_dtype="bfloat16")
    assert same.get_config() == {"name": "mixed_bfloat16"}


def test_output_dtype_errors():
    with pytest.raises(ValueError, match="'float33' is not a dtype"):
        mp.DTypePolicy("float32", output_dtype="float33")
    with pytest.raises(ValueError, match="output=float32 but output_dtype='bfloat16'"):
        mp.DTypePolicy("c=bf16,o=f32", output_dtype="bfloat16")
