"""`mp.wrap` on NNX modules: in place, without a copy, and off again without a trace."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import mpjax as mp
from examples.byte_lm_models import ByteLMNNX, Shape
from tests.helpers import assert_trees_equal, dot_dtypes, equations

TINY = Shape(context=8, width=16, depth=4, heads=2)
TOKENS = jnp.arange(16).reshape(2, 8) * 7 % 256
HALF = ("bfloat16", "bfloat16")


class Own(nnx.Module):
    """Parameters of its own, bare and in a list, beside a Linear and a norm."""

    def __init__(self, rngs: nnx.Rngs):
        self.w = nnx.Param(jnp.eye(3) + 1 / 3)
        self.more = nnx.List([nnx.Param(jnp.eye(3) / 3)])
        self.linear = nnx.Linear(3, 3, rngs=rngs)
        self.norm = nnx.LayerNorm(3, rngs=rngs)

    def __call__(self, x):
        return self.norm(self.linear(x @ self.w + x @ self.more[0][...]))

    def encode(self, x):
        return x @ self.w[...]

    def penalty(self):
        return jnp.sum(self.w[...] ** 2)


@pytest.fixture
def own():
    return Own(nnx.Rngs(0))


X = jnp.linspace(0, 1, 6).reshape(2, 3)


def model_loss(model, *args):
    return model(*args).astype(jnp.float32).mean()


def test_wrap_is_in_place_without_copying_a_weight(own):
    weights = {id(v.get_raw_value()) for _, v in nnx.to_flat_state(nnx.state(own))}
    variables = {path: id(v) for path, v in nnx.iter_graph(own) if isinstance(v, nnx.Variable)}
    assert mp.wrap(own, "mixed_bfloat16") is own
    assert {id(v.get_raw_value()) for _, v in nnx.to_flat_state(nnx.state(own))} == weights
    assert {p: id(v) for p, v in nnx.iter_graph(own) if isinstance(v, nnx.Variable)} == variables
    assert isinstance(own, Own) and type(own).__name__ == "Own"
    assert own.policy == mp.DTypePolicy("mixed_bfloat16")


def test_state_of_flaxs_own_layers_has_the_same_treedef():
    model = ByteLMNNX(TINY, rngs=nnx.Rngs(0))
    before = nnx.state(model)
    assert_trees_equal(nnx.state(mp.wrap(model, "mixed_bfloat16")), before)


def test_a_state_saved_before_wrapping_loads_after_it(own):
    saved = jax.tree.map(lambda x: x + 1, nnx.state(own))
    mp.wrap(own, "mixed_bfloat16")
    pure = nnx.to_pure_dict(nnx.state(own))
    assert_trees_equal(pure["w"], jnp.eye(3) + 1 / 3)
    nnx.update(own, saved)
    assert_trees_equal(own.w.get_raw_value(), jnp.eye(3) + 1 / 3 + 1)
    assert own(X).dtype == jnp.bfloat16  # the policy outlives the update


def test_unwrap_restores_the_module_exactly(own):
    graphdef, state = nnx.split(own)
    expected = own(X)
    mp.wrap(own, "mixed_bfloat16")
    assert own(X).dtype == jnp.bfloat16
    assert mp.unwrap(own) is own
    assert nnx.graphdef(own) == graphdef
    assert_trees_equal(nnx.state(own), state)
    assert_trees_equal(own(X), expected)
    with pytest.raises(ValueError, match=r"Own is not wrapped"):
        mp.unwrap(own)


def test_wrapping_again_replaces_the_policy(own):
    mp.wrap(mp.wrap(own, "mixed_float16"), "mixed_bfloat16")
    assert own(X).dtype == jnp.bfloat16 and own.policy.name == "mixed_bfloat16"
    assert type(own).__mro__[1] is Own


def test_clones_and_other_instances_are_unaffected(own):
    clone, other = nnx.clone(own), Own(nnx.Rngs(0))
    mp.wrap(own, "mixed_bfloat16")
    assert clone(X).dtype == other(X).dtype == jnp.float32
    assert nnx.clone(own)(X).dtype == nnx.merge(*nnx.split(own))(X).dtype == jnp.bfloat16


def test_float32_policy_is_bit_identical_in_outputs_and_gradients():
    plain, wrapped = (ByteLMNNX(TINY, rngs=nnx.Rngs(0)) for _ in range(2))
    mp.wrap(wrapped, "float32")
    grad = nnx.jit(nnx.value_and_grad(model_loss))
    assert_trees_equal(grad(wrapped, TOKENS), grad(plain, TOKENS))


@pytest.mark.parametrize("half", ["bfloat16", "float16"])
def test_every_product_of_a_training_step_has_half_precision_operands(half):
    model = mp.wrap(ByteLMNNX(TINY, rngs=nnx.Rngs(0)), f"mixed_{half}")
    graphdef, state = nnx.split(model)

    def loss(state):
        return model_loss(nnx.merge(graphdef, state), TOKENS)

    products = dot_dtypes(jax.grad(loss), state)
    assert len(products) == 3 * (4 * 8 + 1)
    assert set(products) == {(half, half)}
    reductions = {"reduce_sum", "reduce_max", "exp"}
    found = [
        e for e in equations(jax.make_jaxpr(loss)(state).jaxpr) if e.primitive.name in reductions
    ]
    assert len(found) == 4 * 3 + 2 * 9 + 1  # softmaxes, norms, the loss
    assert {e.invars[0].aval.dtype.name for e in found} == {"float32"}


def test_own_parameters_are_cast_inside_a_wrapped_call_only(own):
    mp.wrap(own, "mixed_bfloat16")
    assert own.w[...].dtype == jnp.float32
    assert set(dot_dtypes(own, X)) == {HALF}
    assert own.encode(X).dtype == jnp.bfloat16 and own.w[...].dtype == jnp.float32
    assert own.penalty().dtype == jnp.bfloat16  # a method of the model is a wrapped call


def test_training_keeps_master_weights_gradients_and_moments_in_float32(own):
    mp.wrap(own, "mixed_bfloat16")
    optimizer = nnx.Optimizer(own, optax.adamw(1e-3), wrt=nnx.Param)
    traces = []

    @nnx.jit
    def step(model, optimizer, x):
        traces.append(1)
        loss, grads = nnx.value_and_grad(model_loss)(model, x)
        optimizer.update(model, grads)
        return grads

    before = np.asarray(own.w[...])
    for _ in range(3):
        grads = step(own, optimizer, X)
    assert len(traces) == 1
    assert {g.dtype.name for g in jax.tree.leaves(grads)} == {"float32"}
    floats = [
        x for x in jax.tree.leaves(nnx.state(optimizer)) if jnp.issubdtype(x.dtype, jnp.floating)
    ]
    assert {x.dtype.name for x in floats} == {"float32"} and len(floats) == 2 * 6
    change = np.abs(np.asarray(own.w[...]) - before)
    assert 0 < change.max() < 1e-2  # below bfloat16's step at 1.33: the master copy moved


def test_a_layer_whose_author_set_dtype_keeps_it():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.embed = nnx.Embed(5, 3, rngs=rngs)
            self.body = nnx.Linear(3, 3, rngs=rngs)
            self.head = nnx.Linear(3, 2, dtype=jnp.float32, rngs=rngs)

        def __call__(self, ids):
            return self.head(self.body(self.embed(ids)))

    model = mp.wrap(Net(nnx.Rngs(0)), "mixed_bfloat16")
    assert dot_dtypes(model, jnp.arange(4)) == [HALF, ("float32", "float32")]
    assert {path: p.name for path, p in mp.layer_policies(model).items()} == {
        "embed": "mixed_bfloat16",
        "body": "mixed_bfloat16",
        "head": "float32",
    }


def test_a_model_whose_author_set_every_dtype_gets_a_warning():
    with pytest.warns(UserWarning, match=r"policy of Sequential changes nothing.*'layers/0'"):
        layer = nnx.Linear(2, 2, dtype=jnp.float32, rngs=nnx.Rngs(0))
        mp.wrap(nnx.Sequential(layer), "mixed_bfloat16")


def test_nested_wrap_keeps_its_own_policy():
    model = nnx.Sequential(nnx.Linear(3, 3, rngs=nnx.Rngs(0)), Own(nnx.Rngs(1)))
    mp.wrap(model.layers[1], "float32")
    mp.wrap(model, "mixed_bfloat16")
    assert dot_dtypes(model, X) == [HALF] + [("float32", "float32")] * 3
    mp.unwrap(model)
    assert model.layers[1].policy.name == "float32"
    assert set(dot_dtypes(model, X)) == {("float32", "float32")}


def test_a_policy_attribute_of_the_users_own_is_left_alone():
    class Agent(nnx.Module):
        def __init__(self, rngs):
            self.policy = nnx.Linear(3, 2, rngs=rngs)

        def __call__(self, x):
            return self.policy(x)

    assert mp.wrap(Agent(nnx.Rngs(0)), "mixed_bfloat16")(X).dtype == jnp.bfloat16


def test_scan_vmap_and_remat():
    class Block(nnx.Module):
        def __init__(self, rngs):
            self.linear = nnx.Linear(3, 3, rngs=rngs)
            self.gain = nnx.Param(jnp.ones(3))

        def __call__(self, x):
            return x + self.linear(x) * self.gain[...]

    class Stack(nnx.Module):
        def __init__(self, rngs):
            make = nnx.vmap(lambda rngs: Block(rngs), in_axes=0)
            self.blocks = make(rngs.split(4))

        def __call__(self, x):
            @nnx.remat
            def call(block, x):
                return block(x)

            @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
            def run(block, x):
                return call(block, x)

            return run(self.blocks, x)

    plain = Stack(nnx.Rngs(0))
    expected = plain(X)
    model = mp.wrap(plain, "mixed_bfloat16")
    assert model(X).dtype == jnp.bfloat16
    assert set(dot_dtypes(nnx.jit(model_loss), model, X)) == {HALF}
    # 4 blocks in bfloat16: each output rounded, relative 2**-9, and a few roundings inside
    np.testing.assert_allclose(model(X), expected, rtol=4 * 4 * 2**-9, atol=4 * 4 * 2**-9)
    grads = nnx.grad(model_loss)(model, X)
    assert {g.dtype.name for g in jax.tree.leaves(grads)} == {"float32"}


@pytest.mark.parametrize("cell", [nnx.LSTMCell, nnx.OptimizedLSTMCell, nnx.GRUCell, nnx.SimpleCell])
def test_recurrent_carry_and_output_are_in_the_compute_dtype(cell):
    # SimpleCell's default is dtype=float32, which is indistinguishable from an author's choice
    cell = cell(3, 4, dtype=None, rngs=nnx.Rngs(0))
    rnn = mp.wrap(nnx.RNN(cell, return_carry=True), "mixed_bfloat16")
    carry, y = rnn(jnp.ones((2, 5, 3)))
    assert {c.dtype.name for c in jax.tree.leaves((carry, y))} == {"bfloat16"}


def test_batch_norm_statistics_stay_float32():
    model = mp.wrap(nnx.BatchNorm(3, momentum=0.5, rngs=nnx.Rngs(0)), "mixed_bfloat16")
    x = jax.random.normal(jax.random.key(1), (64, 3))
    assert model(x, use_running_average=False).dtype == jnp.bfloat16
    h = np.asarray(x.astype(jnp.bfloat16), np.float32)
    assert model.mean[...].dtype == jnp.float32
    np.testing.assert_allclose(model.mean[...], 0.5 * h.mean(0), atol=64 * 2**-24)


@pytest.mark.parametrize("cache_from", ["before", "after"])
def test_decoding_keeps_the_dtype_of_the_cache(cache_from):
    attention = nnx.MultiHeadAttention(2, 4, decode=True, rngs=nnx.Rngs(0))
    if cache_from == "before":
        attention.init_cache((1, 6, 4))
    mp.wrap(attention, "mixed_bfloat16")
    if cache_from == "after":
        attention.init_cache((1, 6, 4))
    step = nnx.jit(lambda model, x: model(x))
    for _ in range(3):
        y = step(attention, jnp.ones((1, 1, 4)))
    assert y.dtype == jnp.bfloat16
    assert attention.cached_key is not None and attention.cache_index is not None
    assert attention.cached_key.get_raw_value().dtype == jnp.float32
    assert attention.cache_index[...] == 3
    assert float(jnp.abs(attention.cached_key[...][0, :3]).min()) > 0
    assert float(jnp.abs(attention.cached_key[...][0, 3:]).max()) == 0


def test_attention_variants_match_flax():
    q, kv = jax.random.normal(jax.random.key(0), (2, 5, 8)), None
    for options in [{"is_causal": True}, {"mask": jnp.tril(jnp.ones((2, 1, 5, 5), bool))}, {}]:
        plain = nnx.MultiHeadAttention(4, 8, num_kv_heads=2, decode=False, rngs=nnx.Rngs(0))
        expected = plain(q, kv, **options)
        half = mp.wrap(plain, "mixed_bfloat16")
        # projections, scores, weights, values and output are each rounded to 8 bits
        np.testing.assert_allclose(half(q, kv, **options), expected, atol=6 * 2**-8)


def test_output_dtype_follows_the_policy(own):
    policy = "params=float32,compute=bfloat16,output=float32"
    assert mp.wrap(own, policy)(X).dtype == jnp.float32
    assert set(dot_dtypes(own, X)) == {HALF}


def test_jit_compiles_once_over_calls_and_spellings():
    traces = []

    @nnx.jit
    def apply(model, x):
        traces.append(1)
        return model(x)

    spellings = ["mixed_bfloat16", mp.DTypePolicy("mixed_bfloat16"), "params=float32,compute=bf16"]
    for i in range(100):
        apply(mp.wrap(Own(nnx.Rngs(0)), spellings[i % 3]), X)
    assert len(traces) == 1
    apply(mp.wrap(Own(nnx.Rngs(0)), "float32"), X)
    assert len(traces) == 2


def test_a_function_jitted_inside_is_not_reused_outside(own):
    @jax.jit
    def gain(w):
        return w[...] * 1

    class Calls(nnx.Module):
        def __init__(self):
            self.w = nnx.Param(jnp.ones(3))

        def __call__(self):
            return gain(self.w)

    model = mp.wrap(Calls(), "mixed_bfloat16")
    assert gain(model.w).dtype == jnp.float32
    assert model().dtype == jnp.bfloat16
    assert gain(model.w).dtype == jnp.float32


def test_arguments_that_are_modules_rngs_or_variables_keep_their_identity():
    class Takes(nnx.Module):
        def __call__(self, x, rngs, variable, ids):
            return x, rngs, variable, ids

    rngs, variable, ids = nnx.Rngs(0), nnx.Param(jnp.ones(2)), jnp.arange(2)
    out = mp.wrap(Takes(), "mixed_bfloat16")(X, rngs, variable, ids)
    assert out[0].dtype == jnp.bfloat16
    assert out[1] is rngs and out[2] is variable and out[3] is ids


def test_registered_rule_lends_attributes():
    class Scaled(nnx.Module):
        def __init__(self):
            self.dtype = None
            self.w = nnx.Param(jnp.ones(3))

        def __call__(self, x):
            return x * self.w[...].astype(self.dtype or jnp.float32)

    mp.nnx.register(Scaled)(mp.nnx.computes_in)
    model = mp.wrap(Scaled(), "mixed_float16")
    assert model(X).dtype == jnp.float16 and type(model.w) is nnx.Param
    assert vars(model)["dtype"] is None  # the instance's own is underneath
    with pytest.raises(TypeError, match=r"`register` takes subclasses of flax.nnx.Module"):
        mp.nnx.register(int)


@pytest.mark.parametrize("transform", [nnx.jit, nnx.remat])
def test_methods_under_a_transform_of_their_own(transform):
    class Net(nnx.Module):
        def __init__(self):
            self.w = nnx.Param(jnp.ones((3, 2)))

        @transform
        def __call__(self, x):
            return x @ self.w

    model = Net()
    assert model(X).dtype == jnp.float32  # fills the cache of nnx.jit
    assert mp.wrap(model, "mixed_bfloat16")(X).dtype == jnp.bfloat16
    assert mp.unwrap(model)(X).dtype == jnp.float32
