"""`mp.quantize`: which weights become int8, and that the same wrapped model applies them."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.core import FrozenDict, freeze

import mpjax as mp
import mpjax_kernels as mk
from tests.helpers import assert_trees_equal, dot_dtypes

INT8 = "int8_from_mixed_bfloat16"
X = jax.random.normal(jax.random.key(7), (2, 5, 8))


# Shapes of the scales of the layers that Linen and NNX give the same name.
SCALES = {
    "general/kernel": (1, 2, 4),
    "merge/kernel": (1, 1, 8),
    "einsum/kernel": (1, 2, 4),
    "attention/query/kernel": (1, 2, 4),
    "attention/key/kernel": (1, 2, 4),
    "attention/value/kernel": (1, 2, 4),
    "attention/out/kernel": (1, 1, 8),
}


class Zoo(nn.Module):
    """One of each layer that int8 reaches, and some that it does not."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Dense(8, name="dense")(x)
        x = nn.DenseGeneral((2, 4), name="general")(x)
        x = nn.DenseGeneral(8, axis=(-2, -1), name="merge")(x)
        x = nn.Einsum((8, 2, 4), "...k,khd->...hd", name="einsum")(x).reshape(x.shape)
        x = nn.MultiHeadDotProductAttention(2, name="attention")(x)
        x = nn.BatchNorm(use_running_average=not train, name="norm")(x)
        x = nn.Conv(8, (3,), name="conv")(x)
        return x + nn.Embed(5, 8, name="embed")(jnp.arange(x.shape[-2]))


@pytest.fixture(scope="module")
def zoo():
    model = mp.wrap(Zoo(), INT8)
    return model, jax.jit(model.init)(jax.random.key(0), X)


def leaf_kinds(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: isinstance(x, mk.QTensor))
    return {
        "/".join(str(k.key) for k in path): x.scale.shape if isinstance(x, mk.QTensor) else None
        for path, x in leaves
    }


def test_kernels_get_a_scale_per_output_channel_and_the_rest_is_untouched(zoo):
    model, variables = zoo
    quantized = mp.quantize(model, variables, jax.ShapeDtypeStruct(X.shape, X.dtype))
    kinds = {k: v for k, v in leaf_kinds(quantized["params"]).items() if v is not None}
    assert kinds == {
        "dense/kernel": (1, 8),
        "conv/kernel": (1, 1, 8),
        "embed/embedding": (5, 1),
        **SCALES,
    }
    assert_trees_equal(quantized["params"]["norm"], variables["params"]["norm"])
    assert quantized["batch_stats"] is variables["batch_stats"]
    kernel = quantized["params"]["dense"]["kernel"]
    w = np.asarray(variables["params"]["dense"]["kernel"])
    np.testing.assert_array_equal(kernel.scale, np.abs(w).max(0, keepdims=True) / np.float32(127))
    np.testing.assert_array_equal(kernel.values, np.round(w / kernel.scale))


def test_the_same_model_applies_them_in_int8(zoo):
    _, variables = zoo
    # A float table is looked up as it is, a stored one is rounded.
    model = mp.wrap(Zoo(), mp.DTypePolicyMap(INT8, {"embed": "mixed_bfloat16"}))
    quantized = mp.quantize(model, variables, X)
    products = dot_dtypes(model.apply, quantized, X)
    assert sorted(products) == [("bfloat16",) * 2] * 2 + [("int8",) * 2] * 8  # 2: the attention's
    # Quantizing when applied, or before, is the same arithmetic
    assert_trees_equal(jax.jit(model.apply)(quantized, X), jax.jit(model.apply)(variables, X))


def test_no_float_copy_of_a_quantized_weight_remains(zoo):
    model, variables = zoo
    quantized = mp.quantize(model, variables, X)
    owners = {id(x) for x in jax.tree.leaves(variables["params"])}
    kept = [x for x in jax.tree.leaves(quantized["params"]) if id(x) in owners]
    sizes = {k: v["kernel"].size for k, v in quantized["params"].items() if "kernel" in v}
    assert sum(x.size for x in kept) + sum(sizes.values()) > 0
    floats = sum(x.nbytes for x in jax.tree.leaves(quantized["params"]) if x.dtype != jnp.int8)
    scales = 9 * 4 * 8 + 4 * 5  # nine kernels of eight output channels, a table of five rows
    untouched = sum(
        x.nbytes
        for path, x in jax.tree_util.tree_leaves_with_path(variables["params"])
        if path[-1].key not in ("kernel", "embedding")
    )
    assert floats == scales + untouched
    assert model.apply(quantized, X).dtype == jnp.bfloat16


def test_int8_dense_is_exact_integer_arithmetic():
    model = mp.wrap(nn.Dense(6), "int8_from_float32")
    x = jax.random.normal(jax.random.key(0), (5, 33))
    variables = model.init(jax.random.key(1), x)
    bias = jnp.linspace(-1, 1, 6)
    variables = {"params": {**variables["params"], "bias": bias}}
    quantized = mp.quantize(model, variables, x)
    w = quantized["params"]["kernel"]
    x_scale = np.abs(x).max(1, keepdims=True) / np.float32(127)
    x_values = np.round(np.asarray(x) / x_scale).astype(np.int64)
    accumulated = x_values @ np.asarray(w.values, np.int64)
    expected = accumulated.astype(np.float32) * x_scale * np.asarray(w.scale) + bias
    # integers are exact; three float32 operations follow, which XLA may fuse
    np.testing.assert_allclose(model.apply(quantized, x), expected, rtol=4 * 2**-24, atol=1e-6)


def test_policy_map_chooses_the_layers(zoo):
    _, variables = zoo
    policy = mp.DTypePolicyMap("mixed_bfloat16", {"attention/.*": INT8, "dense": INT8})
    quantized = mp.quantize(mp.wrap(Zoo(), policy), variables, X)
    kinds = {k for k, v in leaf_kinds(quantized["params"]).items() if v is not None}
    assert kinds == {"dense/kernel"} | {
        f"attention/{name}/kernel" for name in ["query", "key", "value", "out"]
    }


def test_stacked_layers_keep_one_scale_per_layer_and_channel():
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return x + nn.Dense(4)(x), None

    class Stack(nn.Module):
        @nn.compact
        def __call__(self, x):
            cls = nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
            return cls(name="layers")(x, None)[0]

    model, x = mp.wrap(Stack(), INT8), jnp.ones((2, 4))
    variables = model.init(jax.random.key(0), x)
    quantized = mp.quantize(model, variables, x)
    kernel = quantized["params"]["layers"]["Dense_0"]["kernel"]
    assert kernel.shape == (3, 4, 4) and kernel.scale.shape == (3, 1, 4)
    np.testing.assert_array_equal(model.apply(quantized, x), model.apply(variables, x))
    other = nn.scan(Layer, variable_axes={"params": 1}, split_rngs={"params": True}, length=3)
    model = mp.wrap(other(), INT8)
    variables = model.init(jax.random.key(0), x, None)
    with pytest.raises(NotImplementedError, match=r"stored as \(4, 3, 4\).*\(4, 4\).*leading axes"):
        mp.quantize(model, variables, x, None)


def test_shared_and_jitted_layers():
    class Shared(nn.Module):
        def setup(self):
            self.layer = nn.jit(nn.Dense)(4)

        def __call__(self, x):
            return self.layer(self.layer(x))

    model, x = mp.wrap(Shared(), INT8), jnp.ones((2, 4))
    variables = model.init(jax.random.key(0), x)
    expected = model.apply(variables, x)  # fills nn.jit's cache before the trace of quantize
    quantized = mp.quantize(model, variables, x)
    assert isinstance(quantized["params"]["layer"]["kernel"], mk.QTensor)
    np.testing.assert_array_equal(model.apply(quantized, x), expected)


def test_frozen_dicts_partitioned_kernels_methods_and_keywords():
    class Net(nn.Module):
        def setup(self):
            init = nn.with_partitioning(nn.initializers.lecun_normal(), ("in", "out"))
            self.dense = nn.Dense(3, kernel_init=init)

        def encode(self, x, *, train):
            assert train is True  # still Python's, not traced
            return self.dense(x)

    model, x = mp.wrap(Net(), INT8), jnp.ones((2, 4))
    variables = freeze(model.init(jax.random.key(0), x, train=True, method="encode"))
    quantized = mp.quantize(model, variables, x, train=True, method="encode")
    assert isinstance(quantized, FrozenDict)
    boxed = quantized["params"]["dense"]["kernel"]
    assert isinstance(boxed, nn.Partitioned) and isinstance(boxed.value, mk.QTensor)
    assert boxed.names == ("in", "out")
    y = model.apply(quantized, x, train=True, method="encode")
    np.testing.assert_array_equal(y, model.apply(variables, x, train=True, method="encode"))


@pytest.mark.slow
@pytest.mark.parametrize("scanned", [False, True])
def test_weights_stored_the_other_way_round_give_the_same_outputs(scanned):
    """`mk.contiguous` changes how values lie; Flax would take them for those of another model."""

    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _=None):
            init = nn.initializers.lecun_normal()
            boxed = init if scanned else nn.with_partitioning(init, ("in", "out"))
            x = nn.Dense(8, kernel_init=boxed)(nn.gelu(nn.Dense(12)(x)))
            return nn.MultiHeadDotProductAttention(2)(x), None

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            axes = {"params": 0}
            layers = nn.scan(Layer, variable_axes=axes, split_rngs={"params": True}, length=3)
            return (layers if scanned else Layer)()(x)[0]

    model, x = mp.wrap(Net(), INT8), jax.random.normal(jax.random.key(1), (2, 3, 8))
    quantized = mp.quantize(model, model.init(jax.random.key(0), x), x)
    turned, changed = turn(quantized)
    assert changed == 6
    np.testing.assert_array_equal(model.apply(turned, x), model.apply(quantized, x))


def test_nnx_weights_stored_the_other_way_round_give_the_same_outputs():
    model, x = nnx.Linear(6, 10, rngs=nnx.Rngs(0)), jnp.ones((2, 6))
    mp.quantize(mp.wrap(model, INT8))
    expected = model(x)
    turned, changed = turn(nnx.state(model))
    assert changed == 1
    nnx.update(model, turned)
    assert model.kernel.get_raw_value().values.shape == (10, 6)
    np.testing.assert_array_equal(model(x), expected)


def turn(tree):
    """The tree with its QTensors stored with the entries that share a scale last; how many."""
    changed = []

    def each(leaf):
        if not isinstance(leaf, mk.QTensor):
            return leaf
        shared = [axis for axis, size in enumerate(leaf.scale.shape) if size == 1]
        changed.append(leaf)
        return mk.contiguous(leaf, axis=shared)

    return jax.tree.map(each, tree, is_leaf=lambda leaf: isinstance(leaf, mk.QTensor)), len(changed)


def test_a_layer_with_its_authors_own_product_stays_in_the_source_precision():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            own = nn.Dense(3, dot_general=jax.lax.dot_general, name="own")
            return nn.Dense(3, dtype=jnp.float32, name="wide")(own(nn.Dense(3, name="free")(x)))

    model, x = mp.wrap(Net(), INT8), jnp.ones((2, 4))
    variables = model.init(jax.random.key(0), x)
    with pytest.warns(UserWarning, match="1 weights of Net stay in .*\n  params/own/kernel: its"):
        quantized = mp.quantize(model, variables, x)
    assert dot_dtypes(model.apply, quantized, x) == [
        ("int8", "int8"),
        ("bfloat16", "bfloat16"),
        ("float32", "float32"),
    ]


def test_quantize_itself_can_be_traced(zoo):
    model, variables = zoo
    shapes = jax.eval_shape(lambda v: mp.quantize(model, v, X), variables)
    quantized = mp.quantize(model, variables, X)
    assert jax.tree.structure(shapes) == jax.tree.structure(quantized)
    assert [s.dtype for s in jax.tree.leaves(shapes)] == [
        x.dtype for x in jax.tree.leaves(quantized)
    ]


class NNXZoo(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(8, 8, rngs=rngs)
        self.general = nnx.LinearGeneral(8, (2, 4), rngs=rngs)
        self.merge = nnx.LinearGeneral((2, 4), 8, axis=(-2, -1), rngs=rngs)
        self.einsum = nnx.Einsum("...k,khd->...hd", (8, 2, 4), (2, 4), rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
        self.conv = nnx.Conv(8, 8, (3,), rngs=rngs)

    def __call__(self, x):
        x = self.merge(self.general(self.linear(x)))
        return self.conv(self.attention(self.einsum(x).reshape(x.shape)))


def test_nnx_kernels_are_replaced_in_place():
    model = mp.wrap(NNXZoo(nnx.Rngs(0)), INT8)
    before = model(X)
    assert mp.quantize(model) is model
    kernels = {
        "/".join(map(str, path)): v.get_raw_value().scale.shape
        for path, v in nnx.to_flat_state(nnx.state(model, nnx.Param))
        if isinstance(v.get_raw_value(), mk.QTensor)
    }
    assert kernels == {
        "linear/kernel": (1, 8),
        "conv/kernel": (1, 1, 8),
        **SCALES,
    }
    np.testing.assert_array_equal(np.asarray(model(X)), np.asarray(before))
    for copy in [nnx.clone(model), nnx.merge(*nnx.split(model))]:
        np.testing.assert_array_equal(np.asarray(nnx.jit(lambda m, x: m(x))(copy, X)), before)


def test_nnx_stacked_layers_keep_one_scale_per_layer_and_channel():
    class Stack(nnx.Module):
        def __init__(self, rngs):
            make = nnx.vmap(lambda rngs: nnx.Linear(4, 4, rngs=rngs), in_axes=0)
            self.layers = make(rngs.split(3))

        def __call__(self, x):
            run = nnx.scan(lambda m, x: m(x), in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
            return run(self.layers, x)

    model, x = mp.wrap(Stack(nnx.Rngs(0)), INT8), jnp.ones((2, 4), jnp.bfloat16)
    expected = model(x)
    mp.quantize(model)
    assert model.layers.kernel.get_raw_value().scale.shape == (3, 1, 4)
    np.testing.assert_array_equal(np.asarray(model(x)), np.asarray(expected))
