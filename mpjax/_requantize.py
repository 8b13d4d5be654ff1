"""A quantized model for other hardware: its 8-bit weights in the format that this multiplies.

    stored in   policy                              for hardware with    becomes
    int8        int8, int8_static, int8_delayed     float8 alone         E4M3, float8/row
    E4M3        float8, float8_current, float8/row  int8 alone           int8, int8
    either      auto8, auto8_delayed                either               as `DTypePolicy.resolve`
                                                    neither              floats, the source policy

A weight keeps the axes along which it has scales. Its activations are scaled at every call, by
rows: the scales that were calibrated, or left by training, were for the other format. What stores
weights only, or in blocks or 4 bits, is the same everywhere.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

import mpjax_kernels as mk

from ._file_header import ArrayRecord, Key, LeafRecord
from ._file_policy import WEIGHTS
from ._modes import AUTO8
from ._paths import join
from ._policy import DTypePolicy
from ._policy_map import FrozenDTypePolicyMap, Policy, freeze, resolve
from ._prescaled import PreScaledWeight, is_stored
from ._quantized_policy import QuantizedDTypePolicy
from ._recipes import recipe_of
from ._stored import stored_of
from ._target import Target

E4M3 = "float8_e4m3fn"
_ELSEWHERE = {"int8": {E4M3: "float8/row"}, E4M3: {"int8": "int8"}}


@dataclasses.dataclass(frozen=True)
class RequantizedWeight:
    """One weight in a `RequantizationReport`.

    Attributes:
      path: of the weight, `"params/encoder/Dense_0/kernel"`.
      shape: its shape.
      stored: the format in the file.
      format: the format or dtype that it was loaded in.
      error: the root mean square of what that changed, in units of the weight's own; 0 if nothing.
    """

    path: str
    shape: tuple[int, ...]
    stored: str
    format: str
    error: float


@dataclasses.dataclass(frozen=True)
class RequantizationReport:
    """The quantized weights of a file that was loaded for a target. Printed, it is a table.

    Attributes:
      target: the name of the target; None if they were loaded as they are stored.
      weights: the weights.
    """

    target: str | None
    weights: tuple[RequantizedWeight, ...]

    def __str__(self) -> str:
        rows = [(f"weight, for {self.target or 'any'}", "shape", "in the file", "now", "error")]
        for each in self.weights:
            shape = "x".join(map(str, each.shape))
            error = f"{each.error:.2%}" if each.error else ""
            rows.append((each.path, shape, each.stored, each.format, error))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        cells = ([c.ljust(w) for c, w in zip(row, widths, strict=True)] for row in rows)
        return "\n".join("  ".join(row).rstrip() for row in cells)


def policy_for(policy: Policy, target: Target) -> Policy:
    """The policy of a saved model, for its weights once they are loaded for a target."""
    frozen = freeze(policy)
    if isinstance(frozen, FrozenDTypePolicyMap):
        entries = tuple((key, _policy_for(each, target)) for key, each in frozen._entries)
        default = _policy_for(frozen.default_policy, target)
        return FrozenDTypePolicyMap(default, entries, frozen.follows_global)
    return _policy_for(frozen, target)


def _policy_for(policy: DTypePolicy, target: Target) -> DTypePolicy:
    if not isinstance(policy, QuantizedDTypePolicy):
        return policy
    scheme = policy.scheme
    if scheme.weights == AUTO8:
        return policy.with_mode("auto8").resolve(target)
    is_whole = scheme.activations != "none" and scheme.granularity != "128x128"
    if is_whole and scheme.weights not in target.dtypes:
        mode = _ELSEWHERE.get(scheme.weights, {}).get(target.eight_bits or "")
        policy = policy if mode is None else policy.with_mode(mode)
    return policy.resolve(target)  # what pays, pays there


def is_auto(policy: Policy) -> bool:
    """Whether a policy leaves something to the hardware."""
    frozen = freeze(policy)
    each = frozen.values() if isinstance(frozen, FrozenDTypePolicyMap) else ()
    of = (getattr(frozen, "default_policy", frozen), *each)
    return any(isinstance(p, QuantizedDTypePolicy) and p.scheme.weights == AUTO8 for p in of)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What becomes of the leaves of a file under the policy that it is loaded with.

    Attributes:
      saved: the policy in the file, frozen.
      policy: that which it is loaded with, frozen.
      is_linen: whether paths begin with a collection, as Linen's do.
    """

    saved: Any
    policy: Any
    is_linen: bool

    def is_kept(self, leaf: LeafRecord) -> bool:
        """Whether a leaf is loaded at all: a scaling state goes where no layer has one any more."""
        policy = self._changed_policy(leaf)
        if leaf.kind != "scaling_state" or policy is None:
            return True
        recipe = recipe_of(policy)
        return recipe is not None and bool(recipe.states)

    def format_of(self, leaf: LeafRecord) -> str | None:
        """The format that a stored weight is loaded in; its dtype, for floats; None: as it is."""
        policy = self._changed_policy(leaf)
        is_weight = leaf.kind in ("qtensor", "prescaled") and leaf.path[-1] in WEIGHTS
        if not is_weight or policy is None:
            return None
        q, stored = leaf.abstract, stored_of(policy)
        if stored is None:
            return q.dtype.name
        is_whole = all(
            n in (1, size) for n, size in zip(leaf.abstract.scale.shape, q.shape, strict=True)
        )
        formats = {q.format.name, stored.format}
        return stored.format if is_whole and formats == {"int8", E4M3} else None

    def record(self, leaf: LeafRecord) -> LeafRecord:
        """The leaf as it will be."""
        format = self.format_of(leaf)
        if format is None:
            return leaf
        if format not in ("int8", E4M3):
            main = ArrayRecord(leaf.arrays["values"].name, format, leaf.abstract.shape)
            return LeafRecord(leaf.path, "array", {}, {"value": main})
        arrays = {name: each for name, each in leaf.arrays.items() if name != "zero_point"}
        arrays["values"] = dataclasses.replace(arrays["values"], dtype=format)
        static = {**leaf.static, "format": format}
        # Only int8 lies in tiles.
        return dataclasses.replace(leaf, static=static, arrays=arrays).without_tiles()

    def convert(self, leaf: LeafRecord, value: Any) -> tuple[Any, float]:
        """A leaf that was read, as it will be; and the relative error of that."""
        format = self.format_of(leaf)
        if format not in ("int8", E4M3):
            return value if format is None else _floats(value), 0.0
        if not isinstance(value, PreScaledWeight):
            q, error = _requantized(value, format)
            return q, float(error)
        q, error = _requantized(value.quantized, format)
        return dataclasses.replace(value, quantized=q), float(error)

    def _changed_policy(self, leaf: LeafRecord) -> DTypePolicy | None:
        """The policy of a leaf's layer, if it is another than in the file."""
        path: tuple[Key, ...] = leaf.path[1:-1] if self.is_linen else leaf.path[:-1]
        if not self.is_linen and path[-1:] == ("scaling",):
            path = path[:-1]
        saved, policy = (resolve(each, join(path)) for each in (self.saved, self.policy))
        return None if saved == policy else policy


def row_of(before: LeafRecord, after: LeafRecord, error: float) -> RequantizedWeight | None:
    """The row of a leaf in a report; None of what is no stored weight."""
    if not is_stored(before.abstract):
        return None
    q, now = before.abstract, after.abstract
    format = now.format.name if is_stored(now) else now.dtype.name
    return RequantizedWeight(join(before.path), q.shape, q.format.name, format, error)


def placed(value: Any, parts: Mapping[str, Any]) -> Any:
    """A leaf with its arrays where `shardings_of_parts` says; None leaves one where it is."""
    where = {name: place for name, place in parts.items() if place is not None}
    if not where:
        return value
    if not is_stored(value):
        return jax.device_put(value, where["value"])
    moved = {name: jax.device_put(getattr(value, name), where[name]) for name in where}
    if isinstance(value, PreScaledWeight):
        scale = moved.pop("pre_quant_scale", value.pre_quant_scale)
        return PreScaledWeight(dataclasses.replace(value.quantized, **moved), scale)
    return dataclasses.replace(value, **moved)


@functools.partial(jax.jit, static_argnums=1)
def _requantized(weight: mk.QTensor, format: str) -> tuple[mk.QTensor, jax.Array]:
    """A weight in another format, with scales along the same axes; and the relative error."""
    before = mk.dequantize(dataclasses.replace(weight, dtype=jnp.dtype("float32")))
    axis = tuple(i for i, size in enumerate(weight.scale.shape) if size == 1)
    q = mk.quantize(before, format, axis=axis)
    size = jnp.linalg.norm(before.ravel())
    error = jnp.linalg.norm((mk.dequantize(q) - before).ravel()) / jnp.where(size > 0, size, 1)
    q = q if weight.layout is None else mk.contiguous(q, weight.layout)
    return dataclasses.replace(q, dtype=weight.dtype), error


@jax.jit
def _floats(weight: mk.QTensor | PreScaledWeight) -> jax.Array:
    """The weight that a stored one stands for, in its logical dtype."""
    if not isinstance(weight, PreScaledWeight):
        return mk.dequantize(weight)
    wide = dataclasses.replace(weight.quantized, dtype=jnp.dtype("float32"))
    return (mk.dequantize(wide) * weight.pre_quant_scale).astype(weight.dtype)
