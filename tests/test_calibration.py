"""`mp.quantize(calibration=)`: what batches decide, layer by layer, in Linen and NNX."""

import functools
import io
import json
import weakref
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from calibration_helpers import layer as data
from flax import nnx

import mpjax as mp
import mpjax_kernels as mk
from mpjax._input_statistics import RowSample
from mpjax._prescaled import PreScaledWeight
from mpjax._safetensors import open_safetensors
from tests.helpers import assert_trees_equal

KEY = jax.random.key(0)
INPUTS, WEIGHT = data(128, 64, 96, outliers=True)
BATCHES = [INPUTS[:32], INPUTS[32:64], INPUTS[64:]]
METHODS = {"smoothquant": "int8", "awq": "int4/64", "gptq": "int4/64"}
each_method = pytest.mark.parametrize(
    "method", ["smoothquant", "gptq", pytest.param("awq", marks=pytest.mark.slow)]
)


def dense(mode, **options):
    """A wrapped Dense without bias, and its variables."""
    model = mp.wrap(nn.Dense(64, use_bias=False), mp.QuantizedDTypePolicy(mode, "float32"))
    return model, {"params": {"kernel": jnp.asarray(WEIGHT)}}


def linear(mode):
    """The same in NNX."""
    layer = nnx.Linear(128, 64, use_bias=False, rngs=nnx.Rngs(0))
    layer.kernel[...] = jnp.asarray(WEIGHT)
    return mp.wrap(layer, mp.QuantizedDTypePolicy(mode, "float32"))


@functools.cache
def calibrated(mode, method):
    """Variables and report of the Dense."""
    model, variables = dense(mode)
    return mp.quantize(model, variables, calibration=BATCHES, method=method, return_report=True)


def relative_error(y, exact):
    y, exact = np.asarray(y, np.float64), np.asarray(exact, np.float64)
    return np.sqrt(np.sum((y - exact) ** 2) / np.sum(exact**2))


# -- static scales

AMAXES = [np.abs(x).max() for x in BATCHES]
OBSERVERS = {
    mp.AbsMax(): max(AMAXES),
    mp.MovingAverage(0.5): (AMAXES[0] / 4 + AMAXES[1] / 2 + AMAXES[2]) / 1.75,
    mp.Percentile(99.0): np.quantile(np.abs(INPUTS), 0.99, method="inverted_cdf"),
}


@pytest.mark.parametrize("observer", OBSERVERS, ids=lambda observer: type(observer).__name__)
def test_static_scales_are_those_of_the_observer(observer):
    model, variables = dense("int8_static")
    quantized = mp.quantize(model, variables, calibration=iter(BATCHES), observer=observer)
    scale = quantized["scaling"]["input"].scale
    # A histogram is right within a bin, amax / 4096.
    atol = max(AMAXES) / 4096 / 127 if isinstance(observer, mp.Percentile) else 0
    np.testing.assert_allclose(scale, OBSERVERS[observer] / 127, rtol=1e-6, atol=atol)
    x = np.clip(np.round(INPUTS / np.asarray(scale)), -127, 127) * np.asarray(scale)
    exact = x.astype(np.float64) @ np.asarray(mk.dequantize(quantized["params"]["kernel"]))
    np.testing.assert_allclose(model.apply(quantized, INPUTS), exact, rtol=2e-5, atol=2e-5)
    layer = mp.quantize(linear("int8_static"), calibration=BATCHES, observer=observer)
    np.testing.assert_array_equal(layer.scaling["input"][...].scale, scale)
    np.testing.assert_array_equal(layer(INPUTS), model.apply(quantized, INPUTS))


@pytest.mark.parametrize("observer", [mp.MSE(), pytest.param(mp.Entropy(), marks=pytest.mark.slow)])
def test_observers_that_clip_make_a_smaller_scale(observer):
    model, variables = dense("int8_static")
    quantized = mp.quantize(model, variables, calibration=BATCHES, observer=observer)
    format = mk.get_format("int8")
    state = functools.reduce(observer.update, BATCHES, observer.init())
    amax = observer.amax(state, format)
    assert 0 < amax <= max(AMAXES)
    np.testing.assert_allclose(quantized["scaling"]["input"].scale, amax / 127, rtol=1e-6)


def test_delayed_states_get_the_scale_in_their_history():
    policy = mp.QuantizedDTypePolicy("float8", "float32", amax_history_length=4, margin=1)
    model = mp.wrap(nn.Dense(64, use_bias=False), policy)
    trained = model.init(KEY, BATCHES[0])
    variables = {**trained, "params": {"kernel": jnp.asarray(WEIGHT)}}
    quantized = mp.quantize(model, variables, calibration=BATCHES)
    state = quantized["scaling"]["input"]
    np.testing.assert_allclose(state.amax_history, [max(AMAXES), 0, 0, 0], rtol=1e-6)
    np.testing.assert_allclose(state.scale, max(AMAXES) / 448 * 2, rtol=1e-6)
    for name in ("kernel", "output_grad"):
        assert_trees_equal(quantized["scaling"][name], trained["scaling"][name])


def test_inputs_of_zeros_alone_change_no_scale_and_no_rounding():
    zeros = [np.zeros_like(INPUTS)]
    model, variables = dense("int8_static")
    known = mp.quantize(model, variables, calibration=BATCHES)["scaling"]
    again = mp.quantize(model, {**variables, "scaling": known}, calibration=zeros)
    assert_trees_equal(again["scaling"], known)
    model, variables = dense("int4/64")
    options = {"calibration": zeros, "method": "gptq", "return_report": True}
    quantized, report = mp.quantize(model, variables, **options)
    assert_trees_equal(quantized["params"], mp.quantize(model, variables, INPUTS)["params"])
    assert "no input of it but zeros was seen" in str(report)


class Shared(nn.Module):
    @nn.compact
    def __call__(self, x):
        layer = nn.Dense(128, use_bias=False, name="layer")
        return layer(x) + layer(3 * x)


def test_a_layer_that_is_called_twice_merges_what_it_saw():
    model = mp.wrap(Shared(), "int8_static_from_float32")
    variables = {"params": Shared().init(KEY, INPUTS)["params"]}
    quantized = mp.quantize(model, variables, calibration=BATCHES)
    scale = quantized["scaling"]["layer"]["input"].scale
    np.testing.assert_allclose(scale, 3 * max(AMAXES) / 127, rtol=1e-6)


class Attention(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.MultiHeadDotProductAttention(2, name="attention")(x[None])


def test_both_operands_of_the_products_inside_attention_are_observed():
    policy = mp.QuantizedDTypePolicy("int8_delayed", "float32", quantize_attention=True)
    model = mp.wrap(Attention(), policy)
    x = BATCHES[0][:8]
    params = Attention().init(KEY, x)["params"]
    quantized = mp.quantize(model, {"params": params}, calibration=[x])
    found = quantized["scaling"]["attention"]
    projected = {
        name: np.einsum("td,dhk->thk", x, params["attention"][name]["kernel"])
        for name in ("query", "key", "value")
    }
    for state, amax in {
        "scores_input": np.abs(projected["query"]).max() / np.sqrt(64),
        "scores_kernel": np.abs(projected["key"]).max(),
    }.items():
        np.testing.assert_allclose(found[state].scale, amax / 127, rtol=1e-5)
    assert all(found[f"output_{name}"].scale > 0 for name in ("input", "kernel"))


# -- methods


@pytest.mark.parametrize("method", METHODS)
def test_a_method_beats_plain_rounding_and_reports_the_errors_of_the_outputs(method):
    mode = METHODS[method]
    model, variables = dense(mode)
    quantized, report = calibrated(mode, method)
    (row,) = report.weights
    exact = INPUTS.astype(np.float64) @ WEIGHT
    plain = mp.quantize(model, variables, INPUTS)
    errors = [relative_error(model.apply(each, INPUTS), exact) for each in (plain, quantized)]
    # Fewer rows than the sample holds, so each error is of all inputs; float32 sums.
    np.testing.assert_allclose((row.rounding.plain_error, row.rounding.error), errors, rtol=1e-3)
    assert row.rounding.method == method and row.rounding.note == ""
    assert errors[1] < 0.7 * errors[0]
    assert f"{method}: error {errors[0]:.1%}"[:-2] in str(report)


@each_method
def test_nnx_and_linen_store_the_same(method):
    mode = METHODS[method]
    expected = calibrated(mode, method)[0]["params"]["kernel"]
    layer = mp.quantize(linear(mode), calibration=iter(BATCHES), method=method)
    assert_trees_equal(layer.kernel.get_raw_value(), expected)
    assert type(expected) is (mk.QTensor if method == "gptq" else PreScaledWeight)
    np.testing.assert_array_equal(
        layer(INPUTS), dense(mode)[0].apply({"params": {"kernel": expected}}, INPUTS)
    )


def test_a_policy_may_name_the_method():
    by_policy, variables = dense("gptq/4/64")
    quantized = mp.quantize(by_policy, variables, calibration=BATCHES)
    assert_trees_equal(quantized["params"], calibrated("int4/64", "gptq")[0]["params"])
    again = mp.quantize(by_policy, variables, calibration=BATCHES, method="gptq")
    assert_trees_equal(again, quantized)


@pytest.mark.parametrize("observer", [mp.AbsMax(), pytest.param(mp.MSE(), marks=pytest.mark.slow)])
def test_smoothing_static_activations_takes_their_scale_after_it(observer):
    model, variables = dense("int8_static")
    quantized = mp.quantize(
        model, variables, calibration=BATCHES, method="smoothquant", observer=observer
    )
    weight, scale = quantized["params"]["kernel"], quantized["scaling"]["input"].scale
    smooth = INPUTS * np.asarray(weight.pre_quant_scale).ravel()
    amax = np.abs(smooth).max()
    if isinstance(observer, mp.MSE):  # sees the rows that were kept, here all of them
        state = observer.update(observer.init(), smooth)
        amax = observer.amax(state, mk.get_format("int8"))
    np.testing.assert_allclose(scale, amax / 127, rtol=1e-4)
    plain = mp.quantize(model, variables, calibration=BATCHES, observer=observer)
    exact = INPUTS.astype(np.float64) @ WEIGHT
    errors = [relative_error(model.apply(each, INPUTS), exact) for each in (quantized, plain)]
    assert errors[0] < 0.5 * errors[1]


def test_smoothed_inputs_have_the_scale_of_all_rows_and_weights_keep_their_dtype():
    """The largest input is in a row that is not among the 256 of 768 that SmoothQuant keeps."""
    model, _ = dense("int8_static")
    variables = {"params": {"kernel": jnp.asarray(WEIGHT, jnp.bfloat16)}}
    rows = np.tile(INPUTS, (8, 1))
    rows[700, 5] = 4 * max(AMAXES)
    sample = RowSample()
    kept = sample.result(sample.update(sample.init(128), jnp.asarray(rows)))
    assert np.abs(kept).max() < rows[700, 5]
    quantized = mp.quantize(model, variables, calibration=[rows], method="smoothquant")
    weight, scale = quantized["params"]["kernel"], quantized["scaling"]["input"].scale
    assert isinstance(weight, PreScaledWeight) and weight.dtype == jnp.bfloat16
    smooth = rows * np.asarray(weight.pre_quant_scale).ravel()
    assert np.abs(smooth[700]).max() == np.abs(smooth).max()
    np.testing.assert_allclose(scale, np.abs(smooth).max() / 127, rtol=1e-6)


def test_plain_rounding_is_kept_where_a_method_is_worse():
    """Weights on the grid of int8 are rounded exactly, whatever the inputs."""
    model, _ = dense("int8_weight_only")
    w = np.random.default_rng(0).integers(-127, 128, (128, 64)).astype(np.float32)
    w[0] = 127  # so that the scales are 1
    variables = {"params": {"kernel": jnp.asarray(w)}}
    quantized, report = mp.quantize(
        model, variables, calibration=BATCHES, method="smoothquant", return_report=True
    )
    (row,) = report.weights
    assert row.rounding.note == "plain rounding kept, which is no worse"
    assert row.rounding.error == row.rounding.plain_error
    assert_trees_equal(quantized, mp.quantize(model, variables, INPUTS))


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + nn.Dense(128, name="down")(nn.relu(nn.Dense(64, name="up")(x))), None


class Stack(nn.Module):
    scanned: bool = False

    @nn.compact
    def __call__(self, x):
        if not self.scanned:
            for i in range(2):
                x, _ = Block(name=f"block_{i}")(x, None)
            return x
        stack = nn.scan(
            nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=2
        )
        return stack(name="blocks")(x, None)[0]


@pytest.mark.parametrize(
    "method", ["gptq", *(pytest.param(m, marks=pytest.mark.slow) for m in ("smoothquant", "awq"))]
)
def test_each_layer_of_a_stack_has_its_own_statistics(method):
    """The user's scan lifts `params` alone, and need not be changed."""
    policy = f"{METHODS[method]}_from_float32"
    single = mp.wrap(Stack(), policy)
    params = Stack().init(KEY, INPUTS)["params"]
    options = {"calibration": [INPUTS], "method": method, "return_report": True}
    expected, unrolled = mp.quantize(single, {"params": params}, **options)
    blocks = params["block_0"], params["block_1"]
    stacked = {"blocks": jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks)}
    model = mp.wrap(Stack(scanned=True), policy)
    quantized, report = mp.quantize(model, {"params": stacked}, **options)
    for name in ("up", "down"):
        ours = quantized["params"]["blocks"][name]["kernel"]
        for i in range(2):
            theirs = expected["params"][f"block_{i}"][name]["kernel"]
            values = np.asarray(ours.values[i], np.int32) - np.asarray(theirs.values, np.int32)
            # Statistics are sums in another order, and a tie may round to the other side.
            assert np.mean(values != 0) < 0.01
            if method != "gptq":
                scale = ours.pre_quant_scale[i]
                np.testing.assert_allclose(scale, theirs.pre_quant_scale, rtol=1e-3)
        row = next(r for r in report.weights if r.path == f"params/blocks/{name}/kernel")
        of_each = [r.rounding.error for r in unrolled.weights if f"/{name}/" in r.path]
        assert 0.99 * min(of_each) < row.rounding.error < 1.01 * max(of_each)


class Kinds(nn.Module):
    """A layer of each kind that has a product."""

    @nn.compact
    def __call__(self, x):
        x = nn.DenseGeneral((4, 8), name="split")(x)
        x = nn.DenseGeneral(32, axis=(-2, -1), name="join")(x)
        x = nn.Einsum((16, 32), "...d,kd->...k", name="einsum")(x)
        x = nn.DenseGeneral(8, axis=-1, batch_dims=(0,), name="batched")(x)
        return nn.Conv(4, (3,), name="conv")(x[None])


@pytest.mark.slow
def test_every_kind_of_layer_is_rounded_by_the_method_or_says_why_not():
    model = mp.wrap(Kinds(), "int4/-1_from_float32")
    x = INPUTS[:32]
    params = Kinds().init(KEY, x)["params"]
    quantized, report = mp.quantize(
        model, {"params": params}, calibration=[x], method="gptq", return_report=True
    )
    notes = {row.path.split("/")[1]: row.rounding.note for row in report.weights}
    assert notes == {
        "split": "",
        "join": "",
        "einsum": "",
        "batched": "rounded to nearest: gptq is not built for products with batch axes",
        "conv": "rounded to nearest: gptq is for matrix products, and this is a convolution",
    }
    for row in report.weights:
        if row.rounding.note == "":
            assert row.rounding.error < 0.8 * row.rounding.plain_error
    # The einsum's kernel is [out, in]: as a Dense of its transpose.
    hidden = model.apply({"params": params}, x, capture_intermediates=True)[1]
    rows = np.asarray(hidden["intermediates"]["join"]["__call__"][0])
    alone = mp.wrap(nn.Dense(16, use_bias=False), "int4/-1_from_float32")
    kernel = {"params": {"kernel": params["einsum"]["kernel"].T}}
    same = mp.quantize(alone, kernel, calibration=[rows], method="gptq")["params"]["kernel"]
    values = np.asarray(quantized["params"]["einsum"]["kernel"].values, np.int32)
    assert np.mean(values.T != np.asarray(same.values, np.int32)) < 0.01  # sums, ties


@pytest.mark.slow
def test_smoothing_a_kernel_whose_inputs_are_two_axes_in_another_order():
    class Join(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Einsum((32, 4, 64), "bhd,dhk->bk", use_bias=False, name="join")(x)

    x = INPUTS.reshape(96, 4, 32)
    kernel = jnp.asarray(WEIGHT).reshape(4, 32, 64).transpose(1, 0, 2)  # the other way round
    model = mp.wrap(Join(), "int8_from_float32")
    variables = {"params": {"join": {"kernel": kernel}}}
    quantized = mp.quantize(model, variables, calibration=[x], method="smoothquant")
    q = quantized["params"]["join"]["kernel"]
    assert q.pre_quant_scale.shape == (32, 4, 1)
    exact = INPUTS.astype(np.float64) @ WEIGHT
    plain = mp.quantize(model, variables, x)
    errors = [relative_error(model.apply(each, x), exact) for each in (quantized, plain)]
    assert errors[0] < 0.7 * errors[1]


# -- batches


class Counting(nn.Module):
    """Counts how often it is traced."""

    traces = 0

    @nn.compact
    def __call__(self, x, scale=None, *, double=False):
        Counting.traces += 1
        x = x if scale is None else x * scale
        return nn.Dense(64, use_bias=False)(2 * x if double is True else x)


def test_a_batch_is_an_array_a_tuple_or_a_dict():
    model = mp.wrap(Counting(), "int8_static_from_float32")
    params = {"Dense_0": {"kernel": jnp.asarray(WEIGHT)}}
    top = np.float32(max(AMAXES))
    for batches, options, amax in [
        ([INPUTS], {}, top),
        ([(INPUTS, np.float32(3))], {}, 3 * top),
        ([{"x": INPUTS, "scale": np.float32(5)}], {}, 5 * top),
        ([INPUTS], {"double": True}, 2 * top),
        ([{"x": INPUTS, "double": False}], {"double": True}, top),
        (
            [(INPUTS, np.float32(3))],
            {"method": lambda m, x, scale: m(x, scale, double=True)},
            6 * top,
        ),
        # What is no array may differ from batch to batch, in its type alone too.
        ([{"x": INPUTS, "double": value} for value in (False, 1, True)], {}, 2 * top),
    ]:
        quantized = mp.quantize(model, {"params": params}, calibration=batches, **options)
        scale = quantized["scaling"]["Dense_0"]["input"].scale
        np.testing.assert_allclose(scale, amax / 127, rtol=1e-6)


class Scaled(NamedTuple):
    x: np.ndarray
    scale: float


class OfOneArgument(nn.Module):
    @nn.compact
    def __call__(self, scaled):
        return nn.Dense(64, use_bias=False)(scaled.x * scaled.scale)


def test_a_named_tuple_is_one_argument():
    model = mp.wrap(OfOneArgument(), "int8_static_from_float32")
    variables = {"params": {"Dense_0": {"kernel": jnp.asarray(WEIGHT)}}}
    quantized = mp.quantize(model, variables, calibration=[Scaled(INPUTS, 3.0)])
    scale = quantized["scaling"]["Dense_0"]["input"].scale
    np.testing.assert_allclose(scale, 3 * max(AMAXES) / 127, rtol=1e-6)


def test_one_batch_is_held_at_a_time_and_each_shape_is_traced_once():
    model = mp.wrap(Counting(), "int8_static_from_float32")
    params = {"Dense_0": {"kernel": jnp.asarray(WEIGHT)}}
    alive, most = [], []

    def batches(count):
        for i in range(count):
            batch = np.array(INPUTS[: 32 + 8 * (i % 2)])
            alive.append(weakref.ref(batch))
            most.append(sum(ref() is not None for ref in alive))
            yield batch
            del batch

    traces = []
    for count in (2, 30):
        Counting.traces = 0
        mp.quantize(model, {"params": params}, calibration=batches(count))
        traces.append(Counting.traces)
    assert traces[0] == traces[1]
    assert max(most) <= 4  # the first, the example, the one that runs and the one that is made


def test_the_example_may_be_given_too():
    model, variables = dense("int8_static")
    example = jax.ShapeDtypeStruct((1, 128), jnp.float32)
    given = mp.quantize(model, variables, example, calibration=BATCHES)
    assert_trees_equal(given, mp.quantize(model, variables, calibration=BATCHES))


def test_a_progress_bar_is_shown_where_it_is_asked_for(monkeypatch):
    pytest.importorskip("tqdm")
    model, variables = dense("int8_static")
    for progress, shown in [(None, False), (False, False), (True, True)]:
        stderr = io.StringIO()
        monkeypatch.setattr("sys.stderr", stderr)
        mp.quantize(model, variables, calibration=BATCHES, progress=progress)
        assert ("calibrating: 100%" in stderr.getvalue() and "3/3" in stderr.getvalue()) is shown


# -- what calibration makes goes wherever weights go


def test_a_prescaled_weight_is_saved_loaded_and_exported(tmp_path):
    model, _ = dense("int8")
    quantized = calibrated("int8", "smoothquant")[0]
    path = mp.save(tmp_path / "model.safetensors", quantized, policy=model.policy)
    loaded = mp.load(path)
    assert_trees_equal(loaded, quantized)
    y = jax.jit(model.apply)(quantized, INPUTS)
    np.testing.assert_array_equal(jax.jit(model.apply)(loaded, INPUTS), y)
    layer = linear("int8")
    layer.kernel.set_raw_value(quantized["params"]["kernel"])
    path = mp.save(tmp_path / "nnx.safetensors", layer)
    layer = mp.load(path, linear("int8"))
    np.testing.assert_array_equal(nnx.jit(lambda m, x: m(x))(layer, INPUTS), y)
    blob = mp.export(model, quantized, INPUTS, platforms=("cpu",))
    np.testing.assert_array_equal(mp.load_exported(blob)(INPUTS), y)
    template = jax.eval_shape(lambda: quantized)
    assert jax.eval_shape(model.apply, template, INPUTS).shape == y.shape


def version(path):
    with open_safetensors(path) as file:
        return json.loads(file.metadata["mpjax"])["version"]


def test_only_files_with_prescaled_weights_are_of_the_new_version(tmp_path):
    plain = mp.save(tmp_path / "plain.safetensors", calibrated("int4/64", "gptq")[0])
    new = mp.save(tmp_path / "new.safetensors", calibrated("int8", "smoothquant")[0])
    assert (version(plain), version(new)) == (1, 2)


def test_an_nnx_model_with_a_prescaled_weight_is_split_merged_and_cloned():
    layer = mp.quantize(linear("int8"), calibration=BATCHES, method="smoothquant")
    y = layer(INPUTS)
    for copy in (nnx.clone(layer), nnx.merge(*nnx.split(layer))):
        np.testing.assert_array_equal(copy(INPUTS), y)
    assert mp.unwrap(nnx.clone(layer)).kernel.get_raw_value().shape == (128, 64)
    with pytest.raises(ValueError, match="'' is quantized .PreScaledWeight.*cannot undo"):
        mp.wrap(nnx.clone(layer), "float32")


class NNXStack(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        @nnx.split_rngs(splits=2)
        @nnx.vmap
        def make(rngs):
            return nnx.Linear(128, 128, use_bias=False, rngs=rngs)

        self.layers = make(rngs)

    def __call__(self, x):
        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        def forward(layer, x):
            return jax.nn.relu(layer(x))

        return forward(self.layers, x)


@pytest.mark.parametrize("mode", ["int8_static", pytest.param("int8", marks=pytest.mark.slow)])
def test_a_stack_of_nnx_layers_has_statistics_of_each(mode):
    model = mp.wrap(NNXStack(nnx.Rngs(0)), f"{mode}_from_float32")
    kernels = np.asarray(model.layers.kernel[...])
    exact = INPUTS
    seen = []
    for kernel in kernels:
        seen.append(exact)
        exact = np.maximum(exact @ kernel, 0)
    mp.quantize(model, calibration=BATCHES, method="smoothquant")
    weight = model.layers.kernel.get_raw_value()
    assert weight.pre_quant_scale.shape == (2, 128, 1)
    if mode == "int8_static":
        scales = np.asarray(weight.pre_quant_scale)
        smooth = [np.abs(x * s[:, 0]).max() for x, s in zip(seen, scales, strict=True)]
        scale = model.layers.scaling["input"].get_raw_value().scale
        np.testing.assert_allclose(scale, np.asarray(smooth) / 127, rtol=1e-4)
    assert relative_error(model(INPUTS), exact) < 0.03


def test_partitioned_weights_keep_their_names():
    names = nn.with_partitioning(nn.initializers.lecun_normal(), ("in", "out"))
    model = mp.wrap(nn.Dense(64, kernel_init=names), "int8_from_float32")
    variables = model.init(KEY, INPUTS)
    quantized = mp.quantize(model, variables, calibration=[INPUTS], method="smoothquant")
    boxed = quantized["params"]["kernel"]
    assert boxed.names == ("in", "out") and isinstance(boxed.value, PreScaledWeight)
    model.apply(quantized, INPUTS)


def test_static_scales_of_a_stack_whose_scan_lifts_them():
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return nn.relu(nn.Dense(128, use_bias=False, name="dense")(x)), None

    class Lifted(nn.Module):
        axes: tuple = ("params", "scaling")

        @nn.compact
        def __call__(self, x):
            axes = {"variable_axes": dict.fromkeys(self.axes, 0), "split_rngs": {"params": True}}
            return nn.scan(Layer, length=2, **axes)(name="layers")(x, None)[0]

    params = Lifted().init(KEY, INPUTS)["params"]
    model = mp.wrap(Lifted(), "int8_static_from_float32")
    quantized = mp.quantize(model, {"params": params}, calibration=BATCHES)
    hidden = np.maximum(INPUTS @ params["layers"]["dense"]["kernel"][0], 0)
    amaxes = np.asarray([np.abs(INPUTS).max(), hidden.max()])
    scale = quantized["scaling"]["layers"]["dense"]["input"].scale
    np.testing.assert_allclose(scale, amaxes / 127, rtol=1e-5)
    unlifted = mp.wrap(Lifted(axes=("params",)), "int8_static_from_float32")
    with pytest.raises(ValueError, match="layer 'layers/dense' keeps scaling state .* add"):
        mp.quantize(unlifted, {"params": params}, calibration=BATCHES)
