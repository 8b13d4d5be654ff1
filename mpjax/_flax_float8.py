"""From the variables that Flax' own float8 ops train to ours.

Flax: `variables["_overwrite_with_gradient"]["Dense_0"]["Fp8DirectDotGeneralOp_0"]` holds, for each
of `input`, `kernel` and `output_grad`,

    <operand>_amax_history    float32[..., L], the newest first
    <operand>_scale           float32[..., 1], of the step before

and step t takes the scale that it computes at its start from the history. Ours is computed at the
end of step t - 1, so a state is converted by taking that half of Flax' step.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

import mpjax_kernels as mk

from ._init_scaling import init_scaling
from ._paths import join
from ._scaling import DelayedScaling, ScalingState

COLLECTION = "_overwrite_with_gradient"


def from_flax_float8(
    model: Any, variables: Mapping[str, Any], *args: Any, **kwargs: Any
) -> dict[str, Any]:
    """Variables of a wrapped Linen model from those that Flax' float8 ops have trained.

        variables = mp.from_flax_float8(model, {**state.params, **others}, x)

    With `amax` from the history and the margin of the model's policy (0 in Flax), the next step
    takes the scale that Flax would:

        scale = 1 / (format.max / amax / 2**margin)     the stored one where the history is empty

    Args:
      model: the model without `dot_general_cls`, wrapped with a float8 policy of delayed scaling
        and Flax' history length.
      variables: `{"params": ..., "_overwrite_with_gradient": ...}`, with other collections or
        without.
      *args: the arguments of one call; arrays may be `jax.ShapeDtypeStruct`s: the call is traced
        to meet the layers, never run.
      **kwargs: keyword arguments of the call.

    Returns:
      `{"params": ..., "scaling": ...}` and the other collections.

    Raises:
      TypeError: the model is an NNX one.
      ValueError: there are no variables of Flax' ops, their history has another length, or a layer
        is quantized on one side only.

    References:
      flax.linen.fp8_ops, https://flax.readthedocs.io/en/latest/guides/quantization/fp8_basics.html
    """
    if COLLECTION not in variables:
        raise ValueError(
            f"`variables` hold {sorted(variables)}, but no '{COLLECTION}', where Flax' float8 ops "
            "keep their scales. For weights that were trained without them, use mp.init_scaling"
        )
    others = {name: value for name, value in variables.items() if name != COLLECTION}
    new = init_scaling(model, others, *args, **kwargs)
    ours = dict(_holders(new.get("scaling", {}), "input"))
    theirs = _by_layer(variables[COLLECTION])
    _check_same_layers(ours.keys(), theirs.keys())
    converted = {
        path: {
            name: _converted(join(path), name, state, theirs[path]) for name, state in of.items()
        }
        for path, of in ours.items()
    }
    return {**new, "scaling": _nested(converted)}


def _holders(tree: Any, key: str, path: tuple[str, ...] = ()) -> Iterator[tuple[Any, Any]]:
    """`(path, mapping)` of the mappings in a tree that have `key`."""
    if not isinstance(tree, Mapping):
        return
    if key in tree and not isinstance(tree[key], Mapping):
        yield path, tree
        return
    for name, child in tree.items():
        yield from _holders(child, key, (*path, name))


def _by_layer(collection: Any) -> dict[tuple[str, ...], Any]:
    layers: dict[tuple[str, ...], Any] = {}
    for path, op in _holders(collection, "input_scale"):
        layer = path[:-1]  # the last is the op's own name: Dense_0/Fp8DirectDotGeneralOp_0
        if layer in layers:
            raise ValueError(
                f"layer '{join(layer)}' has more than one float8 op, '{path[-1]}' among them, each "
                "with scales of its own; a layer here has one scale for each operand"
            )
        layers[layer] = op
    return layers


def _check_same_layers(ours: Any, theirs: Any) -> None:
    lines = [
        f"{side}: {', '.join(sorted(repr(join(path)) for path in some))}"
        for side, some in (
            ("only in Flax' variables", theirs - ours),
            ("only under the model's policy", ours - theirs),
        )
        if some
    ]
    if lines:
        raise ValueError(
            f"the layers with scaling states differ ({'; '.join(lines)}): wrap the model with "
            "delayed scaling, and with an mp.DTypePolicyMap that has a float8 policy for the same "
            "layers"
        )


def _converted(
    layer: str, operand: str, state: ScalingState, op: Mapping[str, Any]
) -> ScalingState:
    history = jnp.asarray(op[f"{operand}_amax_history"], jnp.float32)
    recipe = state.recipe
    if history.shape != state.amax_history.shape or not isinstance(recipe, DelayedScaling):
        raise ValueError(
            f"the amax history of '{layer}/{operand}' has shape {history.shape} in Flax' "
            f"variables, but {state.amax_history.shape} under the model's policy: wrap the model "
            "with mp.QuantizedFloat8DTypePolicy('float8', ..., "
            f"amax_history_length={history.shape[-1]})"
        )
    stored = jnp.asarray(op[f"{operand}_scale"], jnp.float32).reshape(state.scale.shape)
    amax = history[..., 0] if recipe.algorithm == "most_recent" else jnp.max(history, axis=-1)
    return ScalingState(
        amax_history=jnp.where(jnp.isfinite(history), history, 0),  # as `update` never lets one in
        scale=_next_scale(amax, stored, state.format, recipe.margin),
        observed=state.observed,
        recipe=recipe,
        format=state.format,
        of_gradient=state.of_gradient,
    )


def _next_scale(
    amax: Float[Array, "*layers"], stored: Float[Array, "*layers"], format: str, margin: float
) -> Float[Array, "*layers"]:
    # Not amax / max: in this order every rounding is Flax'.
    scale = 1 / (mk.get_format(format).max / amax / 2.0**margin)
    return jnp.where(jnp.isfinite(amax) & (amax > 0), scale, stored)


def _nested(layers: Mapping[tuple[str, ...], Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, states in layers.items():
        node = tree
        for name in path:
            node = node.setdefault(name, {})
        node.update(states)
    return tree
