"""What each layer does in training: formats of its products, states, gradients, in both APIs."""

import functools
import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import mpjax as mp

KEY = jax.random.key(0)
ROWS = jax.random.normal(jax.random.key(1), (4, 6, 8))
LAYERS = {
    "Dense": lambda: nn.Dense(6),
    "DenseGeneral": lambda: nn.DenseGeneral((2, 3), axis=(-2, -1)),
    "Einsum": lambda: nn.Einsum((8, 2, 3), "...d,dhk->...hk"),
    "Conv": lambda: nn.Conv(6, (3,)),
    "attention": lambda: nn.MultiHeadDotProductAttention(2),
}
NNX_LAYERS = {
    "Dense": lambda rngs: nnx.Linear(8, 6, rngs=rngs),
    "DenseGeneral": lambda rngs: nnx.LinearGeneral((6, 8), (2, 3), axis=(-2, -1), rngs=rngs),
    "Einsum": lambda rngs: nnx.Einsum("...d,dhk->...hk", (8, 2, 3), (2, 3), rngs=rngs),
    "Conv": lambda rngs: nnx.Conv(8, 6, (3,), rngs=rngs),
    "attention": lambda rngs: nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs),
}
MODES = ("float8", "float8_current", "float8/row", "int8", "int8_delayed", "int8_static")
ALL_OF_DENSE = [("Dense", mode) for mode in MODES]
OF_THE_OTHERS = [(name, mode) for name in LAYERS if name != "Dense" for mode in MODES[:3:2]]
STATES = {
    "float8": {"input", "kernel", "output_grad"},
    "int8_delayed": {"input", "kernel"},
    "int8_static": {"input"},
}
# Relative errors, in the mean, of operands that are rounded: 2^-4 and 2^-3 are the largest of E4M3
# and E5M2, 1/254 of the amax that of int8. A product of two, and a projection behind a projection,
# stay within these.
BOUNDS = {"float8": 0.2, "int8": 0.05}


def loss_of(output: jax.Array) -> jax.Array:
    return jnp.mean(jnp.square(output.astype(jnp.float32)))


def bound_of(mode: str) -> float:
    return BOUNDS["float8" if mode.startswith("float8") else "int8"]


def relative_error(found: Any, expected: Any) -> float:
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    return float(np.abs(found - expected).mean() / np.abs(expected).mean())


def gradients(model: nn.Module, variables: Any, x: jax.Array = ROWS) -> Any:
    def loss(variables):
        return loss_of(model.apply(variables, x))

    return jax.jit(mp.value_and_grad(loss))(variables)


def operands_on_gpu(function: Any, *args: Any) -> list[tuple[str, str]]:
    """The element types of the operands of each dot_general, as lowered for an NVIDIA GPU."""
    text = jax.jit(function).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
    operands = re.findall(r"stablehlo.dot_general .*: \((.*?)\) ->", text)
    return sorted(tuple(re.findall(r"x([a-z]\w*)>", types)) for types in operands)


@functools.cache
def in_float32(name: str) -> Any:
    """A layer's variables, and its loss and gradients."""
    module = LAYERS[name]()
    variables = jax.jit(module.init)(KEY, ROWS)
    return variables, gradients(module, variables)


@pytest.mark.parametrize(("name", "mode"), [*ALL_OF_DENSE, *OF_THE_OTHERS])
def test_gradients_are_those_of_float32_within_the_format_and_amaxes_come_with_them(name, mode):
    variables, (loss, expected) = in_float32(name)
    model = mp.wrap(LAYERS[name](), f"{mode}_from_float32")
    variables = mp.init_scaling(model, variables, ROWS)
    found_loss, found = gradients(model, variables)
    amaxes = jax.tree.leaves(found.observed)
    assert all(amax > 0 and np.isfinite(amax) for amax in amaxes)
    if mode not in STATES:
        assert set(variables) == {"params"} and not amaxes
    else:
        scaling = variables["scaling"]
        layers = scaling.values() if name == "attention" else [scaling]
        assert [set(states) for states in layers] == [STATES[mode]] * len(layers)
    assert float(found_loss) == pytest.approx(float(loss), rel=bound_of(mode))
    for path, gradient in jax.tree.leaves_with_path(expected.params):
        if "key" in jax.tree_util.keystr(path) and "bias" in jax.tree_util.keystr(path):
            continue  # of a key's bias it is zero: a softmax does not change by a constant
        other = found.params
        for part in path:
            other = other[part.key]
        assert other.dtype == jnp.float32
        assert relative_error(other, gradient) < bound_of(mode), path


@pytest.mark.parametrize(
    ("name", "mode"),
    [("Dense", "float8/row"), ("Dense", "int8"), *((name, "float8") for name in LAYERS)],
)
def test_nnx_computes_the_same(name, mode):
    variables, _ = in_float32(name)
    policy = f"{mode}_from_mixed_bfloat16"
    linen = mp.wrap(LAYERS[name](), policy)
    expected = gradients(linen, mp.init_scaling(linen, variables, ROWS))
    model = nnx.eval_shape(lambda: NNX_LAYERS[name](nnx.Rngs(0)))
    params = nnx.state(model, nnx.Param)
    nnx.replace_by_pure_dict(params, variables["params"])
    nnx.update(model, params)
    model = mp.wrap(model, policy)
    loss, grads = nnx.jit(mp.nnx.value_and_grad(lambda model, x: loss_of(model(x))))(model, ROWS)
    assert loss == expected[0]
    found = nnx.to_pure_dict(grads.params)
    jax.tree.map(np.testing.assert_array_equal, found, expected[1].params)


def test_products_of_a_float8_step_take_float8_operands():
    class Two(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(6, name="second")(nn.Dense(5, name="first")(x))

    model = mp.wrap(Two(), "float8_from_mixed_bfloat16")
    variables = model.init(KEY, ROWS)
    e4m3, e5m2 = "f8E4M3FN", "f8E5M2"
    # Of the input of the first layer no gradient is asked.
    expected = [(e4m3, e4m3)] * 2 + [(e4m3, e5m2)] * 2 + [(e5m2, e4m3)]
    assert operands_on_gpu(lambda v: gradients(model, v), variables) == sorted(expected)


def test_the_products_inside_attention_are_quantized_by_choice():
    variables, _ = in_float32("attention")

    def trained(**options: Any) -> tuple[Any, Any, Any]:
        policy = mp.QuantizedFloat8DTypePolicy("float8", "mixed_bfloat16", 4, **options)
        model = mp.wrap(LAYERS["attention"](), policy)
        own = mp.init_scaling(model, variables, ROWS)
        loss, grads = gradients(model, own)
        return policy, loss, grads.observed

    (_, plain, states), (policy, loss, observed) = trained(), trained(quantize_attention=True)
    products = {f"{p}_{o}" for p in ("scores", "output") for o in STATES["float8"]}
    assert set(observed) - set(states) == products
    assert all(observed[name] > 0 for name in products)
    assert loss != plain and abs(loss - plain) < BOUNDS["float8"] * plain

    model = nnx.eval_shape(lambda: NNX_LAYERS["attention"](nnx.Rngs(0)))
    params = nnx.state(model, nnx.Param)
    nnx.replace_by_pure_dict(params, variables["params"])
    nnx.update(model, params)
    model = mp.wrap(model, policy)
    found, grads = nnx.jit(mp.nnx.value_and_grad(lambda m, x: loss_of(m(x))))(model, ROWS)
    assert found == loss
    for name in products:
        assert grads.observed["scaling"][name].get_value() == observed[name]


def test_quantized_products_inside_attention_keep_the_mask():
    """Linen drops what the signature of an attention function does not name, the mask too."""
    policy = mp.QuantizedDTypePolicy("int8", "float32", quantize_attention=True)
    attention, causal = nn.MultiHeadDotProductAttention(2), nn.make_causal_mask(ROWS[..., 0])
    variables = attention.init(KEY, ROWS)
    masked = mp.wrap(attention, policy).apply(variables, ROWS, mask=causal)
    exact = attention.apply(variables, ROWS, mask=causal)
    without = attention.apply(variables, ROWS)
    # Four products of operands that are off by 2^-8 of their largest entry each.
    bound = 8 * 2**-8 * jnp.abs(exact).max()
    assert jnp.abs(masked - exact).max() < bound < jnp.abs(masked - without).max()

    other = nnx.MultiHeadAttention(2, ROWS.shape[-1], decode=False, rngs=nnx.Rngs(0))
    params = nnx.state(other, nnx.Param)
    nnx.replace_by_pure_dict(params, variables["params"])
    nnx.update(other, params)
    np.testing.assert_array_equal(mp.wrap(other, policy)(ROWS, mask=causal), masked)
