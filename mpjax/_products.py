"""The quantized products that wrapped layers dispatch to.

A Dense, DenseGeneral, Conv or attention projection computes `y = x @ w`. Under a quantized policy:

  x_q, x_s = quantize(x)   int8 or E4M3, after the cast to the compute dtype; the scale is found in
                           `x` (current scaling) or known before (delayed, static)
  w_q, w_s = quantize(w)   from the master copy, or done once by `mp.quantize`
  y = (x_q @ w_q) * x_s * w_s     accumulated in int32 or float32; scales after the dot, in float32

The products of a float weight are differentiable (`_recipes.py` says in which formats); those of a
weight that `mp.quantize` stored (`_stored.py` says how) are not.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp

import mpjax_kernels as mk

from ._context import Product, active, calibration_in_progress
from ._decisions import FLOATS, FORWARD, QUANTIZED, WEIGHTS, Decision, left
from ._manual_axes import check_tracked
from ._observed import ObservedScaling, ObservedWeight
from ._prescaled import PreScaledWeight, is_stored, prescaled
from ._roofline import NO_SIZE, ProductSize, why_plain
from ._scaling import ScalingState
from ._stored import Activation, CannotStoreError, Stored, cut, runs
from ._target import Target

Operand = jax.Array | mk.QTensor | PreScaledWeight

# All but "reference": 8-bit operands or an error, and never a float32 product in silence.
IN_8_BITS = ("native", "tpu", "cpu", "gpu", "xla")


class States(Protocol):
    """Where a layer keeps the states of its operands, by the names in `_recipes.OPERANDS`."""

    def read(self) -> Mapping[str, ScalingState]:
        """The states; declares them where the layer is initialized."""
        ...

    def observe(self, amaxes: Mapping[str, jax.Array]) -> None:
        """Merges amaxes of the forward pass into the states, where these may change."""
        ...

    def write(self, states: Mapping[str, ObservedScaling]) -> None:
        """Replaces states, while batches run for calibration."""
        ...


@dataclasses.dataclass(frozen=True)
class Stateless:
    """The states of a layer that has none."""

    def read(self) -> Mapping[str, ScalingState]:
        """No state."""
        return {}

    def observe(self, amaxes: Mapping[str, jax.Array]) -> None:
        """Nothing to change."""

    def write(self, states: Mapping[str, ObservedScaling]) -> None:
        """Nothing to replace."""


class Kernel(Protocol):
    """Where a layer keeps its kernel."""

    def write(self, weight: ObservedWeight) -> None:
        """Replaces it, while batches run for calibration."""
        ...


@dataclasses.dataclass(frozen=True)
class QuantizedProduct:
    """What the products share.

    Attributes:
      compute_dtype: dtype of the result, unless `preferred_element_type` asks for another.
      formats: of the product and its derivatives, for a weight that is not quantized yet; None
        multiplies that in the compute dtype.
      stored: how a weight is stored, and what multiplies it, for one that is.
      states: the scales that are known before.
      path: the layer's path, under which the product is reported to `observe`; None: not reported.
      kernel: where the layer keeps its kernel; None if it has none.
      profitable_on: the target on which a product that 8 bits would slow down is left as it is.
    """

    compute_dtype: str
    formats: mk.DotFormats | None
    stored: Stored
    states: States = Stateless()
    path: str | None = None
    kernel: Kernel | None = None
    profitable_on: Target | None = None

    def _size(self, lhs: jax.Array, rhs: Any, rhs_axes: Any, batch: Any) -> ProductSize:
        """The sizes of the product, where they decide anything."""
        if self.profitable_on is None:
            return NO_SIZE
        return ProductSize.of_dot(lhs.shape, rhs.shape, rhs_axes, batch)

    def _why_plain(self, size: ProductSize, rhs: Any, *, to_store: bool = False) -> str | None:
        """Why 8 bits would cost time for a float weight: quantized here, or to be stored."""
        if self.profitable_on is None or self.stored.activation is None:
            return None
        if is_stored(rhs) or calibration_in_progress() is not None:
            return None
        operands = {"input"} if to_store else {"input", "kernel"}
        return why_plain(
            self.profitable_on,
            size,
            compute_dtype=self.compute_dtype,
            format=self.stored.activation.format,
            weight_bytes=rhs.dtype.itemsize,
            is_stored=to_store,
            is_scale_known=operands <= self.states.read().keys(),
        )

    def _observe(self, size: ProductSize, rhs: Any, product: Product) -> None:
        """Reports the product to who watches a trace, and if its weight is not worth storing."""
        why = self._why_plain(size, rhs, to_store=True)
        observe_product(self.path, dataclasses.replace(product, left=why))

    def _decision(self, rhs: Any, summed: tuple[int, ...], size: ProductSize) -> Decision:
        """What becomes of the product with a kernel: `summed` are the axes that it sums over."""
        if isinstance(rhs, mk.QTensor | PreScaledWeight):
            return Decision(WEIGHTS if self.stored.activation is None else QUANTIZED)
        if self._why_plain(size, rhs) is not None:
            return left("unprofitable")
        if self.formats is not None:
            backward = (*self.formats.dlhs, *self.formats.drhs)
            word = FORWARD if None in backward else QUANTIZED
            return Decision(word if self.kernel is None else word + FLOATS)
        try:
            cut(self.stored, tuple(rhs.shape), summed)
        except CannotStoreError:
            return left("refused")
        return left("unquantized")

    def _calibrating(
        self, lhs: jax.Array, rhs: Any, lhs_axes: Sequence[int], rhs_axes: Sequence[int]
    ) -> jax.Array | None:
        """While batches run for calibration: observes, and returns the float kernel; else None."""
        if calibration_in_progress() is None:
            return None
        operands = {"input": lhs, "kernel": rhs}
        self.states.write(
            {
                name: state.with_operand(operands[name])
                for name, state in self.states.read().items()
                if isinstance(state, ObservedScaling)
            }
        )
        if not isinstance(rhs, ObservedWeight):
            return jnp.asarray(rhs).astype(lhs.dtype)
        assert self.kernel is not None
        self.kernel.write(rhs.with_input(lhs, lhs_axes, rhs_axes))
        return rhs.weight.astype(lhs.dtype)

    def _unscaled(
        self, x: jax.Array, weight: mk.QTensor | PreScaledWeight, lhs_axes: Any, rhs_axes: Any
    ) -> tuple[jax.Array, mk.QTensor]:
        """The activation that meets a stored weight, and what is stored."""
        if not isinstance(weight, PreScaledWeight):
            return x, weight
        return prescaled(x, weight.pre_quant_scale, lhs_axes, rhs_axes), weight.quantized

    def _stored_operands(
        self, x: jax.Array, weight: mk.QTensor | PreScaledWeight, lhs_axes: Any, rhs_axes: Any
    ) -> tuple[jax.Array | mk.QTensor, mk.QTensor]:
        """What is multiplied for a stored weight: both operands as they enter the kernel."""
        wide, stored = self._unscaled(x, weight, lhs_axes, rhs_axes)
        activation = self._activation(wide, stored, tuple(lhs_axes))
        is_array = not isinstance(activation, mk.QTensor)
        return activation.astype(x.dtype) if is_array else activation, stored

    def _trained(
        self, product: Any, *operands: Any, implementation: Any = IN_8_BITS, **options: Any
    ) -> jax.Array:
        """One of the differentiable products of `mpjax_kernels`, by the states' scales."""
        states = self.states.read()
        out, amaxes = product(
            *operands,
            formats=self.formats,
            scales=_scales(states),
            amax_probes=_probes(states),
            straight_through=True,
            implementation=implementation,
            **options,
        )
        found = {"input": amaxes.lhs, "kernel": amaxes.rhs}
        self.states.observe({name: found[name] for name in states if name in found})
        return out

    def _how(self, weight: mk.QTensor | PreScaledWeight) -> Activation | None:
        """How a stored weight's activations are quantized; None if they are not."""
        if weight.format.name != self.stored.format:
            raise TypeError(
                f"a weight is stored in {weight.format.name} ({weight!r}), but the policy of its "
                f"layer stores {self.stored.format}: apply quantized variables with the policy "
                "that they were quantized under, or load them by mp.load(path, target=...) for "
                "the hardware of this one"
            )
        return self.stored.activation

    def _activation(
        self, x: jax.Array, weight: mk.QTensor, axes: tuple[int, ...]
    ) -> jax.Array | mk.QTensor:
        """The other operand of a stored weight: `axes` are those that a row of it has."""
        how = self._how(weight)
        if how is None:
            return x
        known = self.states.read().get("input")
        if known is not None:
            return mk.quantize(x, how.format, scale=known.scale)
        if how.granularity == "tensor":
            return mk.quantize(x, how.format)
        sizes = None
        if how.granularity != "row":
            sizes = runs([x.shape[axis] for axis in axes], how.granularity)
        return mk.quantize(x, how.format, axis=axes, group_size=sizes)

    def _result_dtype(self, preferred_element_type: Any) -> Any:
        return jnp.dtype(preferred_element_type or self.compute_dtype)


def _scales(states: Mapping[str, ScalingState]) -> mk.DotScales:
    """The scales as the kernels name them: the gradient is one tensor, in two products."""
    scales = {name: state.scale_at_hand for name, state in states.items()}
    gradient = scales.get("output_grad")
    return mk.DotScales(scales.get("input"), scales.get("kernel"), gradient, gradient)


def _probes(states: Mapping[str, ScalingState]) -> mk.DotScales:
    """The probes likewise; one of the gradient is enough."""
    probes = {}
    for name, state in states.items():
        if state.probe:
            check_tracked(state.probe.manual_axes)
            probes[name] = state.probe.zeros
    return mk.DotScales(probes.get("input"), probes.get("kernel"), probes.get("output_grad"))


class QuantizedDotGeneral(QuantizedProduct):
    """`lax.dot_general(activation, kernel)` in 8 bits; the kernel an array or stored."""

    def __call__(
        self,
        lhs: jax.Array,
        rhs: Operand,
        dimension_numbers: Any,
        precision: Any = None,
        preferred_element_type: Any = None,
        out_sharding: Any = None,
    ) -> jax.Array:
        """Same arguments as `jax.lax.dot_general`."""
        refuse_out_sharding(out_sharding)
        (_, rhs_axes), (_, batch) = dimension_numbers
        summed = tuple(sorted(rhs_axes))
        size = self._size(lhs, rhs, rhs_axes, batch)
        self._observe(size, rhs, Product("kernel", tuple(rhs.shape), summed, batch=tuple(batch)))
        options = {
            "precision": precision,
            "preferred_element_type": self._result_dtype(preferred_element_type),
        }
        decision = self._decision(rhs, summed, size)
        with decision.scope():
            return self._multiply(decision, lhs, rhs, dimension_numbers, **options)

    def _multiply(
        self,
        decision: Decision,
        lhs: jax.Array,
        rhs: Operand,
        dimension_numbers: Any,
        **options: Any,
    ) -> jax.Array:
        lhs_axes, rhs_axes = dimension_numbers[0]
        if isinstance(rhs, mk.QTensor | PreScaledWeight):
            options |= {"implementation": IN_8_BITS}
            how = self._how(rhs)
            if how is not None and how.granularity == "row" and "input" not in self.states.read():
                x, w = self._unscaled(lhs, rhs, lhs_axes, rhs_axes)
                return mk.dynamic_dot_general(x, w, dimension_numbers, how.format, **options)
            x, w = self._stored_operands(lhs, rhs, lhs_axes, rhs_axes)
            return mk.dot_general(x, w, dimension_numbers, **options)
        observed = self._calibrating(lhs, rhs, lhs_axes, rhs_axes)
        if observed is not None:
            return jax.lax.dot_general(lhs, observed, dimension_numbers, **options)
        if decision.is_left:
            return jax.lax.dot_general(lhs, rhs.astype(lhs.dtype), dimension_numbers, **options)
        return self._trained(mk.quantized_dot_general, lhs, rhs, dimension_numbers, **options)


def observe_product(path: str | None, product: Product) -> None:
    frame = active.value
    if path is not None and frame is not None and frame.observation is not None:
        known = frame.observation.products.setdefault(path, product)
        if known.left is not None and product.left is None:
            frame.observation.products[path] = product
        if known.contracting != product.contracting:
            raise NotImplementedError(
                f"layer '{path}' contracts its kernel over axes {known.contracting} in one call "
                f"and over {product.contracting} in another; one stored weight cannot have a scale "
                "per output channel for both: give the layer a policy that is not quantized"
            )


def refuse_out_sharding(out_sharding: Any) -> None:
    if out_sharding is not None:
        raise NotImplementedError(
            f"`out_sharding` = {out_sharding} on a quantized layer is not built yet; constrain the "
            "output with `jax.lax.with_sharding_constraint`, or leave this layer unquantized"
        )
