"""The leaves that a file of weights holds, as named arrays and what JSON can hold, and back.

kind            arrays                            static
array           value
key             value: the key's data             impl
qtensor         values, scale, zero_point         format, dtype, layout, tiles
prescaled       the same, pre_quant_scale         the same
scaling_state   amax_history, scale, observed     recipe, format, of_gradient
dict            none: it is empty
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import mpjax_kernels as mk

from ._prescaled import PreScaledWeight, is_stored
from ._safetensors import BY_NAME
from ._scaling import DelayedScaling, ScalingState, StaticScaling

MAIN_PARTS = ("value", "values")  # arrays that go by the name of the leaf alone
_KEY_SIZES = {"threefry2x32": 2, "rbg": 4, "unsafe_rbg": 4}
_RECIPES = {recipe.__name__: recipe for recipe in (DelayedScaling, StaticScaling)}


@dataclasses.dataclass(frozen=True)
class LeafParts:
    """A leaf taken apart.

    Attributes:
      kind: which of the table above.
      static: what is not an array.
      arrays: the arrays, by the name of the part; or their shapes and dtypes.
    """

    kind: str
    static: Mapping[str, Any]
    arrays: Mapping[str, Any]


def take_apart(leaf: Any) -> LeafParts:
    """The parts of a leaf.

    Raises:
      TypeError: a file of weights holds nothing of its type.
    """
    if is_stored(leaf):
        names = ["values", "scale"] + ["zero_point"] * (leaf.zero_point is not None)
        if leaf.dtype.name not in BY_NAME:
            raise TypeError(f"is a QTensor of logical dtype {leaf.dtype}, which safetensors lacks")
        layout = None if leaf.layout is None else list(leaf.layout)
        static = {"format": leaf.format.name, "dtype": leaf.dtype.name, "layout": layout}
        if leaf.tiles:
            static["tiles"] = [list(tile) for tile in leaf.tiles]
        is_prescaled = isinstance(leaf, PreScaledWeight)
        names += ["pre_quant_scale"] * is_prescaled
        kind = "prescaled" if is_prescaled else "qtensor"
        return LeafParts(kind, static, {name: getattr(leaf, name) for name in names})
    if isinstance(leaf, ScalingState):
        return LeafParts("scaling_state", _static_of_state(leaf), _arrays_of_state(leaf))
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        impl = str(jax.random.key_impl(leaf))
        if impl not in _KEY_SIZES:
            raise TypeError(f"is a random key of {impl}, but should be one of {list(_KEY_SIZES)}")
        return LeafParts("key", {"impl": impl}, {"value": jax.random.key_data(leaf)})
    if isinstance(leaf, jax.Array | np.ndarray | np.generic):
        return LeafParts("array", {}, {"value": leaf})
    if isinstance(leaf, Mapping) and not leaf:
        return LeafParts("dict", {}, {})
    raise TypeError(
        f"is a {type(leaf).__name__}, but a file of weights holds nested dicts of arrays, QTensors "
        "and scaling states only"
    )


def put_together(parts: LeafParts) -> Any:
    """The leaf that `take_apart` took apart; of `jax.ShapeDtypeStruct`s, one of those.

    Raises:
      KeyError, TypeError, ValueError: no leaf has such parts.
    """
    return _MAKERS[parts.kind](**parts.arrays, **parts.static)


def _array(value: Any) -> Any:
    return value


def _key(value: Any, impl: str) -> Any:
    if value.dtype != jnp.uint32 or value.shape[-1:] != (_KEY_SIZES[impl],):
        raise ValueError(f"keys of {impl} have data of {value.dtype} {value.shape}")
    if isinstance(value, jax.ShapeDtypeStruct):
        dtype = jax.eval_shape(lambda: jax.random.key(0, impl=impl)).dtype
        return jax.ShapeDtypeStruct(value.shape[:-1], dtype)
    return jax.random.wrap_key_data(value, impl=impl)


def _qtensor(
    values: Any,
    scale: Any,
    format: str,
    dtype: str,
    layout: Any,
    zero_point: Any = None,
    tiles: Any = (),
) -> mk.QTensor:
    layout = None if layout is None else tuple(layout)
    tiles = tuple(map(tuple, tiles))
    q = mk.QTensor(values, scale, BY_NAME[dtype], zero_point, layout, tiles)
    mk.validate(q)
    if q.format.name != format:
        raise ValueError(f"values of {values.dtype} are said to be {format}")
    return q


def _prescaled(pre_quant_scale: Any, **parts: Any) -> PreScaledWeight:
    q = _qtensor(**parts)
    shape = pre_quant_scale.shape
    fits = all(size in (1, whole) for size, whole in zip(shape, q.shape, strict=True))
    if pre_quant_scale.dtype != jnp.float32 or not fits:
        raise ValueError(f"{q!r} has a pre_quant_scale of {pre_quant_scale.dtype} {shape}")
    return PreScaledWeight(q, pre_quant_scale)


def _scaling_state(
    amax_history: Any, scale: Any, observed: Any, recipe: Any, format: str, of_gradient: bool
) -> ScalingState:
    recipe = dict(recipe)
    recipe = _RECIPES[recipe.pop("class")](**recipe)
    steps = recipe.amax_history_length if isinstance(recipe, DelayedScaling) else 0
    shapes = (amax_history.shape, scale.shape, observed.shape)
    if shapes != ((*scale.shape, steps), scale.shape, scale.shape):
        raise ValueError(f"a state of {recipe} has arrays of shapes {shapes}")
    if any(x.dtype != jnp.float32 for x in (amax_history, scale, observed)):
        raise ValueError("the arrays of a scaling state are not float32")
    if not isinstance(of_gradient, bool):
        raise TypeError("of_gradient is no bool")
    return ScalingState(
        amax_history=amax_history,
        scale=scale,
        observed=observed,
        recipe=recipe,
        format=mk.get_format(format).name,
        of_gradient=of_gradient,
    )


_MAKERS: dict[str, Callable[..., Any]] = {
    "array": _array,
    "key": _key,
    "qtensor": _qtensor,
    "prescaled": _prescaled,
    "scaling_state": _scaling_state,
    "dict": dict,
}


def _static_of_state(state: ScalingState) -> dict[str, Any]:
    recipe = {"class": type(state.recipe).__name__, **dataclasses.asdict(state.recipe)}
    return {"recipe": recipe, "format": state.format, "of_gradient": state.of_gradient}


def _arrays_of_state(state: ScalingState) -> dict[str, Any]:
    if state.probe is not None:
        raise TypeError("is a scaling state inside of mpjax.value_and_grad: save the one outside")
    return {name: getattr(state, name) for name in ("amax_history", "scale", "observed")}
