"""mp.quantize(..., prepack=True): weights stored as the CPU's native kernels read them."""

import re

import flax.errors
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import mpjax as mp
import mpjax_kernels as mk
from mpjax_kernels._native_library import reads_tiles

pytestmark = pytest.mark.skipif(not reads_tiles(), reason="no native kernels that read tiles")

TILES = ((-1, 16), (-2, 4))


class Net(nn.Module):
    """Every layer that has a say in how its weight is stored."""

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(64, 32)
        x = embed(tokens)
        x = nn.MultiHeadDotProductAttention(num_heads=2, name="attention")(x, x)
        x = nn.Conv(32, (3,), name="conv")(x)
        x = nn.Dense(10, name="odd")(nn.Dense(48, name="dense")(x))
        return x, embed.attend(nn.Dense(32)(x))


TOKENS = jnp.arange(10).reshape(2, 5)


def quantized(policy, **options):
    model = mp.wrap(Net(), policy)
    variables = jax.jit(model.init)(jax.random.key(0), TOKENS)
    return model, mp.quantize(model, variables, TOKENS, **options)


@pytest.fixture(scope="module")
def int8():
    plain = quantized("int8_from_float32")
    return (*plain, quantized("int8_from_float32", prepack=True)[1])


def test_a_model_computes_the_same(int8):
    model, plain, packed = int8
    apply = jax.jit(model.apply)
    jax.tree.map(np.testing.assert_array_equal, apply(packed, TOKENS), apply(plain, TOKENS))
    for a, b in zip(stored(plain), stored(packed), strict=True):
        np.testing.assert_array_equal(mk.dequantize(a), mk.dequantize(b))


def stored(variables):
    leaves = jax.tree.leaves(variables, is_leaf=lambda x: isinstance(x, mk.QTensor))
    return [leaf for leaf in leaves if isinstance(leaf, mk.QTensor)]


def test_which_weights_are_packed(int8):
    params = int8[2]["params"]
    assert params["dense"]["kernel"].tiles == TILES
    assert params["attention"]["query"]["kernel"].tiles == ((-1, 16), (-3, 4))
    assert params["attention"]["out"]["kernel"].tiles == TILES
    assert (params["odd"]["kernel"].tiles, params["odd"]["kernel"].layout) == ((), (-1, -2))
    assert (params["conv"]["kernel"].tiles, params["conv"]["kernel"].layout) == ((), None)
    assert params["Embed_0"]["embedding"].layout is None


def test_a_model_reads_them_as_they_are(int8):
    model, _, packed = int8
    text = jax.jit(model.apply).lower(packed, TOKENS).compile().as_text() or ""
    assert not re.findall(r" (?:copy|transpose)\(%?[\w.]*(?:dense|query|key|value|out)", text)
    report = mp.explain(model.apply, packed, TOKENS)
    dense = [row for row in report.products if row.path.rpartition("/")[2] in ("dense", "query")]
    assert [(row.lhs, row.rhs, row.dequantized_bytes) for row in dense] == [("int8", "int8", 0)] * 2
    report.assert_quantized()


@pytest.mark.parametrize("policy", ["int8_weight_only_from_float32", "float8/row_from_float32"])
def test_other_weights_stay_as_they_are(policy):
    plain, packed = quantized(policy)[1], quantized(policy, prepack=True)[1]
    for a, b in zip(stored(plain), stored(packed), strict=True):
        assert (a.layout, a.tiles) == (b.layout, b.tiles)


def test_a_file_keeps_them(int8, tmp_path):
    model, _, packed = int8
    mp.save(tmp_path / "model.safetensors", packed, policy="int8_from_float32")
    assert b'\\"version\\":3' in (tmp_path / "model.safetensors").read_bytes()[:100000]
    loaded = mp.load(tmp_path / "model.safetensors")
    for a, b in zip(stored(packed), stored(loaded), strict=True):
        assert (a.layout, a.tiles) == (b.layout, b.tiles)
        np.testing.assert_array_equal(a.values, b.values)
    apply = jax.jit(model.apply)
    jax.tree.map(np.testing.assert_array_equal, apply(loaded, TOKENS), apply(packed, TOKENS))


def test_a_file_is_requantized_for_other_hardware(int8, tmp_path):
    packed = int8[2]
    path = mp.save(tmp_path / "model.safetensors", packed, policy="int8_from_float32")
    loaded = mp.load(path, target="tpu7x")
    float8 = mp.wrap(Net(), mp.load_policy(path, target="tpu7x"))
    assert {leaf.format.name for leaf in stored(loaded)} == {"float8_e4m3fn"}
    assert all(leaf.tiles == () for leaf in stored(loaded))
    plain = mp.save(tmp_path / "plain.safetensors", int8[1], policy="int8_from_float32")
    jax.tree.map(
        np.testing.assert_array_equal,
        jax.jit(float8.apply)(loaded, TOKENS),
        jax.jit(float8.apply)(mp.load(plain, target="tpu7x"), TOKENS),
    )


def test_an_input_that_does_not_fit_is_named_by_flax(int8):
    model = mp.wrap(nn.Dense(32), "int8_from_float32")
    packed = mp.quantize(
        model, model.init(jax.random.key(0), jnp.ones((4, 64))), jnp.ones((4, 64)), prepack=True
    )
    with pytest.raises(flax.errors.ScopeParamShapeError, match="kernel"):
        model.apply(packed, jnp.ones((4, 60)))


def test_an_exported_model_runs_without_the_kernels(int8):
    model, plain, packed = int8
    run = mp.load_exported(mp.export(model, packed, TOKENS))
    same = np.testing.assert_allclose
    jax.tree.map(
        lambda a, b: same(a, b, rtol=1e-5, atol=1e-5),
        run(TOKENS),
        jax.jit(model.apply)(plain, TOKENS),
    )


def test_smoothed_weights_are_packed():
    model = mp.wrap(nn.Dense(32), "int8_from_float32")
    x = jax.random.normal(jax.random.key(1), (64, 32)) * jnp.linspace(0.01, 30, 32)
    variables = model.init(jax.random.key(0), x)
    options = {"calibration": [x], "method": "smoothquant"}
    plain = mp.quantize(model, variables, x, **options)
    packed = mp.quantize(model, variables, x, prepack=True, **options)
    assert packed["params"]["kernel"].tiles == TILES
    assert hasattr(packed["params"]["kernel"], "pre_quant_scale")
    np.testing.assert_array_equal(model.apply(packed, x), model.apply(plain, x))


def test_stacked_layers_are_packed():
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return nn.Dense(32)(x), None

    class Stack(nn.Module):
        @nn.compact
        def __call__(self, x):
            layers = nn.scan(
                Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=3
            )
            return layers()(x, None)[0]

    model, x = mp.wrap(Stack(), "int8_from_float32"), jnp.ones((4, 32))
    variables = model.init(jax.random.key(0), x)
    plain = mp.quantize(model, variables, x)
    packed = mp.quantize(model, variables, x, prepack=True)
    (kernel,) = stored(packed)
    assert (kernel.shape, kernel.layout, kernel.tiles) == ((3, 32, 32), (-1, -2), TILES)
    apply = jax.jit(model.apply)
    np.testing.assert_array_equal(apply(packed, x), apply(plain, x))


def test_an_nnx_model_is_packed_in_place(tmp_path):
    class Two(nnx.Module):
        def __init__(self, rngs):
            self.up, self.down = nnx.Linear(32, 64, rngs=rngs), nnx.Linear(64, 48, rngs=rngs)

        def __call__(self, x):
            return self.down(nnx.relu(self.up(x)))

    plain, packed = (mp.wrap(Two(nnx.Rngs(0)), "int8_from_float32") for _ in range(2))
    mp.quantize(plain)
    assert mp.quantize(packed, prepack=True) is packed
    assert packed.up.kernel.get_raw_value().tiles == TILES
    x = jax.random.normal(jax.random.key(1), (3, 32))
    run = nnx.jit(lambda model, x: model(x))
    np.testing.assert_array_equal(run(packed, x), run(plain, x))
    path = mp.save(tmp_path / "model.safetensors", packed)
    again = mp.load(path, model=mp.wrap(nnx.eval_shape(lambda: Two(nnx.Rngs(0))), packed.policy))
    np.testing.assert_array_equal(run(again, x), run(plain, x))
    float8 = mp.wrap(nnx.eval_shape(lambda: Two(nnx.Rngs(0))), mp.load_policy(path, target="tpu7x"))
    mp.load(path, model=float8, target="tpu7x")
    assert float8.up.kernel.get_raw_value().values.shape == (64, 32)
