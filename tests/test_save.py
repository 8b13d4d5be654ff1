"""`mp.save` and `mp.load`: bit for bit, straight to the devices, whole or not at all."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
import tracemalloc
import zlib
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.core import freeze
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

import mpjax as mp
import mpjax_kernels as mk
from mpjax._safetensors import open_safetensors

ROOT = Path(__file__).parent.parent
X = jax.random.normal(jax.random.key(7), (2, 8))
W = jax.random.normal(jax.random.key(1), (8, 6))
BITS = np.arange(256, dtype=np.uint8)
INT8, KEY = "int8_from_float32", jax.random.key(0)


MESH = jax.make_mesh((2, 2), ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2)


def on_mesh(*spec):
    return NamedSharding(MESH, PartitionSpec(*spec))


def assert_same(one, other):
    """The same structure, types, shapes, dtypes and bits."""
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert isinstance(a, jax.Array) == isinstance(b, jax.Array)
        if isinstance(a, jax.Array) and jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            assert a.dtype == b.dtype
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        a, b = np.asarray(a), np.asarray(b)
        assert (a.shape, a.dtype, a.tobytes()) == (b.shape, b.dtype, b.tobytes())


def state_of(recipe, layers=()):
    policy = mp.QuantizedFloat8DTypePolicy("float8", "float32", amax_history_length=3)
    model = mp.wrap(nn.Dense(6), policy)
    state = jax.eval_shape(model.init, jax.random.key(0), X)["scaling"]["input"]
    steps = recipe.amax_history_length if isinstance(recipe, mp.DelayedScaling) else 0
    ones = jnp.linspace(0.5, 1.5, 5)[: int(np.prod(layers))].reshape(layers)
    return mp.ScalingState(
        amax_history=ones[..., None] * jnp.arange(steps, dtype=jnp.float32),
        scale=ones,
        observed=ones + 1,
        recipe=recipe,
        format=state.format,
        of_gradient=True,
    )


TREE = {
    "params": {
        "bfloat16": jax.lax.bitcast_convert_type(jnp.arange(1 << 16, dtype=jnp.uint16), "bfloat16"),
        "e4m3": jax.lax.bitcast_convert_type(BITS, jnp.float8_e4m3fn),
        "e5m2": jax.lax.bitcast_convert_type(BITS, jnp.float8_e5m2),
        "e4m3fnuz": jax.lax.bitcast_convert_type(BITS, jnp.float8_e4m3fnuz),
        "e5m2fnuz": jax.lax.bitcast_convert_type(BITS, jnp.float8_e5m2fnuz),
        "int4": jnp.arange(-8, 7).astype(jnp.int4).reshape(3, 5),  # 15 values in 8 bytes
        "float32": jnp.asarray([np.nan, -np.nan, np.inf, -0.0, 1e-45], jnp.float32),
        "bool": jnp.asarray([True, False, True]),
        "complex": jnp.asarray([1 + 2j]),
        "scalar": jnp.asarray(3, jnp.uint16),
        "empty": jnp.zeros((3, 0), jnp.bfloat16),
        "nothing": {},
        "float64": np.asarray([1e300, -0.0]),
    },
    "quantized": {
        "int8": mk.quantize(W, "int8", axis=0),
        "bfloat16": mk.quantize(W.astype(jnp.bfloat16), "float8_e5m2"),
        "int4": mk.quantize(W, "int4", axis=0, group_size=2),
        "zero_point": mk.quantize(W, "int4", axis=0, group_size=4, symmetric=False),
        "layout": mk.contiguous(mk.quantize(W, "int8", axis=0, symmetric=False), axis=0),
        "stack": mk.quantize(jnp.stack([W, -W]), "float8_e4m3fn", axis=(1, 2), group_size=(4, 3)),
        "not finite": mk.quantize(W.at[0, 0].set(jnp.nan), "int8", axis=0),
    },
    "scaling": {
        "delayed": state_of(mp.DelayedScaling(3, margin=-1.5, algorithm="most_recent")),
        "static": state_of(mp.StaticScaling(margin=2)),
        "layers": state_of(mp.DelayedScaling(2), layers=(5,)),
    },
    "rngs": {
        "key": jax.random.key(3),
        "keys": jax.random.split(jax.random.key(1, impl="rbg"), 3),
    },
    "layers": {0: {"w": jnp.zeros(2)}, 1: {"w": jnp.ones(2)}},
}


def test_every_kind_of_leaf_bit_for_bit(tmp_path):
    path = mp.save(tmp_path / "model.safetensors", TREE)
    assert path == tmp_path / "model.safetensors" and os.listdir(tmp_path) == [path.name]
    loaded = mp.load(path)
    assert_same(loaded, TREE)
    assert list(loaded["layers"]) == [0, 1] and loaded["params"]["nothing"] == {}
    assert list(loaded) == list(TREE)
    recipe = loaded["scaling"]["delayed"].recipe
    assert (recipe.margin, recipe.algorithm) == (-1.5, "most_recent")


def test_numpy_arrays_and_frozen_dicts_come_back_as_jax_arrays_in_dicts(tmp_path):
    tree = freeze({"a": {"b": np.arange(6).astype(">i2").reshape(2, 3).T, "c": np.float32(2)}})
    mp.save(tmp_path / "m", tree)
    expected = {"a": {"b": jnp.asarray([[0, 3], [1, 4], [2, 5]], jnp.int16), "c": jnp.float32(2)}}
    assert_same(mp.load(tmp_path / "m"), expected)


def test_int4_takes_half_a_byte(tmp_path):
    mp.save(tmp_path / "m", {"w": jnp.ones((1001, 101), jnp.int4)})
    with open_safetensors(tmp_path / "m") as file:
        entry = file.entries["w"]
    assert entry.stop - entry.start == (1001 * 101 + 1) // 2 == 50551
    assert os.path.getsize(tmp_path / "m") < 50551 + 1000


@pytest.mark.parametrize(
    "policy",
    ["int8_from_mixed_bfloat16", "int4/64_from_float32", "float8_from_mixed_bfloat16"],
)
def test_a_linen_model_from_its_file_alone(tmp_path, policy):
    x = jax.random.normal(jax.random.key(0), (2, 128))
    model = mp.wrap(nn.Dense(64), policy)
    variables = mp.quantize(model, jax.jit(model.init)(jax.random.key(1), x), x)
    path = mp.save(tmp_path / "m", variables, policy=model.policy)
    served = mp.wrap(nn.Dense(64), mp.load_policy(path))
    assert served.policy == model.policy
    loaded = mp.load(path)
    assert_same(loaded, variables)
    y, expected = jax.jit(served.apply)(loaded, x), jax.jit(model.apply)(variables, x)
    assert_same(y, expected)


def test_policies_of_any_kind(tmp_path):
    policy = mp.DTypePolicyMap("mixed_bfloat16", {"Dense_0": "int8_from_mixed_bfloat16"})
    mp.save(tmp_path / "m", {"a": jnp.zeros(1)}, policy=policy)
    loaded = mp.load_policy(tmp_path / "m")
    assert isinstance(loaded, mp.FrozenDTypePolicyMap)
    assert loaded["Dense_0"].name == "int8_from_mixed_bfloat16"
    assert loaded.default_policy.name == "mixed_bfloat16"
    mp.save(tmp_path / "m", {"a": jnp.zeros(1)}, policy="int4/128_from_float32")
    assert mp.load_policy(tmp_path / "m") == mp.get_policy("int4/128_from_float32")
    mp.save(tmp_path / "m", {"a": jnp.zeros(1)})
    with pytest.raises(mp.ModelFileError, match=r"saved without a policy.*mp.save\(path, var"):
        mp.load_policy(tmp_path / "m")


def test_the_policy_is_read_without_the_weights(tmp_path):
    mp.save(tmp_path / "m", {"a": jnp.zeros(100)}, policy="mixed_bfloat16")
    data = bytearray((tmp_path / "m").read_bytes())
    data[-1] ^= 1
    (tmp_path / "m").write_bytes(data)
    assert mp.load_policy(tmp_path / "m").name == "mixed_bfloat16"
    with pytest.raises(mp.ModelFileError, match="the bytes of 'a' have changed since"):
        mp.load(tmp_path / "m")


def test_boxes_of_flax_metadata_are_taken_off(tmp_path):
    init = nn.with_partitioning(nn.initializers.lecun_normal(), ("in", "out"))
    model = mp.wrap(nn.Dense(4, kernel_init=init), "int8_from_float32")
    variables = mp.quantize(model, jax.jit(model.init)(jax.random.key(0), X), X)
    assert isinstance(variables["params"]["kernel"], nn.Partitioned)
    mp.save(tmp_path / "m", variables)
    loaded = mp.load(tmp_path / "m")
    assert_same(loaded["params"]["kernel"], variables["params"]["kernel"].value)
    apply = jax.jit(model.apply)
    np.testing.assert_array_equal(apply(loaded, X), apply(variables, X))
    # Where the axes are those of a mesh, unboxing would constrain a QTensor's scale to them too.
    value = variables["params"]["kernel"].value
    mp.save(tmp_path / "m", {"w": nn.Partitioned(value, names=("x", "y"), mesh=MESH)})
    assert_same(mp.load(tmp_path / "m")["w"], value)


class NNXNet(nnx.Module):
    def __init__(self, rngs, width=8):
        self.first = nnx.Linear(8, width, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(width, 8, rngs=rngs)])
        self.dropout = nnx.Dropout(0.5, rngs=rngs, deterministic=True)
        self.tied = self.layers[0]

    def __call__(self, x):
        return self.tied(self.dropout(self.layers[0](self.first(x))))


def nnx_model(policy="int8_from_float32", seed=0, **options):
    return mp.wrap(NNXNet(nnx.Rngs(seed), **options), policy)


def test_an_nnx_model_from_its_file_alone(tmp_path):
    model = mp.quantize(nnx_model())
    path, y = mp.save(tmp_path / "m", model), model(X)
    fresh = nnx_model(mp.load_policy(path), seed=1)
    kernel = fresh.first.kernel
    assert mp.load(path, fresh) is fresh and fresh.first.kernel is kernel
    assert fresh.tied is fresh.layers[0]
    assert_same(nnx.as_pure(nnx.state(fresh)), nnx.as_pure(nnx.state(model)))
    np.testing.assert_array_equal(fresh(X), y)
    mp.load(path, fresh)  # quantized already
    np.testing.assert_array_equal(fresh(X), y)
    tree = mp.load(path)
    assert_same(tree["layers"][0]["kernel"], model.tied.kernel.get_raw_value())


def test_into_an_nnx_model_without_weights(tmp_path):
    model = mp.quantize(nnx_model())
    path = mp.save(tmp_path / "m", model)
    empty = mp.wrap(nnx.eval_shape(lambda: NNXNet(nnx.Rngs(0))), mp.load_policy(path))
    assert isinstance(empty.first.kernel.get_raw_value(), jax.ShapeDtypeStruct)
    np.testing.assert_array_equal(mp.load(path, empty)(X), model(X))


def test_nnx_scaling_states_come_back_and_the_loss_scale_of_training_stays(tmp_path):
    policy = mp.QuantizedFloat8DTypePolicy("float8", "mixed_float16", amax_history_length=3)
    model = nnx_model(policy)
    model.loss_scale = mp.nnx.LossScale(mp.DynamicLossScale().init())
    state = model.first.scaling["input"].get_value()
    model.first.scaling["input"].set_value(
        mp.update_scaling(mp.observe_scaling(state, jnp.float32(7)))
    )
    path = mp.save(tmp_path / "m", model)
    assert "loss_scale" not in mp.load(path)
    fresh = mp.load(path, nnx_model(policy, seed=1))
    loaded = fresh.first.scaling["input"].get_value()
    assert loaded.amax_history.tolist() == [7, 0, 0]
    assert float(loaded.scale) == np.float32(7) / np.float32(448)


def unchanged(model, path, match):
    before = nnx.as_pure(nnx.state(model))
    with pytest.raises(mp.ModelFileError, match=match) as error:
        mp.load(path, model)
    assert_same(nnx.as_pure(nnx.state(model)), before)
    return str(error.value)


def test_a_file_of_another_nnx_model(tmp_path):
    path = mp.save(tmp_path / "m", mp.quantize(nnx_model(width=16)))
    message = unchanged(nnx_model(), path, "does not fit the model, which stays as it was")
    for line in [
        "first/bias: float32[16] in the file, float32[8] in the model",
        "first/kernel: QTensor(int8[8,16], scale float32[1,16]) in the file, float32[8, 8] in the",
        "wrap it with mp.load_policy(path)",
    ]:
        assert line in message
    path = mp.save(tmp_path / "m", mp.quantize(nnx_model()))
    unchanged(
        nnx_model("mixed_bfloat16"), path, "first/kernel: int8 in the file, but the policy of its"
    )
    unchanged(nnx_model("int4/4_from_float32"), path, "policy of its layer in the model is 'int4/4")
    float8 = mp.QuantizedFloat8DTypePolicy("float8", "float32", amax_history_length=3)
    unchanged(nnx_model(float8), path, "input: absent from the file, DelayedScaling of float8_e4m3")
    path = mp.save(tmp_path / "m", mp.quantize(nnx_model(float8)))
    longer = mp.QuantizedFloat8DTypePolicy("float8", "float32", amax_history_length=5)
    unchanged(
        nnx_model(longer), path, r"history \[3\] in the file, .* with history \[5\] in the mo"
    )
    unchanged(nnx_model(), path, "scaling/input: DelayedScaling .* absent from the model")


def test_a_damaged_file_leaves_the_nnx_model_as_it_was(tmp_path):
    path = mp.save(tmp_path / "m", mp.quantize(nnx_model()))
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    unchanged(nnx_model(), path, "is damaged .*have changed since it was saved")


def test_what_load_is_not_for(tmp_path):
    path = mp.save(tmp_path / "m", nnx_model())
    with pytest.raises(TypeError, match=r"`model` is a Dense, but only NNX .* mp.load\(path\)"):
        mp.load(path, nn.Dense(3))
    with pytest.raises(ValueError, match="NNXNet is not wrapped"):
        mp.load(path, NNXNet(nnx.Rngs(0)))


def test_shardings_reach_values_scales_and_states(tmp_path):
    w = jax.random.normal(jax.random.key(0), (8, 4))
    tree = {
        "params": {
            "channel": mk.quantize(w, "int8", axis=0),
            "group": mk.quantize(w, "int4", axis=0, group_size=2, symmetric=False),
            "stored": mk.contiguous(mk.quantize(w, "int8", axis=0), axis=0),
            "bias": jnp.zeros(4),
        },
        "scaling": {"input": state_of(mp.DelayedScaling(3))},
    }
    path = mp.save(tmp_path / "m", tree)
    shardings = {
        "params": {
            **dict.fromkeys(["channel", "group", "stored"], on_mesh("x", "y")),
            "bias": None,
        },
        "scaling": on_mesh("x"),
    }
    loaded = mp.load(path, shardings=shardings)
    assert_same(loaded, tree)
    params = loaded["params"]
    assert params["channel"].values.sharding == on_mesh("x", "y")
    assert params["channel"].scale.sharding == on_mesh(None, "y")  # [1, 4]
    assert params["group"].scale.sharding == on_mesh("x", "y")  # [4, 4]
    assert params["group"].zero_point.sharding == on_mesh("x", "y")
    assert params["stored"].values.sharding == on_mesh("y", "x")
    assert params["bias"].sharding == SingleDeviceSharding(jax.devices()[0])
    assert not params["bias"].committed
    assert loaded["scaling"]["input"].amax_history.sharding == on_mesh()
    same = jax.tree.map(lambda x: x.sharding, loaded)  # leaves with a sharding for each array
    again = mp.load(path, shardings=same)
    assert [x.sharding for x in jax.tree.leaves(again)] == jax.tree.leaves(same)
    everywhere = mp.load(path, shardings=on_mesh())
    for x in jax.tree.leaves(everywhere):
        assert x.sharding.mesh == MESH and x.sharding.is_fully_replicated
    asked = []
    device = SingleDeviceSharding(jax.devices()[3])
    moved = mp.load(path, shardings=lambda name: (asked.append(name), device)[1])
    assert all(x.sharding == device for x in jax.tree.leaves(moved))
    assert asked == ["params/channel", "params/group", "params/stored", "params/bias"] + [
        "scaling/input"
    ]


def test_the_shardings_of_a_float_model_serve_its_quantized_weights(tmp_path):
    init = nn.with_partitioning(nn.initializers.lecun_normal(), ("x", "y"))
    policy = mp.QuantizedFloat8DTypePolicy("float8", "float32", amax_history_length=2)
    model = mp.wrap(nn.Dense(4, kernel_init=init), policy)
    variables = jax.jit(model.init)(jax.random.key(0), X)
    path = mp.save(tmp_path / "m", mp.quantize(model, variables, X))
    shardings = nn.get_sharding(jax.eval_shape(model.init, jax.random.key(0), X), MESH)
    loaded = mp.load(path, shardings=shardings)
    kernel = loaded["params"]["kernel"]
    assert kernel.values.sharding == on_mesh("x", "y")
    assert kernel.scale.shape == (1, 1) and kernel.scale.sharding == on_mesh(None, None)
    assert {x.sharding.mesh for x in jax.tree.leaves(loaded)} == {MESH}


def test_shardings_that_do_not_fit(tmp_path):
    path = mp.save(tmp_path / "m", {"a": {"w": jnp.zeros((3, 4))}, "b": jnp.zeros(4)})
    with pytest.raises(
        ValueError, match="`shardings` has no 'a/w', so where 'a/w' goes is not kno"
    ):
        mp.load(path, shardings={"a": {}, "b": None})
    with pytest.raises(
        TypeError, match=r"has a P(artitionSpec)? for 'a/w', which is no .* NamedSharding\("
    ):
        mp.load(path, shardings=PartitionSpec("x"))
    with pytest.raises(ValueError, match=r"'a/w' \(float32 \(3, 4\)\) cannot be sharded so"):
        mp.load(path, shardings=on_mesh("x"))


def test_nnx_weights_go_where_the_models_are(tmp_path):
    path = mp.save(tmp_path / "m", mp.quantize(nnx_model()))
    model = nnx_model(seed=1)
    kernel = model.first.kernel
    kernel.set_raw_value(jax.device_put(kernel.get_raw_value(), on_mesh("x", "y")))
    for _ in range(2):  # into a float kernel, and into a QTensor
        mp.load(path, model)
        q = model.first.kernel.get_raw_value()
        assert q.values.sharding == on_mesh("x", "y") and q.scale.sharding == on_mesh(None, "y")
    mp.load(path, model, shardings=on_mesh())
    assert model.first.kernel.get_raw_value().values.sharding == on_mesh()


def test_the_host_holds_one_array_at_a_time(tmp_path):
    tree = {f"w{i}": np.full((1 << 18,), i, np.int8) for i in range(64)}
    tracemalloc.start()
    try:
        path = mp.save(tmp_path / "m", tree)
        saving = tracemalloc.get_traced_memory()[1]
        tracemalloc.reset_peak()
        loaded = mp.load(path)
        loading = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert_same(loaded, jax.tree.map(jnp.asarray, tree))
    # Of 16 MiB; what is loaded lies where it was read to, for JAX takes that without a copy.
    assert saving < 1 << 20 and loading - (16 << 20) < 1 << 20


def test_a_save_that_fails_leaves_the_old_file(tmp_path):
    path = mp.save(tmp_path / "m", {"x": jnp.zeros(3)})
    gone = jnp.ones(3)
    gone.delete()
    with pytest.raises(RuntimeError, match="deleted"):
        mp.save(path, {"x": jnp.ones(3), "y": gone})
    assert os.listdir(tmp_path) == ["m"]
    assert mp.load(path)["x"].tolist() == [0, 0, 0]
    mp.save(path, {"x": jnp.ones(3)})
    assert mp.load(path)["x"].tolist() == [1, 1, 1]


_SAVES = """
import sys, numpy as np, mpjax as mp
for i in range(10**6):
    mp.save(sys.argv[1], {"x": np.full((1 << 22,), i, np.int32)})
"""


@pytest.mark.skipif(os.name != "posix", reason="stops the process by a signal")
def test_killed_in_a_save_the_old_file_loads(tmp_path):
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    path = tmp_path / "m"
    process = subprocess.Popen([sys.executable, "-c", _SAVES, str(path)], env=env)
    try:
        deadline = time.monotonic() + 60
        while not (path.exists() and list(tmp_path.glob(".m.*.tmp"))):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        process.wait()
    x = mp.load(path)["x"]
    assert x.shape == (1 << 22,) and (x == x[0]).all()


def test_a_link_stays_one(tmp_path):
    path = mp.save(tmp_path / "m", {"x": jnp.zeros(3)})
    (tmp_path / "link").symlink_to(path)
    mp.save(tmp_path / "link", {"x": jnp.ones(3)})
    assert (tmp_path / "link").is_symlink() and mp.load(path)["x"].tolist() == [1, 1, 1]


def test_what_cannot_be_saved(tmp_path):
    path, x = tmp_path / "m", jnp.zeros(1)
    with pytest.raises(TypeError, match="'a/name' is a str, but a file of weights holds nested"):
        mp.save(path, {"a": {"name": "x"}})
    with pytest.raises(TypeError, match="'a' is a Param, but"):
        mp.save(path, {"a": nnx.Param(x)})
    with pytest.raises(TypeError, match="'a' has the dtype int2, which safetensors lacks"):
        mp.save(path, {"a": x.astype(jnp.int2)})
    with pytest.raises(TypeError, match=r"the key \(1, 2\) in 'a' is neither"):
        mp.save(path, {"a": {(1, 2): x}})
    with pytest.raises(ValueError, match="arrays of the file would be named 'a/b': rename"):
        mp.save(path, {"a": {"b": x}, "a/b": x})
    with pytest.raises(ValueError, match="would be named '__metadata__'"):
        mp.save(path, {"__metadata__": x})
    with pytest.raises(ValueError, match="`tree` is empty"):
        mp.save(path, {})
    with pytest.raises(TypeError, match="`tree` is a list, but should be the variables"):
        mp.save(path, [x])
    with pytest.raises(TypeError, match="`tree` is a Dense"):
        mp.save(path, nn.Dense(3))
    with pytest.raises(ValueError, match="NNXNet is not wrapped"):
        mp.save(path, NNXNet(nnx.Rngs(0)))
    with pytest.raises(
        ValueError, match="`policy` is 'float32', but the NNX model is wrapped with"
    ):
        mp.save(path, nnx_model(), policy="float32")
    tree = x
    for _ in range(65):
        tree = {"a": tree}
    with pytest.raises(ValueError, match="is nested deeper than 64 dicts"):
        mp.save(path, tree)
    with pytest.raises(
        FileNotFoundError, match=f"there is no folder {tmp_path}/none to write m in"
    ):
        mp.save(tmp_path / "none" / "m", {"a": x})
    with pytest.raises(IsADirectoryError, match="is a folder: give the path of the file"):
        mp.save(tmp_path, {"a": x})
    assert os.listdir(tmp_path) == []


def test_a_policy_that_the_weights_were_not_quantized_under_is_not_saved(tmp_path):
    path, x = tmp_path / "m", jnp.ones((2, 8))
    linen = mp.wrap(nn.Sequential([nn.Dense(8), nn.Dense(8)]), INT8)
    variables = mp.quantize(linen, linen.init(KEY, x), x)
    for policy, asked in [
        ("int4/4_from_float32", "'int4/4_from_float32' asks for int4"),
        ("mixed_bfloat16", "'mixed_bfloat16' asks for floats"),
        (
            mp.DTypePolicyMap(INT8, {"layers_0": "float8/row_from_float32"}),
            "asks for float8_e4m3fn",
        ),
    ]:
        name = "params/layers_0/kernel: stored in int8, but "
        with pytest.raises(ValueError, match=f"(?s){name}.*{asked}.*model.policy"):
            mp.save(path, variables, policy=policy)
    assert not path.exists()
    mixed = mp.DTypePolicyMap("int8_weight_only_from_float32", {"layers_1": INT8})
    for policy in (INT8, mixed, "auto8_from_float32", None):
        mp.save(path, variables, policy=policy)
    int4 = mp.quantize(mp.wrap(nn.Dense(8), "int4/4_from_float32"), nn.Dense(8).init(KEY, x), x)
    with pytest.raises(ValueError, match="'auto8_from_float32' asks for int8 or float8_e4m3fn"):
        mp.save(path, int4, policy="auto8_from_float32")
    model = mp.wrap(mp.quantize(nnx_model()), "int4/4_from_float32")
    with pytest.raises(ValueError, match=r"(?s)first/kernel: stored in int8, but 'int4/4.*NNX: wr"):
        mp.save(path, model)
    mp.save(path, mp.wrap(model, "int8_weight_only_from_float32"))


def test_a_layer_that_was_wrapped_by_itself_is_saved_under_a_map(tmp_path):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            inner = mp.wrap(nn.Dense(8, parent=None), "int4/4_from_float32")
            return inner(nn.Dense(8, name="first")(x))

    path, x = tmp_path / "m", jnp.ones((2, 8))
    model = mp.wrap(Net(), INT8)
    variables = mp.quantize(model, model.init(KEY, x), x)
    with pytest.raises(
        ValueError, match="(?s)params/Dense_0/kernel: stored in int4.*DTypePolicyMap"
    ):
        mp.save(path, variables, policy=model.policy)
    policy = mp.DTypePolicyMap(model.policy, {"Dense_0": "int4/4_from_float32"})
    mp.save(path, variables, policy=policy)
    served = mp.wrap(Net(), mp.load_policy(path))
    assert_same(served.apply(mp.load(path), x), model.apply(variables, x))


def test_the_cache_of_an_nnx_model_is_loaded_too(tmp_path):
    def attention(cache):
        policy = mp.DTypePolicy("mixed_bfloat16", kv_cache=cache)
        layer = nnx.MultiHeadAttention(2, 8, decode=True, rngs=nnx.Rngs(0))
        mp.wrap(layer, policy).init_cache((1, 4, 8))
        return layer

    model = attention("int8")
    model(jnp.ones((1, 1, 8)))
    path = mp.save(tmp_path / "m", model)
    loaded = mp.load(path, attention("int8"))
    assert_same(nnx.as_pure(nnx.state(loaded)), nnx.as_pure(nnx.state(model)))
    unchanged(
        attention("float8"), path, r"cached_key: QTensor\(int8.* in the file, QTensor\(float8"
    )
    unchanged(attention(None), path, r"cached_key: QTensor\(int8.* in the file, float32")


@pytest.mark.parametrize("given", [None, b"model", {"params": 1}, 7])
def test_what_is_no_path_is_said_to_be_none(given):
    match = f"is a {type(given).__name__}, but should be a path: a str or a pathlib.Path"
    for load in (mp.load, mp.load_policy, mp.load_safetensors, mp.open_weights):
        with pytest.raises(TypeError, match=f"`path` {match}"):
            load(given)
    for call in (mp.latest_step, lambda path: mp.restore_checkpoint(path, {})):
        with pytest.raises(TypeError, match=f"`directory` {match}"):
            call(given)


def test_a_full_disk_is_told_with_the_file_and_what_was_there_stays(tmp_path, monkeypatch):
    path = mp.save(tmp_path / "m", {"a": jnp.zeros(3)})

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left") as error:
        patch.setattr(os, "fsync", full)
        mp.save(path, {"a": jnp.ones(3)})
    assert error.value.__notes__ == [
        f"{path} could not be written; what was there before is as it was"
    ]
    assert mp.load(path)["a"].tolist() == [0, 0, 0] and os.listdir(tmp_path) == ["m"]


def rewritten(path, change):
    """A file of `mp.save` whose inner header was changed, with the checksum that belongs to it."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    content = json.loads(header["__metadata__"]["mpjax"])
    change(content)
    text = json.dumps(content)
    header["__metadata__"] = {"mpjax": text, "mpjax_crc32": f"{zlib.crc32(text.encode()):08x}"}
    encoded = json.dumps(header).encode()
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + data[8 + length :])
    return path


def test_a_file_of_a_newer_version(tmp_path):
    path = mp.save(tmp_path / "m", {"a": jnp.zeros(1)})
    rewritten(
        path, lambda content: content.update(version=4, mpjax="9.9", leaves="of another kind")
    )
    message = (
        r"m was saved by mpjax 9.9 in version 4 of the format, and this mpjax reads up to "
        "version 3: upgrade it"
    )
    for load in (mp.load, mp.load_policy):
        with pytest.raises(mp.ModelFileError, match=message):
            load(path)


def raises(path, match):
    for load in (mp.load, mp.load_policy, mp.load_safetensors):
        with pytest.raises(mp.ModelFileError, match=match) as error:
            load(path)
        assert str(path) in str(error.value)


def test_files_of_other_kinds(tmp_path):
    path = tmp_path / "m"
    for load in (mp.load, mp.load_policy, mp.load_safetensors):
        with pytest.raises(FileNotFoundError, match=f"there is no file {path}"):
            load(path)
    raises(tmp_path, "is a directory: give the path of one file")
    path.touch()
    raises(path, "is empty: get the file")
    for data in (b"x", b"version https://git-lfs.github.com/spec/v1\noid sha256:0", b"{" * 100):
        path.write_bytes(data)
        raises(path, "is not a safetensors file.*Check the path")
    header = b'{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}'
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"ab")
    assert mp.load_safetensors(path)["a"].tolist() == [97, 98]
    for load in (mp.load, mp.load_policy):
        with pytest.raises(
            mp.ModelFileError, match="save did not write: .* mpjax.load_safetensors"
        ):
            load(path)


@pytest.mark.skipif(os.name != "posix", reason="makes a pipe")
def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "m")
    raises(tmp_path / "m", "is not a regular file")


@pytest.mark.parametrize(
    ("header", "why"),
    [
        ('{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]', "its header: Expecting"),
        ('{"a":{"dtype":"U9","shape":[2],"data_offsets":[0,2]}}', "unknown dtype 'U9'"),
        ('{"a":{"dtype":"U8","shape":[3],"data_offsets":[0,2]}}', "'a' has 2 bytes, but its sh"),
        ('{"a":{"dtype":"U8","shape":[-2],"data_offsets":[0,2]}}', "not a list of sizes"),
        ('{"a":{"dtype":"U8","shape":[2.0],"data_offsets":[0,2]}}', "not a list of sizes"),
        ('{"a":{"dtype":"U8","shape":[true],"data_offsets":[0,2]}}', "not a list of sizes"),
        ('{"a":{"dtype":"U8","shape":[0,1' + "0" * 18 + '],"data_offsets":[0,0]}}', "too large"),
        (
            '{"a":{"dtype":"U8","shape":[2],"data_offsets":[2,4]}}',
            "starts at byte .* but should at",
        ),
        ('{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,NaN]}}', "NaN is no JSON"),
        ('{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', "the arrays end at byte"),
        ('{"a":{"dtype":"U8","shape":[2]}}', "its header lacks 'data_offsets'"),
        ('{"a":1,"a":2}', "a name occurs twice"),
        ('{"__metadata__":{"a":1}}', "its __metadata__ is not a dict of texts"),
        (
            '{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},'
            '"b":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}',
            "'b' starts at byte",
        ),
        ('{"a":' + "[" * 100_000, "its header: it is nested too deeply"),
        ('{"a":"\udcff"}', "its header: 'utf-8' codec"),
    ],
)
def test_headers_that_say_what_the_file_does_not_bear_out(tmp_path, header, why):
    text = header.encode("utf-8", "surrogateescape")
    (tmp_path / "m").write_bytes(len(text).to_bytes(8, "little") + text + b"ab")
    raises(tmp_path / "m", f"is damaged .*{why}.*save the model, again")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda c: c.update(version="1"), "its version is '1'"),
        (lambda c: c.pop("leaves"), "its header lacks 'leaves'"),
        (lambda c: c.update(policy=3), "the policy is no dict"),
        (lambda c: c["leaves"].pop(), "the arrays in the file are not those that it lists"),
        (lambda c: c["leaves"].append(c["leaves"][0]), "two leaves are at"),
        (lambda c: c["leaves"][0].update(path=["a"] * 65), "too long"),
        (lambda c: c["leaves"][0].update(path=[1.5]), "neither a text nor an integer"),
        (lambda c: c["leaves"][0].update(path=["w", "b"]), r"two leaves are at \('w',\)"),
        (lambda c: c["leaves"][0].update(kind="pickle"), "its header lacks 'pickle'"),
        (lambda c: c["leaves"][1]["static"].update(format="int4"), "values of int8 are said to be"),
        (lambda c: c["leaves"][1]["static"].update(dtype=">f4"), "its header lacks '>f4'"),
        (lambda c: c["leaves"][1]["static"].update(layout=[-1, -1]), "must hold its trailing axes"),
        (
            lambda c: c["leaves"][1]["arrays"]["values"].update(shape=[6, 8]),
            "`scale` of QTensor.* must have the rank",
        ),
        (
            lambda c: c["leaves"][1]["arrays"]["values"].update(dtype="int4"),
            "values of int4 are said to be int8",
        ),
        (
            lambda c: c["leaves"][0]["arrays"]["value"].update(dtype="int32"),
            r"'a' is float32 \(4,\)",
        ),
    ],
)
def test_forged_headers(tmp_path, change, why):
    tree = {"a": jnp.zeros(4), "w": mk.quantize(W, "int8", axis=0)}
    path = rewritten(mp.save(tmp_path / "m", tree), lambda content: None)
    assert_same(mp.load(path), tree)
    with pytest.raises(mp.ModelFileError, match=f"is damaged .*{why}"):
        mp.load(rewritten(path, change))


def test_other_programs_read_the_file(tmp_path):
    safetensors = pytest.importorskip("safetensors", reason="only in the `dev` extra")
    path = mp.save(tmp_path / "m", TREE, policy="mixed_bfloat16")
    with safetensors.safe_open(path, framework="np") as file:
        assert json.loads(file.metadata()["mpjax"])["policy"]["config"]["name"] == "mixed_bfloat16"
        assert file.get_slice("quantized/stack").get_dtype() == "F8_E4M3"
        values = file.get_tensor("quantized/int8")
        np.testing.assert_array_equal(values, TREE["quantized"]["int8"].values)
        bits = file.get_tensor("params/bfloat16").view(np.uint16)
        np.testing.assert_array_equal(bits, np.arange(1 << 16, dtype=np.uint16))
        assert len(list(file.keys())) == len(jax.tree.leaves(TREE))


def test_what_is_no_file_is_not_replaced(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(FileExistsError, match="is a device, a pipe or a socket"):
        mp.save(pipe, TREE)
    assert pipe.is_fifo() and [each.name for each in tmp_path.iterdir()] == ["pipe"]
    with pytest.raises(TypeError, match=r"`path` is a dict: call mp.save\(path, tree\)"):
        mp.save(TREE, tmp_path / "m")  # pyright: ignore[reportArgumentType]
