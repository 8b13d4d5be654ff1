"""`loss_scaled`: any optax optimizer, told of gradients of a scaled loss.

It stands on its own: it knows nothing of policies, models or wrapped modules.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int32

from ._guarded_update import guarded_update
from ._loss_scale import LossScale, training_loss_scale
from ._loss_scale_state import LossScaleState, all_finite, widen_float16

_TWICE = (
    "is already loss scaled: its gradients would be divided by two scales. Call mp.loss_scaled "
    "once, on the optimizer inside it."
)


class LossScaledState(NamedTuple):
    """The state of `loss_scaled(optimizer)`.

    A NamedTuple, as optax's states are, so that its `tree_get` and `tree_set` see into it.

    Attributes:
        loss_scale: The scale for the next loss, as a `LossScaleState`.
        skipped_steps: int32[], steps so far whose gradients were not finite.
        inner_state: The state of `optimizer`, which has seen no skipped step.
    """

    loss_scale: LossScaleState
    skipped_steps: Int32[Array, ""]
    inner_state: Any


def loss_scaled(
    optimizer: optax.GradientTransformation, loss_scale: Any = "dynamic"
) -> optax.GradientTransformationExtraArgs:
    """Wraps `optimizer` so that it takes the gradients of a scaled loss.

    With S the scale of the state, the gradients g of S * loss become

        finite:     updates, inner = optimizer.update(g / S, inner)
        otherwise:  updates = 0, inner stays as it is bit for bit, skipped_steps += 1

    and then S moves as `loss_scale` says. A non-finite step is skipped under a static scale and
    under None too. Scale the loss by the optimizer's state:

        tx = mp.loss_scaled(optax.adamw(1e-3))
        opt_state = tx.init(params)

        def scaled_loss(params):
            return mp.loss_scale_of(opt_state).scale_loss(loss_fn(params))

        updates, opt_state = tx.update(jax.grad(scaled_loss)(params), opt_state, params)

    `optimizer` sees float16 parameters and gradients as float32, so its updates and its state are
    float32: see `LossScaleState.unscale`. Where each device has gradients of its own, as under
    `shard_map`, average them before `update`, so that all devices agree on whether to skip.

    Args:
        optimizer: Any optax optimizer or chain. Put clipping inside, since a norm of scaled
            gradients means nothing, and `optax.MultiSteps` too: see `loss_scale_of`.
        loss_scale: `"dynamic"`, a number of at least 1, None, or a loss scale.

    Returns:
        An optax optimizer whose state is a `LossScaledState`. Its `update` passes further keyword
        arguments on to an `optimizer` that takes them.

    Raises:
        TypeError: If `optimizer` is not an optax gradient transformation.
        ValueError: If `optimizer` is already loss scaled, or `loss_scale` names none. An optimizer
            that is loss scaled somewhere inside a chain is found by `init`.

    References:
        Micikevicius et al., Mixed Precision Training (2018), https://arxiv.org/abs/1710.03740
    """
    if not isinstance(optimizer, optax.GradientTransformation):
        raise TypeError(
            "`optimizer` must be an optax.GradientTransformation, such as optax.adamw(1e-3), or "
            "the gradient_transformation() of an optax.MultiSteps. "
            f"Received: {optimizer!r} (of type {type(optimizer)})"
        )
    if is_loss_scaled(optimizer):
        raise ValueError(f"`optimizer` {_TWICE}")
    config = training_loss_scale(loss_scale)
    return optax.GradientTransformationExtraArgs(
        init=_Init(optimizer, config), update=LossScaledUpdate(optimizer, config)
    )


def is_loss_scaled(optimizer: Any) -> bool:
    """Returns whether `optimizer` is what `loss_scaled` returned (not a chain around it)."""
    return isinstance(getattr(optimizer, "update", None), LossScaledUpdate)


def split_loss_scaled(
    optimizer: optax.GradientTransformation,
) -> tuple[optax.GradientTransformation, LossScale]:
    """Returns the optimizer and the loss scale that `loss_scaled` was given.

    Raises:
        ValueError: If `optimizer` is not what `loss_scaled` returned.
    """
    update = optimizer.update
    if not isinstance(update, LossScaledUpdate):
        raise ValueError(f"`optimizer` is not one of mp.loss_scaled. Received: {optimizer!r}")
    return update.inner, update.loss_scale


def loss_scale_of(opt_state: Any) -> LossScaleState:
    """Returns the one `LossScaleState` in an optimizer's state, however deep in a chain it is.

    Raises:
        ValueError: If there is none, or more than one, or if it is inside an `optax.MultiSteps`.
            That clears its accumulator by multiplying it by 0, and 0 * Inf is NaN: from the first
            overflow on, which a dynamic scale brings about sooner or later, every step would be
            skipped. `mp.loss_scaled(multi_steps.gradient_transformation())` leaves out just the
            microbatch that overflowed.
    """
    if any(_loss_scales_in(state) for state in _instances(opt_state, optax.MultiStepsState)):
        raise ValueError(
            "`opt_state` holds a loss scale inside the state of an optax.MultiSteps, whose "
            "accumulator stays NaN after one overflow. Write mp.loss_scaled(optax.MultiSteps(...)"
            ".gradient_transformation()) instead."
        )
    found = _loss_scales_in(opt_state)
    if len(found) != 1:
        raise ValueError(
            f"`opt_state` holds {len(found)} loss scales instead of one. Make it with the `init` "
            "of an optimizer that was given to mp.loss_scaled once."
        )
    return found[0]


@dataclasses.dataclass(frozen=True)
class _Init:
    """`init` of a loss-scaled optimizer: a `LossScaledState` of parameters."""

    inner: optax.GradientTransformation
    loss_scale: LossScale

    def __call__(self, params: Any) -> Any:
        inner_state = self.inner.init(widen_float16(params))
        if _loss_scales_in(inner_state):
            raise ValueError(f"A part of `optimizer` {_TWICE}")
        return LossScaledState(
            loss_scale=self.loss_scale.init(),
            skipped_steps=jnp.zeros((), jnp.int32),
            inner_state=inner_state,
        )


@dataclasses.dataclass(frozen=True)
class LossScaledUpdate:
    """`update` of a loss-scaled optimizer, a class so that one can be told from others."""

    inner: optax.GradientTransformation
    loss_scale: LossScale

    def __call__(
        self, updates: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[Any, Any]:
        grads = state.loss_scale.unscale(updates)
        finite = all_finite(grads)
        updates, inner_state = guarded_update(
            self.inner, finite, grads, state.inner_state, widen_float16(params), **extra_args
        )
        return updates, LossScaledState(
            loss_scale=state.loss_scale.update(finite),
            skipped_steps=state.skipped_steps + jnp.where(finite, 0, 1),
            inner_state=inner_state,
        )


def _loss_scales_in(tree: Any) -> list[LossScaleState]:
    return _instances(tree, LossScaleState)


def _instances(tree: Any, kind: type) -> list[Any]:
    leaves = jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, kind))
    return [x for x in leaves if isinstance(x, kind)]
