"""Whether weights are stored in the format that the policy beside them asks for."""

from collections.abc import Iterable, Iterator
from typing import Any

from ._file_header import Key
from ._modes import AUTO8
from ._paths import join
from ._policy import DTypePolicy
from ._policy_map import Policy, resolve
from ._prescaled import is_stored
from ._quantized_policy import QuantizedDTypePolicy
from ._stored import stored_of

WEIGHTS = ("kernel", "embedding")  # and not what a layer of a user stores by itself, or a cache
_EIGHT_BITS = ("int8", "float8_e4m3fn")  # what "auto8" becomes


def check_policies(lines: Iterable[str]) -> None:
    """Raises ValueError for the `difference`s of weights, if there are any."""
    lines = list(lines)
    if lines:
        more = [f"and {len(lines) - 10} more"] if len(lines) > 10 else []
        raise ValueError(
            "these weights were quantized under another policy than the one that they would be "
            "saved with, and no model can apply them with that:\n  "
            + "\n  ".join(lines[:10] + more)
            + "\nGive the policy of the model that mp.quantize was given, model.policy (NNX: wrap "
            "the model with it again). If a layer inside was wrapped by itself, give an "
            "mp.DTypePolicyMap with that layer's policy under its path"
        )


def differences(leaves: Iterable[tuple[tuple[Key, ...], Any]], policy: Policy) -> Iterator[str]:
    """The `difference`s of Linen variables.

    Args:
      leaves: by path, the collection first; weights in `params` are looked at.
      policy: of the model, frozen.
    """
    for path, leaf in leaves:
        if path[0] == "params" and path[-1] in WEIGHTS:
            line = difference(join(path), leaf, resolve(policy, join(path[1:-1])))
            yield from () if line is None else (line,)


def difference(name: str, weight: Any, policy: DTypePolicy) -> str | None:
    """How a stored weight differs from what the policy of its layer asks for; None if it does not.

    Args:
      name: of the weight.
      weight: anything; what is not stored, does not.
      policy: of its layer.
    """
    if not is_stored(weight) or weight.format.name in _formats(policy):
        return None
    asked = " or ".join(_formats(policy)) or "floats"
    return f"{name}: stored in {weight.format.name}, but {policy.name!r} asks for {asked}"


def _formats(policy: DTypePolicy) -> tuple[str, ...]:
    """The formats that weights may be stored in; none if they stay floats."""
    if isinstance(policy, QuantizedDTypePolicy) and policy.scheme.weights == AUTO8:
        return _EIGHT_BITS
    stored = stored_of(policy)
    return () if stored is None else (stored.format,)
