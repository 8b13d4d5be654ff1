"""What a wrapped model decided about each product, written into the program itself.

A product runs in a `jax.named_scope` whose name starts with `mpjax.`, so that the compiled program
carries the decision beside the module path in the metadata of the instruction (`op_name`), forward
and backward. It costs nothing and is part of no cache key. `mp.explain` reads it there.

    mpjax                    a wrapped model starts here: the path is what follows
    mpjax.quantized          8 bits, forward and backward
    mpjax.forward            8 bits in the forward pass, floats in the backward pass
    mpjax.weights            a weight of 8 or 4 bits times floats
    mpjax.left.<reason>      floats, for a reason of `LEFT`

A weight that is floats, and so is quantized at every call, adds `.floats` to the words for 8 bits.
The innermost decision holds. A product in no such scope is one that the user wrote.
"""

import contextlib
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from ._policy import DTypePolicy
from ._policy_map import FrozenDTypePolicyMap, resolve

ROOT = "mpjax"
QUANTIZED, FORWARD, WEIGHTS = "quantized", "forward", "weights"
FLOATS = ".floats"
LEFT = ("unmatched", "island", "author", "refused", "unquantized", "unprofitable", "policy")


@dataclasses.dataclass(frozen=True)
class Decision:
    """One of the words above, as a hashable value that opens its scope.

    Attributes:
      word: `"quantized"`, `"left.unmatched"`, ...; None opens nothing.
    """

    word: str | None

    @property
    def is_left(self) -> bool:
        """Whether the product stays in floats."""
        return self.word is not None and self.word.startswith("left.")

    def scope(self) -> Any:
        """The context in which the product is traced."""
        if self.word is None:
            return contextlib.nullcontext()
        return jax.named_scope(f"{ROOT}.{self.word}")


NONE = Decision(None)


def left(reason: str) -> Decision:
    """The decision to leave a product in floats."""
    assert reason in LEFT, reason
    return Decision(f"left.{reason}")


def at_path(policy: Any, path: str) -> Decision:
    """Why the policy leaves the layer at a path in floats; `NONE` where it quantizes it."""
    own = resolve(policy, path)
    if own.quantization_mode is not None:
        return NONE
    if not isinstance(policy, FrozenDTypePolicyMap):
        return left("policy")
    default, all_policies = policy.default_policy, [policy.default_policy, *policy.values()]
    if all(each.quantization_mode is None for each in all_policies):
        return left("policy")
    if not policy.names(path):
        return left("unmatched")
    is_wider = _bytes(own.compute_dtype) > _bytes(default.compute_dtype)
    return left("island" if is_wider else "policy")


def of_attention(policy: Any, path: str) -> Decision:
    """The same for the products inside attention, which no policy quantizes unless it says so."""
    own = at_path(policy, path)
    return own if own == left("island") else left("policy")


def of_author(policy: Any, path: str, dtype: str) -> Decision:
    """The same for a layer whose author gave it a dtype."""
    own: DTypePolicy = resolve(policy, path)
    if own.quantization_mode is None and at_path(policy, path) == left("policy"):
        return left("policy")
    is_wider = _bytes(dtype) > _bytes(own.compute_dtype)
    return left("island" if is_wider else "author")


def _bytes(dtype: str) -> int:
    return jnp.dtype(dtype).itemsize
