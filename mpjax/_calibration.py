"""What a user asks of calibration, and what that makes of each layer."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from ._context import Product
from ._input_statistics import ChannelAbsMax, ChannelMean, RowSample, SecondMoment
from ._matrix_view import MatrixView
from ._observers import AbsMax, Observer
from ._policy import DTypePolicy
from ._quantized_policy import QuantizedDTypePolicy
from ._stored import CannotStoreError, Stored, cut, stored_of

# What each method needs to know of the inputs of a layer.
STATISTICS: dict[str, tuple[tuple[str, Any], ...]] = {
    "smoothquant": (("amax", ChannelAbsMax()), ("sample", RowSample())),
    "awq": (("mean", ChannelMean()), ("moment", SecondMoment())),
    "gptq": (("moment", SecondMoment()),),
}


@dataclasses.dataclass(frozen=True)
class Calibration:
    """What `mpjax.quantize` was asked for.

    Attributes:
      batches: an iterable of batches.
      method: how weights are rounded, where the policy does not say; None: to nearest.
      observer: what static scales are made from.
      progress: whether to show a bar; None: where it can be seen.
    """

    batches: Any
    method: str | None = None
    observer: Observer = AbsMax()
    progress: bool | None = None

    def method_of(self, policy: DTypePolicy) -> str | None:
        """The method for layers of a policy.

        Raises:
          ValueError: the policy has another.
        """
        if not isinstance(policy, QuantizedDTypePolicy):
            return None
        own = policy.scheme.method
        if None not in (own, self.method) and own != self.method:
            raise ValueError(
                f"method={self.method!r} was asked for, but the policy {policy.name!r} chooses its "
                f"weights by {own!r}: leave `method` out, or take an 'int4' policy"
            )
        return own or self.method


@dataclasses.dataclass(frozen=True)
class WeightPlan:
    """How one weight is to be calibrated.

    Attributes:
      method: by which it is rounded; None: to nearest.
      reason: why it is not the method that was asked for; empty if it is, or none was.
      stored: how it is stored.
      view: the weight as matrices.
    """

    method: str | None
    reason: str
    stored: Stored
    view: MatrixView

    @property
    def statistics(self) -> tuple[tuple[str, Any], ...]:
        """What its inputs are asked for."""
        return STATISTICS[self.method] if self.method else ()


def plan_of(
    calibration: Calibration, policy: DTypePolicy, product: Product, shape: tuple[int, ...]
) -> WeightPlan:
    """The plan of a weight of this shape, stacked layers included."""
    layers = shape[: len(shape) - len(product.shape)]
    stored = stored_of(policy)
    assert stored is not None, f"{product} is multiplied as quantized under {policy!r}"
    method = calibration.method_of(policy)
    reason = "" if method is None else _why_not(method, product, stored)
    view = MatrixView(tuple(layers), product)
    return WeightPlan(None if reason else method, reason, stored, view)


def _why_not(method: str, product: Product, stored: Stored) -> str:
    """Why a weight is rounded to nearest although a method was asked for; empty if it is not."""
    if product.name == "embedding":
        return "rounded to nearest: a table is looked up"
    if product.is_conv:
        return f"rounded to nearest: {method} is for matrix products, and this is a convolution"
    if product.batch:
        return f"rounded to nearest: {method} is not built for products with batch axes"
    if method == "awq" and stored.activation is not None:
        return "rounded to nearest: awq is for activations that are not quantized"
    try:
        cut(stored, product.shape, product.contracting)
    except CannotStoreError as error:
        return str(error)
    return ""


def check_plans(plans: Mapping[str, WeightPlan], observes: bool, model: str) -> None:
    """Raises ValueError if there is nothing for the batches to decide."""
    if observes or any(plan.method for plan in plans.values()):
        return
    reasons = dict.fromkeys(plan.reason for plan in plans.values() if plan.reason)
    raise ValueError(
        f"`calibration` would change nothing: no layer of {model} takes the method asked for"
        + "".join(f"; {reason}" for reason in reasons)
    )
