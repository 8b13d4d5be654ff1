"""Dtype policies: which dtype a layer computes in, and which its variables are kept in.

Policies are Keras' in name and meaning. Here they are also values: frozen, hashable, equal when
they mean the same, and pytrees without leaves, so they pass through `jax.jit`, `jax.vmap` and
`jax.tree.map` and two spellings of one policy cost one trace.
"""

import dataclasses
import warnings
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import jax

from ._ambient import current_source_name
from ._dtype_names import dtype_name, parse_policy_name
from ._loss_scale import LossScale, NoLossScale, get_loss_scale, serialize_loss_scale
from ._target import Target, resolve_target

# The formats of `mpjax_kernels` that a cache of keys and values is stored in.
CACHE_FORMATS = {"int8": "int8", "float8": "float8_e4m3fn"}


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, init=False, eq=False, repr=False)
class DTypePolicy:
    """The dtypes of a layer's computation, variables and output.

    Variables are kept in `variable_dtype` and cast to `compute_dtype` where they are used:

        y = layer(cast(variables, compute_dtype), cast(x, compute_dtype))

    Args:
        name: A dtype name such as `"float32"` (compute and variables in that dtype),
            `"mixed_float16"` or `"mixed_bfloat16"` (variables in float32), or a jmp string such as
            `"params=float32,compute=bfloat16,output=float32"`. None takes the name of the global
            policy; of its unquantized source if that is quantized, of its default if it is a map.
        loss_scale: `"auto"` (dynamic for `"mixed_float16"`, else None), `"dynamic"`, a number, a
            `DynamicLossScale`, a `StaticLossScale`, a `NoLossScale`, or None.
        output_dtype: What the outermost call returns. None is `compute_dtype`.
        kv_cache: `"int8"` or `"float8"` (E4M3) has Flax' attention layers store the keys and values
            of decoding in 8 bits, with a scale per position and head; None stores floats. It is not
            part of the name.

    Attributes:
        name: The canonical name.
        source_name: The name of the policy without quantization; here the same as `name`.
        compute_dtype: The dtype of the computation, as a string.
        variable_dtype: The dtype in which variables are kept, as a string.
        output_dtype: The dtype of the output, as a string.
        loss_scale: The configuration of loss scaling, or None.
        kv_cache: What the cache of attention is stored in, or None.

    Raises:
        TypeError: If `name` is not a string.
        ValueError: If `name`, `loss_scale`, `output_dtype` or `kv_cache` cannot be interpreted.

    References:
        https://keras.io/api/mixed_precision/policy/
        https://github.com/google-deepmind/jmp
    """

    name: str
    source_name: str
    compute_dtype: str
    variable_dtype: str
    output_dtype: str
    loss_scale: LossScale | None
    kv_cache: str | None

    # __init__ takes what a user writes, the fields hold what it means. Equality is by fields, and
    # by kind in place of the class: Keras has two classes for one policy, equal and alike in use.
    _kind: ClassVar[str] = "plain"

    def __init__(
        self,
        name: str | None = None,
        *,
        loss_scale: LossScale | float | str | None = "auto",
        output_dtype: Any = None,
        kv_cache: str | None = None,
    ):
        source = source_fields(name, loss_scale, output_dtype, kv_cache)
        set_fields(self, name=source["source_name"], **source)

    @property
    def quantization_mode(self) -> str | None:
        """The quantization mode, such as `"int8"`; None if the policy does not quantize."""
        return None

    def resolve(self, target: str | Target | None = None, *, when: str = "always") -> "DTypePolicy":
        """Returns the policy for one kind of hardware: one without `"auto8"`.

            auto8           float8/row on hardware that multiplies E4M3, else int8
            auto8_delayed   float8 or int8_delayed, likewise
            either          the source policy, on hardware that multiplies neither

        Args:
            target: As in `mpjax.resolve_target`; None is the device at hand.
            when: As in `mpjax.wrap`. The policy of a wrapped model says `"profitable"` by its
                `profitable_on`, which a saved model keeps; it is not part of the name. Of such a
                policy `target` alone changes what it is profitable on.

        Raises:
            TypeError: If `target` is no target.
            ValueError: If `target` is unknown, or `when` is something else.
        """
        check_when(when)
        if target is not None:
            resolve_target(target)
        return self

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments, defaults left out, as a JSON-serializable dict."""
        return {"name": self.name, **self._source_config()}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Builds the policy from the dict that `get_config()` returned."""
        return cls(**config)

    def _source_config(self) -> dict[str, Any]:
        """Returns the arguments that the name does not imply."""
        config = {}
        if self.loss_scale != get_loss_scale(_auto_loss_scale(self.source_name)):
            config["loss_scale"] = serialize_loss_scale(self.loss_scale)
        if self.output_dtype != self.compute_dtype:
            config["output_dtype"] = self.output_dtype
        if self.kv_cache is not None:
            config["kv_cache"] = self.kv_cache
        return config

    def _identity(self) -> tuple[Any, ...]:
        return (self._kind, *(getattr(self, field.name) for field in dataclasses.fields(self)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, DTypePolicy):
            return NotImplemented
        return self._identity() == other._identity()

    def __hash__(self) -> int:
        return hash(self._identity())

    def __repr__(self) -> str:
        return f'<{type(self).__name__} "{self.name}">'


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, init=False, eq=False, repr=False)
class FloatDTypePolicy(DTypePolicy):
    """Keras' second name for `DTypePolicy`: equal to it, and printed as it."""

    def __repr__(self) -> str:
        return f'<DTypePolicy "{self.name}">'


def check_when(when: str) -> None:
    """Raises ValueError for what says no time to quantize at."""
    if when not in ("always", "profitable"):
        raise ValueError(f"`when` is {when!r}: it must be 'always' or 'profitable'")


def set_fields(policy: DTypePolicy, **fields: Any) -> None:
    """Sets fields of a frozen policy, from its `__init__`."""
    for name, value in fields.items():
        object.__setattr__(policy, name, value)


def source_fields(
    name: str | None, loss_scale: Any, output_dtype: Any, kv_cache: str | None
) -> dict[str, Any]:
    """Returns the fields that a policy has with or without quantization."""
    if kv_cache not in (None, *CACHE_FORMATS):
        raise ValueError(
            f"`kv_cache` is {kv_cache!r}: a cache of keys and values is stored in one of "
            f"{tuple(CACHE_FORMATS)}, or, with None, as floats"
        )
    source = parse_policy_name(current_source_name() if name is None else name)
    if isinstance(loss_scale, str) and loss_scale == "auto":
        loss_scale = _auto_loss_scale(source.name)
    elif source.compute != "float16" and not isinstance(loss_scale, NoLossScale | None):
        warnings.warn(
            "Creating a Policy with a loss scale is only useful for float16 policies. You passed "
            f"loss_scale={loss_scale!r} for policy {source.name}. Consider not passing any "
            "loss_scale instead.",
            stacklevel=3,
        )
    if output_dtype is not None:
        output_dtype = dtype_name(output_dtype)
    if output_dtype and source.output and output_dtype != source.output:
        raise ValueError(
            f"`name` asks for output={source.output} but output_dtype={output_dtype!r}. Give one "
            "of them."
        )
    return {
        "source_name": source.name,
        "compute_dtype": source.compute,
        "variable_dtype": source.variable,
        "output_dtype": output_dtype or source.output or source.compute,
        "loss_scale": get_loss_scale(loss_scale),
        "kv_cache": kv_cache,
    }


def _auto_loss_scale(source_name: str) -> str | None:
    return "dynamic" if source_name == "mixed_float16" else None
