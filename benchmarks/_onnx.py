"""ONNX Runtime as a peer: a graph of a few nodes, its weights inside, in a session on the CPU.

Weights are initializers, as in every deployed model: ONNX Runtime lays them out for its kernels
when the session is made, which is therefore what counts as compiling.
"""

import importlib
import time
from typing import Any

import jax
import numpy as np

from _contest import Program
from _machine import cores

OPSETS = (("", 21), ("com.microsoft", 1))


def session(
    nodes: list[tuple], weights: dict[str, np.ndarray], x: np.ndarray, out_shape: tuple[int, ...]
) -> Program:
    """The program of a graph from `x` to `y`, both float32.

    Args:
        nodes: Of each its type, the names of its inputs and outputs, and its attributes.
        weights: The initializers by name.
        x: The input.
        out_shape: The shape of `y`.
    """
    if jax.default_backend() != "cpu":
        raise NotImplementedError("ONNX Runtime is compared on CPUs only")
    onnxruntime = importlib.import_module("onnxruntime")
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = cores()
    model = _model(nodes, weights, x.shape, out_shape)
    started = time.perf_counter()
    loaded = onnxruntime.InferenceSession(model, settings, providers=["CPUExecutionProvider"])
    elapsed = time.perf_counter() - started
    return Program(
        run=lambda: loaded.run(None, {"x": x})[0],
        compile_seconds=elapsed,
        bytes=sum(w.nbytes for w in weights.values()) + x.nbytes + 4 * int(np.prod(out_shape)),
    )


def dynamic_int8(
    op: str, x: np.ndarray, values: np.ndarray, scale: np.ndarray, shape: tuple, **attributes: Any
) -> Program:
    """What `quantize_dynamic` makes of a layer, with the weights quantized beforehand.

    DynamicQuantizeLinear gives `x` one scale and zero point per call; `op` is MatMulInteger or
    ConvInteger, which sum in int32.

    Args:
        values: Weights in int8, or in uint8 with the zero point 128.
        scale: Their scale, of a shape that multiplies the result.
    """
    zero = np.array(128 if values.dtype == np.uint8 else 0, values.dtype)
    nodes = [
        ("DynamicQuantizeLinear", ["x"], ["xq", "x_scale", "x_zero"], {}),
        (op, ["xq", "w", "x_zero", "w_zero"], ["sum"], attributes),
        ("Cast", ["sum"], ["float_sum"], {"to": 1}),
        ("Mul", ["x_scale", "w_scale"], ["scale"], {}),
        ("Mul", ["float_sum", "scale"], ["y"], {}),
    ]
    return session(nodes, {"w": values, "w_scale": scale, "w_zero": zero}, x, shape)


def _model(
    nodes: list[tuple], weights: dict[str, np.ndarray], shape: tuple, out_shape: tuple
) -> bytes:
    helper = importlib.import_module("onnx.helper")
    from_array = importlib.import_module("onnx.numpy_helper").from_array
    float32 = importlib.import_module("onnx").TensorProto.FLOAT
    graph = helper.make_graph(
        [
            helper.make_node(op, inputs, outputs, domain=_domain(op), **attributes)
            for op, inputs, outputs, attributes in nodes
        ],
        "case",
        [helper.make_tensor_value_info("x", float32, shape)],
        [helper.make_tensor_value_info("y", float32, out_shape)],
        [from_array(value, name) for name, value in weights.items()],
    )
    opsets = [helper.make_opsetid(domain, number) for domain, number in OPSETS]
    # Newer than what the installed ONNX Runtime reads, if it is not said.
    return helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()


def _domain(op: str) -> str:
    return "com.microsoft" if op == "MatMulNBits" else ""
