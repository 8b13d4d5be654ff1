"""`when="profitable"`: the roofline that decides, and the layers that it leaves as they are."""

import json
import re
import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import mpjax as mp
import mpjax_kernels as mk

# Round figures, so that the arithmetic below can be followed.
TOY = mp.Target(
    name="toy",
    platform="tpu",
    peak={"float32": 1e9, "bfloat16": 1e9, "int8": 2e9, "float8_e4m3fn": 2e9},
    bandwidth=1e6,
)
GPU = mp.Target(name="toy-gpu", platform="cuda", peak=TOY.rates, bandwidth=1e6)


def times(rows, terms, columns, target=TOY, **how):
    size = mp.ProductSize.of_dot((rows, terms), (terms, columns), (0,))
    defaults = {"compute_dtype": "bfloat16", "format": "int8", "weight_bytes": 2}
    return mp.roofline(target, size, **{**defaults, **how})


def test_the_roofline_where_memory_is_the_limit():
    # 1 x 100 by 100 x 10: 2000 operations are 2 us, less than any of the bytes take.
    x, w, y = 100, 1000, 10
    got = times(1, 100, 10, is_stored=True)
    assert got.plain == pytest.approx((2 * x + 2 * w + 2 * y) / 1e6)
    assert got.quantized == pytest.approx((2 * x + 3 * x + x + w + 2 * y) / 1e6)
    assert got.pays
    # A weight that is quantized at every call is read twice, written, and read again.
    assert times(1, 100, 10).quantized == pytest.approx(got.quantized + 5 * w / 1e6)
    # Elsewhere than on TPUs the sums are written in 4 bytes, and read to be scaled.
    gpu = times(1, 100, 10, target=GPU, is_stored=True)
    assert gpu.quantized == pytest.approx(got.quantized + 8 * y / 1e6)
    known = times(1, 100, 10, is_stored=True, is_scale_known=True)
    assert known.quantized == pytest.approx(got.quantized - 2 * x / 1e6)


def test_the_roofline_where_arithmetic_is_the_limit():
    rows, terms, columns = 10**5, 10**5, 10**5
    got = times(rows, terms, columns, is_stored=True)
    operations = 2 * rows * terms * columns
    assert got.plain == pytest.approx(operations / 1e9)
    assert got.quantized == pytest.approx(operations / 2e9 + 5 * rows * terms / 1e6)


@pytest.mark.parametrize("name", ["v5e", "v6e", "tpu7x"])
def test_the_thresholds_follow_from_the_figures(name):
    target = mp.resolve_target(name)
    format = target.eight_bits
    slow, fast = target.rate("bfloat16"), target.rate(format)
    columns = max(5 / target.bandwidth, 1 / target.quantizes) / (2 / slow - 2 / fast)
    many = 2**20
    for factor, pays in ((0.98, False), (1.02, True)):
        wide = round(columns * factor)
        assert times(many, 8192, wide, target, format=format, is_stored=True).pays == pays
        # Likewise the rows, for a weight that is quantized at every call.
        assert times(wide, 8192, many, target, format=format).pays == pays
    stated = {"v5e": 3500, "v6e": 6900, "tpu7x": 4800}[name]
    assert columns == pytest.approx(stated, rel=0.03)


def test_formats_that_are_not_native_never_pay_for_many_rows():
    for name, format in (("v6e", "float8_e4m3fn"), ("tpu7x", "int8"), ("v4", "int8")):
        target = mp.resolve_target(name)
        got = times(2**15, 8192, 8192, target, format=format, is_stored=True)
        assert not got.pays and got.quantized > got.plain


def test_convolutions_and_batches_are_counted():
    size = mp.ProductSize.of_conv((2, 8, 8, 3), (3, 3, 3, 5), (0, 1, 2), (2, 8, 8, 5))
    assert size == mp.ProductSize(2 * 64 * 3, 135, 2 * 64 * 5, 27)
    assert mp.ProductSize.of_dot((4, 7, 8), (4, 8, 5), (1,), (0,)) == mp.ProductSize(
        4 * 7 * 8, 4 * 8 * 5, 4 * 7 * 5, 8
    )


# -- layers


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(4, name="thin")(nn.relu(nn.Dense(4096, name="wide")(x)))


class MLPNNX(nnx.Module):
    def __init__(self, rngs):
        self.wide = nnx.Linear(64, 4096, rngs=rngs)
        self.thin = nnx.Linear(4096, 4, rngs=rngs)

    def __call__(self, x):
        return self.thin(nnx.relu(self.wide(x)))


# Arithmetic counts little here, and reading much: so wide outputs pay and thin ones do not.
SLOW = mp.Target(
    name="slow", platform="tpu", peak={"float32": 1e9, "int8": 4e9}, bandwidth=100e6
)  # columns > 9 / 1e8 / (2e-9 - 5e-10) = 60
ROWS = 512
X = jax.random.normal(jax.random.key(0), (ROWS, 64))
POLICY = "int8_from_float32"


def test_a_thin_layer_stays_and_the_report_says_why():
    model = mp.wrap(MLP(), POLICY, target=SLOW, when="profitable")
    variables = model.init(jax.random.key(1), X)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it was asked for
        quantized, report = mp.quantize(model, variables, X, return_report=True)
        mp.quantize(model, variables, X)
    wide, thin = (quantized["params"][name]["kernel"] for name in ("wide", "thin"))
    assert isinstance(wide, mk.QTensor) and thin is variables["params"]["thin"]["kernel"]
    (left,) = (row for row in report.weights if row.path == "params/thin/kernel")
    assert report.left == () and not left.wanted and left.dtype == "float32"
    assert left.reason.startswith("8 bits cost time on slow: 512 rows of 4096 by 4 columns take ")
    assert left.reason in str(report)
    always = mp.wrap(MLP(), mp.DTypePolicyMap(POLICY, {"thin": "float32"}))
    np.testing.assert_array_equal(
        model.apply(quantized, X), always.apply(mp.quantize(always, variables, X), X)
    )


def test_explain_says_that_it_would_not_pay():
    model = mp.wrap(MLP(), POLICY, target=SLOW, when="profitable")
    variables = model.init(jax.random.key(1), X)
    quantized = mp.quantize(model, variables, X)
    found = mp.explain(model.apply, quantized, X, target="cpu")
    assert {each.path: each.reason for each in found.products} == {
        "wide": "",
        "thin": "unprofitable",
    }
    assert found.misses == ()


def test_one_row_reads_less_in_8_bits():
    model = mp.wrap(MLP(), POLICY, target=SLOW, when="profitable")
    variables = model.init(jax.random.key(1), X)
    few = mp.quantize(model, variables, X[:1])
    assert isinstance(few["params"]["wide"]["kernel"], mk.QTensor)
    # 4096 inputs are read twice and written; 4 times as many weights save 3 bytes of 4.
    assert isinstance(few["params"]["thin"]["kernel"], mk.QTensor)


def int8_products(function, *args):
    """How many products of a program for TPUs multiply int8."""
    text = jax.jit(function).trace(*args).lower(lowering_platforms=("tpu",)).as_text()
    return len(re.findall(r"dot_general.*xi8>, tensor<[\dx]+xi8>\) -> tensor<[\dx]+xi32>", text))


def test_float_weights_are_quantized_only_for_enough_rows():
    model = mp.wrap(MLP(), POLICY, target=SLOW, when="profitable")
    always = mp.wrap(MLP(), POLICY)
    variables = always.init(jax.random.key(1), X)
    assert int8_products(always.apply, variables, X) == 2
    assert int8_products(model.apply, variables, X) == 1  # the wide one
    # One row: the weight would be read twice and written to save a single reading.
    assert int8_products(always.apply, variables, X[:1]) == 2
    assert int8_products(model.apply, variables, X[:1]) == 0
    plain = mp.wrap(MLP(), "float32")
    np.testing.assert_array_equal(model.apply(variables, X[:1]), plain.apply(variables, X[:1]))


def test_a_product_that_is_left_keeps_its_scaling_state():
    policy = "int8_delayed_from_float32"
    model = mp.wrap(MLP(), policy, target=SLOW, when="profitable")
    variables = model.init(jax.random.key(1), X)
    assert set(variables["scaling"]) == {"wide", "thin"}
    _, updates = model.apply(variables, X, mutable=["scaling"])
    after = mp.update_scaling(updates["scaling"])
    before = variables["scaling"]
    assert after["wide"]["input"].amax_history[0] == jnp.abs(X).max()
    jax.tree.map(np.testing.assert_array_equal, after["thin"], before["thin"])


def test_nnx():
    model = mp.wrap(MLPNNX(nnx.Rngs(0)), POLICY, target=SLOW, when="profitable")
    floats = nnx.clone(model)
    assert int8_products(lambda x: floats(x), X) == 1
    model, report = mp.quantize(model, return_report=True)
    assert isinstance(model.wide.kernel.get_raw_value(), mk.QTensor)
    assert isinstance(model.thin.kernel.get_raw_value(), jax.Array)
    (reason,) = (row.reason for row in report.weights if row.reason)
    assert "8 bits cost time on slow: 1048576 rows of 4096 by 4 columns" in reason
    assert int8_products(lambda x: model(x), X) == 1
    few = mp.quantize(floats, rows=1)
    assert isinstance(few.thin.kernel.get_raw_value(), mk.QTensor)


@pytest.mark.parametrize("api", ["linen", "nnx"])
def test_a_model_of_which_nothing_pays_stays_as_it_is(api):
    useless = mp.Target(name="none", platform="cpu", peak={"float32": 1e9}, bandwidth=1e6)
    if api == "linen":
        model = mp.wrap(MLP(), POLICY, target=useless, when="profitable")
        variables = model.init(jax.random.key(1), X)
        same, report = mp.quantize(model, variables, X, return_report=True)
        jax.tree.map(np.testing.assert_array_equal, same, variables)
    else:
        model = mp.wrap(MLPNNX(nnx.Rngs(0)), POLICY, target=useless, when="profitable")
        _, report = mp.quantize(model, return_report=True)
        assert isinstance(model.wide.kernel.get_raw_value(), jax.Array)
    assert report.quantized == () and len(report.weights) == 2


def test_weight_only_policies_are_not_judged():
    model = mp.wrap(MLP(), "int8_weight_only_from_float32", target=SLOW, when="profitable")
    variables = model.init(jax.random.key(1), X)
    _, report = mp.quantize(model, variables, X, return_report=True)
    assert len(report.quantized) == 2


def test_convolutions_are_judged():
    images, reports = jax.ShapeDtypeStruct((8, 16, 16, 32), jnp.float32), []
    for features in (4, 512):
        model = mp.wrap(nn.Conv(features, (3, 3)), POLICY, target=SLOW, when="profitable")
        shapes = jax.eval_shape(model.init, jax.random.key(0), images)

        def quantize(variables, model=model):
            quantized, report = mp.quantize(model, variables, images, return_report=True)
            reports.append(report)
            return quantized

        jax.eval_shape(quantize, shapes)
    (thin,), (wide,) = (report.weights for report in reports)
    assert "2048 rows of 288 by 4 columns" in thin.reason and wide.reason is None


def test_an_export_for_any_number_of_rows():
    model = mp.wrap(MLP(), POLICY, target=SLOW, when="profitable")
    variables = model.init(jax.random.key(1), X)
    quantized = mp.quantize(model, variables, X)
    (rows,) = jax.export.symbolic_shape("rows")
    shape = jax.ShapeDtypeStruct((rows, 64), X.dtype)
    blob = mp.export(model, quantized, shape, platforms=("cpu",))
    np.testing.assert_array_equal(mp.load_exported(blob)(X), jax.jit(model.apply)(quantized, X))


def test_an_empty_product_is_not_judged():
    model = mp.wrap(nn.Dense(4, use_bias=False), POLICY, target=SLOW, when="profitable")
    variables = model.init(jax.random.key(1), jnp.ones((0, 8)))
    assert model.apply(variables, jnp.ones((0, 8))).shape == (0, 4)


def test_calibration_leaves_them_too():
    for policy in (POLICY, "int8_static_from_float32"):
        model = mp.wrap(MLP(), policy, target=SLOW, when="profitable")
        variables = MLP().init(jax.random.key(1), X)
        method = None if "static" in policy else "smoothquant"
        quantized, report = mp.quantize(
            model, variables, calibration=[X], method=method, return_report=True
        )
        assert [row.path for row in report.quantized] == ["params/wide/kernel"]
        assert jnp.isfinite(model.apply(quantized, X)).all()


def test_what_it_decides_is_part_of_the_policy_and_of_caches():
    policy = mp.get_policy(POLICY)
    profitable = policy.resolve(SLOW, when="profitable")
    assert profitable.profitable_on == SLOW and policy.profitable_on is None
    assert profitable != policy and profitable.name == policy.name
    named = policy.resolve("v6e", when="profitable")
    assert named.get_config() == {**policy.get_config(), "profitable_on": "v6e"}
    with pytest.raises(ValueError, match="`when` is 'sometimes': it must be 'always' or 'profi"):
        mp.wrap(MLP(), POLICY, when="sometimes")


@pytest.mark.parametrize("on", [SLOW, "v6e"])
def test_a_config_restores_it(on):
    policy = mp.get_policy(POLICY).resolve(on, when="profitable")
    config = json.loads(json.dumps(mp.serialize(policy)))
    assert mp.deserialize(config) == policy
    assert mp.deserialize(config).profitable_on == mp.resolve_target(on)
    delayed = mp.get_policy("float8_from_mixed_bfloat16").resolve(on, when="profitable")
    assert mp.deserialize(mp.serialize(delayed)) == delayed


@pytest.mark.parametrize("api", ["linen", "nnx"])
def test_a_saved_model_leaves_the_same_layers(api, tmp_path):
    path = tmp_path / "model.safetensors"
    if api == "linen":
        model = mp.wrap(MLP(), POLICY, target=SLOW, when="profitable")
        quantized = mp.quantize(model, model.init(jax.random.key(1), X), X)
        mp.save(path, quantized, policy=model.policy)
        loaded = mp.load(path)
        again = mp.wrap(MLP(), mp.load_policy(path))  # without when= and target=
        thin = loaded["params"]["thin"]["kernel"]
        before, after = model.apply(quantized, X), again.apply(loaded, X)
        assert int8_products(again.apply, loaded, X) == 1
    else:
        model = mp.wrap(MLPNNX(nnx.Rngs(0)), POLICY, target=SLOW, when="profitable")
        mp.save(path, mp.quantize(model))
        again = mp.wrap(MLPNNX(nnx.Rngs(1)), mp.load_policy(path))
        mp.load(path, again)
        thin = again.thin.kernel.get_raw_value()
        before, after = model(X), again(X)
        assert int8_products(lambda x: again(x), X) == 1
    assert isinstance(thin, jax.Array)
    np.testing.assert_array_equal(before, after)


def test_for_another_target_it_is_judged_there(tmp_path):
    path = tmp_path / "model.safetensors"
    model = mp.wrap(MLP(), POLICY, target=SLOW, when="profitable")
    quantized = mp.quantize(model, model.init(jax.random.key(1), X), X)
    mp.save(path, quantized, policy=model.policy)
    policy = mp.load_policy(path, target="tpu7x")
    assert (policy.mode, policy.profitable_on.name) == ("float8/row", "tpu7x")
    assert mp.load_policy(path, target="v5e").profitable_on.name == "v5e"
    loaded = mp.load(path, target="tpu7x")["params"]
    assert loaded["wide"]["kernel"].format.name == "float8_e4m3fn"
    assert isinstance(loaded["thin"]["kernel"], jax.Array)
    moved = mp.wrap(MLP(), mp.load_policy(path), target="v6e").policy
    assert (moved.mode, moved.profitable_on.name) == ("int8", "v6e")


@pytest.mark.parametrize("rows", [0, -1, 1.5, "8"])
def test_a_call_of_an_nnx_model_has_rows(rows):
    model = mp.wrap(nnx.Linear(8, 8, rngs=nnx.Rngs(0)), "int8_from_float32")
    with pytest.raises(ValueError, match=f"at least 1. Received: rows={rows!r}; left out"):
        mp.quantize(model, rows=rows)
    assert isinstance(mp.quantize(model, rows=np.int64(1)).kernel.get_raw_value(), mk.QTensor)


def test_a_linen_call_without_rows_decides_nothing():
    x = jnp.ones((0, 8))
    variables = nn.Dense(8).init(jax.random.key(0), x)
    model = mp.wrap(nn.Dense(8), "int8_from_float32", target="v6e", when="profitable")
    with pytest.raises(ValueError, match=r"no rows \(an array of shape \(0, 8\)\), and by their"):
        mp.quantize(model, variables, x)
    model = mp.wrap(nn.Dense(8), "int8_from_float32")
    assert isinstance(mp.quantize(model, variables, x)["params"]["kernel"], mk.QTensor)
