"""The encoders that are compared: ours under several policies, and ONNX Runtime's.

Every call to mpjax is in this file. `mp.wrap` puts a policy on the BERT of `bert.py`, `mp.quantize`
turns its weights into 8 or 4 bits, and the wrapped model applies the result.

A policy map leaves the table of token types a float: its row 0 is added to every token of every
sentence, so that what rounding does to it never averages out. In int4 its 768 weights alone cost
more than the 11.7 million of the words.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import bert
import jax
import numpy as np
from sentence_encoder_data import Batch
from sentence_encoder_wheel import Pretrained

import mpjax as mp
import mpjax_kernels as mk

FLOAT32 = "Flax float32, unwrapped"
W8A16, W8A8 = "int8_weight_only_from_float32", "int8_from_float32"
FLOAT8, INT4 = "float8/row_from_float32", "int4/128_from_float32, asymmetric"
SMOOTHQUANT, GPTQ = f"{W8A8}, SmoothQuant", "int4/128_from_float32, GPTQ"
POLICIES = {
    "mixed_bfloat16": mp.DTypePolicy("mixed_bfloat16"),
    W8A16: mp.QuantizedDTypePolicy("int8_weight_only", "float32"),
    "int8_weight_only_from_mixed_bfloat16": mp.QuantizedDTypePolicy(
        "int8_weight_only", "mixed_bfloat16"
    ),
    W8A8: mp.QuantizedDTypePolicy("int8", "float32"),
    "int8_from_mixed_bfloat16": mp.QuantizedDTypePolicy("int8", "mixed_bfloat16"),
    FLOAT8: mp.QuantizedDTypePolicy("float8/row", "float32"),
    INT4: mp.QuantizedDTypePolicy("int4/128", "float32", symmetric=False),
}
# Policies whose weights a method makes of batches of sentences.
CALIBRATED = {SMOOTHQUANT: (POLICIES[W8A8], "smoothquant"), GPTQ: (POLICIES[INT4], "gptq")}
ONNX_FLOAT32, ONNX_INT8 = "ONNX Runtime float32", "ONNX Runtime dynamic int8"
TABLES = ("words", "positions", "types")
LEFT_FLOAT = ("types",)


class DisagreementError(Exception):
    """Two programs that should compute the same do not."""


@dataclass(frozen=True)
class Encoder:
    """A function from tokens and mask [B, T] to embeddings [B, D], and what its weights take.

    Attributes:
      encode: returns when the embeddings are there, as float32 NumPy.
      weight_bytes: of all weights, with scales and zero points; two int4 values to a byte.
    """

    encode: Callable[[np.ndarray, np.ndarray], np.ndarray]
    weight_bytes: int

    def embed(self, batches: Sequence[Batch]) -> np.ndarray:
        """The embeddings of all sentences of the batches, in the order of their rows."""
        rows = np.concatenate([batch.rows for batch in batches])
        parts = [self.encode(each.tokens, each.mask)[: each.rows.size] for each in batches]
        return np.concatenate(parts)[np.argsort(rows)]


def flax_encoder(pretrained: Pretrained) -> Encoder:
    """The model as its author wrote it, in float32."""
    return _encoder(bert.SentenceEncoder(pretrained.shape), _variables(pretrained))


def wrapped_encoder(
    pretrained: Pretrained,
    policy: mp.DTypePolicy,
    left_float: Sequence[str] = LEFT_FLOAT,
    method: str | None = None,
    calibration: Sequence[Batch] = (),
) -> Encoder:
    """The model under a policy, its weights quantized if the policy quantizes.

    Args:
      pretrained: the weights.
      policy: what its layers compute in.
      left_float: layers whose weights are not quantized, by path.
      method: by which weights are rounded; None: to nearest.
      calibration: what the method learns from.
    """
    model, variables = bert.SentenceEncoder(pretrained.shape), _variables(pretrained)
    if not isinstance(policy, mp.QuantizedDTypePolicy):
        return _encoder(mp.wrap(model, policy), variables)
    layers = dict.fromkeys(left_float, policy.source_name)
    wrapped = mp.wrap(model, mp.DTypePolicyMap(policy, layers))
    if method is not None:
        batches = ((batch.tokens, batch.mask) for batch in calibration)
        return _encoder(
            wrapped, mp.quantize(wrapped, variables, calibration=batches, method=method)
        )
    example = jax.ShapeDtypeStruct((1, 16), "int32"), jax.ShapeDtypeStruct((1, 16), "bool")
    return _encoder(wrapped, mp.quantize(wrapped, variables, *example))


def _variables(pretrained: Pretrained) -> dict[str, Any]:
    return bert.from_tensors(pretrained.tensors, pretrained.shape)


def _encoder(model: Any, variables: Any) -> Encoder:
    variables = jax.device_put(variables)
    apply = jax.jit(model.apply)
    leaves = jax.tree.leaves(variables, is_leaf=lambda leaf: isinstance(leaf, mk.QTensor))
    return Encoder(
        encode=lambda tokens, mask: np.asarray(apply(variables, tokens, mask)),
        weight_bytes=sum(leaf.nbytes for leaf in leaves),
    )


def onnx_encoders(pretrained: Pretrained, threads: int) -> dict[str, Encoder]:
    """ONNX Runtime's float32, and its dynamic int8."""
    import sentence_encoder_onnx as peer  # with --no-onnx its packages are not needed

    def encoder(model: Any) -> Encoder:
        session = peer.session(model, threads)
        return Encoder(
            encode=lambda tokens, mask: np.asarray(
                session.run(None, {"tokens": tokens, "mask": mask})[0]
            ),
            weight_bytes=peer.weight_bytes(model),
        )

    model = peer.build(pretrained.tensors, pretrained.shape)
    return {ONNX_FLOAT32: encoder(model), ONNX_INT8: encoder(peer.quantized(model))}


def check_same(ours: np.ndarray, theirs: np.ndarray, bound: float = 1e-4) -> None:
    """Raises DisagreementError if two arrays of embeddings differ by more than `bound` anywhere."""
    difference = float(np.max(np.abs(ours - theirs)))
    if not difference <= bound:  # NaN is not
        raise DisagreementError(
            f"the float32 embeddings of Flax and of ONNX Runtime differ by up to {difference:.3g}, "
            f"at most {bound:g} is allowed: one of the two models is wrong, so nothing was timed"
        )
