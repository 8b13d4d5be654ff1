"""`mp.load_safetensors`: other people's float8 and int8 weights become QTensors of their bits."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import mpjax as mp
import mpjax_kernels as mk
from mpjax._safetensors import encode_header

F8 = ml_dtypes.float8_e4m3fn
RNG = np.random.default_rng(0)


def write(path, tensors):
    """A safetensors file as others write it: no metadata of ours."""
    tensors = {name: np.ascontiguousarray(x) for name, x in tensors.items()}
    header = encode_header({n: (x.dtype, x.shape) for n, x in tensors.items()}, {"format": "pt"})
    path.write_bytes(header + b"".join(x.tobytes() for x in tensors.values()))
    return path


def float8(*shape, dtype=F8):
    return RNG.normal(size=shape).astype(np.float32).astype(dtype)


def int8(*shape):
    return RNG.integers(-127, 128, shape, dtype=np.int8)


def scales(*shape):
    return RNG.uniform(0.5, 2, shape).astype(np.float32)


def blocks(scale, shape, size=128):
    """The scale of every entry: that of its block."""
    for axis in (-2, -1):
        index = np.arange(shape[axis]) // size
        scale = np.take(scale, index, axis)
    return scale


def loaded(path, tensors, **options):
    return mp.load_safetensors(write(path / "m.safetensors", tensors), **options)


def assert_values(q, values, scale_of_each, zero_point=0):
    """`q` holds these very values, and means `(values - zero_point) * scale` exactly."""
    assert isinstance(q, mk.QTensor)
    assert q.values.dtype == values.dtype
    assert np.asarray(q.values).tobytes() == values.tobytes()
    expected = (values.astype(np.float32) - zero_point) * scale_of_each
    np.testing.assert_array_equal(mk.dequantize(q), expected.astype(np.float32))


@pytest.mark.parametrize(
    ("shape", "scale", "stored"),
    [
        ((256, 384), (2, 3), (2, 3)),
        ((576, 256), (5, 2), (9, 2)),  # DeepSeek's kv_a_proj: blocks of 128 and half a one, in 64s
        ((64, 200), (1, 2), (1, 25)),  # 200 = 128 + 72, in gcd(200, 128) = 8s
        ((129, 128), (2, 1), (129, 1)),
        ((3, 256, 130), (3, 2, 2), (3, 2, 65)),  # a stack of experts
    ],
)
def test_float8_in_blocks_of_128(tmp_path, shape, scale, stored):
    w, s = float8(*shape), scales(*scale)
    q = loaded(tmp_path, {"proj.weight": w, "proj.weight_scale_inv": s})["proj.weight"]
    assert q.shape == shape and q.scale.shape == stored and q.dtype == jnp.float32
    assert_values(q, w, blocks(s, shape))


def test_a_kernel_of_flax_is_the_transpose(tmp_path):
    w, s = float8(256, 384), scales(2, 3)
    q = loaded(tmp_path, {"w": w, "w_scale_inv": s})["w"].T
    assert q.shape == (384, 256) and q.scale.shape == (3, 2)
    x = np.asarray(RNG.normal(size=(4, 384)), np.float32)
    expected = x.astype(np.float64) @ (w.astype(np.float64) * blocks(s, w.shape)).T
    error = np.abs(np.asarray(mk.matmul(x, q)) - expected)
    bound = 384 * 2.0**-24 * (np.abs(x) @ np.abs(w.astype(np.float64) * blocks(s, w.shape)).T)
    assert (error <= 4 * bound).all()


@pytest.mark.parametrize("make", [float8, int8])
@pytest.mark.parametrize(
    ("scale", "stored"),
    [((), (1, 1)), ((1,), (1, 1)), ((6, 1), (6, 1)), ((6,), (6, 1)), ((6, 4), (6, 4))],
    ids=["scalar", "one", "channel", "flat channel", "group"],
)
def test_scales_of_compressed_tensors(tmp_path, make, scale, stored):
    w, s = make(6, 8), scales(*scale)
    q = loaded(tmp_path, {"w.weight": w, "w.weight_scale": s})["w.weight"]
    assert q.scale.shape == stored and q.zero_point is None
    spelled = np.repeat(s.reshape(stored), 8 // stored[1], axis=1)
    assert_values(q, w, spelled)


def test_one_scale_per_expert(tmp_path):
    w, s = int8(3, 4, 5), scales(3)
    assert_values(loaded(tmp_path, {"w": w, "w_scale": s})["w"], w, s[:, None, None])


def test_blocks_of_compressed_tensors(tmp_path):
    w, s = float8(256, 130), scales(2, 2)
    q = loaded(tmp_path, {"w.weight": w, "w.weight_scale": s})["w.weight"]
    assert_values(q, w, blocks(s, w.shape))
    w, s = float8(64, 96), scales(2, 3)
    q = loaded(tmp_path, {"w.weight": w, "w.weight_scale_inv": s}, block_size=32)["w.weight"]
    assert_values(q, w, blocks(s, w.shape, 32))


def test_a_scale_with_two_meanings_is_refused(tmp_path):
    w, s = int8(4, 192), scales(4, 2)
    tensors = {"w.weight": w, "w.weight_scale": s}
    message = r"'w.weight' in .* groups of 96 or blocks of 128: pass block_size=96 or 128"
    with pytest.raises(mp.ModelFileError, match=message):
        loaded(tmp_path, tensors)
    of_96 = loaded(tmp_path, tensors, block_size=96)["w.weight"]
    assert_values(of_96, w, np.repeat(s, 96, axis=1))
    of_128 = loaded(tmp_path, tensors, block_size=128)["w.weight"]
    assert_values(of_128, w, np.repeat(s, 128, axis=1)[:, :192])
    with pytest.raises(mp.ModelFileError, match="one per block of 32 x 32"):
        loaded(tmp_path, tensors, block_size=32)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, ml_dtypes.float8_e8m0fnu])
def test_scales_become_float32(tmp_path, dtype):
    w, s = float8(4, 8), scales(4, 1).astype(dtype)
    q = loaded(tmp_path, {"w": w, "w_scale": s}, dtype="bfloat16")["w"]
    assert q.scale.dtype == jnp.float32 and q.dtype == jnp.bfloat16
    np.testing.assert_array_equal(q.scale, s.astype(np.float32))


def test_zero_points(tmp_path):
    w, s, z = int8(4, 8), scales(4, 1), np.asarray([[-128], [3], [0], [127]], np.int8)
    q = loaded(tmp_path, {"w": w, "w_scale": s, "w_zero_point": z})
    assert list(q) == ["w"]
    np.testing.assert_array_equal(q["w"].zero_point, z)
    assert_values(q["w"], w, s, z.astype(np.float32))
    for x in (w, float8(4, 8)):  # llm-compressor writes zeros beside symmetric weights
        zeros = np.zeros((4, 1), x.dtype)
        q = loaded(tmp_path, {"w": x, "w_scale": s, "w_zero_point": zeros})["w"]
        assert q.zero_point is None
        assert_values(q, x, s)


def test_the_lowest_int8_gets_a_zero_point(tmp_path):
    w, s = int8(4, 8), scales(4, 1)
    w[1, 2] = -128
    q = loaded(tmp_path, {"w": w, "w_scale": s})["w"]
    np.testing.assert_array_equal(q.zero_point, np.zeros((4, 1), np.int8))
    assert_values(q, w, s)


@pytest.mark.parametrize(
    "dtype", [ml_dtypes.float8_e5m2, ml_dtypes.float8_e4m3fnuz, ml_dtypes.float8_e5m2fnuz]
)
def test_other_kinds_of_float8(tmp_path, dtype):
    w, s = float8(4, 8, dtype=dtype), scales(4, 1)
    assert_values(loaded(tmp_path, {"w": w, "w_scale": s})["w"], w, s)


def test_everything_else_is_an_array_as_it_is(tmp_path):
    tensors = {
        "norm.weight": np.asarray([1, 2], ml_dtypes.bfloat16),
        "positions": np.arange(3),  # int64, which JAX would narrow
        "w.weight": float8(4, 8),
        "w.weight_scale": scales(4, 1),
        "w.input_scale": scales(1),
        "mask": np.asarray([True, False]),
        "ids": int8(3),
    }
    found = loaded(tmp_path, tensors)
    assert list(found) == [name for name in tensors if name != "w.weight_scale"]
    for name in set(found) - {"w.weight"}:
        assert isinstance(found[name], jax.Array) == (name != "positions")
        assert found[name].dtype == tensors[name].dtype
        np.testing.assert_array_equal(np.asarray(found[name]), tensors[name])


def test_float8_that_no_file_scales_is_an_array(tmp_path):
    w = float8(4, 8)
    found = loaded(tmp_path, {"w.weight": w})["w.weight"]
    assert isinstance(found, jax.Array) and found.dtype == w.dtype


def test_a_weight_and_its_scale_in_two_files(tmp_path):
    a, b, s = float8(4, 8), float8(4, 8), scales(4, 1)
    one = write(tmp_path / "1", {"a.weight": a, "a.weight_scale": s, "b.weight": b})
    two = write(tmp_path / "2", {"b.weight_scale": s, "c": s})
    found = mp.load_safetensors(one, two)
    assert list(found) == ["a.weight", "b.weight", "c"]
    assert_values(found["b.weight"], b, s)
    with pytest.raises(
        mp.ModelFileError, match=r"1 has 'b.weight' of float8_e4m3fn without its sc"
    ):
        mp.load_safetensors(one)
    with pytest.raises(
        mp.ModelFileError, match="2 has 'b.weight_scale' without an int8 or float8 w"
    ):
        mp.load_safetensors(two)
    with pytest.raises(mp.ModelFileError, match="'a.weight' is in .*1 and in .*1: give one"):
        mp.load_safetensors(one, one)
    with pytest.raises(ValueError, match="`paths` is empty"):
        mp.load_safetensors()


@pytest.mark.parametrize(
    ("tensors", "why"),
    [
        (
            {"w_scale_inv": scales(2, 2)},
            r"a scale of shape \(2, 2\) does not fit a weight \(256, 3",
        ),
        ({"w_scale_inv": scales(1, 3)}, r"a scale of shape \(1, 3\) does not fit"),
        ({"w_scale_inv": scales(256, 1)}, "does not fit"),
        ({"w_scale": scales(2, 3, 1)}, "does not fit"),
        ({"w_scale": scales(384)}, "does not fit"),
        ({"w_scale": scales(256, 5)}, "one per block of 128 x 128"),
        ({"w_scale": scales(1) * np.nan}, "its scale is not positive and finite everywhere"),
        ({"w_scale": scales(256, 1) * 0}, "its scale is not positive and finite everywhere"),
        ({"w_scale": -scales(256, 1)}, "its scale is not positive and finite everywhere"),
        ({"w_scale": np.ones(1, np.int32)}, "its scale is int32, not floating"),
        (
            {"w_scale": scales(1), "w_zero_point": np.ones(1, np.int32)},
            "zero point is int32, not i",
        ),
        (
            {"w_scale": scales(1), "w_zero_point": np.ones((256, 1), np.int8)},
            "zero point has shape",
        ),
        ({"w_scale": scales(1), "w_zero_point": np.ones(1, np.int8)}, "beside integer values"),
        ({"w": float8(2, 2) * F8(np.nan), "w_scale": scales(1)}, "it holds a NaN or an infinity"),
    ],
)
def test_scales_that_cannot_be(tmp_path, tensors, why):
    with pytest.raises(mp.ModelFileError, match=f"'w' in .*m.safetensors cannot be read: .*{why}"):
        loaded(tmp_path, {"w": np.ones((256, 384), F8), **tensors})


def test_shardings_by_name(tmp_path):
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("x"))
    w, s = float8(256, 128), scales(2, 1)
    tensors = {"a.weight": w, "a.weight_scale_inv": s, "b": scales(3)}
    found = loaded(tmp_path, tensors, shardings={"a.weight": sharding, "b": None})
    assert found["a.weight"].values.sharding == sharding
    assert found["a.weight"].scale.sharding == sharding
    assert_values(found["a.weight"], w, blocks(s, w.shape))
    with pytest.raises(ValueError, match=r"'b' \(float32 \(3,\)\) cannot be sharded so"):
        loaded(tmp_path, tensors, shardings=lambda name: sharding)


def test_a_file_of_mpjax_is_for_load(tmp_path):
    path = mp.save(tmp_path / "m", {"w": jnp.zeros(1)})
    with pytest.raises(mp.ModelFileError, match="is a file of mpjax.save: read it with mpjax.load"):
        mp.load_safetensors(path)


def test_files_of_the_safetensors_package(tmp_path):
    package = pytest.importorskip("safetensors.numpy", reason="only in the `dev` extra")
    w, s, b = float8(256, 128), scales(2, 1), scales(4).astype(ml_dtypes.bfloat16)
    package.save_file({"w": w, "w_scale_inv": s, "b": b}, tmp_path / "m", metadata={"format": "pt"})
    found = mp.load_safetensors(tmp_path / "m")
    assert_values(found["w"], w, blocks(s, w.shape))
    np.testing.assert_array_equal(np.asarray(found["b"]), b)
