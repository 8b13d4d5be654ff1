"""The keywords of `mpjax.quantize` that are about calibration, checked before any work."""

import difflib
from collections.abc import Sequence
from typing import Any

import jax
from jax.core import Tracer

from ._calibration import STATISTICS, Calibration
from ._observers import AbsMax, Observer
from ._policy import DTypePolicy
from ._quantized_policy import QuantizedDTypePolicy
from ._recipes import recipe_of
from ._stored import stored_of

_OF_OBSERVER = ("init", "update", "amax")
_NO_NEED = (
    "`calibration` was given, but nothing needs it: the policy finds the scales of its activations "
    "at every call, or leaves them as they are, and rounds weights to nearest. Ask for a method "
    "(method='smoothquant', 'awq' or 'gptq'), take a policy with static scales "
    "('int8_static_from_...'), or leave `calibration` out"
)


def ask(
    policies: Sequence[DTypePolicy],
    batches: Any,
    method: str | None,
    observer: Any,
    progress: bool | None,
    variables: Any,
) -> Calibration | None:
    """What a user asks for; None if it is no calibration.

    Raises:
      TypeError: `observer` is none.
      ValueError: something is asked for that needs batches, or has no use; or JAX is tracing.
    """
    asked = Calibration(batches, method, _check_observer(observer), progress)
    methods = {asked.method_of(policy) for policy in policies} - {None}
    if batches is None:
        _check_without_batches(policies, method, observer)
        return None
    if any(isinstance(x, Tracer) for x in jax.tree.leaves(variables)):
        raise ValueError(
            "`calibration` runs batches and looks at the results, which cannot be traced: call "
            "mp.quantize outside of jax.jit and jax.eval_shape"
        )
    observes = any(recipe is not None and recipe.states for recipe in map(recipe_of, policies))
    if observer is not None and not observes:
        raise ValueError(
            f"`observer` is {observer!r}, but no policy of the model keeps static scales that it "
            "could make: take 'int8_static_from_...', or leave `observer` out"
        )
    if not observes and not methods and any(map(stored_of, policies)):
        raise ValueError(_NO_NEED)
    return asked


def _check_without_batches(
    policies: Sequence[DTypePolicy], method: str | None, observer: Any
) -> None:
    if method is not None or observer is not None:
        given = f"method={method!r}" if method is not None else f"observer={observer!r}"
        raise ValueError(
            f"{given} needs batches to learn from: mp.quantize(..., calibration=batches)"
        )
    for policy in policies:
        if isinstance(policy, QuantizedDTypePolicy) and policy.scheme.method is not None:
            raise ValueError(
                f"the policy {policy.name!r} chooses its weights by {policy.scheme.method}, which "
                "needs batches to learn from: mp.quantize(..., calibration=batches). To round to "
                f"nearest, take 'int4/{policy.scheme.group_size}_from_{policy.source_name}'"
            )


def _check_observer(observer: Any) -> Observer:
    """The observer, `AbsMax()` for None; TypeError for what is none."""
    if observer is None:
        return AbsMax()
    if isinstance(observer, type) or not all(hasattr(observer, name) for name in _OF_OBSERVER):
        hint = f": {observer.__name__}()" if isinstance(observer, type) else ""
        raise TypeError(
            "`observer` must be an observer such as mp.AbsMax(), mp.Percentile(99.99), mp.MSE(), "
            f"mp.MovingAverage() or mp.Entropy(), got {observer!r}{hint}"
        )
    return observer


def split_method(method: Any, model: Any) -> tuple[str | None, Any]:
    """`method=` as a calibration method and as Flax' own `method=`, of which it is one.

    `"smoothquant"`, `"awq"` and `"gptq"` are methods of calibration. A function, or the name of a
    method of a Linen model, is what Flax calls in place of `__call__`.

    Raises:
      ValueError: it is neither, or the name of both.
      TypeError: it is no name and no function.
    """
    if method is None or callable(method):
        return None, method
    if not isinstance(method, str):
        raise TypeError(f"`method` must be a name or a function, got {method!r}")
    is_own = callable(getattr(type(model), method, None))
    if method not in STATISTICS:
        if is_own:
            return None, method
        near = difflib.get_close_matches(method, STATISTICS, n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"`method` is {method!r}, but must be one of {(*STATISTICS,)}, or a method of "
            f"{type(model).__name__} that Flax is to call{hint}"
        )
    if is_own:
        name = type(model).__name__
        raise ValueError(
            f"method={method!r} could mean calibration or the method of that name of {name}: for "
            f"the second, pass the function, method={name}.{method}; for the first, take a "
            "policy that has the method, such as 'gptq/4/128', or rename the method"
        )
    return method, None
