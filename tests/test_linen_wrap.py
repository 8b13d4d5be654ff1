"""`mp.wrap` on Linen modules: what must not change, and what must."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mpjax as mp
from examples.byte_lm_models import ByteLM, Shape
from tests.helpers import assert_trees_equal, dot_dtypes, equations

TINY = Shape(context=8, width=16, depth=4, heads=2)
TOKENS = jnp.arange(16).reshape(2, 8) * 7 % 256


class MLP(nn.Module):
    width: int = 16

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(self.width)(x))
        return nn.Dense(4, name="head")(nn.LayerNorm()(x))


@pytest.fixture(scope="module")
def variables():
    return jax.jit(ByteLM(TINY).init)(jax.random.key(0), TOKENS)


def mean_loss(model):
    def loss(variables, tokens):
        logits = model.apply(variables, tokens).astype(jnp.float32)
        return -jax.nn.log_softmax(logits)[..., 0].mean()

    return loss


@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16", "mixed_float16"])
def test_init_is_that_of_the_unwrapped_module(policy, variables):
    init = jax.jit(mp.wrap(ByteLM(TINY), policy).init)
    assert_trees_equal(init(jax.random.key(0), TOKENS), variables)


def test_float32_policy_is_bit_identical_in_outputs_and_gradients(variables):
    plain, wrapped = ByteLM(TINY), mp.wrap(ByteLM(TINY), "float32")
    assert_trees_equal(
        jax.jit(wrapped.apply)(variables, TOKENS), jax.jit(plain.apply)(variables, TOKENS)
    )
    assert_trees_equal(
        jax.jit(jax.grad(mean_loss(wrapped)))(variables, TOKENS),
        jax.jit(jax.grad(mean_loss(plain)))(variables, TOKENS),
    )


@pytest.mark.parametrize("half", ["bfloat16", "float16"])
def test_every_product_of_a_training_step_has_half_precision_operands(half, variables):
    model = mp.wrap(ByteLM(TINY), f"mixed_{half}")
    products = dot_dtypes(jax.grad(mean_loss(model)), variables, TOKENS)
    # Forward: 4 blocks of 4 projections, 2 attention products, 2 MLP products, and the head. Each
    # has two transposes in the backward pass.
    assert len(products) == 3 * (4 * 8 + 1)
    assert set(products) == {(half, half)}


def test_softmax_and_norm_reductions_are_float32(variables):
    model = mp.wrap(ByteLM(TINY), "mixed_bfloat16")
    jaxpr = jax.make_jaxpr(model.apply)(variables, TOKENS).jaxpr
    exponentials = [e for e in equations(jaxpr) if e.primitive.name == "exp"]
    sums = [e for e in equations(jaxpr) if e.primitive.name == "reduce_sum"]
    maxima = [e for e in equations(jaxpr) if e.primitive.name == "reduce_max"]
    assert len(exponentials) == len(maxima) == 4  # one softmax per block
    assert len(sums) == 4 + 2 * 9  # softmax denominators; mean and mean square of 9 norms
    dtypes = {e.invars[0].aval.dtype.name for e in [*exponentials, *sums, *maxima]}
    assert dtypes == {"float32"}


def test_gradients_arrive_in_the_variable_dtype(variables):
    model = mp.wrap(ByteLM(TINY), "mixed_bfloat16")
    grads = jax.eval_shape(jax.grad(mean_loss(model)), variables, TOKENS)
    assert {g.dtype.name for g in jax.tree.leaves(grads)} == {"float32"}


def test_wrapped_module_keeps_name_fields_and_repr():
    model = mp.wrap(MLP(width=3), "mixed_bfloat16")
    assert type(model).__name__ == "MLP" and isinstance(model, MLP) and model.width == 3
    assert repr(model) == repr(MLP(width=3))
    assert model.policy == mp.DTypePolicy("mixed_bfloat16")
    assert model == mp.wrap(MLP(width=3), "mixed_bfloat16")
    assert hash(model) == hash(mp.wrap(MLP(width=3), "mixed_bfloat16"))
    assert model != mp.wrap(MLP(width=3), "float32")
    assert model.clone(width=5).policy == model.policy


def test_wrapping_again_replaces_the_policy_and_unwrap_takes_it_off():
    model = mp.wrap(mp.wrap(MLP(), "float32"), "mixed_bfloat16")
    assert model.policy.name == "mixed_bfloat16"
    assert type(model).__mro__[1] is MLP
    plain = mp.unwrap(model)
    assert type(plain) is MLP and plain == MLP()
    with pytest.raises(ValueError, match=r"MLP is not wrapped: call `mp.wrap"):
        mp.unwrap(plain)


def test_a_policy_attribute_of_the_users_own_is_left_alone():
    class Agent(nn.Module):
        policy: str = "greedy"

        @nn.compact
        def __call__(self, x):
            return nn.Dense(2)(x)

    class Setup(nn.Module):
        def setup(self):
            self.policy = nn.Dense(2)

        def __call__(self, x):
            return self.policy(x)

    assert mp.wrap(Agent(), "mixed_bfloat16").policy == "greedy"
    y, _ = mp.wrap(Setup(), "mixed_bfloat16").init_with_output(jax.random.key(0), jnp.ones((1, 2)))
    assert y.dtype == jnp.bfloat16


def test_arguments_are_cast_in_nested_containers_and_nothing_else_is():
    seen = {}

    class Probe(nn.Module):
        @nn.compact
        def __call__(self, batch, *, scale, train, key, name):
            seen.update(
                x=batch["x"].dtype,
                np=batch["more"][0].dtype,
                ids=batch["more"][1].dtype,
                mask=batch["more"][2].dtype,
                z=batch["z"].dtype,
                scale=scale.dtype,
                key=key.dtype,
                train=train,
                name=name,
                float=type(batch["float"]),
            )
            return batch["x"]

    key = jax.random.key(0)
    batch = {
        "x": jnp.ones(2),
        "more": (np.ones(2), jnp.arange(2), jnp.ones(2, bool)),
        "z": jnp.ones(2, jnp.complex64),
        "float": 0.5,
    }
    mp.wrap(Probe(), "mixed_bfloat16").apply(
        {}, batch, scale=jnp.float16(2), train=True, key=key, name="n"
    )
    assert seen == {
        "x": jnp.bfloat16,
        "np": jnp.bfloat16,
        "ids": jnp.int32,
        "mask": jnp.bool_,
        "z": jnp.complex64,
        "scale": jnp.bfloat16,
        "key": key.dtype,
        "train": True,
        "name": "n",
        "float": float,
    }


def test_parameters_of_a_users_own_module_are_read_in_the_compute_dtype():
    seen = []

    class Own(nn.Module):
        def setup(self):
            self.early = self.param("early", nn.initializers.ones, (3, 3))

        def __call__(self, x):
            seen.append(self.early.dtype)
            return x @ self.early

    class Compact(nn.Module):
        @nn.compact
        def __call__(self, x):
            w = self.param("w", nn.initializers.ones, (3, 3))
            seen.append(w.dtype)
            return Own()(x @ w)

    model, x = mp.wrap(Compact(), "mixed_bfloat16"), jnp.ones((2, 3))
    variables = model.init(jax.random.key(0), x)
    assert dot_dtypes(model.apply, variables, x) == [("bfloat16", "bfloat16")] * 2
    assert set(seen) == {jnp.dtype("bfloat16")}
    assert {v.dtype for v in jax.tree.leaves(variables)} == {jnp.dtype("float32")}


def test_batch_norm_statistics_stay_float32():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            return nn.BatchNorm(use_running_average=not train, momentum=0.5)(nn.Dense(3)(x))

    x = jax.random.normal(jax.random.key(1), (64, 2))
    model = mp.wrap(Net(), "mixed_bfloat16")
    variables = model.init(jax.random.key(0), x, train=False)
    y, updates = model.apply(variables, x, train=True, mutable=["batch_stats"])
    assert y.dtype == jnp.bfloat16
    stats = updates["batch_stats"]["BatchNorm_0"]
    h = mp.wrap(nn.Dense(3), "mixed_bfloat16").apply({"params": variables["params"]["Dense_0"]}, x)
    h = np.asarray(h, np.float32)  # the norm sees bfloat16, and averages it in float32
    assert stats["mean"].dtype == stats["var"].dtype == jnp.float32
    # momentum 0.5 from zero: half the batch mean; float32 sums of 64 terms
    np.testing.assert_allclose(stats["mean"], 0.5 * h.mean(0), atol=64 * 2**-24)
    assert not np.array_equal(stats["mean"], stats["mean"].astype(jnp.bfloat16))


class Embedder(nn.Module):
    def setup(self):
        self.embed = nn.Embed(11, 6)
        self.dense = nn.Dense(6)

    def __call__(self, tokens):
        return self.decode(self.encode(tokens))

    def encode(self, tokens):
        return self.dense(self.embed(tokens))

    def decode(self, h):
        return self.embed.attend(h)


@pytest.mark.parametrize(
    "method",
    ["encode", Embedder.encode, lambda m, t: m.encode(t), lambda m, t: m.dense(m.embed(t))],
)
def test_other_methods(method):
    model, tokens = mp.wrap(Embedder(), "mixed_bfloat16"), jnp.arange(4)
    variables = model.init(jax.random.key(0), tokens)
    assert model.apply(variables, tokens, method=method).dtype == jnp.bfloat16
    bound = model.bind(variables)
    assert bound.encode(tokens).dtype == bound(tokens).dtype == jnp.bfloat16
    # the tied head, reached by a method of a submodule
    assert dot_dtypes(model.apply, variables, tokens) == [("bfloat16", "bfloat16")] * 2


def test_shared_module():
    class Shared(nn.Module):
        def setup(self):
            self.layer = nn.Dense(4)

        def __call__(self, x):
            return self.layer(self.layer(x))

    model, x = mp.wrap(Shared(), "mixed_bfloat16"), jnp.ones((2, 4))
    variables = model.init(jax.random.key(0), x)
    assert list(variables["params"]) == ["layer"]
    assert dot_dtypes(model.apply, variables, x) == [("bfloat16", "bfloat16")] * 2


class Residual(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        return x + nn.Dense(x.shape[-1])(nn.LayerNorm()(x)), None


class Lifted(nn.Module):
    lift: str

    @nn.compact
    def __call__(self, x):
        if self.lift == "scan":
            cls = nn.scan(
                Residual, variable_axes={"params": 0}, split_rngs={"params": True}, length=3
            )
            return cls()(x, None)[0]
        if self.lift == "remat_scan":
            cls = nn.scan(
                nn.remat(Residual),
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=3,
            )
            return cls()(x, None)[0]
        if self.lift == "vmap":
            cls = nn.vmap(Residual, variable_axes={"params": 0}, split_rngs={"params": True})
            return cls()(x)[0]
        return {"remat": nn.remat, "jit": nn.jit}[self.lift](Residual)()(x)[0]


@pytest.mark.parametrize("lift", ["scan", "remat", "remat_scan", "vmap", "jit"])
def test_lifted_transforms(lift):
    plain, x = Lifted(lift), jnp.linspace(0, 1, 12).reshape(3, 4)
    variables = plain.init(jax.random.key(0), x)
    half = mp.wrap(Lifted(lift), "mixed_bfloat16")
    assert_trees_equal(half.init(jax.random.key(0), x), variables)
    assert half.apply(variables, x).dtype == jnp.bfloat16

    def loss(variables):
        return half.apply(variables, x).astype(jnp.float32).sum()

    products = dot_dtypes(jax.grad(loss), variables)
    assert products and set(products) == {("bfloat16", "bfloat16")}
    same = mp.wrap(Lifted(lift), "float32")
    assert_trees_equal(jax.jit(same.apply)(variables, x), jax.jit(plain.apply)(variables, x))


class FloatStream(nn.Module):
    """A hand-written float32 term widens the residual stream before a scanned block."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(x.shape[-1])(x) + jnp.sin(jnp.arange(x.shape[-1], dtype=jnp.float32))
        block = nn.scan(
            Residual, variable_axes={"params": 0}, split_rngs={"params": True}, length=3
        )
        return block()(x, None)[0]


class ScannedLSTM(nn.Module):
    """The scan of Flax's documentation, its carry made by the cell in float32."""

    @nn.compact
    def __call__(self, x):
        scanned = nn.scan(
            nn.LSTMCell,
            variable_broadcast="params",
            split_rngs={"params": False},
            in_axes=1,
            out_axes=1,
        )
        cell = scanned(4)
        carry = cell.initialize_carry(jax.random.key(0), x[:, 0].shape)
        return cell(carry, x)[1]


@pytest.mark.parametrize("module", [FloatStream(), ScannedLSTM()], ids=lambda m: type(m).__name__)
def test_a_float32_carry_under_the_users_own_scan_keeps_its_dtype(module):
    x = jnp.ones((2, 5, 4))
    variables = module.init(jax.random.key(0), x)
    model = mp.wrap(module, "mixed_bfloat16")
    assert_trees_equal(model.init(jax.random.key(0), x), variables)
    assert set(dot_dtypes(model.apply, variables, x)) == {("bfloat16", "bfloat16")}


def test_a_class_under_nn_jit_is_traced_anew_for_each_policy():
    x = jnp.ones((3, 4))
    variables = Lifted("jit").init(jax.random.key(0), x)
    outputs = {
        policy: mp.wrap(Lifted("jit"), policy).apply(variables, x).dtype.name
        for policy in ["float32", "mixed_bfloat16", "mixed_float16", "float32"]
    }
    assert outputs == {
        "float32": "float32",
        "mixed_bfloat16": "bfloat16",
        "mixed_float16": "float16",
    }
    assert Lifted("jit").apply(variables, x).dtype == jnp.float32


def test_function_transforms():
    model, x = mp.wrap(MLP(), "mixed_bfloat16"), jnp.ones((5, 3))
    variables = model.init(jax.random.key(0), x)

    def loss(variables, x):
        return model.apply(variables, x).astype(jnp.float32).sum()

    expected = jax.jit(jax.grad(loss))(variables, x)
    remat = jax.jit(jax.grad(jax.checkpoint(loss)))(variables, x)
    for a, b in zip(jax.tree.leaves(remat), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=16 * 2**-23)  # float32 sums in another order
    per_example = jax.jit(jax.vmap(jax.grad(loss), in_axes=(None, 0)))(variables, x)
    assert {g.dtype.name for g in jax.tree.leaves(per_example)} == {"float32"}
    zeros = jax.tree.map(jnp.zeros_like, variables)
    y, tangent = jax.jvp(jax.jit(loss), (variables, x), (zeros, jnp.ones_like(x)))
    np.testing.assert_allclose(y, jax.jit(loss)(variables, x), rtol=16 * 2**-23)
    assert tangent.dtype == jnp.float32
    _, linear = jax.linearize(jax.jit(lambda v: loss(v, x)), variables)
    assert linear(zeros) == 0


def test_tabulate_names_the_users_classes():
    model = mp.wrap(MLP(), "mixed_bfloat16")
    table = model.tabulate(jax.random.key(0), jnp.ones((1, 3)), console_kwargs={"width": 200})
    assert all(word in table for word in ["MLP Summary", "Dense_0", "LayerNorm_0", "bfloat16"])


@pytest.mark.parametrize(
    "cell", [nn.LSTMCell, nn.OptimizedLSTMCell, nn.GRUCell, nn.SimpleCell, nn.MGUCell]
)
def test_recurrent_carry_and_output_are_in_the_compute_dtype(cell):
    model = mp.wrap(nn.RNN(cell(4), return_carry=True), "mixed_bfloat16")
    x = jnp.ones((2, 5, 3))
    (carry, y), variables = model.init_with_output(jax.random.key(0), x)
    assert {c.dtype.name for c in jax.tree.leaves((carry, y))} == {"bfloat16"}
    plain = nn.RNN(cell(4), return_carry=True).init(jax.random.key(0), x)
    assert_trees_equal(variables, plain)
    assert set(dot_dtypes(model.apply, variables, x)) == {("bfloat16", "bfloat16")}


@pytest.mark.parametrize("cache_from", ["wrapped", "unwrapped"])
def test_decoding_keeps_the_dtype_of_the_cache(cache_from):
    plain = nn.MultiHeadDotProductAttention(2, decode=True)
    model = mp.wrap(plain, "mixed_bfloat16")
    owner = model if cache_from == "wrapped" else plain
    variables = owner.init(jax.random.key(0), jnp.ones((1, 6, 4)))
    kept = "bfloat16" if cache_from == "wrapped" else "float32"
    for _ in range(3):
        y, updates = model.apply(variables, jnp.ones((1, 1, 4)), mutable=["cache"])
        variables = {**variables, **updates}
    assert y.dtype == jnp.bfloat16
    assert variables["cache"]["cached_key"].dtype == kept
    assert variables["cache"]["cache_index"] == 3


def test_a_layer_whose_author_set_dtype_keeps_it():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(2, dtype=jnp.float32, name="head")(nn.Dense(3)(x))

    model, x = mp.wrap(Net(), "mixed_bfloat16"), jnp.ones((1, 2))
    variables = model.init(jax.random.key(0), x)
    assert dot_dtypes(model.apply, variables, x) == [("bfloat16",) * 2, ("float32",) * 2]
    assert mp.layer_policies(model, variables, x) == {
        "Dense_0": mp.DTypePolicy("mixed_bfloat16"),
        "head": mp.DTypePolicy("float32"),
    }


def test_a_model_whose_author_set_every_dtype_gets_a_warning():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(2, dtype=jnp.float32)(x)

    with pytest.warns(UserWarning, match=r"policy of Net changes nothing.*'Dense_0'.*dtype=None"):
        mp.wrap(Net(), "mixed_bfloat16").init(jax.random.key(0), jnp.ones((1, 2)))


class WithWrappedHead(nn.Module):
    head: nn.Module

    @nn.compact
    def __call__(self, x):
        return self.head(nn.Dense(3)(x))


class WrapsInSetup(nn.Module):
    def setup(self):
        self.body = nn.Dense(3)
        self.head = mp.wrap(nn.Dense(2), "float32")

    def __call__(self, x):
        return self.head(self.body(x))


class WrapsInCompact(nn.Module):
    @nn.compact
    def __call__(self, x):
        return mp.wrap(nn.Dense(2, parent=None), "float32")(nn.Dense(3)(x))


@pytest.mark.parametrize(
    "module",
    [WithWrappedHead(mp.wrap(nn.Dense(2), "float32")), WrapsInSetup(), WrapsInCompact()],
    ids=lambda m: type(m).__name__,
)
def test_nested_wrap_keeps_its_own_policy(module):
    x = jnp.ones((1, 2))
    plain_names = [("body", "head"), ("Dense_0", "head"), ("Dense_0", "Dense_1")]
    model = mp.wrap(module, "mixed_bfloat16")
    variables = model.init(jax.random.key(0), x)
    assert tuple(sorted(variables["params"])) in [tuple(sorted(n)) for n in plain_names]
    assert dot_dtypes(model.apply, variables, x) == [("bfloat16",) * 2, ("float32",) * 2]
    policies = [p.name for p in mp.layer_policies(model, variables, x).values()]
    assert sorted(policies) == ["float32", "mixed_bfloat16"]
    # without the outer wrap, only the inner layer has a policy
    assert dot_dtypes(module.apply, variables, x) == [("float32",) * 2] * 2


def test_a_child_that_already_has_its_parent_cannot_be_wrapped():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return mp.wrap(nn.Dense(2), "float32")(x)

    with pytest.raises(ValueError, match=r"Dense \(named 'Dense_0'\) already belongs.*parent=None"):
        Net().init(jax.random.key(0), jnp.ones((1, 2)))


def test_an_explicit_param_dtype_is_kept_and_the_variable_dtype_is_used_otherwise():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(2, param_dtype=jnp.float16, name="own")(nn.Dense(3, name="free")(x))

    x = jnp.ones((1, 2))
    for policy, free in [("mixed_bfloat16", "float32"), ("bfloat16", "bfloat16")]:
        params = mp.wrap(Net(), policy).init(jax.random.key(0), x)["params"]
        assert params["free"]["kernel"].dtype == free
        assert params["own"]["kernel"].dtype == jnp.float16


def test_output_dtype_is_that_of_the_wrapped_module_only():
    policy = "params=float32,compute=bfloat16,output=float32"
    model, x = mp.wrap(MLP(), policy), jnp.ones((1, 3))
    variables = model.init(jax.random.key(0), x)
    assert model.apply(variables, x).dtype == jnp.float32
    assert dot_dtypes(model.apply, variables, x) == [("bfloat16", "bfloat16")] * 2
    named = mp.DTypePolicyMap("mixed_bfloat16", {"head": policy})
    assert mp.wrap(MLP(), named).apply(variables, x).dtype == jnp.float32


def test_a_widened_output_is_not_narrowed_again():
    class Logits(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(2)(x).astype(jnp.float32)

    y, _ = mp.wrap(Logits(), "mixed_bfloat16").init_with_output(jax.random.key(0), jnp.ones((1, 2)))
    assert y.dtype == jnp.float32


def test_policy_map_by_path(variables):
    policy = mp.DTypePolicyMap("mixed_bfloat16", {"head": "float32", "block_0/.*": "float16"})
    model = mp.wrap(ByteLM(TINY), policy)
    products = dot_dtypes(model.apply, variables, TOKENS)
    # block_0/.* reaches the attention too, and so its two products
    assert products[:8] == [("float16", "float16")] * 8
    assert products[-1] == ("float32", "float32")
    assert set(products[8:-1]) == {("bfloat16", "bfloat16")}


def test_the_map_is_frozen_when_it_is_wrapped():
    policy = mp.DTypePolicyMap("mixed_bfloat16", {"head": "float32"})
    model, x = mp.wrap(MLP(), policy), jnp.ones((1, 3))
    del policy["head"]
    assert model.policy["head"].name == "float32"
    assert model.init_with_output(jax.random.key(0), x)[0].dtype == jnp.float32


def test_compiles_once_over_calls_and_spellings(variables):
    traces = []

    @jax.jit
    def apply(model, variables, tokens):
        traces.append(model)
        return model.apply(variables, tokens)

    apply = jax.jit(apply.__wrapped__, static_argnums=0)
    spellings = ["mixed_bfloat16", mp.DTypePolicy("mixed_bfloat16"), "params=float32,compute=bf16"]
    for i in range(100):
        apply(mp.wrap(ByteLM(TINY), spellings[i % 3]), variables, TOKENS)
    assert len(traces) == 1 and apply._cache_size() == 1
    apply(mp.wrap(ByteLM(TINY), "float32"), variables, TOKENS)
    assert len(traces) == 2


def test_registered_handler_runs_in_place_of_the_layer():
    class Doubling(nn.Module):
        @nn.compact
        def __call__(self, x):
            return 2 * x

    calls = []

    @mp.linen.register(Doubling)
    def handler(layer, call, args, kwargs):
        calls.append((layer.path, layer.method, layer.policy.name, args[0].dtype))
        return mp.linen.default(layer, call, args, kwargs) + 1

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return Doubling()(x)

    assert mp.wrap(Net(), "mixed_bfloat16").apply({}, jnp.float32(3)) == 7
    assert calls == [("Doubling_0", "__call__", "mixed_bfloat16", jnp.bfloat16)]
    assert Net().apply({}, jnp.float32(3)) == 6
    with pytest.raises(TypeError, match=r"`register` takes subclasses of flax.linen.Module"):
        mp.linen.register(int)


@pytest.mark.parametrize("norm", [nn.WeightNorm, nn.SpectralNorm])
def test_layers_that_map_the_parameters_of_another(norm):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            layer = norm(nn.Dense(3))
            return layer(x, update_stats=False) if norm is nn.SpectralNorm else layer(x)

    x = jnp.ones((2, 4))
    variables = Net().init(jax.random.key(0), x)
    model = mp.wrap(Net(), "mixed_bfloat16")
    assert_trees_equal(model.init(jax.random.key(0), x), variables)
    y = model.apply(variables, x)
    assert y.dtype == jnp.bfloat16
    # one bfloat16 product of four terms, its operands rounded, beside a float32 one
    np.testing.assert_allclose(y, Net().apply(variables, x), atol=4 * 3 * 2**-8)


def test_methods_under_a_transform_of_their_own():
    class Net(nn.Module):
        @nn.remat
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3)(x)

    x = jnp.ones((2, 4))
    model = mp.wrap(Net(), "mixed_bfloat16")
    variables = model.init(jax.random.key(0), x)
    assert_trees_equal(variables, Net().init(jax.random.key(0), x))
    assert dot_dtypes(model.apply, variables, x) == [("bfloat16", "bfloat16")]
