"""How a layer path finds its policy among the keys of a map.

A path is looked up in this order:

    1. a key that is the path, letter for letter
    2. the one key that matches the whole path as a regular expression; two such keys are an error
    3. the default policy
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from ._identifiers import serialize_single
from ._loss_scale import LossScale
from ._policy import DTypePolicy


class PolicyLookup(Mapping[str, DTypePolicy]):
    """What the map and its snapshot share: lookup, and the attributes of the default policy."""

    _default_policy: DTypePolicy
    _follows_global: bool

    def _table(self) -> Mapping[str, DTypePolicy]:
        raise NotImplementedError

    @property
    def default_policy(self) -> DTypePolicy:
        """The policy of the paths that no key matches."""
        return self._default_policy

    @property
    def follows_global(self) -> bool:
        """Whether the default was None at construction, and so is open again when loaded."""
        return self._follows_global

    def __getitem__(self, path: str) -> DTypePolicy:
        """Returns the policy of a layer path; the default policy if no key matches it.

        Raises:
            ValueError: If several keys match `path` and none is equal to it.
        """
        key = self._key_of(path)
        return self.default_policy if key is None else self._table()[key]

    def names(self, path: str) -> bool:
        """Whether a key is about a layer path, so that it does not get the default policy.

        Raises:
            ValueError: If several keys match `path` and none is equal to it.
        """
        return self._key_of(path) is not None

    def _key_of(self, path: str) -> str | None:
        table = self._table()
        if path in table:
            return path
        matches = [key for key in table if re.fullmatch(key, path)]
        if len(matches) > 1:
            raise ValueError(
                f"Path '{path}' matches multiple dtype policy specification keys: {matches}. "
                "Please make sure each path only matches at most one key of the DTypePolicyMap."
            )
        return matches[0] if matches else None

    def __contains__(self, key: object) -> bool:
        return key in self._table()

    def __iter__(self) -> Iterator[str]:
        return iter(self._table())

    def __len__(self) -> int:
        return len(self._table())

    @property
    def name(self) -> str:
        """`"map_"` and the name of the default policy."""
        return f"map_{self.default_policy.name}"

    @property
    def source_name(self) -> str:
        """The default policy's name without quantization."""
        return self.default_policy.source_name

    @property
    def compute_dtype(self) -> str:
        """The default policy's compute dtype."""
        return self.default_policy.compute_dtype

    @property
    def variable_dtype(self) -> str:
        """The default policy's variable dtype."""
        return self.default_policy.variable_dtype

    @property
    def output_dtype(self) -> str:
        """The default policy's output dtype."""
        return self.default_policy.output_dtype

    @property
    def loss_scale(self) -> LossScale | None:
        """The default policy's loss scale."""
        return self.default_policy.loss_scale

    @property
    def quantization_mode(self) -> str | None:
        """The default policy's quantization mode."""
        return self.default_policy.quantization_mode

    def __repr__(self) -> str:
        return f'<{type(self).__name__} "{self.name}">'

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments as a JSON-serializable dict.

        If the default was left open, it is None in the dict, and so are the names (or source
        names) equal to it: they follow the global policy of the process that loads the dict.
        """
        policy_map = {key: serialize_single(policy) for key, policy in self.items()}
        if not self.follows_global:
            return {
                "default_policy": serialize_single(self.default_policy),
                "policy_map": policy_map,
            }
        for key, policy in self.items():
            if policy.source_name == self.source_name:
                name = "source_name" if policy.quantization_mode else "name"
                policy_map[key]["config"][name] = None
        return {"default_policy": None, "policy_map": policy_map}
