"""Policy maps: lookup by path, editing, snapshots, configs."""

import copy
import json

import jax
import jax.numpy as jnp
import pytest

import mpjax as mp
from mpjax._policy_map import freeze, resolve

FLOAT16 = mp.DTypePolicy("float16")
FLOAT32 = mp.DTypePolicy("float32")
BFLOAT16 = mp.DTypePolicy("bfloat16")
INT8 = mp.QuantizedDTypePolicy("int8", "mixed_bfloat16")


def example_map():
    return mp.DTypePolicyMap(
        "float32",
        {
            "model/encoder/layer_0/dense": BFLOAT16,
            "model/encoder/attention/query": INT8,
            "model/decoder": BFLOAT16,
            "model/decoder/.*": FLOAT16,
            "model/decoder/attention/.*": "bfloat16",
        },
    )


@pytest.mark.parametrize("lookup", [lambda m: m, freeze], ids=["map", "snapshot"])
@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("model/encoder/layer_0/dense", BFLOAT16),
        ("model/encoder/attention/query", INT8),
        ("model/encoder/attention/query_norm", FLOAT32),
        ("my_model/encoder/attention/query", FLOAT32),
        ("model/decoder", BFLOAT16),
        ("model/decoder/layer_0", FLOAT16),
        ("model/embedding", FLOAT32),
        ("", FLOAT32),
    ],
)
def test_lookup(lookup, path, expected):
    policies = lookup(example_map())
    assert policies[path] == expected
    assert resolve(policies, path) == expected


@pytest.mark.parametrize("lookup", [lambda m: m, freeze], ids=["map", "snapshot"])
def test_two_matching_keys_are_an_error(lookup):
    policies = lookup(example_map())
    message = (
        "Path 'model/decoder/attention/output' matches multiple dtype policy specification keys: "
        r"\['model/decoder/.\*', 'model/decoder/attention/.\*'\]"
    )
    with pytest.raises(ValueError, match=message):
        policies["model/decoder/attention/output"]


def test_a_key_equal_to_the_path_wins_over_matching_keys():
    policies = mp.DTypePolicyMap("float32", {"a/.*": FLOAT16, ".*/b": FLOAT16, "a/b": BFLOAT16})
    assert policies["a/b"] == BFLOAT16


def test_a_plain_key_does_not_match_what_is_below_it():
    policies = mp.DTypePolicyMap("float32", {"decoder": BFLOAT16})
    assert policies["decoder/attention"] == FLOAT32


def test_resolve_returns_a_single_policy_itself():
    assert resolve(INT8, "any/path") is INT8


def test_in_iteration_and_length_are_about_keys():
    policies = mp.DTypePolicyMap("float32", {"b": FLOAT16, "a/.*": BFLOAT16})
    assert "a/.*" in policies
    assert "a/x" not in policies
    assert list(policies) == list(policies.keys()) == ["b", "a/.*"]
    assert list(policies.values()) == [FLOAT16, BFLOAT16]
    assert len(policies) == 2
    assert list(freeze(policies)) == ["a/.*", "b"]


def test_editing():
    policies = mp.DTypePolicyMap("float32")
    policies["dense_0"] = BFLOAT16
    policies["dense_1"] = "int8_from_mixed_bfloat16"
    policies["dense_2"] = jnp.float16
    assert [policy.name for policy in policies.values()] == [
        *("bfloat16", "int8_from_mixed_bfloat16", "float16")
    ]
    assert policies.pop("dense_0") == BFLOAT16
    with pytest.raises(KeyError, match="dense_0"):
        policies.pop("dense_0")
    assert policies.pop("dense_0", None) is None
    del policies["dense_1"]
    with pytest.raises(KeyError, match="dense_1"):
        del policies["dense_1"]
    assert policies["dense_1"] == FLOAT32
    assert policies.setdefault("dense_1", "bfloat16") == BFLOAT16
    assert policies.setdefault("dense_1", "float64") == BFLOAT16
    policies.clear()
    assert len(policies) == 0


def test_an_existing_key_is_not_replaced():
    policies = mp.DTypePolicyMap("float32", {"dense_0": BFLOAT16})
    with pytest.raises(ValueError, match="dense_0 already exist in the DTypePolicyMap with value"):
        policies["dense_0"] = FLOAT32
    with pytest.raises(ValueError, match="dense_0 already exist"):
        policies.update({"dense_0": FLOAT32})
    assert policies["dense_0"] == BFLOAT16


@pytest.mark.parametrize("value", [123, "float33", mp.DTypePolicyMap("float32"), {}])
def test_a_value_must_name_one_policy(value):
    with pytest.raises(ValueError, match="Cannot interpret the assigned value of key 'dense'"):
        mp.DTypePolicyMap("float32", {"dense": value})


def test_keys_must_be_regular_expressions():
    with pytest.raises(ValueError, match=r"Key 'dense_\(0' of DTypePolicyMap is not a valid reg"):
        mp.DTypePolicyMap("float32", {"dense_(0": FLOAT16})
    with pytest.raises(TypeError, match="A key of DTypePolicyMap must be a string. Received: 0"):
        mp.DTypePolicyMap("float32", {0: FLOAT16})  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("policy_map", [123, FLOAT32, [("a", FLOAT32)]])
def test_policy_map_must_be_a_dict(policy_map):
    with pytest.raises(TypeError, match="If specified, `policy_map` must be a dict. Received"):
        mp.DTypePolicyMap(policy_map=policy_map)


def test_default_policy_must_not_be_a_map():
    for default_policy in (example_map(), freeze(example_map())):
        with pytest.raises(ValueError, match="`default_policy` cannot be a map"):
            mp.DTypePolicyMap(default_policy)
    with pytest.raises(ValueError, match="Unknown policy class_name='DTypePolicyMap'"):
        mp.DTypePolicyMap(mp.serialize(example_map()))


def test_the_dict_given_is_copied():
    given = {"dense": "float16"}
    policies = mp.DTypePolicyMap("float32", given)
    policies["head"] = FLOAT16
    assert given == {"dense": "float16"}


@pytest.mark.parametrize("lookup", [lambda m: m, freeze], ids=["map", "snapshot"])
def test_attributes_are_those_of_the_default(lookup):
    policies = lookup(mp.DTypePolicyMap("float8_from_mixed_float16", {"head": "float32"}))
    assert policies.default_policy == mp.get_policy("float8_from_mixed_float16")
    assert policies.name == "map_float8_from_mixed_float16"
    assert policies.source_name == "mixed_float16"
    assert (policies.compute_dtype, policies.variable_dtype) == ("float16", "float32")
    assert policies.output_dtype == "float16"
    assert policies.loss_scale == mp.DynamicLossScale()
    assert policies.quantization_mode == "float8"


def test_repr():
    policies = mp.DTypePolicyMap("mixed_bfloat16")
    assert repr(policies) == '<DTypePolicyMap "map_mixed_bfloat16">'
    assert repr(freeze(policies)) == '<FrozenDTypePolicyMap "map_mixed_bfloat16">'


# -- equality and snapshots


def test_equality_is_by_value_and_blind_to_order():
    one = mp.DTypePolicyMap("float32", {"a": FLOAT16, "b": BFLOAT16})
    other = mp.DTypePolicyMap("float32", {"b": "bfloat16", "a": "float16"})
    assert one == other
    assert freeze(one) == freeze(other)
    assert hash(freeze(one)) == hash(freeze(other))
    for different in (
        mp.DTypePolicyMap("float32", {"a": FLOAT16}),
        mp.DTypePolicyMap("float64", {"a": FLOAT16, "b": BFLOAT16}),
        mp.DTypePolicyMap("float32", {"a": FLOAT16, "b": FLOAT16}),
    ):
        assert one != different
        assert freeze(one) != freeze(different)
    assert one != {"a": FLOAT16, "b": BFLOAT16}


def test_a_snapshot_does_not_follow_the_map():
    policies = mp.DTypePolicyMap("float32", {"a": FLOAT16})
    snapshot = freeze(policies)
    policies["b"] = BFLOAT16
    assert list(snapshot) == ["a"]
    assert snapshot != freeze(policies)
    with pytest.raises(TypeError, match="does not support item assignment"):
        snapshot["b"] = BFLOAT16  # pyright: ignore[reportIndexIssue]


def test_freeze_returns_other_policies_themselves():
    snapshot = freeze(example_map())
    assert freeze(snapshot) is snapshot
    assert freeze(INT8) is INT8


def test_a_copy_is_edited_by_itself():
    policies = mp.DTypePolicyMap("float32", {"b": FLOAT16, "a": FLOAT16})
    for duplicate in (copy.copy(policies), copy.deepcopy(policies)):
        duplicate["c"] = BFLOAT16
        assert list(duplicate) == ["b", "a", "c"]
    assert list(policies) == ["b", "a"]


def test_jit_traces_once_per_content():
    traces = []

    @jax.jit
    def cast(policies, x):
        traces.append(policies)
        return x.astype(policies["dense"].compute_dtype)

    policies = mp.DTypePolicyMap("float32", {"a": FLOAT16, "dense": BFLOAT16})
    assert cast(policies, jnp.ones(2)).dtype == "bfloat16"
    cast(mp.DTypePolicyMap("float32", {"dense": BFLOAT16, "a": FLOAT16}), jnp.ones(2))
    assert len(traces) == 1
    assert type(traces[0]) is mp.DTypePolicyMap
    del policies["dense"]
    policies["den.*"] = FLOAT16
    assert cast(policies, jnp.ones(2)).dtype == "float16"
    assert len(traces) == 2


# -- configs


def test_serializing_does_not_change_the_map():
    with mp.dtype_policy_scope("mixed_bfloat16"):
        policies = mp.DTypePolicyMap(None, {"a": "mixed_bfloat16", "b": INT8, "c": "float16"})
    before = copy.deepcopy(policies)
    first = mp.serialize(policies)
    assert mp.serialize(policies) == first
    assert policies == before
    assert policies["b"].name == "int8_from_mixed_bfloat16"


def test_a_default_left_open_follows_the_loading_process():
    with mp.dtype_policy_scope("mixed_bfloat16"):
        policies = mp.DTypePolicyMap(
            None,
            {
                "same": "mixed_bfloat16",
                "same_quantized": mp.QuantizedFloat8DTypePolicy("float8", amax_history_length=123),
                "other": "float64",
                "other_quantized": "int8_from_float32",
            },
        )
    config = json.loads(json.dumps(mp.serialize(policies)))
    assert config["config"]["default_policy"] is None
    with mp.dtype_policy_scope("bfloat16"):
        loaded = mp.DTypePolicyMap.from_config(config["config"])
    assert loaded.default_policy == BFLOAT16
    assert loaded["same"] == BFLOAT16
    assert loaded["same_quantized"] == mp.QuantizedFloat8DTypePolicy("float8", "bfloat16", 123)
    assert loaded["other"] == mp.DTypePolicy("float64")
    assert loaded["other_quantized"] == mp.get_policy("int8_from_float32")
    with mp.dtype_policy_scope("mixed_bfloat16"):
        assert mp.deserialize(config) == policies


def test_a_default_left_open_stays_open_through_copies_and_jit():
    policies = mp.DTypePolicyMap(None, {"head": "float64"})
    for duplicate in (copy.copy(policies), copy.deepcopy(policies), jax.jit(lambda p: p)(policies)):
        assert duplicate.get_config()["default_policy"] is None
    given = mp.DTypePolicyMap(policies.default_policy, {"head": "float64"})
    assert given.get_config()["default_policy"] is not None
    assert given != policies


def test_a_given_default_does_not_follow_the_loading_process():
    policies = mp.DTypePolicyMap("mixed_bfloat16", {"same": "mixed_bfloat16"})
    with mp.dtype_policy_scope("bfloat16"):
        assert mp.deserialize(mp.serialize(policies)) == policies


def test_a_default_left_open_under_a_quantized_or_mapped_global():
    with mp.dtype_policy_scope("int8_from_float32"):
        policies = mp.DTypePolicyMap(None, {"head": "float32"})
    assert policies.default_policy == mp.get_policy("int8_from_float32")
    with mp.dtype_policy_scope(mp.DTypePolicyMap("bfloat16", {"x": "float64"})):
        assert mp.DTypePolicyMap().default_policy == BFLOAT16
        assert mp.DTypePolicyMap.from_config(policies.get_config())["head"] == BFLOAT16
