"""`mp.export`: one artifact per model, run by JAX alone in another process."""

import re
import subprocess
import sys
import textwrap

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import export as jax_export

import mpjax as mp

KEY = jax.random.key(0)
X = np.asarray(jax.random.normal(KEY, (4, 128)))
MODES = ["int8", "int4/64", "float8/row"]
MODES += [
    pytest.param(mode, marks=pytest.mark.slow)
    for mode in ("int8_weight_only", "float8", "float8/128x128")
]


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.relu(nn.Dense(128)(x))
        return nn.Dense(128)(nn.Dropout(0.5, deterministic=not train)(x))


class NetNNX(nnx.Module):
    def __init__(self, rngs):
        self.up, self.down = (nnx.Linear(128, 128, rngs=rngs) for _ in range(2))

    def __call__(self, x):
        return self.down(nnx.relu(self.up(x)))


def quantized(mode):
    model = mp.wrap(Net(), f"{mode}_from_mixed_bfloat16")
    return model, mp.quantize(model, model.init(KEY, X), X)


def any_batch():
    (batch,) = jax_export.symbolic_shape("batch")
    return jax.ShapeDtypeStruct((batch, 128), jnp.float32)


@pytest.mark.parametrize("mode", MODES)
def test_an_exported_model_gives_the_same_bits(mode):
    model, variables = quantized(mode)
    expected = jax.jit(model.apply)(variables, X)
    blob = mp.export(model, variables, X, platforms=("cpu",), train=False)
    np.testing.assert_array_equal(mp.load_exported(blob)(X), expected)
    everywhere = mp.export(model, variables, any_batch())
    run = mp.load_exported(everywhere)
    for rows in (1, 4):
        y, here = run(X[:rows]), jax.jit(model.apply)(variables, X[:rows])
        np.testing.assert_allclose(
            np.asarray(y, np.float32), np.asarray(here, np.float32), rtol=0.02, atol=0.02
        )
    assert jax_export.deserialize(bytearray(everywhere)).platforms == ("cpu", "cuda", "tpu")


@pytest.mark.parametrize("mode", ["int8", "float8/row"])
def test_a_program_for_a_tpu_is_made_and_lowered_without_one(mode):
    model, variables = quantized(mode)
    exported = jax_export.deserialize(bytearray(mp.export(model, variables, X, platforms=("tpu",))))
    lowered = jax.jit(exported.call).trace(X).lower(lowering_platforms=("tpu",))
    products = [line for line in lowered.as_text().splitlines() if "dot_general" in line]
    kind = {"int8": "xi8>", "float8/row": "xf8E4M3FN>"}[mode]
    assert len(products) == 2 and all(line.count(kind) >= 2 for line in products)
    with pytest.raises(ValueError, match="exported for platforms.*tpu.*cpu"):
        exported.call(X)


def test_weights_beside_are_the_first_argument():
    model, variables = quantized("int8")
    blob, weights = mp.export(model, variables, X, platforms=("cpu",), weights="beside")
    assert weights["params/Dense_0/kernel/values"].dtype == jnp.int8
    inside = mp.export(model, variables, X, platforms=("cpu",))
    assert len(blob) < len(inside) - 2 * 128 * 128 // 2  # two kernels, compressed at most by half
    expected = jax.jit(model.apply)(variables, X)
    np.testing.assert_array_equal(mp.load_exported(blob)(weights, X), expected)


@pytest.mark.parametrize("weights", ["inside", "beside"])
def test_float_weights_under_a_quantized_policy_are_warned_of(weights):
    policy = mp.DTypePolicyMap("int8_from_float32", {"Dense_1": "float32"})
    model = mp.wrap(Net(), policy)
    variables = model.init(KEY, X)
    with pytest.warns(UserWarning) as warned:
        mp.export(model, variables, X, platforms=("cpu",), weights=weights)
    (warning,) = warned
    first, *lines = str(warning.message).splitlines()
    assert re.match(r"1 weights of Net are floats in the exported program.*mp\.quantize", first)
    assert lines == ["  params/Dense_0/kernel: int8 by its policy"]
    assert warning.filename == __file__


def test_weights_that_quantize_leaves_are_not_warned_of_again():
    model = mp.wrap(Net(), "int4/96_from_float32")  # 96 does not divide 128
    policy = mp.DTypePolicyMap("int8_from_float32", {"Dense_0": model.policy})
    model = mp.wrap(Net(), policy)
    variables, report = mp.quantize(model, model.init(KEY, X), X, return_report=True)
    assert [each.path for each in report.left] == ["params/Dense_0/kernel"]
    mp.export(model, variables, X, platforms=("cpu",))  # a warning is an error in tests
    profitable = mp.wrap(Net(), "int8_from_float32", target="v6e", when="profitable")
    many = jax.ShapeDtypeStruct((2**16, 128), jnp.float32)
    mp.export(profitable, profitable.init(KEY, X), many, platforms=("cpu",))


def test_float_weights_of_an_nnx_model_are_warned_of():
    model = mp.wrap(NetNNX(nnx.Rngs(0)), "int8_weight_only_from_float32")
    with pytest.warns(
        UserWarning, match=r"2 weights .*\n  down/kernel: int8 .*\n  up/kernel: int8"
    ):
        mp.export(model, X, platforms=("cpu",))
    profitable = mp.wrap(NetNNX(nnx.Rngs(0)), "int8_from_float32", target="v6e", when="profitable")
    mp.export(mp.quantize(profitable), X, platforms=("cpu",))


def test_nnx():
    model = mp.quantize(mp.wrap(NetNNX(nnx.Rngs(0)), "int8_from_mixed_bfloat16"))
    expected = nnx.jit(lambda model, x: model(x))(model, X)
    run = mp.load_exported(mp.export(model, X, platforms=("cpu",)))
    np.testing.assert_array_equal(run(X), expected)
    blob, weights = mp.export(model, X, platforms=("cpu",), weights="beside")
    np.testing.assert_array_equal(mp.load_exported(blob)(weights, X), expected)


def test_another_process_runs_it_without_mpjax_or_flax(tmp_path):
    model, variables = quantized("int8")
    (tmp_path / "model.bin").write_bytes(mp.export(model, variables, X, platforms=("cpu",)))
    np.save(tmp_path / "x.npy", X)
    script = """
        import sys
        # Importing one of them raises.
        sys.modules.update(dict.fromkeys(("mpjax", "mpjax_kernels", "flax")))
        import numpy as np
        from jax import export
        run = export.deserialize(bytearray(open("model.bin", "rb").read())).call
        np.save("y.npy", np.asarray(run(np.load("x.npy")), np.float32))
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    subprocess.run(command, cwd=tmp_path, check=True, timeout=120)
    expected = np.asarray(jax.jit(model.apply)(variables, X), np.float32)
    np.testing.assert_array_equal(np.load(tmp_path / "y.npy"), expected)


@pytest.mark.parametrize("api", ["linen", "nnx"])
def test_another_process_runs_any_batch_with_the_weights_beside(tmp_path, api):
    if api == "linen":
        model, variables = quantized("int8")
        args, apply = (variables,), jax.jit(lambda x: model.apply(variables, x))
    else:
        model = mp.quantize(mp.wrap(NetNNX(nnx.Rngs(0)), "int8_from_mixed_bfloat16"))
        args, apply = (), nnx.jit(lambda x: model(x))
    blob, weights = mp.export(model, *args, any_batch(), platforms=("cpu",), weights="beside")
    (tmp_path / "model.bin").write_bytes(blob)
    np.savez(tmp_path / "weights.npz", **weights)
    np.save(tmp_path / "x.npy", X)
    script = """
        import sys
        sys.modules.update(dict.fromkeys(("mpjax", "mpjax_kernels", "flax")))
        import numpy as np
        from jax import export
        run = export.deserialize(bytearray(open("model.bin", "rb").read())).call
        weights, x = dict(np.load("weights.npz")), np.load("x.npy")
        for rows in (1, 3):
            np.save(f"y{rows}.npy", np.asarray(run(weights, x[:rows]), np.float32))
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    subprocess.run(command, cwd=tmp_path, check=True, timeout=120)
    for rows in (1, 3):
        expected = np.asarray(apply(X[:rows]), np.float32)
        np.testing.assert_array_equal(np.load(tmp_path / f"y{rows}.npy"), expected)


def test_every_flipped_bit_and_every_missing_byte_of_an_artifact_is_noticed(tmp_path):
    model, variables = quantized("int8")
    blob = mp.export(model, variables, X, platforms=("cpu",))
    path = tmp_path / "model.bin"
    rng = np.random.default_rng(0)
    bits = [*rng.integers(0, 8 * len(blob), 200), *range(8 * len(blob) - 160, 8 * len(blob))]
    for bit in bits:
        bad = bytearray(blob)
        bad[bit // 8] ^= 1 << bit % 8
        with pytest.raises(mp.ModelFileError, match=f"`blob` of {len(blob)} bytes .*damaged"):
            mp.load_exported(bytes(bad))
    for length in (0, 1, 19, 20, len(blob) // 2, len(blob) - 20, len(blob) - 1):
        path.write_bytes(blob[:length])
        with pytest.raises(mp.ModelFileError, match=f"{path} .*cut short.*export the model, again"):
            mp.load_exported(path)
    path.write_bytes(blob)
    expected = jax.jit(model.apply)(variables, X)
    for whole in (path, str(path), bytearray(blob)):
        np.testing.assert_array_equal(mp.load_exported(whole)(X), expected)


def test_what_is_no_artifact_is_said_to_be_none(tmp_path):
    for bad in (b"", b"not a program", bytes(1000)):
        with pytest.raises(mp.ModelFileError, match=f"{len(bad)} bytes does not end in the checks"):
            mp.load_exported(bad)
    for bad in (7, None, [b""]):
        with pytest.raises(TypeError, match="`blob` must be the bytes"):
            mp.load_exported(bad)  # pyright: ignore[reportArgumentType]
    with pytest.raises(FileNotFoundError, match=r"model\.bin"):
        mp.load_exported(tmp_path / "model.bin")


def test_an_artifact_of_jax_export_itself_has_no_checksum():
    blob = jax_export.export(jax.jit(jnp.sin))(X).serialize()
    with pytest.raises(mp.ModelFileError, match=r"loaded by jax\.export\.deserialize, unchecked"):
        mp.load_exported(blob)


def test_an_artifact_that_jax_cannot_read_is_not_called_damaged(monkeypatch):
    model, variables = quantized("int8")
    blob = mp.export(model, variables, X, platforms=("cpu",))

    def refuse(_):
        raise ValueError("calling convention version 99")

    monkeypatch.setattr(jax_export, "deserialize", refuse)
    with pytest.raises(mp.ModelFileError, match=r"is as mp\.export .*cannot read it .*version 99"):
        mp.load_exported(blob)


@pytest.mark.parametrize("weights", ["inside", "beside"])
def test_the_program_is_called_like_the_model(weights):
    model, variables = quantized("int8")
    made = mp.export(model, variables, X, platforms=("tpu",), weights=weights)
    blob, given = (made, ()) if weights == "inside" else (made[0], (made[1],))
    with pytest.raises(ValueError, match="Function 'Net' was exported for platforms"):
        mp.load_exported(blob)(*given, X)


def test_bad_arguments_are_named_before_any_work():
    model, variables = quantized("int8")
    for platforms in ("tpu", (), ("gpu",), ("cpu", "v6e")):
        with pytest.raises(ValueError, match="`platforms` must be a sequence of some of"):
            mp.export(model, variables, X, platforms=platforms)
    with pytest.raises(ValueError, match="`weights` must be 'inside' or 'beside', got 'out'"):
        mp.export(model, variables, X, weights="out")  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="a dict with 'params', but got ndarray"):
        mp.export(model, X)
    shapes = jax.eval_shape(lambda: variables)
    with pytest.raises(ValueError, match="weights of Net have no values.*weights='beside'"):
        mp.export(model, shapes, X)
    _, weights = mp.export(model, shapes, X, platforms=("cpu",), weights="beside")
    assert weights["params/Dense_0/kernel/values"] == jax.ShapeDtypeStruct((128, 128), jnp.int8)
    with pytest.raises(ValueError, match="Net is not wrapped"):
        mp.export(Net(), variables, X)


def test_without_flatbuffers_the_extra_is_named(monkeypatch):
    model, variables = quantized("int8")
    monkeypatch.setitem(sys.modules, "flatbuffers", None)
    for call in (lambda: mp.export(model, variables, X), lambda: mp.load_exported(b"")):
        with pytest.raises(ImportError, match=r"mpjax\[export\]"):
            call()
