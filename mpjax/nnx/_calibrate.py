"""Calibration for NNX: a copy of the model called on batches, observers among its variables."""

from collections.abc import Iterator, Mapping
from typing import Any

import jax
from flax import nnx

from .._calibrate import run
from .._calibrated import Calibrated, Watch, is_observed, needs_scale, states_after
from .._calibration import Calibration, WeightPlan, check_plans
from .._calibration_batches import Batch, with_progress
from .._context import Frame, Observation, active
from .._paths import join
from ._states import Scaling


def calibrate(
    calibration: Calibration,
    batches: Iterator[Batch],
    model: nnx.Module,
    plans: Mapping[str, WeightPlan],
) -> Calibrated:
    """What the batches tell of a model, which stays as it is.

    Args:
      calibration: what was asked for.
      batches: all of them.
      model: a wrapped module.
      plans: of its weights, by path.
    """
    scaling = {path: x.get_raw_value() for path, x in scaling_of(model).items()}
    watch = Watch(plans, scaling, calibration.observer)
    check_plans(plans, bool(scaling), type(model).__name__)
    graph, arrays = nnx.split(model)
    met = Observation(calibrating=True)

    def forward(
        arrays: Any, states: Mapping[str, Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> dict[str, Any]:
        copy = nnx.merge(graph, arrays)
        variables = {join(path): x for path, x in nnx.iter_graph(copy) if can_be_observed(x)}
        for path, variable in variables.items():
            if path in plans:
                variable.set_raw_value(watch.weight(path, variable.get_raw_value(), states))
            elif path in scaling:
                variable.set_raw_value(watch.state(path, states))
        with active(Frame(None, observation=met)):
            copy(*args, **kwargs)
        leaves = [variable.get_raw_value() for variable in variables.values()]
        return {**states, **{x.path: states_after(x) for x in leaves if is_observed(x)}}

    seen = with_progress(batches, calibration.batches, calibration.progress)
    states = run(forward, arrays, watch.start(), seen, met.observed, type(model).__name__)
    return Calibrated(watch, states)


def can_be_observed(x: Any) -> bool:
    """Whether a node of a graph is a variable that may be observed."""
    return isinstance(x, nnx.Param | Scaling)


def scaling_of(model: nnx.Module) -> dict[str, Scaling]:
    """The variables whose scales inference uses, by path."""
    return {
        join(path): x
        for path, x in nnx.iter_graph(model)
        if isinstance(x, Scaling) and needs_scale(str(path[-1]))
    }


def scales_of(calibrated: Calibrated, stored: Mapping[str, Any]) -> dict[str, Any]:
    """The scaling states by path, with the scales found, for weights that are stored so."""
    found = {}
    for path in calibrated.watch.scaling:
        *layer, _, name = path.split("/")  # the attribute that holds the states, and the operand
        kernel = join((*layer, "kernel"))
        weight = stored.get(kernel) if name == "input" else None
        found[path] = calibrated.scaling_of(path, kernel, weight)
    return found


def check_runs(model: nnx.Module, batch: Batch) -> None:
    """Traces one call of a copy of the model, whose own errors are the clearest."""
    graph, arrays = nnx.split(model)
    leaves, treedef = jax.tree.flatten(batch)
    given = {i: x for i, x in enumerate(leaves) if hasattr(x, "shape") and hasattr(x, "dtype")}

    def call(arrays: Any, given: Mapping[int, Any]) -> Any:
        args, kwargs = jax.tree.unflatten(treedef, [given.get(i, x) for i, x in enumerate(leaves)])
        return nnx.merge(graph, arrays)(*args, **kwargs)

    jax.eval_shape(call, arrays, given)
