"""How fast is an int8 convolution, against float32 and against the libraries that have one?

Images [N, H, W, C] and kernels [kH, kW, C, O], Gaussian, padding SAME, on whatever backend JAX has.
Kernels are quantized beforehand with a scale per output channel and are arguments of the compiled
function; quantizing the images, a scale for each, is part of what is timed.

Peers, in the same process, called in turns with us: `jax.lax.conv_general_dilated` in float32 and
bfloat16, Qwix, AQT, Keras on the JAX backend, ONNX Runtime's dynamic int8 (on images that are
[N, C, H, W] to begin with). The JSON rows are those of `matmul.py`.

    python benchmarks/conv.py [--cases 3x3 ...] [--peers float32 ...] [--cold] [--quick]
"""

import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import mpjax_kernels as mk
from _contest import (
    BFLOAT16_BOUND,
    FLOAT32_BOUND,
    PER_TENSOR,
    Contender,
    Contest,
    Program,
    chosen,
    compiled,
)
from _onnx import dynamic_int8, session
from _suite import run, suite_parser

LAYOUT = ("NHWC", "HWIO", "NHWC")
# A scale per image follows the largest of 56 * 56 * 64 Gaussians, 4.6 standard deviations, one
# per output channel that of 576, 3.1: hypot(4.6, 3.1) / 127 / sqrt(12) = 0.0126.
INT8_BOUND = 0.014
NAMES = ("float32", "bfloat16", "qwix", "aqt", "keras_int8", "onnxruntime", "onnxruntime_float32")


@dataclass(frozen=True)
class Case:
    """A convolution with kernels of `size` by `size`; `groups == channels` is depthwise."""

    batch: int
    side: int
    channels: int
    features: int
    size: int
    groups: int = 1

    def __str__(self) -> str:
        kind = "depthwise " if self.groups > 1 else ""
        images = f"{self.batch}x{self.side}x{self.side}x{self.channels}"
        return f"{kind}{self.size}x{self.size} {images}->{self.features}"

    @property
    def kernel(self) -> tuple[int, int, int, int]:
        return self.size, self.size, self.channels // self.groups, self.features


def by_name(*cases: Case) -> dict[str, Case]:
    return {str(case): case for case in cases}


CASES = by_name(
    Case(8, 56, 64, 64, 3),
    Case(1, 56, 64, 64, 3),
    Case(8, 56, 64, 256, 1),
    Case(8, 56, 64, 64, 3, groups=64),
)
QUICK_CASES = by_name(Case(1, 14, 16, 16, 3), Case(1, 14, 16, 16, 3, groups=16))


def main(arguments: list[str] | None = None) -> None:
    options = suite_parser(__doc__, list(CASES), NAMES).parse_args(arguments)
    run("conv", options, CASES, QUICK_CASES, partial(contest, names=options.peers))


def contest(case: Case, names: list[str] | None = None) -> Contest:
    """The case with its data, and the peers of these names."""
    shapes = ((case.batch, case.side, case.side, case.channels), case.kernel)
    x, w = (
        np.asarray(jax.random.normal(jax.random.key(seed), shape))
        for seed, shape in enumerate(shapes)
    )
    w = w / np.float32(np.sqrt(np.prod(case.kernel[:3])))
    reference = np.asarray(convolve(case)(x, w, precision=jax.lax.Precision.HIGHEST))
    return Contest(
        facts={"case": str(case), "images": x.shape, "kernel": w.shape, "groups": case.groups},
        reference=reference,
        ours=Contender(partial(ours, case, x, w), INT8_BOUND, "mpjax"),
        peers=chosen(peers(case, x, w), names),
        operations=2 * reference.size * int(np.prod(case.kernel[:3])),
    )


def convolve(
    case: Case, function: Callable[..., Any] = jax.lax.conv_general_dilated
) -> Callable[..., Any]:
    """`function`, with the signature of `jax.lax.conv_general_dilated`, on this case."""
    numbers = jax.lax.conv_dimension_numbers((1, 1, 1, 1), (1, 1, 1, 1), LAYOUT)
    return partial(
        function,
        window_strides=(1, 1),
        padding="SAME",
        dimension_numbers=numbers,
        feature_group_count=case.groups,
    )


def ours(case: Case, x: np.ndarray, w: np.ndarray) -> Program:
    """`mk.conv_general_dilated` as a layer calls it."""
    product = convolve(case, mk.conv_general_dilated)
    weights = mk.quantize(w, "int8", axis=(0, 1, 2))
    return compiled(lambda x, w: product(mk.quantize(x, "int8", axis=(1, 2, 3)), w), x, weights)


def peers(case: Case, x: np.ndarray, w: np.ndarray) -> dict[str, Contender]:
    """Everyone else."""

    def contender(prepare: Callable[..., Program], bound: float, **rest: Any) -> Contender:
        return Contender(partial(prepare, case, x, w), bound, **rest)

    floats = "multiplies the int8 values in float32"
    onnx = {"package": "onnxruntime", "decode": lambda y: np.moveaxis(y, 1, -1)}
    dynamic = (
        "[N, C, H, W]; one scale for all images, one for the kernel: uint8, its fast path; "
        "int8 per output channel is several times slower"
    )
    return {
        "float32": contender(partial(plain, jnp.float32), FLOAT32_BOUND),
        "bfloat16": contender(partial(plain, jnp.bfloat16), BFLOAT16_BOUND),
        "qwix": contender(qwix, INT8_BOUND, package="qwix"),
        "aqt": contender(aqt, INT8_BOUND, package="aqtp", note=floats),
        "keras_int8": contender(keras, INT8_BOUND, package="keras"),
        "onnxruntime": contender(onnx_int8, INT8_BOUND * PER_TENSOR, note=dynamic, **onnx),
        "onnxruntime_float32": contender(onnx_float32, FLOAT32_BOUND, note="[N, C, H, W]", **onnx),
    }


def plain(dtype: Any, case: Case, x: np.ndarray, w: np.ndarray) -> Program:
    """`jax.lax.conv_general_dilated` in one dtype."""
    return compiled(convolve(case), jnp.asarray(x, dtype), jnp.asarray(w, dtype))


def qwix(case: Case, x: np.ndarray, w: np.ndarray) -> Program:
    """Qwix's public `quantize` and `conv_general_dilated`."""
    package = importlib.import_module("qwix")
    weights = package.quantize(jnp.asarray(w), "int8", channelwise_axes=[3])
    product = convolve(case, package.conv_general_dilated)
    return compiled(
        lambda x, w: product(package.quantize(x, "int8", channelwise_axes=[0]), w), x, weights
    )


def aqt(case: Case, x: np.ndarray, w: np.ndarray) -> Program:
    """AQT v2 with its kernel frozen, as its Flax layers serve it."""
    module = importlib.import_module("aqt.jax.v2.aqt_conv_general")
    settings = module.conv_general_dilated_make(2, 8, 8)
    product = convolve(case, module.make_conv_general_dilated_with_qt(settings))
    frozen = product(jnp.asarray(x), jnp.asarray(w))[1][1]
    # It insists on a float kernel beside the frozen one, and does not use it.
    return compiled(lambda x, q: product(x, jnp.zeros(w.shape), rhs_qt=q)[0], x, frozen)


def keras(case: Case, x: np.ndarray, w: np.ndarray) -> Program:
    """A convolution of Keras on the JAX backend after `.quantize("int8")`."""
    os.environ["KERAS_BACKEND"] = "jax"  # before its first import; Keras offers no other moment
    layers = importlib.import_module("keras").layers
    if case.groups > 1:
        layer = layers.DepthwiseConv2D(case.size, padding="same", use_bias=False)
        kernel = np.moveaxis(w, 2, 3)
    else:
        layer = layers.Conv2D(case.features, case.size, padding="same", use_bias=False)
        kernel = w
    layer.build(x.shape)
    layer.set_weights([kernel])
    layer.quantize("int8")
    trained = [variable.value for variable in layer.trainable_variables]
    others = [variable.value for variable in layer.non_trainable_variables]
    return compiled(lambda *state: layer.stateless_call(*state)[0], trained, others, x)


def onnx_int8(case: Case, x: np.ndarray, w: np.ndarray) -> Program:
    """DynamicQuantizeLinear and ConvInteger."""
    scale = np.float32(np.abs(w).max() / 127)
    values = (np.rint(w / scale) + 128).astype(np.uint8)
    return _onnx(partial(dynamic_int8, "ConvInteger"), case, x, values, scale)


def onnx_float32(case: Case, x: np.ndarray, w: np.ndarray) -> Program:
    """ONNX Runtime's float32 convolution."""

    def convolution(
        x: np.ndarray, w: np.ndarray, shape: tuple[int, ...], **attributes: Any
    ) -> Program:
        return session([("Conv", ["x", "w"], ["y"], attributes)], {"w": w}, x, shape)

    return _onnx(convolution, case, x, w)


def _onnx(
    make: Callable[..., Program], case: Case, x: np.ndarray, w: np.ndarray, *rest: Any
) -> Program:
    """Brings images to [N, C, H, W] and kernels to [O, C, kH, kW] beforehand."""
    shape = (case.batch, case.features, case.side, case.side)
    images = np.ascontiguousarray(np.moveaxis(x, -1, 1))
    kernel = np.ascontiguousarray(w.transpose(3, 2, 0, 1))
    pads = [case.size // 2] * 4
    return make(images, kernel, *rest, shape, pads=pads, group=case.groups)


if __name__ == "__main__":
    main()
