"""One weight, rounded by SmoothQuant, AWQ or GPTQ, or plainly where that is better.

Of every layer of a stack the better of the two is kept, by the error of the layer's outputs on the
inputs that were seen.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

import mpjax_kernels as mk

from ._awq import awq
from ._calibration import WeightPlan
from ._gptq import gptq
from ._observers import AbsMax, Observer
from ._output_error import exact_matmul, output_error
from ._prescaled import PreScaledWeight
from ._quantization_report import Rounding
from ._smoothquant import smoothquant
from ._stored import Stored, cut

Plain = Callable[[Any], mk.QTensor]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Tried:
    """What a method made of the weights [S, K, N] of a stack.

    Attributes:
      quantized: QTensor [S, K, N], for GPTQ; else None.
      scales: float32 [S, K], what inputs are divided by, for the others; else None.
      plain_error, error: float32 [S], squared and summed.
      power: float32 [S], of the exact outputs, likewise.
    """

    quantized: mk.QTensor | None
    scales: Float[Array, "s k"] | None
    plain_error: Float[Array, " s"]
    error: Float[Array, " s"]
    power: Float[Array, " s"]


def calibrated_weight(
    weight: Any, plan: WeightPlan, states: Mapping[str, Any], plain: Plain
) -> tuple[mk.QTensor | PreScaledWeight, Rounding]:
    """A weight, rounded by its plan's method where that is better than rounding to nearest.

    Args:
      weight: floating array.
      plan: how.
      states: of the statistics of its inputs.
      plain: rounds an array of the weight's shape to nearest.
    """
    if plan.method is None:
        return plain(weight), Rounding(note=plan.reason)
    matrices = plan.view.matrices(jnp.asarray(weight))
    statistics = results_of(plan, states)
    if statistics is None:
        note = "rounded to nearest: no input of it but zeros was seen"
        return plain(weight), Rounding(plan.method, note=note)
    tried = _try(matrices, statistics, plan.method, plan.stored)
    if plan.method == "gptq":
        kept = plan.view.quantized(tried.quantized, plain(weight))
    else:
        kept = _prescaled(weight, tried.scales, plan, plain)
    return kept, _rounding(plan.method, tried)


def results_of(plan: WeightPlan, states: Mapping[str, Any]) -> dict[str, Array] | None:
    """The statistics [S, ...] of a stack of S layers; None if no input was seen.

    Of a sample the rows that were filled.
    """
    layers, results = plan.view.layers, {}
    for name, statistic in plan.statistics:
        flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[len(layers) :]), states[name])
        result = jax.vmap(statistic.result)(flat)
        if not bool(jnp.any(result)):
            return None
        if name == "sample":
            result = result[:, : int(jnp.max(jnp.sum(flat.priority >= 0, axis=1)))]
        results[name] = result
    return results


def smoothed_amax(
    weight: PreScaledWeight, plan: WeightPlan, states: Mapping[str, Any], observer: Observer
) -> Float[Array, "*layers"]:
    """The amax of what a layer quantizes, its inputs times `pre_quant_scale`.

    Exact for `AbsMax`, by the largest |x| of each channel; any other observer sees the sample.
    """
    scale, found = weight.pre_quant_scale.reshape(-1, plan.view.inputs), results_of(plan, states)
    assert found is not None and plan.stored.activation is not None
    if isinstance(observer, AbsMax):
        return jnp.max(found["amax"] * scale, axis=1).reshape(plan.view.layers)
    format = mk.get_format(plan.stored.activation.format)
    amaxes = [
        observer.amax(observer.update(observer.init(), sample * each), format)
        for sample, each in zip(found["sample"], scale, strict=True)
    ]
    return jnp.stack(amaxes).reshape(plan.view.layers)


@functools.partial(jax.jit, static_argnames=("method", "stored"))
def _try(
    matrices: Float[Array, "s k n"], statistics: dict[str, Array], method: str, stored: Stored
) -> _Tried:
    """The method, and of each layer plain rounding where that is better."""
    solve = {"smoothquant": _smoothed, "awq": _aware, "gptq": _compensated}[method]
    one = functools.partial(solve, stored=stored)
    return jax.lax.map(
        lambda args: one(args[0].astype(jnp.float32), args[1]), (matrices, statistics)
    )


def _smoothed(weight: Array, of: dict[str, Array], stored: Stored) -> _Tried:
    found = smoothquant(weight, of["amax"], of["sample"], stored)
    power = jnp.sum(exact_matmul(of["sample"], weight) ** 2)
    better = found.error < found.plain_error
    scales = jnp.where(better, found.scales, 1.0)
    return _Tried(None, scales, found.plain_error, found.error, power)


def _aware(weight: Array, of: dict[str, Array], stored: Stored) -> _Tried:
    found = awq(weight, of["mean"], of["moment"], stored)
    better = found.error < found.plain_error
    scales = jnp.where(better, found.scales, 1.0)
    power = output_error(weight, of["moment"])
    return _Tried(None, scales, found.plain_error, found.error, power)


def _compensated(weight: Array, of: dict[str, Array], stored: Stored) -> _Tried:
    axis, size = cut(stored, weight.shape, (0,))
    grid: dict[str, Any] = {"axis": axis, "group_size": size, "symmetric": stored.symmetric}
    found = gptq(weight, of["moment"], stored.format, **grid)
    plain = mk.quantize(weight, stored.format, **grid)
    better = found.error < found.plain_error
    values = jnp.where(better, found.quantized.values, plain.values)
    kept = dataclasses.replace(found.quantized, values=values)
    power = output_error(weight, of["moment"])
    return _Tried(kept, None, found.plain_error, found.error, power)


def _prescaled(
    weight: Any, scales: Float[Array, "s k"] | None, plan: WeightPlan, plain: Plain
) -> mk.QTensor | PreScaledWeight:
    """The weight with its rows multiplied, and rounded; plainly if no row of it is."""
    assert scales is not None
    if bool(jnp.all(scales == 1)):
        return plain(weight)
    array = jnp.asarray(weight)
    scaled = plain(array.astype(jnp.float32) * plan.view.per_input(scales))
    quantized = dataclasses.replace(scaled, dtype=array.dtype)
    return PreScaledWeight(quantized, plan.view.per_input(1 / scales))


def _rounding(method: str, tried: _Tried) -> Rounding:
    plain, error, power = (
        np.asarray(x, np.float64) for x in (tried.plain_error, tried.error, tried.power)
    )
    worse = ~(error < plain)
    kept = np.where(worse, plain, error)
    note = ""
    if worse.all():
        note = "plain rounding kept, which is no worse"
    elif worse.any():
        note = f"plain rounding kept in {worse.sum()} of {worse.size} layers of the stack"
    total = max(float(power.sum()), float(np.finfo(np.float64).tiny))
    return Rounding(
        method, float(np.sqrt(plain.sum() / total)), float(np.sqrt(kept.sum() / total)), note
    )
