"""The paths of NNX modules in compiled programs, which Flax leaves without any.

A method of a wrapped module runs in a `jax.named_scope` of the name that the module has in the one
whose method called it. `nnx.scan` and `nnx.vmap` hand out copies of a module: one that is not found
by itself is found by its class, if the caller has one attribute of that class only.
"""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any

import jax
from flax import nnx

from .._decisions import ROOT

_running: contextvars.ContextVar[Any] = contextvars.ContextVar("mpjax_nnx_running", default=None)


@contextlib.contextmanager
def named(module: nnx.Module) -> Iterator[None]:
    """Opens the scope of a module whose method is called."""
    caller = _running.get()
    if caller is module:
        yield
        return
    path = [ROOT, type(module).__name__] if caller is None else _name_in(caller, module)
    token = _running.set(module)
    try:
        with contextlib.ExitStack() as scopes:
            for name in path:
                scopes.enter_context(jax.named_scope(name))
            yield
    finally:
        _running.reset(token)


def _name_in(caller: nnx.Module, module: nnx.Module) -> list[str]:
    children = list(_children(caller))
    same = [path for path, child in children if child is module]
    alike = [path for path, child in children if type(child) is type(module)]
    if same:
        return same[0]
    return alike[0] if len(alike) == 1 else [type(module).__name__]


def _children(node: Any) -> Iterator[tuple[list[str], nnx.Module]]:
    """The modules that a module holds, those in its lists and dicts too, with their paths."""
    items = enumerate(node) if isinstance(node, list | tuple | nnx.List) else _items(node)
    for name, child in items:
        if isinstance(child, list | tuple | dict | nnx.List | nnx.Dict):
            for path, inner in _children(child):
                yield [str(name), *path], inner
        elif isinstance(child, nnx.Module):
            yield [str(name)], child


def _items(node: Any) -> Iterator[tuple[Any, Any]]:
    yield from (node if isinstance(node, dict) else vars(node)).items()
