"""Loss scales as configuration: what a policy resolves, refuses, warns of and writes down."""

import json

import numpy as np
import pytest

import mpjax as mp

USELESS = "loss scale is only useful for float16 policies. You passed loss_scale={} for policy {}."


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("mixed_float16", mp.DynamicLossScale()),
        ("params=float32,compute=float16", mp.DynamicLossScale()),
        ("float8_from_mixed_float16", mp.DynamicLossScale()),
        ("int4_from_mixed_float16", mp.DynamicLossScale()),
        ("float16", None),
        ("float8_from_float16", None),
        ("params=float64,compute=float16", None),
        ("mixed_bfloat16", None),
        ("float32", None),
    ],
)
def test_auto_is_dynamic_for_mixed_float16_only(name, expected):
    policy = mp.get_policy(name)
    assert policy.loss_scale == expected
    assert "loss_scale" not in policy.get_config()


def test_defaults_are_those_of_tensorflow():
    assert mp.DynamicLossScale().get_config() == {
        "initial_scale": 32768.0,
        "period": 2000,
        "factor": 2.0,
        "min_scale": 1.0,
    }


@pytest.mark.parametrize(
    ("loss_scale", "expected"),
    [
        ("dynamic", mp.DynamicLossScale()),
        (None, None),
        (1, mp.StaticLossScale(1.0)),
        (2.5, mp.StaticLossScale(2.5)),
        (np.float32(8), mp.StaticLossScale(8.0)),
        (mp.StaticLossScale(4), mp.StaticLossScale(4.0)),
        (mp.DynamicLossScale(initial_scale=8), mp.DynamicLossScale(initial_scale=8.0)),
    ],
)
@pytest.mark.parametrize("name", ["float16", "mixed_float16"])
def test_given_loss_scales(name, loss_scale, expected):
    policy = mp.DTypePolicy(name, loss_scale=loss_scale)
    assert policy.loss_scale == expected
    config = json.loads(json.dumps(mp.serialize(policy)))
    assert mp.deserialize(config) == policy
    assert ("loss_scale" in config["config"]) == (expected != mp.DTypePolicy(name).loss_scale)
    quantized = mp.QuantizedDTypePolicy("int4", name, loss_scale=loss_scale)
    assert quantized.loss_scale == expected
    assert mp.deserialize(mp.serialize(quantized)) == quantized


def test_loss_scale_none_is_written_where_auto_is_dynamic():
    policy = mp.DTypePolicy("mixed_float16", loss_scale=None)
    assert policy.get_config() == {"name": "mixed_float16", "loss_scale": None}


@pytest.mark.parametrize(
    "loss_scale", ["abc", "Dynamic", "", True, [], {"class_name": "LossScale"}, 1j]
)
def test_unknown_loss_scales_are_refused(loss_scale):
    with pytest.raises(ValueError, match="Could not interpret loss scale identifier: "):
        mp.DTypePolicy("mixed_float16", loss_scale=loss_scale)


@pytest.mark.parametrize("scale", [0, 0.5, -1])
def test_static_loss_scale_is_at_least_one(scale):
    with pytest.raises(ValueError, match=f"`scale` must be at least 1. Received: {scale}"):
        mp.StaticLossScale(scale)
    with pytest.raises(ValueError, match="`scale` must be at least 1"):
        mp.DTypePolicy("mixed_float16", loss_scale=scale)


@pytest.mark.parametrize("scale", ["2", None, True, [2.0]])
def test_static_loss_scale_is_a_number(scale):
    with pytest.raises(ValueError, match="`scale` must be a Python int or float. Received: "):
        mp.StaticLossScale(scale)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"initial_scale": float("inf")}, "`initial_scale` must be finite. Received: inf"),
        ({"initial_scale": "big"}, "`initial_scale` must be a Python int or float"),
        ({"initial_scale": 0.5}, "not be below `min_scale`. Received: initial_scale=0.5, min_sc"),
        ({"period": 0}, "`period` must be a positive integer. Received: 0"),
        ({"period": 2.0}, "`period` must be a positive integer. Received: 2.0"),
        ({"factor": 1}, "`factor` must be greater than 1. Received: 1.0"),
        ({"min_scale": 0}, "`min_scale` must be positive. Received: 0.0"),
    ],
)
def test_dynamic_loss_scale_checks_its_numbers(arguments, message):
    with pytest.raises(ValueError, match=message):
        mp.DynamicLossScale(**arguments)


@pytest.mark.parametrize("name", ["float32", "mixed_bfloat16"])
def test_a_loss_scale_without_float16_warns(name):
    with pytest.warns(UserWarning, match=USELESS.format(2, name)) as warned:
        policy = mp.DTypePolicy(name, loss_scale=2)
    assert policy.loss_scale == mp.StaticLossScale(2)
    assert [warning.filename for warning in warned] == [__file__]
    with pytest.warns(UserWarning, match=USELESS.format("'dynamic'", name)):
        mp.QuantizedDTypePolicy("int8", name, loss_scale="dynamic")


@pytest.mark.parametrize("loss_scale", [mp.DynamicLossScale(8, 3, 4, 0.5), mp.StaticLossScale(2)])
def test_loss_scale_config_round_trip(loss_scale):
    config = json.loads(json.dumps(loss_scale.get_config()))
    assert type(loss_scale).from_config(config) == loss_scale


@pytest.mark.parametrize("class_name", ["Policy", "PolicyV1"])
@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (
            {
                "class_name": "DynamicLossScale",
                "config": {"initial_loss_scale": 8, "increment_period": 3, "multiplier": 4.0},
            },
            mp.DynamicLossScale(8.0, 3, 4.0, 1.0),
        ),
        (
            {"class_name": "FixedLossScale", "config": {"loss_scale_value": 2.0}},
            mp.StaticLossScale(2),
        ),
        (None, None),
    ],
)
def test_configs_of_tensorflow_load_with_their_loss_scale(class_name, written, expected):
    config = {"name": "mixed_float16", "loss_scale": written}
    policy = mp.deserialize({"class_name": class_name, "config": config})
    assert policy == mp.DTypePolicy("mixed_float16", loss_scale=expected)


def test_configs_of_tensorflow_without_a_loss_scale_load():
    config = {"class_name": "Policy", "config": {"name": "mixed_float16"}}
    assert mp.deserialize(config) == mp.DTypePolicy("mixed_float16")
    assert mp.deserialize("mixed_float16") == mp.DTypePolicy("mixed_float16")
