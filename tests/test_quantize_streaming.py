"""`mp.quantize` from a file, from donated weights and of shapes alone: the same as of arrays."""

import json
import os
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx

import mpjax as mp
import mpjax.nnx._quantize
import mpjax_kernels as mk
from mpjax import _freed_memory
from mpjax._safetensors import encode_header
from tests.helpers import assert_trees_equal

INT8 = "int8_from_float32"
X = jax.ShapeDtypeStruct((2, 8), jnp.float32)


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.LayerNorm(name="norm")(nn.Dense(16, name="up")(x))
        return nn.Dense(8, name="down", dtype=jnp.float32)(nn.Dense(8, name="mid")(x))


class NetNNX(nnx.Module):
    def __init__(self, rngs):
        self.blocks = nnx.List([nnx.Linear(8, 8, rngs=rngs) for _ in range(2)])
        self.norm = nnx.BatchNorm(8, use_running_average=True, rngs=rngs)

    def __call__(self, x):
        return self.norm(self.blocks[1](self.blocks[0](x)))


MODEL = mp.wrap(Net(), INT8)
VARIABLES = jax.jit(MODEL.init)(jax.random.key(0), jnp.zeros(X.shape))


def nnx_model():
    return mp.wrap(NetNNX(nnx.Rngs(0)), INT8)


def abstract_model():
    return mp.wrap(nnx.eval_shape(lambda: NetNNX(nnx.Rngs(0))), INT8)


def flat(tree, separator="/"):
    leaves = jax.tree.leaves_with_path(tree)
    return {
        jax.tree_util.keystr(keys, simple=True, separator=separator): np.asarray(leaf)
        for keys, leaf in leaves
    }


def write(path, arrays):
    """A safetensors file as others write it."""
    header = encode_header({n: (x.dtype, x.shape) for n, x in arrays.items()}, {})
    path.write_bytes(header + b"".join(x.tobytes() for x in arrays.values()))
    return path


def standard(folder, tree):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder, tree)
    return folder


def managed(folder, tree):
    with ocp.CheckpointManager(folder) as manager:
        for step in (1, 2):
            now = jax.tree.map(lambda x, step=step: x if step == 2 else 0 * x, tree)
            manager.save(step, args=ocp.args.StandardSave(now))
    return folder


def sharded(folder, tree):
    arrays = flat(tree)
    files = {name: f"part-{i % 2}.safetensors" for i, name in enumerate(arrays)}
    for part in sorted(set(files.values())):
        write(folder / part, {n: x for n, x in arrays.items() if files[n] == part})
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return index


def state_of(tree):
    return {"variables": {"params": tree}, "step": np.int32(3)}


SOURCES = {
    "slashes": lambda folder, tree: mp.open_weights(write(folder / "m.safetensors", flat(tree))),
    "dots": lambda folder, tree: mp.open_weights(write(folder / "m.safetensors", flat(tree, "."))),
    "sharded": lambda folder, tree: mp.open_weights(sharded(folder, tree)),
    "saved": lambda folder, tree: mp.open_weights(mp.save(folder / "m.safetensors", tree)),
    "standard": lambda folder, tree: mp.open_weights(standard(folder / "m", tree)),
    "manager": lambda folder, tree: mp.open_weights(managed(folder / "m", tree)),
    "checkpoint": lambda folder, tree: mp.open_weights(
        mp.save_checkpoint(folder / "m", state_of(tree), step=7).parent
    )["variables"]["params"],
}


@pytest.mark.parametrize("source", SOURCES)
def test_a_linen_model_from_a_file(tmp_path, source):
    expected, report = mp.quantize(MODEL, VARIABLES, X, return_report=True)
    weights = SOURCES[source](tmp_path, VARIABLES["params"])
    leaf = weights["up"]["kernel"]
    assert isinstance(leaf, mp.LazyArray)
    assert (leaf.shape, leaf.dtype, leaf.nbytes) == ((8, 16), np.float32, 512)
    np.testing.assert_array_equal(leaf.read(), VARIABLES["params"]["up"]["kernel"])
    variables, again = mp.quantize(MODEL, {"params": weights}, X, return_report=True)
    assert_trees_equal(variables, expected)
    assert again == report


@pytest.mark.parametrize("source", ["slashes", "state", "checkpoint"])
def test_an_nnx_model_without_values_from_a_file(tmp_path, source):
    model = nnx_model()
    tree = nnx.to_pure_dict(nnx.state(model))
    if source == "slashes":
        weights = SOURCES[source](tmp_path, tree)
    elif source == "state":  # Flax saves a variable as {"value": ...}
        weights = mp.open_weights(standard(tmp_path / "m", nnx.state(model)))
        assert list(weights["norm"]["mean"]) == ["value"]
    else:
        mp.save_checkpoint(tmp_path / "m", (model,), step=0)
        weights = mp.open_weights(tmp_path / "m")["0"]
    empty = abstract_model()
    filled, report = mp.quantize(empty, weights, return_report=True)
    assert filled is empty
    expected, wanted = mp.quantize(model, return_report=True)
    assert_trees_equal(nnx.as_pure(nnx.state(filled)), nnx.as_pure(nnx.state(expected)))
    assert report == wanted
    x = jnp.ones((2, 8))
    np.testing.assert_array_equal(filled(x), expected(x))


def test_a_weight_is_read_when_its_turn_comes_and_let_go(tmp_path):
    weights = SOURCES["slashes"](tmp_path, VARIABLES["params"])
    alive, log = [], []

    def watched(leaf):
        def read():
            log.append((leaf.name, sum(ref() is not None for ref in alive)))
            array = leaf.read()
            alive.append(weakref.ref(array))
            return array

        return mp.LazyArray(leaf.name, leaf.shape, leaf.dtype, read)

    mp.quantize(MODEL, {"params": jax.tree.map(watched, weights)}, X)
    assert [name for name, _ in log][:2] == ["up/kernel", "mid/kernel"]
    assert sorted(name for name, _ in log) == sorted(flat(VARIABLES["params"]))
    quantized = dict(log[:2])
    assert set(quantized.values()) == {0}  # when one is read, none before it is still there


# -- what does not fit


def edited(tmp_path, change):
    arrays = flat(VARIABLES["params"])
    change(arrays)
    return {"params": mp.open_weights(write(tmp_path / "m.safetensors", arrays))}


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda a: a.pop("mid/kernel"), "do not fit Net.*Could not find parameter.*kernel"),
        (
            lambda a: a.update({"mid/kernel": np.ones((8, 3), np.float32)}),
            r"do not fit Net.*expected.*\(16, 8\)",
        ),
        (
            lambda a: a.update({"other/kernel": np.ones((2, 2), np.float32)}),
            "Net reaches no layer with these weights .*:\n  params/other/kernel: LazyArray",
        ),
        (
            lambda a: a.update({"mid/more": np.ones(2, np.float32)}),
            r"params/mid/more: LazyArray\('mid/more', float32\[2\]\)\nDelete them from the tree",
        ),
        (
            lambda a: a.update({"mid/kernel": np.full((16, 8), np.nan, np.float32)}),
            "'params/mid/kernel' has 128 of 128 values that are NaN",
        ),
    ],
)
def test_a_file_that_does_not_fit_a_linen_model(tmp_path, change, error):
    with pytest.raises(ValueError, match=f"(?s){error}"):
        mp.quantize(MODEL, edited(tmp_path, change), X)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda a: a.pop("blocks/1/kernel"), r"blocks/1/kernel: absent from the weights, float32"),
        (lambda a: a.pop("norm/mean"), r"norm/mean: absent from the weights, float32\[8\] in the"),
        (
            lambda a: a.update({"blocks/1/kernel": np.ones((8, 3), np.float32)}),
            r"blocks/1/kernel: float32\[8, 3\] among the weights, float32\[8, 8\] in the model",
        ),
        (
            lambda a: a.update({"other": np.ones(2, np.float32)}),
            r"other: float32\[2\] among the weights, absent from the model",
        ),
        (
            lambda a: a["blocks/1/kernel"].fill(np.inf),
            "'blocks/1/kernel' has 64 of 64 values that are NaN or infinite",
        ),
    ],
)
def test_a_file_that_does_not_fit_an_nnx_model_leaves_it_as_it_was(tmp_path, change, error):
    arrays = {n: x.copy() for n, x in flat(nnx.to_pure_dict(nnx.state(nnx_model()))).items()}
    change(arrays)
    model = abstract_model()
    with pytest.raises(ValueError, match=error):
        mp.quantize(model, mp.open_weights(write(tmp_path / "m.safetensors", arrays)))
    leaves = jax.tree.leaves(nnx.as_pure(nnx.state(model)))
    assert len(leaves) == 8 and all(isinstance(x, jax.ShapeDtypeStruct) for x in leaves)


def test_damaged_and_changed_files(tmp_path):
    path = write(tmp_path / "m.safetensors", flat(VARIABLES["params"]))
    whole = path.read_bytes()
    weights = {"params": mp.open_weights(path)}
    path.write_bytes(whole[:-4])
    with pytest.raises(mp.ModelFileError, match="is damaged .it has changed since it was opened"):
        mp.quantize(MODEL, weights, X)
    with pytest.raises(mp.ModelFileError, match="is damaged .its header: .* the file at"):
        mp.open_weights(path)
    saved = mp.save(tmp_path / "saved.safetensors", VARIABLES)
    data = bytearray(saved.read_bytes())
    data[-1] ^= 1
    saved.write_bytes(data)
    with pytest.raises(mp.ModelFileError, match="the bytes of 'params/.*' have changed since"):
        mp.quantize(MODEL, mp.open_weights(saved), X)
    mp.save(saved, mp.quantize(MODEL, VARIABLES, X))
    with pytest.raises(mp.ModelFileError, match="holds 'params/.*/kernel' quantized already: load"):
        mp.open_weights(saved)


QUANTIZED = """
import sys
import mpjax as mp
from tests.test_quantize_streaming import MODEL, X
try:
    mp.quantize(MODEL, mp.open_weights(sys.argv[1]), X)
except mp.ModelFileError as error:
    print(error)
"""


def test_a_damaged_orbax_checkpoint(tmp_path):
    """In its own process: TensorStore's threads report to an event loop that Orbax has closed."""
    folder = mp.save_checkpoint(tmp_path / "m", VARIABLES, step=1)
    for file in [*folder.glob("arrays/d/*"), *folder.glob("arrays/ocdbt.process_0/d/*")]:
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    done = subprocess.run(
        [sys.executable, "-c", QUANTIZED, str(tmp_path / "m")],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "arrays is damaged" in done.stdout
    shutil.rmtree(folder)
    with pytest.raises(FileNotFoundError, match="no checkpoint in .*/m, which holds nothing: give"):
        mp.open_weights(tmp_path / "m")


def test_files_and_arguments_that_cannot_be_opened(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no file .*/none"):
        mp.open_weights(tmp_path / "none")
    path = write(tmp_path / "m.safetensors", {"a": np.ones(2), "a/b": np.ones(2)})
    with pytest.raises(mp.ModelFileError, match="names in .* make no tree: 'a/b' and another name"):
        mp.open_weights(path)
    assert list(mp.open_weights(path, separator=".")) == ["a", "a/b"]
    with pytest.raises(ValueError, match="`step` is 3, but .* is no folder"):
        mp.open_weights(path, step=3)
    with pytest.raises(ValueError, match="`separator` is '.', but .* is a folder"):
        mp.open_weights(tmp_path, separator=".")
    index = sharded(tmp_path, VARIABLES["params"])
    write(tmp_path / "part-1.safetensors", {"odd": np.ones(2)})
    with pytest.raises(mp.ModelFileError, match=r"part-1.safetensors is damaged \(it lacks '"):
        mp.open_weights(index)


# -- donated, and of shapes alone


def test_donated_weights_are_freed_as_they_go_and_never_before_all_are_checked():
    expected = mp.quantize(MODEL, VARIABLES, X)
    assert not any(x.is_deleted() for x in jax.tree.leaves(VARIABLES))
    mine = jax.tree.map(jnp.copy, VARIABLES)
    assert_trees_equal(mp.quantize(MODEL, mine, X, donate=True), expected)
    deleted = {name for name, x in flat_arrays(mine).items() if x.is_deleted()}
    assert deleted == {"params/up/kernel", "params/mid/kernel"}
    mine = jax.tree.map(jnp.copy, VARIABLES)
    mine["params"]["mid"]["kernel"] = mine["params"]["mid"]["kernel"].at[0, 0].set(jnp.nan)
    with pytest.raises(ValueError, match="'params/mid/kernel' has 1 of 128"):
        mp.quantize(MODEL, mine, X, donate=True)
    assert not any(x.is_deleted() for x in jax.tree.leaves(mine))


def test_an_array_in_two_places_is_not_donated():
    class Two(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(8, name="b")(nn.Dense(8, name="a")(x))

    model = mp.wrap(Two(), mp.DTypePolicyMap("float32", {"a": INT8}))
    layer = {"kernel": jnp.ones((8, 8)), "bias": jnp.zeros(8)}
    variables = {"params": {"a": layer, "b": layer}}
    with pytest.raises(ValueError, match="array at 'params/a/kernel' is in the model more than"):
        mp.quantize(model, variables, X, donate=True)
    mp.quantize(model, variables, X)
    model = nnx_model()
    model.blocks[1].kernel.set_raw_value(model.blocks[0].kernel.get_raw_value())
    with pytest.raises(ValueError, match="array at 'blocks/0/kernel' is in the model more than"):
        mp.quantize(model, donate=True)
    mp.quantize(model)


def flat_arrays(tree):
    return {
        jax.tree_util.keystr(keys, simple=True, separator="/"): leaf
        for keys, leaf in jax.tree.leaves_with_path(tree)
    }


def test_a_donated_nnx_model_lets_its_floats_go_as_they_are_quantized():
    model = nnx_model()
    kept = model.blocks[0].kernel.get_raw_value()
    mp.quantize(model)
    assert not kept.is_deleted()
    model = nnx_model()
    kept = model.blocks[0].kernel.get_raw_value()
    mp.quantize(model, donate=True)
    assert kept.is_deleted() and isinstance(model.blocks[0].kernel.get_raw_value(), mk.QTensor)
    model = nnx_model()
    model.blocks[1].kernel[...] = jnp.full((8, 8), jnp.inf)
    with pytest.raises(ValueError, match="'blocks/1/kernel' has 64 of 64"):
        mp.quantize(model, donate=True)
    assert model(jnp.ones((2, 8))).shape == (2, 8)
    assert not isinstance(model.blocks[0].kernel.get_raw_value(), mk.QTensor)


def test_shapes_of_a_quantized_linen_model_without_an_array(tmp_path):
    shapes = jax.eval_shape(MODEL.init, jax.random.key(0), X)
    template = jax.eval_shape(lambda v: mp.quantize(MODEL, v, X), shapes)
    quantized = mp.quantize(MODEL, VARIABLES, X)
    assert jax.tree.structure(template) == jax.tree.structure(quantized)
    for a, b in zip(jax.tree.leaves(template), jax.tree.leaves(quantized), strict=True):
        assert isinstance(a, jax.ShapeDtypeStruct) and (a.shape, a.dtype) == (b.shape, b.dtype)
    y = jax.eval_shape(MODEL.apply, template, X)
    assert (y.shape, y.dtype) == ((2, 8), jnp.float32)
    mp.save_checkpoint(tmp_path / "m", quantized, step=0)
    assert_trees_equal(mp.restore_checkpoint(tmp_path / "m", template), quantized)
    with pytest.raises(ValueError, match="'params/up/kernel' has no values .*: give weights, such"):
        mp.quantize(MODEL, shapes, X)


def test_shapes_of_a_quantized_nnx_model_without_an_array(tmp_path):
    template = nnx.eval_shape(lambda: mp.quantize(nnx_model()))
    model = mp.quantize(nnx_model())
    assert jax.tree.structure(nnx.state(template)) == jax.tree.structure(nnx.state(model))
    leaves = jax.tree.leaves(nnx.as_pure(nnx.state(template)))
    assert all(isinstance(x, jax.ShapeDtypeStruct) for x in leaves)
    path = mp.save(tmp_path / "m.safetensors", model)
    loaded = mp.load(path, template)
    assert_trees_equal(nnx.as_pure(nnx.state(loaded)), nnx.as_pure(nnx.state(model)))
    with pytest.raises(ValueError, match="'blocks/0/kernel' has no values"):
        mp.quantize(abstract_model())


@pytest.mark.parametrize("missing", [OSError("no library"), TypeError("no name")])
def test_freed_memory_is_kept_where_the_c_library_cannot_be_asked(monkeypatch, missing):
    def refuse(name):
        raise missing

    monkeypatch.setattr(_freed_memory.ctypes, "CDLL", refuse)
    _freed_memory._trim.cache_clear()
    try:
        _freed_memory.give_back()
        assert _freed_memory._trim() is None
    finally:
        _freed_memory._trim.cache_clear()


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident memory is read there")
def test_freed_memory_goes_back_to_the_system():
    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    blocks = [bytearray(2000) for _ in range(50_000)]  # 100 MB
    kept, blocks = blocks[-1:], None  # the last one keeps the heap from shrinking by itself
    before = resident()
    _freed_memory.give_back()
    assert before - resident() > 50_000_000 and len(kept) == 1


def stop_at_the_second_weight(monkeypatch):
    """Ctrl-C while a weight is quantized."""
    quantize_weight, seen = mpjax.nnx._quantize.quantize_weight, []

    def stopped(value, stored, product, path):
        seen.append(path)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return quantize_weight(value, stored, product, path)

    monkeypatch.setattr(mpjax.nnx._quantize, "quantize_weight", stopped)
    return seen


@pytest.mark.parametrize("mode", ["int8", "int8_static"])
def test_an_nnx_model_whose_quantization_is_stopped_half_way_is_as_it_was(monkeypatch, mode):
    model = mp.wrap(NetNNX(nnx.Rngs(0)), f"{mode}_from_float32")
    calibration = [jnp.ones((2, 8))] if mode == "int8_static" else None
    before = flat_arrays(nnx.as_pure(nnx.state(model)))
    with monkeypatch.context() as patch:
        stop_at_the_second_weight(patch)
        with pytest.raises(KeyboardInterrupt) as caught:
            mp.quantize(model, calibration=calibration)
    assert not hasattr(caught.value, "__notes__")
    after = flat_arrays(nnx.as_pure(nnx.state(model)))
    assert after.keys() == before.keys() and all(after[name] is before[name] for name in after)
    expected = mp.wrap(NetNNX(nnx.Rngs(0)), f"{mode}_from_float32")
    again, expected = (mp.quantize(each, calibration=calibration) for each in (model, expected))
    assert_trees_equal(nnx.as_pure(nnx.state(again)), nnx.as_pure(nnx.state(expected)))


@pytest.mark.parametrize("at", range(3))
def test_values_are_put_into_an_nnx_model_all_or_none(monkeypatch, at):
    model = mp.wrap(NetNNX(nnx.Rngs(0)), INT8)
    before = flat_arrays(nnx.as_pure(nnx.state(model)))
    set_raw_value, count = nnx.Variable.set_raw_value, iter(range(100))

    def stopped(self, value):
        set_raw_value(self, value)
        if next(count) == at:
            raise KeyboardInterrupt

    values = {name: jnp.zeros(x.shape) for name, x in before.items()}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(nnx.Variable, "set_raw_value", stopped)
        mpjax.nnx._quantize.put_values(model, values)
    after = flat_arrays(nnx.as_pure(nnx.state(model)))
    assert len(after) > 3 and all(after[name] is before[name] for name in before)


def test_a_donated_nnx_model_that_is_stopped_half_way_says_so(monkeypatch):
    model = mp.wrap(NetNNX(nnx.Rngs(0)), INT8)
    seen = stop_at_the_second_weight(monkeypatch)
    with pytest.raises(KeyboardInterrupt) as caught:
        mp.quantize(model, donate=True)
    (note,) = caught.value.__notes__
    assert "after 1 of 2 weights" in note and repr(seen[0]) in note and "make the model" in note
    assert isinstance(model.blocks[0].kernel.get_raw_value(), mk.QTensor)


def test_arrays_of_another_checkpoint_are_not_taken_for_its_own(tmp_path):
    for step, value in enumerate((1.0, 2.0)):
        mp.save_checkpoint(tmp_path / "run", {"kernel": jnp.full((4, 4), value)}, step=step)
    shutil.rmtree(tmp_path / "run" / "0" / "arrays")
    shutil.copytree(tmp_path / "run" / "1" / "arrays", tmp_path / "run" / "0" / "arrays")
    weights = mp.open_weights(tmp_path / "run", step=0)
    with pytest.raises(mp.ModelFileError, match="the bytes of 'kernel' have changed since"):
        weights["kernel"].read()
