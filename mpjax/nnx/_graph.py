"""What an NNX module holds itself, as opposed to what its submodules hold."""

from collections.abc import Iterator
from typing import Any

from flax import nnx


def own_variables(module: nnx.Module) -> list[nnx.Variable]:
    """The module's own variables, in lists and dicts too."""
    return [x for x in _own(module) if isinstance(x, nnx.Variable)]


def own_containers(module: nnx.Module) -> list[nnx.List | nnx.Dict]:
    """The module's own `nnx.List`s and `nnx.Dict`s, nested ones too."""
    return [x for x in _own(module) if isinstance(x, nnx.List | nnx.Dict)]


def _own(node: Any) -> Iterator[Any]:
    items = vars(node) if isinstance(node, nnx.Pytree) else node
    for value in items.values() if isinstance(items, dict) else items:
        if isinstance(value, nnx.Variable):
            yield value
        elif isinstance(value, nnx.List | nnx.Dict | list | tuple | dict):
            yield value
            yield from _own(value)
