"""`value_and_grad` and `accumulate_gradients` for NNX models; see `mpjax._gradients`."""

from collections.abc import Callable
from typing import Any

from flax import nnx

from .._accumulate import check_microbatches, split_batch, summed
from .._adapters import ROOT
from .._gradients import (
    Gradients,
    amaxes,
    check_float,
    check_loss_scale,
    probes_of,
    run_differentiated,
    split_aux,
    with_probes,
)
from .._loss_scale_state import LossScaleState
from .._paths import join
from ._states import LOSS_SCALE, LossScale, Scaling


def value_and_grad(
    loss_fn: Callable[..., Any],
    *,
    has_aux: bool = False,
    wrt: Any = nnx.Param,
    loss_scale: LossScaleState | None = None,
) -> Callable[..., tuple[Any, Gradients]]:
    """`nnx.value_and_grad` for a wrapped model.

        loss, grads = mp.nnx.value_and_grad(loss_fn)(model, x, y)

    What the call changes in the model (batch statistics, random counts) is changed, as by
    `nnx.value_and_grad`; scaling states are not. Call it under `nnx.jit`: outside of it, a model
    with scaling states is compiled anew at every call.

    Args:
      loss_fn: takes the model, then whatever the returned function is given; returns a floating
        scalar, or `(loss, aux)`.
      has_aux: whether `loss_fn` returns `(loss, aux)`.
      wrt: a filter of the variables to differentiate by; give the optimizer the same.
      loss_scale: the state of a loss scale; None takes the one that `mp.nnx.Optimizer` gave the
        model, if its policy has one.

    Returns:
      A function that returns `(loss, Gradients)`, or `((loss, aux), Gradients)`. Neither is scaled.

    Raises:
      TypeError: the model is no NNX module, `loss_scale` no state, or the loss no floating scalar.
      ValueError: a weight is quantized, or the policy has a loss scale, but no optimizer was made
        for the model yet.
    """

    def run(model: nnx.Module, *args: Any, **kwargs: Any) -> tuple[Any, Gradients]:
        scale = _loss_scale(model, loss_scale)
        (loss, aux), grads = _differentiate(loss_fn, model, args, kwargs, wrt, scale, has_aux)
        return ((loss, aux) if has_aux else loss), grads

    return run


def accumulate_gradients(
    loss_fn: Callable[..., Any],
    microbatches: int,
    *,
    has_aux: bool = False,
    wrt: Any = nnx.Param,
    loss_scale: LossScaleState | None = None,
) -> Callable[..., tuple[Any, Gradients]]:
    """`value_and_grad` over a batch in parts; see `mpjax.accumulate_gradients`.

        loss, grads = mp.nnx.accumulate_gradients(loss_fn, 16)(model, batch)

    Args:
      loss_fn: takes the model and a microbatch; returns the mean loss over it, or `(loss, aux)`.
      microbatches: how many; divides the leading axis of every array of the batch.
      has_aux: whether `loss_fn` returns `(loss, aux)`.
      wrt: as in `value_and_grad`.
      loss_scale: as in `value_and_grad`.

    Returns:
      A function of the model and the batch that returns `(loss, Gradients)`, or
      `((loss, aux), Gradients)`, each leaf of `aux` with a leading axis of microbatches. What each
      microbatch changes in the model, the next one sees.

    Raises:
      TypeError, ValueError: as `mpjax.accumulate_gradients` and `value_and_grad`.
    """
    check_microbatches(microbatches)

    def run(model: nnx.Module, batch: Any) -> tuple[Any, Gradients]:
        scale = _loss_scale(model, loss_scale)
        graph, *parts = _split((model,), wrt)

        def one(part: Any, carried: Any) -> Any:
            copy = nnx.merge(graph, *parts[:-1], carried)
            found, grads = _differentiate(
                loss_fn, copy[0], (part,), {}, wrt, scale, has_aux, microbatches
            )
            return (found, grads), _split(copy, wrt)[-1]

        (loss, aux), grads, last = summed(one, split_batch(batch, microbatches), parts[-1])
        nnx.update((model,), last)
        return ((loss, aux) if has_aux else loss), grads

    return run


def _differentiate(
    loss_fn: Callable[..., Any],
    model: nnx.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    wrt: Any,
    loss_scale: LossScaleState,
    has_aux: bool,
    divisor: int = 1,
) -> tuple[tuple[Any, Any], Gradients]:
    """`((loss, aux), Gradients)`; the graph's other changes are made in place."""
    # Modules and rngs among the arguments are part of the graph too, so that what the loss changes
    # in them is changed in the caller's.
    at = tuple(i for i, x in enumerate(args) if isinstance(x, nnx.Pytree | nnx.Variable))
    nodes = (model, *(args[i] for i in at))
    graph, params, states, rest = _split(nodes, wrt)
    for (_, *path), variable in nnx.to_flat_state(params):
        check_float(join(path), variable.get_raw_value())

    def scaled_loss(params: Any, zeros: Any) -> tuple[Any, Any]:
        known = with_probes(states, zeros, loss_scale)
        # Copies, for the loss may write to variables of this trace only.
        model, *others = nnx.merge(graph, params, known, rest, copy=True)
        given = list(args)
        for i, node in zip(at, others, strict=True):
            given[i] = node
        loss, aux = split_aux(loss_fn(model, *given, **kwargs), has_aux)
        changed = _split((model, *others), wrt)[-1]
        loss = loss / divisor
        return loss_scale.scale_loss(loss), (loss, aux, changed)

    (_, (loss, aux, changed)), (grads, cotangents) = run_differentiated(
        scaled_loss, params, probes_of(states)
    )
    nnx.update(nodes, changed)
    observed = amaxes(states, cotangents, loss_scale)
    return (loss, aux), Gradients(_of_first(loss_scale.unscale(grads)), _of_first(observed))


def _split(nodes: tuple[Any, ...], wrt: Any) -> Any:
    """The graph of some nodes, then parameters and scaling states of the first, and the rest."""

    def first(path: Any, value: Any) -> bool:
        return path[0] == 0

    return nnx.split(nodes, nnx.All(first, wrt), nnx.All(first, Scaling), ...)


def _of_first(state: Any) -> Any:
    """The part of the first node, with paths from there."""
    return state[0] if 0 in state else type(state)({})


def _loss_scale(model: Any, loss_scale: Any) -> LossScaleState:
    if not isinstance(model, nnx.Module):
        raise TypeError(
            "the first argument must be the flax.nnx.Module to train, but got "
            f"{type(model).__name__}"
        )
    if loss_scale is not None:
        return check_loss_scale(loss_scale)
    held = vars(model).get(LOSS_SCALE)
    if isinstance(held, LossScale):
        return held.get_value()
    policy = getattr(type(model), ROOT, None)
    if getattr(policy, "loss_scale", None) is not None:
        raise ValueError(
            f"the policy of {type(model).__name__}, {policy!r}, has a loss scale, whose state "
            "comes with the optimizer: make it first, mp.nnx.Optimizer(model, tx, wrt=nnx.Param), "
            "or give loss_scale=mp.NoLossScale().init() to go without"
        )
    return check_loss_scale(None)
