"""One policy per layer path: an editable map, its frozen snapshot, and what reads them."""

import dataclasses
import re
from collections.abc import Mapping, MutableMapping
from typing import Any, Self, overload

import jax

from ._identifiers import single_policy
from ._policy import DTypePolicy
from ._policy_lookup import PolicyLookup
from ._target import Target


class DTypePolicyMap(PolicyLookup, MutableMapping[str, DTypePolicy]):
    """A dict-like object from layer paths, or regular expressions over them, to policies.

    `policy_map[path]` takes the key equal to `path`, else the one key that matches all of it as a
    regular expression, else the default policy. `key in policy_map` is about keys only: no
    expression is matched. To jax, a map is a pytree without leaves that flattens to `freeze(map)`.

    Args:
        default_policy: Anything that names one policy. None takes the global policy, now, and
            leaves the choice open to the process that loads the map from its config.
        policy_map: A dict from paths or regular expressions to anything that names one policy.

    Raises:
        TypeError: If `policy_map` is not a dict, or a key is not a string.
        ValueError: If a value names no policy, a key is no regular expression, or
            `default_policy` is itself a map.

    References:
        https://keras.io/api/mixed_precision/policy/
    """

    def __init__(self, default_policy: Any = None, policy_map: dict[str, Any] | None = None):
        if isinstance(default_policy, PolicyLookup):
            raise ValueError(
                "`default_policy` cannot be a map. Pass one policy, such as its default_policy. "
                f"Received: default_policy={default_policy}"
            )
        if policy_map is not None and not isinstance(policy_map, dict):
            raise TypeError(
                "If specified, `policy_map` must be a dict. "
                f"Received: policy_map={policy_map} (of type {type(policy_map)})"
            )
        self._default_policy = single_policy(default_policy)
        self._follows_global = default_policy is None
        self._policies: dict[str, DTypePolicy] = {}
        self.update(policy_map or {})

    def _table(self) -> Mapping[str, DTypePolicy]:
        return self._policies

    def __setitem__(self, key: str, policy: Any) -> None:
        """Adds a key; to replace one, delete it first.

        Raises:
            TypeError: If `key` is not a string.
            ValueError: If `key` exists or is no regular expression, or `policy` names no policy.
        """
        if not isinstance(key, str):
            raise TypeError(f"A key of DTypePolicyMap must be a string. Received: {key!r}")
        if key in self._policies:
            raise ValueError(
                f"{key} already exist in the DTypePolicyMap with value {self._policies[key]}. "
                "Please make sure to not use duplicated keys: delete the old one first."
            )
        try:
            re.compile(key)
        except re.error as error:
            raise ValueError(
                f"Key {key!r} of DTypePolicyMap is not a valid regular expression: {error}. "
                "Escape what is meant literally, as re.escape does."
            ) from error
        try:
            self._policies[key] = single_policy(policy)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"Cannot interpret the assigned value of key {key!r} as one policy. "
                f"Received: {policy!r} (of type {type(policy)}). {error}"
            ) from error

    def __delitem__(self, key: str) -> None:
        del self._policies[key]

    def pop(self, key: str, *default: Any) -> Any:
        """Removes the key equal to `key` and returns its policy, else `default` if given.

        Raises:
            KeyError: If there is no such key and no `default`.
        """
        return self._policies.pop(key, *default)

    def setdefault(self, key: str, default: Any = None) -> DTypePolicy:
        """Returns the policy of the key equal to `key`, which is added if there is none."""
        if key not in self._policies:
            self[key] = default
        return self._policies[key]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, DTypePolicyMap):
            return NotImplemented
        return freeze(self) == freeze(other)

    def __copy__(self) -> "DTypePolicyMap":
        return _editable_copy(self)

    def resolve(
        self, target: str | Target | None = None, *, when: str = "always"
    ) -> "DTypePolicyMap":
        """Returns the map for one kind of hardware: see `DTypePolicy.resolve`."""
        return _editable_copy(freeze(self).resolve(target, when=when))

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Builds the map from the dict that `get_config()` returned."""
        return cls(**config)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, repr=False)
class FrozenDTypePolicyMap(PolicyLookup):
    """An immutable, hashable snapshot of a `DTypePolicyMap`, its keys sorted; see `freeze`."""

    _default_policy: DTypePolicy
    _entries: tuple[tuple[str, DTypePolicy], ...]
    _follows_global: bool

    def _table(self) -> Mapping[str, DTypePolicy]:
        return dict(self._entries)

    def __hash__(self) -> int:
        return hash((self._default_policy, self._entries, self._follows_global))

    def resolve(
        self, target: str | Target | None = None, *, when: str = "always"
    ) -> "FrozenDTypePolicyMap":
        """Returns the snapshot for one kind of hardware: see `DTypePolicy.resolve`."""
        default = self._default_policy.resolve(target, when=when)
        entries = ((key, each.resolve(target, when=when)) for key, each in self._entries)
        return FrozenDTypePolicyMap(default, tuple(entries), self._follows_global)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "FrozenDTypePolicyMap":
        """Builds the snapshot from the dict that `get_config()` returned."""
        return _snapshot(DTypePolicyMap.from_config(config))


Policy = DTypePolicy | DTypePolicyMap | FrozenDTypePolicyMap


@overload
def freeze(policy: DTypePolicy) -> DTypePolicy: ...
@overload
def freeze(policy: DTypePolicyMap | FrozenDTypePolicyMap) -> FrozenDTypePolicyMap: ...
def freeze(policy: Policy) -> DTypePolicy | FrozenDTypePolicyMap:
    """Returns a hashable policy: the snapshot of a map as it is now, any other policy itself."""
    return _snapshot(policy) if isinstance(policy, DTypePolicyMap) else policy


def resolve(policy: Policy, path: str) -> DTypePolicy:
    """Returns the policy of a layer path: looked up in a map, any other policy itself.

    Raises:
        ValueError: If several keys of the map match `path` and none is equal to it.
    """
    return policy if isinstance(policy, DTypePolicy) else policy[path]


def resolve_on(
    policy: Policy, target: str | Target | None, when: str = "always"
) -> DTypePolicy | FrozenDTypePolicyMap:
    """Returns a hashable policy for one kind of hardware: see `DTypePolicy.resolve`."""
    if isinstance(policy, DTypePolicy):
        return policy.resolve(target, when=when)
    return freeze(policy).resolve(target, when=when)


def _snapshot(policy_map: DTypePolicyMap) -> FrozenDTypePolicyMap:
    entries = tuple(sorted(policy_map.items()))
    return FrozenDTypePolicyMap(policy_map.default_policy, entries, policy_map.follows_global)


def _editable_copy(lookup: PolicyLookup) -> DTypePolicyMap:
    policy_map = DTypePolicyMap(lookup.default_policy, dict(lookup))
    policy_map._follows_global = lookup.follows_global
    return policy_map


def _flatten(policy_map: DTypePolicyMap) -> tuple[tuple[()], Any]:
    return (), _snapshot(policy_map)


def _unflatten(snapshot: Any, _: Any) -> DTypePolicyMap:
    return _editable_copy(snapshot)


jax.tree_util.register_pytree_node(DTypePolicyMap, _flatten, _unflatten)
