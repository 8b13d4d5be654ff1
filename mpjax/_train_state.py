"""`TrainState`: everything a Linen training loop carries, in one pytree."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Self

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Int32

from ._accumulate import accumulate_gradients
from ._adapters import POLICY
from ._gradients import Gradients, check_variables, value_and_grad
from ._guarded_update import guarded_update
from ._loss_scale import LossScale, training_loss_scale
from ._loss_scale_state import LossScaleState, widen_float16
from ._loss_scaled import is_loss_scaled, split_loss_scaled
from ._scaling import observe_scaling, update_scaling
from ._serialize import get_policy


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Variables, optimizer, loss scale and scaling states of a Linen model in training.

        state = mp.TrainState.create(
            apply_fn=model.apply, variables=variables, tx=optax.adamw(1e-3), policy=model.policy)

        @jax.jit
        def train_step(state, batch):
            def loss_fn(variables):
                return cross_entropy(state.apply_fn(variables, batch["x"]), batch["y"])
            loss, grads = state.value_and_grad(loss_fn)
            return state.apply_gradients(grads), loss

    A step whose gradients are not finite changes the loss scale and `skipped_steps`, and nothing
    else by a bit.

    Attributes:
      step: int32[], optimizer steps taken; those that were skipped do not count.
      skipped_steps: int32[], steps that were skipped.
      variables: what `init` returned: `"params"`, `"scaling"` and the other collections.
      opt_state: the state of `tx`.
      loss_scale: the state of the loss scale.
      apply_fn: the model's `apply`.
      tx: the optimizer.
    """

    step: Int32[Array, ""]
    skipped_steps: Int32[Array, ""]
    variables: Mapping[str, Any]
    opt_state: Any
    loss_scale: LossScaleState
    apply_fn: Callable[..., Any] = dataclasses.field(metadata={"static": True})
    tx: optax.GradientTransformation = dataclasses.field(metadata={"static": True})

    @classmethod
    def create(
        cls,
        *,
        apply_fn: Callable[..., Any],
        variables: Mapping[str, Any],
        tx: optax.GradientTransformation,
        policy: Any = None,
    ) -> Self:
        """The state before the first step.

        Args:
          apply_fn: the `apply` of the wrapped model.
          variables: what its `init` returned.
          tx: any optax optimizer or chain. It sees unscaled gradients of the parameters only. An
            `mp.loss_scaled` one is not wrapped twice: its loss scale takes the policy's place.
          policy: the model's `policy`, for the loss scale: that of the outermost policy, or of a
            map's default. Anything `get_policy` takes; None is that of the wrapped model whose
            `apply` was given. For no loss scale in spite of it, give `mp.loss_scaled(tx, None)`.

        Raises:
          TypeError: `variables` or `tx` is something else.
          ValueError: `policy` names none, a parameter is quantized, or `mp.loss_scaled` is
            somewhere inside of `tx`.
        """
        check_variables(variables)
        policy = _policy_of(apply_fn) if policy is None else get_policy(policy)
        tx, loss_scale = unwrapped(tx, policy)
        opt_state = tx.init(widen_float16(variables["params"]))
        check_opt_state(opt_state)
        return cls(
            step=jnp.zeros((), jnp.int32),
            skipped_steps=jnp.zeros((), jnp.int32),
            variables=dict(variables),
            opt_state=opt_state,
            loss_scale=loss_scale.init(),
            apply_fn=apply_fn,
            tx=tx,
        )

    @property
    def params(self) -> Any:
        """The parameters."""
        return self.variables["params"]

    @property
    def scaling(self) -> Any:
        """The collection `scaling`; empty where the policy keeps no state."""
        return self.variables.get("scaling", {})

    def replace(self, **fields: Any) -> Self:
        """A copy with other fields."""
        return dataclasses.replace(self, **fields)

    def value_and_grad(self, loss_fn: Callable[..., Any], *, has_aux: bool = False) -> Any:
        """`(loss, Gradients)` of `loss_fn(variables)` at this state, under its loss scale.

        Args:
          loss_fn: takes the variables; returns a floating scalar, or `(loss, aux)`.
          has_aux: whether it returns `(loss, aux)`.

        Returns:
          `(loss, Gradients)`, or `((loss, aux), Gradients)`. Neither is scaled.
        """
        function = value_and_grad(loss_fn, has_aux=has_aux, loss_scale=self.loss_scale)
        return function(self.variables)

    def accumulate_gradients(
        self, loss_fn: Callable[..., Any], batch: Any, microbatches: int, *, has_aux: bool = False
    ) -> Any:
        """As `value_and_grad`, of `loss_fn(variables, microbatch)` over the parts of a batch.

        See `mpjax.accumulate_gradients`.
        """
        function = accumulate_gradients(
            loss_fn, microbatches, has_aux=has_aux, loss_scale=self.loss_scale
        )
        return function(self.variables, batch)

    def apply_gradients(
        self, grads: Gradients, *, collections: Mapping[str, Any] | None = None, **extra_args: Any
    ) -> Self:
        """The state after an optimizer step.

        Args:
          grads: from `value_and_grad`; their `params` may have been clipped or averaged since.
          collections: new values of other collections, `{"batch_stats": ...}`, such as
            `apply(..., mutable=["batch_stats"])` returned. A skipped step leaves them too.
          **extra_args: passed on to an optimizer that takes them.

        Raises:
          TypeError: `grads` are not `Gradients`, or `collections` holds `params` or `scaling`.
          ValueError: the gradients are those of other parameters.
        """
        check_gradients(grads)
        check_same_tree(grads.params, self.params)
        _check_collections(collections)
        finite = grads.finite
        params = widen_float16(self.params)
        updates, opt_state = guarded_update(
            self.tx, finite, grads.params, self.opt_state, params, **extra_args
        )
        moved = {"params": jax.tree.map(applied, self.params, updates), **(collections or {})}
        old = {name: self.variables.get(name, new) for name, new in moved.items()}
        variables = {**self.variables, **select(finite, moved, old)}
        if "scaling" in self.variables:
            variables["scaling"] = next_scaling(
                self.scaling, grads.observed, finite, self.opt_state, opt_state
            )
        return dataclasses.replace(
            self,
            step=self.step + jnp.where(finite, 1, 0),
            skipped_steps=self.skipped_steps + jnp.where(finite, 0, 1),
            variables=variables,
            opt_state=opt_state,
            loss_scale=self.loss_scale.update(finite),
        )


def unwrapped(
    tx: optax.GradientTransformation, policy: Any
) -> tuple[optax.GradientTransformation, LossScale]:
    """An optimizer without `mp.loss_scaled` around it, and the loss scale to train with.

    Raises:
      TypeError: `tx` is not an optimizer of optax.
    """
    if isinstance(tx, optax.MultiSteps):
        tx = tx.gradient_transformation()
    if not isinstance(tx, optax.GradientTransformation):
        raise TypeError(
            "`tx` must be an optax.GradientTransformation, such as optax.adamw(1e-3), but got "
            f"{tx!r}"
        )
    if is_loss_scaled(tx):
        return split_loss_scaled(tx)
    return tx, training_loss_scale(getattr(policy, "loss_scale", None))


def check_opt_state(opt_state: Any) -> None:
    """Raises ValueError if an optimizer inside a chain is loss scaled: it would divide twice."""
    leaves = jax.tree.leaves(opt_state, is_leaf=lambda x: isinstance(x, LossScaleState))
    if any(isinstance(x, LossScaleState) for x in leaves):
        raise ValueError(
            "a part of `tx` is an mp.loss_scaled optimizer, but the gradients that reach it are "
            "unscaled already: put mp.loss_scaled around the whole of it, or leave it out"
        )


def next_scaling(
    scaling: Any, observed: Any, finite: Bool[Array, ""], opt_state: Any, new_opt_state: Any
) -> Any:
    """Scaling states after a step: the same if it is not finite, bit for bit.

    Between the steps of `MultiSteps` they only observe.
    """
    amaxes = jax.tree.map(lambda amax: jnp.where(finite, amax, 0), observed)
    before, after = (_gradient_steps(each) for each in (opt_state, new_opt_state))
    steps = [a != b for a, b in zip(after, before, strict=True)]
    moved = finite & jnp.any(jnp.stack(steps)) if steps else finite
    return update_scaling(observe_scaling(scaling, amaxes), when=moved)


def _gradient_steps(opt_state: Any) -> list[Any]:
    leaves = jax.tree.leaves(opt_state, is_leaf=lambda x: isinstance(x, optax.MultiStepsState))
    return [x.gradient_step for x in leaves if isinstance(x, optax.MultiStepsState)]


def applied(param: Array, update: Any) -> Array:
    """A parameter after an update, in its own dtype."""
    # optax.apply_updates would round a float32 update to float16 before the sum.
    return jnp.asarray(param + update, param.dtype)


def select(which: Array, one: Any, other: Any) -> Any:
    """The leaves of `one` where `which`, else those of `other`."""
    return jax.tree.map(lambda a, b: jnp.where(which, a, b), one, other)


def check_gradients(grads: Any) -> None:
    """Raises TypeError for anything but `Gradients`."""
    if not isinstance(grads, Gradients):
        raise TypeError(
            "`grads` must be the mp.Gradients that value_and_grad returned; for other gradients of "
            f"the parameters, write grads.replace(params=...). Got {type(grads).__name__}"
        )


def check_same_tree(grads: Any, params: Any) -> None:
    """Raises ValueError for gradients of other parameters than these."""
    found, expected = ({*map(_name, jax.tree.leaves_with_path(tree))} for tree in (grads, params))
    if found != expected:
        raise ValueError(
            "the gradients are not those of these parameters: "
            f"{sorted(found - expected)[:5]} are no parameters, {sorted(expected - found)[:5]} "
            "have no gradient. Give what value_and_grad returned at this state"
        )


def _name(item: tuple[Any, Any]) -> str:
    return jax.tree_util.keystr(item[0])


def _policy_of(apply_fn: Any) -> Any:
    """The policy of the wrapped model that a bound `apply` belongs to, or None."""
    return getattr(type(getattr(apply_fn, "__self__", None)), POLICY, None)


def _check_collections(collections: Any) -> None:
    own = {"params", "scaling"} & set(collections or ())
    if own:
        raise TypeError(
            f"`collections` holds {sorted(own)}, which apply_gradients updates by itself: give "
            "the others only, such as {'batch_stats': ...}"
        )
