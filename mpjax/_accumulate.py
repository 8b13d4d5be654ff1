"""Gradients of a batch that is too large for one pass: microbatch after microbatch.

    loss = mean over the microbatches,  gradients = their sum,  amaxes = the largest

Each microbatch's loss is divided by their number before its backward pass, so that the gradients
inside the layers, and the amaxes of these, are those of the whole batch. All microbatches use the
scales of the step's beginning; histories move when the optimizer does.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from ._gradients import Gradients, check_loss_scale, differentiate
from ._loss_scale_state import LossScaleState


def accumulate_gradients(
    loss_fn: Callable[..., Any],
    microbatches: int,
    *,
    has_aux: bool = False,
    loss_scale: LossScaleState | None = None,
) -> Callable[..., tuple[Any, Gradients]]:
    """`value_and_grad`, over a batch in `microbatches` parts.

        loss, grads = mp.accumulate_gradients(loss_fn, 16)(variables, batch)

    Args:
      loss_fn: takes the variables and a microbatch; returns the mean loss over it, a floating
        scalar, or `(loss, aux)`.
      microbatches: how many; divides the leading axis of every array of the batch.
      has_aux: whether `loss_fn` returns `(loss, aux)`.
      loss_scale: as in `value_and_grad`.

    Returns:
      A function of the variables and the batch that returns `(loss, Gradients)`, or
      `((loss, aux), Gradients)`, each leaf of `aux` with a leading axis of microbatches. Gradients
      are summed in float32, or wider.

    Raises:
      TypeError: `microbatches` is not an integer, or as `value_and_grad`.
      ValueError: `microbatches` is below 1, or does not divide the leading axis of the batch.
    """
    scale = check_loss_scale(loss_scale)
    check_microbatches(microbatches)

    def run(variables: Mapping[str, Any], batch: Any) -> tuple[Any, Gradients]:
        def one(part: Any, carried: None) -> Any:
            found = differentiate(
                lambda variables: loss_fn(variables, part),
                variables,
                scale,
                has_aux=has_aux,
                divisor=microbatches,
            )
            return found, carried

        (loss, aux), grads, _ = summed(one, split_batch(batch, microbatches), None)
        return ((loss, aux) if has_aux else loss), grads

    return run


def summed(one: Callable[..., Any], parts: Any, carried: Any) -> Any:
    """`one(part, carried)` for each part, in a scan.

    Args:
      one: returns `((loss, aux), Gradients)`, and what it carries on to the next part.
      parts: a tree of arrays with a leading axis of parts.
      carried: what the first part is given.

    Returns:
      `((loss, aux), Gradients, carried)`: losses and gradients summed, amaxes merged, aux stacked.
    """
    first = jax.tree.map(lambda x: x[0], parts)
    ((loss, _), grads), _ = jax.eval_shape(one, first, carried)
    start = (
        jnp.zeros((), jnp.promote_types(loss.dtype, jnp.float32)),
        jax.tree.map(_zeros, grads.params),
        jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), grads.observed),
        carried,
    )

    def body(sums: Any, part: Any) -> tuple[Any, Any]:
        total, params, observed, carried = sums
        ((loss, aux), grads), carried = one(part, carried)
        params = jax.tree.map(lambda a, b: a + b.astype(a.dtype), params, grads.params)
        observed = jax.tree.map(jnp.maximum, observed, grads.observed)
        return (total + loss.astype(total.dtype), params, observed, carried), aux

    (total, params, observed, carried), aux = jax.lax.scan(body, start, parts)
    return (total, aux), Gradients(params, observed), carried


def split_batch(batch: Any, microbatches: int) -> Any:
    """Arrays of shape [B, ...] as [microbatches, B / microbatches, ...].

    Raises:
      ValueError: there is no array, or one has no leading axis, or one that is not a multiple.
    """

    def split(path: Any, x: Any) -> Any:
        shape = jnp.shape(x)
        if not shape or shape[0] % microbatches or not shape[0]:
            raise ValueError(
                f"`batch{jax.tree_util.keystr(path)}` has shape {shape}, whose leading axis is not "
                f"a positive multiple of microbatches={microbatches}: choose a divisor of the "
                "batch size, or leave what is not an array of examples out of the batch"
            )
        return jnp.reshape(x, (microbatches, shape[0] // microbatches, *shape[1:]))

    if not jax.tree.leaves(batch):
        raise ValueError(f"`batch` holds no array to take microbatches of: {batch!r}")
    return jax.tree.map_with_path(split, batch)


def check_microbatches(microbatches: Any) -> None:
    """Raises TypeError or ValueError for what is no number of microbatches."""
    if isinstance(microbatches, bool) or not isinstance(microbatches, int):
        raise TypeError(f"`microbatches` must be an integer. Received: {microbatches!r}")
    if microbatches < 1:
        raise ValueError(f"`microbatches` must be at least 1. Received: {microbatches}")


def _zeros(x: Any) -> jax.Array:
    return jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32))
