"""`mp.explain` on the CPU at hand: rows, reasons, totals, and what it says when it cannot."""

import importlib.util
import io
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import mpjax as mp
from mpjax import _compile_target
from mpjax._cli import main
from mpjax._compile_target import Compiled
from mpjax._explain import explanation_of
from mpjax_kernels import _native_weight
from mpjax_kernels._native_library import native_refusal
from tests.explain_helpers import missed, program, read_both_ways, reported
from tests.explain_models import EXPERTS, MODELS

INT8 = "int8_from_mixed_bfloat16"
ROWS, INPUTS, OUTPUTS = 32, 64, 128
X = jax.ShapeDtypeStruct((ROWS, INPUTS), jnp.float32)
FLOPS = 2 * ROWS * INPUTS * OUTPUTS


class Small(nn.Module):
    """One layer, then the user's own product with the layer's output."""

    @nn.compact
    def __call__(self, x, *, train: bool = True):
        y = nn.Dense(OUTPUTS, name="up")(x)
        return y if train else jnp.sum(y)


def small(policy=INT8, *, stored=False):
    """A wrapped model and its abstract variables."""
    model = mp.wrap(Small(), policy)
    variables = jax.eval_shape(model.init, jax.random.key(0), X)
    if stored:
        variables = jax.eval_shape(lambda v: mp.quantize(model, v, X), variables)
    return model, variables


def rows(fn, *args, **kwargs):
    """What identifies each row but its unit, which differs between CPUs."""
    found = mp.explain(fn, *args, **kwargs)
    return sorted((r.path, r.direction, r.lhs, r.rhs, r.reason) for r in found.products)


@pytest.mark.parametrize("name", MODELS)
def test_models_it_was_not_written_against_agree_with_their_program_and_with_a_count_by_hand(name):
    case = MODELS[name](INT8)
    found, directly = read_both_ways(case, None)
    assert sorted((row.lhs, row.rhs) for row in found.products) == directly
    # XLA:CPU multiplies all rows by every expert.
    others = case.others * (EXPERTS if name == "experts" else 1)
    assert found.flops == case.quantized + others
    assert found.share_in_8_bits == case.quantized / found.flops


def test_all_planted_misses_are_named_and_on_the_clean_model_none():
    planted = mp.explain(*program(INT8, "int4/128_from_mixed_bfloat16", planted=True))
    assert reported(planted) == missed() and len(planted.misses) == 5
    assert mp.explain(*program(INT8, INT8, planted=False)).misses == ()


def test_int8_training_leaves_the_backward_products_by_policy():
    model, variables = small()

    def loss(variables, x):
        return jnp.sum(model.apply(variables, x) ** 2)

    found = rows(jax.grad(loss), variables, X)
    backward = [row for row in found if row[1] == "backward"]
    assert ("up", "forward", "int8", "int8", "") in found
    assert [row[-1] for row in backward] == ["policy"]  # the input needs no gradient


def test_a_recomputed_forward_pass_says_so():
    model, variables = small()

    def loss(variables, x):
        y = jax.checkpoint(lambda v: model.apply(v, x))(variables)
        return jnp.sum(jnp.sin(y) ** 2)

    directions = {row[1] for row in rows(jax.grad(loss), variables, X)}
    assert directions <= {"forward", "backward", "recomputed"} and "backward" in directions


def test_weights_of_4_bits_lie_in_memory_as_floats_on_a_cpu_without_native_kernels(monkeypatch):
    monkeypatch.setattr(_native_weight, "native_refusal", lambda name, **_: f"no kernels of {name}")
    model, stored = small("int4/64_from_mixed_bfloat16", stored=True)
    (row,) = mp.explain(model.apply, stored, X).products
    # XLA:CPU multiplies them by many rows in bfloat16, which it makes of all of them first.
    assert (row.lhs, row.rhs, row.reason) == ("bfloat16", "bfloat16", "dequantized")
    assert row.dequantized_bytes == 2 * INPUTS * OUTPUTS


@pytest.mark.skipif(native_refusal("int4") is not None, reason="no native kernels of int4")
def test_native_kernels_read_weights_of_4_bits_as_they_lie():
    model, stored = small("int4/64_from_mixed_bfloat16", stored=True)
    (row,) = mp.explain(model.apply, stored, X).products
    assert (row.lhs, row.rhs, row.reason) == ("bfloat16", "int4", "weights")
    assert (row.unit, row.dequantized_bytes) == ("mpjax_weight_dot", 0)


def test_floats_under_a_policy_that_stores_weights_only_are_a_miss():
    model, floats = small("int4/64_from_mixed_bfloat16")
    assert {row[-1] for row in rows(model.apply, floats, X)} == {"unquantized"}


@pytest.mark.parametrize("dtype, reason", [(jnp.float32, "island"), (jnp.bfloat16, "author")])
def test_a_dtype_of_the_author_is_named_in_linen_and_nnx(dtype, reason):
    linen = mp.wrap(nn.Sequential([nn.Dense(OUTPUTS, dtype=dtype), nn.Dense(INPUTS)]), INT8)
    variables = jax.eval_shape(linen.init, jax.random.key(0), X)
    by_path = {row[0]: row[-1] for row in rows(linen.apply, variables, X)}
    assert by_path == {"layers_0": reason, "layers_1": ""}

    class Pair(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Linear(INPUTS, OUTPUTS, dtype=dtype, rngs=rngs)
            self.blocks = nnx.List([nnx.Linear(OUTPUTS, INPUTS, rngs=rngs)])

        def __call__(self, x):
            return self.blocks[0](self.first(x))

        def again(self, x):
            return self(x)

    model = nnx.eval_shape(lambda: mp.wrap(Pair(nnx.Rngs(0)), INT8))
    by_path = {row[0]: row[-1] for row in rows(model, X)}
    assert by_path == {"first": reason, "blocks/0": ""}
    assert rows(model.again, X) == rows(model, X)


def test_a_layer_in_a_scan_counts_as_often_as_it_runs():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return nn.Dense(INPUTS, name="dense")(x), None

    class Stack(nn.Module):
        @nn.compact
        def __call__(self, x):
            scanned = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True})
            return scanned.__call__(scanned(name="blocks"), x, jnp.zeros(5))[0]

    model = mp.wrap(Stack(), INT8)
    x = jax.ShapeDtypeStruct((ROWS, INPUTS), jnp.bfloat16)
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    stored = jax.eval_shape(lambda v: mp.quantize(model, v, x), variables)
    (row,) = mp.explain(model.apply, stored, x).products
    assert (row.path, row.times, row.reason) == ("blocks/dense", 5, "")
    assert row.flops == 5 * 2 * ROWS * INPUTS**2
    assert row.weight_bytes == 5 * INPUTS**2


def test_it_takes_a_jitted_function_and_flags_and_makes_nothing():
    model, variables = small(stored=True)
    jitted = jax.jit(lambda v, x, train: model.apply(v, x, train=train), static_argnums=2)
    expected = [("up", "forward", "int8", "int8", "")]
    assert rows(jitted, variables, X, False) == expected
    assert rows(model.apply, variables, X, train=False) == expected
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(variables))


def test_a_product_outside_of_all_modules_has_its_line():
    def product(x, y):
        return x @ y

    (row,) = mp.explain(product, X, jax.ShapeDtypeStruct((INPUTS, OUTPUTS), jnp.float32)).products
    assert row.reason == "outside" and row.path == "" and row.flops == FLOPS
    line = product.__code__.co_firstlineno + 1
    assert row.line == row.where == f"{__file__}:{line}"


FLOAT8 = mp.QuantizedFloat8DTypePolicy(  # its scales, of the weights too, are from calls before
    "float8", "mixed_bfloat16", amax_history_length=2
)


@pytest.mark.parametrize("policy", [INT8, FLOAT8, "float8/row_from_mixed_bfloat16"])
def test_float_weights_that_are_quantized_at_every_call_are_not_stored(policy):
    if policy != INT8 and native_refusal("float8_e4m3fn") is not None:
        pytest.skip("no native kernels of float8: XLA:CPU multiplies it as wider numbers")
    model, variables = small(policy)
    found = mp.explain(model.apply, variables, X)
    (row,) = found.products
    assert row.reason == "" and row.quantizes_weight
    found.assert_quantized()
    of = r"0\.0% of the operations are in 8 bits, by stored weights, on .*\n"
    with pytest.raises(AssertionError, match=f"(?s){of}.*up .* unquantized"):
        found.assert_quantized(stored=True)
    assert "1 products quantize a float weight at every call, as training does" in str(found)
    _, variables = small(policy, stored=True)
    found = mp.explain(model.apply, variables, X)
    (row,) = found.products
    assert not row.quantizes_weight and "quantize" not in str(found)
    mp.assert_quantized(model.apply, variables, X, stored=True)


def test_attention_has_no_weight_that_could_be_stored_in_it():
    policy = mp.QuantizedDTypePolicy("int8", "mixed_bfloat16", quantize_attention=True)
    model = mp.wrap(nn.MultiHeadDotProductAttention(2), policy)
    x = jax.ShapeDtypeStruct((1, 16, 32), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    variables = jax.eval_shape(lambda v: mp.quantize(model, v, x), variables)
    found = mp.explain(model.apply, variables, x)
    inside = [row for row in found.products if row.path == ""]
    assert len(found.products) == 6 and len(inside) == 2
    assert all(row.reason == "" and not row.quantizes_weight for row in inside)
    found.assert_quantized(1.0, stored=True)


# What libtpu says where another process has loaded it.
LOCKED = (
    "ABORTED: Internal error when accessing libtpu multi-process lockfile. "
    'Run "$ sudo rm /tmp/libtpu_lockfile".'
)


@pytest.fixture
def locked(monkeypatch):
    def refuse(*args, **kwargs):
        raise jax.errors.JaxRuntimeError(LOCKED)

    monkeypatch.setattr(_compile_target.topologies, "get_topology_desc", refuse)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    for name in (*_compile_target._NO_HOST, "LIBTPU_INIT_ARGS"):  # are restored afterwards
        monkeypatch.setenv(name, "1")


def test_the_lock_of_the_tpu_compiler_is_named_with_the_remedy(locked):
    match = r"'v6e', because another.*holds its lock, /tmp/libtpu_lockfile .*MULTIPLE_LIBTPU_LOAD=1"
    with pytest.raises(RuntimeError, match=match):
        mp.explain(lambda x: x, X, target="v6e")


def test_the_command_names_the_lock_too(locked, tmp_path, monkeypatch, capsys):
    (tmp_path / "locked_program.py").write_text("def program():\n    return abs, (1.0,)\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert main(["explain", "locked_program:program", "--target", "v6e"]) == 2
    assert "holds its lock, /tmp/libtpu_lockfile" in capsys.readouterr().err


CONVOLUTIONS = [
    {},
    {"padding": "VALID"},
    {"window_strides": (2, 3)},
    {"lhs_dilation": (2, 1), "padding": ((1, 2), (0, 1))},
    {"rhs_dilation": (1, 2), "window_strides": (2, 1)},
    {"feature_group_count": 2},
]


@pytest.mark.parametrize("options", CONVOLUTIONS, ids=str)
def test_operations_of_a_convolution_are_those_that_meet_the_image(options):
    image, window = (1, 9, 8, 4), (3, 2)
    options = {"window_strides": (1, 1), "padding": "SAME"} | options
    inputs = 4 // options.get("feature_group_count", 1)
    convolve = jax.jit(
        lambda x, w: jax.lax.conv_general_dilated(
            x, w, dimension_numbers=("NHWC", "HWIO", "NHWC"), **options
        )
    )
    x, w = jnp.ones(image), jnp.ones((*window, inputs, 6))
    # Of ones, the sum of the results is the number of multiplications that meet the image.
    expected = 2 * int(convolve(x, w).sum())
    assert mp.explain(convolve, x, w).flops == expected


def test_the_report_prints_and_serializes():
    model, variables = small(stored=True)
    found = mp.explain(model.apply, variables, X)
    text = str(found)
    assert text.splitlines()[0].split()[:3] == ["where", "pass", "operands"]
    assert "up" in text and "100.0% of" in text and "GFLOP in 8 bits; 0 missed" in text
    loaded = json.loads(found.to_json(indent=1))
    assert loaded["products"][0]["path"] == "up" and loaded["share_in_8_bits"] == 1.0
    assert loaded["flops"] == FLOPS
    rich = pytest.importorskip("rich.console")
    with io.StringIO() as screen:
        rich.Console(width=200, file=screen).print(found)
        assert "int8 x int8" in screen.getvalue()


def test_assert_quantized_shows_what_is_not():
    model, variables = small(stored=True)
    mp.assert_quantized(model.apply, variables, X)
    floats, variables = small("mixed_bfloat16")
    with pytest.raises(AssertionError, match=r"0\.0% of the operations are in 8 bits on .*\n") as e:
        mp.assert_quantized(floats.apply, variables, X, min_flops=0.5)
    assert "up" in str(e.value) and "policy" in str(e.value)
    mp.assert_quantized(floats.apply, variables, X, min_flops=0.0)
    for wrong in (95, "0.9", float("nan")):
        with pytest.raises(ValueError, match=f"`min_flops` = {wrong!r} must be a number from 0 to"):
            mp.assert_quantized(floats.apply, variables, X, min_flops=wrong)
    with pytest.raises(AssertionError, match="multiplies nothing, in 8 bits or otherwise: is it"):
        mp.assert_quantized(lambda x: x + 1, X)
    mp.assert_quantized(lambda x: x + 1, X, min_flops=0)


@pytest.mark.parametrize("target, extra", [("v6e", "tpu"), ("h200", "cuda-compile")])
def test_a_compiler_that_is_not_installed_is_named_with_its_extra(monkeypatch, target, extra):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=rf"pip install 'mpjax\[{extra}\]'"):
        mp.explain(jnp.dot, X, X, target=target)


def test_a_target_without_a_compiler_and_an_unknown_one():
    with pytest.raises(NotImplementedError, match="no compiler here for target 'mi300'"):
        mp.explain(jnp.dot, X, X, target="mi300")
    with pytest.raises(ValueError, match="`target` is 'v99'"):
        mp.explain(jnp.dot, X, X, target="v99")


def test_what_is_no_function():
    model, _ = small()
    with pytest.raises(TypeError, match=r"call mp.explain\(model.apply, variables, x\)"):
        mp.explain(model, X)
    with pytest.raises(TypeError, match="`fn` must be a function, but got 3 of type int"):
        mp.explain(3, X)


def test_every_reason_is_explained():
    assert all(mp.REASONS[reason] for reason in ("", "policy", "unmatched", "island", "author"))


def test_arrays_that_are_split_over_devices_are_refused_by_name():
    mesh = jax.make_mesh((8,), ("data",))
    split, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("data",), ()))
    x = jax.ShapeDtypeStruct((64, INPUTS), jnp.float32, sharding=split)
    w = jax.device_put(jnp.ones((INPUTS, OUTPUTS)), whole)
    message = r"`{}` of shape \(64, 64\) is split over 8 devices, but a program is compiled for one"
    with pytest.raises(NotImplementedError, match=message.format(r"args\[0\]")):
        mp.explain(jnp.dot, x, w)
    with pytest.raises(NotImplementedError, match=message.format(r"kwargs\['x'\]\['a'\]")):
        mp.explain(lambda x, w: x["a"] @ w, x={"a": x}, w=w)
    # One that every device has as a whole is the same on one of them.
    (row,) = mp.explain(jnp.dot, jax.ShapeDtypeStruct(x.shape, x.dtype), w).products
    assert row.flops == 2 * 64 * INPUTS * OUTPUTS


def test_what_jax_says_of_a_mesh_in_the_function_has_a_remedy_added():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))

    def constrained(x):
        split = NamedSharding(mesh, PartitionSpec("data"))
        return jax.lax.with_sharding_constraint(x @ x, split)

    x = jax.ShapeDtypeStruct((64, 64), jnp.float32)
    with pytest.raises(ValueError, match="incompatible devices") as raised:
        mp.explain(constrained, x)
    assert any("compiled for one device, without a mesh" in n for n in raised.value.__notes__)
    with pytest.raises(ValueError, match="unrelated") as raised:
        mp.explain(unrelated, x)
    assert not any("without a mesh" in n for n in getattr(raised.value, "__notes__", ()))


# Two products of 8 x 16 x 32, one of int8 and one of bfloat16.
HALF = """HloModule half

ENTRY %main (a: s8[8,16], b: s8[16,32], c: bf16[8,16], d: bf16[16,32]) -> (s32[8,32], f32[8,32]) {
  %a = s8[8,16]{1,0} parameter(0)
  %b = s8[16,32]{1,0} parameter(1)
  %c = bf16[8,16]{1,0} parameter(2)
  %d = bf16[16,32]{1,0} parameter(3)
  %int8 = s32[8,32]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %wide = f32[8,32]{1,0} dot(%c, %d), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %both = (s32[8,32]{1,0}, f32[8,32]{1,0}) tuple(%int8, %wide)
}
"""


def read(text, target):
    """What is read of a program if it was compiled for a target."""
    return explanation_of(Compiled(mp.resolve_target(target), 1, text, None, {}))


def half(target):
    return read(HALF, target)


def test_what_is_asked_for_is_compared_with_the_exact_part():
    found = half("v6e")
    assert found.share_in_8_bits == 0.5
    found.assert_quantized(0.5)
    with pytest.raises(AssertionError, match=r"50\.0% of the operations are in 8 bits on v6e"):
        found.assert_quantized(0.500001)
    with pytest.raises(ValueError, match="`min_flops` = -1 must be a number from 0 to 1"):
        found.assert_quantized(-1)


def test_8_bits_that_the_target_does_not_multiply_are_emulated():
    reasons = {target: [row.reason for row in half(target).products] for target in ("v6e", "tpu7x")}
    assert reasons == {"v6e": ["", "outside"], "tpu7x": ["emulated", "outside"]}
    assert half("tpu7x").share_in_8_bits == 0.0


TILED = """HloModule tiled

ENTRY %main (a: bf16[8,100], b: bf16[100,200]) -> f32[8,200] {
  %a = bf16[8,100]{1,0:T(8,128)(2,1)} parameter(0)
  %b = bf16[100,200]{1,0:T(8,128)(2,1)} parameter(1)
  ROOT %y = f32[8,200]{1,0:T(8,128)} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
"""


def test_tiles_are_read_as_a_whole():
    found = read(TILED, "v6e")
    (row,) = found.products
    values, tiles = 2 * (8 * 100 + 100 * 200), 2 * (8 * 128 + 104 * 256)
    assert (row.weight_bytes, row.padding_bytes) == (tiles, tiles - values)
    assert (found.bytes_read, found.bytes_written) == (tiles, 4 * 8 * 256)


LOOP = """HloModule loop

%body (s: (s32[], f32[8,16])) -> (s32[], f32[8,16]) {
  %s = (s32[], f32[8,16]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %x = f32[8,16]{1,0} get-tuple-element(%s), index=1
  %y = f32[8,16]{1,0} negate(%x)
  ROOT %next = (s32[], f32[8,16]{1,0}) tuple(%i, %y)
}

%condition (t: (s32[], f32[8,16])) -> pred[] {
  %t = (s32[], f32[8,16]{1,0}) parameter(0)
  ROOT %always = pred[] constant(true)
}

ENTRY %main (u: (s32[], f32[8,16])) -> (s32[], f32[8,16]) {
  %u = (s32[], f32[8,16]{1,0}) parameter(0)
  ROOT %loop = (s32[], f32[8,16]{1,0}) while(%u), condition=%condition, body=%body, KNOWN
}
"""


def test_the_bytes_of_a_loop_are_those_of_all_its_turns():
    known = 'backend_config={"known_trip_count":{"n":"5"}}'
    found = read(LOOP.replace("KNOWN", known), "v6e")
    assert (found.bytes_read, found.bytes_written) == (5 * 512, 5 * 512)
    assert found.unknown_loops == 0
    once = read(LOOP.replace(", KNOWN", ""), "v6e")
    assert (once.bytes_read, once.unknown_loops) == (512, 1)


def unrelated(x):
    raise ValueError("unrelated")
