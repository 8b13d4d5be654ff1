"""NNX modules as people write them: each of these once went wrong without a word."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import mpjax as mp
from tests.helpers import assert_trees_equal, dot_dtypes

BF16, F32 = ("bfloat16", "bfloat16"), ("float32", "float32")
X = jnp.linspace(0, 1, 6).reshape(2, 3)


class Own(nnx.Module):
    def __init__(self, rngs=None):
        self.w = nnx.Param(jnp.eye(3) / 3)

    def __call__(self, x):
        return x @ self.w


def test_a_wrapped_module_bridged_to_linen_keeps_its_collection():
    plain = nnx.bridge.to_linen(lambda rngs: Own(rngs))
    wrapped = nnx.bridge.to_linen(lambda rngs: mp.wrap(Own(rngs), "mixed_bfloat16"))
    variables = plain.init(jax.random.key(0), X)
    assert list(wrapped.init(jax.random.key(0), X)) == list(variables) == ["params"]
    assert dot_dtypes(lambda v: wrapped.apply(v, X), variables) == [BF16]


def test_a_wrapped_graphdef_merged_with_a_state_from_before():
    state = nnx.state(Own())
    graphdef = nnx.graphdef(mp.wrap(Own(), "mixed_bfloat16"))
    assert jax.tree.structure(nnx.state(nnx.merge(graphdef, state))) == jax.tree.structure(state)
    assert dot_dtypes(nnx.merge(graphdef, state), X) == [BF16]


class LoRALinear(nnx.Linear):
    def __init__(self, rngs):
        super().__init__(3, 3, rngs=rngs)
        self.a, self.b = nnx.Param(jnp.ones((3, 2))), nnx.Param(jnp.ones((2, 3)))

    def __call__(self, inputs, out_sharding=None):
        return super().__call__(inputs) + inputs @ self.a @ self.b


class GainNorm(nnx.LayerNorm):
    def __init__(self, rngs):
        super().__init__(3, rngs=rngs)
        self.w = nnx.Param(jnp.ones((3, 3)))

    def __call__(self, x, *, mask=None):
        return super().__call__(x, mask=mask) @ self.w


class Transposed(Own):
    def __call__(self, x):
        assert self.w.dtype == self.w.T.dtype == self.w.reshape(9).dtype == jnp.bfloat16
        return x @ self.w.T


class Tied(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(5, 3, rngs=rngs)

    def __call__(self, x):
        return x @ self.embed.embedding.T


class InContainers(nnx.Module):
    def __init__(self, rngs):
        self.list = nnx.List([nnx.Param(jnp.eye(3))])
        self.dict = nnx.Dict(w=nnx.Param(jnp.eye(3)))

    def __call__(self, x):
        for w in self.list:
            x = x @ w
        return x @ self.dict["w"] @ self.dict.w


@pytest.mark.parametrize("module", [LoRALinear, GainNorm, Transposed, Tied, InContainers])
def test_parameters_are_read_in_the_compute_dtype(module):
    model = module(nnx.Rngs(0))
    state = nnx.state(model)
    expected = jax.tree.structure(state)
    mp.wrap(model, "mixed_bfloat16")
    products = dot_dtypes(model, X.astype(jnp.bfloat16))
    assert products and set(products) == {BF16}
    assert jax.tree.structure(nnx.state(model)) == expected
    assert_trees_equal(nnx.state(model), state)


def test_a_lora_layer_is_quantized_but_for_its_own_parameters():
    model = mp.wrap(LoRALinear(nnx.Rngs(0)), "int8_from_mixed_bfloat16")
    expected = model(X)
    _, report = mp.quantize(model, return_report=True)
    assert [each.path for each in report.left] == ["a", "b"]
    assert dot_dtypes(model, X) == [("int8", "int8"), BF16, BF16]
    np.testing.assert_array_equal(np.asarray(model(X)), np.asarray(expected))


class Tracks(nnx.Module):
    """Statistics of its own, and a method that writes a parameter."""

    def __init__(self):
        self.w = nnx.Param(jnp.float32(1.2345678))
        self.mean = nnx.BatchStat(jnp.float32(0.0))

    def __call__(self, x):
        self.mean[...] = 0.5 * self.mean[...] + 0.5 * jnp.mean(x.astype(jnp.float32))
        return x * self.w[...]

    def load(self, w):
        self.w[...] = w


def test_writing_a_parameter_inside_a_wrapped_call_warns_of_the_lost_bits():
    model = mp.wrap(Tracks(), "mixed_bfloat16")
    with pytest.warns(UserWarning, match=r"parameter of shape \(\) is assigned inside.*bfloat16"):
        model.load(jnp.float32(2.0))
    assert model.w.get_raw_value() == 2.0 and model.w.get_raw_value().dtype == jnp.float32
    model(jnp.full(3, 1 / 3))
    # the input is rounded to bfloat16 on entry; the statistic is not
    assert model.mean[...] == jnp.float32(0.5) * jnp.float32(jnp.bfloat16(1 / 3))


def test_a_layer_added_after_wrapping_is_named():
    model = mp.wrap(nnx.Sequential(Own(), Own()), "mixed_bfloat16")
    model.layers[1] = nnx.Linear(3, 3, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"'layers/1' follows no policy.*mp.wrap\(model, policy\)"):
        mp.layer_policies(model)


def test_a_rule_that_lends_what_cannot_be_hashed_is_named():
    class Odd(nnx.Module):
        def __call__(self, x):
            return x

    @mp.nnx.register(Odd)
    def rule(layer, policy):
        return {"options": {}}

    with pytest.raises(TypeError, match=r"rule of Odd lends `options` = \{\}, .*not hashable"):
        mp.wrap(Odd(), "mixed_bfloat16")


def test_a_dtype_attribute_of_another_meaning():
    class Input(Own):
        def __init__(self):
            super().__init__()
            self.dtype = "image"

    assert mp.wrap(Input(), "mixed_bfloat16")(X).dtype == jnp.bfloat16


class GainBlock(nnx.Module):
    def __init__(self, rngs):
        self.linear, self.gain = nnx.Linear(3, 3, rngs=rngs), nnx.Param(jnp.ones(3))

    def __call__(self, x):
        return x + self.gain * self.linear(x)


class ScannedGain(nnx.Module):
    def __init__(self, rngs):
        self.blocks = nnx.vmap(GainBlock, in_axes=0)(rngs.split(3))

    def __call__(self, x):
        x = x + jnp.sin(jnp.arange(3, dtype=jnp.float32))
        run = nnx.scan(lambda block, x: block(x), in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        return run(self.blocks, x)


def test_a_scanned_block_with_a_parameter_keeps_a_float32_stream():
    model = mp.wrap(ScannedGain(nnx.Rngs(0)), "mixed_bfloat16")
    assert model(X).dtype == jnp.float32
    assert dot_dtypes(nnx.jit(lambda m, x: m(x)), model, X) == [BF16]


def test_a_generator_is_refused_since_no_policy_would_reach_its_body():
    class Streams(Own):
        def stream(self, x):
            yield x @ self.w

    with pytest.raises(NotImplementedError, match=r"Streams.stream` is a generator.*no policy"):
        mp.wrap(Streams(), "mixed_bfloat16").stream(X)


def test_a_submodule_of_a_wrapped_model_can_be_wrapped_anew():
    model = mp.wrap(nnx.Sequential(Own(), LoRALinear(nnx.Rngs(0))), "int8_from_mixed_bfloat16")
    mp.wrap(model.layers[1], "int8_from_float32")
    assert dot_dtypes(model, X) == [BF16, ("int8", "int8"), F32, F32]
    mp.wrap(model, "mixed_bfloat16")
    assert dot_dtypes(model, X)[0] == BF16 and model.layers[1].policy.name == "int8_from_float32"


def test_a_list_that_a_call_appends_to_is_not_copied():
    class Logs(Own):
        def __init__(self):
            super().__init__()
            self.seen = nnx.static([])

        def __call__(self, x):
            self.seen.append(x.dtype.name)
            return super().__call__(x)

    model = mp.wrap(Logs(), "mixed_bfloat16")
    model(X)
    assert model.seen == ["bfloat16"]


@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
def test_complex_inputs_pass_through_a_linear(policy):
    linear = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    z = X.astype(jnp.complex64) * 1j
    expected = linear(z)
    y = mp.wrap(linear, policy)(z)
    assert y.dtype == jnp.complex64
    np.testing.assert_allclose(y, expected, atol=3 * 2**-9)  # three products, the kernel rounded


def test_complex_inputs_of_an_int8_layer_are_refused():
    linear = mp.wrap(nnx.Linear(3, 2, rngs=nnx.Rngs(0)), "int8_from_float32")
    with pytest.raises(TypeError, match=r"got complex64 inputs of shape \(2, 3\).*float policy"):
        linear(X.astype(jnp.complex64))
