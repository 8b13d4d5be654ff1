"""The contenders of `inference.py`: each library's way from float32 weights to an inference.

Packages are imported by name when a contender is prepared, so that one that is missing is an entry
with its error.
"""

import importlib
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import mpjax as mp
from _contest import BFLOAT16_BOUND, FLOAT32_BOUND, Contender, Program
from _inference_models import Decode, Encode
from _machine import cores
from _matmul_peers import FORMATS

Case = Encode | Decode

# Ours by the names of their policies, and the error of one product in their format.
OURS = {
    "float32": FLOAT32_BOUND,
    "mixed_bfloat16": BFLOAT16_BOUND,
    "int8_from_float32": FORMATS["w8a8"].bound,
    "int8_weight_only_from_float32": FORMATS["w8a16"].bound,
    "int8_weight_only_from_mixed_bfloat16": FORMATS["w8a16"].bound,
    "int4/128_from_mixed_bfloat16": FORMATS["w4a16"].bound,
    "w4a8/128_from_float32": FORMATS["w4a8"].bound,
    "w4a8/128_from_mixed_bfloat16": FORMATS["w4a8"].bound,
    "float8/row_from_float32": FORMATS["float8"].bound,
}
# Beside these on a GPU, where 16 bits are faster than 32.
GPU_OURS = {
    "int8_from_mixed_bfloat16": FORMATS["w8a8"].bound,
    "float8/row_from_mixed_bfloat16": FORMATS["float8"].bound,
}
GPU_NAMES = ("mixed_bfloat16", *GPU_OURS, "int8_weight_only_from_mixed_bfloat16")
GPU_NAMES += ("int4/128_from_mixed_bfloat16", "flax_bfloat16", "qwix_w8a16")
# The table of token types stays a float, as in `quantize_sentence_encoder.py`.
LEFT_FLOAT = ("types",)
PEERS = ("flax_float32", "flax_bfloat16", "qwix_int8", "qwix_int8_projections", "qwix_w8a16")
PEERS += ("onnxruntime_float32", "onnxruntime_int8")


def contenders(case: Case, names: Sequence[str] | None = None) -> dict[str, Contender]:
    """We, by the names of our policies, and our peers; those of these names, or of this machine."""

    def bounded(prepare: Any, product: float, package: str, note: str = "") -> Contender:
        return Contender(partial(prepare, case), _bound(case, product), package, note, _float32)

    own = OURS | GPU_OURS
    known = {name: bounded(partial(ours, name), error, "mpjax") for name, error in own.items()}
    int8, weights = FORMATS["w8a8"].bound, FORMATS["w8a16"].bound
    known |= {
        "flax_float32": bounded(partial(plain, jnp.float32), FLOAT32_BOUND, "flax"),
        "flax_bfloat16": bounded(partial(plain, jnp.bfloat16), BFLOAT16_BOUND, "flax"),
        "qwix_int8": bounded(
            partial(qwix, "int8", jnp.float32), int8, "qwix", "the products in attention too"
        ),
        "qwix_int8_projections": bounded(
            partial(qwix, "int8", jnp.float32, op_names=("dot_general",)), int8, "qwix"
        ),
        "qwix_w8a16": bounded(partial(qwix, None, jnp.bfloat16), weights, "qwix"),
    }
    if isinstance(case, Encode):
        note = "quantize_dynamic: a scale and zero point per tensor"
        known["onnxruntime_float32"] = bounded(partial(onnx, False), FLOAT32_BOUND, "onnxruntime")
        known["onnxruntime_int8"] = bounded(partial(onnx, True), 3 * int8, "onnxruntime", note)
    if names is None:
        names = GPU_NAMES if jax.default_backend() == "gpu" else (*OURS, *PEERS)
    return {name: each for name, each in known.items() if name in names}


def reference(case: Case) -> np.ndarray:
    """What unwrapped Flax computes in float32."""
    return _float32(plain(jnp.float32, case).run())


def plain(dtype: Any, case: Case) -> Program:
    """The model as its author wrote it, its parameters in a dtype."""
    return case.program(case.model().apply, _in_dtype(case.variables(), dtype))


def ours(policy: str, case: Case) -> Program:
    """The wrapped model, its weights quantized if the policy quantizes; on CPUs prepacked."""
    whole = mp.get_policy(policy)
    if not isinstance(whole, mp.QuantizedDTypePolicy):
        wrapped = mp.wrap(case.model(), whole)
        return case.program(wrapped.apply, case.variables(wrapped))
    left = LEFT_FLOAT if isinstance(case, Encode) else ()
    layers: dict[str, Any] = {path: whole.source_name for path in left}
    model = mp.wrap(case.model(), mp.DTypePolicyMap(whole, layers))
    mutable: dict[str, Any] = {"mutable": ["cache"]} if isinstance(case, Decode) else {}
    options = {"return_report": True, "prepack": jax.default_backend() == "cpu"}
    variables = case.variables(model)
    quantized, report = mp.quantize(model, variables, *case.example(), **options, **mutable)
    if report.left and whole.scheme.weights != "int4":  # whose groups do not divide every axis
        raise ValueError(f"not everything is quantized: {report}")
    return case.program(model.apply, quantized)


def qwix(
    activations: str | None, dtype: Any, case: Case, op_names: Sequence[str] | None = None
) -> Program:
    """Qwix's post-training quantization of a Linen model, by one rule for all of it."""
    package = importlib.import_module("qwix")
    settings = {} if op_names is None else {"op_names": tuple(op_names)}
    rule = package.QuantizationRule(
        module_path=".*", weight_qtype="int8", act_qtype=activations, **settings
    )
    model = package.quantize_model(case.model(), package.PtqProvider([rule]))
    variables = _in_dtype(case.variables(), dtype)
    abstract = jax.eval_shape(model.init, jax.random.key(0), *case.example())
    params = package.quantize_params(variables["params"], abstract["params"])
    return case.program(model.apply, {**variables, "params": params})


def onnx(dynamic_int8: bool, case: Encode) -> Program:
    """The encoder as a graph in ONNX Runtime."""
    if jax.default_backend() != "cpu":
        raise NotImplementedError("ONNX Runtime is compared on CPUs only")
    peer = importlib.import_module("sentence_encoder_onnx")
    model = peer.build(case.published(), case.shape)
    model = peer.quantized(model) if dynamic_int8 else model
    names = ("tokens", "mask")
    return _session(peer, model, dict(zip(names, case.example(), strict=True)))


def _session(peer: Any, model: Any, inputs: dict[str, np.ndarray]) -> Program:
    started = time.perf_counter()
    loaded = peer.session(model, cores())
    elapsed = time.perf_counter() - started
    size = peer.weight_bytes(model) + sum(each.nbytes for each in inputs.values())
    return Program(lambda: loaded.run(None, inputs)[0], elapsed, size)


def _in_dtype(variables: Any, dtype: Any) -> Any:
    def convert(x: jax.Array) -> jax.Array:
        return x.astype(dtype) if x.dtype == jnp.float32 else x

    return variables if dtype == jnp.float32 else jax.tree.map(convert, variables)


def _bound(case: Case, product: float) -> float:
    """The error that a stream has which adds up branches, each off by that of one product.

    A branch is two products or more of operands that are off already: twice what one would leave.
    """
    return round(2 * product * case.branches**0.5, 4)


def _float32(result: Any) -> np.ndarray:
    return np.asarray(result, np.float32)
