"""PyTorch as a peer: a `Linear` quantized by its `quantize_dynamic`, on the CPU.

PyTorch has a kernel library per quantized engine, and which is faster depends on the CPU: each
multiplies a few times, and the fastest is timed.
"""

import importlib
import math
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np

from _contest import Program
from _machine import cores
from _timing import seconds

ENGINES = ("x86", "fbgemm", "onednn")
TRIES = 20


def dynamic_int8(x: np.ndarray, w: np.ndarray) -> Program:
    """y = x @ w with x [M, K] and w [K, N] in float32, and weights in int8, a scale per output.

    Raises:
        NotImplementedError: If JAX does not run on a CPU, or no engine of PyTorch has the product.
    """
    if jax.default_backend() != "cpu":
        raise NotImplementedError("PyTorch's dynamic int8 is compared on CPUs only")
    torch = importlib.import_module("torch")
    torch.set_num_threads(cores())
    started = time.perf_counter()
    layers = [_quantized(torch, name, w) for name in _engines(torch)]
    elapsed = time.perf_counter() - started
    if not layers:
        raise NotImplementedError(f"this PyTorch has none of the engines {', '.join(ENGINES)}")
    data = torch.from_numpy(np.array(x))
    calls = [partial(_call, torch, layer, data) for layer in layers]
    return Program(
        run=min(calls, key=_fastest),
        compile_seconds=elapsed / len(layers),
        bytes=w.size + 4 * w.shape[1] + x.nbytes + 4 * len(x) * w.shape[1],
    )


def _engines(torch: Any) -> list[str]:
    return [name for name in ENGINES if name in torch.backends.quantized.supported_engines]


def _quantized(torch: Any, engine: str, w: np.ndarray) -> Any:
    """The layer with its weights laid out for an engine."""
    torch.backends.quantized.engine = engine
    linear = torch.nn.Linear(*w.shape, bias=False)
    linear.weight = torch.nn.Parameter(torch.from_numpy(np.ascontiguousarray(w.T)))
    with warnings.catch_warnings():  # that torchao is to replace it, which has no such CPU kernels
        warnings.simplefilter("ignore")
        quantization = torch.ao.quantization
        how = {torch.nn.Linear: quantization.per_channel_dynamic_qconfig}
        model = quantization.quantize_dynamic(torch.nn.Sequential(linear), how, torch.qint8)
    return model[0]


def _call(torch: Any, layer: Any, x: Any) -> Any:
    with torch.inference_mode():
        return layer(x)


def _fastest(call: Callable[[], Any]) -> float:
    """Seconds of the best of several calls, or infinity if the engine refuses."""
    try:
        return min(seconds(call) for _ in range(TRIES))
    except RuntimeError:
        return math.inf
