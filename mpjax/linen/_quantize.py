"""`quantize` and `layer_policies` for Linen: trace one call, and see which layers it meets."""

import contextlib
import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import errors
from flax.core import FrozenDict, freeze, meta, unfreeze

from .._calibrated import Calibrated, round_weight
from .._calibration import Calibration
from .._calibration_batches import first_and_all
from .._context import Observation, Product
from .._lazy_array import abstract, is_lazy, on_device
from .._paths import join, owner_paths
from .._policy import DTypePolicy
from .._policy_map import resolve
from .._prepack import packed
from .._prescaled import is_stored
from .._quantization_report import (
    QuantizationReport,
    QuantizedWeight,
    left_weight,
    quantized_weight,
)
from .._quantize import (
    check_donated,
    check_finite,
    check_storable,
    is_profitable_only,
    quantize_weight,
    release,
)
from .._stored import CannotStoreError, stored_of
from .._wrap import policies_of
from ._calibrate import calibrate, refuse_mutable, with_scales
from ._partitioned import boxed_like
from ._reached import check_reached
from ._states import COLLECTION
from ._trace import call_of, explained, trace
from ._wrap import policy_of


def quantize(
    calibration: Calibration | None,
    model: nn.Module,
    variables: Any,
    *args: Any,
    donate: bool = False,
    prepack: bool = False,
    **kwargs: Any,
) -> tuple[Any, QuantizationReport]:
    """See `mpjax.quantize`; returns the report in any case."""
    variables = _check_variables(variables, "mp.quantize(model, variables, x)")
    calibrated, batches, is_frozen = None, iter(()), isinstance(variables, FrozenDict)
    if calibration is not None:
        refuse_mutable(kwargs)
        variables = {name: jax.tree.map(on_device, tree) for name, tree in variables.items()}
        first, batches = first_and_all(calibration.batches, kwargs)
        if COLLECTION not in variables:
            variables = init_scaling(model, variables, *first.args, **first.kwargs)
        if args:
            trace(model, variables, *first.args, **first.kwargs)  # before it is run
        else:
            args, kwargs = first
    _check_rows(model, args, kwargs)
    shapes = abstract(variables)
    observation = trace(model, shapes, *args, **kwargs)
    check_reached(model, variables["params"], observation)
    _set_aside(observation)
    if observation.products:  # all that shapes can tell, before any work
        store = functools.partial(_store, None, model, observation=observation, prepack=prepack)
        stored = jax.eval_shape(lambda shapes: store(shapes)[0], shapes)
        _check_applies(model, stored, *args, **kwargs)
    if donate:
        _check_before_donation(variables, observation)
    if calibration is not None and observation.products:
        calibrated = calibrate(calibration, batches, model, variables, observation)
    quantized, report = _store(calibrated, model, variables, observation, donate, prepack)
    return freeze(quantized) if is_frozen else quantized, report


def _check_rows(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Raises ValueError for a call without rows, where layers are judged by their number."""
    if not any(map(is_profitable_only, policies_of(policy_of(model)))):
        return
    shapes = [x.shape for x in jax.tree.leaves((args, dict(kwargs))) if hasattr(x, "shape")]
    shapes = [shape for shape in shapes if shape]
    if shapes and all(0 in shape for shape in shapes):
        raise ValueError(
            f"the call that mp.quantize was given has no rows (an array of shape {shapes[0]}), and "
            "by their number when='profitable' decides which layers to quantize: give arrays, or "
            "shapes, of the size that calls of the model will have"
        )


def _store(
    calibrated: Calibrated | None,
    model: nn.Module,
    variables: Any,
    observation: Observation,
    donate: bool = False,
    prepack: bool = False,
) -> tuple[Any, QuantizationReport]:
    """The variables with stored weights, one made after the other, and the report."""
    params, rows = unfreeze(variables["params"]), {}
    for path, product in observation.products.items():
        name = _name(path, product)
        policy = observation.policies[path]
        rows[name] = _replace(calibrated, params, path, product, policy, name, donate, prepack)
    for path, leaf in jax.tree.leaves_with_path(params, is_leaf=is_stored):
        name = join(("params", *(str(key.key) for key in path if hasattr(key, "key"))))
        rank = observation.ranks.get(name.removeprefix("params/"), len(np.shape(leaf)))
        is_weight = rank > 1 and not name.endswith("/bias")
        if is_weight and name not in rows and not is_stored(leaf):
            rows[name] = _left(model, observation, name, leaf)
    quantized = {
        name: jax.tree.map(on_device, tree) if is_lazy(tree) else tree
        for name, tree in {**variables, "params": params}.items()
    }
    if calibrated is not None and COLLECTION in variables:
        quantized[COLLECTION] = with_scales(calibrated, quantized)
    return quantized, QuantizationReport(tuple(rows.values()))


def _set_aside(observation: Observation) -> None:
    """Takes the weights that a policy leaves as they are from those to be stored."""
    products = observation.products
    left = {path: each.left for path, each in products.items() if each.left is not None}
    observation.left = {_name(path, products[path]): reason for path, reason in left.items()}
    observation.products = {path: each for path, each in products.items() if path not in left}


def _check_before_donation(variables: Any, observation: Observation) -> None:
    """Raises for whatever would come up when some weights have been freed already."""
    weights = {
        _name(path, product): meta.unbox(_owner(variables["params"], path)[product.name])
        for path, product in observation.products.items()
    }
    check_donated(weights, variables)
    for name, weight in weights.items():
        check_finite(weight, name)


def _name(path: str, product: Product) -> str:
    return join(("params", path, product.name)) if path else join(("params", product.name))


def _owner(params: Any, path: str) -> Any:
    """What a module has in a tree of parameters."""
    for part in path.split("/") if path else ():
        params = params[part]
    return params


def _left(model: nn.Module, observation: Observation, name: str, leaf: Any) -> QuantizedWeight:
    if name in observation.left:
        return left_weight(name, leaf, observation.left[name], wanted=False)
    owner = join(name.split("/")[1:-1])
    called = owner in observation.policies
    policy = observation.policies[owner] if called else resolve(policy_of(model), owner)
    reason = f"its policy is {policy.name!r}"
    if stored_of(policy) is not None:
        reason = "its layer multiplies it in no product that can be quantized"
        reason = reason if called else "the example call did not reach its layer"
    return left_weight(name, leaf, reason, wanted=stored_of(policy) is not None)


def _check_applies(model: nn.Module, quantized: Any, *args: Any, **kwargs: Any) -> None:
    """Traces the model once more, on what it will be given from now on."""
    try:
        jax.eval_shape(*call_of(model, quantized, *args, **kwargs))
    except (NotImplementedError, TypeError, ValueError, errors.FlaxError) as error:
        raise NotImplementedError(
            f"{type(model).__name__} cannot apply the weights that were quantized for it: {error} "
            "A kernel that another module reads or transforms (nn.WeightNorm, nn.map_variables), "
            "or that is stacked along an axis that is not the first, cannot be quantized: give its "
            "layer a policy that is not quantized"
        ) from error


def _check_variables(variables: Any, call: str) -> Mapping[str, Any]:
    if isinstance(variables, Mapping) and "params" in variables:
        return variables
    got = type(variables).__name__
    if isinstance(variables, Mapping) and variables:
        got = f"a {got} with {', '.join(repr(name) for name in variables)}"
    raise TypeError(
        "`variables` must be what `init` returned, a dict with 'params', "
        f"but got {got}: call {call}"
    )


def _replace(
    calibrated: Calibrated | None,
    params: dict[str, Any],
    path: str,
    product: Product,
    policy: DTypePolicy,
    name: str,
    donate: bool,
    prepack: bool,
) -> QuantizedWeight:
    """Stores one weight as its policy asks, in place; the row that says so, or why not."""
    owner = _owner(params, path)
    boxed = owner[product.name]
    weight = meta.unbox(boxed)
    stacked = weight.ndim - len(product.shape)
    if weight.shape[stacked:] != product.shape:
        raise NotImplementedError(
            f"'{name}' is stored as {weight.shape} but its layer sees {product.shape}: a stack of "
            "layers must have its layers along the leading axes (variable_axes={'params': 0})"
        )
    stored = stored_of(policy)
    assert stored is not None, f"{name} is multiplied as quantized under {policy!r}"
    plain = functools.partial(quantize_weight, stored=stored, product=product, path=name)
    try:
        quantized, rounding = round_weight(calibrated, name, weight, plain)
    except CannotStoreError as error:
        return left_weight(name, weight, str(error), wanted=True)
    quantized, unpacked = packed(quantized, stored, product) if prepack else (quantized, None)
    owner[product.name] = boxed_like(boxed, quantized)
    row = quantized_weight(name, weight, quantized, rounding, unpacked)
    if donate:
        release(weight)
    return row


def unquantized(model: nn.Module, variables: Any, observation: Observation) -> dict[str, str]:
    """The float weights that `quantize` would store: path -> format.

    Args:
      model: that was called.
      variables: that it was called with.
      observation: of the call.
    """
    found = {}
    for path, product in observation.products.items():
        stored = stored_of(observation.policies[path])
        weight = meta.unbox(_owner(variables["params"], path)[product.name])
        if stored is None or product.left is not None or is_stored(weight):
            continue
        with contextlib.suppress(CannotStoreError):
            check_storable(weight, stored, product, _name(path, product))
            found[_name(path, product)] = stored.format
    return found


def layer_policies(
    model: nn.Module, variables: Mapping[str, Any] | None, *args: Any, **kwargs: Any
) -> dict[str, DTypePolicy]:
    """See `mpjax.layer_policies`."""
    if variables is None:
        raise TypeError(
            "a Linen module does not hold its layers: call mp.layer_policies(model, variables), "
            "with what `init` returned or its shapes"
        )
    params = _check_variables(variables, "mp.layer_policies(model, variables)")["params"]
    owners = [join(path) for path in owner_paths(params)]
    policies = {path: resolve(policy_of(model), path) for path in owners}
    if not args and not kwargs:
        return policies
    observed = trace(model, variables, *args, **kwargs).policies
    called = {path: observed[path] for path in observed if path in policies}
    return called | {path: own for path, own in policies.items() if path not in called}


def init_scaling(
    model: nn.Module, variables: Mapping[str, Any], *args: Any, **kwargs: Any
) -> dict[str, Any]:
    """See `mpjax.init_scaling`."""
    variables = _check_variables(variables, "mp.init_scaling(model, variables, x)")
    without = {name: value for name, value in variables.items() if name != COLLECTION}
    kwargs = {**kwargs, "mutable": [COLLECTION]}
    with explained(model, args, kwargs):
        _, shapes = jax.eval_shape(*call_of(model, without, *args, **kwargs))
    states = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), unfreeze(shapes))
    return {**without, **states}
