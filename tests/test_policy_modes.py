"""Quantization modes: strings, keywords, what is refused, what can be run today."""

import copy
import pickle

import pytest

import mpjax as mp


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("int8", mp.Mode("int8", "int8", "dynamic", "channel")),
        ("int8_static", mp.Mode("int8_static", "int8", "static", "channel")),
        ("int8_weight_only", mp.Mode("int8_weight_only", "int8", "none", "channel")),
        ("int4/128", mp.Mode("int4/128", "int4", "none", "group", 128)),
        ("int4/7", mp.Mode("int4/7", "int4", "none", "group", 7)),
        ("int4/-1", mp.Mode("int4/-1", "int4", "none", "channel", -1)),
        ("int4", mp.Mode("int4/-1", "int4", "none", "channel", -1)),
        ("w4a8/128", mp.Mode("w4a8/128", "int4", "dynamic", "group", 128)),
        ("w4a8", mp.Mode("w4a8/-1", "int4", "dynamic", "channel", -1)),
        ("float8", mp.Mode("float8", "float8_e4m3fn", "delayed", "tensor")),
        ("float8_current", mp.Mode("float8_current", "float8_e4m3fn", "dynamic", "tensor")),
        ("int8_delayed", mp.Mode("int8_delayed", "int8", "delayed", "tensor")),
        ("float8/row", mp.Mode("float8/row", "float8_e4m3fn", "dynamic", "row")),
        ("float8/128x128", mp.Mode("float8/128x128", "float8_e4m3fn", "dynamic", "128x128")),
        ("gptq/4/128", mp.Mode("gptq/4/128", "int4", "none", "group", 128, method="gptq")),
        ("awq/4/-1", mp.Mode("awq/4/-1", "int4", "none", "channel", -1, method="awq")),
    ],
)
def test_mode_strings(mode, expected):
    policy = mp.QuantizedDTypePolicy(mode, "mixed_bfloat16")
    assert policy.scheme == expected
    assert policy.mode == expected.name
    assert policy.name == f"{expected.name}_from_mixed_bfloat16"
    assert policy.quantization_mode == expected.name.split("/")[0]
    assert (policy.compute_dtype, policy.variable_dtype) == ("bfloat16", "float32")
    assert policy.source_name == "mixed_bfloat16"
    assert repr(policy) == f'<QuantizedDTypePolicy "{policy.name}">'
    assert policy.get_config() == {"mode": expected.name, "source_name": "mixed_bfloat16"}
    assert mp.get_policy(policy.name) == policy


@pytest.mark.parametrize(
    ("mode", "keywords", "canonical"),
    [
        ("int8", {"activations": "dynamic"}, "int8"),
        ("int8", {"activations": "static"}, "int8_static"),
        ("int8", {"activations": "none"}, "int8_weight_only"),
        ("int8_static", {"activations": "static", "granularity": "channel"}, "int8_static"),
        ("int4", {"group_size": 128}, "int4/128"),
        ("int4/128", {"granularity": "group", "group_size": 128}, "int4/128"),
        ("int4/64", {"activations": "dynamic"}, "w4a8/64"),
        ("int4", {"scaling": "current"}, "w4a8/-1"),
        ("w4a8", {"group_size": 32}, "w4a8/32"),
        ("gptq", {"group_size": 64}, "gptq/4/64"),
        ("float8", {"activations": "delayed"}, "float8"),
        ("float8", {"granularity": "row"}, "float8/row"),
        ("float8", {"activations": "dynamic"}, "float8_current"),
        ("float8", {"scaling": "current"}, "float8_current"),
        ("float8", {"scaling": "current", "granularity": "row"}, "float8/row"),
        ("float8", {"scaling": "delayed"}, "float8"),
        ("int8", {"scaling": "delayed"}, "int8_delayed"),
        ("int8", {"scaling": "current"}, "int8"),
        ("int8", {"scaling": "static"}, "int8_static"),
        ("float8", {"granularity": "128x128", "activations": "dynamic"}, "float8/128x128"),
    ],
)
def test_long_form_ends_at_the_canonical_mode(mode, keywords, canonical):
    policy = mp.QuantizedDTypePolicy(mode, "float32", **keywords)
    assert policy.mode == canonical
    assert policy == mp.QuantizedDTypePolicy(canonical, "float32")


@pytest.mark.parametrize(
    ("mode", "keywords", "message"),
    [
        ("int8", {"granularity": "row"}, "mode='int8' does not support granularity='row'"),
        ("int8", {"group_size": 128}, "mode='int8' does not support group_size=128"),
        ("int8", {"symmetric": False}, "mode='int8' does not support symmetric=False"),
        ("int8_static", {"activations": "dynamic"}, "'int8_static' does not.*'dynamic'"),
        ("int4/128", {"group_size": 64}, "mode='int4/128' does not support group_size=64"),
        ("int4/-1", {"granularity": "group"}, "mode='int4/-1' does not.*granularity='group'"),
        ("int4", {"activations": "static"}, "mode='int4' does not support activations='static'"),
        ("w4a8", {"activations": "none"}, "mode='w4a8' does not support activations='none'"),
        ("gptq/4/128", {"activations": "dynamic"}, "mode='gptq/4/128' does not support"),
        ("gptq/4/128", {"symmetric": False}, "mode='gptq/4/128' does not.*symmetric=False"),
        ("float8", {"activations": "delayed", "granularity": "row"}, "'float8' does not.*'row'"),
        ("float8", {"scaling": "current", "activations": "delayed"}, "'current' means.*'dynamic'"),
        ("float8", {"scaling": "dynamic"}, r"`scaling` must be one of \('delayed', 'current', 'st"),
        ("float8", {"margin": 65}, "`margin` is a power of two between -64 and 64.*margin=65"),
        ("float8", {"amax_algorithm": "mean"}, r"one of \('max', 'most_recent'\).*'mean'"),
        ("int4", {"group_size": 0}, "group_size=0: it must be a positive integer, or -1"),
        ("int4", {"group_size": 128.0}, "group_size=128.0: it must be a positive integer"),
        ("int4", {"group_size": True}, "group_size=True: it must be a positive integer"),
        ("int4/0", {}, "mode='int4/0' has group_size='0'"),
        ("int4/-2", {}, "mode='int4/-2' has group_size='-2'"),
        ("int4/abc", {}, "mode='int4/abc' has group_size='abc'"),
        ("gptq/8/128", {}, "'gptq/8/128' asks for '8' bits, but only 4 bits are supported"),
        ("awq/2/128", {}, "'awq/2/128' asks for '2' bits, but only 4 bits are supported"),
        ("gptq", {}, "Invalid quantization mode. Expected the form 'gptq/4/<group_size>'"),
        ("int4/4/128", {}, "Invalid quantization mode. Expected the form 'int4/<group_size>'"),
        (
            "int7",
            {},
            r"Invalid quantization mode. Expected one of \('int8', .* Received: mode=int7",
        ),
        ("int8/128", {}, "Invalid quantization mode. Expected one of .* mode=int8/128"),
        ("float8/col", {}, "Invalid quantization mode. Expected one of .* mode=float8/col"),
        (None, {}, "Invalid quantization mode. Expected one of .* mode=None"),
    ],
)
def test_modes_that_cannot_be(mode, keywords, message):
    with pytest.raises(ValueError, match=message):
        mp.QuantizedDTypePolicy(mode, "float32", **keywords)


@pytest.mark.parametrize("mode", ["int8", "int8_static"])
@pytest.mark.parametrize("source_name", ["float16", "mixed_float16"])
def test_int8_activations_do_not_work_with_float16(mode, source_name):
    with pytest.raises(ValueError, match=f"'{mode}' doesn't work well with compute_dtype='float16"):
        mp.QuantizedDTypePolicy(mode, source_name)
    assert mp.QuantizedDTypePolicy("int8_weight_only", source_name).compute_dtype == "float16"


def test_asymmetric_int4_is_a_field_outside_the_name():
    policy = mp.QuantizedDTypePolicy("int4/128", "float32", symmetric=False)
    assert policy.name == "int4/128_from_float32"
    assert not policy.symmetric and not policy.scheme.symmetric
    assert policy.get_config()["symmetric"] is False


@pytest.mark.parametrize("mode", ["int8_delayed", "float8"])
def test_how_a_mode_is_trained_is_outside_the_name(mode):
    options = {"margin": 1, "amax_algorithm": "most_recent", "quantize_attention": True}
    kind = mp.QuantizedFloat8DTypePolicy if mode == "float8" else mp.QuantizedDTypePolicy
    policy = kind(mode, "float32", amax_history_length=16, **options)
    assert policy.name == f"{mode}_from_float32"
    assert policy.scaling == mp.DelayedScaling(16, 1, "most_recent")
    assert policy.get_config().items() >= {**options, "amax_history_length": 16}.items()
    assert mp.deserialize(mp.serialize(policy)) == policy != kind(mode, "float32")


@pytest.mark.parametrize(
    ("mode", "scaling"),
    [
        ("float8", mp.DelayedScaling()),
        ("float8_current", mp.CurrentScaling("tensor")),
        ("float8/row", mp.CurrentScaling("channel")),
        ("int8", mp.CurrentScaling("channel")),
        ("int8_static", mp.StaticScaling()),
        ("int8_weight_only", None),
    ],
)
def test_where_the_scales_of_a_mode_come_from(mode, scaling):
    assert mp.QuantizedDTypePolicy(mode, "float32").scaling == scaling


def test_modes_lists_every_variant_once():
    assert [mode.name for mode in mp.modes()] == [
        *("int8", "int8_static", "int8_weight_only", "int8_delayed"),
        *("float8", "float8_current", "float8/row", "float8/128x128"),
        *("auto8", "auto8_delayed"),
        *("int4/-1", "w4a8/-1", "int4/128", "w4a8/128", "gptq/4/128", "awq/4/128"),
    ]
    for mode in mp.modes():
        assert mp.QuantizedDTypePolicy(mode.name, "float32").scheme == mode


# -- float8


def test_float8_history_length():
    assert mp.QuantizedFloat8DTypePolicy.default_amax_history_length == 1024
    policy = mp.QuantizedFloat8DTypePolicy("float8", "mixed_bfloat16")
    assert policy.amax_history_length == 1024
    assert policy == mp.get_policy("float8_from_mixed_bfloat16")
    assert repr(policy) == '<QuantizedFloat8DTypePolicy "float8_from_mixed_bfloat16">'
    longer = mp.QuantizedFloat8DTypePolicy("float8", "mixed_bfloat16", 123)
    assert longer.name == policy.name
    assert longer.get_config()["amax_history_length"] == 123
    for copied in (copy.copy(longer), copy.deepcopy(longer), pickle.loads(pickle.dumps(longer))):
        assert copied.amax_history_length == 123


@pytest.mark.parametrize("length", ["512", 512.0, True, None])
def test_float8_history_length_must_be_an_integer(length):
    with pytest.raises(TypeError, match="`amax_history_length` must be an integer. Received"):
        mp.QuantizedFloat8DTypePolicy("float8", "float32", amax_history_length=length)


@pytest.mark.parametrize("length", [0, -1])
def test_float8_history_length_must_be_positive(length):
    with pytest.raises(ValueError, match=f"at least 1. Received: amax_history_length={length}"):
        mp.QuantizedFloat8DTypePolicy("float8", "float32", amax_history_length=length)


def test_float8_policies_take_float8_modes():
    with pytest.raises(ValueError, match="takes a float8 mode. Received: mode='int8'"):
        mp.QuantizedFloat8DTypePolicy("int8", "float32")
    with pytest.raises(ValueError, match="Invalid quantization mode"):
        mp.QuantizedFloat8DTypePolicy("float7", "float32")
