"""NNX objects in a pytree: what a checkpoint saves of them, and how it puts it back."""

from typing import Any

from flax import nnx


def is_node(x: Any) -> bool:
    """Whether `x` is a module, an optimizer or another NNX object."""
    return isinstance(x, nnx.Pytree)


def state_of(x: Any) -> Any:
    """The arrays of an NNX object, shared ones once; anything else as it is."""
    return nnx.as_pure(nnx.state(x)) if is_node(x) else x


def put(x: Any, state: Any) -> Any:
    """Updates an NNX object in place and returns it; anything else becomes `state`."""
    if not is_node(x):
        return state
    nnx.update(x, state)
    return x


def step_of(x: Any) -> Any:
    """The steps that an optimizer has taken; None for anything else."""
    return x.step[...] if isinstance(x, nnx.Optimizer) else None
