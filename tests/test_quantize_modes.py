"""`mp.quantize` under every mode: what is stored, and the products of the definition."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

import mpjax as mp
import mpjax_kernels as mk
from mpjax._stored import CannotStoreError, runs
from tests.helpers import assert_trees_equal, dot_dtypes

KEY = jax.random.key(0)
X = np.asarray(jax.random.normal(KEY, (3, 256)))
WEIGHT = np.asarray(jax.random.normal(jax.random.key(1), (256, 128))) / 16
E4M3 = ml_dtypes.float8_e4m3fn


def rounded(x, format):
    """The value of a format next to a number within its range."""
    return np.round(x) if format == "int8" else x.astype(E4M3).astype(np.float32)


def values(x, format, scale):
    largest = {"int8": 127, "float8_e4m3fn": 448}[format]
    return rounded(np.clip(x / scale, -largest, largest), format)


@dataclasses.dataclass(frozen=True)
class Expected:
    """What a mode stores of a [256, 128] weight, and the scale of a [3, 256] activation."""

    format: str
    scales: tuple[int, ...]
    activation: str | None = None
    amax: Any = None


def rows(x):
    return np.abs(x).max(1, keepdims=True)


def tensor(x):
    return np.abs(x).max()


def blocks(x):
    return np.repeat(np.abs(x.reshape(3, 2, 128)).max(2), 128, axis=1)


MODES = {
    "int8": Expected("int8", (1, 128), "int8", rows),
    "int8_static": Expected("int8", (1, 128), "int8", tensor),
    "int8_delayed": Expected("int8", (1, 128), "int8", tensor),
    "int8_weight_only": Expected("int8", (1, 128)),
    "int4/64": Expected("int4", (4, 128)),
    "w4a8/64": Expected("int4", (4, 128), "int8", rows),
    "int4/-1": Expected("int4", (1, 128)),
    "float8": Expected("float8_e4m3fn", (1, 1), "float8_e4m3fn", tensor),
    "float8_current": Expected("float8_e4m3fn", (1, 1), "float8_e4m3fn", tensor),
    "float8/row": Expected("float8_e4m3fn", (1, 128), "float8_e4m3fn", rows),
    "float8/128x128": Expected("float8_e4m3fn", (2, 1), "float8_e4m3fn", blocks),
}


def quantized_dense(mode, **options):
    """The quantized variables of a Dense, and the wrapped NNX layer with the same weight."""
    policy = mp.QuantizedDTypePolicy(mode, "float32", **options)
    model = mp.wrap(nn.Dense(128, use_bias=False), policy)
    variables = {**model.init(KEY, X), "params": {"kernel": jnp.asarray(WEIGHT)}}
    layer = nnx.Linear(256, 128, use_bias=False, rngs=nnx.Rngs(0))
    layer.kernel[...] = jnp.asarray(WEIGHT)
    layer = mp.wrap(layer, policy)
    return model, mp.quantize(model, variables, X), mp.quantize(layer)


@pytest.mark.parametrize("mode", MODES)
def test_products_are_those_of_the_definition(mode):
    expected = MODES[mode]
    model, variables, layer = quantized_dense(mode)
    w = variables["params"]["kernel"]
    assert (w.format.name, w.scale.shape) == (expected.format, expected.scales)
    exact = np.asarray(mk.dequantize(w), np.float64)
    x = np.asarray(X, np.float64)
    if expected.activation is not None:
        largest = {"int8": 127, "float8_e4m3fn": 448}[expected.activation]
        scale = expected.amax(X) / np.float32(largest)
        x = values(X, expected.activation, scale).astype(np.float64) * scale
    y = jax.jit(model.apply)(variables, X)
    np.testing.assert_allclose(y, x @ exact, rtol=2e-5, atol=2e-5)
    np.testing.assert_array_equal(nnx.jit(lambda layer, x: layer(x))(layer, X), y)
    dtypes = dot_dtypes(model.apply, variables, X)
    if expected.activation == expected.format == "int8":
        assert dtypes == [("int8", "int8")]


def test_what_is_stored_is_within_half_a_step_of_the_weight():
    for mode in MODES:
        q = quantized_dense(mode)[1]["params"]["kernel"]
        step = np.asarray(mk.dequantize(dataclasses.replace(q, values=jnp.ones_like(q.values))))
        width = {"int8": 1, "int4": 1}.get(q.format.name, 2 * 448 / 16)  # E4M3 below its largest
        error = np.abs(np.asarray(mk.dequantize(q)) - WEIGHT)
        assert (error <= 0.5 * (1 + 1e-5) * width * step).all(), mode


def test_zero_points_take_an_unbalanced_weight():
    model, variables, _ = quantized_dense("int4/64", symmetric=False)
    q = variables["params"]["kernel"]
    assert q.zero_point is not None and q.zero_point.shape == (4, 128)
    shifted = {"params": {"kernel": jnp.asarray(WEIGHT) + 0.5}}
    errors = {}
    for symmetric in (True, False):
        policy = mp.QuantizedDTypePolicy("int4/64", "float32", symmetric=symmetric)
        model = mp.wrap(nn.Dense(128, use_bias=False), policy)
        q = mp.quantize(model, shifted, X)["params"]["kernel"]
        errors[symmetric] = np.abs(mk.dequantize(q) - shifted["params"]["kernel"]).mean()
    assert errors[False] < 0.5 * errors[True]


@pytest.mark.parametrize("mode", ["int8_static", "float8"])
def test_a_known_scale_of_the_activation_is_used_and_clips(mode):
    largest = {"int8_static": 127, "float8": 448}[mode]
    model = mp.wrap(nn.Dense(128, use_bias=False), f"{mode}_from_float32")
    variables = model.init(KEY, X)
    _, seen = model.apply(variables, X / 8, mutable=["scaling"])
    variables = {**variables, **mp.update_scaling(seen)}
    quantized = mp.quantize(model, variables, X)
    scale = np.float32(tensor(X / 8) / largest)
    format = quantized["params"]["kernel"].format.name
    exact = (
        values(X, format, scale) * scale @ np.asarray(mk.dequantize(quantized["params"]["kernel"]))
    )
    y = model.apply(quantized, X)
    np.testing.assert_allclose(y, exact, rtol=2e-5, atol=2e-5)


# -- layers


@pytest.mark.parametrize("groups", [1, pytest.param(2, marks=pytest.mark.slow), 4])
@pytest.mark.parametrize(
    "mode",
    [
        "int8",
        "float8_current",
        *(
            pytest.param(mode, marks=pytest.mark.slow)
            for mode in ("int8_weight_only", "float8/row")
        ),
    ],
)
def test_convolutions(mode, groups):
    """Grouped and depthwise ones too: by the dequantized operands, in float32."""
    x = np.asarray(jax.random.normal(KEY, (2, 9, 4)))
    module = nn.Conv(8, (3,), feature_group_count=groups, use_bias=False)
    model = mp.wrap(module, f"{mode}_from_float32")
    variables = model.init(KEY, x)
    quantized = mp.quantize(model, variables, x)
    q = quantized["params"]["kernel"]
    assert q.scale.shape == ((1, 1, 1) if mode == "float8_current" else (1, 1, 8))
    if mode != "int8_weight_only":
        amax = tensor(x) if mode == "float8_current" else np.abs(x).max((1, 2), keepdims=True)
        scale = amax / np.float32({"int8": 127, "float8_e4m3fn": 448}[q.format.name])
        x = values(x, q.format.name, scale) * scale
    expected = module.apply({"params": {"kernel": mk.dequantize(q)}}, x)
    np.testing.assert_allclose(jax.jit(model.apply)(quantized, x), expected, rtol=1e-4, atol=1e-5)
    if groups == 1:
        layer = nnx.Conv(4, 8, (3,), use_bias=False, rngs=nnx.Rngs(0))
        layer.kernel[...] = variables["params"]["kernel"]
        layer = mp.quantize(mp.wrap(layer, f"{mode}_from_float32"))
        np.testing.assert_allclose(layer(x), expected, rtol=0.1, atol=0.1)


class Tied(nn.Module):
    """Looks up, and predicts by the same table."""

    def setup(self):
        self.embed = nn.Embed(32, 128)

    def __call__(self, tokens):
        return self.embed.attend(self.embed(tokens))


class TiedNNX(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(32, 128, rngs=rngs)

    def __call__(self, tokens):
        return self.embed.attend(self.embed(tokens))


@pytest.mark.parametrize(
    "mode", ["int8", "int8_weight_only", "int4/64", "w4a8/64", "float8/row", "float8"]
)
def test_a_tied_embedding(mode):
    tokens = jnp.arange(6).reshape(2, 3)
    model = mp.wrap(Tied(), f"{mode}_from_mixed_bfloat16")
    variables = model.init(KEY, tokens)
    quantized = mp.quantize(model, variables, tokens)
    table = quantized["params"]["embed"]["embedding"]
    assert isinstance(table, mk.QTensor)
    y = model.apply(quantized, tokens)
    assert y.dtype == jnp.bfloat16 and y.shape == (2, 3, 32)
    exact = np.asarray(mk.dequantize(table, jnp.float32))
    rows = exact[np.asarray(tokens)].astype(jnp.bfloat16).astype(np.float32)
    error = np.abs(np.asarray(y, np.float32) - rows @ exact.T).max() / np.abs(rows @ exact.T).max()
    assert error < {"int8": 0.02, "w4a8/64": 0.02, "float8/row": 0.06, "float8": 0.06}.get(
        mode, 0.01
    )
    tied = TiedNNX(nnx.Rngs(0))
    tied.embed.embedding[...] = variables["params"]["embed"]["embedding"]
    tied = mp.quantize(mp.wrap(tied, f"{mode}_from_mixed_bfloat16"))
    np.testing.assert_array_equal(np.asarray(tied(tokens)), np.asarray(y))


@pytest.mark.slow
def test_a_table_of_one_row_and_a_lookup_by_floats():
    model = mp.wrap(nn.Embed(1, 8), "int8_from_float32")
    variables = mp.quantize(model, model.init(KEY, jnp.zeros(2, int)), jnp.zeros(2, int))
    y = model.apply(variables, jnp.asarray([0, 5]))  # Flax broadcasts its row, whatever the index
    np.testing.assert_array_equal(y[0], y[1])
    with pytest.raises(ValueError, match="looked up by integers, got float32"):
        model.apply(variables, jnp.zeros(2))


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        h = nn.LayerNorm(name="norm")(x)
        return x + nn.Dense(128, name="down")(nn.relu(nn.Dense(256, name="up")(h))), None


class Stack(nn.Module):
    how: str = "unrolled"

    @nn.compact
    def __call__(self, x):
        if self.how == "unrolled":
            for i in range(2):
                x, _ = Block(name=f"block_{i}")(x, None)
            return x
        block = nn.remat(Block) if self.how == "remat" else Block
        stack = nn.scan(block, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
        return stack(name="blocks")(x, None)[0]


@pytest.mark.parametrize(
    "mode",
    [
        "int8",
        "int4/64",
        *(
            pytest.param(mode, marks=pytest.mark.slow)
            for mode in ("int8_weight_only", "float8/row")
        ),
        pytest.param("float8/128x128", marks=pytest.mark.slow),
    ],
)
def test_scanned_rematerialized_and_unrolled_layers_quantize_to_equal_outputs(mode):
    x = X[:, :128]
    single = mp.wrap(Stack(), f"{mode}_from_float32")
    variables = single.init(KEY, x)
    expected = jax.jit(single.apply)(mp.quantize(single, variables, x), x)
    blocks = variables["params"]["block_0"], variables["params"]["block_1"]
    stacked = {"params": {"blocks": jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks)}}
    for how in ("scan", "remat"):
        model = mp.wrap(Stack(how), f"{mode}_from_float32")
        quantized, report = mp.quantize(model, stacked, x, return_report=True)
        assert [each.path for each in report.weights] == [
            f"params/blocks/{name}/kernel" for name in ("up", "down")
        ]
        np.testing.assert_array_equal(jax.jit(model.apply)(quantized, x), expected)


# -- what is left


class Mixed(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(100, name="fits")(x)
        x = nn.ConvTranspose(4, (3,), name="transposed")(x[..., None])[..., 0]
        x = nn.DenseGeneral((2, 3), name="odd")(x)
        x = self.param("own", nn.initializers.ones, (6, 2)).T @ x.reshape(-1, 6).T
        return nn.LayerNorm(name="norm")(x)


def test_the_report_says_what_was_left_and_why():
    policy = mp.DTypePolicyMap("int4/128_from_float32", {"transposed": "float32"})
    model = mp.wrap(Mixed(), policy)
    variables = model.init(KEY, X)
    quantized, report = mp.quantize(model, variables, X, return_report=True)
    reasons = {each.path.removeprefix("params/"): each.reason for each in report.weights}
    assert reasons == {
        "fits/kernel": None,
        "odd/kernel": "groups of 128 do not divide its 100 inputs or outputs, axes of (100,)",
        "transposed/kernel": "its policy is 'float32'",
        "own": "its layer multiplies it in no product that can be quantized",
    }
    assert [each.path for each in report.quantized][0] == "params/fits/kernel"
    fits = report.weights[0]
    assert (fits.dtype, fits.scales, fits.bytes_before) == ("int4", 2 * 100, 4 * 256 * 100)
    assert fits.bytes_after == 256 * 100 // 2 + 4 * 2 * 100
    lines = str(report).splitlines()
    assert lines[0].split() == ["weight", "shape", "stored", "as", "scales", "MB"]
    assert lines[-1].endswith("3 left as they were")
    assert_trees_equal(quantized["params"]["norm"], variables["params"]["norm"])
    with pytest.warns(UserWarning, match=r"^2 weights of Mixed stay in their source precision"):
        mp.quantize(model, variables, X)


def test_a_layer_that_the_example_does_not_reach_is_left():
    class Two(nn.Module):
        def setup(self):
            self.one, self.other = nn.Dense(8), nn.Dense(8)

        def __call__(self, x, both=True):
            return self.other(self.one(x)) if both else self.one(x)

    model = mp.wrap(Two(), "int8_from_float32")
    variables = model.init(KEY, X)
    _, report = mp.quantize(model, variables, X, both=False, return_report=True)
    (left,) = report.left
    assert (left.path, left.reason) == (
        "params/other/kernel",
        "the example call did not reach its layer",
    )


@pytest.mark.parametrize(
    ("shape", "size", "expected"),
    [((256,), 128, (128,)), ((4, 64), 128, (2, 64)), ((2, 3, 32), 96, (1, 3, 32)), ((5,), 1, (1,))],
)
def test_groups_are_neighbours_in_the_last_axes(shape, size, expected):
    assert runs(shape, size) == expected


@pytest.mark.parametrize(
    ("shape", "size"), [((300,), 128), ((3, 32), 64), ((64,), 128), ((6, 4), 16)]
)
def test_groups_that_do_not_divide_are_refused(shape, size):
    with pytest.raises(CannotStoreError, match=rf"group.* of {size}"):
        runs(shape, size)


def test_weights_of_another_format_are_refused():
    quantized = quantized_dense("int4/64")[1]
    other = mp.wrap(nn.Dense(128, use_bias=False), "int8_from_float32")
    with pytest.raises(TypeError, match="stored in int4 .* of its layer stores int8: apply"):
        other.apply(quantized, X)
