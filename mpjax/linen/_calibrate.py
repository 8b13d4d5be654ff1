"""Calibration for Linen: the model applied to batches, with observers among its variables."""

from collections.abc import Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
from flax import errors
from flax.core import meta, unfreeze

from .._calibrate import run
from .._calibrated import Calibrated, Watch, is_observed, needs_scale, states_after
from .._calibration import Calibration, check_plans, plan_of
from .._calibration_batches import Batch, with_progress
from .._context import Observation, observe
from .._paths import join
from .._quantize import check_finite
from .._scaling import is_state
from ._states import COLLECTION

_MUTABLE = ["params", COLLECTION]


def calibrate(
    calibration: Calibration,
    batches: Iterator[Batch],
    model: nn.Module,
    variables: Mapping[str, Any],
    observation: Observation,
) -> Calibrated:
    """What the batches tell of a model whose products are those of `observation`.

    Args:
      calibration: what was asked for.
      batches: all of them.
      model: a wrapped module.
      variables: with scaling states, if the policy keeps such.
      observation: what a trace of the model met.
    """
    variables = jax.tree.map(_unboxed, unfreeze(dict(variables)), is_leaf=_is_box)
    watch = _watch(calibration, variables, observation)
    check_plans(watch.plans, bool(watch.scaling), type(model).__name__)
    met = Observation(calibrating=True)

    def forward(
        variables: Any, states: Mapping[str, Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> dict[str, Any]:
        observed = _replaced(variables, watch, states)
        try:
            with observe(met):
                _, after = model.apply(observed, *args, **kwargs, mutable=_MUTABLE)
        except errors.FlaxError as error:
            raise ValueError(str(error)) from error
        found = [leaf for leaf in jax.tree.leaves(after, is_leaf=is_observed) if is_observed(leaf)]
        return {**states, **{leaf.path: states_after(leaf) for leaf in found}}

    seen = with_progress(batches, calibration.batches, calibration.progress)
    states = run(forward, variables, watch.start(), seen, met.observed, type(model).__name__)
    return Calibrated(watch, states)


def refuse_mutable(kwargs: Mapping[str, Any]) -> None:
    """Raises ValueError for a call that changes collections."""
    if "mutable" in kwargs:
        raise ValueError(
            f"mutable={kwargs['mutable']!r} beside `calibration`: batches run as in inference, and "
            "what the model would change is lost; leave `mutable` out, and give the arguments of "
            "inference, such as train=False"
        )


def with_scales(calibrated: Calibrated, variables: Mapping[str, Any]) -> Any:
    """The scaling states of variables whose weights are stored, with the scales found."""

    def scaled(keys: tuple[Any, ...], state: Any) -> Any:
        path = join((COLLECTION, *(key.key for key in keys)))
        if path not in calibrated.watch.scaling:
            return state
        kernel = join(("params", *(key.key for key in keys[:-1]), "kernel"))
        weight = _at(variables, kernel) if keys[-1].key == "input" else None
        return calibrated.scaling_of(path, kernel, meta.unbox(weight))

    return jax.tree.map_with_path(scaled, unfreeze(variables[COLLECTION]), is_leaf=is_state)


def _watch(
    calibration: Calibration, variables: Mapping[str, Any], observation: Observation
) -> Watch:
    plans = {}
    for path, product in observation.products.items():
        name = join(("params", path, product.name)) if path else join(("params", product.name))
        weight = _at(variables, name)
        check_finite(weight, name)
        policy = observation.policies[path]
        plans[name] = plan_of(calibration, policy, product, tuple(weight.shape))
    scaling = {}
    for keys, leaf in jax.tree.leaves_with_path(variables.get(COLLECTION, {}), is_leaf=is_state):
        if is_state(leaf) and needs_scale(keys[-1].key):
            scaling[join((COLLECTION, *(key.key for key in keys)))] = leaf
    return Watch(plans, scaling, calibration.observer)


def _replaced(variables: Any, watch: Watch, states: Mapping[str, Any]) -> dict[str, Any]:
    """The variables with what observes in the places of what is observed."""

    def replace(keys: tuple[Any, ...], leaf: Any) -> Any:
        path = join(key.key for key in keys if hasattr(key, "key"))
        if is_state(leaf):
            return watch.state(path, states) if path in watch.scaling else leaf
        return watch.weight(path, leaf, states)

    return jax.tree.map_with_path(replace, variables, is_leaf=is_state)


def _at(variables: Any, path: str) -> Any:
    for part in path.split("/"):
        variables = variables[part]
    return variables


def _is_box(leaf: Any) -> bool:
    return isinstance(leaf, meta.AxisMetadata)


def _unboxed(leaf: Any) -> Any:
    if not _is_box(leaf):
        return leaf
    return leaf.value if isinstance(leaf, meta.Partitioned) else leaf.unbox()
