"""Layers that quantize in Linen and NNX alike: stacked, mapped, grouped, of several axes."""

import importlib
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import mpjax as mp
import mpjax_kernels as mk
from tests.helpers import assert_trees_equal

KEY = jax.random.key(0)
X = np.asarray(jax.random.normal(KEY, (3, 128)))


def weights_of(module):
    """The quantized weights of an NNX module, by path."""
    leaves = nnx.to_flat_state(nnx.state(module, nnx.Param))
    found = {"/".join(map(str, path)): leaf.get_raw_value() for path, leaf in leaves}
    return {path: w for path, w in found.items() if isinstance(w, mk.QTensor)}


# -- stacks


class Block(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.LayerNorm(128, rngs=rngs)
        self.up, self.down = nnx.Linear(128, 256, rngs=rngs), nnx.Linear(256, 128, rngs=rngs)

    def __call__(self, x):
        return x + self.down(nnx.relu(self.up(self.norm(x))))


class Stack(nnx.Module):
    """Two blocks, one after the other in a list, or stacked along a leading axis."""

    def __init__(self, how, rngs):
        self.how = how
        if how in ("unrolled", "remat"):
            self.blocks = nnx.List([Block(rngs) for _ in range(2)])
        else:
            self.blocks = nnx.vmap(lambda rngs: Block(rngs), in_axes=0)(rngs.split(2))

    def __call__(self, x):
        def call(block, x):
            return block(x)

        call = nnx.remat(call) if "remat" in self.how else call
        blocks: Any = self.blocks
        if self.how in ("unrolled", "remat"):
            for block in blocks:
                x = call(block, x)
            return x
        return nnx.scan(call, in_axes=(0, nnx.Carry), out_axes=nnx.Carry)(blocks, x)


@pytest.mark.parametrize("mode", ["int8", pytest.param("int4/64", marks=pytest.mark.slow)])
def test_nnx_scanned_rematerialized_and_unrolled_blocks_quantize_to_equal_outputs(mode):
    policy = f"{mode}_from_float32"
    single = Stack("unrolled", nnx.Rngs(0))
    state = nnx.as_pure(nnx.state(single))["blocks"]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), state[0], state[1])
    run = nnx.jit(lambda model, x: model(x))
    expected = run(mp.quantize(mp.wrap(single, policy)), X)
    scales = {"int8": (1, 256), "int4/64": (2, 256)}[mode]
    for how in ("remat", "scan", "scan and remat"):
        model = Stack(how, nnx.Rngs(1))
        nnx.update(model, {"blocks": state if how == "remat" else stacked})
        model, report = mp.quantize(mp.wrap(model, policy), return_report=True)
        assert len(report.quantized) == (4 if how == "remat" else 2) and not report.left
        if how != "remat":
            assert model.blocks.up.kernel.get_raw_value().scale.shape == (2, *scales)
        np.testing.assert_array_equal(run(model, X), expected)


def test_linen_rematerialized_and_unrolled_blocks_quantize_to_equal_variables():
    class LinenBlock(nn.Module):
        @nn.compact
        def __call__(self, x):
            return x + nn.Dense(128, name="down")(nn.relu(nn.Dense(256, name="up")(x)))

    class LinenStack(nn.Module):
        remat: bool

        @nn.compact
        def __call__(self, x):
            block = nn.remat(LinenBlock) if self.remat else LinenBlock
            for i in range(2):
                x = block(name=f"block_{i}")(x)
            return x

    model, again = (mp.wrap(LinenStack(remat), "int8_from_float32") for remat in (False, True))
    variables = model.init(KEY, X)
    expected = mp.quantize(model, variables, X)
    quantized = mp.quantize(again, variables, X)
    assert_trees_equal(quantized, expected)
    y = jax.jit(model.apply)(expected, X)
    np.testing.assert_array_equal(jax.jit(again.apply)(quantized, X), y)


def test_vmapped_layers_have_a_scale_per_layer():
    class Experts(nn.Module):
        @nn.compact
        def __call__(self, x):
            experts = nn.vmap(
                nn.Dense, variable_axes={"params": 0}, split_rngs={"params": True}, axis_size=3
            )
            return experts(64, name="experts")(x)

    class ExpertsNNX(nnx.Module):
        def __init__(self, rngs):
            make = nnx.vmap(lambda rngs: nnx.Linear(128, 64, rngs=rngs), in_axes=0)
            self.experts = make(rngs.split(3))

        def __call__(self, x):
            return nnx.vmap(lambda m, x: m(x))(self.experts, x)

    x = np.stack([X, 2 * X, -X])
    model = mp.wrap(Experts(), "int8_from_float32")
    variables = model.init(KEY, x)
    quantized = mp.quantize(model, variables, x)
    kernel = quantized["params"]["experts"]["kernel"]
    assert kernel.shape == (3, 128, 64) and kernel.scale.shape == (3, 1, 64)
    y = jax.jit(model.apply)(quantized, x)
    alone = mp.wrap(nn.Dense(64), "int8_from_float32")
    for i in range(3):
        one = jax.tree.map(lambda w, i=i: w[i], variables["params"]["experts"])
        one = mp.quantize(alone, {"params": one}, x[i])
        np.testing.assert_array_equal(alone.apply(one, x[i]), y[i])
    experts = ExpertsNNX(nnx.Rngs(0))
    nnx.update(experts, variables["params"])
    experts = mp.quantize(mp.wrap(experts, "int8_from_float32"))
    assert_trees_equal(experts.experts.kernel.get_raw_value(), kernel)
    np.testing.assert_array_equal(nnx.jit(lambda m, x: m(x))(experts, x), y)


# -- convolutions with groups, dense layers of several axes, attention


@pytest.mark.parametrize("groups", [2, 4])
@pytest.mark.parametrize("mode", ["int8", pytest.param("float8/row", marks=pytest.mark.slow)])
def test_grouped_and_depthwise_convolutions_are_the_same_in_nnx(mode, groups):
    policy = f"{mode}_from_float32"
    x = np.asarray(jax.random.normal(KEY, (2, 6, 5, 4)))
    model = mp.wrap(nn.Conv(8, (3, 2), feature_group_count=groups), policy)
    variables = model.init(KEY, x)
    quantized = mp.quantize(model, variables, x)
    kernel = quantized["params"]["kernel"]
    assert kernel.shape == (3, 2, 4 // groups, 8) and kernel.scale.shape == (1, 1, 1, 8)
    layer = nnx.Conv(4, 8, (3, 2), feature_group_count=groups, rngs=nnx.Rngs(0))
    layer.kernel[...] = variables["params"]["kernel"]
    layer = mp.quantize(mp.wrap(layer, policy))
    assert_trees_equal(layer.kernel.get_raw_value(), kernel)
    y = jax.jit(model.apply)(quantized, x)
    np.testing.assert_array_equal(nnx.jit(lambda m, x: m(x))(layer, x), y)
    # By the operands that are multiplied, in float32.
    operand = mk.dequantize(mk.quantize(x, kernel.format.name, axis=(1, 2, 3)))
    plain = nn.Conv(8, (3, 2), feature_group_count=groups)
    exact = {"kernel": mk.dequantize(kernel), "bias": variables["params"]["bias"]}
    np.testing.assert_allclose(y, plain.apply({"params": exact}, operand), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["int8", "int4/64"])
def test_a_dense_layer_that_contracts_several_axes(mode):
    policy = f"{mode}_from_float32"
    x = np.asarray(jax.random.normal(KEY, (3, 4, 32)))
    model = mp.wrap(nn.DenseGeneral((2, 8), axis=(-2, -1)), policy)
    variables = model.init(KEY, x)
    quantized = mp.quantize(model, variables, x)
    kernel = quantized["params"]["kernel"]
    # 64 neighbours of the 128 inputs are two of the four rows.
    scales = {"int8": (1, 1, 2, 8), "int4/64": (2, 1, 2, 8)}[mode]
    assert kernel.shape == (4, 32, 2, 8) and kernel.scale.shape == scales
    layer = nnx.LinearGeneral((4, 32), (2, 8), axis=(-2, -1), rngs=nnx.Rngs(0))
    layer.kernel[...] = variables["params"]["kernel"]
    layer = mp.quantize(mp.wrap(layer, policy))
    assert_trees_equal(layer.kernel.get_raw_value(), kernel)
    y = jax.jit(model.apply)(quantized, x)
    np.testing.assert_array_equal(nnx.jit(lambda m, x: m(x))(layer, x), y)
    operand = mk.dequantize(mk.quantize(x, "int8", axis=(1, 2))) if mode == "int8" else x
    exact = np.einsum("bij,ijhd->bhd", operand, np.asarray(mk.dequantize(kernel)))
    np.testing.assert_allclose(y, exact, rtol=1e-4, atol=1e-5)


def test_attention_projections_in_int4_with_zero_points():
    policy = mp.QuantizedDTypePolicy("int4/64", "float32", symmetric=False)
    x = np.asarray(jax.random.normal(KEY, (2, 5, 128)))
    plain = nn.MultiHeadDotProductAttention(2)
    model = mp.wrap(plain, policy)
    variables = plain.init(KEY, x)
    # Weights that are not balanced around zero, which zero points are for.
    variables = jax.tree.map(lambda w: w + 0.05 if w.ndim > 2 else w, variables)
    quantized, report = mp.quantize(model, variables, x, return_report=True)
    assert sorted(each.path for each in report.quantized) == [
        f"params/{name}/kernel" for name in ("key", "out", "query", "value")
    ]
    exact = jax.tree.map(
        lambda w: mk.dequantize(w) if isinstance(w, mk.QTensor) else w,
        quantized,
        is_leaf=lambda w: isinstance(w, mk.QTensor),
    )
    for name in ("query", "key", "value", "out"):
        kernel = quantized["params"][name]["kernel"]
        assert kernel.format.name == "int4" and kernel.zero_point.shape == kernel.scale.shape
        assert kernel.scale.shape == ((2, 1, 128) if name == "out" else (2, 2, 64))
    y = jax.jit(model.apply)(quantized, x)
    np.testing.assert_allclose(y, plain.apply(exact, x), rtol=1e-4, atol=1e-4)
    attention = nnx.MultiHeadAttention(2, 128, decode=False, rngs=nnx.Rngs(0))
    nnx.update(attention, variables["params"])
    attention = mp.quantize(mp.wrap(attention, policy))
    found = weights_of(attention)
    assert len(found) == 4
    for path, weight in found.items():
        assert_trees_equal(weight, quantized["params"][path.split("/")[0]]["kernel"])
    again = nnx.jit(lambda m, x: m(x))(attention, x)
    np.testing.assert_allclose(again, y, rtol=1e-5, atol=1e-5)


# -- how many bytes are left


@pytest.fixture
def module(monkeypatch):
    """Imports a file of the examples by its name, as the scripts beside it do."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "examples"))
    return importlib.import_module


@pytest.mark.parametrize(("mode", "most"), [("int8", 0.30), ("int4/128", 0.20)])
@pytest.mark.parametrize("which", ["demo", "encoder"])
def test_bytes_of_the_whole_tree_without_making_it(module, which, mode, most):
    """Embeddings, norms and biases included; by shapes alone, for no weight is needed."""
    if which == "demo":
        model, x = module("byte_lm_models").ByteLM(), [jax.ShapeDtypeStruct((1, 128), jnp.int32)]
    else:
        bert = module("bert")
        model = bert.SentenceEncoder(bert.Shape())
        x = [jax.ShapeDtypeStruct((1, 16), dtype) for dtype in (jnp.int32, jnp.bool)]
    model = mp.wrap(model, f"{mode}_from_float32")
    shapes = jax.eval_shape(model.init, KEY, *x)
    quantized = jax.eval_shape(lambda v: mp.quantize(model, v, *x), shapes)

    def size(tree):
        leaves = jax.tree.leaves(tree, is_leaf=lambda w: isinstance(w, mk.QTensor))
        return sum(
            w.nbytes if isinstance(w, mk.QTensor) else w.size * w.dtype.itemsize for w in leaves
        )

    assert 0.12 < size(quantized) / size(shapes) <= most
