"""Three steps of SGD in the other modes that train, worked out in NumPy.

`int8_delayed`, `int8_static` and `float8/row`; `float8` itself is in `test_scaling.py`.
"""

from typing import Any

import flax.linen as nn
import ml_dtypes
import numpy as np
import optax
import pytest
from flax import nnx
from scaling_helpers import LOOPS, mean_squared_error

import mpjax as mp

RATE = 0.05
MODULES = {"linen": nn.Dense(6), "nnx": lambda rngs: nnx.Linear(5, 6, rngs=rngs)}
POLICIES = {
    "int8_delayed": mp.QuantizedDTypePolicy("int8_delayed", "float32", amax_history_length=2),
    "int8_static": mp.QuantizedDTypePolicy("int8_static", "float32"),
    "float8/row": mp.QuantizedFloat8DTypePolicy("float8/row", "float32"),
}
FORMATS: dict[str, tuple[float, Any]] = {
    "int8": (127, np.rint),
    "e4m3": (448, lambda x: x.astype(ml_dtypes.float8_e4m3fn).astype(np.float32)),
    "e5m2": (57344, lambda x: x.astype(ml_dtypes.float8_e5m2).astype(np.float32)),
}


def quantized(x, format, axis=None, scale=None):
    """Values as float32 and their scale, that given or the one from the amaxes along `axis`."""
    largest, rounded = FORMATS[format]
    if not scale:
        scale = np.max(np.abs(x), axis=axis, keepdims=axis is not None) / np.float32(largest)
    return rounded(np.clip(x / scale, -largest, largest)).astype(np.float32), scale


def int8_step(x, kernel, scales, per_channel):
    """Output, and the gradient of the kernel as a function of that of the output."""
    x_q, x_s = quantized(x, "int8", scale=scales.get("input"))
    w_q, w_s = quantized(kernel, "int8", 0 if per_channel else None, scales.get("kernel"))
    return (x_q @ w_q) * (x_s * w_s), lambda g: (x_q * x_s).T @ g


def row_step(x, kernel, scales):
    """The same; the scale of a row of `x` multiplies that row of the gradient."""
    assert not scales
    x_q, x_s = quantized(x, "e4m3", 1)
    w_q, w_s = quantized(kernel, "e4m3", 0)

    def kernel_gradient(g):
        g_q, g_s = quantized(g * x_s, "e5m2", 0)
        return (x_q.T @ g_q) * g_s

    return (x_q @ w_q) * x_s * w_s, kernel_gradient


def by_hand(mode, params, batches):
    """The parameters after each step, and the histories and scales of the states."""
    params, histories, scales = dict(params), {}, {}
    for x, target in batches:
        if mode == "float8/row":
            product, kernel_gradient = row_step(x, params["kernel"], scales)
        else:
            per_channel = mode == "int8_static"
            product, kernel_gradient = int8_step(x, params["kernel"], scales, per_channel)
        g = np.float32(2 / target.size) * (product + params["bias"] - target)
        if mode == "int8_static":
            scales.setdefault("input", np.max(np.abs(x)) / np.float32(127))
        elif mode == "int8_delayed":
            for name, of in (("input", x), ("kernel", params["kernel"])):
                history = np.roll(histories.get(name, np.zeros(2, np.float32)), -1)
                history[0] = np.max(np.abs(of))
                histories[name], scales[name] = history, history.max() / np.float32(127)
        params["kernel"] = params["kernel"] - np.float32(RATE) * kernel_gradient(g)
        params["bias"] = params["bias"] - np.float32(RATE) * g.sum(0)
        yield params, histories, scales


@pytest.mark.parametrize("api", list(LOOPS))
@pytest.mark.parametrize("mode", list(POLICIES))
def test_three_steps_are_those_worked_out_by_hand(api, mode):
    """Inputs grow, so that scales known before clip, and shrink, so that a history drops them."""
    policy = POLICIES[mode]
    generator = np.random.default_rng(0)
    batches = [
        tuple(size * generator.standard_normal((4, n), np.float32) for n in (5, 6))
        for size in (1, 3, 0.5)
    ]
    loop = LOOPS[api](MODULES[api], policy, optax.sgd(RATE), batches[0][0])
    steps = by_hand(mode, {name: np.asarray(x) for name, x in loop.params.items()}, batches)
    for batch, (params, histories, scales) in zip(batches, steps, strict=True):
        loop.step(*batch, loss=mean_squared_error)
        states = loop.states
        assert set(states) == set(scales)
        for name, scale in scales.items():
            np.testing.assert_allclose(states[name].scale, scale, rtol=1e-6)
        for name, history in histories.items():
            np.testing.assert_allclose(states[name].amax_history, history, rtol=1e-6)
        for name, param in params.items():
            np.testing.assert_allclose(loop.params[name], param, rtol=1e-5, atol=1e-7)
