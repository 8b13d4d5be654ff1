"""The contenders of `gpu_matmul.py`: bfloat16 activations [M, K] and results, weights [K, N].

Weights are quantized beforehand, and are stored [N, K]. Who is called a product has its
activations quantized beforehand as well: what is left is the product, and its scales.
Packages are imported by name when a peer is prepared.
"""

import importlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import mpjax_kernels as mk
from _contest import BFLOAT16_BOUND, PER_TENSOR, Contender, Program, compiled
from _matmul_peers import FORMATS, Format, flax_float8, plain, qwix

COMPARED_ROWS = 256
INT8, FLOAT8 = FORMATS["w8a8"], FORMATS["float8"]


@dataclass(frozen=True)
class In16Bits(Format):
    """A format whose activations come in bfloat16, and leave in it."""

    @property
    def dtype(self) -> Any:
        return jnp.bfloat16


def in_16_bits(fmt: Format) -> In16Bits:
    return In16Bits(fmt.weights, fmt.activations, fmt.group_size, fmt.bound)


# Ours: formats, the axes that share a scale (None: all), whether the activations are quantized.
LAYERS = {
    "float8_tensor": (FLOAT8, "tensor"),
    "float8_row": (FLOAT8, "row"),
    "int8_row": (INT8, "row"),
}
WEIGHT_ONLY = {
    "int8_weights": FORMATS["w8a16"],
    "int4_weights": FORMATS["w4a16"],
    "float8_weights": Format("float8_e4m3fn", None, None, 0.028),
}
OURS = (*LAYERS, *(f"{name}_product" for name in LAYERS), *WEIGHT_ONLY)
PEERS = ("bfloat16", "qwix_int8", "qwix_float8", "qwix_int8_weights", "flax_float8")
PEERS += ("torch_bfloat16", "torch_scaled_mm_tensor", "torch_scaled_mm_row", "torch_int_mm")


def contenders(x: np.ndarray, w: np.ndarray) -> dict[str, Contender]:
    """Everyone, by name: weight-only products for few rows of `x`, the others for all."""

    def add(name: str, prepare: Callable[..., Program], fmt: Format, *rest: Any) -> None:
        # A tenth more than for 4096 terms, and what a result in bfloat16 adds.
        loose = 1.1 * (PER_TENSOR if "tensor" in name or "flax" in name else 1.0)
        package, decode = rest if rest else ("mpjax", first_rows)
        bound = round(fmt.bound * loose, 4)
        known[name] = Contender(prepare, bound, package, decode=decode)

    known: dict[str, Contender] = {}
    first = partial(plain, jnp.bfloat16, x, w)
    known["bfloat16"] = Contender(first, BFLOAT16_BOUND, decode=first_rows)
    for name, (fmt, scales) in LAYERS.items():
        add(name, partial(ours, fmt, scales, False, x, w), fmt)
        add(f"{name}_product", partial(ours, fmt, scales, True, x, w), fmt)
    for name, fmt in (("qwix_int8", INT8), ("qwix_float8", FLOAT8)):
        add(name, partial(qwix, in_16_bits(fmt), x, w), fmt, "qwix", first_rows)
    add("flax_float8", partial(flax_float8, in_16_bits(FLOAT8), x, w), FLOAT8, "flax", first_rows)
    if len(x) <= 64:
        for name, fmt in WEIGHT_ONLY.items():
            add(name, partial(weight_only, fmt, x, w), fmt)
        fmt = FORMATS["w8a16"]
        add("qwix_int8_weights", partial(qwix, in_16_bits(fmt), x, w), fmt, "qwix", first_rows)
    for name, fmt in (("scaled_mm_tensor", FLOAT8), ("scaled_mm_row", FLOAT8), ("int_mm", INT8)):
        prepare = partial(torch_product, name, x, w)
        add(f"torch_{name}", prepare, fmt, "torch", scaled_rows)
    first = partial(torch_product, "bfloat16", x, w)
    known["torch_bfloat16"] = Contender(first, BFLOAT16_BOUND, "torch", decode=scaled_rows)
    return known


def first_rows(result: Any) -> np.ndarray:
    return np.asarray(result[:COMPARED_ROWS], np.float32)


def scaled_rows(result_and_scale: tuple[Any, Any]) -> np.ndarray:
    """Of a result of PyTorch, and what it is to be multiplied by."""
    result, scale = result_and_scale
    return result[:COMPARED_ROWS].float().cpu().numpy() * scale


def ours(fmt: Format, scales: str, is_product: bool, x: np.ndarray, w: np.ndarray) -> Program:
    """`mk.matmul` of quantized activations and weights, with a result in bfloat16."""
    axes = (None, None) if scales == "tensor" else (1, 0)
    weights = mk.contiguous(mk.quantize(jnp.asarray(w, jnp.bfloat16), fmt.weights, axis=axes[1]), 0)
    activations = jnp.asarray(x, jnp.bfloat16)

    def quantize(x: jax.Array) -> mk.QTensor:
        return mk.quantize(x, fmt.weights, axis=axes[0])

    if is_product:
        return compiled(mk.matmul, quantize(activations), weights)
    return compiled(lambda x, w: mk.matmul(quantize(x), w), activations, weights)


def weight_only(fmt: Format, x: np.ndarray, w: np.ndarray) -> Program:
    """`mk.matmul` of bfloat16 activations and quantized weights."""
    weights = mk.quantize(
        jnp.asarray(w, jnp.bfloat16), fmt.weights, axis=0, group_size=fmt.group_size
    )
    return compiled(mk.matmul, jnp.asarray(x, jnp.bfloat16), mk.contiguous(weights, 0))


def torch_product(name: str, x: np.ndarray, w: np.ndarray) -> Program:
    """PyTorch's own products, its result beside the scale that it does not apply."""
    torch = importlib.import_module("torch")
    left, right = (torch.from_numpy(a).cuda() for a in (np.array(x), np.ascontiguousarray(w.T)))
    bfloat16 = torch.bfloat16
    after: Any = 1.0
    if name == "bfloat16":
        left, right = left.to(bfloat16), right.to(bfloat16)
        product = partial(torch.matmul, left, right.t())
    elif name == "int_mm":
        scales = [a.abs().amax(dim=1, keepdim=True) / 127 for a in (left, right)]
        left, right = (
            (a / s).round().to(torch.int8) for a, s in zip((left, right), scales, strict=True)
        )
        after = (scales[0] * scales[1].t())[:COMPARED_ROWS].cpu().numpy()
        product = partial(torch._int_mm, left, right.t())
    else:
        keep = {} if name.endswith("tensor") else {"dim": 1, "keepdim": True}
        scales = [a.abs().amax(**keep) / 448 for a in (left, right)]
        left, right = (
            (a / s).to(torch.float8_e4m3fn) for a, s in zip((left, right), scales, strict=True)
        )
        product = partial(
            torch._scaled_mm,
            left,
            right.t(),
            scale_a=scales[0],
            scale_b=scales[1].t() if keep else scales[1],
            out_dtype=bfloat16,
        )
    started = time.perf_counter()
    result = product()
    torch.cuda.synchronize()
    elapsed = time.perf_counter() - started
    tensors = (left, right, result)

    def run() -> tuple[Any, Any]:
        result = product()
        torch.cuda.synchronize()
        return result, after

    return Program(run, elapsed, sum(t.numel() * t.element_size() for t in tensors))
