"""`Optimizer`: Flax' own, with loss scale and scaling states."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from .._adapters import ROOT
from .._gradients import Gradients
from .._guarded_update import guarded_update
from .._loss_scale import NoLossScale
from .._loss_scale_state import widen_float16
from .._train_state import (
    applied,
    check_gradients,
    check_opt_state,
    next_scaling,
    select,
    unwrapped,
)
from ._states import LOSS_SCALE, LossScale, Scaling


class Optimizer(nnx.Optimizer):
    """`nnx.Optimizer` for a wrapped model.

        optimizer = mp.nnx.Optimizer(model, optax.adamw(1e-3), wrt=nnx.Param)

        @nnx.jit
        def train_step(model, optimizer, x, y):
            loss, grads = mp.nnx.value_and_grad(loss_fn)(model, x, y)
            optimizer.update(model, grads)
            return loss

    A step whose gradients are not finite changes the loss scale and `skipped_steps`, and nothing
    else by a bit. The state of a loss scale is kept in the model, as `model.loss_scale`, where
    `value_and_grad` finds it.

    Args:
      model: the module to train. If its policy is `mixed_float16`, or has a loss scale otherwise,
        it is given the attribute `loss_scale`, a `LossScale` variable.
      tx: any optax optimizer or chain. It sees unscaled gradients of the parameters only. The loss
        scale of an `mp.loss_scaled` one takes the policy's place.
      wrt: a filter of the variables to train, `nnx.Param`.

    Attributes:
      step: optimizer steps taken; those that were skipped do not count.
      skipped_steps: int32[], steps that were skipped.
      opt_state: the state of `tx`.

    Raises:
      TypeError: `tx` is not an optimizer of optax.
      ValueError: the model has an attribute `loss_scale` of another meaning, or `mp.loss_scaled` is
        somewhere inside of `tx`.
    """

    def __init__(self, model: nnx.Module, tx: Any, *, wrt: Any, **kwargs: Any):
        tx, loss_scale = unwrapped(tx, getattr(type(model), ROOT, None))
        super().__init__(model, tx._replace(init=_CheckedInit(tx)), wrt=wrt, **kwargs)
        _attach(model, loss_scale)  # last, so that an optimizer that fails leaves the model alone
        self.skipped_steps = type(self.step)(jnp.zeros((), jnp.int32))

    def update(self, model: nnx.Module, grads: Gradients, /, **kwargs: Any) -> Any:
        """Updates parameters, optimizer state, scaling states and loss scale.

        Args:
          model: the model that the optimizer was made for.
          grads: from `mp.nnx.value_and_grad`; their `params` may have been clipped since.
          **kwargs: passed on to an optimizer that takes them.

        Returns:
          The updates of the parameters, zeros for a step that was skipped.

        Raises:
          TypeError: `grads` are not `Gradients`.
        """
        check_gradients(grads)
        finite = grads.finite
        params = nnx.as_pure(nnx.state(model, self.wrt))
        before = nnx.as_pure(self.opt_state)
        updates, after = guarded_update(
            self.tx,
            finite,
            nnx.as_pure(nnx.state(grads.params, self.wrt)),
            before,
            widen_float16(params),
            **nnx.as_pure(kwargs),
        )
        scaling = nnx.as_pure(nnx.state(model, Scaling))
        observed = nnx.as_pure(grads.observed)
        nnx.update(model, next_scaling(scaling, observed, finite, before, after))
        nnx.update(model, select(finite, jax.tree.map(applied, params, updates), params))
        nnx.update(self.opt_state, nnx.state(after))
        self.step[...] += jnp.where(finite, 1, 0).astype(self.step[...].dtype)
        self.skipped_steps[...] += jnp.where(finite, 0, 1)
        held = vars(model).get(LOSS_SCALE)
        if isinstance(held, LossScale):
            held.set_value(held.get_value().update(finite))
        return updates


@dataclasses.dataclass(frozen=True)
class _CheckedInit:
    """`tx.init` with float16 parameters as float32, the dtype of their gradients.

    A class, so that two optimizers made of one `tx` are equal: `nnx.jit` compiles once for both.
    """

    tx: optax.GradientTransformation

    def __call__(self, params: Any) -> Any:
        opt_state = self.tx.init(widen_float16(params))
        check_opt_state(opt_state)
        return opt_state


def _attach(model: Any, loss_scale: Any) -> None:
    held = vars(model).get(LOSS_SCALE)
    if held is not None and not isinstance(held, LossScale):
        raise ValueError(
            f"{type(model).__name__} has an attribute 'loss_scale' of its own, where the state of "
            "the loss scale would be kept: rename it"
        )
    if not isinstance(loss_scale, NoLossScale):
        setattr(model, LOSS_SCALE, LossScale(loss_scale.init()))
    elif held is not None:
        delattr(model, LOSS_SCALE)
