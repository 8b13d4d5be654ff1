"""The same BERT as an ONNX graph, for ONNX Runtime: the peer.

The graph is built node by node from the weights as they were published, by their PyTorch names, and
not from the parameters of our model: that both agree checks either. ONNX Runtime fuses its nodes as
it sees fit. Its dynamic int8 is what its own `quantize_dynamic` makes of the float32 graph.
"""

# ONNX comes with the extra `encoder`, which a check of types does without.
# pyright: reportMissingImports=false

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from bert import EPSILON, Shape
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import quantize_dynamic

OPSET, IR_VERSION = 17, 10  # LayerNormalization is in 17; said, as onnx's own may be too new


class Graph:
    """Nodes and weights as they are added; a value is known by its name."""

    def __init__(self, tensors: Mapping[str, np.ndarray]):
        self._tensors = tensors
        self._nodes: list[onnx.NodeProto] = []
        self._weights: dict[str, np.ndarray] = {}

    def add(self, op: str, *inputs: str, **attributes: Any) -> str:
        """Adds a node with one output; returns the name of that."""
        name = f"{op}_{len(self._nodes)}"
        self._nodes.append(helper.make_node(op, inputs, [name], name=name, **attributes))
        return name

    def tensor(self, name: str) -> str:
        """A published tensor."""
        self._weights[name] = self._tensors[name]
        return name

    def constant(self, values: Any, dtype: Any) -> str:
        """A small array."""
        name = f"constant_{len(self._weights)}"
        self._weights[name] = np.array(values, dtype)
        return name

    def dense(self, x: str, name: str) -> str:
        """`x @ weight.T + bias`; the weight is stored as MatMul takes it."""
        weight = f"{name}.weight_transposed"
        self._weights[weight] = np.ascontiguousarray(self._tensors[f"{name}.weight"].T)
        return self.add("Add", self.add("MatMul", x, weight), self.tensor(f"{name}.bias"))

    def norm(self, x: str, name: str) -> str:
        """A layer norm over the last axis."""
        scale, bias = self.tensor(f"{name}.weight"), self.tensor(f"{name}.bias")
        return self.add("LayerNormalization", x, scale, bias, axis=-1, epsilon=EPSILON)

    def model(self, output: str, width: int) -> onnx.ModelProto:
        """The graph from `tokens` and `mask` to a value, named `embedding`."""
        self._nodes.append(helper.make_node("Identity", [output], ["embedding"]))
        value = helper.make_tensor_value_info
        graph = helper.make_graph(
            self._nodes,
            "sentence_encoder",
            [
                value("tokens", TensorProto.INT32, ["batch", "length"]),
                value("mask", TensorProto.BOOL, ["batch", "length"]),
            ],
            [value("embedding", TensorProto.FLOAT, ["batch", width])],
            [numpy_helper.from_array(array, name) for name, array in self._weights.items()],
        )
        opsets = [helper.make_opsetid("", OPSET)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION)


def build(tensors: Mapping[str, np.ndarray], shape: Shape) -> onnx.ModelProto:
    """The graph of a BERT, from tokens and mask [B, T] to unit vectors [B, width]."""
    graph = Graph(tensors)
    x = _embed(graph)
    mask = graph.add("Cast", "mask", to=TensorProto.FLOAT)
    hidden = graph.add("Sub", graph.constant(1, np.float32), mask)
    lowest = graph.constant(np.finfo(np.float32).min, np.float32)
    axes = graph.constant([1, 2], np.int64)
    bias = graph.add("Unsqueeze", graph.add("Mul", hidden, lowest), axes)  # [B, 1, 1, T]
    for i in range(shape.depth):
        layer = f"encoder.layer.{i}"
        attended = _attention(graph, x, bias, f"{layer}.attention", shape)
        x = graph.norm(graph.add("Add", x, attended), f"{layer}.attention.output.LayerNorm")
        inner = _gelu(graph, graph.dense(x, f"{layer}.intermediate.dense"))
        out = graph.dense(inner, f"{layer}.output.dense")
        x = graph.norm(graph.add("Add", x, out), f"{layer}.output.LayerNorm")
    return graph.model(_mean(graph, x, mask), shape.width)


def _embed(graph: Graph) -> str:
    words, positions, types = (
        graph.tensor(f"embeddings.{name}_embeddings.weight")
        for name in ("word", "position", "token_type")
    )
    zero, axis = graph.constant([0], np.int64), graph.constant([0], np.int64)
    length = graph.add("Shape", "tokens", start=1, end=2)
    x = graph.add("Add", graph.add("Gather", words, "tokens"), graph.add("Gather", types, zero))
    x = graph.add("Add", x, graph.add("Slice", positions, zero, length, axis))
    return graph.norm(x, "embeddings.LayerNorm")


def _attention(graph: Graph, x: str, bias: str, name: str, shape: Shape) -> str:
    depth = shape.width // shape.heads
    split = graph.constant([0, 0, shape.heads, depth], np.int64)  # 0: as it is

    def heads(which: str, axes: list[int]) -> str:
        cut = graph.add("Reshape", graph.dense(x, f"{name}.self.{which}"), split)
        return graph.add("Transpose", cut, perm=axes)

    query, key = heads("query", [0, 2, 1, 3]), heads("key", [0, 2, 3, 1])
    scores = graph.add("MatMul", query, key)
    scores = graph.add("Div", scores, graph.constant(depth**0.5, np.float32))
    weights = graph.add("Softmax", graph.add("Add", scores, bias), axis=-1)
    mixed = graph.add("MatMul", weights, heads("value", [0, 2, 1, 3]))
    joined = graph.add("Transpose", mixed, perm=[0, 2, 1, 3])
    joined = graph.add("Reshape", joined, graph.constant([0, 0, shape.width], np.int64))
    return graph.dense(joined, f"{name}.output.dense")


def _gelu(graph: Graph, x: str) -> str:
    """`x * (1 + erf(x / sqrt(2))) / 2`."""
    erf = graph.add("Erf", graph.add("Div", x, graph.constant(2**0.5, np.float32)))
    product = graph.add("Mul", x, graph.add("Add", erf, graph.constant(1, np.float32)))
    return graph.add("Mul", product, graph.constant(0.5, np.float32))


def _mean(graph: Graph, x: str, mask: str) -> str:
    """The mean over the tokens of a sentence; its length does not matter, as it becomes 1."""
    masked = graph.add("Mul", x, graph.add("Unsqueeze", mask, graph.constant([2], np.int64)))
    total = graph.add("ReduceSum", masked, graph.constant([1], np.int64), keepdims=0)
    return graph.add("Div", total, graph.add("ReduceL2", total, axes=[1], keepdims=1))


def quantized(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model after `quantize_dynamic` with its defaults: int8 tables and MatMuls."""
    with tempfile.TemporaryDirectory() as folder:
        before, after = Path(folder) / "float32.onnx", Path(folder) / "int8.onnx"
        onnx.save(model, before)
        quantize_dynamic(before, after)
        return onnx.load(after)


def weight_bytes(model: onnx.ModelProto) -> int:
    """Bytes of all weights, scales and zero points included."""
    return sum(numpy_helper.to_array(each).nbytes for each in model.graph.initializer)


def session(model: onnx.ModelProto, threads: int) -> onnxruntime.InferenceSession:
    """The model, ready to run on the CPU."""
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(
        model.SerializeToString(), settings, providers=["CPUExecutionProvider"]
    )
