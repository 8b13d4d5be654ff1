"""Runs the batches of a calibration through a model, and stops at the first that is not finite."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ._calibration_batches import Batch, is_array, is_float_array, named_arrays
from ._finite import amax_of

# Of the arrays of the model, the states by path, and the arguments of a call: the states after it.
Forward = Callable[[Any, Mapping[str, Any], tuple[Any, ...], Mapping[str, Any]], dict[str, Any]]


def run(
    forward: Forward,
    arrays: Any,
    states: dict[str, Any],
    batches: Iterator[Batch],
    observed: Sequence[str],
    model: str,
) -> dict[str, Any]:
    """The states after all batches, one of which is held at a time.

    `forward` is compiled once for each shape of a batch.

    Args:
      forward: runs the model.
      arrays: its weights, and all else that it computes from.
      states: of observers and statistics, by path.
      batches: the arguments of the calls.
      observed: paths of what observes, which tracing lists in the order of the calls.
      model: its name, for messages.

    Raises:
      ValueError: a batch, or an operand that it makes, is not finite.
      NotImplementedError: the model cannot be run with states in it.
    """
    steps: dict[Any, Any] = {}
    for number, batch in enumerate(batches):
        leaves, treedef = jax.tree.flatten(batch)
        fixed = tuple((i, leaf) for i, leaf in enumerate(leaves) if not is_array(leaf))
        key = (treedef, tuple((i, _Fixed(leaf)) for i, leaf in fixed))
        if key not in steps:
            steps[key] = _step(forward, treedef, dict(fixed))
        given = {i: leaf for i, leaf in enumerate(leaves) if is_array(leaf)}
        try:
            states, finite = steps[key](arrays, states, given)
        except (NotImplementedError, TypeError, ValueError) as error:
            raise _refused(error, number, model) from error
        _check_finite(finite, number, observed)
    return states


class _Fixed:
    """What is no array, as a part of a key: equal by value, or else by identity."""

    def __init__(self, value: Any):
        self.value = value

    def __hash__(self) -> int:
        return hash(type(self.value))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Fixed) or type(other.value) is not type(self.value):
            return False
        same = self.value is other.value or self.value == other.value
        return same is True


def _step(forward: Forward, treedef: Any, fixed: dict[int, Any]) -> Any:
    @jax.jit
    def step(arrays: Any, states: dict[str, Any], given: dict[int, Any]) -> Any:
        leaves = [{**fixed, **given}[i] for i in range(len(fixed) + len(given))]
        batch: Batch = jax.tree.unflatten(treedef, leaves)
        inputs = {
            name: jnp.isfinite(amax_of(x)) for name, x in named_arrays(batch) if is_float_array(x)
        }
        after = forward(arrays, states, batch.args, batch.kwargs)
        inside = {path: _finite(state) for path, state in after.items()}
        return after, {"inputs": inputs, "inside": inside}

    return step


def _finite(state: Any) -> Any:
    """bool [layers]: whether every operand so far was finite."""
    if isinstance(state, Mapping):
        flags = [_finite(each) for each in state.values()]
        return jnp.all(jnp.stack(flags), axis=0) if flags else jnp.ones((), jnp.bool_)
    return state.finite


def _refused(error: Exception, number: int, model: str) -> Exception:
    """What to raise where a batch could not be run; the first ran without observers before."""
    if number > 0:
        return ValueError(f"batch {number} of `calibration` does not fit {model}: {error}")
    return NotImplementedError(
        f"{model} cannot be calibrated: {error} Weights that nn.scan or nn.vmap share between "
        "their steps (variable_broadcast, or None among variable_axes), or that another module "
        "reads, cannot be observed: give their layers a policy that needs no calibration"
    )


def _check_finite(finite: Any, number: int, observed: Sequence[str]) -> None:
    found = jax.device_get(finite)
    for name, good in found["inputs"].items():
        if not good:
            raise ValueError(
                f"batch {number} of `calibration` is not finite: its {name} holds a NaN or an "
                "infinity. Nothing was changed; leave the batch out"
            )
    for path in observed:
        good = found["inside"][path]
        if not good.all():
            where = "" if good.ndim == 0 else f" (number {int(good.ravel().argmin())} of a stack)"
            raise ValueError(
                f"batch {number} of `calibration` is finite, but makes {_operand(path)}{where} NaN "
                "or infinite. Nothing was changed; leave the batch out, or find out why"
            )


def _operand(path: str) -> str:
    """What a path in Linen's variables or in an NNX model observes, in words."""
    *layer, name = path.split("/")
    layer = layer[1:] if layer[:1] in (["params"], ["scaling"]) else layer
    layer = layer[:-1] if layer[-1:] == ["scaling"] else layer
    operand = "input" if name == "kernel" else name.replace("_", " ")
    return f"the {operand} of layer '{'/'.join(layer)}'"
