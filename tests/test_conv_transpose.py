"""ConvTranspose: stored in 8 bits and trained in 8 bits, in Linen and NNX alike."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import mpjax as mp
import mpjax_kernels as mk
from tests.helpers import assert_trees_equal, equations

OTHERS = ("int8_weight_only", "float8_current")
KEY = jax.random.key(0)
# Window, strides, padding, dilation, whether the kernel is that of the convolution.
SETTINGS = [
    ((3,), (2,), "SAME", None, False),
    ((3,), (2,), "SAME", None, True),
    ((3, 2), (2, 1), "VALID", (1, 2), False),
    ((2,), (3,), "SAME", None, False),
    ((4,), (2,), "VALID", None, True),
    ((3, 2), (1, 2), [(1, 2), (0, 1)], None, True),
    ((3, 3), 2, 1, None, False),
]
SLOW = [pytest.param(each, marks=pytest.mark.slow) for each in SETTINGS[3:]]


def layers(settings, policy):
    """The wrapped Linen and NNX layer and the plain Linen one, of the same weights."""
    window, strides, padding, dilation, transpose = settings
    options = {
        "strides": strides,
        "padding": padding,
        "kernel_dilation": dilation,
        "transpose_kernel": transpose,
    }
    plain = nn.ConvTranspose(8, window, **options)
    x = jax.random.normal(KEY, (2, *(5, 4)[: len(window)], 4))
    variables = plain.init(KEY, x)
    variables = {"params": {**variables["params"], "bias": jnp.linspace(-1, 1, 8)}}
    layer = nnx.ConvTranspose(4, 8, window, **options, rngs=nnx.Rngs(0))
    layer.kernel[...], layer.bias[...] = variables["params"]["kernel"], jnp.linspace(-1, 1, 8)
    return mp.wrap(plain, policy), mp.wrap(layer, policy), plain, variables, x


@pytest.mark.parametrize("settings", SETTINGS[:3] + SLOW)
def test_stored_in_int8(settings):
    model, layer, plain, variables, x = layers(settings, "int8_from_float32")
    quantized, report = mp.quantize(model, variables, x, return_report=True)
    q = quantized["params"]["kernel"]
    rank, transpose = len(settings[0]), settings[-1]
    scales = (8, 1) if transpose else (1, 8)
    assert q.scale.shape == (1,) * rank + scales and report.weights[0].dtype == "int8"
    # By the dequantized operands, as Flax convolves them: only the sums in float32 differ.
    axes = tuple(range(1, x.ndim))
    operands = mk.dequantize(mk.quantize(x, "int8", axis=axes)), mk.dequantize(q)
    expected = plain.apply(
        {"params": {"kernel": operands[1], "bias": jnp.linspace(-1, 1, 8)}}, operands[0]
    )
    y = jax.jit(model.apply)(quantized, x)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(jax.jit(model.apply)(variables, x), y)
    mp.quantize(layer)
    assert_trees_equal(layer.kernel.get_raw_value(), q)
    np.testing.assert_array_equal(nnx.jit(lambda m, x: m(x))(layer, x), y)


@pytest.mark.parametrize(
    "mode", ["float8/row", *(pytest.param(m, marks=pytest.mark.slow) for m in OTHERS)]
)
def test_other_modes_and_other_batches(mode):
    model, layer, _, variables, x = layers(SETTINGS[1], f"{mode}_from_mixed_bfloat16")
    quantized = mp.quantize(model, variables, x)
    mp.quantize(layer)
    y = model.apply(quantized, x)
    assert y.dtype == jnp.bfloat16
    exact = np.asarray(mp.unwrap(model).apply(variables, x))
    assert np.abs(np.asarray(y, np.float32) - exact).max() < 0.1 * np.abs(exact).max()
    for batch in ((), (2, 1)):
        some = x[0] if batch == () else x.reshape(2, 1, *x.shape[1:])
        z = model.apply(quantized, some)
        np.testing.assert_array_equal(np.asarray(layer(some)), np.asarray(z))
        if mode != "float8_current":  # whose scale is that of all images
            np.testing.assert_allclose(
                np.asarray(z.reshape(-1, *y.shape[1:]), np.float32)[0],
                np.asarray(y[0], np.float32),
                atol=2**-7 * np.abs(exact).max(),
            )


def test_the_program_multiplies_int8():
    model, _, _, variables, x = layers(SETTINGS[2], "int8_from_float32")
    quantized = mp.quantize(model, variables, x)
    jaxpr = jax.make_jaxpr(lambda v, x: model.apply(v, x))(quantized, x).jaxpr
    (conv,) = [e for e in equations(jaxpr) if e.primitive.name == "conv_general_dilated"]
    assert [v.aval.dtype for v in conv.invars] == [jnp.int8, jnp.int8]


@pytest.mark.parametrize("mode", ["int8", "float8"])
def test_it_trains(mode):
    model, layer, plain, variables, x = layers(SETTINGS[1], f"{mode}_from_float32")
    if mode == "float8":
        variables = mp.init_scaling(model, variables, x)

    def loss(apply):
        return lambda variables: jnp.sum(apply(variables, x) ** 2)

    _, grads = mp.value_and_grad(loss(model.apply))(variables)
    exact = jax.grad(loss(plain.apply))({"params": variables["params"]})["params"]
    for name, grad in grads.params.items():
        error = np.abs(np.asarray(grad) - exact[name]).max() / np.abs(exact[name]).max()
        assert 0 < error < {"int8": 0.03, "float8": 0.15}[mode], name
    _, from_nnx = mp.nnx.value_and_grad(lambda m: jnp.sum(m(x) ** 2))(layer)
    np.testing.assert_array_equal(from_nnx.params["kernel"].get_value(), grads.params["kernel"])
    if mode == "float8":
        observed = jax.tree.leaves(grads.observed)
        assert_trees_equal(jax.tree.leaves(from_nnx.observed), observed)


class Local(nn.Module):
    """Layers that no 8-bit product is written for."""

    @nn.compact
    def __call__(self, x):
        x = nn.ConvLocal(4, (3,), name="local")(x)
        x = nn.ConvTranspose(4, (3,), padding="CIRCULAR", name="circular")(x)
        x = nn.ConvTranspose(4, (3,), mask=jnp.ones((3, 4, 4)), name="masked")(x)
        return nn.Dense(4, name="dense")(x)


def test_those_that_stay_floats_are_listed():
    model, x = mp.wrap(Local(), "int8_from_float32"), jax.random.normal(KEY, (2, 6, 4))
    variables = model.init(KEY, x)
    quantized, report = mp.quantize(model, variables, x, return_report=True)
    assert {each.path: each.reason for each in report.left} == {
        f"params/{name}/kernel": "its layer multiplies it in no product that can be quantized"
        for name in ("local", "circular", "masked")
    }
    float_ones = {n: p for n, p in quantized["params"].items() if n != "dense"}
    assert_trees_equal(float_ones, {n: variables["params"][n] for n in float_ones})
    circular = nnx.ConvTranspose(4, 4, (3,), padding="CIRCULAR", rngs=nnx.Rngs(0))
    both = mp.wrap(nnx.Sequential(circular, nnx.Linear(4, 4, rngs=nnx.Rngs(0))), model.policy)
    _, report = mp.quantize(both, return_report=True)
    assert [each.path for each in report.left] == ["layers/0/kernel"]
