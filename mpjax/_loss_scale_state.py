"""The loss scale that training carries: a number, a count, and pure functions of both.

scaled gradients = grad(state.scale_loss(loss))
gradients        = state.unscale(scaled gradients)      by the same `state`: only then is the
state            = state.update(all_finite(gradients))  scale that unscales the one that scaled
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import AxisType
from jaxtyping import Array, Bool, Float, Float32, Int32

if TYPE_CHECKING:
    from ._loss_scale import LossScale

_HALF = (jnp.dtype("float16"), jnp.dtype("bfloat16"))
_JOINED, _FEW = (jnp.dtype("float32"), *_HALF), 4096


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LossScaleState:
    """The loss scale at a step of training: two arrays, and the rule as static metadata.

    `DynamicLossScale().init()` makes the first one. It is a pytree of two plain arrays, so it may
    be passed to `jit`, donated, carried by a scan and saved in a checkpoint.

    Attributes:
        scale: float32[], what the loss is multiplied and its gradients are divided by.
        finite_steps: int32[], finite steps since `scale` last moved.
        config: The `DynamicLossScale`, `StaticLossScale` or `NoLossScale` that moves `scale`.
    """

    scale: Float32[Array, ""]
    finite_steps: Int32[Array, ""]
    config: LossScale = dataclasses.field(metadata={"static": True})

    @property
    def multiplier(self) -> Float32[Array, ""]:
        """`scale`, or the constant 1 where the rule scales nothing: no work for the compiler."""
        return self.config.multiplier(self)

    def scale_loss(self, loss: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """Returns `loss * scale`, in float32 if `loss` is float16 or bfloat16.

        A product of 2**15 and a float16 loss of 2 would already overflow. Only the loss itself is
        widened: the backward pass through it goes on in the dtype that the loss has.

        Raises:
            TypeError: If `loss` is not of a real floating dtype.
        """
        loss = jnp.asarray(loss)
        if not jnp.issubdtype(loss.dtype, jnp.floating):
            raise TypeError(
                f"`loss` has dtype {loss.dtype}: only a floating loss can be scaled. Return the "
                "loss itself from the loss function, not a count or a prediction."
            )
        if loss.dtype in _HALF:
            loss = loss.astype(jnp.float32)
        return loss * self.multiplier.astype(loss.dtype)

    def unscale(self, tree: Any) -> Any:
        """Returns `tree` with its floating and complex leaves divided by `scale`.

        The division is done in float32, or wider where a leaf is wider. A float16 leaf comes back
        as float32: the loss was scaled because such a gradient is too small for float16, and
        rounding the quotient to float16 would lose it after all. bfloat16 has the exponents of
        float32, so it stays bfloat16, as every other dtype stays what it is. Integers and
        everything that is not an array pass untouched.
        """
        return jax.tree.map(self._unscale_leaf, tree)

    def update(self, finite: Bool[Array, ""]) -> LossScaleState:
        """Returns the state for the next step, given whether this step's gradients are finite."""
        return self.config.update(self, jnp.asarray(finite))

    def _unscale_leaf(self, x: Any) -> Any:
        if not _is_inexact(x):
            return x
        x = widen_float16(jnp.asarray(x))
        if x.dtype == jnp.bfloat16:
            return (x.astype(jnp.float32) / self.multiplier).astype(jnp.bfloat16)
        return x / self.multiplier.astype(x.dtype)


def widen_float16(tree: Any) -> Any:
    """Returns `tree` with its float16 arrays as float32: the dtypes that `unscale` returns."""

    def widen(x: Any) -> Any:
        if getattr(x, "dtype", None) == jnp.float16:
            return jnp.asarray(x, jnp.float32)
        return x

    return jax.tree.map(widen, tree)


def all_finite(tree: Any) -> Bool[Array, ""]:
    """Returns whether `tree` holds neither Inf nor NaN, as an array: nothing waits for the device.

    Args:
        tree: Any pytree. Floating and complex leaves are looked at; integers, and whatever else is
            no number, count as finite, and so does a tree without leaves.

    Returns:
        bool[].
    """
    leaves = [jnp.asarray(x) for x in jax.tree.leaves(tree) if _is_inexact(x)]
    sums = [_zero_or_nan(x) for x in _joined(leaves)]
    if not sums:
        return jnp.ones((), jnp.bool_)
    # Written to memory, or XLA computes the sum of all leaves in every loop that asks: for a
    # thousand leaves a million operations to compile.
    found = with_layout_constraint(jnp.stack(sums), Layout((0,)))
    return jnp.sum(found) == 0


def _joined(leaves: list[Array]) -> list[Array]:
    """The leaves, those with few numbers as one: for each by itself XLA compiles four loops."""
    if AxisType.Explicit in jax.sharding.get_abstract_mesh().axis_types:
        return leaves  # they may be sharded in different ways
    small = [x.size <= _FEW and x.dtype in _JOINED for x in leaves]
    few = [jnp.ravel(x).astype(jnp.float32) for x, s in zip(leaves, small, strict=True) if s]
    others = [x for x, s in zip(leaves, small, strict=True) if not s]
    return [*others, jnp.concatenate(few)] if len(few) > 1 else leaves


def _zero_or_nan(x: Array) -> Float32[Array, ""]:
    """0, or NaN if an entry of `x` is not finite: one pass, and no array of booleans.

    No maximum: XLA:CPU computes that of many floats by a library that loses NaN.
    """
    parts = (x.real, x.imag) if jnp.iscomplexobj(x) else (x,)
    return sum((jnp.sum(part - part).astype(jnp.float32) for part in parts), jnp.float32(0))


def _is_inexact(x: Any) -> bool:
    return jnp.issubdtype(getattr(x, "dtype", type(x)), jnp.inexact)
