"""`quantize` and `layer_policies` for Linen: trace one call, and see which layers it meets."""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import errors
from flax.core import FrozenDict, freeze, meta, unfreeze

from .._context import Observation, Product, observe
from .._paths import join, owner_paths
from .._policy import DTypePolicy
from .._policy_map import resolve
from .._quantize import nothing_to_quantize, quantize_weight
from ._states import COLLECTION
from ._wrap import policy_of


def quantize(model: nn.Module, variables: Any, *args: Any, **kwargs: Any) -> Any:
    """See `mpjax.quantize`."""
    variables = _check_variables(variables, "mp.quantize(model, variables, x)")
    observation = trace(model, variables, *args, **kwargs)
    if not observation.products:
        raise nothing_to_quantize(type(model).__name__, policy_of(model))
    params = unfreeze(variables["params"])
    for path, product in observation.products.items():
        _replace(params, path, product)
    frozen = isinstance(variables, FrozenDict)
    quantized = {**variables, "params": params}
    _check_applies(model, quantized, *args, **kwargs)
    return freeze(quantized) if frozen else quantized


def _check_applies(model: nn.Module, quantized: Any, *args: Any, **kwargs: Any) -> None:
    """Traces the model once more, on what it will be given from now on."""
    try:
        jax.eval_shape(*_call(model, quantized, *args, **kwargs))
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


def trace(model: nn.Module, variables: Mapping[str, Any], *args: Any, **kwargs: Any) -> Observation:
    """Traces one `apply` by `jax.eval_shape` and returns what its layers reported."""
    with observe() as observation:
        _trace(lambda: jax.eval_shape(*_call(model, variables, *args, **kwargs)), model)
    return observation


def _call(model: nn.Module, variables: Any, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
    """A function of variables and array arguments alone, then those; flags stay Python's."""
    leaves, treedef = jax.tree.flatten((args, kwargs))
    arrays = {i: x for i, x in enumerate(leaves) if hasattr(x, "shape") and hasattr(x, "dtype")}

    def apply(variables: Any, arrays: Mapping[int, Any]) -> Any:
        call = [arrays.get(i, leaf) for i, leaf in enumerate(leaves)]
        args, kwargs = jax.tree.unflatten(treedef, call)
        return model.apply(variables, *args, **kwargs)

    return apply, variables, arrays


def _trace(run: Callable[[], Any], model: nn.Module) -> None:
    try:
        run()
    except (
        errors.ScopeParamNotFoundError,
        errors.ScopeCollectionNotFound,
        errors.ScopeParamShapeError,
    ) as error:
        raise ValueError(
            f"these variables do not fit {type(model).__name__}: {error} Are they the parameters "
            "of another model?"
        ) from error


def _replace(params: dict[str, Any], path: str, product: Product) -> None:
    owner = params
    for name in path.split("/") if path else ():
        owner = owner[name]
    boxed = owner["kernel"]
    kernel = meta.unbox(boxed)
    name = f"params/{path}/kernel" if path else "params/kernel"
    stacked = kernel.ndim - len(product.shape)
    if kernel.shape[stacked:] != product.shape:
        raise NotImplementedError(
            f"'{name}' is stored as {kernel.shape} but its layer sees {product.shape}: a stack of "
            "layers must have its layers along the leading axes (variable_axes={'params': 0})"
        )
    contracting = tuple(axis - len(product.shape) for axis in product.contracting)
    quantized = quantize_weight(kernel, contracting, name)
    is_boxed = isinstance(boxed, meta.AxisMetadata)
    owner["kernel"] = boxed.replace_boxed(quantized) if is_boxed else quantized


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
    shapes: Any = {}

    def run() -> None:
        nonlocal shapes
        _, shapes = jax.eval_shape(*_call(model, without, *args, **kwargs))

    _trace(run, model)
    states = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), unfreeze(shapes))
    return {**without, **states}
