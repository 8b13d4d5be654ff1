"""`value_and_grad`: the gradients of the parameters, and the amaxes that the layers observed.

The amaxes of a backward pass can only leave it as cotangents. Each scaling state is given a probe,
a zero that the layer hands to its product, whose cotangents are amaxes and add up by maximum
(`_max_gradient.py`). They are made and taken apart in here: what a caller gets are gradients of
parameters, for the optimizer, and beside them amaxes, for the scaling states.

The loss scale S multiplies the loss and divides the gradients. The state of an output's gradient is
in units of the true gradient: its scale is multiplied by S on the way in, its amax divided by S on
the way out, so that it does not move when S does.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Bool

from ._loss_scale import training_loss_scale
from ._loss_scale_state import LossScaleState, all_finite
from ._manual_axes import manual_axes
from ._max_gradient import amax_of, probe_of
from ._prescaled import is_stored
from ._scaling import Probe, ScalingState, map_states


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Gradients:
    """What a backward pass found.

    Attributes:
      params: the gradients of the parameters, unscaled: a tree like theirs, and all that clipping,
        averaging over devices and the optimizer should see.
      observed: the collection `scaling` with the amaxes of this pass, float32, in the place of its
        states; they are the largest of all devices already.
    """

    params: Any
    observed: Any

    @property
    def finite(self) -> Bool[Array, ""]:
        """Whether no gradient of a parameter is Inf or NaN."""
        return all_finite(self.params)

    def replace(self, **fields: Any) -> "Gradients":
        """A copy with other fields, `grads.replace(params=clipped)`."""
        return dataclasses.replace(self, **fields)


def value_and_grad(
    loss_fn: Callable[..., Any],
    *,
    has_aux: bool = False,
    loss_scale: LossScaleState | None = None,
) -> Callable[..., tuple[Any, Gradients]]:
    """`jax.value_and_grad` for the variables of a wrapped Linen model.

        loss, grads = mp.value_and_grad(loss_fn)(variables, batch)

    Differentiates by `variables["params"]`; collections such as `batch_stats` are constants, and
    the collection `scaling` comes back as amaxes, in `Gradients.observed`. Call it under `jax.jit`:
    outside of it, a model with scaling states is compiled anew at every call.

    Args:
      loss_fn: takes the variables, then whatever the returned function is given; returns a scalar
        loss, or `(loss, aux)`.
      has_aux: whether `loss_fn` returns `(loss, aux)`.
      loss_scale: the state of a loss scale. The loss is multiplied, and the gradients are divided,
        by its scale; None scales nothing.

    Returns:
      A function that returns `(loss, Gradients)`, or `((loss, aux), Gradients)`. The loss is not
      scaled.

    Raises:
      TypeError: the variables are no mapping with `"params"`, `loss_scale` is not a state, or the
        loss is not a floating scalar.
      ValueError: a parameter is quantized.
      NotImplementedError: scaling states pass through a `shard_map` with `check_vma=False` inside
        the loss, which sums over devices what should be their maximum.
    """
    scale = check_loss_scale(loss_scale)

    def run(variables: Mapping[str, Any], *args: Any, **kwargs: Any) -> tuple[Any, Gradients]:
        def loss_of(variables: Any) -> Any:
            return loss_fn(variables, *args, **kwargs)

        (loss, aux), grads = differentiate(loss_of, variables, scale, has_aux=has_aux)
        return ((loss, aux) if has_aux else loss), grads

    return run


def differentiate(
    loss_fn: Callable[[Any], Any],
    variables: Mapping[str, Any],
    loss_scale: LossScaleState,
    *,
    has_aux: bool = False,
    divisor: int = 1,
) -> tuple[tuple[Any, Any], Gradients]:
    """`((loss, aux), Gradients)` of `loss_fn(variables) / divisor`."""
    check_variables(variables)
    states = variables.get("scaling", {})

    def scaled_loss(params: Any, zeros: Any) -> tuple[Any, tuple[Any, Any]]:
        known = with_probes(states, zeros, loss_scale)
        scaling = {"scaling": known} if "scaling" in variables else {}
        output = loss_fn({**variables, "params": params, **scaling})
        loss, aux = split_aux(output, has_aux)
        loss = loss / divisor
        return loss_scale.scale_loss(loss), (loss, without_probes(aux))

    (_, found), (params, cotangents) = run_differentiated(
        scaled_loss, variables["params"], probes_of(states)
    )
    observed = amaxes(states, cotangents, loss_scale)
    return found, Gradients(loss_scale.unscale(params), observed)


def run_differentiated(scaled_loss: Callable[..., Any], params: Any, zeros: Any) -> Any:
    """`jax.value_and_grad` by parameters and probes, traced where there are probes."""
    if jax.tree.leaves(zeros) and not _is_traced(params, zeros):
        scaled_loss = jax.jit(scaled_loss)
    return jax.value_and_grad(scaled_loss, argnums=(0, 1), has_aux=True)(params, zeros)


def probes_of(states: Any) -> Any:
    """A tree of zeros, one for each state."""
    return map_states(lambda state: jnp.zeros_like(state.observed), states)


def with_probes(states: Any, zeros: Any, loss_scale: LossScaleState) -> Any:
    """The states as a differentiated loss sees them."""
    axes = manual_axes()

    def each(state: ScalingState, zero: Array) -> ScalingState:
        units = jnp.broadcast_to(_units(state, loss_scale), zero.shape)
        return dataclasses.replace(state, probe=Probe(probe_of(zero), units, axes))

    return map_states(each, states, zeros)


def without_probes(tree: Any) -> Any:
    """What a differentiated loss returned, such as mutated variables, as the caller sees it."""
    return map_states(lambda state: dataclasses.replace(state, probe=None), tree)


def amaxes(states: Any, cotangents: Any, loss_scale: LossScaleState) -> Any:
    """The amax of each state, in its own units."""
    return map_states(
        lambda state, cotangent: amax_of(cotangent) / _units(state, loss_scale), states, cotangents
    )


def split_aux(output: Any, has_aux: bool) -> tuple[Array, Any]:
    """The loss, checked, and what came with it."""
    if not has_aux:
        return _check_loss(output), None
    if not isinstance(output, tuple) or len(output) != 2:
        raise TypeError(
            f"with has_aux=True the loss function returns (loss, aux), but it returned {output!r}"
        )
    return _check_loss(output[0]), output[1]


def check_variables(variables: Any) -> None:
    """Raises TypeError or ValueError for what cannot be trained."""
    if not isinstance(variables, Mapping) or "params" not in variables:
        names = list(variables) if isinstance(variables, Mapping) else type(variables).__name__
        raise TypeError(
            "`variables` must be what `init` returned, a mapping with 'params' (and 'scaling', "
            f"where the policy keeps state), but got {names}"
        )
    leaves = jax.tree.leaves_with_path(variables["params"], is_leaf=is_stored)
    for path, leaf in leaves:
        check_float(f"params{jax.tree_util.keystr(path)}", leaf)


def check_float(name: str, leaf: Any) -> None:
    """Raises ValueError for a weight that is stored in few bits."""
    if is_stored(leaf):
        raise ValueError(
            f"'{name}' is quantized ({leaf!r}), so it has no gradient: train the float weights, "
            "and call mp.quantize afterwards"
        )


def _check_loss(loss: Any) -> Array:
    if isinstance(loss, tuple | list | dict) or loss is None:
        raise TypeError(
            f"the loss function must return a floating scalar, but it returned a "
            f"{type(loss).__name__}; for (loss, aux), give has_aux=True"
        )
    if jnp.shape(loss) != () or not jnp.issubdtype(jnp.result_type(loss), jnp.floating):
        raise TypeError(
            "the loss function must return a floating scalar, but it returned "
            f"{jnp.result_type(loss)}{list(jnp.shape(loss))}; for (loss, aux), give has_aux=True"
        )
    return jnp.asarray(loss)


def check_loss_scale(loss_scale: Any) -> LossScaleState:
    """The state given, or that of no loss scale; raises TypeError for anything else."""
    if loss_scale is None:
        return training_loss_scale(None).init()
    if not isinstance(loss_scale, LossScaleState):
        raise TypeError(
            f"`loss_scale` must be a LossScaleState, such as mp.DynamicLossScale().init(), but got "
            f"{loss_scale!r}"
        )
    return loss_scale


def _units(state: ScalingState, loss_scale: LossScaleState) -> Array:
    return loss_scale.multiplier if state.of_gradient else jnp.ones((), jnp.float32)


def _is_traced(*trees: Any) -> bool:
    return any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(trees))
