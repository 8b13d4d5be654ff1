"""What a user may write where one policy is meant: a string, a dtype, a config or a policy."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from ._ambient import DEFAULT_NAME, current_policy
from ._dtype_names import dtype_name
from ._policy import DTypePolicy, FloatDTypePolicy
from ._quantized_policy import QuantizedDTypePolicy, QuantizedFloat8DTypePolicy

# The class names that mpjax, Keras 3 and TensorFlow 2.4 write in configs.
_CLASSES: dict[str, type[DTypePolicy]] = {
    "DTypePolicy": DTypePolicy,
    "FloatDTypePolicy": FloatDTypePolicy,
    "QuantizedDTypePolicy": QuantizedDTypePolicy,
    "QuantizedFloat8DTypePolicy": QuantizedFloat8DTypePolicy,
    "Int4DTypePolicy": QuantizedDTypePolicy,
    "GPTQDTypePolicy": QuantizedDTypePolicy,
    "AWQDTypePolicy": QuantizedDTypePolicy,
    "Policy": DTypePolicy,
    "PolicyV1": DTypePolicy,
}
_QUANTIZED_PREFIXES = ("int8", "int4", "w4a8", "float8", "auto8", "gptq", "awq")


def default_policy() -> DTypePolicy:
    """Returns the global policy, or the default of the global policy if that is a map."""
    policy = current_policy()
    if policy is None:
        return DTypePolicy(DEFAULT_NAME)
    return policy if isinstance(policy, DTypePolicy) else policy.default_policy


def single_policy(identifier: Any) -> DTypePolicy:
    """Returns the policy that `identifier` names; unlike `get_policy`, never a map.

    Raises:
        TypeError: If a config holds arguments that its class does not take.
        ValueError: If `identifier` names no policy.
    """
    if identifier is None:
        return default_policy()
    if isinstance(identifier, DTypePolicy):
        return identifier
    if isinstance(identifier, str):
        return _policy_from_string(identifier)
    if isinstance(identifier, Mapping) and "class_name" in identifier:
        return _policy_from_config(identifier)
    if isinstance(identifier, np.dtype | type):
        try:
            return DTypePolicy(dtype_name(identifier))
        except ValueError:
            pass
    raise ValueError(
        "Cannot interpret `dtype` argument. Expected a string, a dtype, a config or an instance "
        f"of DTypePolicy. Received: dtype={identifier!r} (of type {type(identifier)})"
    )


def serialize_single(policy: DTypePolicy) -> dict[str, Any]:
    """Returns a JSON-serializable dict from which `single_policy` restores `policy`."""
    return {"class_name": type(policy).__name__, "config": policy.get_config()}


def _policy_from_string(text: str) -> DTypePolicy:
    if "_from_" not in text and not text.startswith(_QUANTIZED_PREFIXES):
        return DTypePolicy(text)
    parts = text.split("_from_")
    if len(parts) != 2:
        raise ValueError(
            "Cannot convert `policy` into a valid pair (`mode`, `source_name`) to instantiate "
            f"`QuantizedDTypePolicy`. Use a string such as 'int8_from_mixed_bfloat16'. Received: "
            f"policy={text!r}"
        )
    mode, source_name = parts
    if mode.startswith("float8"):
        return QuantizedFloat8DTypePolicy(mode, source_name)
    return QuantizedDTypePolicy(mode, source_name)


def _policy_from_config(config: Mapping[str, Any]) -> DTypePolicy:
    class_name = config["class_name"]
    if class_name not in _CLASSES:
        raise ValueError(
            f"Unknown policy class_name={class_name!r}. Expected one of {tuple(_CLASSES)}, or "
            "DTypePolicyMap where a map may stand."
        )
    return _CLASSES[class_name].from_config(config.get("config", {}))
