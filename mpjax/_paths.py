"""Layer paths, and the check that every key of a policy map reaches a layer."""

import difflib
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from ._policy_map import FrozenDTypePolicyMap


def join(path: Iterable[Any]) -> str:
    """`("blocks", 0, "mlp")` -> `"blocks/0/mlp"`; the wrapped module itself is `""`."""
    return "/".join(str(part) for part in path)


def nodes(params: Any, prefix: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], bool]]:
    """Yields `(path, owns_parameters)` of every module in a tree of parameters, in order."""
    children = {k: v for k, v in params.items() if isinstance(v, Mapping)}
    if prefix or len(children) < len(params):
        yield prefix, len(children) < len(params)
    for name, child in children.items():
        yield from nodes(child, (*prefix, name))


def owner_paths(params: Any) -> Iterator[tuple[str, ...]]:
    """Paths of the modules that own parameters, in order."""
    return (path for path, owns in nodes(params) if owns)


def _reaches(key: str, path: str) -> bool:
    return key == path or re.fullmatch(key, path) is not None


def check_keys(
    policy: Any, layers: Iterable[str], containers: Iterable[str], model: str, *, strict: bool
) -> None:
    """Raises if a key of a policy map matches no layer of the model.

    Args:
      policy: a frozen policy; anything but a map passes.
      layers: paths of the layers, relative to the wrapped module.
      containers: paths of modules that only hold other modules.
      model: the model's class name, for the message.
      strict: False turns the error into a warning.

    Raises:
      ValueError: a key matches no layer, or only containers; names the nearest paths.
    """
    if not isinstance(policy, FrozenDTypePolicyMap):
        return
    layers, containers = list(dict.fromkeys(layers)), list(dict.fromkeys(containers))
    for key in policy:
        if any(_reaches(key, path) for path in layers):
            continue
        message = _describe(key, layers, containers, model)
        if strict:
            raise ValueError(message)
        warnings.warn(message, stacklevel=4)  # the caller of `wrap`, or of `apply`


def _describe(key: str, layers: list[str], containers: list[str], model: str) -> str:
    reached = next((path for path in containers if _reaches(key, path)), None)
    if reached is not None:
        inside = [path for path in layers if re.fullmatch(_inside(key), path)]
        return (
            f"policy map key '{key}' matches only the container '{reached}' of {model}, not a "
            f"layer; write '{_inside(key)}' to reach the layers inside: {_quoted(inside[:5])}"
        )
    nearest = difflib.get_close_matches(key, [p for p in layers if p], n=5, cutoff=0.0)
    return (
        f"policy map key '{key}' matches no layer of {model}; nearest layer paths: "
        f"{_quoted(nearest)}. Keys match a layer's whole path (exactly, or as a regular "
        "expression by `re.fullmatch`)"
    )


def _inside(key: str) -> str:
    """The key for what is inside the containers that `key` matches."""
    if key == "":
        return ".*"
    return f"({key})/.*" if set(key) & set(r".^$*+?{}[]\|()") else f"{key}/.*"


def _quoted(paths: list[str]) -> str:
    return ", ".join(f"'{path}'" for path in paths) or "none"
