"""Policies to and from configs, and everything a user may write where a policy is meant."""

from collections.abc import Mapping
from typing import Any

from ._global_policy import dtype_policy
from ._identifiers import serialize_single, single_policy
from ._policy import DTypePolicy
from ._policy_map import DTypePolicyMap, FrozenDTypePolicyMap, Policy

_MAP_CLASSES: dict[str, type[DTypePolicyMap] | type[FrozenDTypePolicyMap]] = {
    "DTypePolicyMap": DTypePolicyMap,
    "FrozenDTypePolicyMap": FrozenDTypePolicyMap,
}


def get_policy(identifier: Any = None) -> Policy:
    """Returns the policy that `identifier` names.

    Args:
        identifier: A policy name (`"mixed_bfloat16"`, `"int8_from_mixed_bfloat16"`,
            `"params=float32,compute=bfloat16"`), a dtype, a config as `serialize` returns, a
            policy or map (returned as it is), or None for the global policy.

    Raises:
        TypeError: If a config holds arguments that its class does not take.
        ValueError: If `identifier` names no policy.

    References:
        https://keras.io/api/mixed_precision/policy/
    """
    if identifier is None:
        return dtype_policy()
    if isinstance(identifier, Policy):
        return identifier
    if isinstance(identifier, Mapping) and identifier.get("class_name") in _MAP_CLASSES:
        return _MAP_CLASSES[identifier["class_name"]].from_config(identifier["config"])
    return single_policy(identifier)


def serialize(policy: Policy) -> dict[str, Any]:
    """Returns a JSON-serializable dict from which `deserialize` restores `policy`.

    Raises:
        ValueError: If `policy` is not a policy.
    """
    if isinstance(policy, DTypePolicy):
        return serialize_single(policy)
    if isinstance(policy, Policy):
        return {"class_name": type(policy).__name__, "config": policy.get_config()}
    raise ValueError(f"Cannot serialize {policy!r}: it is not a policy. Call get_policy on it.")


def deserialize(config: Mapping[str, Any] | str) -> Policy:
    """Returns the policy that `serialize` wrote, or Keras 3, or TensorFlow 2.4.

    Args:
        config: A dict with `class_name` and `config`, or the name of a policy.

    Raises:
        TypeError: If `config` holds arguments that its class does not take.
        ValueError: If `config` is something else, or its class is unknown.
    """
    if not isinstance(config, str) and not (isinstance(config, Mapping) and "class_name" in config):
        raise ValueError(
            "Cannot deserialize a policy: expected a dict with 'class_name' and 'config', or a "
            f"name. Received: {config!r} (of type {type(config)})"
        )
    return get_policy(config)
