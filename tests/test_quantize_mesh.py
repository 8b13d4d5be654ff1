"""Quantizing on a 2 x 2 mesh: values are cut as the float kernel was, scales where they can be."""

import flax.linen as nn
import jax
import numpy as np
import pytest
from flax import nnx
from flax.linen import spmd
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import mpjax as mp
import mpjax_kernels as mk
from tests.helpers import assert_trees_equal

MESH = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("data", "model"))
X = jax.random.normal(jax.random.key(7), (4, 256))
UP, DOWN = ("data", "model"), ("model", None)
# Of both kernels, how the values are cut, and how the scales are.
SPECS = {
    "int8": {"up": (UP, (None, "model")), "down": (DOWN, (None, None))},
    "int4/64": {"up": (UP, None), "down": (DOWN, None)},
    "float8_current": {"up": (UP, (None, None)), "down": (DOWN, (None, None))},
}


def partitioned(names, rules=None):
    init = nn.initializers.lecun_normal()
    if rules is None:
        return nn.with_partitioning(init, names)
    return nn.with_logical_partitioning(init, names, rules=rules)


class Net(nn.Module):
    rules: tuple | None = None

    @nn.compact
    def __call__(self, x):
        up, down = (partitioned(names, self.rules) for names in (UP, DOWN))
        x = nn.relu(nn.Dense(128, kernel_init=up, name="up")(x))
        return nn.Dense(64, kernel_init=down, name="down")(x)


class NetNNX(nnx.Module):
    def __init__(self, rngs, named=True):  # names ask for a mesh
        up = down = nnx.initializers.lecun_normal()
        if named:
            up, down = (nnx.with_partitioning(up, names) for names in (UP, DOWN))
        self.up = nnx.Linear(256, 128, kernel_init=up, rngs=rngs)
        self.down = nnx.Linear(128, 64, kernel_init=down, rngs=rngs)

    def __call__(self, x):
        return self.down(nnx.relu(self.up(x)))


def wrapped(mode, **options):
    model = mp.wrap(Net(**options), f"{mode}_from_float32")
    return model, jax.jit(model.init)(jax.random.key(0), X)


def spec_of(array):
    """How an array is cut, an entry per axis."""
    spec = array.sharding.spec
    return (*spec, *(None,) * (array.ndim - len(spec)))


def assert_cut(kernel, mode, name):
    """The values and the scale of a kernel are where they should be, as pieces on devices."""
    values, scale = SPECS[mode][name]
    assert isinstance(kernel, mk.QTensor)
    assert spec_of(kernel.values) == values
    cuts = [2 if axis else 1 for axis in values]
    shape = tuple(n // k for n, k in zip(kernel.shape, cuts, strict=True))
    assert kernel.values.addressable_shards[0].data.shape == shape
    if scale is not None:
        assert spec_of(kernel.scale) == scale


@pytest.mark.parametrize("mode", SPECS)
def test_linen_values_and_scales_are_cut_as_the_kernel_was(mode):
    model, variables = wrapped(mode)
    expected = mp.quantize(model, variables, X)
    y = jax.jit(model.apply)(expected, X)
    on_mesh = jax.device_put(variables, nn.get_sharding(variables, MESH))
    quantized = mp.quantize(model, on_mesh, X)
    assert_trees_equal(quantized, expected)
    for name in SPECS[mode]:
        box = quantized["params"][name]["kernel"]
        assert isinstance(box, nn.Partitioned) and box.names == {"up": UP, "down": DOWN}[name]
        assert_cut(box.value, mode, name)
    with jax.set_mesh(MESH):
        np.testing.assert_allclose(jax.jit(model.apply)(quantized, X), y, rtol=1e-5, atol=1e-5)
        inside = jax.jit(lambda v: mp.quantize(model, v, X))(on_mesh)
    assert_trees_equal(inside, expected)


def test_int4_groups_take_the_cut_where_it_does_not_cut_a_group():
    model, variables = wrapped("int4/64")
    on_mesh = jax.device_put(variables, nn.get_sharding(variables, MESH))
    quantized = mp.quantize(model, on_mesh, X)["params"]
    assert spec_of(quantized["up"]["kernel"].value.scale) == ("data", "model")  # 4 groups
    assert spec_of(quantized["down"]["kernel"].value.scale) == ("model", None)  # 2


def test_the_shapes_tell_where_everything_goes(tmp_path):
    """`nn.get_sharding` of the quantized shapes: for jit, `device_put` and `mp.load` alike."""
    model, variables = wrapped("int8")
    expected = mp.quantize(model, variables, X)
    shapes = jax.eval_shape(lambda v: mp.quantize(model, v, X), variables)
    shardings = nn.get_sharding(shapes, MESH)
    on_mesh = jax.device_put(variables, nn.get_sharding(variables, MESH))
    inside = jax.jit(lambda v: mp.quantize(model, v, X), out_shardings=shardings)(on_mesh)
    path = mp.save(tmp_path / "m.safetensors", expected)
    float_shardings = nn.get_sharding(variables, MESH)
    found = {
        "inside": nn.unbox(inside),
        "put": nn.unbox(jax.device_put(expected, shardings)),
        "loaded": mp.load(path, shardings=shardings),
        "loaded as the floats": mp.load(path, shardings=float_shardings),
    }
    for tree in found.values():
        assert_trees_equal(tree, nn.unbox(expected))
        for name in SPECS["int8"]:
            assert_cut(tree["params"][name]["kernel"], "int8", name)
    y = jax.jit(model.apply)(expected, X)
    np.testing.assert_allclose(jax.jit(model.apply)(found["loaded"], X), y, rtol=1e-5, atol=1e-5)


def test_logical_names_become_those_of_the_mesh():
    rules = (("data", "model"), ("model", "data"))  # logical to mesh: the other way round
    model, variables = wrapped("int8", rules=rules)
    quantized = mp.quantize(model, variables, X)
    box = quantized["params"]["up"]["kernel"]
    assert isinstance(box, nn.LogicallyPartitioned) and box.rules == rules
    specs = nn.get_partition_spec(quantized)
    shardings = spmd.logical_to_mesh_sharding(specs, MESH, rules)
    kernel = jax.device_put(quantized, shardings)["params"]["up"]["kernel"].value
    assert spec_of(kernel.values) == ("model", "data")
    assert spec_of(kernel.scale) == (None, "data")
    y = jax.jit(model.apply)(quantized, X)
    with jax.set_mesh(MESH):
        np.testing.assert_allclose(jax.jit(model.apply)(quantized, X), y, rtol=1e-5, atol=1e-5)


def test_scanned_layers_take_a_name_for_their_axis():
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return nn.Dense(256, kernel_init=partitioned((None, "model")))(x), None

    class Scanned(nn.Module):
        @nn.compact
        def __call__(self, x):
            stack = nn.scan(
                Layer,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=2,
                metadata_params={nn.meta.PARTITION_NAME: "data"},
            )
            return stack(name="layers")(x, None)[0]

    model = mp.wrap(Scanned(), "int8_from_float32")
    variables = model.init(jax.random.key(0), X)
    quantized = mp.quantize(model, variables, X)
    box = quantized["params"]["layers"]["Dense_0"]["kernel"]
    assert box.names == ("data", None, "model")
    specs = nn.get_partition_spec(quantized)["params"]["layers"]["Dense_0"]["kernel"].value
    assert specs.values == PartitionSpec("data", None, "model") == specs.scale
    y = jax.jit(model.apply)(quantized, X)
    on_mesh = jax.device_put(quantized, nn.get_sharding(quantized, MESH))
    with jax.set_mesh(MESH):
        np.testing.assert_allclose(jax.jit(model.apply)(on_mesh, X), y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", ["int8", "float8_current"])
def test_nnx_values_and_scales_are_cut_as_the_kernel_was(tmp_path, mode):
    alone = mp.quantize(mp.wrap(NetNNX(nnx.Rngs(0), named=False), f"{mode}_from_float32"))
    y = nnx.jit(lambda m, x: m(x))(alone, X)
    with jax.set_mesh(MESH):
        model = mp.wrap(NetNNX(nnx.Rngs(0)), f"{mode}_from_float32")
        assert spec_of(model.up.kernel.get_raw_value()) == UP

        @nnx.jit
        def inside(model):
            return nnx.state(mp.quantize(model), nnx.Param)

        traced = inside(nnx.clone(model))
        mp.quantize(model)
        found = nnx.jit(lambda m, x: m(x))(model, X)
    np.testing.assert_allclose(found, y, rtol=1e-5, atol=1e-5)
    assert_trees_equal(nnx.as_pure(nnx.state(model)), nnx.as_pure(nnx.state(alone)))
    path = mp.save(tmp_path / "m.safetensors", model)
    float_model = mp.wrap(NetNNX(nnx.Rngs(1), named=False), f"{mode}_from_float32")
    shardings = {
        name: {"kernel": NamedSharding(MESH, PartitionSpec(*names)), "bias": None}
        for name, names in (("up", UP), ("down", DOWN))
    }
    loaded = mp.load(path, float_model, shardings=shardings)
    for name in SPECS[mode]:
        assert getattr(model, name).kernel.out_sharding == {"up": UP, "down": DOWN}[name]
        for each in (model, loaded):
            assert_cut(getattr(each, name).kernel.get_raw_value(), mode, name)
        kernel = traced[name]["kernel"].get_raw_value()
        assert_trees_equal(kernel, getattr(alone, name).kernel.get_raw_value())
        if mode == "int8":
            assert_cut(kernel, mode, name)
