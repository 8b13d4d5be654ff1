"""`auto8`: int8 or float8 by the hardware, and a file of the one loaded for the other."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

import mpjax as mp
import mpjax._load
import mpjax_kernels as mk
from mpjax._stored import stored_of

E4M3 = "float8_e4m3fn"
FLOAT8 = ["tpu7x", "h100", "h200", "b200"]
INT8 = ["v5e", "v5p", "v6e", "a100", "mi300", "cpu-avx512-vnni", "cpu-arm-dotprod"]
NEITHER = ["v4", "cpu-avx2", "cpu-generic"]
X = jax.random.normal(jax.random.key(0), (16, 64))


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(24, name="down")(nn.relu(nn.Dense(96, name="up")(x)))


class MLPNNX(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(64, 96, rngs=rngs)
        self.down = nnx.Linear(96, 24, rngs=rngs)

    def __call__(self, x):
        return self.down(nnx.relu(self.up(x)))


@pytest.mark.parametrize(
    ("names", "auto8", "delayed"),
    [
        (INT8, "int8_from_mixed_bfloat16", "int8_delayed_from_mixed_bfloat16"),
        (FLOAT8, "float8/row_from_mixed_bfloat16", "float8_from_mixed_bfloat16"),
        (NEITHER, "mixed_bfloat16", "mixed_bfloat16"),
    ],
)
def test_it_resolves_by_what_the_target_multiplies(names, auto8, delayed):
    for name in names:
        target = mp.resolve_target(name)
        for policy, resolved in (("auto8", auto8), ("auto8_delayed", delayed)):
            got = mp.get_policy(f"{policy}_from_mixed_bfloat16").resolve(target)
            assert got == mp.get_policy(resolved) and got == got.resolve("v4")


def test_the_rest_of_a_policy_survives():
    options = {"kv_cache": "int8", "output_dtype": "float32", "margin": 1.0}
    policy = mp.QuantizedDTypePolicy("auto8_delayed", "mixed_bfloat16", **options)
    assert policy.resolve("h100") == mp.QuantizedDTypePolicy("float8", "mixed_bfloat16", **options)
    assert policy.resolve("v6e").margin == 1.0
    del options["margin"]
    assert policy.resolve("v4") == mp.DTypePolicy("mixed_bfloat16", **options)


def test_a_map_resolves_each_of_its_policies():
    policies = mp.DTypePolicyMap(
        "auto8_from_mixed_bfloat16", {"down": "float32", "up": "auto8_from_float32"}
    )
    resolved = policies.resolve("tpu7x")
    assert isinstance(resolved, mp.DTypePolicyMap) and resolved != policies
    names = {key: policy.name for key, policy in resolved.items()}
    assert names == {"down": "float32", "up": "float8/row_from_float32"}
    assert resolved.default_policy.name == "float8/row_from_mixed_bfloat16"
    assert policies["up"].name == "auto8_from_float32"
    model = mp.wrap(MLP(), policies, target="v6e")
    assert model.policy["up"].name == "int8_from_float32"


def test_wrap_takes_the_device_at_hand_by_default():
    here = mp.resolve_target("cpu")
    expected = mp.get_policy("auto8_from_float32").resolve(here)
    with mp.dtype_policy_scope("auto8_from_float32"):
        assert mp.wrap(MLP()).policy == expected
    model = mp.wrap(MLPNNX(nnx.Rngs(0)), "auto8_from_float32", target="tpu7x")
    assert model.policy.name == "float8/row_from_float32"


def test_errors_name_the_remedy():
    with pytest.raises(ValueError, match="doesn't work well with compute_dtype='float16'"):
        mp.get_policy("auto8_from_mixed_float16")
    with pytest.raises(ValueError, match="`target` is 'v66', of which nothing is known"):
        mp.wrap(MLP(), "int8_from_float32", target="v66")
    with pytest.raises(ValueError, match="is not resolved: call policy.resolve"):
        stored_of(mp.get_policy("auto8_from_float32"))


# -- one file, for every target


def float_variables():
    return MLP().init(jax.random.key(1), X)


def saved(tmp_path, mode="int8", as_policy=None):
    """A file of quantized weights, and the model and variables that are in it."""
    policy = f"{mode}_from_float32"
    model, calibration = mp.wrap(MLP(), policy), [X] if "static" in mode else None
    variables = mp.quantize(model, float_variables(), X, calibration=calibration)
    path = tmp_path / "model.safetensors"
    return mp.save(path, variables, policy=as_policy or model.policy), model, variables


def rounded(values, scale):
    """The most that rounding to E4M3 changes: half a unit of 3 bits, or of the subnormals."""
    return np.maximum(np.abs(values) * 2.0**-4, scale * 2.0**-10)


@pytest.mark.parametrize("target", ["tpu7x", "h200"])
def test_an_int8_file_is_float8_where_the_target_says_so(tmp_path, target):
    path, _, int8 = saved(tmp_path, as_policy="auto8_from_float32")
    policy = mp.load_policy(path, target=target)
    assert policy.name == "float8/row_from_float32"
    float8, report = mp.load(path, target=target, return_report=True)
    assert report.target == target
    for row, layer in zip(report.weights, ("up", "down"), strict=True):
        old, new = int8["params"][layer]["kernel"], float8["params"][layer]["kernel"]
        assert (row.path, row.stored, row.format) == (f"params/{layer}/kernel", "int8", E4M3)
        assert new.format.name == E4M3 and new.scale.shape == old.scale.shape
        assert new.dtype == old.dtype
        before, after = (np.asarray(mk.dequantize(q)) for q in (old, new))
        assert (np.abs(after - before) <= rounded(before, np.asarray(new.scale))).all()
        found = np.linalg.norm(after - before) / np.linalg.norm(before)
        assert row.error == pytest.approx(found, rel=1e-4) and 0.005 < row.error < 2**-4
        np.testing.assert_array_equal(float8["params"][layer]["bias"], 0)
    assert "params/up/kernel" in str(report) and "float8_e4m3fn" in str(report)


def test_outputs_are_within_the_float8_bound_of_the_int8_ones(tmp_path):
    model = mp.wrap(nn.Dense(24, use_bias=False), "int8_from_float32")
    variables = mp.quantize(model, model.init(jax.random.key(0), X), X)
    path = mp.save(tmp_path / "dense.safetensors", variables, policy=model.policy)
    float8 = mp.wrap(nn.Dense(24, use_bias=False), mp.load_policy(path, target="tpu7x"))
    y8, y = (
        np.asarray(m.apply(v, X), np.float64)
        for m, v in ((float8, mp.load(path, target="tpu7x")), (model, variables))
    )
    w = np.abs(np.asarray(mk.dequantize(variables["params"]["kernel"]), np.float64))
    x, amax = np.abs(np.asarray(X, np.float64)), np.abs(np.asarray(X)).max(axis=1, keepdims=True)
    w_error = rounded(w, w.max(axis=0) / 448)
    # Both round the activation, too: int8 by half of a step of amax / 127.
    x_error = rounded(x, amax / 448) + amax / 254
    bound = x_error @ w + (x + rounded(x, amax / 448)) @ w_error
    assert (np.abs(y8 - y) <= bound * (1 + 1e-5)).all() and (y8 != y).any()


@pytest.mark.parametrize("mode", ["int8_static", "int8_delayed", "float8", "float8/row"])
def test_the_scales_of_activations_are_found_anew(tmp_path, mode):
    to = "v6e" if mode.startswith("float8") else "tpu7x"
    if "delayed" in mode or mode == "float8":
        model = mp.wrap(MLP(), f"{mode}_from_float32")
        trained = model.init(jax.random.key(1), X)
        variables = mp.quantize(model, trained, X)
        path = mp.save(tmp_path / "model.safetensors", variables, policy=model.policy)
    else:
        path, model, variables = saved(tmp_path, mode)
    policy = mp.load_policy(path, target=to)
    assert policy.mode == ("int8" if to == "v6e" else "float8/row")
    other = mp.load(path, target=to)
    assert set(other) == {"params"}
    y = mp.wrap(MLP(), policy).apply(other, X)
    exact = MLP().apply(float_variables(), X)
    # Two layers, each of two operands rounded to 2^-4 at most: far less in the root mean square.
    error = np.linalg.norm(y - exact) / np.linalg.norm(exact)
    assert 0 < error < 2**-4


def test_a_target_that_multiplies_what_is_stored_changes_nothing(tmp_path):
    path, model, variables = saved(tmp_path)
    loaded, report = mp.load(path, target="v5e", return_report=True)
    assert mp.load_policy(path, target="v5e") == model.policy == mp.load_policy(path)
    jax.tree.map(np.testing.assert_array_equal, loaded, variables)
    assert [row.error for row in report.weights] == [0, 0]
    assert [row.format for row in report.weights] == ["int8", "int8"]
    # An explicit int8 is kept where the target has no 8 bits at all; and without a target.
    assert mp.load_policy(path, target="v4") == model.policy
    _, report = mp.load(path, return_report=True)
    assert report.target is None and [row.format for row in report.weights] == ["int8", "int8"]


def test_auto8_is_floats_where_the_target_has_neither(tmp_path):
    path, _, variables = saved(tmp_path, as_policy="auto8_from_float32")
    assert mp.load_policy(path, target="v4").name == "float32"
    floats = mp.load(path, target="v4")
    kernel = floats["params"]["up"]["kernel"]
    np.testing.assert_array_equal(kernel, mk.dequantize(variables["params"]["up"]["kernel"]))


def test_auto8_in_a_file_is_the_device_at_hand_by_default(tmp_path, monkeypatch):
    path, _, _ = saved(tmp_path, as_policy="auto8_from_float32")
    hopper = mp.resolve_target("h100")
    real = mpjax._load.resolve_target
    monkeypatch.setattr(mpjax._load, "resolve_target", lambda t: hopper if t is None else real(t))
    assert mp.load(path)["params"]["up"]["kernel"].format.name == E4M3


def test_nnx(tmp_path):
    model = mp.wrap(MLPNNX(nnx.Rngs(0)), "int8_static_from_float32")
    exact = MLPNNX(nnx.Rngs(0))(X)
    mp.quantize(model, calibration=[X])
    path = mp.save(tmp_path / "model.safetensors", model)
    policy = mp.load_policy(path, target="tpu7x")
    other = mp.wrap(nnx.eval_shape(lambda: MLPNNX(nnx.Rngs(0))), policy)
    other, report = mp.load(path, other, target="tpu7x", return_report=True)
    assert [row.format for row in report.weights] == [E4M3, E4M3]
    assert other.up.kernel.get_raw_value().format.name == E4M3
    y = other(X)
    assert 0 < np.linalg.norm(y - exact) / np.linalg.norm(exact) < 2**-4
    with pytest.raises(mp.ModelFileError, match="does not fit the model"):
        mp.load(path, mp.wrap(MLPNNX(nnx.Rngs(0)), policy))


@pytest.mark.parametrize("when", ["always", "profitable"])
def test_an_nnx_model_can_leave_its_policy_open_in_its_file(tmp_path, when):
    auto8 = mp.DTypePolicyMap("auto8_from_float32", {"down": "float32"})
    model = mp.wrap(MLPNNX(nnx.Rngs(0)), auto8, target="v6e", when=when)
    mp.quantize(model)
    path = mp.save(tmp_path / "model.safetensors", model, policy=auto8)
    assert mp.serialize(mp.load_policy(path))["config"] == mp.serialize(auto8)["config"]
    other = mp.wrap(nnx.eval_shape(lambda: MLPNNX(nnx.Rngs(0))), auto8, target="h100")
    _, report = mp.load(path, other, target="h100", return_report=True)
    # A layer as small as `up` stays floats where it has to pay.
    assert [row.format for row in report.weights] == ([E4M3] if when == "always" else [])
    np.testing.assert_array_equal(other.down.kernel[...], model.down.kernel[...])
    for wrong in ("auto8_from_float32", "auto8_from_bfloat16", "int8_from_bfloat16"):
        with pytest.raises(ValueError, match="the NNX model is wrapped with"):
            mp.save(path, model, policy=wrong)
    assert mp.serialize(mp.load_policy(path))["config"] == mp.serialize(auto8)["config"]


def test_other_forms_of_a_weight(tmp_path):
    policy = "int8_from_float32"
    model = mp.wrap(MLP(), policy)
    smooth = mp.quantize(model, float_variables(), calibration=[X * 3], method="smoothquant")
    up = smooth["params"]["up"]["kernel"]
    turned = mk.contiguous(mk.quantize(jnp.ones((96, 24)), "int8", axis=0), axis=0)
    scaled = mp.PreScaledWeight(
        mk.quantize(jnp.ones((64, 96)), "int8", axis=0), jnp.full((64, 1), 2.0)
    )
    smooth["params"]["up"]["kernel"] = up if isinstance(up, mp.PreScaledWeight) else scaled
    smooth["params"]["down"]["kernel"] = turned
    path = mp.save(tmp_path / "model.safetensors", smooth, policy=policy)
    loaded = mp.load(path, target="tpu7x")["params"]
    assert loaded["up"]["kernel"].format.name == loaded["down"]["kernel"].format.name == E4M3
    before = smooth["params"]["up"]["kernel"]
    np.testing.assert_array_equal(loaded["up"]["kernel"].pre_quant_scale, before.pre_quant_scale)
    assert loaded["down"]["kernel"].layout == turned.layout
    np.testing.assert_array_equal(mk.dequantize(loaded["down"]["kernel"]), 1)


def test_weight_only_and_grouped_weights_stay(tmp_path):
    for mode in ("int8_weight_only", "int4/32", "float8/128x128"):
        model = mp.wrap(nn.Dense(128), f"{mode}_from_float32")
        x = jnp.ones((2, 128))
        variables = mp.quantize(model, model.init(jax.random.key(0), x), x)
        path = mp.save(tmp_path / "model.safetensors", variables, policy=model.policy)
        for target in ("tpu7x", "v6e"):
            assert mp.load_policy(path, target=target) == model.policy
            jax.tree.map(np.testing.assert_array_equal, mp.load(path, target=target), variables)


def test_only_the_weights_of_a_layer_change(tmp_path):
    """Not a cache, nor a layer whose own policy says the same for every target."""
    policy = mp.DTypePolicyMap(
        "auto8_from_float32", {"down": "int8_weight_only_from_float32", "plain": "float32"}
    )
    q = mk.quantize(X, "int8", axis=1)
    params = {"up": {"kernel": q}, "down": {"kernel": q}}
    params["plain"] = {"table": q}  # of a layer that reads it itself
    path = tmp_path / "model.safetensors"
    mp.save(path, {"params": params, "cache": {"up": {"cached_key": q}}}, policy=policy)
    for target, format in (("tpu7x", E4M3), ("v6e", "int8"), ("v4", "float32")):
        loaded, report = mp.load(path, target=target, return_report=True)
        formats = {row.path: row.format for row in report.weights}
        assert formats.pop("params/up/kernel") == format
        assert set(formats.values()) == {"int8"} and len(formats) == 3
        np.testing.assert_array_equal(loaded["cache"]["up"]["cached_key"].values, q.values)


def test_a_requantized_weight_goes_where_shardings_say(tmp_path):
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    path, _, _ = saved(tmp_path)
    columns = NamedSharding(mesh, PartitionSpec(None, "x"))

    def shardings(name):
        return columns if name.endswith("kernel") else None

    kernel = mp.load(path, target="tpu7x", shardings=shardings)["params"]["up"]["kernel"]
    assert kernel.values.sharding == columns and kernel.scale.sharding == columns


def test_a_file_without_a_policy_cannot_be_requantized(tmp_path):
    model = mp.wrap(MLP(), "int8_from_float32")
    variables = mp.quantize(model, float_variables(), X)
    path = mp.save(tmp_path / "model.safetensors", variables)
    jax.tree.map(np.testing.assert_array_equal, mp.load(path), variables)
    with pytest.raises(mp.ModelFileError, match="saved without a policy.* for tpu7x is not known"):
        mp.load(path, target="tpu7x")


def test_the_wrong_format_is_refused_with_the_remedy():
    int8, float8 = (mp.wrap(MLP(), "auto8_from_float32", target=t) for t in ("v6e", "tpu7x"))
    variables = mp.quantize(int8, float_variables(), X)
    with pytest.raises(TypeError, match=r"stored in int8 .*mp.load\(path, target=...\)"):
        float8.apply(variables, X)
