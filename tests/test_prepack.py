"""mp.quantize(..., prepack=True): weights stored as the CPU's native kernels read them."""

import functools
import os
import re
import subprocess
import sys
import textwrap

import flax.errors
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

import mpjax as mp
import mpjax_kernels as mk
from mpjax_kernels._native_library import reads_tiles

reads = pytest.mark.skipif(not reads_tiles(), reason="no native kernels that read tiles")

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


def quantized_dense(policy, **options):
    model, x = mp.wrap(nn.Dense(32), policy), jnp.ones((4, 64))
    return model, mp.quantize(model, model.init(jax.random.key(0), x), x, **options)


def in_process(script, *args, **environment):
    """What a script writes, in a process with other native kernels."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), *map(str, args)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def both():
    """A model, and what it is with and without `prepack=True`, each with its report."""
    model = mp.wrap(Net(), "int8_from_float32")
    variables = jax.jit(model.init)(jax.random.key(0), TOKENS)
    quantize = functools.partial(mp.quantize, model, variables, TOKENS, return_report=True)
    return model, quantize(), quantize(prepack=True)


@pytest.fixture(scope="module")
def int8(both):
    model, (plain, _), (packed, _) = both
    return model, plain, packed


@reads
def test_a_model_computes_the_same(int8):
    model, plain, packed = int8
    apply = jax.jit(model.apply)
    jax.tree.map(np.testing.assert_array_equal, apply(packed, TOKENS), apply(plain, TOKENS))
    for a, b in zip(stored(plain), stored(packed), strict=True):
        np.testing.assert_array_equal(mk.dequantize(a), mk.dequantize(b))


def stored(variables):
    leaves = jax.tree.leaves(variables, is_leaf=lambda x: isinstance(x, mk.QTensor))
    return [leaf for leaf in leaves if isinstance(leaf, mk.QTensor)]


@reads
def test_which_weights_are_packed(int8):
    params = int8[2]["params"]
    assert params["dense"]["kernel"].tiles == TILES
    assert params["attention"]["query"]["kernel"].tiles == ((-1, 16), (-3, 4))
    assert params["attention"]["out"]["kernel"].tiles == TILES
    assert (params["odd"]["kernel"].tiles, params["odd"]["kernel"].layout) == ((), (-1, -2))
    assert (params["conv"]["kernel"].tiles, params["conv"]["kernel"].layout) == ((), None)
    assert params["Embed_0"]["embedding"].layout is None


@reads
def test_a_model_reads_them_as_they_are(int8):
    model, _, packed = int8
    text = jax.jit(model.apply).lower(packed, TOKENS).compile().as_text() or ""
    assert not re.findall(r" (?:copy|transpose)\(%?[\w.]*(?:dense|query|key|value|out)", text)
    report = mp.explain(model.apply, packed, TOKENS)
    dense = [row for row in report.products if row.path.rpartition("/")[2] in ("dense", "query")]
    assert [(row.lhs, row.rhs, row.dequantized_bytes) for row in dense] == [("int8", "int8", 0)] * 2
    report.assert_quantized()


@pytest.mark.parametrize(
    ("policy", "why"),
    [
        ("int8_weight_only_from_float32", "it is multiplied by floats"),
        ("float8/row_from_float32", "it is float8_e4m3fn, and int8 alone is"),
    ],
)
def test_other_weights_stay_as_they_are(policy, why):
    plain = quantized_dense(policy)[1]
    with pytest.warns(UserWarning, match=rf"no weight of Dense to prepack, .* without: {why}$"):
        packed = quantized_dense(policy, prepack=True)[1]
    for a, b in zip(stored(plain), stored(packed), strict=True):
        assert (a.layout, a.tiles) == (b.layout, b.tiles)


@reads
def test_the_report_says_what_is_prepacked_and_why_the_rest_is_not(both):
    _, (_, without), (_, report) = both
    packed = [each.path.split("/")[-2] for each in report.prepacked]
    assert sorted(packed) == ["dense", "key", "out", "query", "value"]
    unpacked = {each.path.split("/")[-2]: each.unpacked for each in report.weights}
    assert {name: why for name, why in unpacked.items() if why is not None} == {
        "odd": "axis 1 has 10 entries, no multiple of 16",
        "Dense_0": "axis 0 has 10 entries, no multiple of 4",
        "conv": "it belongs to a convolution",
        "Embed_0": "it is looked up",
    }
    assert report.why_none_prepacked is None
    lines = str(report).splitlines()
    assert lines[-1].endswith(", 0 left as they were, 5 prepacked")
    ends = {line.split("/")[-2]: line.rpartition("  ")[2].strip() for line in lines[1:-1]}
    assert (ends["dense"], ends["odd"]) == ("prepacked", f"not prepacked: {unpacked['odd']}")
    assert without.prepacked == () and without.why_none_prepacked is None
    assert "prepacked" not in str(without)


@reads
def test_reasons_that_differ_are_told_weight_by_weight():
    model = mp.wrap(nn.Sequential([nn.Dense(10), nn.Dense(32)]), "int8_from_float32")
    x = jnp.ones((2, 32))
    with pytest.warns(UserWarning) as warned:
        mp.quantize(model, model.init(jax.random.key(0), x), x, prepack=True)
    (warning,) = warned
    assert str(warning.message).splitlines()[1:] == [
        "  params/layers_0/kernel: axis 1 has 10 entries, no multiple of 16",
        "  params/layers_1/kernel: axis 0 has 10 entries, no multiple of 4",
    ]
    assert warning.filename == __file__


def test_a_machine_that_reads_no_tiles_says_so_once():
    script = """
        import warnings, flax.linen as nn, jax, jax.numpy as jnp, mpjax as mp
        model, x = mp.wrap(nn.Dense(32), "int8_from_float32"), jnp.ones((2, 64))
        variables = model.init(jax.random.key(0), x)
        with warnings.catch_warnings(record=True) as warned:
            packed = mp.quantize(model, variables, x, prepack=True)
        print(*(each.message for each in warned))
        assert packed["params"]["kernel"].tiles == ()
        print(mp.quantize(model, variables, x, prepack=True, return_report=True)[1])
    """
    why = "the environment has MPJAX_NATIVE=0"
    lines = in_process(script, MPJAX_NATIVE="0").splitlines()
    assert lines[0] == (
        "prepack=True found no weight of Dense to prepack, which computes the same without: " + why
    )
    assert lines[2].endswith(f"  not prepacked: {why}")
    assert lines[-1].endswith(", 0 left as they were, 0 prepacked")


@reads
def test_a_file_is_put_in_order_where_no_kernel_reads_tiles(int8, tmp_path):
    model, plain, packed = int8
    path = mp.save(tmp_path / "model.safetensors", packed, policy="int8_from_float32")
    script = """
        import sys, mpjax as mp
        mp.save(sys.argv[2], mp.load(sys.argv[1]), policy=mp.load_policy(sys.argv[1]))
    """
    again = tmp_path / "again.safetensors"
    in_process(script, path, again, MPJAX_NATIVE_ISA="avx2")
    loaded = mp.load(again)
    for a, b, c in zip(stored(packed), stored(loaded), stored(plain), strict=True):
        assert (a.layout, ()) == (b.layout, b.tiles)
        np.testing.assert_array_equal(
            mk.contiguous(b, (-1,)).values, mk.contiguous(c, (-1,)).values
        )
        np.testing.assert_array_equal(b.scale, c.scale)
    apply = jax.jit(model.apply)
    jax.tree.map(np.testing.assert_array_equal, apply(loaded, TOKENS), apply(plain, TOKENS))


@reads
def test_a_file_is_put_in_order_on_several_devices(tmp_path):
    model, x = mp.wrap(nn.Dense(48), "int8_from_float32"), jnp.ones((2, 64))
    variables = model.init(jax.random.key(0), x)
    packed = mp.quantize(model, variables, x, prepack=True)
    path = mp.save(tmp_path / "model.safetensors", packed)
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    cut = NamedSharding(mesh, PartitionSpec(None, "x"))  # 3 tiles, or 48 outputs, for 2 devices
    kernel = mp.load(path, shardings=lambda name: cut if "kernel" in name else None)["params"][
        "kernel"
    ]
    assert (kernel.tiles, kernel.layout) == ((), (-1, -2))
    assert kernel.values.sharding.shard_shape(kernel.values.shape) == (24, 64)
    np.testing.assert_array_equal(
        kernel.values, mk.without_tiles(packed["params"]["kernel"]).values
    )
    one = mp.load(path, shardings=jax.sharding.SingleDeviceSharding(jax.devices()[1]))
    assert one["params"]["kernel"].tiles == TILES
    assert one["params"]["kernel"].values.devices() == {jax.devices()[1]}


@reads
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


@reads
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


@reads
def test_an_input_that_does_not_fit_is_named_by_flax():
    model, packed = quantized_dense("int8_from_float32", prepack=True)
    with pytest.raises(
        flax.errors.ScopeParamShapeError, match=r'"kernel" .*\(60, 32\).*\(64, 32\)'
    ):
        model.apply(packed, jnp.ones((4, 60)))


@reads
def test_an_exported_model_runs_without_the_kernels(int8):
    model, plain, packed = int8
    blob, weights = mp.export(model, packed, TOKENS, weights="beside")
    assert weights["params/dense/kernel/values"].shape == (48, 32)  # in order, once and for all
    run = functools.partial(mp.load_exported(blob), weights)
    same = np.testing.assert_allclose
    jax.tree.map(
        lambda a, b: same(a, b, rtol=1e-5, atol=1e-5),
        run(TOKENS),
        jax.jit(model.apply)(plain, TOKENS),
    )


@reads
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


@reads
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


@reads
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
