"""Policies that quantize: a `Mode` on top of the dtypes of another policy."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax

from ._loss_scale import LossScale
from ._modes import AUTO8, RESOLVED, Mode, parse_mode
from ._policy import DTypePolicy, check_when, set_fields, source_fields
from ._scaling import (
    CurrentScaling,
    DelayedScaling,
    Scaling,
    StaticScaling,
    check_algorithm,
    check_history_length,
    check_margin,
)
from ._target import Target, resolve_target, targets


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, init=False, eq=False, repr=False)
class QuantizedDTypePolicy(DTypePolicy):
    """A policy whose layers multiply quantized weights, and quantized activations if asked to.

    The mode is one string, such as `"int8_static"` or `"int4/128"`, or a family and keywords:
    `("int8", activations="static")` and `"int8_static"` are the same policy.

    Args:
        mode: `"int8"`, `"int8_static"`, `"int8_delayed"`, `"int8_weight_only"`,
            `"int4/<group_size>"`, `"float8"`, `"float8_current"`, `"float8/row"`,
            `"float8/128x128"`, `"gptq/4/<group_size>"` or `"awq/4/<group_size>"`; or `"auto8"` or
            `"auto8_delayed"`, which leave int8 or float8 to the hardware (see `resolve`).
        source_name: The name of the policy that is quantized, as in `DTypePolicy`.
        activations: `"dynamic"`, `"static"`, `"delayed"` or `"none"`; None leaves it to `mode`.
        granularity: What shares a scale, see `Mode`; None leaves it to `mode`.
        group_size: Weights per scale, -1 for all; None leaves it to `mode`.
        symmetric: False gives int4 a zero point. It is not part of the name.
        scaling: `"delayed"`, `"current"` (the same as `activations="dynamic"`) or `"static"`; None
            leaves it to `mode`.
        amax_history_length: As in `DelayedScaling`. It is not part of the name.
        margin: As in `DelayedScaling`; for delayed and static scaling. It is not part of the name.
        amax_algorithm: `"max"` or `"most_recent"`, as in `DelayedScaling`. Not part of the name.
        quantize_attention: True has Flax' attention layers multiply query by key, and weights by
            value, in 8 bits too, and not only their projections. Not part of the name.
        kv_cache: As in `DTypePolicy`.
        loss_scale: As in `DTypePolicy`; `"auto"` goes by `source_name`.
        output_dtype: As in `DTypePolicy`.
        profitable_on: The target on which a layer is left in its source precision if quantizing
            it costs time, as `resolve_target` takes it, or the fields of one; None quantizes every
            layer. `resolve` sets it. Not part of the name.

    Attributes:
        mode: The canonical mode string.
        symmetric: Whether the weights have no zero point.
        scheme: The mode as a `Mode`: formats, granularity, group size.
        amax_history_length: Steps of amax history that delayed scaling looks back on; the other
            modes have no history and ignore it.

    Raises:
        TypeError: If `source_name` is not a string.
        ValueError: If the mode is unknown, its keywords contradict it, or it does not work with
            the compute dtype.

    References:
        https://keras.io/api/mixed_precision/policy/
    """

    mode: str
    symmetric: bool
    scheme: Mode
    amax_history_length: int = 1024
    margin: float = 0
    amax_algorithm: str = "max"
    quantize_attention: bool = False
    profitable_on: Target | None = None

    _kind: ClassVar[str] = "quantized"

    def __init__(
        self,
        mode: str,
        source_name: str | None = None,
        *,
        activations: str | None = None,
        granularity: str | None = None,
        group_size: int | None = None,
        symmetric: bool | None = None,
        scaling: str | None = None,
        amax_history_length: int = 1024,
        margin: float = 0,
        amax_algorithm: str = "max",
        quantize_attention: bool = False,
        kv_cache: str | None = None,
        loss_scale: LossScale | float | str | None = "auto",
        output_dtype: Any = None,
        profitable_on: Target | Mapping[str, Any] | str | None = None,
    ):
        source = source_fields(source_name, loss_scale, output_dtype, kv_cache)
        scheme = parse_mode(
            mode,
            activations=activations,
            scaling=scaling,
            granularity=granularity,
            group_size=group_size,
            symmetric=symmetric,
        )
        check_history_length(amax_history_length)
        check_margin(margin)
        check_algorithm(amax_algorithm)
        if (
            scheme.family in ("int8", "int8_static", "int8_delayed", "w4a8", *RESOLVED)
            and source["compute_dtype"] == "float16"
        ):
            raise ValueError(
                f"Quantization mode='{scheme.name}' doesn't work well with "
                "compute_dtype='float16'. Use a bfloat16 or float32 source, such as "
                "'mixed_bfloat16'."
            )
        name = f"{scheme.name}_from_{source['source_name']}"
        set_fields(self, name=name, mode=scheme.name, scheme=scheme, **source)
        set_fields(self, symmetric=scheme.symmetric, margin=margin, amax_algorithm=amax_algorithm)
        set_fields(self, amax_history_length=amax_history_length)
        set_fields(self, quantize_attention=bool(quantize_attention))
        set_fields(self, profitable_on=_target(profitable_on))

    def resolve(self, target: str | Target | None = None, *, when: str = "always") -> DTypePolicy:
        """Returns the policy for one kind of hardware; see `DTypePolicy.resolve`."""
        check_when(when)
        if self.profitable_on is not None and target is not None:
            when = "profitable"  # it is, and now there
        if self.scheme.weights != AUTO8 and when == "always":
            return super().resolve(target)
        target = resolve_target(target)
        mode: str | None = self.mode
        if self.scheme.weights == AUTO8:
            mode = RESOLVED[self.mode].get(target.eight_bits)
        if mode is None:
            return DTypePolicy.from_config({"name": self.source_name, **self._source_config()})
        policy = self.with_mode(mode)
        if when == "profitable":
            set_fields(policy, profitable_on=target)
        return policy

    def with_mode(self, mode: str) -> "QuantizedDTypePolicy":
        """Returns a policy of another mode, and what else this one says."""
        is_float8 = mode.startswith("float8")
        cls = QuantizedFloat8DTypePolicy if is_float8 else QuantizedDTypePolicy
        return cls.from_config({**self.get_config(), "mode": mode})

    @property
    def quantization_mode(self) -> str:
        """The family of the mode: the part before the first slash, as in Keras."""
        return self.scheme.family

    @property
    def scaling(self) -> Scaling | None:
        """Where the scales of activations come from; None for weight-only modes."""
        if self.scheme.activations == "delayed":
            return DelayedScaling(self.amax_history_length, self.margin, self.amax_algorithm)
        if self.scheme.activations == "static":
            return StaticScaling(self.margin)
        if self.scheme.activations == "dynamic":
            is_tensor = self.scheme.granularity == "tensor"
            return CurrentScaling("tensor" if is_tensor else "channel")
        return None

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments, defaults left out, as a JSON-serializable dict."""
        config = {"mode": self.mode, "source_name": self.source_name}
        symmetric = {} if self.symmetric else {"symmetric": False}
        length = self.amax_history_length
        history = {} if length == 1024 else {"amax_history_length": length}
        margin = {} if self.margin == 0 else {"margin": self.margin}
        algorithm = {"amax_algorithm": self.amax_algorithm} if self.amax_algorithm != "max" else {}
        attention = {"quantize_attention": True} if self.quantize_attention else {}
        on = self.profitable_on
        profitable = {} if on is None else {"profitable_on": _target_config(on)}
        source = self._source_config() | profitable
        return {**config, **symmetric, **history, **margin, **algorithm, **attention, **source}


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, init=False, eq=False, repr=False)
class QuantizedFloat8DTypePolicy(QuantizedDTypePolicy):
    """A float8 policy, with the length of its amax history.

    Delayed scaling takes the scale of a step from the amaxes of the steps before it:

        scale = max(amax_history[:amax_history_length]) / format.max * 2**margin

    Args:
        mode: `"float8"` (delayed scaling), `"float8_current"`, `"float8/row"` or
            `"float8/128x128"`.
        source_name: As in `QuantizedDTypePolicy`.
        amax_history_length: Steps of history, at least 1.
        activations: As in `QuantizedDTypePolicy`.
        granularity: As in `QuantizedDTypePolicy`.
        group_size: As in `QuantizedDTypePolicy`.
        symmetric: As in `QuantizedDTypePolicy`.
        scaling: As in `QuantizedDTypePolicy`.
        margin: As in `QuantizedDTypePolicy`.
        amax_algorithm: As in `QuantizedDTypePolicy`.
        quantize_attention: As in `QuantizedDTypePolicy`.
        kv_cache: As in `DTypePolicy`.
        loss_scale: As in `DTypePolicy`; `"auto"` goes by `source_name`.
        output_dtype: As in `DTypePolicy`.
        profitable_on: As in `QuantizedDTypePolicy`.

    Raises:
        TypeError: If `amax_history_length` is not an integer.
        ValueError: If it is below 1, or if the mode is not a float8 mode.

    References:
        Micikevicius et al., FP8 Formats for Deep Learning (2022),
        https://arxiv.org/abs/2209.05433
    """

    default_amax_history_length: ClassVar[int] = 1024

    def __init__(
        self,
        mode: str,
        source_name: str | None = None,
        amax_history_length: int = 1024,
        *,
        activations: str | None = None,
        granularity: str | None = None,
        group_size: int | None = None,
        symmetric: bool | None = None,
        scaling: str | None = None,
        margin: float = 0,
        amax_algorithm: str = "max",
        quantize_attention: bool = False,
        kv_cache: str | None = None,
        loss_scale: LossScale | float | str | None = "auto",
        output_dtype: Any = None,
        profitable_on: Target | Mapping[str, Any] | str | None = None,
    ):
        super().__init__(
            mode,
            source_name,
            activations=activations,
            granularity=granularity,
            group_size=group_size,
            symmetric=symmetric,
            scaling=scaling,
            amax_history_length=amax_history_length,
            margin=margin,
            amax_algorithm=amax_algorithm,
            quantize_attention=quantize_attention,
            kv_cache=kv_cache,
            loss_scale=loss_scale,
            output_dtype=output_dtype,
            profitable_on=profitable_on,
        )
        if not self.scheme.weights.startswith("float8"):
            raise ValueError(
                f"QuantizedFloat8DTypePolicy takes a float8 mode. Received: mode={mode!r}. Use "
                "QuantizedDTypePolicy for the other modes."
            )

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments, defaults left out, as a JSON-serializable dict."""
        return {**super().get_config(), "amax_history_length": self.amax_history_length}


def _target(identifier: Target | Mapping[str, Any] | str | None) -> Target | None:
    """What `_target_config` wrote, or None."""
    if isinstance(identifier, Mapping):
        fields: dict[str, Any] = dict(identifier)
        return Target(**{**fields, "kinds": tuple(fields.get("kinds", ()))})
    return None if identifier is None else resolve_target(identifier)


def _target_config(target: Target) -> str | dict[str, Any]:
    """The name of a target of the table; the fields of one that a user described."""
    if target in targets():
        return target.name
    return {**dataclasses.asdict(target), "peak": target.rates, "kinds": list(target.kinds)}
