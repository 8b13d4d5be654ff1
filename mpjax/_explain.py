"""`explain`: what the compiler of some hardware makes of every product of a function."""

import sys
from collections.abc import Callable, Iterable
from typing import Any

from ._compile_target import Compiled, compile_for
from ._decisions import FORWARD, LEFT, QUANTIZED, WEIGHTS
from ._explanation import ExplainedProduct, Explanation, check_min_flops
from ._hlo_products import HloProduct, all_instructions, products_of
from ._hlo_program import parse
from ._hlo_runs import runs_of
from ._hlo_shapes import MAIN_MEMORY, dtype_name
from ._hlo_traffic import traffic_of
from ._target import Target


def explain(
    fn: Callable[..., Any], *args: Any, target: str | Target | None = None, **kwargs: Any
) -> Explanation:
    """Compiles a function for some hardware and reports every matrix product and convolution.

        print(mp.explain(model.apply, variables, x, target="v6e"))

    It reads the compiled program, not our intentions: operand dtypes, units, bytes and copies are
    the compiler's. Only the reason why a product is not in 8 bits is told by the wrapped model,
    which writes into the program what its policy decided (`jax.named_scope`). Nothing is run and no
    array is made: arguments may be `jax.ShapeDtypeStruct`s, and the hardware need not be there.

    The program is for one device, without a mesh: arrays that are split over several are refused.
    Of a TPU of several cores per chip it is one core, and the floor is that core's.

    Args:
      fn: a function of arrays, jitted or not: `model.apply` of a Linen model, a wrapped NNX model
        or a method of one, a train step. In a function that is not jitted, arguments without
        arrays (`train=False`) are static.
      *args: its arguments: pytrees of arrays, or of their shapes.
      target: a name of `mp.targets()`, a `Target`, or None for the device at hand. TPUs need
        `mpjax[tpu]`, NVIDIA GPUs `mpjax[cuda-compile]`, where they are not at hand.
      **kwargs: its keyword arguments.

    Returns:
      An `Explanation`: rows in `.products`, those that are missed in `.misses`.

    Raises:
      ImportError: the target's compiler is not installed; the message names the extra.
      NotImplementedError: there is no compiler for this target here, or an argument is split over
        several devices.
      RuntimeError: another process holds the lock of the TPU compiler; the message says which file.
      TypeError: `fn` cannot be called.
      ValueError: no target has this name.
    """
    function, leading = _as_function(fn)
    compiled = compile_for(function, (*leading, *args), kwargs, target)
    return explanation_of(compiled)


def assert_quantized(
    fn: Callable[..., Any],
    *args: Any,
    target: str | Target | None = None,
    min_flops: float = 0.95,
    stored: bool = False,
    **kwargs: Any,
) -> None:
    """Fails unless enough of a function's operations are multiplied in 8 bits, for a test.

    A model whose float weights are quantized at every call passes, as a training step must. For
    inference, `stored=True` wants the weights stored in 8 bits, by `mpjax.quantize`.

    It compiles the function; a report that is there already has a method of the same name.

    Args:
      fn: as `explain` takes it.
      *args: likewise.
      target: likewise.
      min_flops: the part of all operations of products and convolutions that must be in 8 bits.
      stored: whether products that quantize a float weight at every call do not count.
      **kwargs: keyword arguments of `fn`.

    Raises:
      AssertionError: it is less; the message is a table of the products that are not in 8 bits.
      ValueError: `min_flops` is not from 0 to 1.
    """
    check_min_flops(min_flops)  # before anything is compiled
    explain(fn, *args, target=target, **kwargs).assert_quantized(min_flops, stored=stored)


def explanation_of(compiled: Compiled) -> Explanation:
    """Reads a compiled program."""
    program = parse(compiled.text)
    runs = runs_of(program)
    target = compiled.target
    platform = "gpu" if target.platform in ("cuda", "rocm") else target.platform
    products = products_of(program, runs, platform)
    rows = sorted(
        (_row(each, target) for each in products),
        key=lambda row: (-(row.flops or 0), row.path, row.line),
    )
    traffic = traffic_of(program, runs)
    cycles = [
        count * times
        for instruction, times in all_instructions(program, runs)
        if (count := instruction.cycles) is not None
    ]
    multiplying = _seconds(products, target)
    moving = (traffic.read + traffic.written) / target.bandwidth
    return Explanation(
        target.name,
        tuple(rows),
        traffic.read,
        traffic.written,
        None if runs.loops else compiled.estimated_seconds,
        sum(cycles) if cycles else None,
        max(multiplying, moving) * compiled.devices,
        dict(compiled.memory),
        runs.unknown_loops,
    )


def _row(product: HloProduct, target: Target) -> ExplainedProduct:
    copies = product.copies

    def copied(kind: str) -> int:
        # What a kernel unpacks into fast memory costs no trip to the slow one.
        in_main = [c.bytes for c in copies if c.kind == kind and c.space == MAIN_MEMORY]
        return sum(in_main) * product.times

    reason = _reason(product, target, copied("dequantized"))
    arguments = [source for source in product.sources if source.is_argument]
    return ExplainedProduct(
        product.name.path,
        product.line,
        product.name.direction,
        dtype_name(product.lhs.dtype),
        dtype_name(product.rhs.dtype),
        product.unit,
        product.flops,
        product.times,
        sum(source.bytes for source in arguments) * product.times,
        sum(source.padding for source in arguments) * product.times + copied("padded"),
        copied("transposed"),
        copied("dequantized"),
        reason,
        product.cycles,
        product.instruction,
        reason == "" and product.name.floats,
    )


def _reason(product: HloProduct, target: Target, dequantized: int) -> str:
    """Why a product is not in 8 bits, in one word; empty if it is."""
    if product.in_8_bits:
        ours = product.unit.startswith("mpjax_")
        return "" if ours or _is_native(product, target) else "emulated"
    if dequantized:
        return "dequantized"
    decision = product.name.decision
    if decision is None:
        return _reason_outside(product)
    if decision.startswith("left."):
        reason = decision.removeprefix("left.")
        assert reason in LEFT, decision
        return reason
    if decision == WEIGHTS:
        return "weights"
    if decision == FORWARD and product.name.direction == "backward":
        return "policy"
    assert decision in (QUANTIZED, FORWARD), decision
    return "emulated"  # 8 bits were asked for, and the compiler widened them


def _reason_outside(product: HloProduct) -> str:
    """The same for a product that the user wrote."""
    if min(product.lhs.bits, product.rhs.bits) <= 8:
        return "weights"
    arguments = [x.shape for x in product.sources if x.is_argument and x.shape.dtype != "pred"]
    return "dequantized" if any(shape.bits <= 8 for shape in arguments) else "outside"


def _is_native(product: HloProduct, target: Target) -> bool:
    """Whether the target multiplies what the compiler left as it is; 4 bits are unpacked to 8."""

    def is_native(dtype: str) -> bool:
        return dtype in target.dtypes or (
            "int8" in target.dtypes and dtype in ("int4", "uint4", "uint8", "int2", "uint2")
        )

    return all(is_native(dtype_name(x.dtype)) for x in (product.lhs, product.rhs))


def _seconds(products: Iterable[HloProduct], target: Target) -> float:
    """The time of all products at the peak rate of the wider of their operands."""
    return sum(
        (each.flops or 0)
        / target.rate(dtype_name(max(each.lhs, each.rhs, key=lambda x: x.bits).dtype))
        for each in products
    )


def _as_function(fn: Any) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """A function of arrays and what comes before the user's arguments: an NNX model's weights."""
    nnx = sys.modules.get("flax.nnx")  # an instance exists only once it is imported
    linen = sys.modules.get("flax.linen")
    if linen is not None and isinstance(fn, linen.Module):
        raise TypeError(
            f"`fn` is {type(fn).__name__}, a Linen module, which does not hold its weights: call "
            "mp.explain(model.apply, variables, x)"
        )
    if not callable(fn):
        raise TypeError(f"`fn` must be a function, but got {fn!r} of type {type(fn).__name__}")
    model: Any = fn if nnx is not None and isinstance(fn, nnx.Module) else _owner(fn)
    if nnx is None or not isinstance(model, nnx.Module):
        return fn, ()
    from .nnx._function import method_as_function

    function, state = method_as_function(model, "__call__" if model is fn else fn.__name__)
    return function, (state,)


def _owner(method: Any) -> Any:
    """What a bound method is bound to; None for another function."""
    return getattr(method, "__self__", None)
