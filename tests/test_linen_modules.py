"""Linen modules as people write them: each of these once computed in float32 without a word."""

import pickle

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mpjax as mp
from tests.helpers import assert_trees_equal, dot_dtypes

BF16, F32 = ("bfloat16", "bfloat16"), ("float32", "float32")
INT8 = "int8_from_mixed_bfloat16"
X = jnp.linspace(0, 1, 8).reshape(2, 4)


class LoRADense(nn.Dense):
    """A subclass of a Flax layer that owns parameters of its own."""

    @nn.compact
    def __call__(self, inputs):
        a = self.param("a", nn.initializers.ones, (inputs.shape[-1], 2))
        b = self.param("b", nn.initializers.ones, (2, self.features))
        return super().__call__(inputs) + inputs @ a @ b


class GainNorm(nn.LayerNorm):
    @nn.compact
    def __call__(self, x, *, mask=None):
        return super().__call__(x, mask=mask) @ self.param("w", nn.initializers.ones, (4, 4))


class ByVariable(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x @ self.variable("params", "w", jnp.ones, (4, 4)).value


class PrivateMethod(nn.Module):
    class Child(nn.Module):
        @nn.compact
        def _encode(self, x):
            return x @ self.param("w", nn.initializers.ones, (4, 4))

    @nn.compact
    def __call__(self, x):
        return PrivateMethod.Child()._encode(nn.Dense(4)(x))


class LiftedLambda(nn.Module):
    @nn.compact
    def __call__(self, x):
        def read(module, x):
            return x @ module.param("w", nn.initializers.ones, (4, 4))

        return nn.remat(lambda module, x: read(module, x))(self, x)


@pytest.mark.parametrize(
    "module",
    [LoRADense(4), GainNorm(), ByVariable(), PrivateMethod(), LiftedLambda()],
    ids=lambda m: type(m).__name__,
)
def test_own_parameters_are_read_in_the_compute_dtype(module):
    variables = module.init(jax.random.key(0), X)
    model = mp.wrap(module, "mixed_bfloat16")
    assert_trees_equal(model.init(jax.random.key(0), X), variables)
    assert set(dot_dtypes(model.apply, variables, X)) == {BF16}


def test_a_dense_with_lora_is_quantized_but_for_its_own_parameters():
    model = mp.wrap(LoRADense(4), INT8)
    variables = model.init(jax.random.key(0), X)
    quantized, report = mp.quantize(model, variables, X, return_report=True)
    assert [each.path for each in report.left] == ["params/a", "params/b"]
    assert dot_dtypes(model.apply, quantized, X) == [("int8", "int8"), BF16, BF16]
    assert_trees_equal(model.apply(quantized, X), model.apply(variables, X))


class GainBlock(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        gain = self.param("gain", nn.initializers.ones, x.shape[-1:])
        return x + gain * nn.Dense(x.shape[-1])(x), None


class ScannedGain(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(4)(x) + jnp.sin(jnp.arange(4, dtype=jnp.float32))
        block = nn.scan(
            GainBlock, variable_axes={"params": 0}, split_rngs={"params": True}, length=3
        )
        return block()(x, None)[0]


def test_a_scanned_block_with_a_parameter_keeps_a_float32_stream():
    variables = ScannedGain().init(jax.random.key(0), X)
    model = mp.wrap(ScannedGain(), "mixed_bfloat16")
    assert_trees_equal(model.init(jax.random.key(0), X), variables)
    assert set(dot_dtypes(model.apply, variables, X)) == {BF16}


class OwnCell(nn.RNNCellBase):
    """No dtype field, a setup, a helper, and an initialize_carry that Flax wraps."""

    def setup(self):
        self.dense = nn.Dense(4)

    def act(self, x):
        return nn.tanh(x)

    def __call__(self, carry, inputs):
        carry = self.act(self.dense(inputs) + carry)
        return carry, carry

    def initialize_carry(self, rng, input_shape):
        return jnp.zeros((*input_shape[:-1], 4))

    @property
    def num_feature_axes(self):
        return 1


def test_a_recurrent_cell_of_the_users_own():
    model, x = mp.wrap(nn.RNN(OwnCell()), "mixed_bfloat16"), jnp.ones((2, 3, 4))
    y, variables = model.init_with_output(jax.random.key(0), x)
    assert y.dtype == jnp.bfloat16
    assert dot_dtypes(model.apply, variables, x) == [BF16]


def test_a_dtype_field_of_another_meaning():
    class Input(nn.Module):
        dtype: str = "image"

        @nn.compact
        def __call__(self, x):
            return nn.Dense(2)(x)

    y, _ = mp.wrap(Input(), "mixed_bfloat16").init_with_output(jax.random.key(0), X)
    assert y.dtype == jnp.bfloat16


class Tree(nn.Module):
    depth: int

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(4, name="d")(x)
        return x if self.depth == 0 else type(self)(self.depth - 1, name="sub")(x)


def test_a_class_that_builds_itself_has_one_set_of_paths():
    model = mp.wrap(Tree(2), mp.DTypePolicyMap("mixed_bfloat16", {"d": "float32"}))
    variables = model.init(jax.random.key(0), X)
    assert dot_dtypes(model.apply, variables, X) == [F32, BF16, BF16]
    assert mp.layer_policies(model, variables, X) == mp.layer_policies(model, variables)


def test_a_module_from_outside_a_nested_wrap_gets_its_default():
    class Decoder(nn.Module):
        shared: nn.Module

        @nn.compact
        def __call__(self, x):
            return nn.Dense(4, name="d")(self.shared(x))

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            shared = nn.Dense(4, name="sh")
            policy = mp.DTypePolicyMap("mixed_bfloat16", {"d": "float32"})
            return mp.wrap(Decoder(shared, parent=None), policy)(shared(x))

    variables = Net().init(jax.random.key(0), X)
    assert dot_dtypes(Net().apply, variables, X) == [F32, BF16, F32]


def test_only_a_nested_wrap_is_quantized():
    class Net(nn.Module):
        head: nn.Module

        @nn.compact
        def __call__(self, x):
            return self.head(nn.Dense(4, name="body")(x))

    model = mp.wrap(Net(mp.wrap(nn.Dense(3), INT8)), "mixed_bfloat16")
    variables = model.init(jax.random.key(0), X)
    quantized = mp.quantize(model, variables, X)
    assert dot_dtypes(model.apply, quantized, X) == [BF16, ("int8", "int8")]
    assert quantized["params"]["body"]["kernel"] is variables["params"]["body"]["kernel"]


class Reparametrized(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.WeightNorm(nn.Dense(4))(x)


class LastAxisExperts(nn.Module):
    @nn.compact
    def __call__(self, x):
        experts = nn.vmap(
            nn.Dense,
            variable_axes={"params": -1},
            split_rngs={"params": True},
            in_axes=None,
            axis_size=4,
        )
        return experts(4)(x)


@pytest.mark.parametrize(
    "module", [Reparametrized(), LastAxisExperts()], ids=lambda m: type(m).__name__
)
def test_a_kernel_that_cannot_be_applied_in_int8_is_refused_when_it_is_quantized(module):
    model = mp.wrap(module, INT8)
    variables = model.init(jax.random.key(0), X)
    with pytest.raises(NotImplementedError, match="cannot apply the weights.*not quantized"):
        mp.quantize(model, variables, X)


def test_wrapped_modules_can_be_pickled():
    model = mp.wrap(Tree(2), mp.DTypePolicyMap("mixed_bfloat16", {"d": "float32"}))
    again = pickle.loads(pickle.dumps(model))
    assert again == model and again.policy == model.policy


def test_a_generator_is_refused_since_no_policy_would_reach_its_body():
    class Streams(nn.Module):
        def setup(self):
            self.dense = nn.Dense(2)

        def __call__(self, x):
            return self.dense(x)

        def stream(self, x):
            yield self.dense(x)

    model = mp.wrap(Streams(), "mixed_bfloat16")
    variables = model.init(jax.random.key(0), X)
    with pytest.raises(NotImplementedError, match=r"Streams.stream` is a generator.*no policy"):
        model.bind(variables).stream(X)


def test_an_exception_half_way_leaves_nothing_behind():
    class Fails(nn.Module):
        @nn.compact
        def __call__(self, x, fail=False):
            y = nn.Dense(2)(x)
            if fail:
                raise RuntimeError("half-way")
            return y

    model = mp.wrap(Fails(), "mixed_bfloat16")
    variables = model.init(jax.random.key(0), X)
    bound = model.bind(variables)
    expected = bound(X)
    with pytest.raises(RuntimeError, match="half-way"):
        bound(X, fail=True)
    np.testing.assert_array_equal(bound(X), expected)
    assert nn.Dense(2).apply({"params": variables["params"]["Dense_0"]}, X).dtype == jnp.float32
