"""The peers of `matmul.py`: each in the form that its documentation recommends for inference.

Weights are quantized beforehand where the peer has a form for that, activations at every call.
Packages are imported by name when a peer is prepared, so that one that is missing is an entry
with its error.
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
    Program,
    compiled,
)
from _onnx import dynamic_int8, session
from _torch import dynamic_int8 as torch_int8

AXES = (((1,), (0,)), ((), ()))


@dataclass(frozen=True)
class Format:
    """How both sides of a product are held.

    Attributes:
        weights: The format of the weights, a scale per output channel and group.
        activations: The format of the activations, a scale per row; None leaves them in bfloat16,
            and the result too.
        group_size: How many inputs share a scale; None is all.
        bound: The largest relative mean absolute error of a product of Gaussians, K = 4096.
    """

    weights: str
    activations: str | None
    group_size: int | None
    bound: float

    @property
    def dtype(self) -> Any:
        return jnp.float32 if self.activations else jnp.bfloat16


FORMATS = {
    "w8a8": Format("int8", "int8", None, 0.014),
    "float8": Format("float8_e4m3fn", "float8_e4m3fn", None, 0.038),
    "w8a16": Format("int8", None, None, 0.010),
    "w4a16": Format("int4", None, 128, 0.12),
    "w4a8": Format("int4", "int8", 128, 0.121),  # sqrt(0.12**2 + 0.010**2)
}

Data = tuple[np.ndarray, np.ndarray]  # x [M, K] and w [K, N], float32


def peers(name: str, data: Data) -> dict[str, Contender]:
    """Who computes a product in this format."""
    fmt = FORMATS[name]

    def contender(
        prepare: Callable[..., Program], package: str, note: str = "", loose: float = 1.0
    ) -> Contender:
        return Contender(partial(prepare, fmt, *data), round(fmt.bound * loose, 4), package, note)

    known = {
        "float32": Contender(partial(plain, jnp.float32, *data), FLOAT32_BOUND),
        "bfloat16": Contender(partial(plain, jnp.bfloat16, *data), BFLOAT16_BOUND),
        "qwix": contender(qwix, "qwix"),
    }
    if name in ("w8a8", "float8", "w8a16"):
        known["aqt"] = contender(aqt, "aqtp")
    if name == "float8":
        known["mpjax_xla"] = contender(partial(ours, implementation="xla"), "mpjax", "our own form")
        note = "delayed scales per tensor; quantizes its float32 weights at every call"
        known["flax_float8"] = contender(flax_float8, "flax", note, PER_TENSOR)
        known["keras_float8"] = contender(keras, "keras", note, PER_TENSOR)
    if name in ("w8a8", "w8a16"):
        known["keras_int8"] = contender(keras, "keras")
    if name == "w8a8":
        note = "one scale and zero point for all activations; float32 in and out"
        known["onnxruntime"] = contender(onnx_int8, "onnxruntime", note, PER_TENSOR)
        note = "one scale and zero point for all activations, in 7 bits; the fastest of its engines"
        bound = round(fmt.bound * 2 * PER_TENSOR, 4)
        known["pytorch"] = Contender(partial(torch_int8, *data), bound, "torch", note)
    if fmt.weights == "int4":
        how = "float32 activations" if name == "w4a16" else "activations in blocks of 128"
        known["onnxruntime"] = contender(onnx_int4, "onnxruntime", f"MatMulNBits, {how}")
    known["onnxruntime_float32"] = Contender(
        partial(onnx_float32, *data), FLOAT32_BOUND, "onnxruntime"
    )
    return known


NAMES = ("float32", "bfloat16", "qwix", "aqt", "flax_float8", "keras_float8", "keras_int8")
NAMES += ("onnxruntime", "onnxruntime_float32", "pytorch", "mpjax_xla")


def ours(fmt: Format, x: np.ndarray, w: np.ndarray, implementation: str | None = None) -> Program:
    """A product as a layer calls it, its weights stored once for every M: [N, K], w8a8 packed."""
    weights = mk.quantize(jnp.asarray(w, fmt.dtype), fmt.weights, axis=0, group_size=fmt.group_size)
    is_packed = fmt.weights == fmt.activations == "int8"
    weights = (mk.prepacked if is_packed else mk.contiguous)(weights, axis=0)

    def product(x: jax.Array, w: mk.QTensor) -> jax.Array:
        if fmt.activations is None:
            return mk.matmul(x, w, implementation=implementation)
        return mk.quantized_matmul(x, w, fmt.activations, implementation=implementation)

    return compiled(product, jnp.asarray(x, fmt.dtype), weights)


def plain(dtype: Any, x: np.ndarray, w: np.ndarray) -> Program:
    """`jnp.matmul` in one dtype."""
    return compiled(jnp.matmul, jnp.asarray(x, dtype), jnp.asarray(w, dtype))


def qwix(fmt: Format, x: np.ndarray, w: np.ndarray) -> Program:
    """Qwix's public `quantize` and `dot_general`, which its models run on."""
    package = importlib.import_module("qwix")
    tiles = {0: fmt.group_size} if fmt.group_size else None
    weights = package.quantize(
        jnp.asarray(w, fmt.dtype), fmt.weights, channelwise_axes=[1], tiled_axes=tiles
    )

    def product(x: jax.Array, w: Any) -> jax.Array:
        if fmt.activations:
            x = package.quantize(x, fmt.activations, channelwise_axes=[0])
        return package.dot_general(x, w, AXES)

    return compiled(product, jnp.asarray(x, fmt.dtype), weights)


def aqt(fmt: Format, x: np.ndarray, w: np.ndarray) -> Program:
    """AQT v2 with its weights frozen, as its Flax layers serve them."""
    config = importlib.import_module("aqt.jax.v2.config")
    if fmt.activations == "float8_e4m3fn":
        settings = config.config_fwd_fp8("e4m3")
    else:
        settings = config.config_v4(fwd_bits=8, dlhs_bits=None, drhs_bits=None)
    if fmt.activations is None:
        settings = config.set_bits(settings, None, 8, None, None, None, None)
    activations, weights = jnp.asarray(x, fmt.dtype), jnp.asarray(w, fmt.dtype)
    frozen = settings.dg_core(activations, weights, None, None, AXES)[1][1]

    def product(x: jax.Array, frozen: Any) -> jax.Array:
        # It insists on float weights beside the frozen ones, and does not use them.
        unused = jnp.zeros(frozen.qvalue.shape, x.dtype)
        return settings.dg_core(x, unused, None, frozen, AXES)[0]

    return compiled(product, activations, frozen)


def flax_float8(fmt: Format, x: np.ndarray, w: np.ndarray) -> Program:
    """Flax's current float8 operation in a Dense, with the amax history of these operands."""
    linen = importlib.import_module("flax.linen")
    op = importlib.import_module("flax.linen.fp8_ops").Fp8DirectDotGeneralOp
    layer = linen.Dense(w.shape[1], use_bias=False, dtype=fmt.dtype, dot_general_cls=op)
    variables = jax.eval_shape(layer.init, jax.random.key(0), x)
    (name,) = variables["_overwrite_with_gradient"]
    largest = {"input_amax_history": np.abs(x).max(), "kernel_amax_history": np.abs(w).max()}
    state = {
        key: jnp.full(each.shape, largest.get(key, 1.0), each.dtype)
        for key, each in variables["_overwrite_with_gradient"][name].items()
    }
    variables = {"params": {"kernel": w}, "_overwrite_with_gradient": {name: state}}
    return compiled(layer.apply, variables, jnp.asarray(x, fmt.dtype))


def keras(fmt: Format, x: np.ndarray, w: np.ndarray) -> Program:
    """A Dense of Keras on the JAX backend after `.quantize(...)`."""
    os.environ["KERAS_BACKEND"] = "jax"  # before its first import; Keras offers no other moment
    package = importlib.import_module("keras")
    layer = package.layers.Dense(w.shape[1], use_bias=False, dtype=jnp.dtype(fmt.dtype).name)
    layer.build((None, w.shape[0]))
    layer.set_weights([w])
    if fmt.activations == "float8_e4m3fn":
        layer.quantize("float8")
        _set_float8_scales(layer, x, w)
    elif fmt.activations:
        layer.quantize("int8")
    else:
        weight_only = package.quantizers.Int8QuantizationConfig(activation_quantizer=None)
        layer.quantize("int8", config=weight_only)
    trained = [variable.value for variable in layer.trainable_variables]
    others = [variable.value for variable in layer.non_trainable_variables]

    def product(trained: Any, others: Any, x: jax.Array) -> jax.Array:
        return layer.stateless_call(trained, others, x)[0]

    return compiled(product, trained, others, jnp.asarray(x, fmt.dtype))


def onnx_int8(fmt: Format, x: np.ndarray, w: np.ndarray) -> Program:
    """DynamicQuantizeLinear and MatMulInteger, the weights per output channel."""
    scale = np.abs(w).max(axis=0) / np.float32(127)
    values = np.rint(w / scale).astype(np.int8)
    return dynamic_int8("MatMulInteger", x, values, scale, (len(x), w.shape[1]))


def onnx_int4(fmt: Format, x: np.ndarray, w: np.ndarray) -> Program:
    """MatMulNBits: uint4 weights about 8, a scale per group."""
    (k, n), size = w.shape, fmt.group_size or len(w)
    groups = w.T.reshape(n, k // size, size)
    scale = np.abs(groups).max(axis=-1, keepdims=True) / np.float32(7)
    values = np.rint(groups / scale).astype(np.int8) + 8
    packed = (values[..., 0::2] | values[..., 1::2] << 4).astype(np.uint8)
    accuracy = 4 if fmt.activations else 1  # int8 or float32 activations
    sizes = {"K": k, "N": n, "bits": 4, "block_size": size, "accuracy_level": accuracy}
    nodes = [("MatMulNBits", ["x", "w", "scale"], ["y"], sizes)]
    return session(nodes, {"w": packed, "scale": scale.reshape(-1)}, x, (len(x), n))


def onnx_float32(x: np.ndarray, w: np.ndarray) -> Program:
    """ONNX Runtime's float32 product."""
    return session([("MatMul", ["x", "w"], ["y"], {})], {"w": w}, x, (len(x), w.shape[1]))


def _set_float8_scales(layer: Any, x: np.ndarray, w: np.ndarray) -> None:
    """Gives the layer the scales of these operands, as training would have."""
    largest = float(jnp.finfo(jnp.float8_e4m3fn).max)
    layer.inputs_scale.assign(np.abs(x).max() / largest)
    layer.kernel_scale.assign(np.abs(w).max() / largest)
